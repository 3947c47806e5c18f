/* forecast.c - sums of times, and the kernels that are timed. */
#include "train/forecast.h"
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/matmul.h"
#include "model/cost.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

/* Half of what NVLink and a network card of 400 Gb/s move in both directions, less a fifth. */
static const Speeds known[] = {
    {"a100", 84.5e9, 230e12, 170e12, 110e12, 1.6e12, 240e9, 20e9, 1, true},
    {"h100", 84.5e9, 730e12, 510e12, 350e12, 2.7e12, 360e9, 40e9, 1, true},
    {"h200", 150.0e9, 730e12, 510e12, 350e12, 3.9e12, 360e9, 40e9, 1, true},
    {"b200", 191.0e9, 1600e12, 1100e12, 700e12, 6.4e12, 720e9, 40e9, 1, true},
};

const Speeds *speeds_of(const char *gpu) {
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, gpu)) return &known[i];
    return NULL;
}

/* ---- measuring ---- */

#define ROWS_MOST 512  /* of products that are timed */
#define ENOUGH    0.03 /* seconds */

/* Waits for what was computed. */
static void settle(Tensor t) {
    char byte[8];
    int64_t one = 1;
    Tensor first = tensor_make(t.data, dtype_is_packed(t.dtype) ? U8 : t.dtype, 1, &one);
    first.device = t.device;
    tensor_read(byte, first);
}

/* Seconds of one call of each kind that trains this linear, on `rows` rows. */
static Status time_linear(double *seconds, double *flops, const Linear *l, int64_t rows,
                          Device *device, DType dtype) {
    DType kept = l->weight->value.dtype;
    Arena measure = arena_measure(), memory = {0};
    int64_t shape[] = {l->out, l->in};
    for (int placing = 0; placing < 2; placing++) {
        Arena *a = placing ? &memory : &measure;
        if (placing) TRY(arena_init(&memory, device, measure.peak, "a product to time"));
        Tensor w = arena_tensor(a, kept, 2, shape), x = ARENA_TENSOR(a, dtype, rows, l->in),
               y = ARENA_TENSOR(a, dtype, rows, l->out), dw = ARENA_TENSOR(a, F32, l->out, l->in);
        if (!placing) continue;
        double best = INFINITY;
        for (double all = 0; all < ENOUGH;) {
            double begin = omp_get_wtime();
            matmul(NT, y, SET, x, w, 1.0f);
            matmul(NN, x, SET, y, w, 1.0f);
            if (l->weight->trainable) matmul(TN, dw, ADD, y, x, 1.0f);
            settle(l->weight->trainable ? dw : x);
            double took = omp_get_wtime() - begin;
            if (all > 0 && took < best) best = took; /* the first one makes plans */
            all += took;
            if (all >= ENOUGH && best == INFINITY) all = ENOUGH / 2;
        }
        *seconds += best;
        *flops += (l->weight->trainable ? 6.0 : 4.0) * (double)(rows * l->in * l->out);
    }
    arena_free(&memory);
    return OK;
}

/* The rate of the linears of most work, dense or of experts: each shape once. */
static Status time_products(double *rate, const Session *s, bool experts) {
    const Linear *timed[3];
    const ModelConfig *c = &s->g.config;
    int64_t rows = s->plan.rows / s->context.size;
    double seconds = 0, flops = 0;
    int count = 0;
    if (experts) rows = rows * c->top_k_experts / (c->num_experts ? c->num_experts : 1);
    rows = rows < 1 ? 1 : rows > ROWS_MOST ? ROWS_MOST : rows;
    while (count < 3) {
        const Linear *most = NULL;
        for (const Linear *l = s->g.linears.first; l; l = l->next) {
            bool done = l->weight->tower || (l->groups > 1) != experts;
            for (int i = 0; i < count; i++)
                done |= timed[i]->in == l->in && timed[i]->out == l->out;
            if (!done && (!most || l->in * l->out > most->in * most->out)) most = l;
        }
        if (!most) break;
        TRY(time_linear(&seconds, &flops, most, rows, s->g.device, s->g.dtype));
        timed[count++] = most;
    }
    *rate = seconds > 0 ? flops / seconds : INFINITY;
    return OK;
}

