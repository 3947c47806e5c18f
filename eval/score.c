/* score.c - from answers to figures and samples, one suite after the other. */
#include "eval/judge.h"
#include "eval/questions.h"
#include "eval/rules.h"
#include "eval/template.h"
#include "formats/file.h"
#include "formats/sha256.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes ? t->bytes : "", t->size};
}

static void add_metric(TaskResult *t, const char *metric, const char *filter, int64_t doc,
                       double value) {
    result_value(t, metric, filter, FIGURE_MEAN, doc, value, 1);
}

static Status score_choices(const Run *r, const Item *item, TaskResult *t, json_t *sample) {
    const Task *task = item_task(r, item);
    int64_t n = item->jobs, gold;
    double lls[n];
    Text texts[n];
    Slice slices[n];
    PromptOptions bare = {.chat = true}; /* without the delimiter */
    TRY(prompt_gold(&gold, task, item->row));
    for (int64_t i = 0; i < n; i++) {
        lls[i] = json_number_value(json_array_get(json_array_get(item->answers, (size_t)i), 0));
        texts[i] = (Text){0};
        TRY(prompt_choice(&texts[i], task, &bare, item->row, i));
        slices[i] = slice_text(&texts[i]);
    }
    Choosing c = choose(lls, slices, n);
    for (int64_t i = 0; i < n; i++) text_free(&texts[i]);
    json_t *names = json_array();
    for (int i = 0; i < task->metrics.count; i++) {
        const char *metric = task->metrics.items[i];
        int64_t chosen = !strcmp(metric, "acc_norm")    ? c.by_characters
                         : !strcmp(metric, "acc_bytes") ? c.by_bytes
                                                        : c.by_sum;
        add_metric(t, metric, "none", item->doc, chosen == gold);
        json_array_append_new(names, json_string(metric));
        json_object_set_new(sample, metric, json_real(chosen == gold));
    }
    json_t *resps = json_array(), *one;
    size_t i;
    json_array_foreach(item->answers, i, one) json_array_append_new(resps, json_pack("[O]", one));
    json_object_set_new(sample, "target", json_integer(gold));
    json_object_set_new(sample, "resps", resps);
    json_object_set(sample, "filtered_resps", item->answers);
    json_object_set_new(sample, "filter", json_string("none"));
    json_object_set_new(sample, "metrics", names);
    return OK;
}

static Status score_rolling(const Run *r, const Item *item, TaskResult *t, json_t *sample) {
    const Task *task = item_task(r, item);
    double sum = 0;
    Slice text = slice_text(&item->prompt);
    json_t *names = json_array();
    for (int64_t i = 0; i < item->jobs; i++)
        sum += json_number_value(json_array_get(json_array_get(item->answers, (size_t)i), 0));
    for (int i = 0; i < task->metrics.count; i++) {
        const char *metric = task->metrics.items[i];
        bool words = !strcmp(metric, "word_perplexity"), bits = !strcmp(metric, "bits_per_byte");
        double weight = words ? (double)count_words(text) : (double)text.size;
        result_value(t, metric, "none", bits ? FIGURE_BITS : FIGURE_PERPLEXITY, item->doc, sum,
                     weight);
        json_array_append_new(names, json_string(metric));
        json_object_set_new(sample, metric, json_pack("[f, f]", sum, weight));
    }
    json_object_set_new(sample, "resps", json_pack("[[f]]", sum));
    json_object_set_new(sample, "filtered_resps", json_pack("[f]", sum));
    json_object_set_new(sample, "filter", json_string("none"));
    json_object_set_new(sample, "metrics", names);
    return OK;
}

/* What the answers of one document are under one filter. */
typedef struct Answers {
    int64_t count; /* verdicts: one a sample, or one of all where they are voted on */
    bool voting;
    Verdict *verdicts; /* (count) */
    double *scores;    /* (count) */
    json_t *texts, *kept;
} Answers;

