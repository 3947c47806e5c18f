/* loader.c - the plan of an epoch, and a thread that fills the next step while this one runs. */
#include "data/loader.h"
#include "kernels/random.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* The rows of one epoch: row r holds samples order[row_begins[r] .. row_begins[r + 1]). */
typedef struct Plan {
    int64_t epoch; /* -1: none */
    int64_t *order, *row_begins, rows;
} Plan;

/* One step's micro-batches, as the thread hands them over. */
typedef struct Slot {
    MicroBatch *batches;
    int64_t count, trained, all; /* all: micro-batches of every rank */
    Status status;
    char message[512];
} Slot;

struct Loader {
    Store *store;
    LoaderConfig config;
    Plan plan;
    int64_t *epoch_starts; /* first step of each epoch, and one more */
    int64_t epochs, steps, capacity, first_rows;
    Slot slots[2];
    int64_t next_fill, next_take; /* step numbers */
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool running, stop;
};

/* A keyed Fisher-Yates shuffle. */
static void shuffle(int64_t *order, int64_t count, uint64_t key) {
    for (int64_t i = count - 1; i > 0; i--) {
        int64_t j = (int64_t)(random_u64(key, (uint64_t)i) % (uint64_t)(i + 1));
        int64_t keep = order[i];
        order[i] = order[j];
        order[j] = keep;
    }
}

/* First-fit with a tree over the room left in each row: tree[1] is the most room anywhere, leaf
 * `size + r` the room of row r; the first row with room is found by going left wherever it fits. */
typedef struct Room {
    int64_t *tree, size;
} Room;

static int64_t room_find(const Room *room, int64_t length) {
    int64_t i = 1;
    if (room->tree[1] < length) return -1;
    while (i < room->size) i = room->tree[2 * i] >= length ? 2 * i : 2 * i + 1;
    return i - room->size;
}

static void room_take(Room *room, int64_t row, int64_t length) {
    int64_t i = row + room->size;
    room->tree[i] -= length;
    for (i /= 2; i; i /= 2) {
        int64_t a = room->tree[2 * i], b = room->tree[2 * i + 1];
        room->tree[i] = a > b ? a : b;
    }
}

static void pack(Plan *plan, const SampleSet *set, const int64_t *order, int64_t max_length) {
    int64_t n = set->count, *row_of = must_malloc((size_t)n * sizeof *row_of);
    Room room = {.size = 1};
    while (room.size < n) room.size *= 2;
    room.tree = must_malloc((size_t)(2 * room.size) * sizeof *room.tree);
    for (int64_t i = 0; i < 2 * room.size; i++) room.tree[i] = max_length;
    plan->rows = 0;
    memset(plan->row_begins, 0, (size_t)(n + 2) * sizeof *plan->row_begins);
    for (int64_t i = 0; i < n; i++) {
        int64_t length = sample_length(set, order[i]), row = room_find(&room, length);
        room_take(&room, row, length);
        row_of[i] = row;
        if (row + 1 > plan->rows) plan->rows = row + 1;
        plan->row_begins[row + 1]++;
    }
    for (int64_t r = 0; r < plan->rows; r++) plan->row_begins[r + 1] += plan->row_begins[r];
    int64_t *next = must_malloc((size_t)(plan->rows + 1) * sizeof *next);
    memcpy(next, plan->row_begins, (size_t)(plan->rows + 1) * sizeof *next);
    for (int64_t i = 0; i < n; i++) plan->order[next[row_of[i]]++] = order[i];
    free(next);
    free(room.tree);
    free(row_of);
}

static void plan_make(Plan *plan, const SampleSet *set, const LoaderConfig *c, int64_t epoch) {
    int64_t n = set->count, *order = must_malloc((size_t)(n + 1) * sizeof *order);
    if (!plan->order) {
        plan->order = must_malloc((size_t)(n + 1) * sizeof *plan->order);
        plan->row_begins = must_malloc((size_t)(n + 2) * sizeof *plan->row_begins);
    }
    for (int64_t i = 0; i < n; i++) order[i] = i;
    if (c->shuffle) shuffle(order, n, random_key((uint64_t)c->seed, (uint64_t)epoch));
    if (c->packing) {
        pack(plan, set, order, c->max_length);
    } else {
        memcpy(plan->order, order, (size_t)n * sizeof *order);
        for (int64_t i = 0; i <= n; i++) plan->row_begins[i] = i;
        plan->rows = n;
    }
    plan->epoch = epoch;
    free(order);
}

