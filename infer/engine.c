/* engine.c - planning a pass, running it, and reading its logits. */
#include "infer/engine.h"
#include "kernels/elementwise.h"
#include "kernels/loss.h"
#include "kernels/quantize.h"
#include "kernels/random.h"
#include "kernels/sampling.h"
#include "model/stack.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Pages by which the tables of pages grow. */
#define TABLE_PAGES 16

/* Prompts in line that are looked at when there is room for one. */
#define LINE_LOOKED_AT 64

/* Sliding pages kept beyond what running sequences need, so that prompts find their window. */
#define SPARE_PAGES 256

Status kv_dtype(DType *kv, const Gemma *g, const char *name) {
    *kv = g->dtype;
    if (!name || !strcmp(name, dtype_name(g->dtype))) return OK;
    if (strcmp(name, "q8_0") && strcmp(name, "q4_0"))
        FAIL(ERR_USAGE, "--kv is '%s', expected %s, q8_0 or q4_0", name, dtype_name(g->dtype));
    *kv = strcmp(name, "q8_0") ? Q4_0 : Q8_0;
    return OK;
}

/* ---- memory ---- */

static void page_totals(const Engine *e, int64_t total[ATTENTION_KINDS]) {
    const EngineOptions *o = &e->options;
    int64_t window = e->g->config.sliding_window / PAGE_KEYS + 3 + (o->draft + 1) / PAGE_KEYS + 1;
    total[FULL] = (o->tokens + PAGE_KEYS - 1) / PAGE_KEYS;
    total[SLIDING] = o->sequences * window + o->chunk / PAGE_KEYS + 1;
    total[SLIDING] += total[FULL] < SPARE_PAGES ? total[FULL] : SPARE_PAGES;
}

static void place_slots(Engine *e, Arena *arena) {
    for (int l = 0; l < e->g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &e->g->blocks[l].config;
        if (!c->owns_kv) continue;
        e->slots[l].k = ARENA_TENSOR(arena, e->options.kv, e->pages.total[c->kind] * PAGE_KEYS,
                                     c->num_key_value_heads, c->head_dim);
        e->slots[l].v = arena_like(arena, e->slots[l].k);
    }
}

static void place_states(Engine *e, Arena *arena) {
    if (!e->options.drafter) return;
    e->states = ARENA_TENSOR(arena, e->g->dtype, e->options.sequences, e->g->config.hidden_size);
    e->guessing = arena_like(arena, e->states);
    e->seat_rows = ARENA_TENSOR(arena, I32, e->options.sequences);
}

static void head(Engine *e, Stack *s, int64_t first, Tensor z) {
    project(z, tensor_slice(s->final, first, z.shape[0]), stack_table(s), s->pass.int8);
    softcap_forward(z, (float)e->g->config.final_logit_softcapping);
}

/* The most that passes of up to `chunk` rows take. */
static void measure(Engine *e, const KvCache *cache, size_t *activations, size_t *scratch) {
    *activations = *scratch = 0;
    for (int64_t N = 1;; N = 2 * N < e->options.chunk ? 2 * N : e->options.chunk) {
        for (int64_t kept = N; kept >= N - 1 && kept > 0; kept--) {
            Stack s;
            Arena place = arena_measure(), temporary = arena_measure();
            stack_open(&s, e->g, STACK_SCORE, N, kept, cache, &temporary);
            stack_place(&s, &place);
            stack_forward(&s);
            int64_t rows = kept < HEAD_ROWS ? kept : HEAD_ROWS;
            Reading r;
            reading_reserve(&r, NULL, &temporary, rows, CANDIDATES_MAX, e->g->config.vocab_size);
            head(e, &s, 0, r.z);
            stack_close(&s);
            if (place.peak > *activations) *activations = place.peak;
            if (temporary.peak > *scratch) *scratch = temporary.peak;
        }
        if (N == e->options.chunk) return;
    }
}

Status engine_init(Engine *e, Gemma *g, const Tokenizer *tokenizer, const EngineOptions *options) {
    *e = (Engine){.g = g, .tokenizer = tokenizer, .options = *options};
    CHECK(options->sequences > 0 && options->tokens > 0 && options->draft <= DRAFT_MAX &&
              options->chunk >= options->sequences * (options->drafter ? options->draft + 1 : 1),
          "engine options");
    Status status = OK;
    int64_t total[ATTENTION_KINDS];
    for (const Linear *l = g->linears.first; l; l = l->next)
        for (const Lora *lora = l->lora; lora; lora = lora->next) {
            e->adapters = lora->number > e->adapters ? lora->number : e->adapters;
            e->apart |= l->groups > 1;
        }
    for (int l = 0; l < e->g->config.num_hidden_layers; l++)
        if (!dtype_fits(options->kv, 1, e->g->blocks[l].config.head_dim))
            FAIL(ERR_CONFIG, "heads of %" PRId64 " numbers do not fit blocks of %s",
                 e->g->blocks[l].config.head_dim, dtype_name(options->kv));
    page_totals(e, total);
    /* A drafter's sliding layers see one key more. */
    pages_init(&e->pages, total, e->g->config.sliding_window + 1, options->share);
    e->slots = must_calloc((size_t)e->g->config.num_hidden_layers, sizeof *e->slots);
    e->running = must_calloc((size_t)options->sequences, sizeof *e->running);
    e->seats = must_calloc((size_t)options->sequences, sizeof *e->seats);
    reading_memory_init(&e->reading, e->g->config.vocab_size);
    Arena measured = arena_measure();
    place_slots(e, &measured);
    place_states(e, &measured);
    size_t activations, scratch;
    measure(e, &(KvCache){e->slots, options->sequences, total[FULL]}, &activations, &scratch);
    TRY_DONE(arena_init(&e->cache, e->g->device, measured.peak, "the key and value cache"));
    TRY_DONE(arena_init(&e->activations, e->g->device, activations, "the activations"));
    TRY_DONE(arena_init(&e->scratch, e->g->device, scratch, "temporaries"));
    place_slots(e, &e->cache);
    place_states(e, &e->cache);
    if (options->drafter)
        TRY_DONE(drafter_reserve(options->drafter, options->sequences,
                                 &(KvCache){e->slots, options->sequences, total[FULL]}));
done:
    if (status != OK) engine_free(e);
    return status;
}

