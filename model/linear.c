/* linear.c - the product, its adapter, and both ways back. */
#include "model/linear.h"
#include "kernels/activation.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "kernels/random.h"

#include <stdio.h>
#include <string.h>

static void list_append(LinearList *list, Linear *l) {
    if (!list->end) list->end = &list->first;
    *list->end = l;
    list->end = &l->next;
}

void linear_declare(Linear *l, ParamList *params, LinearList *list, const char *name, int64_t out,
                    int64_t in) {
    *l = (Linear){.in = in, .out = out, .groups = 1};
    CHECK(snprintf(l->name, sizeof l->name, "%s%s", params->path, name) < (int)sizeof l->name,
          "name too long: %s", name);
    params_enter(params, "%s", name);
    l->weight = PARAMS_ADD(params, "weight", out, in);
    params_leave(params);
    list_append(list, l);
}

void linear_declare_kind(Linear *l, ParamList *params, LinearList *list, LinearKind kind,
                         const char *name, int64_t out, int64_t in) {
    static const char *const bounds[] = {"input_min", "input_max", "output_min", "output_max"};
    if (kind == LINEAR_PLAIN) {
        linear_declare(l, params, list, name, out, in);
        return;
    }
    params_enter(params, "%s", name);
    linear_declare(l, params, list, "linear", out, in);
    for (int i = 0; i < 4 && kind == LINEAR_CLIPPED; i++) {
        l->bounds[i] = params_add(params, bounds[i], 0, NULL);
        l->bounds[i]->buffer = true;
    }
    params_leave(params);
}

void linear_loaded(Linear *l) {
    for (int i = 0; i < 4; i++)
        if (l->bounds[i]) l->bound[i] = tensor_first(l->bounds[i]->value);
}

void linear_declare_grouped(Linear *l, ParamList *params, LinearList *list, const char *name,
                            int64_t groups, int64_t out, int64_t in) {
    *l = (Linear){.in = in, .out = out, .groups = groups};
    CHECK(snprintf(l->name, sizeof l->name, "%s%s", params->path, name) < (int)sizeof l->name,
          "name too long: %s", name);
    l->weight = PARAMS_ADD(params, name, groups, out, in);
    list_append(list, l);
}

void linear_take_groups(Linear *l, int64_t first, int64_t n) {
    Param *params[] = {l->weight, l->lora ? l->lora->A : NULL, l->lora ? l->lora->B : NULL,
                       l->factors};
    for (size_t i = 0; i < sizeof params / sizeof *params; i++) {
        Param *p = params[i];
        if (!p) continue;
        p->group = first;
        p->groups = l->groups;
        p->value.shape[0] = p->grad.shape[0] = n;
    }
    l->groups = n;
}

/* Whether it has an adapter that is trained. */
static bool is_trained(const Linear *l) {
    return l->lora && l->lora->A->trainable;
}

/* x as the adapter sees it: dropped out while training. */
static Tensor adapter_input(const Lora *lora, Tensor x, Pass *p) {
    if (!p->training || lora->dropout == 0) return x;
    Tensor dropped = arena_like(p->scratch, x);
    dropout(dropped, x, lora->dropout, random_key(lora->key, p->key));
    return dropped;
}

/* One product of the adapter, dense or grouped. */
static void adapter_product(const Linear *l, Layout layout, Tensor y, Write write, Tensor a,
                            Tensor b, Tensor offsets, float alpha) {
    if (l->groups == 1)
        matmul_ordered(layout, y, write, a, b, alpha);
    else
        grouped_matmul(layout, y, write, a, b, offsets, alpha);
}

/* `codes`: of x, if they are there. */
static void multiply(Tensor y, Tensor x, Tensor codes, Tensor weight, bool int8) {
    if (int8 && dtype_is_tiled(weight.dtype))
        matmul_int8_several(&y, x, codes, &weight, 1);
    else
        matmul(NT, y, SET, x, weight, 1.0f);
}

void project(Tensor y, Tensor x, Tensor weight, bool int8) {
    multiply(y, x, tensor_absent(), weight, int8);
}

/* ---- the sum of weight and adapter ---- */

/* Rows of W + scale B A made at a time. */
#define SUM_ROWS 256