/* Attention of the widest layers over one sequence, forward and back. */
static Status time_attention(double *rate, const Session *s) {
    const BlockConfig *b = &s->g.blocks[0].config;
    for (int l = 1; l < s->g.config.num_hidden_layers; l++)
        if (s->g.blocks[l].config.head_dim > b->head_dim) b = &s->g.blocks[l].config;
    int64_t N = s->plan.rows < ROWS_MOST ? s->plan.rows : ROWS_MOST, H = b->num_attention_heads,
            K = b->num_key_value_heads, C = b->head_dim, G = attention_partials(K);
    Arena measure = arena_measure(), memory = {0};
    DType dtype = s->g.dtype;
    int32_t *rows = must_calloc((size_t)(3 * N), sizeof *rows);
    for (int64_t n = 0; n < N; n++) rows[n] = rows[2 * N + n] = (int32_t)n;
    Status status = OK;
    for (int placing = 0; placing < 2; placing++) {
        Arena *a = placing ? &memory : &measure;
        if (placing) TRY_DONE(arena_init(&memory, s->g.device, measure.peak, "attention to time"));
        Tensor q = ARENA_TENSOR(a, dtype, N, H, C), y = arena_like(a, q), dq = arena_like(a, q),
               dy = arena_like(a, q), k = ARENA_TENSOR(a, dtype, N, K, C), v = arena_like(a, k),
               dk = ARENA_TENSOR(a, F32, N, K, C), dv = arena_like(a, dk),
               lse = ARENA_TENSOR(a, F32, N, H), lists = ARENA_TENSOR(a, I32, 3, N),
               partial = G == 1 ? tensor_absent() : ARENA_TENSOR(a, F32, 2 * G, N, K, C);
        if (!placing) continue;
        double best = INFINITY;
        tensor_write(lists, rows);
        Tensor index = tensor_at(lists, 0), first = tensor_at(lists, 1), last = tensor_at(lists, 2);
        for (int i = 0; i < 3; i++) {
            double begin = omp_get_wtime();
            attention_forward(y, lse, tensor_absent(), q, k, v, index, first, last, tensor_absent(),
                              tensor_absent());
            attention_backward(dq, dk, dv, SET, dy, y, lse, q, k, v, index, first, last, partial);
            settle(dk);
            best = fmin(best, omp_get_wtime() - begin);
        }
        *rate = 3.5 * 4.0 * (double)(N * N / 2 * H * C) / best;
    }
done:
    if (memory.base) arena_free(&memory);
    free(rows);
    return status;
}

#define COPY (16 << 20) /* elements */

/* A gate, and parts of `COPY` elements to all ranks, as they are and as sums. */
static Status time_memory(Speeds *v, const Session *s, const Comm *c) {
    Arena memory;
    TRY(arena_init(&memory, s->g.device, 2 * COPY * sizeof(float), "a copy to time"));
    Tensor a = ARENA_TENSOR(&memory, F32, COPY), b = ARENA_TENSOR(&memory, F32, COPY);
    double copy = INFINITY, gather = INFINITY, sum = INFINITY;
    for (int i = 0; i < 4; i++) {
        double begin = omp_get_wtime();
        gelu_mul_forward(b, b, a);
        settle(b);
        if (i) copy = fmin(copy, omp_get_wtime() - begin);
    }
    v->moving = 3.0 * COPY * sizeof(float) / copy;
    v->near = v->far = v->moving / 4;
    v->summing = 0.5;
    int64_t *bounds = must_calloc((size_t)c->size + 1, sizeof *bounds);
    for (int r = 0; r <= c->size; r++) bounds[r] = (int64_t)COPY / c->size * r;
    for (int i = 0; i < 3 && comm_is_many(c); i++) {
        comm_barrier(c);
        double begin = omp_get_wtime();
        comm_all_gather(c, a, bounds);
        settle(a);
        double middle = omp_get_wtime();
        comm_reduce_scatter(c, a, bounds);
        settle(a);
        gather = fmin(gather, middle - begin);
        sum = fmin(sum, omp_get_wtime() - middle);
    }
    if (gather < INFINITY) {
        double sent = sizeof(float) * (double)(bounds[1] * (c->size - 1));
        v->near = v->far = sent / gather;
        v->summing = gather / sum;
    }
    free(bounds);
    arena_free(&memory);
    return OK;
}