static void sequence_free(Sequence *s) {
    page_list_free(&s->pages);
    stream_free(&s->stream);
    grammar_end(&s->form_state);
    for (int i = 0; i < s->request.stop_text_count; i++) free((void *)s->request.stop_texts[i]);
    free((void *)s->request.stop_texts);
    free((void *)s->request.candidates);
    free((void *)s->request.media);
    free(s->ids);
    free(s->keys);
    free(s->logprobs);
    free(s->best);
    free(s->candidate_logprobs);
    free(s->candidate_best);
    free(s->tops);
    free(s);
}

void engine_free(Engine *e) {
    while (e->running_count) engine_drop(e, e->running[0]);
    while (e->line) engine_drop(e, e->line);
    pages_free(&e->pages);
    arena_free(&e->cache);
    arena_free(&e->activations);
    arena_free(&e->scratch);
    reading_memory_free(&e->reading);
    free(e->slots);
    free(e->running);
    free(e->seats);
    *e = (Engine){0};
}

/* ---- coming and going ---- */

static void *copied(const void *from, size_t count, size_t size) {
    void *to = must_calloc(count + 1, size);
    if (count) memcpy(to, from, count * size);
    return to;
}

/* Room for one more token. */
static void grow(Sequence *s) {
    if (s->count < s->capacity) return;
    s->capacity = 2 * s->capacity < s->limit ? 2 * s->capacity : s->limit;
    size_t n = (size_t)s->capacity;
    s->ids = must_realloc(s->ids, n * sizeof *s->ids);
    s->keys = must_realloc(s->keys, n * sizeof *s->keys);
    s->logprobs = must_realloc(s->logprobs, n * sizeof *s->logprobs);
    s->best = must_realloc(s->best, n);
    if (s->request.top_logprobs)
        s->tops = must_realloc(s->tops, n * (size_t)s->request.top_logprobs * sizeof *s->tops);
}

/* Slots of other content are other tokens to whoever shares pages. */
static void set_keys(Sequence *s) {
    memcpy(s->keys, s->ids, (size_t)s->count * sizeof *s->keys);
    for (int64_t i = 0; i < s->request.media_count; i++) {
        const MediaItem *item = &s->request.media[i];
        for (int64_t n = 0; n < item->count; n++)
            s->keys[item->first + n] =
                -1 - (int32_t)(random_u64(item->key, (uint64_t)n) & 0x3fffffff);
    }
}

/* The picture whose rows see each other and that token `at` is one of; NULL: none. */
static const MediaItem *span_of(const Engine *e, const Sequence *s, int64_t at) {
    if (e->g->config.use_bidirectional_attention == BIDIRECTIONAL_NONE) return NULL;
    for (int64_t i = 0; i < s->request.media_count; i++) {
        const MediaItem *item = &s->request.media[i];
        if (item->height && at >= item->first && at < item->first + item->count) return item;
    }
    return NULL;
}

static Status check_media(const Engine *e, const Request *r) {
    int64_t at = 0;
    for (int64_t i = 0; i < r->media_count; i++) {
        const MediaItem *item = &r->media[i];
        CHECK(item->first >= at && item->first + item->count <= r->count &&
                  tensor_present(item->soft),
              "media of a request");
        at = item->first + item->count;
        bool whole = item->height && e->g->config.use_bidirectional_attention;
        int64_t room = e->options.chunk - e->options.sequences + 1; /* others are answering */
        if (whole && item->count > room)
            FAIL(ERR_CONFIG,
                 "a picture of %" PRId64 " soft tokens does not fit the %" PRId64
                 " rows that a pass has for it",
                 item->count, room);
    }
    return OK;
}

/* From here on the answer is held to a form. */
static void hold_to(Sequence *s, const Grammar *form) {
    s->form = form;
    grammar_begin(form, &s->form_state);
}