/* What group g has of a parameter of all groups. */
static Tensor of_group(const Linear *l, Tensor t, int64_t g) {
    return l->groups > 1 ? tensor_at(t, g) : t;
}

void linear_sum_rows(const Linear *l, int64_t g, int64_t first, Tensor sum) {
    int64_t n = tensor_rows(sum);
    scale_copy(sum, SET, tensor_slice(of_group(l, l->weight->value, g), first, n), 1.0f);
    if (l->lora)
        matmul_ordered(NN, sum, ADD, tensor_slice(of_group(l, l->lora->B->value, g), first, n),
                       of_group(l, l->lora->A->value, g), l->lora->scale);
}

void linear_merged_rows(const Linear *l, int64_t g, int64_t first, Tensor rows) {
    linear_sum_rows(l, g, first, rows);
    if (!l->lora || !l->lora->magnitude) return;
    scale_rows(rows, rows, tensor_slice(l->lora->factor, first, tensor_rows(rows)));
}

/* ---- through rounding ---- */

void linear_learn_scales(Linear *l, ParamList *params) {
    int64_t shape[] = {l->groups, l->out, l->in / scheme_block(SCHEME_Q4_0, l->in)};
    bool grouped = l->groups > 1;
    l->factors = params_add_adapter(params, l->name, "scale_factors", grouped ? 3 : 2,
                                    grouped ? shape : shape + 1);
    l->factors->decay = false;
}

Tensor linear_factors(const Linear *l, int64_t g, int64_t first, int64_t n) {
    return l->factors && l->fake->scheme == SCHEME_Q4_0
               ? tensor_slice(of_group(l, l->factors->value, g), first, n)
               : tensor_absent();
}

/* The weight that is computed with, (out, in) in `dtype`: of group `g`, adapter merged, rounded. */
static Tensor rounded_weight(const Linear *l, int64_t g, DType dtype, Arena *scratch) {
    Tensor w = ARENA_TENSOR(scratch, dtype, l->out, l->in);
    if (!l->lora) {
        fake_quantize(w, of_group(l, l->weight->value, g), linear_factors(l, g, 0, l->out),
                      l->fake->scheme, l->fake->blend);
        return w;
    }
    size_t mark = arena_mark(scratch);
    int64_t block = l->out < SUM_ROWS ? l->out : SUM_ROWS;
    Tensor sum = ARENA_TENSOR(scratch, F32, block, l->in);
    for (int64_t o = 0; o < l->out && sum.data; o += block) {
        int64_t n = l->out - o < block ? l->out - o : block;
        Tensor part = tensor_slice(sum, 0, n);
        linear_merged_rows(l, g, o, part);
        fake_quantize(tensor_slice(w, o, n), part, linear_factors(l, g, o, n), l->fake->scheme,
                      l->fake->blend);
    }
    arena_release(scratch, mark);
    return w;
}

static Tensor factor_grads(const Linear *l, int64_t g, int64_t first, int64_t n) {
    return l->factors && l->factors->trainable
               ? tensor_slice(of_group(l, l->factors->grad, g), first, n)
               : tensor_absent();
}

/* dW (out, in) f32 of the rounded weight, passed to the adapter's A and B of group `g`. */
static void rounded_backward(const Linear *l, int64_t g, Tensor dW, Arena *scratch) {
    size_t mark = arena_mark(scratch);
    int64_t block = l->out < SUM_ROWS ? l->out : SUM_ROWS;
    Tensor sum = ARENA_TENSOR(scratch, F32, block, l->in);
    for (int64_t o = 0; o < l->out && sum.data; o += block) {
        int64_t n = l->out - o < block ? l->out - o : block;
        Tensor part = tensor_slice(sum, 0, n);
        linear_sum_rows(l, g, o, part);
        fake_quantize_backward(tensor_slice(dW, o, n), factor_grads(l, g, o, n), part,
                               linear_factors(l, g, o, n), l->fake->scheme, l->fake->blend);
    }
    if (sum.data) {
        matmul_ordered(NT, of_group(l, l->lora->B->grad, g), ADD, dW,
                       of_group(l, l->lora->A->value, g), l->lora->scale);
        matmul_ordered(TN, of_group(l, l->lora->A->grad, g), ADD, of_group(l, l->lora->B->value, g),
                       dW, l->lora->scale);
    }
    arena_release(scratch, mark);
}

