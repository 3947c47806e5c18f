/* test_media.c - whole models with towers against the reference: pictures of two sizes, video
 * frames and sound in one sequence. */
#include "formats/adapter.h"
#include "formats/checkpoint.h"
#include "infer/engine.h"
#include "infer/soft.h"
#include "kernels/elementwise.h"
#include "model/media.h"
#include "tests/fixture.h"
#include "tests/small_model.h"

#include <math.h>
#include <stdlib.h>

static const char *const kinds[] = {"e2b", "31b", "12b"};
#define KINDS (sizeof kinds / sizeof *kinds)

typedef struct Run {
    Fixture f;
    Checkpoint checkpoint;
    Gemma g;
    StepMemory memory;
    StepOptions options;
    Packed *packed;
    MediaItem items[5];
    uint8_t *pictures[4];
    float *features;
} Run;

/* The slots of item i in the sequence: runs of one id, in the order of its pictures, frames and
 * sounds. */
static void find_slots(Run *r) {
    const ModelConfig *c = &r->g.config;
    int64_t sizes[4][2] = {{2, 3}, {1, 1}, {1, 2}, {1, 2}};
    int64_t side = c->vision.patch_size * c->vision.pooling_kernel_size, n = r->packed->batch.N;
    int count = 0;
    for (int64_t at = 0; at < n; at++) {
        int32_t id = r->packed->ids[at];
        bool picture = id == c->image_token_id || id == c->video_token_id;
        if (!picture && id != c->audio_token_id) continue;
        MediaItem *item = &r->items[count];
        item->first = at;
        while (at < n && r->packed->ids[at] == id) at++;
        item->count = at - item->first;
        if (picture) {
            char name[24];
            int64_t bytes;
            snprintf(name, sizeof name, "picture%d", count);
            item->height = sizes[count][0] * side;
            item->width = sizes[count][1] * side;
            item->pixels = r->pictures[count] = fixture_bytes(&r->f, name, &bytes);
            EXPECT(item->count == media_picture_tokens(&c->vision, item->height, item->width),
                   "%d slots", (int)item->count);
            for (int64_t k = item->first; k < at; k++)
                if (c->use_bidirectional_attention) r->packed->spans[k] = (int32_t)at - 1;
        } else {
            int64_t values;
            r->features = fixture_floats(&r->f, "features", &values);
            item->features = r->features;
            item->frames = values / media_feature_width(&c->audio);
        }
        count++;
    }
    r->packed->batch.media = r->items;
    r->packed->batch.media_count = count;
    r->packed->batch.span_ends = r->packed->spans;
    for (int64_t k = 0; k < n; k++) /* every token is scored, slots as well */
        r->packed->weights[k] = 1.0f / (float)(n - 1);
}

/* Where models run; NULL: the CPU. */
static Device *device;

/* The fixture's model, with everything trained where that is asked for. */
static void load_model(Run *r, const char *kind, bool full, const AdapterSpec *spec) {
    char name[40];
    snprintf(name, sizeof name, "media_%s.h5", kind);
    *r = (Run){.f = fixture_open(name)};
    EXPECT_OK(checkpoint_open(&r->checkpoint, r->f.dir));
    gemma_declare(&r->g, &r->checkpoint.config, F32, device ? device : device_cpu());
    gemma_declare_media(&r->g);
    for (int i = 0; full && i < r->g.params.count; i++)
        r->g.params.items[i]->trainable = !r->g.params.items[i]->buffer;
    if (spec) EXPECT_OK(adapter_attach(&r->g, spec));
    EXPECT_OK(params_place(&r->g.params, r->g.device, true));
    EXPECT_OK(checkpoint_load(&r->checkpoint, &r->g));
}

static void run_start(Run *r, const char *kind, StackMode mode, bool full,
                      const AdapterSpec *spec) {
    load_model(r, kind, full, spec);
    r->packed = fixture_batch(&r->f, -1);
    find_slots(r);
    r->options = (StepOptions){.mode = mode,
                               .shortcut = true,
                               .largest = r->items,
                               .largest_count = r->packed->batch.media_count};
    EXPECT_OK(step_init(&r->memory, &r->g, 64, &r->options));
    step_run(&r->g, &r->memory, &r->packed->batch, &r->options, r->packed->nll);
}