Status speeds_measure(Speeds *speeds, const Session *s, const Comm *comm) {
    *speeds = (Speeds){.name = "this machine", .overlaps = s->g.device->kind == DEVICE_CUDA};
    comm_barrier(comm);
    TRY(time_products(&speeds->products, s, false));
    TRY(time_products(&speeds->grouped, s, true));
    TRY(time_attention(&speeds->attention, s));
    return time_memory(speeds, s, comm);
}

/* ---- forecasting ---- */

/* Values of packed weights, which are unpacked for each product. */
static double packed_values(const Gemma *g) {
    double count = 0;
    for (const Linear *l = g->linears.first; l; l = l->next)
        if (dtype_is_packed(l->weight->value.dtype))
            count += (double)tensor_count(l->weight->value);
    return count;
}

/* Bytes that unpacking a value takes the time of: of NF4, on the card that was measured. */
#define UNPACK_BYTES 5.0

/* Bytes that an update of a value with states of 8 bits takes the time of, on the same. */
#define UPDATE_8BIT 40.0

/* Bytes sent, within a host and beyond. */
typedef struct Sent {
    double near, far;
} Sent;

/* `bytes` over a group of ranks `stride` apart of which each sends each other an equal part. */
static void send_to_all(Sent *sent, double bytes, int size, int stride, int host) {
    if (size <= 1) return;
    int inside = host / stride < 1 ? 1 : host / stride < size ? host / stride : size;
    sent->near += bytes * (double)(inside - 1) / (double)size;
    sent->far += bytes * (double)(size - inside) / (double)size;
}

/* Keys and values that a pass sends to the ranks that share its rows, and their gradients back. */
static void send_rows(Sent *sent, const Session *s, double rows, double again, int host) {
    const Gemma *g = &s->g;
    int R = s->context.size;
    for (int l = 0; l < g->config.num_hidden_layers && R > 1; l++) {
        const BlockConfig *b = &g->blocks[l].config;
        double width = 2.0 * (double)(b->num_key_value_heads * b->head_dim),
               seen = b->kind == SLIDING ? fmin(2.0 * (double)g->config.sliding_window, rows)
                                         : rows / 2;
        if (!b->owns_kv) continue;
        double bytes = seen * width * (again * (double)dtype_size(g->dtype) + 4.0);
        send_to_all(sent, bytes * (double)R / (double)(R - 1), R, 1, host);
    }
}

/* Rows that a pass sends to their experts, and back: their results, and on the way back both again
 * with their gradients. */
static void send_experts(Sent *sent, const Session *s, double rows, double again, int host) {
    const ModelConfig *c = &s->g.config;
    double layers = 0;
    for (int l = 0; l < c->num_hidden_layers; l++) layers += s->g.blocks[l].config.num_experts > 0;
    double bytes = layers * rows * (double)(c->top_k_experts * c->hidden_size) *
                   (double)dtype_size(s->g.dtype) * (2 * again + 3);
    send_to_all(sent, bytes, s->ranks.experts.size, 1, host);
}

/* Sums of a run's gradients, and its values again. */
static void send_run(Sent *sums, Sent *values, const Session *s, const ParamRun *r, double turns,
                     int host) {
    const Comm *c = run_sharers(&s->ranks, r);
    double n = (double)(r->end - r->begin), size = r->whole ? 4.0 : (double)dtype_size(r->dtype);
    int stride = r->experts ? s->ranks.experts.size : 1;
    send_to_all(sums, 4.0 * n * turns, c->size, stride, host);
    if (!r->experts)
        send_to_all(sums, 8.0 * n / (double)c->size * turns, s->ranks.across.size, c->size, host);
    if (!r->gathered) send_to_all(values, size * n, c->size, stride, host);
}