/* The input as an 8-bit product sees it. */
static Tensor rounded_input(const Linear *l, Tensor x, Arena *scratch) {
    if (!l->fake->activations || l->fake->blend < 1.0f) return x;
    Tensor rounded = arena_like(scratch, x);
    fake_quantize_rows(rounded, x);
    return rounded;
}

/* Where the groups' rows begin, on the host: bounds[g] .. bounds[g + 1]. While measuring the first
 * has them all. */
static void group_bounds(int32_t *bounds, const Linear *l, RowGroups groups, int64_t rows) {
    for (int64_t g = 0; g <= l->groups; g++) bounds[g] = g ? (int32_t)rows : 0;
    if (l->groups > 1) tensor_read(bounds, groups.offsets);
}

static void forward_rounded(const Linear *l, Tensor y, Tensor x, RowGroups groups, Pass *p) {
    Tensor input = rounded_input(l, x, p->scratch);
    int32_t bounds[l->groups + 1];
    group_bounds(bounds, l, groups, tensor_rows(x));
    for (int64_t g = 0; g < l->groups; g++) {
        size_t mark = arena_mark(p->scratch);
        int64_t first = bounds[g], count = bounds[g + 1] - first;
        if (!count) continue;
        Tensor w = rounded_weight(l, g, x.dtype, p->scratch);
        matmul(NT, tensor_slice(y, first, count), SET, tensor_slice(input, first, count), w, 1.0f);
        arena_release(p->scratch, mark);
    }
}

/* The gradient of a trained weight itself is masked once, when the step's sum is there
 * (gemma_finish_gradients). */
static void backward_rounded(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x,
                             RowGroups groups, Pass *p) {
    bool reads = linear_reads_input(l);
    Tensor input = reads ? rounded_input(l, x, p->scratch) : x;
    int32_t bounds[l->groups + 1];
    group_bounds(bounds, l, groups, tensor_rows(dy));
    for (int64_t g = 0; g < l->groups; g++) {
        size_t mark = arena_mark(p->scratch);
        int64_t first = bounds[g], count = bounds[g + 1] - first;
        if (!count) continue;
        Tensor dy_rows = tensor_slice(dy, first, count),
               rows = reads ? tensor_slice(input, first, count) : input;
        if (tensor_present(dx))
            matmul(NN, tensor_slice(dx, first, count), write, dy_rows,
                   rounded_weight(l, g, dy.dtype, p->scratch), 1.0f);
        arena_release(p->scratch, mark);
        if (l->weight->trainable)
            matmul(TN, of_group(l, l->weight->grad, g), ADD, dy_rows, rows, 1.0f);
        if (is_trained(l)) {
            Tensor dW = ARENA_TENSOR(p->scratch, F32, l->out, l->in);
            matmul(TN, dW, SET, dy_rows, rows, 1.0f);
            rounded_backward(l, g, dW, p->scratch);
        }
        arena_release(p->scratch, mark);
    }
}

/* ---- activations in 8 bits ---- */

/* Whether it is one product, and adapters. */
static bool is_bare(const Linear *l) {
    return l->groups == 1 && !l->bias && !l->bounds[0] && !fake_quant_on(l->fake);
}

/* Whether that product is one with activations in 8 bits. */
static bool is_int8(const Linear *l, const Pass *p) {
    return p->int8 && dtype_is_tiled(l->weight->value.dtype) && is_bare(l);
}

Tensor pass_codes(Pass *p, Tensor x, const Linear *reader) {
    int64_t bytes = tensor_present(p->codes_room) && is_int8(reader, p)
                        ? int8_codes(p->codes_room.device, tensor_rows(x), tensor_cols(x))
                        : 0;
    p->coded = NULL;
    if (!bytes) return tensor_absent();
    p->codes = tensor_slice(p->codes_room, 0, bytes);
    p->coded = x.data;
    return p->codes;
}

