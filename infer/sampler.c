/* sampler.c - from a row of logits to a token. */
#include "infer/sampler.h"
#include "data/json.h"
#include "formats/companion.h"
#include "kernels/random.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void add_id(int32_t *list, int *count, int64_t id) {
    for (int i = 0; i < *count; i++)
        if (list[i] == id) return;
    if (*count < STOPS_MAX) list[(*count)++] = (int32_t)id;
}

static void add_ids(int32_t *list, int *count, const json_t *value) {
    size_t i;
    json_t *item;
    if (json_is_integer(value)) add_id(list, count, json_integer_value(value));
    json_array_foreach(value, i, item) if (json_is_integer(item))
        add_id(list, count, json_integer_value(item));
}

Status sampling_load(Sampling *s, const char *dir, const ModelConfig *config) {
    *s = (Sampling){.top_p = 1, .repetition_penalty = 1, .seed = 42, .max_tokens = 1024};
    for (int i = 0; i < config->eos_count; i++)
        add_id(s->stops, &s->stop_count, config->eos_token_id[i]);
    char *path = companion_path(dir, "generation_config.json"), *bytes = NULL;
    size_t size;
    json_t *root = NULL;
    Status status = OK;
    TRY_DONE(companion_find(&bytes, &size, dir, "generation_config.json"));
    if (!bytes) goto done;
    TRY_DONE(json_read(&root, bytes, size, path));
    add_ids(s->stops, &s->stop_count, json_object_get(root, "eos_token_id"));
    add_ids(s->suppressed, &s->suppress_count, json_object_get(root, "suppress_tokens"));
    if (json_is_true(json_object_get(root, "do_sample"))) {
        json_t *temperature = json_object_get(root, "temperature"),
               *top_p = json_object_get(root, "top_p"), *min_p = json_object_get(root, "min_p");
        s->temperature = json_is_number(temperature) ? json_number_value(temperature) : 1;
        s->top_p = json_is_number(top_p) ? json_number_value(top_p) : 1;
        s->min_p = json_is_number(min_p) ? json_number_value(min_p) : 0;
        s->top_k = json_integer_value(json_object_get(root, "top_k"));
    }
    json_t *penalty = json_object_get(root, "repetition_penalty");
    if (json_is_number(penalty)) s->repetition_penalty = json_number_value(penalty);
done:
    json_decref(root);
    free(bytes);
    free(path);
    return status;
}

