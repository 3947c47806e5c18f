/* test_engine.c - what a sequence answers depends on its own request alone. */
#include "formats/file.h"
#include "formats/initial.h"
#include "infer/engine.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "kernels/sampling.h"
#include "tests/small_model.h"

#include <math.h>

#define PROMPTS 64
#define ANSWER  10

/* Prompts of 1 to 300 tokens; most begin like others, within a page and beyond. */
typedef struct Prompts {
    int number;
    int32_t ids[PROMPTS][300];
    int64_t count[PROMPTS];
} Prompts;

static Prompts *make_prompts(void) {
    Prompts *p = must_calloc(1, sizeof *p);
    p->number = PROMPTS;
    for (int i = 0; i < PROMPTS; i++) {
        int64_t alike = i % 4 == 0 ? 0 : i % 4 == 1 ? 150 : i % 4 == 2 ? 20 : 128;
        p->count[i] = alike + 1 + (int64_t)(random_u64(1, (uint64_t)i) % 90);
        for (int64_t t = 0; t < p->count[i]; t++) {
            uint64_t key = t < alike ? 7 : 100 + (uint64_t)i;
            p->ids[i][t] = (int32_t)(3 + random_u64(key, (uint64_t)t) % 2000);
        }
    }
    return p;
}

typedef struct Answers {
    int32_t ids[PROMPTS][ANSWER];
    float logprobs[PROMPTS][ANSWER], scores[PROMPTS][300];
    EngineCounts counts;
} Answers;

/* Every fourth prompt is sampled, every third is scored as well. */
static Answers *run_all(Gemma *g, const Prompts *p, const EngineOptions *options) {
    Answers *out = must_calloc(1, sizeof *out);
    Engine e;
    Sequence *all[PROMPTS];
    EXPECT_OK(engine_init(&e, g, NULL, options));
    for (int i = 0; i < p->number; i++) {
        Request r = {.ids = p->ids[i],
                     .count = p->count[i],
                     .score_from = i % 3 ? 0 : 1,
                     .sampling = {.top_p = 0.9,
                                  .top_k = 50,
                                  .repetition_penalty = i % 5 ? 1 : 1.3,
                                  .temperature = i % 4 ? 0 : 0.8,
                                  .seed = (uint64_t)i,
                                  .max_tokens = ANSWER}};
        EXPECT_OK(engine_submit(&e, &all[i], &r));
    }
    while (engine_step(&e)) continue;
    for (int i = 0; i < p->number; i++) {
        EXPECT(all[i]->ending == ENDING_LENGTH && sequence_answered(all[i]) == ANSWER);
        memcpy(out->ids[i], all[i]->ids + p->count[i], sizeof out->ids[i]);
        memcpy(out->logprobs[i], all[i]->logprobs + p->count[i], sizeof out->logprobs[i]);
        memcpy(out->scores[i], all[i]->logprobs, (size_t)p->count[i] * sizeof(float));
        engine_drop(&e, all[i]);
    }
    out->counts = e.counts;
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) /* no page is held any more */
        for (int64_t i = 0; i < e.pages.total[FULL]; i++)
            EXPECT(!e.pages.nodes[i].live || !e.pages.nodes[i].users[kind]);
    engine_free(&e);
    return out;
}

static void compare(const Prompts *p, const Answers *a, const Answers *b, const char *what) {
    for (int i = 0; i < p->number; i++) {
        EXPECT(!memcmp(a->ids[i], b->ids[i], sizeof a->ids[i]), "%s: prompt %d", what, i);
        for (int t = 0; t < ANSWER; t++) EXPECT_CLOSE(a->logprobs[i][t], b->logprobs[i][t], 2e-4);
        for (int64_t t = 1; t < p->count[i] && i % 3 == 0; t++)
            EXPECT_CLOSE(a->scores[i][t], b->scores[i][t], 2e-4);
    }
}

