/* run.c - questions to requests, answers to figures, everything kept on the way. */
#include "eval/run.h"
#include "eval/rules.h"
#include "eval/template.h"
#include "formats/companion.h"
#include "formats/file.h"
#include "formats/sha256.h"
#include "kernels/random.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define THOUGHT_BEGIN "<|channel>"
#define THOUGHT_END   "<channel|>"
#define CHUNK         512

/* A document as it is asked. */
typedef struct Item {
    int suite;         /* of the run's list */
    int64_t doc;       /* its place in the suite */
    const json_t *row; /* the document */
    Text prompt;
    char prompt_hash[65];
    json_t *answers; /* (jobs) what came back of each job; null: nothing yet */
    int64_t jobs;    /* answers, choices or windows that are wanted */
    bool together;   /* one job gives all choices: they differ in one token after the same ones */
} Item;

typedef struct RunSuite {
    const Task *task;
    const Suite *suite;
    int64_t original;
} RunSuite;

typedef struct Run {
    Model *m;
    const EvalOptions *o;
    Task *tasks;
    Documents *documents;
    int task_count;
    RunSuite *suites;
    int suite_count;
    Item *items;
    int64_t item_count, item_capacity;
    Sampling sampling; /* the model's own */
    int32_t bos, thought_begin, thought_end;
    FILE *log;
    int64_t answered, total;
    double began, shown;
    EngineCounts counts;
} Run;

EvalOptions eval_options_default(void) {
    return (EvalOptions){.prompt = {.shots = -1, .seed = 1234},
                         .temperature = NAN,
                         .top_p = NAN,
                         .min_p = NAN,
                         .top_k = -1,
                         .seed = 42,
                         .batch = 16,
                         .bootstrap = 100000};
}

