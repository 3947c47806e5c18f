/* bench.c - lapidary bench: kernels, or a model's prefill and decoding, on this machine against the
 * limits it shows in the same run. */
#include "cli/bench_drawn.h"
#include "cli/command.h"
#include "infer/engine.h"
#include "infer/model.h"
#include "infer/soft.h"
#include "kernels/arena.h"
#include "kernels/matmul.h"
#include "kernels/quantize.h"
#include "kernels/random.h"

#include <inttypes.h>
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double now(void) {
    return omp_get_wtime();
}

/* Words that no cache holds, for measuring what memory gives. */
typedef struct Probe {
    Arena memory;
    uint64_t *words;
    size_t count;
} Probe;

static Status probe_open(Probe *p) {
    p->count = (size_t)1 << 27;
    TRY(arena_init(&p->memory, device_cpu(), p->count * sizeof *p->words, "the memory probe"));
    p->words = (uint64_t *)p->memory.base;
    /* Pages never written are all one page of zeros. */
    memset(p->words, 1, p->count * sizeof *p->words);
    return OK;
}

/* Bytes a second that all threads together read from memory, over `seconds` of passes: single
 * passes are faster or slower by half. */
static double read_rate(Probe *p, double seconds) {
    uint64_t *words = p->words;
    size_t count = p->count;
    double start = now(), bytes = 0;
    uint64_t all = 0;
    while (now() - start < seconds) {
        uint64_t total = 0;
#pragma omp parallel for simd schedule(static) reduction(^ : total)
        for (size_t i = 0; i < count; i++) total ^= words[i];
        all += total;
        bytes += (double)(count * sizeof *words);
    }
    return bytes / (now() - start) + (all == 1 ? 1e-9 : 0); /* the sum is used */
}

static void fill_random(Tensor t) {
    int64_t n = tensor_count(t);
    float *row = must_malloc(65536 * sizeof *row);
    for (int64_t first = 0; first < n; first += 65536) {
        int64_t count = n - first < 65536 ? n - first : 65536;
        random_normal(row, 7, (uint64_t)first, count);
        for (int64_t i = 0; i < count; i++) {
            if (t.dtype == F32)
                ((float *)t.data)[first + i] = row[i] * 0.02f;
            else
                ((uint16_t *)t.data)[first + i] = f32_to_bf16(row[i] * 0.02f);
        }
    }
    free(row);
}

/* One product of E2B's width, repeated over `copies` matrices so that none stays in a cache. */
typedef struct Case {
    const char *name;
    DType weight;
    Layout layout;
    int64_t M;
    bool int8;
} Case;

#define IN     1536
#define OUT    12288
#define COPIES 24

static Status run_case(const Case *c, double probe) {
    Arena arena, weights = {0};
    Status status = OK;
    int64_t M = c->M;
    Tensor x, y, plain;
    size_t bytes = (size_t)(M * OUT) * 2 + (size_t)(M * IN) * 2 + (size_t)OUT * IN * 2 + 4096;
    TRY(arena_init(&arena, device_cpu(), bytes, "the operands"));
    plain = ARENA_TENSOR(&arena, BF16, OUT, IN);
    x = ARENA_TENSOR(&arena, BF16, M, c->layout == NT ? IN : OUT);
    y = ARENA_TENSOR(&arena, BF16, M, c->layout == NT ? OUT : IN);
    fill_random(plain);
    fill_random(x);
    Tensor one = {.dtype = c->weight, .ndim = 2, .shape = {OUT, IN}};
    TRY_DONE(arena_init(&weights, device_cpu(), COPIES * ((tensor_bytes(one) + 63) / 64 * 64),
                        "the weights"));
    Tensor w[COPIES];
    for (int i = 0; i < COPIES; i++) {
        w[i] = ARENA_TENSOR(&weights, c->weight, OUT, IN);
        if (i)
            memcpy(w[i].data, w[0].data, tensor_bytes(one));
        else if (dtype_is_packed(c->weight))
            quantize(w[0], plain);
        else
            memcpy(w[0].data, plain.data, tensor_bytes(one));
    }
    double best = 1e9;
    int used = M > 64 ? 6 : COPIES;
    for (int pass = 0; pass < 4; pass++) {
        double start = now();
        for (int i = 0; i < used; i++) {
            if (c->int8)
                matmul_int8(y, x, w[i]);
            else
                matmul(c->layout, y, SET, x, w[i], 1.0f);
        }
        double seconds = (now() - start) / used;
        if (seconds < best) best = seconds;
    }
    double rate = (double)tensor_bytes(one) / best;
    printf("%-44s %9.1f us %8.2f GB/s (%3.0f %%) %9.1f Gop/s\n", c->name, best * 1e6, rate / 1e9,
           100 * rate / probe, 2e-9 * (double)(M * IN * OUT) / best);
done:
    arena_free(&weights);
    arena_free(&arena);
    return status;
}