CASE(engine, answers_do_not_depend_on_what_runs_beside_them) {
    static const struct {
        const char *name;
        EngineOptions options;
    } plans[] = {
        {"batched", {.sequences = 16, .tokens = 8192, .chunk = 512, .kv = F32, .share = false}},
        {"sharing", {.sequences = 16, .tokens = 8192, .chunk = 512, .kv = F32, .share = true}},
        {"small chunks", {.sequences = 8, .tokens = 8192, .chunk = 16, .kv = F32, .share = true}},
        {"few pages", {.sequences = 16, .tokens = 640, .chunk = 64, .kv = F32, .share = true}},
    };
    Prompts *p = make_prompts();
    for (int k = 0; k < SMALL_KINDS; k++) {
        Loaded m;
        char *dir = small_make(small_kinds[k]);
        small_load(&m, dir, F32, STACK_SCORE, NULL);
        Answers *alone =
            run_all(&m.g, p,
                    &(EngineOptions){
                        .sequences = 1, .tokens = 400, .chunk = 400, .kv = F32, .share = false});
        for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
            Answers *a = run_all(&m.g, p, &plans[i].options);
            compare(p, alone, a, plans[i].name);
            EXPECT(a->counts.rows < alone->counts.rows || i != 1, "nothing was shared");
            EXPECT((a->counts.reused > 0) == (i > 0), "%s", plans[i].name);
            EXPECT((a->counts.restarts > 0) == (i == 3), "%s: %d restarts", plans[i].name,
                   (int)a->counts.restarts);
            free(a);
        }
        free(alone);
        small_unload(&m);
        tree_remove(dir);
    }
}

/* A drafter for a small model: two layers, its own width. */
static char *make_drafter(const Gemma *target) {
    char *dir = must_format("%s/drafter", test_folder());
    const ModelConfig *c = &target->config;
    AttentionKind kinds[] = {SLIDING, FULL};
    int64_t heads[2] = {0}, kv[2] = {0};
    for (int l = 0; l < c->num_hidden_layers; l++)
        for (int k = 0; k < 2; k++)
            if (c->layer[l].kind == kinds[k])
                heads[k] = c->layer[l].head_dim, kv[k] = c->layer[l].num_key_value_heads;
    char *json = must_format(
        "{\"model_type\": \"gemma4_assistant\", \"architectures\": "
        "[\"Gemma4AssistantForCausalLM\"], \"backbone_hidden_size\": 128, \"text_config\": "
        "{\"model_type\": \"gemma4_text\", \"vocab_size\": 2048, \"hidden_size\": 128, "
        "\"num_hidden_layers\": 2, \"layer_types\": [\"sliding_attention\", "
        "\"full_attention\"], \"num_attention_heads\": 4, \"num_key_value_heads\": %d, "
        "\"num_global_key_value_heads\": %d, \"attention_k_eq_v\": true, \"head_dim\": %d, "
        "\"global_head_dim\": %d, \"intermediate_size\": 64, \"sliding_window\": 16, "
        "\"hidden_size_per_layer_input\": 0, \"vocab_size_per_layer_input\": 0, "
        "\"num_kv_shared_layers\": 2, \"hidden_activation\": \"gelu_pytorch_tanh\", "
        "\"rms_norm_eps\": 1e-6, \"tie_word_embeddings\": true, \"rope_parameters\": "
        "{\"full_attention\": {\"partial_rotary_factor\": 0.25, \"rope_theta\": 1000000.0, "
        "\"rope_type\": \"proportional\"}, \"sliding_attention\": {\"rope_theta\": 10000.0, "
        "\"rope_type\": \"default\"}}}}",
        (int)kv[0], (int)kv[1], (int)heads[0], (int)heads[1]);
    EXPECT_OK(initial_checkpoint(json, "demo/tokenizer", 6, F32, dir));
    free(json);
    return dir;
}

/* Blocks that add nothing: what comes is a function of the last token alone. */
static void quieten(Gemma *g) {
    for (int i = 0; i < g->params.count; i++) {
        const char *name = g->params.items[i]->name;
        if (strstr(name, "o_proj") || strstr(name, "down_proj") ||
            strstr(name, "per_layer_projection"))
            fill(g->params.items[i]->value, 0.0f);
    }
}