bool eval_needs_chat(const EvalOptions *o) {
    bool chat = o->prompt.chat;
    for (const char *at = o->tasks; *at && !chat;) {
        size_t n = strcspn(at, ",");
        char *name = must_format("%.*s", (int)n, at);
        Task task;
        if (task_find(&task, name) == OK) {
            chat = task.chat;
            task_free(&task);
        }
        free(name);
        at += n + (at[n] == ',');
    }
    return chat;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static Slice slice_text(const Text *t) {
    return (Slice){t->bytes ? t->bytes : "", t->size};
}

/* ---- what is asked ---- */

static Status load_tasks(Run *r) {
    const char *at = r->o->tasks;
    while (*at) {
        size_t n = strcspn(at, ",");
        char *name = must_format("%.*s", (int)n, at);
        r->tasks = must_realloc(r->tasks, (size_t)(r->task_count + 1) * sizeof *r->tasks);
        r->documents =
            must_realloc(r->documents, (size_t)(r->task_count + 1) * sizeof *r->documents);
        r->documents[r->task_count] = (Documents){0};
        Status status = task_find(&r->tasks[r->task_count], name);
        free(name);
        if (status != OK) return status;
        r->task_count++;
        at += n + (at[n] == ',');
    }
    if (!r->task_count) FAIL(ERR_USAGE, "--tasks names no task");
    for (int i = 0; i < r->task_count; i++)
        TRY(documents_load(&r->documents[i], &r->tasks[i], r->o->data));
    return OK;
}

static int64_t limited(const Run *r, int64_t count) {
    double limit = r->o->limit;
    int64_t most = limit <= 0  ? count
                   : limit < 1 ? (int64_t)ceil(limit * (double)count)
                               : (int64_t)limit;
    return most < count ? most : count;
}

static int64_t samples_of(const Run *r, const Task *t) {
    return r->o->samples ? r->o->samples : t->samples;
}

static Status add_item(Run *r, int suite, int64_t doc, Shots *shots) {
    const RunSuite *s = &r->suites[suite];
    int64_t picked[shots->count + 1];
    if (r->item_count == r->item_capacity) {
        r->item_capacity = r->item_capacity ? 2 * r->item_capacity : 256;
        r->items = must_realloc(r->items, (size_t)r->item_capacity * sizeof *r->items);
    }
    Item *item = &r->items[r->item_count];
    *item = (Item){.suite = suite, .doc = doc};
    item->row = json_array_get(s->suite->docs, (size_t)doc);
    shots_next(shots, picked);
    r->item_count++;
    item->answers = json_array();
    TRY(prompt_render(&item->prompt, s->task, &r->o->prompt, s->suite, item->row, picked,
                      shots->count));
    sha256_text(item->prompt_hash, item->prompt.bytes, item->prompt.size);
    return OK;
}

static Status list_items(Run *r) {
    for (int i = 0; i < r->task_count; i++)
        for (int k = 0; k < r->documents[i].count; k++) {
            const Task *task = &r->tasks[i];
            const Suite *suite = &r->documents[i].suites[k];
            int64_t count = (int64_t)json_array_size(suite->docs);
            Shots shots;
            if (!count) FAIL(ERR_FORMAT, "task '%s' has no questions", suite->name);
            r->suites = must_realloc(r->suites, (size_t)(r->suite_count + 1) * sizeof *r->suites);
            r->suites[r->suite_count++] = (RunSuite){task, suite, count};
            TRY(shots_init(&shots, task, suite, &r->o->prompt));
            for (int64_t doc = 0; doc < limited(r, count); doc++) {
                Status status = add_item(r, r->suite_count - 1, doc, &shots);
                if (status != OK)
                    return status_fail(status, "task '%s', document %" PRId64 ": %s", suite->name,
                                       doc, status_message());
            }
        }
    return OK;
}

/* ---- tokens ---- */

static const Task *task_of(const Run *r, const Item *item) {
    return r->suites[item->suite].task;
}

/* <bos> unless the text has it, and the ids of text and more behind it. */
static void encode(const Run *r, Tokens *ids, Slice text, Slice more) {
    Text whole = {0};
    text_add(&whole, text.bytes, text.size);
    text_add(&whole, more.bytes, more.size);
    ids->count = 0;
    if (whole.size < 5 || memcmp(whole.bytes, "<bos>", 5)) tokens_add(ids, r->bos);
    tokenizer_encode(r->m->tokenizer, ids, whole.bytes, whole.size, NULL, 0, false);
    text_free(&whole);
}

/* White space at the end of a context belongs to what follows. */
static size_t context_size(Slice prompt) {
    Slice s = slice_strip(prompt);
    return s.size ? (size_t)(s.bytes + s.size - prompt.bytes) : 0;
}

/* Ids of the prompt with choice i, and how many of them are the context. */
static Status encode_choice(const Run *r, const Item *item, int64_t i, Tokens *ids,
                            int64_t *context) {
    Slice prompt = slice_text(&item->prompt);
    size_t size = context_size(prompt);
    Text choice = {0};
    text_add(&choice, prompt.bytes + size, prompt.size - size);
    TRY(prompt_choice(&choice, task_of(r, item), &r->o->prompt, item->row, i));
    encode(r, ids, (Slice){prompt.bytes, size}, (Slice){"", 0});
    *context = ids->count;
    encode(r, ids, (Slice){prompt.bytes, size}, slice_text(&choice));
    text_free(&choice);
    return OK;
}

/* How many jobs a document is: choices together where they are single tokens after the same ones.
 */
static Status count_jobs(Run *r, Item *item) {
    const Task *t = task_of(r, item);
    Tokens ids = {0}, first = {0};
    int64_t context, n, most = r->m->g.config.max_position_embeddings;
    Status status = OK;
    if (t->output == OUTPUT_TEXT) {
        item->jobs = samples_of(r, t);
    } else if (t->output == OUTPUT_ROLLING) {
        Window w;
        encode(r, &ids, slice_text(&item->prompt), (Slice){"", 0});
        for (item->jobs = 0; rolling_window(&w, item->jobs, ids.count - 1, most, 1);) item->jobs++;
    } else {
        n = item->jobs = prompt_choice_count(item->row);
        if (n < 1)
            FAIL(ERR_FORMAT, "task '%s', document %" PRId64 " has no choices", t->name, item->doc);
        item->together = true;
        for (int64_t i = 0; i < n && item->together; i++) {
            TRY_DONE(encode_choice(r, item, i, i ? &ids : &first, &context));
            const Tokens *mine = i ? &ids : &first;
            item->together = mine->count == context + 1 && mine->count == first.count &&
                             !memcmp(mine->ids, first.ids, (size_t)context * sizeof *mine->ids);
        }
    }
    for (int64_t i = 0; i < item->jobs; i++) json_array_append_new(item->answers, json_null());
done:
    tokens_free(&ids);
    tokens_free(&first);
    return status;
}

/* ---- one job ---- */

typedef struct Job {
    Item *item;
    int64_t number; /* of its item; 0 for all choices together */
    Sequence *sequence;
} Job;

static void set_sampling(const Run *r, const Item *item, int64_t sample, Sampling *s) {
    const EvalOptions *o = r->o;
    const Task *t = task_of(r, item);
    *s = r->sampling;
    if (!prompt_is_chat(t, &o->prompt) || t->temperature > 0) { /* the rules' own */
        s->temperature = t->temperature;
        s->top_k = 0;
        s->top_p = 1;
        s->min_p = 0;
    }
    if (!isnan(o->temperature)) s->temperature = o->temperature;
    if (!isnan(o->top_p)) s->top_p = o->top_p;
    if (!isnan(o->min_p)) s->min_p = o->min_p;
    if (o->top_k >= 0) s->top_k = o->top_k;
    s->seed = random_key(random_key_name(o->seed, r->suites[item->suite].suite->name),
                         (uint64_t)(item->doc * 4096 + sample));
    s->max_tokens = o->max_tokens ? o->max_tokens : t->max_tokens;
}

/* Cuts from the left what the model has no positions for. */
static int64_t overlong(const Tokens *ids, int64_t most) {
    return ids->count > most ? ids->count - most : 0;
}

static Status submit(Run *r, Engine *e, Job *job) {
    Item *item = job->item;
    const Task *t = task_of(r, item);
    int64_t most = r->m->g.config.max_position_embeddings, context = 0, cut, n;
    Request request = {.sampling = {.top_p = 1, .repetition_penalty = 1}};
    Tokens ids = {0};
    int32_t candidates[prompt_choice_count(item->row) + 1];
    const char *stops[STOPS_TEXTS];
    Status status = OK;
    if (t->output == OUTPUT_CHOICES) {
        TRY_DONE(encode_choice(r, item, job->number, &ids, &context));
        n = item->together ? prompt_choice_count(item->row) : 0;
        for (int64_t i = 0; i < n; i++) {
            TRY_DONE(encode_choice(r, item, i, &ids, &context));
            candidates[i] = ids.ids[context];
        }
        if (item->together) {
            request.candidates = candidates;
            request.candidate_count = (int)n;
            ids.count = context;
        } else {
            request.score_from = context;
        }
        cut = overlong(&ids, item->together ? most : most + 1);
        request.ids = ids.ids + cut;
        request.count = ids.count - cut;
        request.score_from -= request.score_from ? cut : 0;
    } else if (t->output == OUTPUT_ROLLING) {
        Window w;
        encode(r, &ids, slice_text(&item->prompt), (Slice){"", 0});
        rolling_window(&w, job->number, ids.count - 1, most, 1);
        request.ids = ids.ids + w.targets + 1 - w.context; /* <bos> is token -1 of the text */
        request.count = w.context + w.count;
        request.score_from = w.context;
    } else {
        encode(r, &ids, slice_text(&item->prompt), (Slice){"", 0});
        set_sampling(r, item, job->number, &request.sampling);
        int64_t room = most - request.sampling.max_tokens;
        if (room < 1)
            FAIL_DONE(ERR_CONFIG,
                      "task '%s' answers with up to %" PRId64 " tokens, the model takes %" PRId64
                      " (max_position_embeddings): --max-tokens says how many",
                      t->name, request.sampling.max_tokens, most);
        cut = overlong(&ids, room);
        request.ids = ids.ids + cut;
        request.count = ids.count - cut;
        for (int i = 0; i < t->until.count && i < STOPS_TEXTS; i++)
            stops[request.stop_text_count++] = t->until.items[i];
        if (!t->has_until && !prompt_is_chat(t, &r->o->prompt))
            stops[request.stop_text_count++] = "\n\n";
        request.stop_texts = stops;
        if (r->o->prompt.think) {
            request.thought_begin = r->thought_begin;
            request.thought_end = r->thought_end;
            request.thought_most = r->o->think_most;
        }
    }
    TRY_DONE(engine_submit(e, &job->sequence, &request));
done:
    tokens_free(&ids);
    return status;
}

/* The answer's text: after the last thought, special tokens dropped, up to the first stop text. */
static json_t *answer_of(const Run *r, const Item *item, const Sequence *s) {
    const Task *t = task_of(r, item);
    int64_t from = s->request.count, end = s->count;
    bool thought = false, open = false;
    if (end > from && sampling_stops(&s->request.sampling, s->ids[end - 1])) end--;
    for (int64_t i = from; i < end && r->o->prompt.think; i++) {
        if (s->ids[i] == r->thought_begin) open = true;
        if (s->ids[i] == r->thought_end) from = i + 1, thought = true, open = false;
    }
    Text text = {0};
    tokenizer_decode(r->m->tokenizer, &text, s->ids + from, end - from, true);
    Slice kept = slice_text(&text);
    if (thought) { /* white space in front goes */
        Slice stripped = slice_strip(kept);
        kept = (Slice){stripped.bytes, (size_t)(kept.bytes + kept.size - stripped.bytes)};
    }
    Text clean = response_cleaned(kept, &t->until, NULL);
    json_t *out = json_pack("{s:o, s:I, s:b, s:b}", "text", json_stringn(clean.bytes, clean.size),
                            "tokens", (json_int_t)sequence_answered(s), "truncated",
                            s->ending == ENDING_LENGTH, "unclosed", open);
    text_free(&text);
    text_free(&clean);
    return out;
}

static json_t *pair_of(double ll, bool greedy) {
    return json_pack("[f, b]", ll, greedy);
}

/* Puts what a finished sequence says into its item, and returns it as it is logged. */
static json_t *collect(const Run *r, const Job *job) {
    Item *item = job->item;
    const Sequence *s = job->sequence;
    json_t *value;
    if (task_of(r, item)->output == OUTPUT_TEXT) {
        value = answer_of(r, item, s);
    } else if (item->together) {
        value = json_array();
        for (int i = 0; i < s->request.candidate_count; i++)
            json_array_append_new(value, pair_of(s->candidate_logprobs[i], s->candidate_best[i]));
    } else {
        double sum = 0;
        bool greedy = true;
        for (int64_t i = s->request.score_from; i < s->request.count; i++) {
            sum += s->logprobs[i];
            greedy &= s->best[i];
        }
        value = pair_of(sum, greedy);
    }
    return value;
}

static void keep(Item *item, int64_t number, const json_t *value) {
    if (item->together)
        for (int64_t i = 0; i < item->jobs; i++)
            json_array_set(item->answers, (size_t)i, json_array_get(value, (size_t)i));
    else
        json_array_set(item->answers, (size_t)number, (json_t *)value);
}

static bool have(const Item *item, int64_t number) {
    return !json_is_null(json_array_get(item->answers, (size_t)number));
}

/* ---- the log ---- */

/* A line in one write, so that a kill leaves at most one broken line, the last. */
static Status log_answer(Run *r, const Item *item, int64_t number, const json_t *value) {
    if (!r->log) return OK;
    json_t *row = json_pack("{s:s, s:I, s:I, s:s, s:O}", "task", r->suites[item->suite].suite->name,
                            "doc_id", (json_int_t)item->doc, "number", (json_int_t)number,
                            "prompt_hash", item->prompt_hash, "answer", value);
    char *line = json_dumps(row, JSON_COMPACT | JSON_REAL_PRECISION(17));
    fprintf(r->log, "%s\n", line);
    bool failed = fflush(r->log) != 0;
    free(line);
    json_decref(row);
    if (failed) FAIL(ERR_IO, "%s/responses.jsonl: %s", r->o->out, strerror(errno));
    return OK;
}

static Item *find_item(Run *r, const char *suite, int64_t doc) {
    for (int i = 0; i < r->suite_count; i++) {
        if (strcmp(r->suites[i].suite->name, suite)) continue;
        for (int64_t k = 0; k < r->item_count; k++)
            if (r->items[k].suite == i) {
                int64_t at = k + doc;
                return at < r->item_count && r->items[at].suite == i && r->items[at].doc == doc
                           ? &r->items[at]
                           : NULL;
            }
    }
    return NULL;
}

/* Reads what an earlier run left. A last line that was cut short is taken off. */
static Status load_log(Run *r, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return OK;
    char *line = NULL;
    size_t space = 0;
    long good = 0;
    Status status = OK;
    for (ssize_t size; status == OK && (size = getline(&line, &space, file)) > 0;) {
        if (line[size - 1] != '\n') break;
        json_t *row = NULL;
        status = json_read(&row, line, (size_t)size, path);
        if (status != OK) break;
        const char *suite = json_string_value(json_object_get(row, "task")),
                   *hash = json_string_value(json_object_get(row, "prompt_hash"));
        Item *item =
            suite ? find_item(r, suite, json_integer_value(json_object_get(row, "doc_id"))) : NULL;
        int64_t number = json_integer_value(json_object_get(row, "number"));
        if (!item || !hash || strcmp(hash, item->prompt_hash) || number < 0 || number >= item->jobs)
            status = status_fail(ERR_FORMAT,
                                 "%s: an answer to '%s' belongs to no question asked "
                                 "now",
                                 path, suite ? suite : "");
        else
            keep(item, number, json_object_get(row, "answer"));
        json_decref(row);
        good = ftell(file);
    }
    free(line);
    fclose(file);
    if (status == OK && truncate(path, good))
        status = status_fail(ERR_IO, "%s: %s", path, strerror(errno));
    return status;
}

/* ---- the model at work ---- */

static void show_progress(Run *r, bool last) {
    double t = now();
    if (r->o->quiet || (!last && t - r->shown < (isatty(2) ? 0.2 : 5))) return;
    r->shown = t;
    double rate = (double)r->answered / (t - r->began + 1e-9);
    double left = rate > 0 ? (double)(r->total - r->answered) / rate : 0;
    fprintf(stderr, "%s%" PRId64 " of %" PRId64 " answers, %.1f a second, %.0f s left%s",
            isatty(2) ? "\r" : "", r->answered, r->total, rate, left,
            isatty(2) && !last ? "   " : "\n");
}

/* Keys of so many sequences at once as half of the memory holds; at least one longest sequence. */
static int64_t cache_tokens(const Run *r, const EngineOptions *o, int64_t longest) {
    const Gemma *g = &r->m->g;
    double bytes = 0, unit = (double)dtype_block(o->kv).bytes / dtype_block(o->kv).count;
    for (int l = 0; l < g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &g->blocks[l].config;
        if (c->owns_kv && c->kind == FULL)
            bytes += 2 * unit * (double)(c->num_key_value_heads * c->head_dim);
    }
    double room = 0.5 * (double)device_available(g->device) / (bytes + 1);
    double wanted = (double)(o->sequences * (longest + PAGE_KEYS)) * 1.5;
    double tokens = wanted < room ? wanted : room;
    int64_t least = longest + PAGE_KEYS;
    return tokens > (double)least ? (int64_t)tokens : least;
}

static Status longest_of(Run *r, int64_t *longest) {
    Tokens ids = {0};
    int64_t most = r->m->g.config.max_position_embeddings;
    *longest = 1;
    for (int64_t i = 0; i < r->item_count; i++) {
        const Task *t = task_of(r, &r->items[i]);
        int64_t answer =
            t->output == OUTPUT_TEXT ? r->o->max_tokens ? r->o->max_tokens : t->max_tokens : 128;
        encode(r, &ids, slice_text(&r->items[i].prompt), (Slice){"", 0});
        int64_t n = ids.count + answer < most ? ids.count + answer : most;
        if (n > *longest) *longest = n;
    }
    tokens_free(&ids);
    return OK;
}

static Status ask_all(Run *r) {
    int64_t longest, window = 4 * r->o->batch, open = 0, next = 0, number = 0;
    Engine e = {0};
    Job *jobs = must_calloc((size_t)window, sizeof *jobs);
    EngineOptions options = {.sequences = r->o->batch, .share = true};
    Status status = OK;
    TRY_DONE(kv_dtype(&options.kv, &r->m->g, r->o->kv));
    TRY_DONE(longest_of(r, &longest));
    options.chunk = options.sequences > CHUNK ? options.sequences : CHUNK;
    options.tokens = cache_tokens(r, &options, longest);
    TRY_DONE(engine_init(&e, &r->m->g, r->m->tokenizer, &options));
    while (status == OK) {
        while (open < window && next < r->item_count) {
            Item *item = &r->items[next];
            if (number >= item->jobs || (item->together && number > 0)) {
                next++, number = 0;
            } else if (have(item, number)) {
                number++;
            } else {
                jobs[open] = (Job){item, number++, NULL};
                TRY_DONE(submit(r, &e, &jobs[open]));
                open++;
            }
        }
        if (!open) break;
        engine_step(&e);
        for (int64_t i = 0; i < open && status == OK; i++) {
            if (jobs[i].sequence->ending == ENDING_NONE) continue;
            json_t *value = collect(r, &jobs[i]);
            keep(jobs[i].item, jobs[i].number, value);
            status = log_answer(r, jobs[i].item, jobs[i].number, value);
            json_decref(value);
            engine_drop(&e, jobs[i].sequence);
            jobs[i--] = jobs[--open];
            r->answered++;
        }
        show_progress(r, false);
        if (file_stopping()) FAIL_DONE(ERR_STOPPED, "stopped; the same command goes on from here");
    }
done:
    r->counts = e.counts;
    engine_free(&e);
    free(jobs);
    return status;
}

/* ---- figures ---- */

static void add_metric(TaskResult *t, const char *metric, const char *filter, int64_t doc,
                       double value) {
    result_value(t, metric, filter, FIGURE_MEAN, doc, value, 1);
}

static Status score_choices(const Run *r, const Item *item, TaskResult *t, json_t *sample) {
    const Task *task = task_of(r, item);
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
    const Task *task = task_of(r, item);
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

/* Answers of one document under one filter. */
static Status score_answers(const Run *r, const Item *item, const FilterChain *chain, TaskResult *t,
                            json_t *sample) {
    const Task *task = task_of(r, item);
    int64_t n = item->jobs, right = 0, votes = 0;
    const char *metric = rule_metric(task);
    bool voting = false;
    for (int i = 0; i < chain->count; i++) voting |= chain->filters[i].kind == FILTER_MAJORITY;
    json_t *texts = json_array(), *kept = json_array(), *names = json_array();
    Slice *extracted = must_calloc((size_t)n, sizeof *extracted);
    double *scores = must_calloc((size_t)n, sizeof *scores);
    Verdict *verdicts = must_calloc((size_t)n, sizeof *verdicts);
    Status status = OK;
    for (int64_t i = 0; i < n; i++)
        json_array_append(texts, json_object_get(json_array_get(item->answers, (size_t)i), "text"));
    for (int64_t i = 0; i < (voting ? 1 : n); i++) {
        Verdict *v = &verdicts[i];
        TRY_DONE(rule_score(v, task, chain, item->row,
                            voting ? texts : json_array_get(texts, (size_t)i)));
        if (json_is_string(v->score)) { /* an option is drawn */
            Mersenne m;
            mersenne_seed(&m, 12345 + (uint64_t)(item->doc * 4096 + i));
            Text gold = {0};
            TRY_DONE(template_render(&gold, task->answer ? task->answer : "{answer}", task,
                                     item->row, NULL));
            json_decref(v->score);
            v->score = json_real(*gold.bytes == 'A' + (char)mersenne_below(&m, 10));
            text_free(&gold);
        }
        json_array_append(kept, v->extracted);
        scores[i] = json_number_value(v->score);
        right += scores[i] > 0;
        if (v->parsed && json_is_string(v->extracted))
            extracted[votes++] = json_slice(v->extracted);
    }
    if (json_is_object(verdicts[0].score)) { /* several figures of the first answer */
        const char *name;
        json_t *value, *one;
        size_t k;
        json_object_foreach(verdicts[0].score, name, value) {
            if (json_is_array(value))
                json_array_foreach(value, k, one) result_value(t, name, chain->name, FIGURE_FLAT,
                                                               item->doc, json_is_true(one), 1);
            else
                add_metric(t, name, chain->name, item->doc, json_is_true(value));
            json_object_set(sample, name, value);
            json_array_append_new(names, json_string(name));
        }
    } else {
        for (int64_t i = 0; i < (voting ? 1 : n); i++) {
            char *name = n > 1 && !voting ? must_format("avg@%" PRId64, n) : must_strdup(metric);
            add_metric(t, name, chain->name, item->doc, scores[i]);
            if (i == 0) json_array_append_new(names, json_string(name));
            free(name);
        }
        json_object_set_new(sample, metric, json_real(scores[0]));
        if (n > 1 && !voting) {
            char *maj = must_format("maj@%" PRId64, n), *pass = must_format("pass@%" PRId64, n);
            double won = 0;
            if (votes) {
                Slice winner = extracted[majority_vote(extracted, votes)];
                for (int64_t i = n; i-- > 0;) {
                    Slice mine = json_slice(verdicts[i].extracted);
                    if (mine.size == winner.size && !memcmp(mine.bytes, winner.bytes, mine.size))
                        won = scores[i];
                }
            }
            add_metric(t, maj, chain->name, item->doc, won);
            add_metric(t, pass, chain->name, item->doc, pass_at_k(n, right, n));
            json_object_set_new(sample, maj, json_real(won));
            free(maj);
            free(pass);
        }
        json_t *verified = json_object_get(verdicts[0].more, "math_verify");
        if (verified) {
            add_metric(t, "math_verify", chain->name, item->doc, json_number_value(verified));
            json_object_set(sample, "math_verify", verified);
        }
    }
    if (chain == &task->chains[0])
        for (int64_t i = 0; i < n; i++) {
            const json_t *a = json_array_get(item->answers, (size_t)i);
            t->responses++;
            t->unparsed += i < (voting ? 1 : n) && !verdicts[i].parsed;
            t->truncated += json_is_true(json_object_get(a, "truncated"));
            t->unclosed += json_is_true(json_object_get(a, "unclosed"));
        }
    json_object_set_new(sample, "resps", json_pack("[O]", texts));
    json_object_set(sample, "filtered_resps", kept);
    json_object_set_new(sample, "filter", json_string(chain->name));
    json_object_set(sample, "metrics", names);
done:
    for (int64_t i = 0; i < n; i++) verdict_free(&verdicts[i]);
    free(verdicts);
    free(scores);
    free(extracted);
    json_decref(texts);
    json_decref(kept);
    json_decref(names);
    return status;
}

static void set_hash(json_t *sample, const char *key, Slice text) {
    char hash[65];
    sha256_text(hash, text.bytes, text.size);
    json_object_set_new(sample, key, json_string(hash));
}

/* What every line of a samples file has. */
static Status sample_head(json_t **out, const Run *r, const Item *item) {
    const Task *t = task_of(r, item);
    json_t *sample = json_pack("{s:I, s:O}", "doc_id", (json_int_t)item->doc, "doc", item->row),
           *arguments = json_object();
    Text target = {0};
    char *doc = json_dumps(item->row, JSON_INDENT(2));
    Status status = OK;
    int64_t requests = t->output == OUTPUT_CHOICES ? item->jobs : 1;
    if (t->output == OUTPUT_TEXT && t->scorer != SCORER_IFEVAL) {
        const char *text = t->scorer == SCORER_PYTHON ? t->tests : t->answer;
        status = template_render(&target, text ? text : "{answer}", t, item->row, NULL);
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

/* Figures and samples of one suite. */
static Status score_suite(Run *r, Results *results, int suite) {
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
    t->samples = task->output == OUTPUT_TEXT ? samples_of(r, task) : 1;
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

/* ---- settings ---- */

static void set_companion_hash(json_t *out, const char *key, const char *model, const char *name) {
    char *bytes = NULL, hash[65];
    size_t size;
    if (companion_find(&bytes, &size, model, name) == OK && bytes) {
        sha256_text(hash, bytes, size);
        json_object_set_new(out, key, json_string(hash));
    }
    free(bytes);
}

static json_t *number_or_null(double x) {
    return isnan(x) ? json_null() : json_real(x);
}

/* Everything that decides what comes out. */
static json_t *settings_of(const Run *r, const char *adapter) {
    const EvalOptions *o = r->o;
    json_t *out = json_object(), *tasks = json_object(), *files = json_array();
    for (int i = 0; i < r->task_count; i++) {
        const Task *t = &r->tasks[i];
        json_object_set_new(tasks, t->name,
                            json_pack("{s:s, s:f, s:s*, s:I, s:I, s:b}", "rules", t->rules,
                                      "version", t->version, "question", t->question, "max_tokens",
                                      (json_int_t)(o->max_tokens ? o->max_tokens : t->max_tokens),
                                      "samples", (json_int_t)samples_of(r, t), "chat",
                                      prompt_is_chat(t, &o->prompt)));
        for (int k = 0; k < r->documents[i].file_count; k++) {
            const SourceFile *f = &r->documents[i].files[k];
            const char *slash = strrchr(f->path, '/');
            json_array_append_new(files, json_pack("{s:s, s:s, s:s, s:s?}", "task", t->name, "file",
                                                   slash ? slash + 1 : f->path, "sha256", f->sha256,
                                                   "release", f->release));
        }
    }
    json_object_set_new(out, "model", json_string(r->m->dir));
    json_object_set_new(out, "adapter", adapter ? json_string(adapter) : json_null());
    json_object_set_new(out, "dtype", json_string(dtype_name(r->m->g.dtype)));
    json_object_set_new(out, "weights",
                        json_string(dtype_name(r->m->g.linears.first->weight->value.dtype)));
    json_object_set_new(out, "kv", o->kv ? json_string(o->kv) : json_null());
    json_object_set_new(out, "tokenizer_sha256", json_string(tokenizer_hash(r->m->tokenizer)));
    set_companion_hash(out, "config_sha256", r->m->dir, "config.json");
    set_companion_hash(out, "chat_template_sha", r->m->dir, "chat_template.jinja");
    json_object_set_new(out, "chat", json_boolean(o->prompt.chat));
    json_object_set_new(out, "chat_format", json_string(chat_format_name(o->prompt.format)));
    json_object_set_new(out, "enable_thinking", json_boolean(o->prompt.think));
    json_object_set_new(out, "think_end", o->prompt.think ? json_string(THOUGHT_END) : json_null());
    json_object_set_new(out, "think_most", json_integer(o->think_most));
    json_object_set_new(out, "system_instruction",
                        o->prompt.system ? json_string(o->prompt.system) : json_null());
    json_object_set_new(out, "num_fewshot", json_integer(o->prompt.shots));
    json_object_set_new(out, "fewshot_seed", json_integer((json_int_t)o->prompt.seed));
    json_object_set_new(out, "limit", o->limit > 0 ? json_real(o->limit) : json_null());
    json_object_set_new(out, "temperature", number_or_null(o->temperature));
    json_object_set_new(out, "top_p", number_or_null(o->top_p));
    json_object_set_new(out, "min_p", number_or_null(o->min_p));
    json_object_set_new(out, "top_k", o->top_k >= 0 ? json_integer(o->top_k) : json_null());
    json_object_set_new(out, "model_sampling",
                        json_pack("{s:f, s:I, s:f}", "temperature", r->sampling.temperature,
                                  "top_k", (json_int_t)r->sampling.top_k, "top_p",
                                  r->sampling.top_p));
    json_object_set_new(out, "random_seed", json_integer((json_int_t)o->seed));
    json_object_set_new(out, "tasks", tasks);
    json_object_set_new(out, "data", files);
    return out;
}

/* A folder that holds another run's answers is refused. */
static Status check_settings(const Run *r, json_t *settings) {
    char *path = must_format("%s/settings.json", r->o->out), *bytes = NULL;
    size_t size;
    json_t *before = NULL;
    Status status = OK;
    if (file_exists(path)) {
        TRY_DONE(file_read(&bytes, &size, path, (size_t)64 << 20));
        TRY_DONE(json_read(&before, bytes, size, path));
        const char *key;
        json_t *value;
        json_object_foreach(settings, key,
                            value) if (!json_equal(value, json_object_get(before, key)))
            FAIL_DONE(ERR_CONFIG, "%s: holds a run with another '%s': give another --out",
                      r->o->out, key);
        goto done;
    }
    TRY_DONE(json_write(settings, path));
done:
    json_decref(before);
    free(bytes);
    free(path);
    return status;
}

/* ---- all of it ---- */

static Status open_log(Run *r, json_t *settings) {
    char *path = must_format("%s/responses.jsonl", r->o->out);
    Status status = OK;
    TRY_DONE(folder_make(r->o->out));
    TRY_DONE(check_settings(r, settings));
    TRY_DONE(load_log(r, path));
    if (!(r->log = fopen(path, "ab"))) FAIL_DONE(ERR_IO, "%s: %s", path, strerror(errno));
done:
    free(path);
    return status;
}

static Status check_options(const Run *r) {
    const EvalOptions *o = r->o;
    if (o->batch < 1 || o->batch > 512)
        FAIL(ERR_USAGE, "--batch is %" PRId64 ", expected 1 to 512", o->batch);
    for (int i = 0; i < r->task_count; i++)
        if (o->prompt.think && r->tasks[i].output != OUTPUT_TEXT)
            FAIL(ERR_USAGE,
                 "task '%s' goes by likelihoods: with --think a thought would stand in the "
                 "answer's place",
                 r->tasks[i].name);
    for (int i = 0; i < r->task_count; i++)
        if (o->prompt.think && !prompt_is_chat(&r->tasks[i], &o->prompt))
            FAIL(ERR_USAGE, "task '%s' is asked as plain text: --think needs --chat",
                 r->tasks[i].name);
    return OK;
}

static void run_free(Run *r) {
    for (int64_t i = 0; i < r->item_count; i++) {
        text_free(&r->items[i].prompt);
        json_decref(r->items[i].answers);
    }
    for (int i = 0; i < r->task_count; i++) {
        documents_free(&r->documents[i]);
        task_free(&r->tasks[i]);
    }
    free(r->items);
    free(r->suites);
    free(r->documents);
    free(r->tasks);
    if (r->log) fclose(r->log);
}

Status eval_run(Results *results, Model *m, const char *adapter, const EvalOptions *o) {
    Run r = {.m = m, .o = o, .began = now()};
    json_t *settings = NULL;
    Status status = OK;
    time_t start = time(NULL);
    r.bos = (int32_t)m->g.config.bos_token_id;
    r.thought_begin = tokenizer_find(m->tokenizer, THOUGHT_BEGIN);
    r.thought_end = tokenizer_find(m->tokenizer, THOUGHT_END);
    TRY_DONE(sampling_load(&r.sampling, m));
    TRY_DONE(load_tasks(&r));
    TRY_DONE(check_options(&r));
    TRY_DONE(list_items(&r));
    for (int64_t i = 0; i < r.item_count; i++) {
        TRY_DONE(count_jobs(&r, &r.items[i]));
        r.total += r.items[i].together ? 1 : r.items[i].jobs;
    }
    settings = settings_of(&r, adapter);
    if (o->out) TRY_DONE(open_log(&r, settings));
    for (int64_t i = 0; i < r.item_count; i++)
        for (int64_t k = 0; k < (r.items[i].together ? 1 : r.items[i].jobs); k++)
            r.answered += have(&r.items[i], k);
    TRY_DONE(ask_all(&r));
    show_progress(&r, true);
    for (int i = 0; i < r.suite_count; i++) TRY_DONE(score_suite(&r, results, i));
    results->settings = json_pack(
        "{s:O, s:s, s:I, s:f, s:I, s:I, s:I, s:I}", "config", settings, "model_name", m->dir,
        "date", (json_int_t)start, "total_evaluation_time_seconds", now() - r.began, "max_length",
        (json_int_t)m->g.config.max_position_embeddings, "passes", (json_int_t)r.counts.passes,
        "rows_computed", (json_int_t)r.counts.rows, "rows_shared", (json_int_t)r.counts.reused);
    if (o->out) {
        char *path = must_format("%s/results.json", o->out);
        json_t *json = results_json(results, o->bootstrap);
        status = json_write(json, path);
        json_decref(json);
        free(path);
    }
done:
    json_decref(settings);
    run_free(&r);
    return status;
}