/* Those of x, if they were made with it; they are taken once. */
static Tensor take_codes(Pass *p, Tensor x) {
    bool there = p->coded && p->coded == x.data;
    p->coded = NULL;
    return there ? p->codes : tensor_absent();
}

/* ---- forward and backward ---- */

void linear_keep(Linear *l, Arena *arena, int64_t N) {
    if (l->lora && l->groups == 1) l->lora->u = ARENA_TENSOR(arena, F32, N, l->lora->rank);
}

/* (N, R) for x A^T: kept while training. */
static Tensor ranks_of(const Lora *lora, int64_t N, Pass *p) {
    if (p->training && tensor_present(lora->u)) return tensor_slice(lora->u, 0, N);
    return ARENA_TENSOR(p->scratch, F32, N, lora->rank);
}

/* Whether the linear's adapter, if it has one, meets x as it is, and dy alone: so do others that
 * read the same x, and their products with it are one. */
static bool adapts_plainly(const Linear *l, const Pass *p) {
    const Lora *lora = l->lora;
    return !lora || (!lora->magnitude && !lora->next && !p->rows->adapters &&
                     !(p->training && lora->dropout > 0));
}

/* The adapters of linears that adapt plainly. */
typedef struct Adapters {
    int count, of[MATRICES_MOST]; /* of: which linear */
    Tensor A[MATRICES_MOST], u[MATRICES_MOST];
    bool kept; /* u is that of the way forward */
} Adapters;

static Adapters adapters_of(const Linear *const *l, int count, int64_t N, Pass *p) {
    Adapters a = {.kept = true};
    for (int i = 0; i < count; i++) {
        if (!l[i]->lora) continue;
        a.A[a.count] = l[i]->lora->A->value;
        a.u[a.count] = ranks_of(l[i]->lora, N, p);
        a.kept &= tensor_present(l[i]->lora->u);
        a.of[a.count++] = i;
    }
    return a;
}

/* y[i] = x W^T and what their adapters add, for linears that are bare and adapt plainly. */
static void forward_plainly(const Linear *const *l, const Tensor *y, int count, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor weights[MATRICES_MOST];
    Term terms[MATRICES_MOST] = {0};
    for (int i = 0; i < count; i++) weights[i] = l[i]->weight->value;
    Adapters a = adapters_of(l, count, tensor_rows(x), p);
    if (a.count) matmul_ordered_several(NT, a.u, SET, &x, a.A, a.count, 1.0f);
    for (int k = 0; k < a.count; k++) {
        const Lora *lora = l[a.of[k]]->lora;
        terms[a.of[k]] = (Term){a.u[k], lora->B->value, lora->scale};
    }
    matmul_several(y, x, weights, terms, count);
    arena_release(p->scratch, mark);
}

/* y += scale x A^T B^T for the rows of that adapter. Rows of experts are in an order of their own,
 * so there all of them must belong to it, or none. */
static void forward_adapter(const Linear *l, const Lora *lora, Tensor y, Tensor x, Tensor offsets,
                            Pass *p) {
    const int64_t *ends = p->rows->adapters;
    if (ends && ends[lora->number] == ends[lora->number + 1]) return;
    if (ends && l->groups == 1) {
        int64_t first = ends[lora->number], count = ends[lora->number + 1] - first;
        y = tensor_slice(y, first, count);
        x = tensor_slice(x, first, count);
    } else if (ends) {
        CHECK(ends[lora->number] == 0 && ends[lora->number + 1] == p->rows->count,
              "%s: rows of several adapters", l->name);
    }
    size_t mark = arena_mark(p->scratch);
    Tensor u = ranks_of(lora, tensor_rows(x), p), input = adapter_input(lora, x, p);
    adapter_product(l, NT, u, SET, input, lora->A->value, offsets, 1.0f);
    adapter_product(l, NT, y, ADD, u, lora->B->value, offsets, lora->scale);
    if (lora->magnitude) scale_columns(y, SET, y, lora->factor, 1.0f);
    arena_release(p->scratch, mark);
}

