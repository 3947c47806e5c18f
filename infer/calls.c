/* calls.c - the thread that owns the engine. */
#include "infer/calls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MOMENT_NS 200000000

/* New text and tokens of a sequence, to its part. Runs in the engine's thread, within a pass. */
static void pass_on(void *context, Sequence *s) {
    Part *p = context;
    Call *call = p->call;
    Board *b = call->board;
    int64_t from = p->ids.count, n = sequence_answered(s), top = call->request.top_logprobs;
    pthread_mutex_lock(&b->lock);
    p->text.size = 0;
    text_add(&p->text, s->stream.text.bytes ? s->stream.text.bytes : "", s->text_size);
    for (int64_t i = from; i < n; i++) tokens_add(&p->ids, s->ids[s->request.count + i]);
    if (n > from) {
        p->logprobs = must_realloc(p->logprobs, (size_t)n * sizeof *p->logprobs);
        memcpy(p->logprobs + from, s->logprobs + s->request.count + from,
               (size_t)(n - from) * sizeof *p->logprobs);
        if (top) {
            p->tops = must_realloc(p->tops, (size_t)(n * top) * sizeof *p->tops);
            memcpy(p->tops + from * top, s->tops + from * top,
                   (size_t)((n - from) * top) * sizeof *p->tops);
        }
        b->counts.answer_tokens += n - from;
    }
    if (call->cancelled) s->cancelled = true;
    pthread_cond_broadcast(&call->changed);
    pthread_mutex_unlock(&b->lock);
}

/* The end of a part; under the lock. */
static void finish(Board *b, Part *p, Ending ending) {
    p->ending = ending;
    p->call->ended++;
    pthread_cond_broadcast(&p->call->changed);
    b->counts.cancelled += ending == ENDING_CANCELLED;
}

/* Runs the towers over a call's media, for its first part; others go on meanwhile. */
static Status soften(Board *b, Call *call) {
    if (!call->media.count || call->soft.count) return OK;
    pthread_mutex_unlock(&b->lock);
    Status status = dialog_soften(&call->soft, b->engine->g, &call->media, &call->prompt);
    pthread_mutex_lock(&b->lock);
    call->request.media = call->soft.items;
    call->request.media_count = call->soft.count;
    return status;
}

/* Takes what is in line; under the lock. */
static void take_line(Board *b, Part ***running, int64_t *count, int64_t *capacity) {
    while (b->line) {
        Part *p = b->line;
        Call *call = p->call;
        b->line = p->next;
        if (!b->line) b->line_end = &b->line;
        b->waiting--;
        if (call->cancelled) {
            finish(b, p, ENDING_CANCELLED);
            continue;
        }
        Status status = soften(b, call);
        Request request = call->request;
        request.sampling.seed += (uint64_t)p->index;
        request.on_token = pass_on;
        request.context = p;
        if (status == OK) status = engine_submit(b->engine, &p->sequence, &request);
        if (status != OK) {
            if (!call->error) call->error = must_strdup(status_message());
            b->counts.failed++;
            finish(b, p, ENDING_CANCELLED);
            continue;
        }
        if (*count == *capacity) {
            *capacity = *capacity ? 2 * *capacity : 16;
            *running = must_realloc(*running, (size_t)*capacity * sizeof **running);
        }
        (*running)[(*count)++] = p;
    }
    b->running = *count;
}

static void *work(void *context) {
    Board *b = context;
    Part **running = NULL;
    int64_t count = 0, capacity = 0;
    pthread_mutex_lock(&b->lock);
    while (!b->stopping || count || b->line) {
        take_line(b, &running, &count, &capacity);
        for (int64_t i = 0; i < count; i++)
            if (running[i]->call->cancelled || b->stopping) running[i]->sequence->cancelled = true;
        if (!count) {
            if (!b->stopping) pthread_cond_wait(&b->work, &b->lock);
            continue;
        }
        pthread_mutex_unlock(&b->lock);
        engine_step(b->engine);
        pthread_mutex_lock(&b->lock);
        for (int64_t i = 0; i < count; i++) {
            Part *p = running[i];
            Sequence *s = p->sequence;
            if (s->ending == ENDING_NONE) continue;
            p->call->reused = s->reused;
            b->counts.reused_tokens += s->reused;
            finish(b, p, s->ending);
            engine_drop(b->engine, s);
            running[i--] = running[--count];
        }
        b->running = count;
    }
    pthread_mutex_unlock(&b->lock);
    free(running);
    return NULL;
}

Status board_open(Board *b, Engine *engine) {
    *b = (Board){.engine = engine};
    b->line_end = &b->line;
    pthread_mutex_init(&b->lock, NULL);
    pthread_cond_init(&b->work, NULL);
    int failed = pthread_create(&b->thread, NULL, work, b);
    if (failed) FAIL(ERR_IO, "a thread cannot be started: %s", strerror(failed));
    return OK;
}

void board_close(Board *b) {
    pthread_mutex_lock(&b->lock);
    b->stopping = true;
    pthread_cond_broadcast(&b->work);
    pthread_mutex_unlock(&b->lock);
    pthread_join(b->thread, NULL);
    pthread_cond_destroy(&b->work);
    pthread_mutex_destroy(&b->lock);
}

bool board_submit(Board *b, Call *call, int64_t most) {
    pthread_mutex_lock(&b->lock);
    bool room = !b->stopping && b->waiting + call->count <= most;
    b->counts.requests++;
    if (room) {
        b->counts.prompt_tokens += call->prompt.count;
        for (int i = 0; i < call->count; i++) {
            *b->line_end = &call->parts[i];
            b->line_end = &call->parts[i].next;
            b->waiting++;
        }
        pthread_cond_signal(&b->work);
    } else {
        b->counts.refused++;
    }
    pthread_mutex_unlock(&b->lock);
    return room;
}

void call_wait(Call *call) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += MOMENT_NS;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&call->changed, &call->board->lock, &until);
}

void call_end(Call *call) {
    Board *b = call->board;
    pthread_mutex_lock(&b->lock);
    call->cancelled = true;
    pthread_cond_signal(&b->work);
    while (call->ended < call->count) call_wait(call);
    pthread_mutex_unlock(&b->lock);
}
