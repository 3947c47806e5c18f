/* media.c - soft = embedding_projection(norm(tower(item))), the norm without a weight. */
#include "model/media.h"
#include "kernels/elementwise.h"
#include "kernels/norm.h"

#include <stdlib.h>
#include <string.h>

static void declare_projection(Linear *l, ParamList *params, LinearList *list, const char *name,
                               int64_t out, int64_t in) {
    params_enter(params, "%s", name);
    linear_declare(l, params, list, "embedding_projection", out, in);
    params_leave(params);
}

void media_declare(Media *m, ParamList *params, LinearList *list, const ModelConfig *c) {
    char path[PARAM_NAME_MAX];
    *m = (Media){.params = params,
                 .sees = c->vision.path != MEDIA_NONE,
                 .hears = c->audio.path != MEDIA_NONE,
                 .vision_eps = (float)c->vision.rms_norm_eps,
                 .audio_eps = (float)c->audio.rms_norm_eps,
                 .cache = must_calloc(1, sizeof *m->cache)};
    memcpy(path, params->path, sizeof path);
    strcpy(params->path, "model.");
    params->tower = true;
    if (c->vision.path == MEDIA_TOWER) vision_declare(&m->vision, params, list, &c->vision);
    if (c->audio.path == MEDIA_TOWER) audio_declare(&m->audio, params, list, &c->audio);
    if (c->vision.path == MEDIA_UNIFIED) unified_declare(&m->unified, params, list, &c->vision);
    if (m->sees)
        declare_projection(&m->embed_vision, params, list, "embed_vision", c->hidden_size,
                           c->vision.path == MEDIA_TOWER ? c->vision.hidden_size
                                                         : c->vision.mm_embed_dim);
    if (m->hears)
        declare_projection(&m->embed_audio, params, list, "embed_audio", c->hidden_size,
                           c->audio.path == MEDIA_TOWER ? c->audio.output_proj_dims
                                                        : c->audio.audio_embed_dim);
    m->audio.config = c->audio;
    params->tower = false;
    memcpy(params->path, path, sizeof path);
}

void media_free(Media *m) {
    vision_free(&m->vision);
    audio_free(&m->audio);
    if (m->cache) tower_cache_free(m->cache);
    free(m->cache);
    *m = (Media){0};
}

static int64_t cell_side(const VisionConfig *c) {
    return c->patch_size * c->pooling_kernel_size;
}

int64_t media_picture_tokens(const VisionConfig *c, int64_t height, int64_t width) {
    return height / cell_side(c) * (width / cell_side(c));
}

int64_t media_audio_tokens(const AudioConfig *c, int64_t frames) {
    return c->path == MEDIA_TOWER ? audio_soft_tokens(frames) : frames;
}

int64_t media_feature_width(const AudioConfig *c) {
    return c->path == MEDIA_TOWER ? MEL_BINS : c->audio_embed_dim;
}

bool media_span_ends(int32_t *ends, int64_t N, const ModelConfig *c, const MediaItem *items,
                     int64_t count) {
    if (!c->use_bidirectional_attention || !count) return false;
    for (int64_t n = 0; n < N; n++) ends[n] = -1;
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < items[i].count && items[i].height; n++)
            ends[items[i].first + n] = (int32_t)(items[i].first + items[i].count - 1);
    return true;
}

/* ---- pictures cut up ---- */

/* Squares of `side` pixels in [0, 1], cell by cell, `cell` of them to a side of a cell: rows of
 * (row, column, channel), and the place of each in the grid of squares. */
typedef struct Patches {
    float *pixels;   /* (N, 3 side^2) */
    int32_t *places; /* (N, 2) */
    int64_t N;
} Patches;

static void cut_patch(float *out, const MediaItem *item, int64_t x, int64_t y, int64_t side) {
    for (int64_t r = 0; r < side; r++) {
        const uint8_t *row = item->pixels + ((y * side + r) * item->width + x * side) * 3;
        for (int64_t i = 0; i < 3 * side; i++) out[r * 3 * side + i] = (float)row[i] / 255.0f;
    }
}

static Patches patches_cut(const MediaItem *item, int64_t side, int64_t cell) {
    int64_t columns = item->width / side, lines = item->height / side, n = 0;
    Patches p = {.N = columns * lines};
    if (!item->pixels) return p;
    p.pixels = must_malloc((size_t)(p.N * 3 * side * side) * sizeof *p.pixels);
    p.places = must_malloc((size_t)p.N * 2 * sizeof *p.places);
    for (int64_t line = 0; line < lines / cell; line++)
        for (int64_t column = 0; column < columns / cell; column++)
            for (int64_t i = 0; i < cell * cell; i++, n++) {
                int64_t x = column * cell + i % cell, y = line * cell + i / cell;
                p.places[2 * n] = (int32_t)x, p.places[2 * n + 1] = (int32_t)y;
                cut_patch(p.pixels + n * 3 * side * side, item, x, y, side);
            }
    return p;
}

static Patches patches_of(const Media *m, const MediaItem *item) {
    const VisionConfig *c = m->vision.blocks ? &m->vision.config : &m->unified.config;
    return m->vision.blocks ? patches_cut(item, c->patch_size, c->pooling_kernel_size)
                            : patches_cut(item, cell_side(c), 1);
}

/* ---- one item ---- */

/* What the projection of an item normalises, and by what. */
static const Linear *projection_of(const Media *m, const MediaItem *item) {
    return item->height ? &m->embed_vision : &m->embed_audio;
}
static float eps_of(const Media *m, const MediaItem *item) {
    return item->height ? m->vision_eps : m->audio_eps;
}