static void forward(const Linear *l, Tensor y, Tensor x, RowGroups groups, Pass *p) {
    Tensor offsets = groups.offsets;
    size_t mark = arena_mark(p->scratch);
    if (fake_quant_on(l->fake)) {
        forward_rounded(l, y, x, groups, p);
        arena_release(p->scratch, mark);
        return;
    }
    bool int8 = p->int8 && dtype_is_tiled(l->weight->value.dtype);
    if (l->groups == 1 && !int8 && adapts_plainly(l, p)) {
        forward_plainly(&l, &y, 1, x, p);
        arena_release(p->scratch, mark);
        return;
    }
    if (l->groups == 1)
        multiply(y, x, take_codes(p, x), l->weight->value, int8);
    else if (int8)
        grouped_matmul_int8(y, x, l->weight->value, offsets, groups.counts);
    else
        grouped_matmul(NT, y, SET, x, l->weight->value, offsets, 1.0f);
    for (const Lora *lora = l->lora; lora; lora = lora->next)
        forward_adapter(l, lora, y, x, offsets, p);
    arena_release(p->scratch, mark);
}

bool linear_reads_input(const Linear *l) {
    return l->weight->trainable || l->lora || l->bounds[0];
}

/* The weight's own gradient. */
static void backward_weight(const Linear *l, Tensor dy, Tensor x, Tensor offsets) {
    if (!l->weight->trainable) return;
    if (l->groups == 1)
        matmul(TN, l->weight->grad, ADD, dy, x, 1.0f);
    else
        grouped_matmul(TN, l->weight->grad, ADD, dy, x, offsets, 1.0f);
}

/* dx and B's gradients, which read dy alone, of linears that are bare and adapt plainly; du[k]:
 * what goes back through adapter k. */
static void plainly_to_input(const Linear *const *l, const Adapters *a, Tensor *du, Tensor dx,
                             Write write, const Tensor *dy, int count, Pass *p) {
    Tensor weights[MATRICES_MOST];
    Term terms[MATRICES_MOST] = {0};
    AdapterBack back[MATRICES_MOST];
    for (int i = 0; i < count; i++) weights[i] = l[i]->weight->value;
    for (int k = 0; k < a->count; k++) {
        const Linear *of = l[a->of[k]];
        const Lora *lora = of->lora;
        du[k] = arena_like(p->scratch, a->u[k]);
        back[k] = (AdapterBack){.du = du[k],
                                .dB = is_trained(of) ? lora->B->grad : tensor_absent(),
                                .dy = dy[a->of[k]],
                                .u = a->u[k],
                                .B = lora->B->value,
                                .scale = lora->scale};
        terms[a->of[k]] = (Term){du[k], lora->A->value, 1.0f};
    }
    adapters_backward(back, a->count);
    if (tensor_present(dx)) matmul_sum(dx, write, dy, weights, terms, count);
}

/* The other gradients; the adapters are trained, all or none. */
static void plainly_from_input(const Linear *const *l, const Adapters *a, const Tensor *du,
                               const Tensor *dy, int count, Tensor x) {
    Tensor grads[MATRICES_MOST];
    for (int i = 0; i < count; i++) backward_weight(l[i], dy[i], x, tensor_absent());
    if (!a->count || !is_trained(l[a->of[0]])) return;
    for (int k = 0; k < a->count; k++) grads[k] = l[a->of[k]]->lora->A->grad;
    matmul_ordered_several(TN, grads, ADD, du, &x, a->count, 1.0f);
}

static void backward_plainly(const Linear *const *l, Tensor dx, Write write, const Tensor *dy,
                             int count, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor du[MATRICES_MOST];
    Adapters a = adapters_of(l, count, tensor_rows(*dy), p);
    if (a.count && is_trained(l[a.of[0]]) && !a.kept)
        matmul_ordered_several(NT, a.u, SET, &x, a.A, a.count, 1.0f);
    plainly_to_input(l, &a, du, dx, write, dy, count, p);
    plainly_from_input(l, &a, du, dy, count, x);
    arena_release(p->scratch, mark);
}

bool linear_parts_backward(const Linear *l, const Pass *p) {
    return is_bare(l) && adapts_plainly(l, p) && (!is_trained(l) || tensor_present(l->lora->u));
}

Tensor linear_backward_to_input(const Linear *l, Tensor dx, Write write, Tensor dy, Pass *p) {
    Tensor du = tensor_absent();
    Adapters a = adapters_of(&l, 1, tensor_rows(dy), p);
    plainly_to_input(&l, &a, &du, dx, write, &dy, 1, p);
    return du;
}

