/* dialog.c - rendering, and following an answer through its marks. */
#include "infer/dialog.h"
#include "data/rows.h"
#include "infer/answer.h"

#include <stdlib.h>
#include <string.h>

/* ---- prompts ---- */

Status dialog_read_media(MediumList *list, Rendered *rendered, const Gemma *g,
                         const json_t *messages, const MediumOptions *reading) {
    MediumOptions options = *reading;
    if (!messages_media_count(messages)) return OK;
    TRY(model_check_media(g));
    options.config = &g->config;
    TRY(media_collect(list, messages, &options));
    return media_expand(rendered, list);
}

Status dialog_soften(SoftMedia *soft, Gemma *g, const MediumList *media, const Tokens *ids) {
    MediaItem *items;
    int64_t count;
    *soft = (SoftMedia){0};
    if (!media->count) return OK;
    TRY(media_items(&items, &count, media, &g->config, ids->ids, ids->count));
    return soft_media_make(soft, g, items, count);
}

Status dialog_prompt(DialogPrompt *p, const Gemma *g, const Tokenizer *tokenizer,
                     const json_t *messages, const json_t *tools, const ChatOptions *options,
                     const MediumOptions *reading) {
    DataConfig config = data_config_default();
    Rendered rendered = {0};
    uint8_t *mask = NULL;
    *p = (DialogPrompt){0};
    json_t *repaired = messages_repaired(&config, messages);
    Status status = chat_render(&rendered, repaired, tools, options);
    if (status == OK) status = dialog_read_media(&p->media, &rendered, g, repaired, reading);
    json_decref(repaired);
    if (status == OK) {
        chat_encode(tokenizer, &rendered, false, &p->ids, &mask);
        text_add(&p->text, rendered.text.bytes, rendered.text.size);
    }
    if (status != OK) dialog_prompt_free(p);
    free(mask);
    rendered_free(&rendered);
    return status;
}

void dialog_prompt_free(DialogPrompt *p) {
    tokens_free(&p->ids);
    text_free(&p->text);
    media_list_free(&p->media);
    soft_media_free(&p->soft);
    *p = (DialogPrompt){0};
}

/* ---- pieces ---- */

#define THOUGHT_BEGIN "<|channel>"
#define THOUGHT_END   "<channel|>"
#define CALL_BEGIN    "<|tool_call>"
#define CALL_END      "<tool_call|>"

static size_t find_last(Slice s, const char *mark) {
    size_t found = s.size;
    for (size_t at = 0; (at = slice_find(s, mark, at)) < s.size; at++) found = at;
    return found;
}

void pieces_init(Pieces *p, Slice prompt, const json_t *tools, PieceFunction *give, void *context) {
    *p = (Pieces){.tools = tools, .give = give, .context = context, .kind = PIECE_CONTENT};
    size_t open = find_last(prompt, THOUGHT_BEGIN), shut = find_last(prompt, THOUGHT_END);
    if (open < prompt.size && (shut == prompt.size || shut < open)) p->kind = PIECE_THOUGHT;
}

/* Text whose white space at the end waits for more. */
static void give_text(Pieces *p, Slice text, size_t end, bool closes) {
    Slice s = {text.bytes + p->at, end - p->at};
    if (!p->begun) {
        Slice stripped = slice_strip(s);
        size_t skip = stripped.size ? (size_t)(stripped.bytes - s.bytes) : s.size;
        if (!stripped.size && !closes) return; /* only white space so far: later */
        s = (Slice){s.bytes + skip, s.size - skip};
    }
    Slice kept = slice_strip(s);
    size_t size = kept.size ? (size_t)(kept.bytes + kept.size - s.bytes) : 0;
    if (size) {
        p->begun = true;
        p->give(p->context, p->kind, (Slice){s.bytes, size}, NULL);
    }
    p->at = closes ? end : (size_t)(s.bytes + size - text.bytes);
}

static void give_call(Pieces *p, Slice whole) {
    json_t *message = answer_parse((Slice){"", 0}, whole, p->tools),
           *call = json_array_get(json_object_get(message, "tool_calls"), 0);
    if (call) {
        p->calls++;
        p->give(p->context, PIECE_CALL, whole, json_object_get(call, "function"));
    } else {
        p->give(p->context, PIECE_CONTENT, whole, NULL);
    }
    json_decref(message);
}

/* The next mark of content, and what it opens. */
static size_t next_mark(Slice s, size_t from, PieceKind *opens) {
    size_t thought = slice_find(s, THOUGHT_BEGIN, from), call = slice_find(s, CALL_BEGIN, from);
    *opens = thought < call ? PIECE_THOUGHT : PIECE_CALL;
    return thought < call ? thought : call;
}

void pieces_feed(Pieces *p, Slice answer, bool last) {
    while (p->at < answer.size || (last && p->at <= answer.size)) {
        if (p->kind == PIECE_CONTENT) {
            PieceKind opens;
            size_t mark = next_mark(answer, p->at, &opens);
            give_text(p, answer, mark, mark < answer.size || last);
            if (mark == answer.size) return;
            p->kind = opens;
            p->at = opens == PIECE_THOUGHT ? mark + strlen(THOUGHT_BEGIN) : mark;
            p->head = opens == PIECE_THOUGHT;
            if (opens == PIECE_THOUGHT) p->begun = false;
        } else if (p->kind == PIECE_THOUGHT) {
            size_t end = slice_find(answer, THOUGHT_END, p->at);
            if (p->head) { /* the channel's name, up to the end of its line */
                size_t line = slice_find(answer, "\n", p->at);
                if (line == answer.size && end == answer.size && !last) return;
                p->at = line < end ? line + 1 : end;
                p->head = false;
            }
            give_text(p, answer, end, end < answer.size || last);
            if (end == answer.size) return;
            p->at = end + strlen(THOUGHT_END);
            p->kind = PIECE_CONTENT;
            p->begun = false;
        } else {
            size_t end = slice_find(answer, CALL_END, p->at);
            if (end == answer.size && !last) return;
            end = end == answer.size ? end : end + strlen(CALL_END);
            give_call(p, (Slice){answer.bytes + p->at, end - p->at});
            p->at = end;
            p->kind = PIECE_CONTENT;
        }
        if (p->at >= answer.size) return;
    }
}