Status engine_submit(Engine *e, Sequence **out, const Request *r) {
    int64_t most = e->g->config.max_position_embeddings, wanted = r->sampling.max_tokens;
    int64_t least = r->count + (wanted > 0) - (!wanted && !r->candidate_count); /* go through */
    TRY(sampling_check(&r->sampling));
    if (r->top_logprobs < 0 || r->top_logprobs > TOP_LOGPROBS_MAX)
        FAIL(ERR_USAGE, "top_logprobs is %d, expected 0 to %d", r->top_logprobs, TOP_LOGPROBS_MAX);
    if (r->adapter < 0 || r->adapter > e->adapters)
        FAIL(ERR_USAGE, "adapter %d of %d", r->adapter, e->adapters);
    if ((r->grammar || r->call_grammar) && !e->tokenizer)
        FAIL(ERR_USAGE, "a grammar speaks of texts: the engine needs a tokenizer");
    if (r->count < 1) FAIL(ERR_CONFIG, "the prompt is empty");
    TRY(check_media(e, r));
    if (least > most)
        FAIL(ERR_CONFIG,
             "the prompt has %" PRId64 " tokens, the model takes %" PRId64
             " (max_position_embeddings)",
             r->count, most);
    if (least > e->options.tokens)
        FAIL(ERR_CONFIG, "the prompt has %" PRId64 " tokens, the cache holds %" PRId64, r->count,
             e->options.tokens);
    for (int64_t i = 0; i < r->count; i++)
        if (r->ids[i] < 0 || r->ids[i] >= e->g->config.vocab_size)
            FAIL(ERR_CONFIG, "token %d of the prompt is not in the vocabulary", (int)r->ids[i]);
    if (most > e->options.tokens) most = e->options.tokens;
    Sequence *s = must_calloc(1, sizeof *s);
    s->request = *r;
    s->request.candidates = copied(r->candidates, (size_t)r->candidate_count, sizeof(int32_t));
    const char **texts = must_calloc((size_t)r->stop_text_count + 1, sizeof *texts);
    for (int i = 0; i < r->stop_text_count; i++) texts[i] = must_strdup(r->stop_texts[i]);
    s->request.stop_texts = texts;
    s->candidate_logprobs = must_calloc((size_t)r->candidate_count + 1, sizeof(float));
    s->candidate_best = must_calloc((size_t)r->candidate_count + 1, sizeof(bool));
    s->limit = wanted == 0 ? r->count : wanted < most - r->count ? r->count + wanted : most;
    s->count = s->capacity = r->count;
    s->ids = copied(r->ids, (size_t)r->count, sizeof *r->ids);
    s->request.ids = s->ids;
    s->request.media = copied(r->media, (size_t)r->media_count, sizeof *r->media);
    s->keys = must_malloc((size_t)r->count * sizeof *s->keys);
    set_keys(s);
    s->logprobs = must_malloc((size_t)r->count * sizeof *s->logprobs);
    s->best = must_calloc((size_t)r->count, 1);
    for (int64_t i = 0; i < r->count; i++) s->logprobs[i] = NAN;
    s->scored = r->score_from > 0 ? r->score_from : r->count;
    s->stream.tokenizer = e->tokenizer;
    page_list_init(&s->pages, s->limit);
    if (r->grammar) hold_to(s, r->grammar);
    Sequence **end = &e->line;
    while (*end) end = &(*end)->next;
    *out = *end = s;
    return OK;
}

static void leave_line(Engine *e, Sequence *s) {
    Sequence **at = &e->line;
    while (*at && *at != s) at = &(*at)->next;
    if (*at) *at = s->next;
    s->next = NULL;
}

static void leave_running(Engine *e, Sequence *s) {
    int64_t kept = 0;
    for (int64_t i = 0; i < e->running_count; i++)
        if (e->running[i] != s) e->running[kept++] = e->running[i];
    e->running_count = kept;
    e->seats[s->seat] = false;
    s->running = false;
    pages_release(&e->pages, &s->pages);
}

void engine_drop(Engine *e, Sequence *s) {
    if (s->running)
        leave_running(e, s);
    else
        leave_line(e, s);
    sequence_free(s);
}

static void end(Engine *e, Sequence *s, Ending ending) {
    s->ending = ending;
    if (s->running) {
        pages_advance(&e->pages, &s->pages, s->keys, s->done, s->request.adapter, true);
        leave_running(e, s);
    } else {
        leave_line(e, s);
    }
    if (s->request.on_token) s->request.on_token(s->request.context, s);
}

/* How many tokens go through the model: guesses after the last one, and that itself only where
 * something after it is wanted. */
static int64_t to_feed(const Sequence *s) {
    bool after = s->request.sampling.max_tokens > 0 || s->request.candidate_count > 0;
    return (after || s->count == 1 ? s->count : s->count - 1) + s->guess_count;
}

/* A token of the sequence, or one that is guessed to follow. */
static int32_t token_at(const Sequence *s, int64_t at) {
    return at < s->count ? s->ids[at] : s->guesses[at - s->count];
}

/* Whether it takes part in a pass with its last token, and guesses, alone. */
static bool is_answering(const Sequence *s) {
    return to_feed(s) - s->done == 1 + s->guess_count;
}

/* The first token whose keys are needed for what is wanted of the prompt. */
static int64_t reusable(const Sequence *s) {
    return s->scored < s->count ? s->scored - 1 : to_feed(s) - 1;
}