/* ---- a model ---- */

typedef struct ModelBench {
    const char *model, *dtype, *kv;
    int64_t prompt, tokens, depth, sequences;
} ModelBench;

/* Seconds to score the prompt with the logits of every token: a fresh sequence. */
static Status time_scoring(Model *m, const int32_t *ids, int64_t n, double *seconds) {
    StepOptions options = {.mode = STACK_SCORE};
    StepMemory memory;
    int32_t *numbers = must_calloc((size_t)n * 3, sizeof *numbers);
    float *nll = must_calloc((size_t)n, sizeof *nll);
    Status status = step_init(&memory, &m->g, n, &options);
    for (int64_t i = 0; i < n; i++) numbers[i] = (int32_t)i, numbers[2 * n + i] = ids[(i + 1) % n];
    Batch batch = {.N = n,
                   .ids = ids,
                   .positions = numbers,
                   .starts = numbers + n,
                   .targets = numbers + 2 * n};
    *seconds = 1e9;
    for (int pass = 0; pass < 3 && status == OK; pass++) {
        double start = now();
        step_run(&m->g, &memory, &batch, &options, nll);
        if (now() - start < *seconds) *seconds = now() - start;
    }
    step_free(&memory);
    free(numbers);
    free(nll);
    return status;
}

/* An engine with so many sequences: prompts of n tokens, and answers that nothing stops. */
static Status start_engine(Engine *e, Sequence **s, Model *m, int64_t sequences, const int32_t *ids,
                           int64_t n, int64_t answer, DType kv) {
    EngineOptions options = {.sequences = sequences,
                             .tokens = sequences * (n + answer + PAGE_KEYS),
                             .chunk = 512,
                             .kv = kv};
    Request request = {.ids = ids,
                       .count = n,
                       .sampling = {.max_tokens = answer, .top_p = 1, .repetition_penalty = 1}};
    TRY(engine_init(e, &m->g, m->tokenizer, &options));
    Status status = OK;
    for (int64_t i = 0; i < sequences && status == OK; i++) status = engine_submit(e, s, &request);
    return status;
}

/* Tokens between two looks at memory, and how long one takes. */
#define PROBE_TOKENS  8
#define PROBE_SECONDS 0.1

static Status bench_model(const ModelBench *b) {
    Model m;
    Engine e = {0};
    Sequence *sequence = NULL;
    Probe probe = {0};
    Status status = OK;
    double prefill = 1e9, scoring = 0, decode = 0, reads = 0, used;
    DType kv = BF16;
    TRY(model_open(&m, b->model, NULL, "cpu", b->dtype, WEIGHTS_LOADED, WITHOUT_MEDIA));
    int64_t n = b->prompt > b->depth ? b->prompt : b->depth;
    int32_t *ids = bench_random_ids(&m.g, n + 4);
    TRY_DONE(kv_dtype(&kv, &m.g, b->kv));
    if (b->prompt) {
        TRY_DONE(time_scoring(&m, ids, b->prompt, &scoring));
        for (int pass = 0; pass < 3; pass++) {
            TRY_DONE(start_engine(&e, &sequence, &m, 1, ids, b->prompt, 1, kv));
            double start = now();
            while (sequence->ending == ENDING_NONE) engine_step(&e);
            if (now() - start < prefill) prefill = now() - start;
            engine_free(&e);
        }
    }
    TRY_DONE(start_engine(&e, &sequence, &m, b->sequences, ids, b->depth + 4, b->tokens + 1, kv));
    while (sequence_answered(sequence) == 0) engine_step(&e);
    used = (double)process_private();
    TRY_DONE(probe_open(&probe));
    /* Memory's speed changes from second to second: a few tokens and a look at it take turns. */
    reads = read_rate(&probe, PROBE_SECONDS);
    for (int64_t i = 0; i < b->tokens; i += PROBE_TOKENS) {
        int64_t end = i + PROBE_TOKENS < b->tokens ? i + PROBE_TOKENS : b->tokens;
        double start = now();
        for (int64_t k = i; k < end; k++) engine_step(&e);
        decode += now() - start;
        reads += read_rate(&probe, PROBE_SECONDS);
    }
    decode /= (double)b->tokens;
    reads /= 1 + (double)((b->tokens + PROBE_TOKENS - 1) / PROBE_TOKENS);
    double bytes = bench_bytes_a_token(&m.g);
    printf(
        "{\"scoring_tokens_per_s\": %.1f, \"prefill_tokens_per_s\": %.1f, \"decode_tokens_per_s\": "
        "%.2f, \"bytes_per_token\": %.0f, \"decode_gb_per_s\": %.2f, \"probe_gb_per_s\": %.2f, "
        "\"private_gb\": %.3f}\n",
        b->prompt ? (double)b->prompt / scoring : 0, b->prompt ? (double)b->prompt / prefill : 0,
        (double)b->sequences / decode, bytes, bytes / decode / 1e9, reads / 1e9, used / 1e9);
done:
    arena_free(&probe.memory);
    engine_free(&e);
    free(ids);
    model_close(&m);
    return status;
}