static int64_t step_rows(const LoaderConfig *c) {
    return c->sequences * c->accumulate;
}

/* Epoch starts, from the number of rows each epoch packs into. */
static void count_steps(Loader *l) {
    const LoaderConfig *c = &l->config;
    double epochs = c->steps ? INFINITY : c->epochs;
    int64_t space = 0;
    for (int64_t e = 0; (double)e < epochs && !(c->steps && l->steps >= c->steps); e++) {
        if (e == 0 || (c->shuffle && c->packing)) plan_make(&l->plan, &l->store->train, c, e);
        if (e == 0) l->first_rows = l->plan.rows;
        int64_t steps = (l->plan.rows + step_rows(c) - 1) / step_rows(c);
        if (e + 2 > space) {
            space = 2 * (e + 2);
            l->epoch_starts =
                must_realloc(l->epoch_starts, (size_t)space * sizeof *l->epoch_starts);
        }
        l->epoch_starts[e] = l->steps;
        double part = epochs - (double)e;
        l->steps += part >= 1 ? steps : (int64_t)ceil(part * (double)steps - 1e-9);
        l->epoch_starts[e + 1] = l->steps;
        l->epochs = e + 1;
    }
    if (c->steps) l->steps = c->steps;
    l->plan.epoch = -1;
}

int64_t loader_steps(const Loader *l) {
    return l->steps;
}
int64_t loader_rows(const Loader *l) {
    return l->first_rows;
}
int64_t loader_capacity(const Loader *l) {
    return l->capacity;
}

double loader_epoch(const Loader *l, int64_t step) {
    int64_t e = 0;
    while (e + 1 < l->epochs && step > l->epoch_starts[e + 1]) e++;
    int64_t whole = (l->first_rows + step_rows(&l->config) - 1) / step_rows(&l->config);
    int64_t length = l->epoch_starts[e + 1] - l->epoch_starts[e];
    if (length < whole) length = whole; /* the last epoch may be a part of one */
    return (double)e + (double)(step - l->epoch_starts[e]) / (double)length;
}

static void drop_media(MicroBatch *b) {
    for (int64_t i = 0; i < b->batch.media_count; i++) {
        free((void *)b->media[i].pixels);
        free((void *)b->media[i].features);
    }
    b->batch.media_count = 0;
}

void micro_batch_free(MicroBatch *b) {
    drop_media(b);
    free(b->media);
    free(b->span_ends);
    free(b->ids);
    free(b->positions);
    free(b->starts);
    free(b->targets);
    free(b->weights);
    free(b->samples);
    *b = (MicroBatch){0};
}

static void micro_batch_init(MicroBatch *b, int64_t capacity) {
    size_t n = (size_t)capacity + 1;
    *b = (MicroBatch){0};
    b->ids = must_malloc(n * sizeof *b->ids);
    b->positions = must_malloc(n * sizeof *b->positions);
    b->starts = must_malloc(n * sizeof *b->starts);
    b->targets = must_malloc(n * sizeof *b->targets);
    b->weights = must_malloc(n * sizeof *b->weights);
    b->span_ends = must_malloc(n * sizeof *b->span_ends);
    b->samples = must_malloc(n * sizeof *b->samples);
}

static void micro_batch_start(MicroBatch *b) {
    b->trained = b->sample_count = 0;
    drop_media(b);
    b->batch = (Batch){.ids = b->ids,
                       .positions = b->positions,
                       .starts = b->starts,
                       .targets = b->targets,
                       .weights = b->weights};
}