/* Whether a running sequence is about to compute more of this prompt's beginning than `found`. */
static bool worth_waiting(const Engine *e, const Sequence *s, int64_t found) {
    int64_t most = reusable(s);
    for (int64_t i = 0; i < e->running_count && e->options.share; i++) {
        const Sequence *other = e->running[i];
        int64_t n = 0;
        if (other->request.adapter != s->request.adapter) continue;
        while (n < most && n < other->request.count && other->keys[n] == s->keys[n]) n++;
        n = n / PAGE_KEYS * PAGE_KEYS;
        if (n > found && n > other->done) return true;
    }
    return false;
}

/* Fills a page that begins like another's. */
static void copy_page(Engine *e, const PageCopy *copy) {
    for (int l = 0; l < e->g->config.num_hidden_layers; l++) {
        const BlockConfig *c = &e->g->blocks[l].config;
        if (!c->owns_kv) continue;
        Tensor parts[] = {e->slots[l].k, e->slots[l].v};
        for (int i = 0; i < 2; i++) {
            int32_t rows[PAGE_KEYS];
            for (int j = 0; j < PAGE_KEYS; j++) rows[j] = copy->to[c->kind] * PAGE_KEYS + j;
            store_rows(parts[i],
                       tensor_slice(parts[i], (int64_t)copy->from[c->kind] * PAGE_KEYS, PAGE_KEYS),
                       TENSOR(rows, I32, PAGE_KEYS));
        }
    }
}

/* Lets sequences in while there is room for them. */
static void admit(Engine *e) {
    Sequence *s = e->line;
    for (int looked = 0; s && looked < LINE_LOOKED_AT && e->running_count < e->options.sequences;
         looked++) {
        Sequence *next = s->next;
        PageCopy copy;
        int64_t found =
            pages_match(&e->pages, &s->pages, s->keys, reusable(s), s->request.adapter, &copy);
        bool wait = worth_waiting(e, s, found / PAGE_KEYS * PAGE_KEYS);
        int64_t feed = to_feed(s);
        int64_t want = feed - found < e->options.chunk ? feed : found + e->options.chunk;
        if (wait || (!pages_extend(&e->pages, &s->pages, want) && e->running_count)) {
            pages_release(&e->pages, &s->pages);
            if (!wait) return; /* no room: nobody overtakes */
        } else {
            if (copy.wanted) copy_page(e, &copy);
            leave_line(e, s);
            s->done = found;
            s->reused = found < s->request.count ? found : s->request.count;
            e->counts.reused += found;
            s->running = true;
            for (s->seat = 0; e->seats[s->seat];) s->seat++;
            e->seats[s->seat] = true;
            e->running[e->running_count++] = s;
        }
        s = next;
    }
}

/* The youngest starts again, first in line, with what it has answered as part of its prompt. */
static void restart(Engine *e, Sequence *s) {
    pages_advance(&e->pages, &s->pages, s->keys, s->done, s->request.adapter, false);
    leave_running(e, s);
    s->done = s->guess_count = 0;
    s->next = e->line;
    e->line = s;
    e->counts.restarts++;
}

/* ---- a pass ---- */

/* What a sequence has in a pass: tokens done .. done + rows - 1. */
typedef struct Share {
    Sequence *s;
    int64_t rows;
} Share;

/* A row whose logits are wanted: those after token `at` of its sequence. */
typedef struct Wanted {
    Sequence *s;
    int64_t at;
    int32_t row;
    int64_t given; /* tokens of the sequence when the pass began; guesses follow */
} Wanted;

/* Where adapters cannot share a pass they take turns: the next one that has a sequence running. */
static int next_turn(Engine *e) {
    for (int step = 1; step <= e->adapters + 1; step++) {
        int adapter = (e->turn + step) % (e->adapters + 1);
        for (int64_t i = 0; i < e->running_count; i++)
            if (e->running[i]->request.adapter == adapter) return adapter;
    }
    return e->turn;
}

static int by_adapter(const void *a, const void *b) {
    const Share *x = a, *y = b;
    if (x->s->request.adapter != y->s->request.adapter)
        return x->s->request.adapter < y->s->request.adapter ? -1 : 1;
    return x < y ? -1 : x > y;
}

/* So many next rows, or fewer: no picture is cut whose rows see each other. */
static int64_t whole_spans(const Engine *e, const Sequence *s, int64_t rows) {
    int64_t cut = s->done + rows;
    const MediaItem *span = span_of(e, s, cut);
    if (!span || cut == span->first) return rows;
    return span->first > s->done ? span->first - s->done : 0;
}

/* Shares of the running sequences, the oldest first; younger ones make room when pages run out. */
static int64_t share_out(Engine *e, Share *shares) {
    int64_t room = e->options.chunk, count = 0;
    if (e->apart) e->turn = next_turn(e);
    for (int64_t i = 0; i < e->running_count; i++)
        room -= is_answering(e->running[i]) ? 1 + e->running[i]->guess_count : 0;
    for (int64_t i = 0; i < e->running_count; i++) {
        Sequence *s = e->running[i];
        if (e->apart && s->request.adapter != e->turn) continue;
        int64_t rows = to_feed(s) - s->done;
        if (!is_answering(s)) {
            if (rows > room) rows = whole_spans(e, s, room);
            room -= rows;
        }
        if (!rows) continue;
        while (!pages_extend(&e->pages, &s->pages, s->done + rows)) {
            Sequence *youngest = e->running[e->running_count - 1];
            CHECK(youngest != s || i > 0, "the cache is too small for one sequence");
            restart(e, youngest);
            if (youngest == s) goto done;
        }
        shares[count++] = (Share){s, rows};
    }
done:
    if (e->adapters) qsort(shares, (size_t)count, sizeof *shares, by_adapter);
    return count;
}