CASE(engine, a_drafter_changes_no_answer) {
    Prompts *p = make_prompts();
    for (int k = 0; k < SMALL_KINDS; k++)
        for (int quiet = 0; quiet < 2; quiet++) {
            Loaded m;
            Drafter d;
            char *dir = small_make(small_kinds[k]), *small;
            EngineOptions options = {
                .sequences = 8, .tokens = 8192, .chunk = 64, .kv = F32, .share = true};
            small_load(&m, dir, F32, STACK_SCORE, NULL);
            small = make_drafter(&m.g);
            if (quiet) quieten(&m.g);
            Answers *alone = run_all(&m.g, p, &options);
            EXPECT_OK(drafter_open(&d, small, &m.g));
            if (quiet) { /* the same function of the last token: every guess is right */
                quieten(&d.g);
                Tensor pre = d.g.pre_projection.weight->value;
                fill(pre, 0.0f);
                for (int i = 0; i < 128; i++) ((float *)pre.data)[i * 256 + i] = 1;
                scale_copy(d.g.embed_tokens->value, SET, m.g.embed_tokens->value, 1.0f);
                scale_copy(d.g.norm.weight->value, SET, m.g.norm.weight->value, 1.0f);
            }
            options.drafter = &d;
            options.draft = 4;
            Answers *a = run_all(&m.g, p, &options);
            compare(p, alone, a, small_kinds[k]);
            EXPECT(a->counts.guessed > 0);
            bool plain = quiet && k != 2; /* experts still add */
            EXPECT(!plain || a->counts.passes < alone->counts.passes,
                   "%s: %d passes with, %d without", small_kinds[k], (int)a->counts.passes,
                   (int)alone->counts.passes);
            EXPECT(!plain || a->counts.right > a->counts.guessed / 4, "%d of %d guesses are right",
                   (int)a->counts.right, (int)a->counts.guessed);
            free(a), free(alone);
            drafter_close(&d);
            small_unload(&m);
            tree_remove(dir);
            tree_remove(small);
        }
}

/* Two adapters of a model, with different values. */
static void make_adapters(const char *dir, char *paths[2]) {
    Loaded m;
    small_load(&m, dir, F32, STACK_SCORE, small_adapt);
    for (int a = 0; a < 2; a++) {
        paths[a] = must_format("%s/adapter-%d", test_folder(), a);
        EXPECT_OK(peft_save(&m.g, &m.spec, paths[a]));
        for (int i = 0; i < m.g.params.count; i++) {
            Param *p = m.g.params.items[i];
            if (p->adapter) scale_copy(p->value, SET, p->value, -0.7f);
        }
    }
    small_unload(&m);
}

#define ASKED 12

/* Answers of the first prompts: by adapter `only`, or by all three in turn (base, first, second).
 */
static void ask_adapters(Model *m, const Prompts *p, int only, int32_t ids[3][ASKED][ANSWER],
                         float logprobs[3][ASKED][ANSWER]) {
    Engine e;
    Sequence *all[3][ASKED] = {0};
    EngineOptions options = {
        .sequences = 16, .tokens = 8192, .chunk = 64, .kv = F32, .share = true};
    EXPECT_OK(engine_init(&e, &m->g, NULL, &options));
    for (int i = 0; i < ASKED; i++)
        for (int a = 0; a < 3; a++) {
            Request r = {.ids = p->ids[i],
                         .count = p->count[i],
                         .adapter = only < 0 ? a : 0,
                         .sampling = {.top_p = 1, .repetition_penalty = 1, .max_tokens = ANSWER}};
            if (only < 0 || only == a) EXPECT_OK(engine_submit(&e, &all[a][i], &r));
        }
    while (engine_step(&e)) continue;
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < ASKED; i++) {
            if (!all[a][i]) continue;
            memcpy(ids[a][i], all[a][i]->ids + p->count[i], sizeof ids[a][i]);
            memcpy(logprobs[a][i], all[a][i]->logprobs + p->count[i], sizeof logprobs[a][i]);
            engine_drop(&e, all[a][i]);
        }
    engine_free(&e);
}