/* An option is drawn where nothing was found in the answer. */
static Status draw_option(const Run *r, const Item *item, int64_t sample, Verdict *v) {
    const Task *task = item_task(r, item);
    Mersenne m;
    Text gold = {0};
    mersenne_seed(&m, 12345 + (uint64_t)(item->doc * 4096 + sample));
    TRY(template_render(&gold, task->answer ? task->answer : "{answer}", task, item->row, NULL));
    json_decref(v->score);
    v->score = json_real(*gold.bytes == 'A' + (char)mersenne_below(&m, 10));
    text_free(&gold);
    return OK;
}

static Status judge_answers(const Run *r, const Item *item, const FilterChain *chain, Answers *a) {
    const Task *task = item_task(r, item);
    for (int i = 0; i < chain->count; i++) a->voting |= chain->filters[i].kind == FILTER_MAJORITY;
    a->texts = json_array();
    a->kept = json_array();
    for (int64_t i = 0; i < item->jobs; i++)
        json_array_append(a->texts,
                          json_object_get(json_array_get(item->answers, (size_t)i), "text"));
    a->count = a->voting ? 1 : item->jobs;
    a->verdicts = must_calloc((size_t)a->count, sizeof *a->verdicts);
    a->scores = must_calloc((size_t)a->count, sizeof *a->scores);
    for (int64_t i = 0; i < a->count; i++) {
        Verdict *v = &a->verdicts[i];
        TRY(rule_score(v, task, chain, item->row,
                       a->voting ? a->texts : json_array_get(a->texts, (size_t)i)));
        if (json_is_string(v->score)) TRY(draw_option(r, item, i, v));
        if (task->scorer == SCORER_PYTHON) TRY(judge_program(v, task, item->row));
        json_array_append(a->kept, v->extracted);
        a->scores[i] = json_number_value(v->score);
    }
    return OK;
}

/* The score of the extracted answer that most samples agree on; 0 where none was parsed. */
static double voted_score(const Answers *a) {
    Slice *extracted = must_malloc((size_t)a->count * sizeof *extracted);
    int64_t votes = 0;
    double won = 0;
    for (int64_t i = 0; i < a->count; i++)
        if (a->verdicts[i].parsed && json_is_string(a->verdicts[i].extracted))
            extracted[votes++] = json_slice(a->verdicts[i].extracted);
    if (votes) {
        Slice winner = extracted[majority_vote(extracted, votes)];
        for (int64_t i = a->count; i-- > 0;) {
            Slice mine = json_slice(a->verdicts[i].extracted);
            if (mine.size == winner.size && !memcmp(mine.bytes, winner.bytes, mine.size))
                won = a->scores[i];
        }
    }
    free(extracted);
    return won;
}

/* Several figures of the first answer, each a truth or a list of them. */
static void add_figures(const Item *item, const FilterChain *chain, const json_t *figures,
                        TaskResult *t, json_t *sample, json_t *names) {
    const char *name;
    json_t *value, *one;
    size_t k;
    json_object_foreach((json_t *)figures, name, value) {
        json_array_foreach(value, k, one) {
            result_value(t, name, chain->name, FIGURE_FLAT, item->doc, json_is_true(one), 1);
        }
        if (!json_is_array(value)) add_metric(t, name, chain->name, item->doc, json_is_true(value));
        json_object_set(sample, name, value);
        json_array_append_new(names, json_string(name));
    }
}

static void add_named(const Item *item, const FilterChain *chain, TaskResult *t, json_t *sample,
                      json_t *names, const char *name, double value) {
    add_metric(t, name, chain->name, item->doc, value);
    json_object_set_new(sample, name, json_real(value));
    json_array_append_new(names, json_string(name));
}

/* avg@n, maj@n and pass@n of n samples. */
static void add_sampled(const Item *item, const FilterChain *chain, const Answers *a, TaskResult *t,
                        json_t *sample, json_t *names) {
    char name[32];
    int64_t right = 0;
    double sum = 0;
    snprintf(name, sizeof name, "avg@%" PRId64, a->count);
    for (int64_t i = 0; i < a->count; i++) {
        add_metric(t, name, chain->name, item->doc, a->scores[i]);
        right += a->scores[i] > 0;
        sum += a->scores[i];
    }
    json_object_set_new(sample, name, json_real(sum / (double)a->count));
    json_array_append_new(names, json_string(name));
    snprintf(name, sizeof name, "maj@%" PRId64, a->count);
    add_named(item, chain, t, sample, names, name, voted_score(a));
    snprintf(name, sizeof name, "pass@%" PRId64, a->count);
    add_named(item, chain, t, sample, names, name, pass_at_k(a->count, right, a->count));
}