/* Where the rows of each adapter begin: of all rows, or of those that go on. */
static void list_adapters(Engine *e, Stack *stack, const Share *shares, int64_t count,
                          const Wanted *wanted, int64_t wanted_count, int64_t *all, int64_t *some) {
    if (!e->adapters) return;
    memset(all, 0, (size_t)(e->adapters + 2) * sizeof *all);
    memset(some, 0, (size_t)(e->adapters + 2) * sizeof *some);
    for (int64_t i = 0; i < count; i++) all[shares[i].s->request.adapter + 1] += shares[i].rows;
    for (int64_t i = 0; i < wanted_count; i++) some[wanted[i].s->request.adapter + 1]++;
    if (!wanted_count) some[shares[count - 1].s->request.adapter + 1] = 1;
    for (int a = 0; a <= e->adapters; a++) {
        all[a + 1] += all[a];
        some[a + 1] += some[a];
    }
    stack->all.adapters = all;
    stack->some.adapters = stack->kept == stack->N ? all : some;
}

static bool wants(const Sequence *s, int64_t at) {
    if (at + 1 < s->count) return at + 1 >= s->scored;
    if (at + 1 > s->count) return true; /* behind a guess */
    return s->request.sampling.max_tokens > 0 || s->request.candidate_count > 0;
}

static int64_t list_wanted(Wanted *wanted, const Share *shares, int64_t count) {
    int64_t n = 0;
    int32_t row = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < shares[i].rows; k++, row++)
            if (wants(shares[i].s, shares[i].s->done + k))
                wanted[n++] = (Wanted){shares[i].s, shares[i].s->done + k, row, shares[i].s->count};
    return n;
}

/* Where the host writes the integers of some rows. */
typedef struct RowInputs {
    int32_t *sequence;
    int32_t *index[ATTENTION_KINDS], *first[ATTENTION_KINDS], *last[ATTENTION_KINDS],
        *place[ATTENTION_KINDS];
} RowInputs;

static RowInputs inputs_of(const Staging *in, const Rows *rows) {
    RowInputs out = {.sequence = staged(in, rows->sequence)};
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        out.index[kind] = staged(in, rows->index[kind]);
        out.first[kind] = staged(in, rows->first[kind]);
        out.last[kind] = staged(in, rows->last[kind]);
        out.place[kind] = staged(in, rows->place[kind]);
    }
    return out;
}

static void fill_pages(Stack *s, const Share *shares, int64_t count) {
    for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
        int32_t *table = staged(&s->inputs, s->all.pages[kind]);
        int64_t columns = tensor_cols(s->all.pages[kind]);
        for (int64_t i = 0; i < count; i++)
            memcpy(table + i * columns, shares[i].s->pages.page[kind],
                   (size_t)shares[i].s->pages.count * sizeof *table);
    }
}

static void fill_rows(Engine *e, Stack *s, const Share *shares, int64_t count) {
    int64_t W = e->g->config.sliding_window, n = 0;
    const Staging *in = &s->inputs;
    int32_t *ids = staged(in, s->ids), *positions = staged(in, s->positions);
    RowInputs rows = inputs_of(in, &s->all);
    fill_pages(s, shares, count);
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < shares[i].rows; k++, n++) {
            const Sequence *owner = shares[i].s;
            int64_t at = owner->done + k;
            ids[n] = token_at(owner, at);
            positions[n] = (int32_t)at;
            rows.sequence[n] = (int32_t)i;
            const MediaItem *span = span_of(e, owner, at);
            bool all = e->g->config.use_bidirectional_attention == BIDIRECTIONAL_ALL;
            for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
                int64_t first = kind == SLIDING && at - W + 1 > 0 ? at - W + 1 : 0, last = at;
                if (span && (all || kind == SLIDING)) last = span->first + span->count - 1;
                if (span && all && span->first < first) first = span->first;
                rows.index[kind][n] = (int32_t)at;
                rows.last[kind][n] = (int32_t)last;
                rows.first[kind][n] = (int32_t)first;
                rows.place[kind][n] =
                    owner->pages.page[kind][at / PAGE_KEYS] * PAGE_KEYS + (int32_t)(at % PAGE_KEYS);
            }
        }
}

/* What of the pass's rows are slots; their ids become padding. Caller frees the list. */
static MediaItem *place_media(const Engine *e, Stack *stack, const Share *shares, int64_t count) {
    int32_t *ids = staged(&stack->inputs, stack->ids);
    int64_t most = 0, row = 0;
    for (int64_t i = 0; i < count; i++) most += shares[i].s->request.media_count;
    if (!most) return NULL;
    MediaItem *list = must_calloc((size_t)most, sizeof *list);
    stack->media = list;
    for (int64_t i = 0; i < count; row += shares[i].rows, i++) {
        const Sequence *s = shares[i].s;
        for (int64_t k = 0; k < s->request.media_count; k++) {
            const MediaItem *item = &s->request.media[k];
            int64_t begin = item->first > s->done ? item->first : s->done,
                    end = item->first + item->count;
            if (end > s->done + shares[i].rows) end = s->done + shares[i].rows;
            if (begin >= end) continue;
            list[stack->media_count++] =
                (MediaItem){.first = row + begin - s->done,
                            .count = end - begin,
                            .soft = tensor_slice(item->soft, begin - item->first, end - begin)};
            for (int64_t n = begin; n < end; n++)
                ids[row + n - s->done] = (int32_t)e->g->config.pad_token_id;
        }
    }
    return list;
}