/* ---- towers ---- */

/* A picture of 280 soft tokens, or 30 seconds of sound, of random content. */
static MediaItem tower_item(const ModelConfig *c, bool picture, void **bytes) {
    MediaItem item = {0};
    if (picture) {
        int64_t side = c->vision.patch_size * c->vision.pooling_kernel_size;
        uint8_t *pixels = must_malloc((size_t)(14 * side * 20 * side * 3));
        item.height = 14 * side;
        item.width = 20 * side;
        for (int64_t i = 0; i < item.height * item.width * 3; i++)
            pixels[i] = (uint8_t)random_u64(5, (uint64_t)i);
        item.pixels = *bytes = pixels;
        item.count = media_picture_tokens(&c->vision, item.height, item.width);
    } else {
        item.frames = c->audio.path == MEDIA_TOWER ? 2999 : 750;
        int64_t values = item.frames * media_feature_width(&c->audio);
        float *features = must_malloc((size_t)values * sizeof *features);
        random_normal(features, 6, 0, values);
        item.features = *bytes = features;
        item.count = media_audio_tokens(&c->audio, item.frames);
    }
    return item;
}

/* The fastest of a few runs, memory taken and given back each time. */
static Status time_tower(Gemma *g, bool picture, double *seconds, size_t *memory) {
    void *bytes = NULL;
    MediaItem item = tower_item(&g->config, picture, &bytes);
    Status status = OK;
    *seconds = 1e9;
    for (int i = 0; i < 3 && status == OK; i++) {
        SoftMedia soft;
        MediaItem *one = must_malloc(sizeof *one);
        *one = item;
        double start = now();
        status = soft_media_make(&soft, g, one, 1);
        if (now() - start < *seconds) *seconds = now() - start;
        *memory = soft.peak;
        if (status == OK) soft_media_free(&soft);
    }
    free(bytes);
    return status;
}

static Status bench_towers(const char *dir, const char *device, const char *dtype) {
    Model m;
    double seconds[2] = {0};
    size_t memory[2] = {0};
    TRY(model_open(&m, dir, NULL, device, dtype, WEIGHTS_LOADED, WITH_MEDIA));
    Status status = model_check_media(&m.g);
    if (status == OK && m.g.media.sees) status = time_tower(&m.g, true, &seconds[0], &memory[0]);
    if (status == OK && m.g.media.hears) status = time_tower(&m.g, false, &seconds[1], &memory[1]);
    if (status == OK)
        printf("{\"picture_s\": %.4f, \"picture_gb\": %.3f, \"sound_s\": %.4f, \"sound_gb\": "
               "%.3f}\n",
               seconds[0], (double)memory[0] / 1e9, seconds[1], (double)memory[1] / 1e9);
    model_close(&m);
    return status;
}