/* One of the store's media in its slots from row `first` on. */
static Status add_medium(MicroBatch *b, Store *store, int64_t item, int64_t first,
                         OriginalReader *reader, const ModelConfig *model) {
    const StoredMedium *m = &store->media[item];
    if (b->batch.media_count == b->media_capacity) {
        b->media_capacity = b->media_capacity ? 2 * b->media_capacity : 8;
        b->media = must_realloc(b->media, (size_t)b->media_capacity * sizeof *b->media);
    }
    uint8_t *bytes;
    TRY(store_read_medium(store, item, reader, model, &bytes));
    MediaItem *mine = &b->media[b->batch.media_count++];
    *mine = (MediaItem){.first = first,
                        .count = m->tokens,
                        .key = (uint64_t)item + 1,
                        .height = m->height,
                        .width = m->width,
                        .frames = m->frames};
    if (m->height)
        mine->pixels = bytes;
    else
        mine->features = (const float *)bytes;
    b->batch.media = b->media;
    return OK;
}

/* Appends a sample as a segment of its own. */
static Status micro_batch_add(MicroBatch *b, Store *store, bool eval, int64_t sample, uint8_t *mask,
                              const ModelConfig *model) {
    const SampleSet *set = eval ? &store->eval : &store->train;
    int64_t at = b->batch.N, n = sample_length(set, sample);
    TRY(store_read(store, eval, sample, b->ids + at, mask));
    for (int64_t t = 0; t < n; t++) {
        bool target = t + 1 < n && mask[t + 1];
        b->positions[at + t] = (int32_t)t;
        b->starts[at + t] = (int32_t)at;
        b->targets[at + t] = target ? b->ids[at + t + 1] : -1;
        b->trained += target;
    }
    OriginalReader reader = {0};
    Status status = OK;
    for (int64_t i = set->slot_begins[sample]; i < set->slot_begins[sample + 1]; i++)
        TRY_DONE(add_medium(b, store, set->slots[2 * i + 1],
                            at + set->slots[2 * i] - set->begins[sample], &reader, model));
    b->samples[b->sample_count++] = sample;
    b->batch.N += n;
done:
    original_reader_free(&reader);
    return status;
}

/* Once a batch is whole: which pictures see themselves. */
static void micro_batch_end(MicroBatch *b, const ModelConfig *model) {
    if (model && media_span_ends(b->span_ends, b->batch.N, model, b->media, b->batch.media_count))
        b->batch.span_ends = b->span_ends;
}

void micro_batches_weigh(MicroBatch *batches, int64_t count, int64_t trained) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t n = 0; n < batches[i].batch.N; n++)
            batches[i].weights[n] = trained ? 1.0f / (float)trained : 0.0f;
}

static Status fill(Loader *l, Slot *slot, int64_t step) {
    const LoaderConfig *c = &l->config;
    int64_t epoch = 0;
    while (epoch + 1 < l->epochs && step >= l->epoch_starts[epoch + 1]) epoch++;
    if (l->plan.epoch != epoch) plan_make(&l->plan, &l->store->train, c, epoch);
    int64_t row = (step - l->epoch_starts[epoch]) * step_rows(c);
    uint8_t *mask = must_malloc((size_t)c->max_length + 1);
    Status status = OK;
    slot->count = slot->trained = slot->all = 0;
    for (int64_t a = 0; a < c->accumulate && row < l->plan.rows && status == OK; a++) {
        slot->all++;
        if (c->ranks > 1 && a % c->ranks != c->rank) {
            row += c->sequences;
            continue;
        }
        MicroBatch *b = &slot->batches[slot->count++];
        micro_batch_start(b);
        for (int64_t s = 0; s < c->sequences && row < l->plan.rows && status == OK; s++, row++)
            for (int64_t i = l->plan.row_begins[row];
                 i < l->plan.row_begins[row + 1] && status == OK; i++)
                status = micro_batch_add(b, l->store, false, l->plan.order[i], mask, c->model);
        micro_batch_end(b, c->model);
        slot->trained += b->trained;
    }
    micro_batches_weigh(slot->batches, slot->count, slot->trained);
    free(mask);
    return status;
}