void linear_backward_from_input(const Linear *l, Tensor du, Tensor dy, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Adapters a = adapters_of(&l, 1, tensor_rows(dy), p);
    plainly_from_input(&l, &a, &du, &dy, 1, x);
    arena_release(p->scratch, mark);
}

static void backward(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x, RowGroups groups,
                     Pass *p) {
    Tensor offsets = groups.offsets;
    size_t mark = arena_mark(p->scratch);
    const Lora *lora = l->lora;
    if (fake_quant_on(l->fake)) {
        backward_rounded(l, dx, write, dy, x, groups, p);
        arena_release(p->scratch, mark);
        return;
    }
    if (l->groups == 1 && adapts_plainly(l, p)) {
        backward_plainly(&l, dx, write, &dy, 1, x, p);
        return;
    }
    if (lora &&
        lora->magnitude) { /* y = factor * z: dm = sum dy z / |.|, and dz = factor * dy goes on */
        if (lora->magnitude->trainable) {
            Tensor z = arena_like(p->scratch, dy), sums = arena_like(p->scratch, lora->factor);
            forward(l, z, x, groups, p); /* factor * z; divided by the magnitude below */
            fill(sums, 0.0f);
            dot_columns(sums, dy, z);
            quotient(lora->magnitude->grad, ADD, sums, lora->magnitude->value);
        }
        Tensor dz = arena_like(p->scratch, dy);
        scale_columns(dz, SET, dy, lora->factor, 1.0f);
        dy = dz;
    }
    if (tensor_present(dx)) {
        if (l->groups == 1)
            matmul(NN, dx, write, dy, l->weight->value, 1.0f);
        else
            grouped_matmul(NN, dx, write, dy, l->weight->value, offsets, 1.0f);
    }
    backward_weight(l, dy, x, offsets);
    if (lora) {
        Tensor u = ranks_of(lora, tensor_rows(x), p), du = arena_like(p->scratch, u);
        Tensor input = adapter_input(lora, x, p);
        if (is_trained(l) && !tensor_present(lora->u))
            adapter_product(l, NT, u, SET, input, lora->A->value, offsets, 1.0f);
        adapter_product(l, NN, du, SET, dy, lora->B->value, offsets, lora->scale);
        if (is_trained(l)) {
            adapter_product(l, TN, lora->B->grad, ADD, dy, u, offsets, lora->scale);
            adapter_product(l, TN, lora->A->grad, ADD, du, input, offsets, 1.0f);
        }
        if (tensor_present(dx)) {
            if (p->training && lora->dropout > 0) {
                Tensor dinput = arena_like(p->scratch, x);
                adapter_product(l, NN, dinput, SET, du, lora->A->value, offsets, 1.0f);
                dropout(dinput, dinput, lora->dropout, random_key(lora->key, p->key));
                scale_copy(dx, ADD, dinput, 1.0f);
            } else {
                adapter_product(l, NN, dx, ADD, du, lora->A->value, offsets, 1.0f);
            }
        }
    }
    arena_release(p->scratch, mark);
}

static Tensor clamped_input(const Linear *l, Tensor x, Pass *p) {
    Tensor inside = arena_like(p->scratch, x);
    clamp_forward(inside, x, l->bound[0], l->bound[1]);
    return inside;
}

void linear_forward(const Linear *l, Tensor y, Tensor x, Pass *p) {
    size_t mark = arena_mark(p->scratch);
    forward(l, y, l->bounds[0] ? clamped_input(l, x, p) : x, (RowGroups){0}, p);
    if (l->bias) shift_columns(y, y, l->bias->value);
    if (l->bounds[0]) clamp_forward(y, y, l->bound[2], l->bound[3]);
    arena_release(p->scratch, mark);
}

