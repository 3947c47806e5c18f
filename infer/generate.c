/* generate.c - sampling as transformers orders it: temperature, top-k, top-p. */
#include "infer/generate.h"
#include "data/json.h"
#include "formats/companion.h"
#include "kernels/random.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PREFILL_CHUNK 512

static void add_id(int32_t *list, int *count, int64_t id) {
    for (int i = 0; i < *count; i++)
        if (list[i] == id) return;
    if (*count < 32) list[(*count)++] = (int32_t)id;
}

static void add_ids(int32_t *list, int *count, const json_t *value) {
    size_t i;
    json_t *item;
    if (json_is_integer(value)) add_id(list, count, json_integer_value(value));
    json_array_foreach(value, i, item) if (json_is_integer(item))
        add_id(list, count, json_integer_value(item));
}

Status sampling_load(Sampling *s, const Model *m) {
    *s = (Sampling){.top_p = 1, .seed = 42, .max_tokens = 1024};
    for (int i = 0; i < m->checkpoint.config.eos_count; i++)
        add_id(s->stops, &s->stop_count, m->checkpoint.config.eos_token_id[i]);
    char *path = companion_path(m->dir, "generation_config.json"), *bytes = NULL;
    size_t size;
    json_t *root = NULL;
    Status status = OK;
    TRY_DONE(companion_find(&bytes, &size, m->dir, "generation_config.json"));
    if (!bytes) goto done;
    TRY_DONE(json_read(&root, bytes, size, path));
    add_ids(s->stops, &s->stop_count, json_object_get(root, "eos_token_id"));
    add_ids(s->suppressed, &s->suppress_count, json_object_get(root, "suppress_tokens"));
    if (json_is_true(json_object_get(root, "do_sample"))) {
        json_t *temperature = json_object_get(root, "temperature"),
               *top_p = json_object_get(root, "top_p");
        s->temperature = json_is_number(temperature) ? json_number_value(temperature) : 1;
        s->top_p = json_is_number(top_p) ? json_number_value(top_p) : 1;
        s->top_k = json_integer_value(json_object_get(root, "top_k"));
    }
done:
    json_decref(root);
    free(bytes);
    free(path);
    return status;
}

typedef struct Choice {
    float logit;
    int32_t id;
} Choice;

/* Larger logits first, then lower ids. */
static int by_logit(const void *a, const void *b) {
    const Choice *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

int32_t sample_token(const Sampling *s, float *logits, int64_t vocab, int64_t index) {
    int64_t best = 0;
    for (int i = 0; i < s->suppress_count; i++)
        if (s->suppressed[i] >= 0 && s->suppressed[i] < vocab) logits[s->suppressed[i]] = -INFINITY;
    for (int64_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    if (s->temperature <= 0) return (int32_t)best;
    Choice *choices = must_malloc((size_t)vocab * sizeof *choices);
    int64_t count = vocab;
    for (int64_t i = 0; i < vocab; i++)
        choices[i] = (Choice){logits[i] / (float)s->temperature, (int32_t)i};
    qsort(choices, (size_t)vocab, sizeof *choices, by_logit);
    if (s->top_k > 0 && s->top_k < count) count = s->top_k;
    double total = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) total += exp((double)choices[i].logit - choices[0].logit);
    if (s->top_p < 1) { /* the fewest whose probabilities reach top_p */
        int64_t last = 0;
        while (last < count && sum < s->top_p * total)
            sum += exp((double)choices[last++].logit - choices[0].logit);
        count = last > 0 ? last : 1;
        total = sum > 0 ? sum : 1;
    }
    double target = random_uniform_double(random_key(s->seed, 0x5a), (uint64_t)index) * total;
    int64_t pick = 0;
    sum = 0;
    for (; pick < count - 1; pick++) {
        sum += exp((double)choices[pick].logit - choices[0].logit);
        if (target < sum) break;
    }
    int32_t id = choices[pick].id;
    free(choices);
    return id;
}

Status generate(Model *m, const Tokens *prompt, const Sampling *s, Tokens *out, TokenFunction *show,
                void *context) {
    Decoder d;
    int64_t vocab = m->g.config.vocab_size, most = m->g.config.max_position_embeddings;
    if (prompt->count + 1 > most)
        FAIL(ERR_CONFIG, "the prompt has %" PRId64 " tokens, the model takes %" PRId64,
             prompt->count, most);
    int64_t room = prompt->count + s->max_tokens < most ? prompt->count + s->max_tokens : most;
    DType kv;
    TRY(kv_dtype(&kv, &m->g, s->kv));
    TRY(decoder_init(&d, &m->g, room, PREFILL_CHUNK, kv));
    float *logits = must_malloc((size_t)vocab * sizeof *logits);
    decoder_feed(&d, prompt->ids, prompt->count, logits);
    for (int64_t i = 0; i < s->max_tokens; i++) {
        int32_t id = sample_token(s, logits, vocab, i);
        bool stop = false;
        tokens_add(out, id);
        for (int k = 0; k < s->stop_count; k++) stop |= s->stops[k] == id;
        if (show && !stop) show(context, id);
        if (stop || d.length[FULL] == d.capacity[FULL] || i + 1 == s->max_tokens) break;
        decoder_feed(&d, &id, 1, logits);
    }
    free(logits);
    decoder_free(&d);
    return OK;
}