/* 30 seconds of sound through the model of media_e2b: 750 slots, features by formula. */
static void run_long(Run *r, StackMode mode) {
    load_model(r, "e2b", true, NULL);
    H5Fclose(r->f.file);
    r->f.file = fixture_open_plain("media_long.h5").file;
    r->packed = fixture_batch(&r->f, -1);
    MediaItem *item = &r->items[0];
    *item = (MediaItem){.frames = 2999, .count = 750};
    while (r->packed->ids[item->first] != r->g.config.audio_token_id) item->first++;
    r->features = must_malloc(2999 * MEL_BINS * sizeof *r->features);
    for (uint32_t i = 0; i < 2999 * MEL_BINS; i++) r->features[i] = 3 * fixture_formula(1000, i);
    item->features = r->features;
    r->packed->batch.media = r->items;
    r->packed->batch.media_count = 1;
    r->options =
        (StepOptions){.mode = mode, .shortcut = true, .largest = r->items, .largest_count = 1};
    EXPECT_OK(step_init(&r->memory, &r->g, r->packed->batch.N, &r->options));
    step_run(&r->g, &r->memory, &r->packed->batch, &r->options, r->packed->nll);
}

static void run_stop(Run *r) {
    step_free(&r->memory);
    gemma_free(&r->g);
    checkpoint_close(&r->checkpoint);
    for (int i = 0; i < 4; i++) free(r->pictures[i]);
    free(r->features);
    free(r->packed);
    H5Fclose(r->f.file);
}

/* Whether the reference has a gradient of the parameter; then it is equal. */
static bool compare_gradient(const Run *r, const char *kind, const Param *p) {
    char name[PARAM_NAME_MAX + 8];
    double error = 0, norm = 0;
    int64_t count;
    snprintf(name, sizeof name, "grad/%s", p->name);
    if (!fixture_has(&r->f, name)) return false;
    float *expected = fixture_floats(&r->f, name, &count), *found = small_values(p->grad);
    for (int64_t k = 0; k < count; k++) {
        double d = (double)found[k] - expected[k];
        error += d * d;
        norm += (double)expected[k] * expected[k];
    }
    EXPECT(sqrt(error) <= 1e-3 * sqrt(norm) + 1e-7, "%s: gradient of %s differs by %.3g of %.3g",
           kind, p->name, sqrt(error), sqrt(norm));
    free(expected), free(found);
    return true;
}

static void compare_gradients(const Run *r, const char *kind) {
    int compared = 0;
    for (int i = 0; i < r->g.params.count; i++) {
        const Param *p = r->g.params.items[i];
        if (!p->buffer && compare_gradient(r, kind, p)) compared += p->tower;
    }
    EXPECT(compared > 8, "%s: only %d gradients of towers", kind, compared);
}

static void compare_losses(const Run *r, const char *kind) {
    int64_t count;
    float *expected = fixture_floats(&r->f, "nll", &count);
    for (int64_t n = 0; n < count; n++)
        EXPECT(fabs(r->packed->nll[n] - expected[n]) < 1e-4 * fmax(1, fabs(expected[n])),
               "%s: nll of row %d is %.6f, expected %.6f", kind, (int)n, r->packed->nll[n],
               expected[n]);
    free(expected);
}

static void compare_kind(const char *kind, StackMode mode) {
    Run r;
    run_start(&r, kind, mode, true, NULL);
    compare_losses(&r, kind);
    compare_gradients(&r, kind);
    run_stop(&r);
}

CASE(media, losses_and_every_gradient_equal_the_reference) {
    for (size_t k = 0; k < KINDS; k++) {
        compare_kind(kinds[k], STACK_KEEP);
        compare_kind(kinds[k], STACK_RECOMPUTE);
    }
}

CASE(gpu, losses_and_gradients_of_media_equal_the_reference) {
    if (device_open(&device, "cuda") != OK) SKIP("%s", status_message());
    for (size_t k = 0; k < KINDS; k++) compare_kind(kinds[k], STACK_KEEP);
}

CASE(media, thirty_seconds_of_sound_equal_the_reference) {
    static const StackMode modes[] = {STACK_KEEP, STACK_RECOMPUTE};
    for (int m = 0; m < 2; m++) {
        Run r;
        run_long(&r, modes[m]);
        compare_losses(&r, "30 s");
        compare_gradients(&r, "30 s");
        run_stop(&r);
    }
}