static void count_endings(const Item *item, const Answers *a, TaskResult *t) {
    for (int64_t i = 0; i < item->jobs; i++) {
        const json_t *answer = json_array_get(item->answers, (size_t)i);
        t->responses++;
        t->unparsed += i < a->count && !a->verdicts[i].parsed;
        t->truncated += json_is_true(json_object_get(answer, "truncated"));
        t->unclosed += json_is_true(json_object_get(answer, "unclosed"));
    }
}

/* Answers of one document under one filter. */
static Status score_answers(const Run *r, const Item *item, const FilterChain *chain, TaskResult *t,
                            json_t *sample) {
    const Task *task = item_task(r, item);
    Answers a = {0};
    json_t *names = json_array();
    Status status = judge_answers(r, item, chain, &a);
    if (status != OK) goto done;
    const json_t *verified = json_object_get(a.verdicts[0].more, "math_verify");
    if (json_is_object(a.verdicts[0].score)) {
        add_figures(item, chain, a.verdicts[0].score, t, sample, names);
    } else if (rule_is_rate(task)) {
        const json_t *more = a.verdicts[0].more;
        result_value(t, rule_metric(task), chain->name, FIGURE_RATE, item->doc,
                     json_number_value(json_object_get(more, "errors")),
                     json_number_value(json_object_get(more, "words")));
        json_object_set_new(sample, rule_metric(task), json_real(a.scores[0]));
        json_array_append_new(names, json_string(rule_metric(task)));
    } else if (a.count == 1) {
        add_named(item, chain, t, sample, names, rule_metric(task), a.scores[0]);
    } else {
        json_object_set_new(sample, rule_metric(task), json_real(a.scores[0]));
        add_sampled(item, chain, &a, t, sample, names);
    }
    if (verified)
        add_named(item, chain, t, sample, names, "math_verify", json_number_value(verified));
    if (chain == &task->chains[0]) count_endings(item, &a, t);
    json_object_set_new(sample, "resps", json_pack("[O]", a.texts));
    json_object_set(sample, "filtered_resps", a.kept);
    json_object_set_new(sample, "filter", json_string(chain->name));
    json_object_set(sample, "metrics", names);
done:
    for (int64_t i = 0; i < a.count && a.verdicts; i++) verdict_free(&a.verdicts[i]);
    free(a.verdicts);
    free(a.scores);
    json_decref(a.texts);
    json_decref(a.kept);
    json_decref(names);
    return status;
}

static void set_hash(json_t *sample, const char *key, Slice text) {
    char hash[65];
    sha256_text(hash, text.bytes, text.size);
    json_object_set_new(sample, key, json_string(hash));
}

static bool has_target(const Task *t) {
    return t->output == OUTPUT_TEXT && t->scorer != SCORER_IFEVAL && t->scorer != SCORER_BFCL;
}

static Status render_target(Text *out, const Task *t, const json_t *row) {
    const char *text = t->scorer == SCORER_PYTHON ? t->tests : t->answer;
    return template_render(out, text ? text : "{answer}", t, row, NULL);
}

Status score_check(const Task *t, const json_t *row) {
    Text target = {0};
    int64_t gold, choices = prompt_choice_count(row);
    Status status = has_target(t) ? render_target(&target, t, row) : OK;
    text_free(&target);
    if (status != OK || t->output != OUTPUT_CHOICES) return status;
    if (choices < 1) FAIL(ERR_FORMAT, "there are no choices");
    TRY(prompt_gold(&gold, t, row));
    if (gold < 0 || gold >= choices)
        FAIL(ERR_FORMAT, "the answer is none of the %" PRId64 " choices", choices);
    return OK;
}