static void *fill_ahead(void *context) {
    Loader *l = context;
    pthread_mutex_lock(&l->mutex);
    while (!l->stop) {
        /* next_take - 1 is in use, so only the slot of next_take may be filled. */
        if (l->next_fill >= l->steps || l->next_fill > l->next_take) {
            pthread_cond_wait(&l->changed, &l->mutex);
            continue;
        }
        int64_t step = l->next_fill;
        Slot *slot = &l->slots[step % 2];
        pthread_mutex_unlock(&l->mutex);
        slot->status = fill(l, slot, step);
        if (slot->status != OK)
            snprintf(slot->message, sizeof slot->message, "%s", status_message());
        pthread_mutex_lock(&l->mutex);
        l->next_fill++;
        pthread_cond_broadcast(&l->changed);
    }
    pthread_mutex_unlock(&l->mutex);
    return NULL;
}

Status loader_open(Loader **out, Store *store, const LoaderConfig *config) {
    Loader *l = must_calloc(1, sizeof *l);
    l->store = store;
    l->config = *config;
    for (int64_t i = 0; i < store->train.count; i++)
        if (sample_length(&store->train, i) > config->max_length) {
            loader_close(l);
            FAIL(ERR_FORMAT, "%s: sample %lld is longer than max_length", store->file.path,
                 (long long)i);
        }
    count_steps(l);
    int64_t longest = 0;
    for (int64_t i = 0; i < store->train.count; i++)
        if (sample_length(&store->train, i) > longest) longest = sample_length(&store->train, i);
    l->capacity = (config->packing ? config->max_length : longest) * config->sequences;
    for (int s = 0; s < 2; s++) {
        l->slots[s].batches = must_calloc((size_t)config->accumulate, sizeof *l->slots[s].batches);
        for (int64_t a = 0; a < config->accumulate; a++)
            micro_batch_init(&l->slots[s].batches[a], l->capacity);
    }
    pthread_mutex_init(&l->mutex, NULL);
    pthread_cond_init(&l->changed, NULL);
    *out = l;
    return OK;
}

Status loader_start(Loader *l, int64_t first) {
    l->next_fill = l->next_take = first;
    l->running = pthread_create(&l->thread, NULL, fill_ahead, l) == 0;
    if (!l->running) FAIL(ERR_IO, "cannot start the loader's thread");
    return OK;
}

void loader_close(Loader *l) {
    if (!l) return;
    if (l->running) {
        pthread_mutex_lock(&l->mutex);
        l->stop = true;
        pthread_cond_broadcast(&l->changed);
        pthread_mutex_unlock(&l->mutex);
        pthread_join(l->thread, NULL);
    }
    for (int s = 0; s < 2; s++) {
        for (int64_t a = 0; l->slots[s].batches && a < l->config.accumulate; a++)
            micro_batch_free(&l->slots[s].batches[a]);
        free(l->slots[s].batches);
    }
    free(l->plan.order);
    free(l->plan.row_begins);
    free(l->epoch_starts);
    free(l);
}

Status loader_next(Loader *l, MicroBatch **batches, int64_t *count, int64_t *trained) {
    pthread_mutex_lock(&l->mutex);
    CHECK(l->next_take < l->steps, "no step is left");
    while (l->next_fill <= l->next_take) pthread_cond_wait(&l->changed, &l->mutex);
    Slot *slot = &l->slots[l->next_take % 2];
    l->next_take++;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->mutex);
    if (slot->status != OK) FAIL(slot->status, "%s", slot->message);
    *batches = slot->batches;
    *count = slot->count;
    *trained = slot->trained;
    return OK;
}

int64_t loader_step_batches(const Loader *l) {
    return l->slots[(l->next_take - 1) % 2].all;
}

Status loader_eval_batch(Store *store, bool eval, int64_t *sample, int64_t max_length,
                         const ModelConfig *model, MicroBatch *out) {
    const SampleSet *set = eval ? &store->eval : &store->train;
    if (!out->ids) micro_batch_init(out, max_length);
    micro_batch_start(out);
    uint8_t *mask = must_malloc((size_t)max_length + 1);
    Status status = OK;
    while (status == OK && *sample < set->count &&
           out->batch.N + sample_length(set, *sample) <= max_length)
        status = micro_batch_add(out, store, eval, (*sample)++, mask, model);
    micro_batch_end(out, model);
    free(mask);
    if (status == OK && !out->sample_count && *sample < set->count)
        FAIL(ERR_FORMAT, "%s: an eval sample is longer than max_length", store->file.path);
    return status;
}