void linear_forward_several(const Linear *const *l, const Tensor *y, int count, Tensor x, Pass *p) {
    Tensor weights[MATRICES_MOST];
    bool bare = true, int8 = p->int8, plain = true;
    for (int i = 0; i < count; i++) {
        weights[i] = l[i]->weight->value;
        bare &= is_bare(l[i]);
        int8 &= is_int8(l[i], p) && weights[i].dtype == weights[0].dtype;
        plain &= adapts_plainly(l[i], p);
    }
    if (!bare || (p->int8 && !int8)) {
        for (int i = 0; i < count; i++) linear_forward(l[i], y[i], x, p);
        return;
    }
    if (plain && !int8) {
        forward_plainly(l, y, count, x, p);
        return;
    }
    size_t mark = arena_mark(p->scratch);
    if (int8)
        matmul_int8_several(y, x, take_codes(p, x), weights, count);
    else
        matmul_several(y, x, weights, NULL, count);
    for (int i = 0; i < count; i++)
        for (const Lora *lora = l[i]->lora; lora; lora = lora->next)
            forward_adapter(l[i], lora, y[i], x, tensor_absent(), p);
    arena_release(p->scratch, mark);
}

void linear_forward_grouped(const Linear *l, Tensor y, Tensor x, RowGroups groups, Pass *p) {
    forward(l, y, x, groups, p);
}

/* The adapter lies inside both clamps, as peft's does. */
static void backward_clamped(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x,
                             Pass *p) {
    size_t mark = arena_mark(p->scratch);
    Tensor input = clamped_input(l, x, p), dsum = arena_like(p->scratch, dy);
    forward(l, dsum, input, (RowGroups){0}, p);
    clamp_backward(dsum, SET, dy, dsum, l->bound[2], l->bound[3]);
    Tensor dinput = tensor_present(dx) ? arena_like(p->scratch, x) : dx;
    backward(l, dinput, SET, dsum, input, (RowGroups){0}, p);
    if (tensor_present(dx)) clamp_backward(dx, write, dinput, x, l->bound[0], l->bound[1]);
    arena_release(p->scratch, mark);
}

void linear_backward(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x, Pass *p) {
    if (l->bias && l->bias->trainable) dot_columns(l->bias->grad, dy, tensor_absent());
    if (l->bounds[0])
        backward_clamped(l, dx, write, dy, x, p);
    else
        backward(l, dx, write, dy, x, (RowGroups){0}, p);
}

void linear_backward_several(const Linear *const *l, Tensor dx, Write write, const Tensor *dy,
                             int count, Tensor x, Pass *p) {
    bool plain = true, trains = false;
    for (int i = 0; i < count; i++) trains |= is_trained(l[i]);
    for (int i = 0; i < count; i++)
        plain &=
            is_bare(l[i]) && adapts_plainly(l[i], p) && (!l[i]->lora || is_trained(l[i]) == trains);
    if (plain) {
        backward_plainly(l, dx, write, dy, count, x, p);
        return;
    }
    for (int i = 0; i < count; i++, write = ADD) linear_backward(l[i], dx, write, dy[i], x, p);
}

void linear_backward_grouped(const Linear *l, Tensor dx, Write write, Tensor dy, Tensor x,
                             RowGroups groups, Pass *p) {
    backward(l, dx, write, dy, x, groups, p);
}

/* factor = m / |W + s B A| by output row, the sum formed in blocks of rows. */
static void refresh(Linear *l, Lora *lora, Arena *scratch) {
    if (!lora->magnitude) return;
    Linear one = *l; /* the sum with this adapter alone */
    one.lora = lora;
    int64_t block = l->out < SUM_ROWS ? l->out : SUM_ROWS;
    size_t mark = arena_mark(scratch);
    Tensor sum = ARENA_TENSOR(scratch, F32, block, l->in);
    for (int64_t o = 0; o < l->out && sum.data; o += block) {
        int64_t n = l->out - o < block ? l->out - o : block;
        Tensor part = tensor_slice(sum, 0, n);
        linear_sum_rows(&one, 0, o, part);
        Tensor factor = tensor_slice(lora->factor, o, n);
        row_norms(factor, part);
        quotient(factor, SET, tensor_slice(lora->magnitude->value, o, n), factor);
    }
    arena_release(scratch, mark);
}

void linear_refresh(Linear *l, Arena *scratch) {
    for (Lora *lora = l->lora; lora; lora = lora->next) refresh(l, lora, scratch);
}