CASE(engine, several_adapters_at_once_answer_as_each_does_alone) {
    static int32_t alone[3][ASKED][ANSWER], together[3][ASKED][ANSWER];
    static float alone_logprobs[3][ASKED][ANSWER], together_logprobs[3][ASKED][ANSWER];
    Prompts *p = make_prompts();
    for (int k = 0; k < SMALL_KINDS; k++) {
        char *dir = small_make(small_kinds[k]), *paths[2], *bytes,
             *tokenizer = path_join(dir, "tokenizer.json");
        size_t size;
        Model m;
        EXPECT_OK(file_read(&bytes, &size, "demo/tokenizer/tokenizer.json", 1 << 24));
        EXPECT_OK(file_write(tokenizer, bytes, size));
        make_adapters(dir, paths);
        for (int a = 0; a < 3; a++) {
            EXPECT_OK(model_open(&m, dir, a ? paths[a - 1] : NULL, "cpu", "f32", WEIGHTS_LOADED,
                                 WITHOUT_MEDIA));
            ask_adapters(&m, p, a, alone, alone_logprobs);
            model_close(&m);
        }
        EXPECT_OK(model_open_several(&m, dir, (const char *const *)paths, 2, "cpu", "f32",
                                     WITHOUT_MEDIA));
        ask_adapters(&m, p, -1, together, together_logprobs);
        model_close(&m);
        int differ = 0;
        for (int a = 0; a < 3; a++)
            for (int i = 0; i < ASKED; i++) {
                EXPECT(!memcmp(alone[a][i], together[a][i], sizeof alone[a][i]),
                       "%s, adapter %d, prompt %d", small_kinds[k], a, i);
                for (int t = 0; t < ANSWER; t++)
                    EXPECT_CLOSE(alone_logprobs[a][i][t], together_logprobs[a][i][t], 2e-4);
                differ += a && memcmp(alone[a][i], alone[a - 1][i], sizeof alone[a][i]);
            }
        EXPECT(differ > ASKED, "%s: the adapters change only %d answers", small_kinds[k], differ);
        tree_remove(dir);
        for (int a = 0; a < 2; a++) tree_remove(paths[a]);
        free(bytes), free(tokenizer), free(paths[0]), free(paths[1]);
    }
}

CASE(engine, a_prompt_that_does_not_fit_is_refused_and_an_answer_ends_where_room_does) {
    Loaded m;
    Engine e;
    Sequence *s;
    int32_t ids[600] = {2};
    small_load(&m, small_make("shared"), F32, STACK_SCORE, NULL);
    EXPECT_OK(engine_init(
        &e, &m.g, NULL,
        &(EngineOptions){.sequences = 2, .tokens = 128, .chunk = 64, .kv = F32, .share = true}));
    Request r = {.ids = ids, .count = 600, .sampling = {.top_p = 1, .repetition_penalty = 1}};
    EXPECT_ERROR(engine_submit(&e, &s, &r), "512 (max_position_embeddings)");
    r.count = 500;
    EXPECT_ERROR(engine_submit(&e, &s, &r), "the cache holds 128");
    ids[7] = 5000;
    r.count = 20;
    EXPECT_ERROR(engine_submit(&e, &s, &r), "token 5000");
    ids[7] = 0;
    r.sampling.top_p = 2;
    EXPECT_ERROR(engine_submit(&e, &s, &r), "top_p is 2");
    r.sampling.top_p = 1;
    r.sampling.max_tokens = 1000;
    EXPECT_OK(engine_submit(&e, &s, &r));
    while (engine_step(&e)) continue;
    EXPECT(s->ending == ENDING_LENGTH && s->count == 128, "%d", (int)s->count);
    engine_drop(&e, s);
    EXPECT_OK(engine_submit(&e, &s, &r));
    engine_step(&e);
    s->cancelled = true;
    EXPECT(!engine_step(&e) && s->ending == ENDING_CANCELLED);
    engine_free(&e);
    small_unload(&m);
}