/* Values that are gathered for one pass, there and back. */
static void send_layers(Sent *sent, const Session *s, int host) {
    const Space *p = &s->g.params.space;
    if (p->level < 3) return;
    for (int l = 0; l < s->g.config.num_hidden_layers; l++)
        for (int experts = 0; experts < 2; experts++)
            send_to_all(sent, 2.0 * (double)p->frozen[l][experts].bytes,
                        experts ? s->ranks.replicas.size : s->ranks.sharers.size,
                        experts ? s->ranks.experts.size : 1, host);
    for (int i = 0; i < p->count; i++) {
        const ParamRun *r = &p->runs[i];
        double bytes = 2.0 * (double)(r->end - r->begin) * (double)dtype_size(r->dtype);
        if (r->gathered)
            send_to_all(sent, bytes, run_sharers(&s->ranks, r)->size,
                        r->experts ? s->ranks.experts.size : 1, host);
    }
}

static double seconds_of(const Sent *sent, const Speeds *v) {
    return sent->near / v->near + sent->far / v->far;
}

Forecast forecast_run(Session *s, const Speeds *v, int host) {
    const RunConfig *c = &s->config;
    const StoreCounts *n = &s->store.counts;
    bool again = s->plan.mode != STACK_KEEP;
    double rows = (double)s->plan.rows / (double)s->context.size,
           kept = n->tokens > 0 ? n->trained / n->tokens : 1,
           turns = ceil((double)c->accumulate / (double)s->data_ranks),
           sequence = (double)(s->plan.rows / c->sequences);
    RowCost cost = gemma_row_cost(&s->g, sequence, kept, again);
    Forecast f = {.pass = rows * (cost.products / v->products + cost.grouped / v->grouped +
                                  cost.attention / v->attention + cost.bytes / v->moving)};
    if (v->memory_bytes > 0)
        f.pass += packed_values(&s->g) * UNPACK_BYTES * (again ? 3 : 2) / v->moving;
    ParamBytes bytes = params_bytes(&s->g.params);
    f.pass += 8.0 * (double)bytes.trained / v->moving; /* gradients are added to */
    Sent within = {0}, sums = {0}, values = {0}, layers = {0};
    send_rows(&within, s, rows, again ? 2 : 1, host);
    send_experts(&within, s, rows, again ? 2 : 1, host);
    send_layers(&layers, s, host);
    const Space *p = &s->g.params.space;
    double summed = s->optimizer.config.own_grads ? turns : 1;
    for (int i = 0; i < p->count; i++) send_run(&sums, &values, s, &p->runs[i], summed, host);
    double each = s->optimizer.config.states_8bit ? UPDATE_8BIT : 28.0;
    f.update = ((double)bytes.own * each + (double)bytes.trained * 12.0) / v->moving;
    double exchange = seconds_of(&layers, v), summing = seconds_of(&sums, v) / v->summing,
           beside = v->overlaps ? f.pass : 0; /* what layers exchange hides behind a pass */
    double turn = f.pass + seconds_of(&within, v);
    if (s->optimizer.config.own_grads) { /* added to what is there, and cleared, in each turn */
        exchange +=
            summing / turns + (4.0 * (double)bytes.trained + 12.0 * (double)bytes.own) / v->moving;
        summing = 0;
    }
    turn += fmax(0, exchange - beside);
    f.step = turns * turn + summing + seconds_of(&values, v) + f.update;
    f.near = turns * (within.near + layers.near) + sums.near + values.near;
    f.far = turns * (within.far + layers.far) + sums.far + values.far;
    f.tokens_per_s = (double)(s->plan.rows * c->accumulate) / f.step;
    return f;
}