/* A tower's way with one item. */
typedef struct Run {
    const MediaItem *item;
    size_t mark;
    Patches patches;
    VisionSaved vision; /* one of them where there is a tower */
    AudioSaved audio;
} Run;

/* out = what the projection normalises; the mode says what is kept for run_backward. */
static void run_begin(Run *r, const Media *m, Tensor out, const MediaItem *item, StackMode mode,
                      Pass *p) {
    *r = (Run){.item = item, .mark = arena_mark(p->scratch)};
    if (item->height) {
        r->patches = patches_of(m, item);
        if (m->vision.blocks) {
            vision_open(&r->vision, &m->vision, mode);
            vision_place(&r->vision, &m->vision, p->scratch, out.dtype, r->patches.N);
            vision_forward(&m->vision, &r->vision, out, r->patches.pixels, r->patches.places, p);
        } else {
            unified_forward(&m->unified, out, r->patches.pixels, r->patches.places, p);
        }
    } else if (m->audio.blocks) {
        audio_open(&r->audio, &m->audio, mode);
        audio_place(&r->audio, &m->audio, p->scratch, out.dtype, item->frames);
        audio_forward(&m->audio, &r->audio, out, item->features, p);
    } else { /* samples go to the projection as they are */
        Tensor values = ARENA_TENSOR(p->scratch, F32, tensor_rows(out), tensor_cols(out));
        if (item->features) tensor_write(values, item->features);
        scale_copy(out, SET, values, 1.0f);
    }
}

static void run_backward(Run *r, const Media *m, Tensor dout, Pass *p) {
    if (r->item->height && m->vision.blocks)
        vision_backward(&m->vision, &r->vision, dout, p);
    else if (r->item->height)
        unified_backward(&m->unified, dout, r->patches.pixels, r->patches.places, p);
    else if (m->audio.blocks)
        audio_backward(&m->audio, &r->audio, dout, p);
}

static void run_end(Run *r, Pass *p) {
    free(r->patches.pixels);
    free(r->patches.places);
    vision_close(&r->vision);
    audio_close(&r->audio);
    arena_release(p->scratch, r->mark);
}

/* ---- training ---- */

/* Whether any weight or adapter below that prefix is trained. */
static bool trains_below(const Media *m, const char *prefix) {
    for (int i = 0; i < m->params->count; i++) {
        const Param *p = m->params->items[i];
        if (p->trainable && !strncmp(p->name, prefix, strlen(prefix))) return true;
    }
    return false;
}

/* Whether the item's gradient goes on past the projection. */
static bool trains_before_projection(const Media *m, bool picture) {
    return trains_below(m, picture ? "model.vision_" : "model.audio_tower.");
}

bool media_trains_towers(const Media *m) {
    return trains_before_projection(m, true) || trains_before_projection(m, false);
}

bool media_trains(const Media *m) {
    return media_trains_towers(m) || trains_below(m, "model.embed_vision.") ||
           trains_below(m, "model.embed_audio.");
}

int64_t media_tower_width(const Media *m, bool picture) {
    return (picture ? &m->embed_vision : &m->embed_audio)->in;
}

/* ---- both ways ---- */

/* z = what the projection normalises, nothing of it kept for a backward pass: made, or made before.
 */
static void tower_output(const Media *m, Tensor z, const MediaItem *item, Pass *p) {
    Run r;
    bool keeps =
        item->key && z.data && m->cache->most && !trains_before_projection(m, item->height > 0);
    if (keeps && tower_cache_find(m->cache, item->key, z)) return;
    run_begin(&r, m, z, item, STACK_SCORE, p);
    run_end(&r, p);
    if (keeps) tower_cache_keep(m->cache, item->key, z);
}

void media_forward(const Media *m, Tensor soft, const MediaItem *item, Pass *p) {
    const Linear *projection = projection_of(m, item);
    size_t mark = arena_mark(p->scratch);
    Tensor z = ARENA_TENSOR(p->scratch, soft.dtype, item->count, projection->in);
    tower_output(m, z, item, p);
    rmsnorm_forward(z, tensor_absent(), z, tensor_absent(), tensor_absent(), eps_of(m, item));
    linear_forward(projection, soft, z, p);
    arena_release(p->scratch, mark);
}

void media_backward(const Media *m, Tensor dsoft, const MediaItem *item, StackMode mode, Pass *p) {
    const Linear *projection = projection_of(m, item);
    bool before = trains_before_projection(m, item->height > 0);
    size_t mark = arena_mark(p->scratch);
    Run r;
    Tensor z = ARENA_TENSOR(p->scratch, dsoft.dtype, item->count, projection->in),
           normal = arena_like(p->scratch, z), rstd = ARENA_TENSOR(p->scratch, F32, item->count);
    if (before)
        run_begin(&r, m, z, item, mode, p);
    else
        tower_output(m, z, item, p);
    rmsnorm_forward(normal, rstd, z, tensor_absent(), tensor_absent(), eps_of(m, item));
    if (before) {
        Tensor dz = arena_like(p->scratch, z);
        linear_backward(projection, dz, SET, dsoft, normal, p);
        rmsnorm_backward(dz, SET, tensor_absent(), dz, z, rstd, tensor_absent());
        run_backward(&r, m, dz, p);
        run_end(&r, p);
    } else {
        linear_backward(projection, tensor_absent(), SET, dsoft, normal, p);
    }
    arena_release(p->scratch, mark);
}