CASE(engine, the_best_tokens_come_ranked_with_their_log_probabilities) {
    Loaded m;
    Engine e;
    Sequence *s;
    int32_t ids[] = {2, 5, 9}, all[2048];
    for (int i = 0; i < 2048; i++) all[i] = i;
    small_load(&m, small_make("dense"), F32, STACK_SCORE, NULL);
    EXPECT_OK(engine_init(
        &e, &m.g, NULL,
        &(EngineOptions){.sequences = 1, .tokens = 64, .chunk = 64, .kv = F32, .share = true}));
    Request r = {
        .ids = ids,
        .count = 3,
        .candidates = all,
        .candidate_count = 2048,
        .top_logprobs = 5,
        .sampling = {.top_p = 1, .repetition_penalty = 1, .temperature = 1, .max_tokens = 2}};
    EXPECT_OK(engine_submit(&e, &s, &r));
    while (engine_step(&e)) continue;
    double sum = 0;
    for (int i = 0; i < 2048; i++) {
        int above = 0;
        for (int t = 0; t < 5; t++) above += s->tops[t].id == i;
        sum += exp(s->candidate_logprobs[i]);
        EXPECT(above || s->candidate_logprobs[i] <= s->tops[4].logprob);
        EXPECT(s->candidate_best[i] == (i == s->tops[0].id));
    }
    EXPECT_CLOSE(sum, 1.0, 1e-4);
    for (int t = 0; t < 5; t++)
        EXPECT_CLOSE(s->tops[t].logprob, s->candidate_logprobs[s->tops[t].id], 1e-5);
    EXPECT_CLOSE(s->logprobs[3], s->candidate_logprobs[s->ids[3]], 1e-5);
    engine_free(&e);
    small_unload(&m);
}

CASE(sampling, the_best_logits_equal_those_of_a_sort) {
    enum { N = 3, V = 20000, K = 40 };
    Tensor z = RANDOM_TENSOR(F32, 5, N, V);
    float values[N * K], lse[N * 2], scale[N] = {1, 2, 0.5f};
    int32_t ids[N * K];
    float *row = z.data;
    row[77] = row[19000] = 9; /* equals: the lower id first */
    row[5] = -INFINITY;
    for (int i = 0; i < V; i++) row[V + i] = i == 12345 ? 1 : -INFINITY;
    top_logits(TENSOR(values, F32, N, K), TENSOR(ids, I32, N, K), TENSOR(lse, F32, N, 2), z,
               TENSOR(scale, F32, N));
    EXPECT(ids[0] == 77 && ids[1] == 19000 && ids[K] == 12345);
    EXPECT_CLOSE(lse[2], 1, 1e-6);
    EXPECT_CLOSE(lse[3], 2, 1e-6);
    for (int n = 0; n < N; n += 2) {
        double sum[2] = {0, 0};
        int beyond = 0;
        for (int i = 0; i < V; i++) {
            sum[0] += exp(row[n * V + i]);
            sum[1] += exp(row[n * V + i] * scale[n]);
            beyond += row[n * V + i] > values[n * K + K - 1];
        }
        EXPECT(beyond == K - 1);
        for (int i = 0; i < K; i++) EXPECT(values[n * K + i] == row[n * V + ids[n * K + i]]);
        for (int i = 1; i < K; i++) EXPECT(values[n * K + i] <= values[n * K + i - 1]);
        EXPECT_CLOSE(lse[2 * n], log(sum[0]), 1e-5);
        EXPECT_CLOSE(lse[2 * n + 1], log(sum[1]), 1e-5);
    }
}

/* Shares of many draws against probabilities computed plainly: temperature, top-k, top-p of what
 * is left, min-p. */