/* The rows that go on past the last layer that owns keys. */
static void fill_some(Stack *s, const Wanted *wanted, int64_t count) {
    if (s->kept == s->N) return;
    RowInputs all = inputs_of(&s->inputs, &s->all), some = inputs_of(&s->inputs, &s->some);
    int32_t *source = staged(&s->inputs, s->some.source);
    for (int64_t i = 0; i < s->kept; i++) {
        int32_t row = count ? wanted[i].row : (int32_t)(s->N - 1);
        source[i] = row;
        some.sequence[i] = all.sequence[row];
        for (int kind = 0; kind < ATTENTION_KINDS; kind++) {
            some.index[kind][i] = all.index[kind][row];
            some.first[kind][i] = all.first[kind][row];
            some.last[kind][i] = all.last[kind][row];
        }
    }
}

/* ---- reading logits ---- */

/* Whether the answer's text holds a stop text, and what is left before it. */
static bool stopped_by_text(Sequence *s, size_t before) {
    size_t first = s->stream.text.size;
    for (int i = 0; i < s->request.stop_text_count; i++) {
        size_t size = strlen(s->request.stop_texts[i]),
               from = before + 1 > size ? before + 1 - size : 0;
        Slice text = {s->stream.text.bytes, s->stream.text.size};
        size_t at = size ? slice_find(text, s->request.stop_texts[i], from) : text.size;
        if (at < first) first = at;
    }
    s->text_size = first;
    return first < s->stream.text.size;
}

/* What a stop text may begin with at the end of the answer so far does not count yet. */
static void hold_back(Sequence *s) {
    Slice text = {s->stream.text.bytes, s->text_size};
    for (int i = 0; i < s->request.stop_text_count; i++) {
        const char *stop = s->request.stop_texts[i];
        size_t most = strlen(stop);
        for (size_t n = most < text.size ? most : text.size; n > 0; n--)
            if (n < most && !memcmp(text.bytes + text.size - n, stop, n)) {
                if (text.size - n < s->text_size) s->text_size = text.size - n;
                break;
            }
    }
}

static void add_token(Sequence *s, int32_t id, float logprob, bool best) {
    grow(s);
    s->request.ids = s->ids;
    s->ids[s->count] = s->keys[s->count] = id;
    s->logprobs[s->count] = logprob;
    s->best[s->count++] = best;
    s->scored = s->count;
}

/* Whether tokens must fit a form now: within thoughts they need not. */
static bool is_held(const Sequence *s) {
    return s->form && !s->thought;
}

static bool may_think(const Sequence *s) {
    return s->request.thinks && s->request.thought_begin > 0 && s->count == s->request.count;
}

/* An answer that must still become something does not end within a thought. */
static bool may_come(const Engine *e, const Sequence *s, int32_t id) {
    bool stop = sampling_stops(&s->request.sampling, id);
    if (!s->form) return true;
    if (s->thought) return !stop;
    if (id == s->request.thought_begin && may_think(s)) return true;
    if (stop && grammar_complete(&s->form_state)) return true;
    return grammar_allows(s->form, &s->form_state, e->tokenizer, id);
}

/* Row i on the host with the request's penalties in it. */
static float *edited(const Sequence *s, Reading *r, int64_t i) {
    float *row = reading_edit(r, i);
    sampler_edit(&s->request.sampling, row, tensor_cols(r->z), s->ids, s->count);
    return row;
}

/* A token that fits the form, instead of one that does not: drawn anew among those that do, which
 * together is a draw among those from the start. -1: none fits. */
static int32_t pick_fitting(const Engine *e, const Sequence *s, Reading *r, Candidates *c,
                            int64_t i) {
    const Sampling *sampling = &s->request.sampling;
    float *changed = edited(s, r, i);
    float think = may_think(s) ? changed[s->request.thought_begin] : 0;
    if (s->thought)
        for (int k = 0; k < sampling->stop_count; k++) changed[sampling->stops[k]] = -INFINITY;
    else
        grammar_mask(s->form, &s->form_state, e->tokenizer, sampling->stops, sampling->stop_count,
                     changed, tensor_cols(r->z));
    if (may_think(s)) changed[s->request.thought_begin] = think;
    reading_changed(r, c, i);
    if (c->values[0] == -INFINITY) return -1;
    return sampler_pick(sampling, c, ~sequence_answered(s));
}

/* A token of an answer is there: where the answer now is in what it is held to. */
static void follow_form(const Engine *e, Sequence *s, int32_t id) {
    bool thinks =
        id == s->request.thought_begin && s->request.thinks && s->count == s->request.count + 1;
    if (is_held(s) && !thinks) {
        grammar_take(s->form, &s->form_state, e->tokenizer, id);
        if (s->form == s->request.call_grammar && grammar_complete(&s->form_state)) s->form = NULL;
    } else if (!s->thought && s->request.call_grammar && id == s->request.call_begin) {
        hold_to(s, s->request.call_grammar);
    }
}