Status command_bench(int argc, char **argv) {
    static const Case cases[] = {
        {"decode: 1 row, q4_0, 8-bit activations", Q4_0_TILED, NT, 1, true},
        {"decode: 1 row, q8_0, 8-bit activations", Q8_0_TILED, NT, 1, true},
        {"decode: 1 row, bf16", BF16, NT, 1, false},
        {"decode: 4 rows, q4_0, 8-bit activations", Q4_0_TILED, NT, 4, true},
        {"decode: 16 rows, q4_0, 8-bit activations", Q4_0_TILED, NT, 16, true},
        {"prefill: 512 rows, q4_0, 8-bit activations", Q4_0_TILED, NT, 512, true},
        {"prefill: 512 rows, q8_0, 8-bit activations", Q8_0_TILED, NT, 512, true},
        {"train: 512 rows, bf16", BF16, NT, 512, false},
        {"train: 512 rows, q4_0", Q4_0_TILED, NT, 512, false},
        {"train: 512 rows, nf4", NF4_NESTED, NT, 512, false},
        {"train, backward: 512 rows, bf16", BF16, NN, 512, false},
        {"train, backward: 512 rows, q4_0", Q4_0_TILED, NN, 512, false},
        {"train, backward: 512 rows, nf4", NF4_NESTED, NN, 512, false},
    };
    enum { PROMPT = 512, RANK = 16 };
    ModelBench b = {.prompt = PROMPT, .tokens = 64, .sequences = 1};
    DrawnBench drawn = {.device = "auto", .rank = RANK};
    Option options[] = {
        {"--model", OPTION_TEXT, &b.model, "DIR  time this model's prefill and decoding instead"},
        {"--preset", OPTION_TEXT, &drawn.preset,
         "NAME  decode with a released shape, its random weights drawn where they run"},
        {"--train", OPTION_TEXT, &drawn.train,
         "lora|qlora|full  with --preset: training steps on --tokens tokens instead"},
        {"--lean", OPTION_FLAG, &drawn.lean,
         "with --train: optimizer.masters: none and optimizer.fused"},
        {"--plan", OPTION_FLAG, &drawn.plan, "with --train: only say what memory it would take"},
        {"--recompute", OPTION_FLAG, &drawn.recompute, "with --train: even where memory suffices"},
        {"--offload", OPTION_FLAG, &drawn.offload,
         "with --train: recompute, layers' inputs in the host's memory"},
        {"--rank", OPTION_INT, &drawn.rank, "N  of the adapter (16)"},
        {"--layers", OPTION_INT, &drawn.layers, "N  of the preset, fewer than released"},
        {"--weights", OPTION_TEXT, &drawn.weights, "bf16|q4_0|q8_0  of the preset (bf16)"},
        {"--device", OPTION_TEXT, &drawn.device,
         "auto|cpu|cuda[:n]  of a preset, `attention` or `towers`"},
        {"--prompt", OPTION_INT, &b.prompt, "N  tokens of prefill (512)"},
        {"--tokens", OPTION_INT, &b.tokens, "N  tokens decoded (64)"},
        {"--depth", OPTION_INT, &b.depth, "N  tokens already there when decoding starts (0)"},
        {"--sequences", OPTION_INT, &b.sequences, "N  decoded side by side (1)"},
        {"--dtype", OPTION_TEXT, &b.dtype, "bf16|f32  (bf16)"},
        {"--kv", OPTION_TEXT, &b.kv, "bf16|q8_0|q4_0  keys and values (the model's dtype)"},
        {NULL, OPTION_FLAG, NULL, NULL}};
    Arguments a = {.usage = "bench [NAME] [--model DIR | --preset NAME [--train METHOD]]",
                   .about =
                       "Times the products of a 1536 x 12288 layer on this machine (NAME keeps "
                       "those whose name contains it), `attention` of released heads, the `towers` "
                       "of a model, or a model: one JSON line.",
                   .options = options,
                   .least = 0,
                   .most = 1};
    TRY(arguments_parse(&a, argc, argv));
    if (a.helped) return OK;
    if (b.prompt < 0 || b.tokens < 1 || b.depth < 0 || b.sequences < 1 || b.sequences > 512)
        FAIL(ERR_USAGE, "--prompt, --tokens, --depth or --sequences is out of range");
    if (b.model && drawn.preset) FAIL(ERR_USAGE, "--model and --preset: one of them");
    if ((drawn.train || drawn.weights || drawn.layers || drawn.rank != RANK) && !drawn.preset)
        FAIL(ERR_USAGE, "--train, --weights, --layers and --rank go with --preset");
    if (drawn.preset && (b.prompt != PROMPT || b.dtype || b.kv))
        FAIL(ERR_USAGE, "--prompt, --dtype and --kv go with --model; a preset's prompt is --depth");
    if (!b.dtype) b.dtype = "bf16";
    if (!drawn.weights) drawn.weights = "bf16";
    if (!drawn.train && (drawn.lean || drawn.plan || drawn.recompute || drawn.offload))
        FAIL(ERR_USAGE, "--lean, --plan, --recompute and --offload go with --train");
    if (a.count && !strcmp(a.positional[0], "towers")) {
        if (!b.model) FAIL(ERR_USAGE, "bench towers needs --model");
        return bench_towers(b.model, drawn.device, b.dtype);
    }
    if (b.model && strcmp(drawn.device, "auto") && strcmp(drawn.device, "cpu"))
        FAIL(ERR_USAGE, "--model is timed on the CPU; --preset goes to --device %s", drawn.device);
    if (b.model) return bench_model(&b);
    drawn.tokens = b.tokens;
    drawn.sequences = b.sequences;
    drawn.depth = b.depth;
    if (drawn.preset) return bench_drawn(&drawn);
    if (a.count && !strcmp(a.positional[0], "attention"))
        return bench_attention(drawn.device, b.tokens);
    Probe memory;
    TRY(probe_open(&memory));
    double probe = read_rate(&memory, 0.5);
    printf("level %s, %d threads, memory reads %.1f GB/s\n", cpu_level_name(),
           omp_get_max_threads(), probe / 1e9);
    Status status = OK;
    for (size_t i = 0; i < sizeof cases / sizeof *cases && status == OK; i++)
        if (!a.count || strstr(cases[i].name, a.positional[0])) status = run_case(&cases[i], probe);
    if (status == OK) printf("memory reads %.1f GB/s at the end\n", read_rate(&memory, 0.5) / 1e9);
    arena_free(&memory.memory);
    return status;
}