CASE(sampling, draws_follow_the_distribution_that_the_settings_leave) {
    enum { V = 400, DRAWS = 20000 };
    static const Sampling settings[] = {
        {.temperature = 1, .top_p = 1},
        {.temperature = 0.7, .top_k = 5, .top_p = 1},
        {.temperature = 1.5, .top_k = 20, .top_p = 0.8},
        {.temperature = 1, .top_p = 0.99},
        {.temperature = 5, .top_p = 0.97}, /* more than the best few */
        {.temperature = 1, .top_p = 1, .min_p = 0.1},
        {.temperature = 9, .top_p = 1, .min_p = 0.01},
        {.temperature = 3, .top_k = 300, .top_p = 0.9, .min_p = 0.02},
    };
    Tensor z = RANDOM_TENSOR(F32, 3, V);
    float *logits = z.data;
    for (int i = 0; i < V; i++) logits[i] *= 2;
    for (size_t c = 0; c < sizeof settings / sizeof *settings; c++) {
        Sampling s = settings[c];
        double p[V], total = 0, kept = 0, sum = 0;
        int order[V], count = s.top_k ? (int)s.top_k : V, drawn[V] = {0}, n = 0;
        for (int i = 0; i < V; i++) {
            int rank = 0;
            for (int j = 0; j < V; j++) rank += logits[j] > logits[i];
            order[rank] = i;
        }
        for (int i = 0; i < count; i++) total += p[i] = exp(logits[order[i]] / s.temperature);
        while (n < count && (n == 0 || sum < s.top_p * total)) sum += p[n++];
        while (n > 1 && p[n - 1] < s.min_p * p[0]) n--;
        for (int i = 0; i < n; i++) kept += p[i];
        int64_t k = sampler_candidates(&s, V);
        float values[V], lse[2], scale = (float)(1 / s.temperature);
        int32_t ids[V];
        top_logits(TENSOR(values, F32, 1, k), TENSOR(ids, I32, 1, k), TENSOR(lse, F32, 1, 2),
                   RESHAPE(z, 1, V), TENSOR(&scale, F32, 1));
        Candidates candidates = {TENSOR(logits, F32, 1, V), NULL, values, ids, k, lse[1]};
        for (int i = 0; i < DRAWS; i++) drawn[sampler_pick(&s, &candidates, i)]++;
        for (int i = 0; i < V; i++) {
            double share = i < n ? p[i] / kept : 0, noise = sqrt(share * (1 - share) / DRAWS);
            EXPECT(fabs((double)drawn[order[i]] / DRAWS - share) <= 5 * noise,
                   "setting %d, rank %d of %d: %g, expected %g", (int)c, i, n,
                   (double)drawn[order[i]] / DRAWS, share);
        }
    }
}

CASE(sampling, penalties_and_suppressed_tokens_change_the_logits) {
    Sampling s = {.repetition_penalty = 2, .suppressed = {3, 99}, .suppress_count = 2};
    float z[] = {1, -1, 4, 9, 2};
    int32_t ids[] = {1, 2, 2, 2};
    sampler_edit(&s, z, 5, ids, 4);
    EXPECT(z[0] == 1 && z[1] == -2 && z[2] == 2 && z[3] == -INFINITY && z[4] == 2);
}

/* The same engine on the GPU, or the emulator that stands in for one. */
CASE(gpu, an_engine_answers_as_on_the_cpu) {
    Device *gpu;
    if (device_open(&gpu, "cuda") != OK) SKIP("%s", status_message());
    Prompts *p = make_prompts();
    EngineOptions options = {
        .sequences = 4, .tokens = 2048, .chunk = 128, .kv = F32, .share = true};
    p->number = 3;
    for (int k = 0; k < SMALL_KINDS; k++) {
        Loaded m;
        char *dir = small_make(small_kinds[k]);
        small_load(&m, dir, F32, STACK_SCORE, NULL);
        Answers *here = run_all(&m.g, p, &options);
        small_unload(&m);
        small_device = gpu;
        small_load(&m, dir, F32, STACK_SCORE, NULL);
        small_device = NULL;
        Answers *there = run_all(&m.g, p, &options);
        compare(p, here, there, small_kinds[k]);
        small_unload(&m);
        free(here);
        free(there);
        free(dir);
    }
    free(p);
}
