/* generate.c - an engine for one sequence. */
#include "infer/generate.h"

#define PREFILL_CHUNK 512

Status generate(Model *m, const Tokens *prompt, const SoftMedia *media, const Sampling *s,
                const char *kv, const char *draft, Tokens *ids, Text *text, SequenceFunction *show,
                void *context, EngineCounts *counts) {
    int64_t most = m->g.config.max_position_embeddings, want = prompt->count + s->max_tokens;
    EngineOptions options = {.sequences = 1, .tokens = want < most ? want : most};
    options.chunk = PREFILL_CHUNK;
    for (int64_t i = 0; media && i < media->count; i++)
        if (media->items[i].count > options.chunk) options.chunk = media->items[i].count;
    if (prompt->count < options.chunk) options.chunk = prompt->count;
    Request request = {.ids = prompt->ids,
                       .count = prompt->count,
                       .media = media ? media->items : NULL,
                       .media_count = media ? media->count : 0,
                       .sampling = *s,
                       .on_token = show,
                       .context = context};
    Engine e = {0};
    Drafter d = {0};
    Sequence *sequence;
    Status status = OK;
    if (draft) {
        TRY_DONE(drafter_open(&d, draft, &m->g));
        options.drafter = &d;
        options.draft = DRAFT_TOKENS;
        if (options.chunk <= DRAFT_TOKENS) options.chunk = DRAFT_TOKENS + 1;
    }
    TRY_DONE(kv_dtype(&options.kv, &m->g, kv));
    TRY_DONE(engine_init(&e, &m->g, m->tokenizer, &options));
    TRY_DONE(engine_submit(&e, &sequence, &request));
    while (sequence->ending == ENDING_NONE) engine_step(&e);
    for (int64_t i = prompt->count; i < sequence->count; i++) tokens_add(ids, sequence->ids[i]);
    text_add(text, sequence->stream.text.bytes, sequence->text_size);
    engine_drop(&e, sequence);
    if (counts) *counts = e.counts;
done:
    engine_free(&e);
    drafter_close(&d);
    return status;
}