/* Towers that nothing trains make the same again. */
CASE(media, what_towers_made_before_is_what_they_make) {
    static const size_t limits[] = {100000, 600}; /* all of them; one or two */
    for (size_t k = 0; k < KINDS; k++) {
        Run r;
        run_start(&r, kinds[k], STACK_SCORE, false, NULL);
        size_t bytes = (size_t)r.packed->batch.N * sizeof(float);
        float *first = must_malloc(bytes);
        memcpy(first, r.packed->nll, bytes);
        TowerCache *cache = r.g.media.cache;
        for (int64_t i = 0; i < r.packed->batch.media_count; i++) r.items[i].key = (uint64_t)i + 1;
        for (int l = 0; l < 2; l++) {
            cache->most = limits[l];
            for (int again = 0; again < 3; again++) {
                step_run(&r.g, &r.memory, &r.packed->batch, &r.options, r.packed->nll);
                EXPECT(!memcmp(first, r.packed->nll, bytes), "%s: other losses", kinds[k]);
                EXPECT(cache->count > 0 && cache->bytes <= limits[l], "%d kept, %zu bytes",
                       (int)cache->count, cache->bytes);
            }
            EXPECT((cache->count == r.packed->batch.media_count) == !l, "%d kept",
                   (int)cache->count);
            tower_cache_free(cache);
        }
        run_stop(&r);
        free(first);
    }
}

/* The same where projections are trained: their gradients, bit for bit. */
CASE(media, projections_train_on_what_towers_made_before) {
    char *names[] = {"embedding_projection"};
    AdapterSpec spec = {.rank = 1, .alpha = 1, .train_also = {names, 1}};
    for (size_t k = 0; k < KINDS; k++) {
        Run r;
        run_start(&r, kinds[k], STACK_KEEP, false, &spec);
        Tensor grads = r.g.params.space.grads;
        float *first = small_values(grads);
        size_t bytes = tensor_bytes(grads);
        for (int i = 0; i < r.g.params.count; i++)
            if (r.g.params.items[i]->trainable)
                EXPECT(compare_gradient(&r, kinds[k], r.g.params.items[i]));
        for (int64_t i = 0; i < r.packed->batch.media_count; i++) r.items[i].key = (uint64_t)i + 1;
        r.g.media.cache->most = 100000;
        for (int again = 0; again < 2; again++) {
            fill(grads, 0.0f);
            step_run(&r.g, &r.memory, &r.packed->batch, &r.options, r.packed->nll);
            float *found = small_values(grads);
            EXPECT(!memcmp(first, found, bytes), "%s: other gradients", kinds[k]);
            free(found);
        }
        EXPECT(r.g.media.cache->count == r.packed->batch.media_count, "%s: %d kept", kinds[k],
               (int)r.g.media.cache->count);
        run_stop(&r);
        free(first);
    }
}

static MediaItem *copied_items(const Run *r, int64_t *count) {
    *count = r->packed->batch.media_count;
    MediaItem *items = must_calloc((size_t)*count, sizeof *items);
    memcpy(items, r->items, (size_t)*count * sizeof *items);
    return items;
}

/* One request for the fixture's answer; how it came. */
static void expect_answer(Run *r, Engine *e, const SoftMedia *soft, const char *kind,
                          int64_t reused) {
    int64_t count;
    int32_t *expected = fixture_ints(&r->f, "answer", &count);
    Request request = {.ids = r->packed->ids,
                       .count = r->packed->batch.N,
                       .media = soft->items,
                       .media_count = soft->count,
                       .sampling = {.max_tokens = count, .top_p = 1, .repetition_penalty = 1}};
    Sequence *s;
    EXPECT_OK(engine_submit(e, &s, &request));
    while (s->ending == ENDING_NONE) engine_step(e);
    EXPECT(s->count == request.count + count, "%s: %d tokens", kind, (int)s->count);
    for (int64_t i = 0; i < count; i++)
        EXPECT(s->ids[request.count + i] == expected[i], "%s: token %d is %d, expected %d", kind,
               (int)i, s->ids[request.count + i], expected[i]);
    EXPECT(s->reused >= reused, "%s: %d tokens were found", kind, (int)s->reused);
    engine_drop(e, s);
    free(expected);
}

CASE(media, answers_equal_the_reference_however_the_prompt_is_cut) {
    static const int64_t chunks[] = {64, 13, 8};
    for (size_t k = 0; k < KINDS; k++)
        for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
            Run r;
            Engine e;
            SoftMedia soft;
            int64_t count;
            EngineOptions options = {
                .sequences = 2, .tokens = 512, .chunk = chunks[c], .kv = F32, .share = true};
            run_start(&r, kinds[k], STACK_SCORE, false, NULL);
            MediaItem *items = copied_items(&r, &count);
            EXPECT_OK(soft_media_make(&soft, &r.g, items, count));
            EXPECT_OK(engine_init(&e, &r.g, NULL, &options));
            expect_answer(&r, &e, &soft, kinds[k], 0);
            engine_free(&e);
            soft_media_free(&soft);
            run_stop(&r);
        }
}
