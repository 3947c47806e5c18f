/* run.c - questions to requests, answers to figures, everything kept on the way. */
#include "eval/run.h"
#include "eval/questions.h"
#include "eval/report.h"
#include "eval/rules.h"
#include "eval/sandbox.h"
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

#define CHUNK 512

EvalOptions eval_options_default(void) {
    return (EvalOptions){.prompt = {.shots = -1, .seed = 1234},
                         .temperature = NAN,
                         .top_p = NAN,
                         .min_p = NAN,
                         .top_k = -1,
                         .seed = 42,
                         .batch = 16,
                         .bootstrap = 100000,
                         .stopping = file_stopping};
}

EvalNeeds eval_needs(const EvalOptions *o) {
    EvalNeeds needs = {.chat = o->prompt.chat};
    for (const char *at = o->tasks; *at;) {
        size_t n = strcspn(at, ",");
        char *name = must_format("%.*s", (int)n, at);
        Task task;
        if (task_find(&task, name) == OK) {
            needs.chat |= task.chat;
            needs.media |= task.media_count || (task.messages && !strcmp(task.reads, "rows"));
            task_free(&task);
        }
        free(name);
        at += n + (at[n] == ',');
    }
    return needs;
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
        for (int i = 0; i < r->task_count && status == OK; i++)
            if (!strcmp(r->tasks[i].name, r->tasks[r->task_count].name))
                status = status_fail(ERR_USAGE, "task '%s' is named twice", r->tasks[i].name);
        free(name);
        r->task_count += status == OK;
        TRY(status);
        at += n + (at[n] == ',');
    }
    if (!r->task_count) FAIL(ERR_USAGE, "no task is named");
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
    TRY(score_check(s->task, item->row));
    TRY(prompt_render(&item->prompt, &item->messages, s->task, &r->o->prompt, s->suite, item->row,
                      picked, shots->count));
    if (item->messages && s->task->output != OUTPUT_TEXT)
        FAIL(ERR_CONFIG, "a document has media: expected a task of output text");
    if (item->messages) TRY(model_check_media(r->m->g));
    sha256_text(item->prompt_hash, item->prompt.bytes, item->prompt.size);
    return OK;
}

static Status list_items(Run *r) {
    for (int i = 0; i < r->task_count; i++) {
        if (!r->documents[i].count)
            FAIL(ERR_FORMAT, "%s: task '%s' has no questions", r->o->data, r->tasks[i].name);
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
                    return status_prefix(status, "task '%s', document %" PRId64, suite->name, doc);
            }
        }
    }
    return OK;
}

/* ---- tokens ---- */

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
    TRY(prompt_choice(&choice, item_task(r, item), &r->o->prompt, item->row, i));
    encode(r, ids, (Slice){prompt.bytes, size}, (Slice){"", 0});
    *context = ids->count;
    encode(r, ids, (Slice){prompt.bytes, size}, slice_text(&choice));
    text_free(&choice);
    return OK;
}

/* How many jobs a document is: choices together where they are single tokens after the same ones.
 */