Status sampling_check(const Sampling *s) {
    if (!(s->temperature >= 0 && s->temperature <= 100))
        FAIL(ERR_USAGE, "temperature is %g, expected 0 to 100", s->temperature);
    if (!(s->top_p > 0 && s->top_p <= 1))
        FAIL(ERR_USAGE, "top_p is %g, expected more than 0 and up to 1", s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        FAIL(ERR_USAGE, "min_p is %g, expected 0 to 1", s->min_p);
    if (s->top_k < 0) FAIL(ERR_USAGE, "top_k is %" PRId64 ", expected 0 or more", s->top_k);
    if (!(s->repetition_penalty > 0 && s->repetition_penalty <= 100))
        FAIL(ERR_USAGE, "repetition_penalty is %g, expected more than 0", s->repetition_penalty);
    if (s->max_tokens < 0)
        FAIL(ERR_USAGE, "max_tokens is %" PRId64 ", expected 0 or more", s->max_tokens);
    return OK;
}

bool sampling_stops(const Sampling *s, int32_t id) {
    for (int i = 0; i < s->stop_count; i++)
        if (s->stops[i] == id) return true;
    return false;
}

int64_t sampler_candidates(const Sampling *s, int64_t vocab) {
    int64_t most = s->temperature <= 0                         ? 1
                   : s->top_k > 0 && s->top_k < CANDIDATES_MAX ? s->top_k
                                                               : CANDIDATES_MAX;
    return most < vocab ? most : vocab;
}

bool sampler_edits(const Sampling *s) {
    return s->suppress_count || s->repetition_penalty != 1;
}

void sampler_edit(const Sampling *s, float *logits, int64_t vocab, const int32_t *ids,
                  int64_t count) {
    if (s->repetition_penalty != 1) {
        uint8_t *seen = must_calloc((size_t)vocab, 1);
        for (int64_t i = 0; i < count; i++) {
            float *z = &logits[ids[i]];
            if (seen[ids[i]]++) continue;
            *z = (float)(*z > 0 ? *z / s->repetition_penalty : *z * s->repetition_penalty);
        }
        free(seen);
    }
    for (int i = 0; i < s->suppress_count; i++)
        if (s->suppressed[i] >= 0 && s->suppressed[i] < vocab) logits[s->suppressed[i]] = -INFINITY;
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

/* How many of ranked choices may come: top-k, then the fewest whose probabilities reach top_p of
 * what is left, then those near enough to the best. *total: their weights, relative to the best. -1
 * when `count` choices are not enough to tell. */
static int64_t cut(const Sampling *s, const float *values, int64_t count, bool all, double rest,
                   double *total) {
    bool whole = all;
    int64_t n = count;
    double sum = 0, best = values[0];
    if (s->top_k > 0 && s->top_k <= count) n = s->top_k, whole = true;
    if (s->top_k > count && !all) return -1;
    *total = 0;
    for (int64_t i = 0; i < n; i++) *total += exp((values[i] - best) / s->temperature);
    if (s->top_p < 1) {
        double goal = s->top_p * (whole ? *total : rest);
        int64_t kept = 0;
        while (kept < n && sum < goal) sum += exp((values[kept++] - best) / s->temperature);
        if (sum < goal && !whole) return -1;
        n = kept > 0 ? kept : 1;
        *total = kept > 0 ? sum : 1;
        whole = true;
    }
    if (s->min_p > 0) {
        double least = best + s->temperature * log(s->min_p);
        int64_t kept = n;
        while (kept > 1 && values[kept - 1] < least) kept--;
        if (kept == n && !whole) return -1;
        for (; n > kept; n--) *total -= exp((values[n - 1] - best) / s->temperature);
        whole = true;
    }
    return whole ? n : -1;
}

static int64_t draw(const Sampling *s, const float *values, int64_t count, double total,
                    int64_t index) {
    double target = random_uniform_double(random_key(s->seed, 0x5a), (uint64_t)index) * total;
    double sum = 0;
    int64_t pick = 0;
    for (; pick < count - 1; pick++) {
        sum += exp(((double)values[pick] - values[0]) / s->temperature);
        if (target < sum) break;
    }
    return pick;
}

/* All tokens ranked, for the few settings that the best ones do not settle. */
static int32_t pick_of_all(const Sampling *s, const Candidates *c, int64_t index) {
    int64_t V = tensor_count(c->logits);
    const float *logits = tensor_host(c->logits, c->buffer);
    Choice *choices = must_malloc((size_t)V * sizeof *choices);
    float *values = must_malloc((size_t)V * sizeof *values);
    double total;
    for (int64_t i = 0; i < V; i++) choices[i] = (Choice){logits[i], (int32_t)i};
    qsort(choices, (size_t)V, sizeof *choices, by_logit);
    for (int64_t i = 0; i < V; i++) values[i] = choices[i].logit;
    int64_t n = cut(s, values, V, true, 0, &total);
    int32_t id = choices[draw(s, values, n, total, index)].id;
    free(values);
    free(choices);
    return id;
}

/* No token is left out: they follow each other by id. */
static int32_t pick_of_any(const Sampling *s, const Candidates *c, int64_t index) {
    double target = random_uniform_double(random_key(s->seed, 0x5a), (uint64_t)index), sum = 0;
    const float *logits = tensor_host(c->logits, c->buffer);
    int64_t pick = 0, V = tensor_count(c->logits);
    for (; pick < V - 1; pick++) {
        sum += exp(logits[pick] / s->temperature - c->lse);
        if (target < sum) break;
    }
    return (int32_t)pick;
}

int32_t sampler_pick(const Sampling *s, const Candidates *c, int64_t index) {
    double total, rest;
    if (s->temperature <= 0) return c->ids[0];
    if (s->top_k <= 0 && s->top_p >= 1 && s->min_p <= 0) return pick_of_any(s, c, index);
    rest = exp((double)c->lse - c->values[0] / s->temperature);
    int64_t n = cut(s, c->values, c->count, c->count == tensor_count(c->logits), rest, &total);
    return n < 0 ? pick_of_all(s, c, index) : c->ids[draw(s, c->values, n, total, index)];
}