/* What every line of a samples file has. */
static Status sample_head(json_t **out, const Run *r, const Item *item) {
    const Task *t = item_task(r, item);
    json_t *sample = json_pack("{s:I, s:O}", "doc_id", (json_int_t)item->doc, "doc", item->row),
           *arguments = json_object();
    Text target = {0};
    char *doc = json_dumps(item->row, JSON_INDENT(2));
    Status status = OK;
    int64_t requests = t->output == OUTPUT_CHOICES ? item->jobs : 1;
    if (has_target(t)) {
        status = render_target(&target, t, item->row);
        json_object_set_new(sample, "target",
                            json_stringn(target.bytes ? target.bytes : "", target.size));
    }
    for (int64_t i = 0; i < requests && status == OK; i++) {
        char *key = must_format("gen_args_%" PRId64, i);
        Text choice = {0};
        json_t *pair = json_object();
        json_object_set_new(pair, "arg_0", json_stringn(item->prompt.bytes, item->prompt.size));
        if (t->output == OUTPUT_CHOICES) {
            status = prompt_choice(&choice, t, &r->o->prompt, item->row, i);
            json_object_set_new(pair, "arg_1", json_stringn(choice.bytes, choice.size));
        }
        json_object_set_new(arguments, key, pair);
        text_free(&choice);
        free(key);
    }
    json_object_set_new(sample, "arguments", arguments);
    set_hash(sample, "doc_hash", slice_of(doc));
    json_object_set_new(sample, "prompt_hash", json_string(item->prompt_hash));
    set_hash(sample, "target_hash", slice_text(&target));
    free(doc);
    text_free(&target);
    *out = sample;
    return status;
}

static Status write_line(FileWriter *w, const json_t *row) {
    char *line = json_dumps(row, JSON_COMPACT | JSON_REAL_PRECISION(17));
    Status status = w ? file_writer_write(w, line, strlen(line)) : OK;
    if (status == OK && w) status = file_writer_write(w, "\n", 1);
    free(line);
    return status;
}

Status score_suite(Run *r, Results *results, int suite) {
    const RunSuite *s = &r->suites[suite];
    const Task *task = s->task;
    FileWriter writer = {0}, *w = r->o->out ? &writer : NULL;
    Status status = OK;
    TaskResult *t = results_add(results, s->suite->name);
    free(t->alias);
    t->alias = must_strdup(s->suite->alias);
    t->group = s->suite->group ? must_strdup(s->suite->group) : NULL;
    t->version = task->version;
    t->shots = r->o->prompt.shots >= 0 && task->shots > 0 ? r->o->prompt.shots : task->shots;
    t->original = s->original;
    t->samples = task->output == OUTPUT_TEXT ? run_samples(r, task) : 1;
    t->generates = task->output == OUTPUT_TEXT;
    char *path = r->o->out ? must_format("%s/samples_%s.jsonl", r->o->out, s->suite->name) : NULL;
    if (w) TRY_DONE(file_writer_open(w, path));
    int chains = task->output == OUTPUT_TEXT ? task->chain_count : 1;
    if (!chains)
        FAIL_DONE(ERR_CONFIG, "task '%s' has no filters: it says nothing of its answers",
                  task->name);
    for (int c = 0; c < chains; c++)
        for (int64_t i = 0; i < r->item_count; i++) {
            const Item *item = &r->items[i];
            json_t *sample = NULL;
            if (item->suite != suite) continue;
            t->effective += c == 0;
            status = sample_head(&sample, r, item);
            if (status == OK)
                status = task->output == OUTPUT_CHOICES ? score_choices(r, item, t, sample)
                         : task->output == OUTPUT_ROLLING
                             ? score_rolling(r, item, t, sample)
                             : score_answers(r, item, &task->chains[c], t, sample);
            if (status == OK) status = write_line(w, sample);
            json_decref(sample);
            TRY_DONE(status);
        }
    if (w) TRY_DONE(file_writer_commit(w));
done:
    if (w) file_writer_abandon(w);
    free(path);
    return status;
}