static Status count_jobs(Run *r, Item *item) {
    const Task *t = item_task(r, item);
    Tokens ids = {0}, first = {0};
    int64_t context, n, most = r->m->g->config.max_position_embeddings;
    Status status = OK;
    if (t->output == OUTPUT_TEXT) {
        item->jobs = run_samples(r, t);
    } else if (t->output == OUTPUT_ROLLING) {
        Window w;
        encode(r, &ids, slice_text(&item->prompt), (Slice){"", 0});
        for (item->jobs = 0; rolling_window(&w, item->jobs, ids.count - 1, most, 1);) item->jobs++;
    } else {
        n = item->jobs = prompt_choice_count(item->row);
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
    DialogPrompt prompt; /* with media; else empty */
} Job;

static void set_sampling(const Run *r, const Item *item, int64_t sample, Sampling *s) {
    const EvalOptions *o = r->o;
    const Task *t = item_task(r, item);
    *s = r->sampling;
    if (!prompt_is_chat(t, &o->prompt) || !isnan(t->temperature)) { /* the rules' own */
        s->temperature = isnan(t->temperature) ? 0 : t->temperature;
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
    s->max_tokens = run_max_tokens(r, t);
}

/* How many tokens are cut from the left, for which the model has no positions. */
static int64_t overlong(Run *r, const Tokens *ids, int64_t most) {
    if (ids->count <= most) return 0;
    r->cut++;
    return ids->count - most;
}

/* How the media of a suite's documents are read. */
static MediumOptions reading_of(const Run *r, const Item *item) {
    MediumOptions reading = r->o->reading;
    reading.config = &r->m->g->config;
    reading.folder = r->suites[item->suite].suite->folder;
    return reading;
}

/* The prompt of an answer: ids, and what its media are as soft tokens. */
static Status make_prompt(Run *r, Job *job, Tokens *ids) {
    const Item *item = job->item;
    MediumOptions reading = reading_of(r, item);
    ChatOptions chat = prompt_chat_options(&r->o->prompt);
    const json_t *tools = item_task(r, item)->messages ? json_object_get(item->row, "tools") : NULL;
    if (!item->messages) {
        encode(r, ids, slice_text(&item->prompt), (Slice){"", 0});
        return OK;
    }
    DialogPrompt *p = &job->prompt;
    TRY(dialog_prompt(p, r->m->g, r->m->tokenizer, item->messages, tools, &chat, &reading));
    TRY(dialog_soften(&p->soft, r->m->g, &p->media, &p->ids));
    for (int64_t i = 0; i < p->ids.count; i++) tokens_add(ids, p->ids.ids[i]);
    return OK;
}

static Status submit(Run *r, Engine *e, Job *job) {
    Item *item = job->item;
    const Task *t = item_task(r, item);
    int64_t most = r->m->g->config.max_position_embeddings, context = 0, cut, n;
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
        cut = overlong(r, &ids, item->together ? most : most + 1);
        if (request.score_from && request.score_from <= cut)
            FAIL_DONE(ERR_CONFIG,
                      "task '%s', document %" PRId64 ": a choice alone is longer than the model's "
                      "%" PRId64 " positions",
                      t->name, item->doc, most);
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
        status = make_prompt(r, job, &ids);
        if (status != OK) {
            status = status_prefix(status, "task '%s', document %" PRId64, t->name, item->doc);
            goto done;
        }
        request.media = job->prompt.soft.items;
        request.media_count = job->prompt.soft.count;
        set_sampling(r, item, job->number, &request.sampling);
        int64_t room = most - request.sampling.max_tokens;
        if (room < 1)
            FAIL_DONE(ERR_CONFIG,
                      "task '%s' answers with up to %" PRId64 " tokens, the model takes %" PRId64
                      " (max_position_embeddings): --max-tokens says how many",
                      t->name, request.sampling.max_tokens, most);
        if (item->messages && ids.count > room)
            FAIL_DONE(ERR_CONFIG,
                      "task '%s', document %" PRId64 ": with its media the prompt has %" PRId64
                      " tokens, the model takes %" PRId64,
                      t->name, item->doc, ids.count, room);
        cut = overlong(r, &ids, room);
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
    const Task *t = item_task(r, item);
    int64_t from = s->request.count, end = s->count;
    bool thought = false, open = false;
    if (end > from && sampling_stops(&s->request.sampling, s->ids[end - 1])) end--;
    for (int64_t i = from; i < end && r->o->prompt.think; i++) {
        if (s->ids[i] == r->thought_begin) open = true;
        if (s->ids[i] == r->thought_end) from = i + 1, thought = true, open = false;
    }
    Text text = {0};
    bool marks = t->scorer == SCORER_BFCL; /* calls are read by them */
    tokenizer_decode(r->m->tokenizer, &text, s->ids + from, end - from, !marks);
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
    if (item_task(r, item)->output == OUTPUT_TEXT) {
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

static int own_rank(const Run *r) {
    return r->o->ranks ? r->o->ranks->rank : 0;
}

/* Whether this rank asks it. */
static bool is_mine(const Run *r, const Item *item) {
    return comm_is_alone(r->o->ranks) || (item - r->items) % r->o->ranks->size == r->o->ranks->rank;
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
    if (r->o->quiet || own_rank(r) || (!last && t - r->shown < (isatty(2) ? 0.2 : 5))) return;
    r->shown = t;
    double rate = (double)r->answered / (t - r->began + 1e-9);
    double left = rate > 0 ? (double)(r->total - r->answered) / rate : 0;
    fprintf(stderr, "%s%" PRId64 " of %" PRId64 " answers, %.1f a second, %.0f s left%s",
            isatty(2) ? "\r" : "", r->answered, r->total, rate, left,
            isatty(2) && !last ? "   " : "\n");
}

/* Keys of so many sequences at once as half of the memory holds; at least one longest sequence. */
static int64_t cache_tokens(const Run *r, const EngineOptions *o, int64_t longest) {
    const Gemma *g = r->m->g;
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
    int64_t most = r->m->g->config.max_position_embeddings;
    *longest = 1;
    for (int64_t i = 0; i < r->item_count; i++) {
        const Task *t = item_task(r, &r->items[i]);
        int64_t answer = t->output == OUTPUT_TEXT ? run_max_tokens(r, t) : 128;
        encode(r, &ids, slice_text(&r->items[i].prompt), (Slice){"", 0});
        MediumOptions reading = reading_of(r, &r->items[i]);
        int64_t n = ids.count + answer + messages_media_tokens(r->items[i].messages, &reading);
        if (n > most) n = most;
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
    TRY_DONE(kv_dtype(&options.kv, r->m->g, r->o->kv));
    TRY_DONE(longest_of(r, &longest));
    options.chunk = options.sequences > CHUNK ? options.sequences : CHUNK;
    options.tokens = cache_tokens(r, &options, longest);
    TRY_DONE(engine_init(&e, r->m->g, r->m->tokenizer, &options));
    while (status == OK) {
        while (open < window && next < r->item_count) {
            Item *item = &r->items[next];
            if (!is_mine(r, item) || number >= item->jobs || (item->together && number > 0)) {
                next++, number = 0;
            } else if (have(item, number)) {
                number++;
            } else {
                jobs[open] = (Job){.item = item, .number = number++};
                TRY_DONE(submit(r, &e, &jobs[open++]));
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
            dialog_prompt_free(&jobs[i].prompt);
            jobs[i--] = jobs[--open];
            r->answered++;
        }
        show_progress(r, false);
        if (r->o->stopping()) FAIL_DONE(ERR_STOPPED, "stopped; the same command goes on from here");
    }
done:
    r->counts = e.counts;
    engine_free(&e);
    for (int64_t i = 0; i < open; i++) dialog_prompt_free(&jobs[i].prompt);
    free(jobs);
    return status;
}

/* ---- all of it ---- */

static char *log_path(const Run *r, int rank) {
    return rank ? must_format("%s/responses-%d.jsonl", r->o->out, rank)
                : must_format("%s/responses.jsonl", r->o->out);
}

/* What all ranks have left, of this run or of earlier ones. */
static Status load_logs(Run *r) {
    bool there = true;
    Status status = OK;
    for (int rank = 0; there && status == OK; rank++) {
        char *path = log_path(r, rank);
        there = !rank || file_exists(path);
        if (there) status = load_log(r, path);
        free(path);
    }
    return status;
}

/* The first rank mends what was cut short before the others read it. */
static Status open_log(Run *r, json_t *settings) {
    int rank = own_rank(r);
    char *path = log_path(r, rank);
    Status status = OK;
    if (rank) comm_barrier(r->o->ranks);
    TRY_DONE(folder_make(r->o->out));
    TRY_DONE(settings_check(r, settings));
    TRY_DONE(load_logs(r));
    if (!comm_is_alone(r->o->ranks) && !rank) comm_barrier(r->o->ranks);
    if (!comm_is_alone(r->o->ranks))
        comm_barrier(r->o->ranks); /* nobody writes before all have read */
    if (!(r->log = fopen(path, "ab"))) FAIL_DONE(ERR_IO, "%s: %s", path, strerror(errno));
done:
    free(path);
    return status;
}

static Status check_options(const Run *r) {
    const EvalOptions *o = r->o;
    if (!comm_is_alone(r->o->ranks) && !o->out)
        FAIL(ERR_USAGE, "--out is missing: %d ranks bring their answers together there",
             o->ranks->size);
    if (!(o->limit >= 0)) FAIL(ERR_USAGE, "--limit is %g, expected more than 0", o->limit);
    if (o->prompt.shots < -1)
        FAIL(ERR_USAGE, "--shots is %" PRId64 ", expected 0 or more", o->prompt.shots);
    if (o->batch < 1 || o->batch > 512)
        FAIL(ERR_USAGE, "--batch is %" PRId64 ", expected 1 to 512", o->batch);
    for (int i = 0; i < r->task_count; i++)
        if (o->prompt.think && r->tasks[i].output != OUTPUT_TEXT)
            FAIL(ERR_USAGE,
                 "task '%s' goes by likelihoods: with --think a thought would stand in the "
                 "answer's place",
                 r->tasks[i].name);
    for (int i = 0; i < r->task_count; i++) {
        const Task *t = &r->tasks[i];
        if (t->media_count && (t->output != OUTPUT_TEXT || !prompt_is_chat(t, &o->prompt)))
            FAIL(ERR_CONFIG, "task '%s' has media: expected output text and form chat", t->name);
        if (t->media_count && t->opening)
            FAIL(ERR_CONFIG, "task '%s' has media, which go with no opening", t->name);
        if (rule_is_rate(t) && run_samples(r, t) != 1)
            FAIL(ERR_USAGE, "task '%s' counts errors: one answer to each question", t->name);
    }
    for (int i = 0; i < r->task_count; i++) {
        if (r->tasks[i].scorer != SCORER_PYTHON) continue;
        if (!o->run_code)
            FAIL(ERR_USAGE,
                 "task '%s' runs programs that the model writes, in a sandbox: --run-code says "
                 "that you want that",
                 r->tasks[i].name);
        TRY(sandbox_check());
    }
    for (int i = 0; i < r->task_count; i++)
        if (o->prompt.think && !prompt_is_chat(&r->tasks[i], &o->prompt))
            FAIL(ERR_USAGE, "task '%s' is asked as plain text: --think needs --chat",
                 r->tasks[i].name);
    return OK;
}

static void run_free(Run *r) {
    for (int64_t i = 0; i < r->item_count; i++) {
        text_free(&r->items[i].prompt);
        json_decref(r->items[i].messages);
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

Status eval_run(Results *results, const Examinee *m, const EvalOptions *o) {
    Run r = {.m = m, .o = o, .began = now()};
    json_t *settings = NULL;
    Status status = OK;
    time_t start = time(NULL);
    r.bos = (int32_t)m->g->config.bos_token_id;
    r.thought_begin = tokenizer_find(m->tokenizer, THOUGHT_BEGIN);
    r.thought_end = tokenizer_find(m->tokenizer, THOUGHT_END);
    TRY_DONE(sampling_load(&r.sampling, m->dir, &m->g->config));
    TRY_DONE(load_tasks(&r));
    TRY_DONE(check_options(&r));
    TRY_DONE(list_items(&r));
    for (int64_t i = 0; i < r.item_count; i++) {
        TRY_DONE(count_jobs(&r, &r.items[i]));
        if (is_mine(&r, &r.items[i])) r.total += r.items[i].together ? 1 : r.items[i].jobs;
    }
    settings = settings_of(&r);
    if (o->out) TRY_DONE(open_log(&r, settings));
    for (int64_t i = 0; i < r.item_count; i++)
        for (int64_t k = 0; k < (r.items[i].together ? 1 : r.items[i].jobs); k++)
            r.answered += is_mine(&r, &r.items[i]) && have(&r.items[i], k);
    TRY_DONE(ask_all(&r));
    show_progress(&r, true);
    if (!comm_is_alone(o->ranks)) {
        comm_barrier(o->ranks); /* all answers are there */
        if (own_rank(&r)) goto done;
        TRY_DONE(load_logs(&r));
    }
    if (r.cut)
        note("%" PRId64 " prompts lost their beginning: the model has %" PRId64 " positions", r.cut,
             m->g->config.max_position_embeddings);
    for (int i = 0; i < r.suite_count; i++) TRY_DONE(score_suite(&r, results, i));
    results->settings = json_pack(
        "{s:O, s:s, s:I, s:f, s:I, s:I, s:I, s:I, s:I}", "config", settings, "model_name", m->dir,
        "date", (json_int_t)start, "total_evaluation_time_seconds", now() - r.began, "max_length",
        (json_int_t)m->g->config.max_position_embeddings, "prompts_cut", (json_int_t)r.cut,
        "passes", (json_int_t)r.counts.passes, "rows_computed", (json_int_t)r.counts.rows,
        "rows_shared", (json_int_t)r.counts.reused);
    if (o->out) {
        char *path = must_format("%s/results.json", o->out);
        json_t *json = results_json(results, o->bootstrap);
        char *page = must_format("%s/report.html", o->out);
        status = json_write(json, path);
        if (status == OK) status = report_write(results, json, page);
        json_decref(json);
        free(path);
        free(page);
    }
done:
    json_decref(settings);
    run_free(&r);
    return status;
}