/* The next token of an answer, from row i. */
static void answer(Engine *e, Sequence *s, Reading *r, int64_t i) {
    const Sampling *sampling = &s->request.sampling;
    int64_t index = sequence_answered(s);
    Candidates c = reading_candidates(r, i);
    int32_t best = c.ids[0];
    float log_sum = r->host_lse[2 * i];
    grow(s); /* room for the tops too */
    for (int t = 0; t < s->request.top_logprobs; t++)
        s->tops[index * s->request.top_logprobs + t] =
            (TokenChoice){c.ids[t], c.values[t] - log_sum};
    if (sampler_edits(sampling)) {
        edited(s, r, i);
        reading_changed(r, &c, i);
    }
    int32_t id = sampler_pick(sampling, &c, index);
    if (!may_come(e, s, id)) id = pick_fitting(e, s, r, &c, i);
    if (id < 0) {
        end(e, s, ENDING_LENGTH);
        return;
    }
    if (s->request.thought_most && s->thought > s->request.thought_most)
        id = s->request.thought_end;
    add_token(s, id, reading_logit(r, i, id) - log_sum, id == best);
    bool stop = sampling_stops(sampling, id), quiet = s->thought > 0;
    size_t before = s->stream.text.size;
    if (!stop) follow_form(e, s, id);
    if (s->request.thought_begin && id == s->request.thought_begin)
        s->thought = 1;
    else if (id == s->request.thought_end)
        s->thought = 0;
    else if (s->thought)
        s->thought++;
    if (!stop && e->tokenizer) stream_add(&s->stream, id);
    bool last = stop || s->count == s->limit || sequence_answered(s) == sampling->max_tokens;
    if (last && e->tokenizer) stream_end(&s->stream);
    s->text_size = s->stream.text.size;
    if (s->stream.text.size > before && !quiet && !s->thought) stop |= stopped_by_text(s, before);
    if (!stop && !last && !quiet) hold_back(s);
    if (stop || last)
        end(e, s, stop ? ENDING_STOP : ENDING_LENGTH);
    else if (s->request.on_token)
        s->request.on_token(s->request.context, s);
}

/* What is wanted of one row: the log-probability of the prompt's next token, those of candidates,
 * a token of the answer. */
static void read_row(Engine *e, const Stack *stack, const Wanted *w, Reading *r, int64_t i,
                     int64_t row) {
    float lse = r->host_lse[2 * i];
    int32_t best = r->host_ids[i * tensor_cols(r->values)];
    Sequence *s = w->s;
    if (w->at + 1 < s->request.count) {
        int32_t id = s->ids[w->at + 1];
        s->logprobs[w->at + 1] = r->host_asked[i] - lse;
        s->best[w->at + 1] = id == best;
        s->scored = w->at + 2;
        return;
    }
    if (s->ending != ENDING_NONE || w->at + 1 != s->count) return; /* a guess before it was wrong */
    if (w->at >= w->given && s->ids[w->at] != s->guesses[w->at - w->given]) return;
    s->checked += w->at >= w->given;
    for (int c = 0; c < s->request.candidate_count && s->count == s->request.count; c++) {
        s->candidate_logprobs[c] = reading_logit(r, i, s->request.candidates[c]) - lse;
        s->candidate_best[c] = s->request.candidates[c] == best;
    }
    s->done = w->at + 1;
    if (s->request.sampling.max_tokens > 0) {
        if (e->options.drafter)
            scale_copy(tensor_slice(e->states, s->seat, 1), SET, tensor_slice(stack->final, row, 1),
                       1.0f);
        answer(e, s, r, i);
    }
}

static void read_logits(Engine *e, Stack *stack, const Wanted *wanted, int64_t count) {
    int64_t k = 1, V = e->g->config.vocab_size;
    for (int64_t i = 0; i < count; i++) {
        const Request *r = &wanted[i].s->request;
        int64_t need = sampler_candidates(&r->sampling, V);
        if (r->top_logprobs > need) need = r->top_logprobs;
        if (need > k) k = need;
    }
    for (int64_t first = 0; first < count; first += HEAD_ROWS) {
        int64_t n = count - first < HEAD_ROWS ? count - first : HEAD_ROWS;
        size_t mark = arena_mark(&e->scratch);
        Reading r;
        float scale[HEAD_ROWS];
        int32_t next[HEAD_ROWS];
        reading_reserve(&r, &e->reading, &e->scratch, n, k, V);
        for (int64_t i = 0; i < n; i++) {
            const Wanted *w = &wanted[first + i];
            double t = w->s->request.sampling.temperature;
            scale[i] = t > 0 ? (float)(1 / t) : 1.0f;
            next[i] = w->at + 1 < w->s->request.count ? w->s->ids[w->at + 1] : -1;
        }
        head(e, stack, first, r.z);
        reading_read(&r, scale, next);
        for (int64_t i = 0; i < n; i++) read_row(e, stack, &wanted[first + i], &r, i, first + i);
        arena_release(&e->scratch, mark);
    }
}

static void drop_cancelled(Engine *e) {
    for (int64_t i = e->running_count; i-- > 0;)
        if (e->running[i]->cancelled) end(e, e->running[i], ENDING_CANCELLED);
    for (Sequence *s = e->line, *next; s; s = next) {
        next = s->next;
        if (s->cancelled) end(e, s, ENDING_CANCELLED);
    }
}

/* The drafter's guesses for every sequence that is answering. Where room ends there are fewer. */
static void guess(Engine *e) {
    int64_t n = 0, steps = e->options.draft, W = e->g->config.sliding_window;
    int64_t who[e->options.sequences];
    int32_t seats[e->options.sequences];
    int32_t out[e->options.sequences * DRAFT_MAX];
    DraftRow rows[e->options.sequences];
    for (int64_t i = 0; i < e->running_count; i++) {
        Sequence *s = e->running[i];
        int64_t position = s->count - 1;
        if (s->done != position || s->count == s->request.count || s->limit - s->count < 1)
            continue;
        seats[n] = (int32_t)s->seat;
        rows[n] = (DraftRow){.token = s->ids[position],
                             .position = position,
                             .sliding_first = position > W ? position - W : 0,
                             .pages = {s->pages.page[0], s->pages.page[1]},
                             .page_count = s->pages.count};
        who[n++] = i;
    }
    if (!n) return;
    Tensor hidden = tensor_slice(e->guessing, 0, n);
    tensor_write(tensor_slice(e->seat_rows, 0, n), seats);
    gather_rows(hidden, e->states, tensor_slice(e->seat_rows, 0, n));
    drafter_guess(e->options.drafter, e->slots, rows, n, steps, hidden, out);
    for (int64_t k = 0; k < n; k++) {
        Sequence *s = e->running[who[k]];
        int64_t most = s->limit - s->count,
                left = s->request.sampling.max_tokens - sequence_answered(s) - 1;
        if (left < most) most = left;
        s->guess_count = (int)(most < 0 ? 0 : most < steps ? most : steps);
        memcpy(s->guesses, out + k * steps, (size_t)s->guess_count * sizeof *s->guesses);
    }
}

/* The pass itself. One token of each sequence comes again and again with the same tensors in the
 * same places, which a device may keep. */
static void forward(Engine *e, Stack *s, const KvCache *cache) {
    Device *device = e->g->device;
    const void *places[] = {e->activations.base, e->scratch.base, e->cache.base};
    uint64_t key = 0;
    const int64_t sizes[] = {s->N, s->kept, cache->sequences, cache->pages};
    for (int i = 0; i < 3; i++) key = random_mix(key ^ (uint64_t)(uintptr_t)places[i]);
    for (int i = 0; i < 4; i++) key = random_mix(key ^ (uint64_t)sizes[i]);
    bool again = s->N == cache->sequences && !e->adapters && !s->media_count;
    if (again && device_replay(device, key)) return;
    stack_forward(s);
    if (again) device_recorded(device);
}

bool engine_step(Engine *e) {
    drop_cancelled(e);
    admit(e);
    if (!e->running_count) return false;
    Share shares[e->options.sequences];
    int64_t all_adapters[e->adapters + 2], some_adapters[e->adapters + 2];
    Wanted *wanted = must_malloc((size_t)e->options.chunk * sizeof *wanted);
    int64_t count = share_out(e, shares), n = 0, pages = 1;
    for (int64_t i = 0; i < count; i++) {
        n += shares[i].rows;
        if (shares[i].s->pages.count > pages) pages = shares[i].s->pages.count;
    }
    int64_t wanted_count = list_wanted(wanted, shares, count);
    Stack stack;
    /* Tables change their width seldom, so that passes are alike. */
    pages = (pages + TABLE_PAGES - 1) / TABLE_PAGES * TABLE_PAGES;
    KvCache cache = {e->slots, count, pages < e->pages.total[FULL] ? pages : e->pages.total[FULL]};
    e->activations.used = e->scratch.used = 0;
    stack_open(&stack, e->g, STACK_SCORE, n, wanted_count ? wanted_count : 1, &cache, &e->scratch);
    stack_place(&stack, &e->activations);
    fill_rows(e, &stack, shares, count);
    fill_some(&stack, wanted, wanted_count);
    MediaItem *media = place_media(e, &stack, shares, count);
    list_adapters(e, &stack, shares, count, wanted, wanted_count, all_adapters, some_adapters);
    staging_send(&stack.inputs);
    forward(e, &stack, &cache);
    e->counts.passes++;
    e->counts.rows += n;
    for (int64_t i = 0; i < count; i++) {
        Sequence *s = shares[i].s;
        bool guessed = s->guess_count > 0;
        if (!guessed) s->done += shares[i].rows;
        e->counts.guessed += s->guess_count;
        s->checked = 0;
    }
    read_logits(e, &stack, wanted, wanted_count);
    stack_close(&stack);
    free(wanted);
    free(media);
    for (int64_t i = 0; i < count; i++) {
        Sequence *s = shares[i].s;
        e->counts.right += s->checked;
        s->guess_count = 0;
        if (!s->running) continue;
        pages_advance(&e->pages, &s->pages, s->keys, s->done, s->request.adapter, false);
        if (s->done == to_feed(s) && s->request.sampling.max_tokens == 0) /* it was only read */
            end(e, s, ENDING_LENGTH);
    }
    if (e->options.drafter) guess(e);
    return true;
}
