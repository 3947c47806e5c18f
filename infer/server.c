/* server.c - HTTP in, JSON out: routes, requests, whole answers and streams. */
#include "infer/server.h"
#include "infer/answer.h"
#include "infer/calls.h"
#include "infer/schema.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STREAM_BLOCK   4096
#define PARTS_MAX      8
#define STOPS_MAX_TEXT 8
#define STACK_BYTES    (512 * 1024)
#define IDLE_SECONDS   120

__asm__(".section .rodata\n"
        ".global chat_page\nchat_page:\n.incbin \"infer/page.html\"\n"
        ".global chat_page_end\nchat_page_end:\n.byte 0\n"
        ".previous\n");
extern const char chat_page[], chat_page_end[];

ServeOptions serve_options_default(void) {
    return (ServeOptions){.host = "127.0.0.1",
                          .port = 8080,
                          .sequences = 16,
                          .context = 8192,
                          .cache = 0,
                          .queue = 256,
                          .body = (int64_t)32 << 20,
                          .connections = 512};
}

typedef struct Server {
    Model *m;
    const ServeOptions *o;
    Engine engine;
    Drafter drafter;
    Board board;
    Sampling sampling; /* the model's own */
    int64_t number;    /* of calls so far */
    time_t started;
} Server;

/* What one connection's request has sent so far, and its call. */
typedef struct Exchange {
    Text body;
    bool too_large;
    Call *call;
} Exchange;

/* ---- replies ---- */

static enum MHD_Result reply(struct MHD_Connection *c, unsigned status, const char *type,
                             const char *text, size_t size) {
    struct MHD_Response *r =
        MHD_create_response_from_buffer(size, (void *)text, MHD_RESPMEM_MUST_COPY);
    MHD_add_response_header(r, "Content-Type", type);
    if (status == 401) MHD_add_response_header(r, "WWW-Authenticate", "Bearer");
    if (status == 429) MHD_add_response_header(r, "Retry-After", "1");
    enum MHD_Result result = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return result;
}

static enum MHD_Result reply_json(struct MHD_Connection *c, unsigned status, json_t *value) {
    Text text = {0};
    text_add_json(&text, value);
    json_decref(value);
    enum MHD_Result result = reply(c, status, "application/json", text.bytes, text.size);
    text_free(&text);
    return result;
}

static json_t *error_json(unsigned status, const char *code, const char *message) {
    const char *type = status == 401   ? "authentication_error"
                       : status == 429 ? "rate_limit_error"
                       : status >= 500 ? "server_error"
                                       : "invalid_request_error";
    return json_pack("{s:{s:s, s:s, s:s, s:n}}", "error", "message", message, "type", type, "code",
                     code, "param");
}

static enum MHD_Result refuse(struct MHD_Connection *c, unsigned status, const char *code,
                              const char *message) {
    return reply_json(c, status, error_json(status, code, message));
}

/* ---- reading a request ---- */

static Status wrong(const char *key, const char *expected) {
    FAIL(ERR_USAGE, "'%s' is not %s", key, expected);
}

static Status get_number(double *out, const json_t *body, const char *key) {
    const json_t *value = json_object_get(body, key);
    if (!value || json_is_null(value)) return OK;
    if (!json_is_number(value)) return wrong(key, "a number");
    *out = json_number_value(value);
    return OK;
}

static Status get_integer(int64_t *out, const json_t *body, const char *key) {
    const json_t *value = json_object_get(body, key);
    if (!value || json_is_null(value)) return OK;
    if (!json_is_integer(value)) return wrong(key, "an integer");
    *out = json_integer_value(value);
    return OK;
}

static Status get_bool(bool *out, const json_t *body, const char *key) {
    const json_t *value = json_object_get(body, key);
    if (!value || json_is_null(value)) return OK;
    if (!json_is_boolean(value)) return wrong(key, "true or false");
    *out = json_is_true(value);
    return OK;
}

static Status get_stops(Call *call) {
    const json_t *stop = json_object_get(call->body, "stop");
    size_t n = json_is_array(stop) ? json_array_size(stop) : json_is_string(stop);
    if (!stop || json_is_null(stop)) return OK;
    if (!json_is_array(stop) && !json_is_string(stop)) return wrong("stop", "text or a list of it");
    if (n > STOPS_MAX_TEXT)
        FAIL(ERR_USAGE, "'stop' has %zu entries, expected up to %d", n, STOPS_MAX_TEXT);
    const char **texts = must_calloc(n + 1, sizeof *texts);
    call->request.stop_texts = texts;
    for (size_t i = 0; i < n; i++) {
        texts[i] = json_string_value(json_is_array(stop) ? json_array_get(stop, i) : stop);
        if (!texts[i] || !*texts[i]) return wrong("stop", "text or a list of it");
        call->request.stop_text_count++;
    }
    return OK;
}

static Status get_sampling(const Server *s, Call *call, int64_t default_tokens) {
    Sampling *p = &call->request.sampling;
    const json_t *body = call->body;
    int64_t seed = -1, n = 1;
    *p = s->sampling;
    p->max_tokens = default_tokens;
    TRY(get_number(&p->temperature, body, "temperature"));
    TRY(get_number(&p->top_p, body, "top_p"));
    TRY(get_number(&p->min_p, body, "min_p"));
    TRY(get_number(&p->repetition_penalty, body, "repetition_penalty"));
    TRY(get_integer(&p->top_k, body, "top_k"));
    TRY(get_integer(&p->max_tokens, body, "max_tokens"));
    TRY(get_integer(&p->max_tokens, body, "max_completion_tokens"));
    TRY(get_integer(&seed, body, "seed"));
    TRY(get_integer(&n, body, "n"));
    if (p->top_k < 0) p->top_k = 0;
    if (p->max_tokens < 1)
        FAIL(ERR_USAGE, "'max_tokens' is %" PRId64 ", expected 1 or more", p->max_tokens);
    if (n < 1 || n > PARTS_MAX)
        FAIL(ERR_USAGE, "'n' is %" PRId64 ", expected 1 to %d", n, PARTS_MAX);
    TRY(sampling_check(p));
    p->seed = seed >= 0 ? (uint64_t)seed : (uint64_t)time(NULL) * 1000003u + (uint64_t)s->number;
    call->count = (int)n;
    return get_stops(call);
}

/* The model that a request names: the base, or an adapter. */
static Status get_model(const Server *s, Call *call) {
    const char *name = json_string_value(json_object_get(call->body, "model"));
    call->model = name ? name : s->o->name;
    if (!name || !strcmp(name, s->o->name)) return OK;
    for (int a = 0; a < s->m->adapters; a++)
        if (!strcmp(name, s->o->adapters[a])) {
            call->request.adapter = a + 1;
            return OK;
        }
    FAIL(ERR_USAGE, "no model '%s' here", name);
}

static Status check_room(const Server *s, Call *call) {
    int64_t most = s->o->context;
    Request *r = &call->request;
    if (call->prompt.count + 1 > most)
        FAIL(ERR_CONFIG, "the prompt has %" PRId64 " tokens, the context %" PRId64,
             call->prompt.count, most);
    if (r->sampling.max_tokens > most - call->prompt.count)
        r->sampling.max_tokens = most - call->prompt.count;
    r->ids = call->prompt.ids;
    r->count = call->prompt.count;
    return OK;
}

/* What the answer is held to: calls that are asked for, calls that begin, JSON. */
static Status get_forms(const Server *s, Call *call, const json_t *choice, const json_t *format) {
    const char *word = json_string_value(choice),
               *named =
                   json_string_value(json_object_get(json_object_get(choice, "function"), "name")),
               *shape = json_string_value(json_object_get(format, "type"));
    bool forced = named || (word && !strcmp(word, "required"));
    Request *r = &call->request;
    if (choice && !json_is_null(choice) && !forced &&
        !(word && (!strcmp(word, "auto") || !strcmp(word, "none"))))
        return wrong("tool_choice", "auto, none, required or a function");
    if (forced && !call->tools) FAIL(ERR_USAGE, "'tool_choice' asks for a call of no tools");
    r->call_begin = tokenizer_find(s->m->tokenizer, "<|tool_call>");
    if (call->tools)
        TRY(grammar_calls(&call->call_grammar, s->m->tokenizer, call->tools, NULL, false));
    r->call_grammar = call->call_grammar;
    if (forced) {
        TRY(grammar_calls(&call->grammar, s->m->tokenizer, call->tools, named, true));
    } else if (format && !json_is_null(format)) {
        const json_t *schema = json_object_get(json_object_get(format, "json_schema"), "schema");
        bool object = shape && !strcmp(shape, "json_object"),
             given = shape && !strcmp(shape, "json_schema");
        if (!object && !given && !(shape && !strcmp(shape, "text")))
            return wrong("response_format", "text, json_object or json_schema");
        if (given && !json_is_object(schema))
            return wrong("response_format.json_schema.schema", "a schema");
        if (object || given)
            TRY(grammar_json(&call->grammar, given ? schema : NULL, s->m->tokenizer, call->tools));
    }
    r->grammar = call->grammar;
    return OK;
}

static Status read_chat(const Server *s, Call *call) {
    const json_t *body = call->body, *messages = json_object_get(body, "messages"),
                 *tools = json_object_get(body, "tools"),
                 *choice = json_object_get(body, "tool_choice"),
                 *format = json_object_get(body, "response_format"),
                 *settings = json_object_get(body, "chat_template_kwargs");
    bool logprobs = false;
    int64_t top = 0;
    ChatOptions chat = {.format = s->o->format, .add_generation_prompt = true};
    DialogPrompt prompt;
    if (!s->o->has_format)
        FAIL(ERR_CONFIG, "the model's chat template is not known: start with --chat-format");
    if (!json_is_array(messages) || !json_array_size(messages))
        return wrong("messages", "a list of messages");
    if (tools && !json_is_null(tools) && !json_is_array(tools)) return wrong("tools", "a list");
    const char *kind = json_string_value(choice);
    if (json_is_array(tools) && json_array_size(tools) && !(kind && !strcmp(kind, "none")))
        call->tools = json_incref((json_t *)tools);
    TRY(get_bool(&chat.enable_thinking, settings, "enable_thinking"));
    TRY(get_bool(&chat.preserve_thinking, settings, "preserve_thinking"));
    TRY(get_sampling(s, call, s->o->context));
    TRY(get_bool(&logprobs, body, "logprobs"));
    TRY(get_integer(&top, body, "top_logprobs"));
    if (top && !logprobs) FAIL(ERR_USAGE, "'top_logprobs' needs 'logprobs'");
    if (top < 0 || top > TOP_LOGPROBS_MAX)
        FAIL(ERR_USAGE, "'top_logprobs' is %" PRId64 ", expected 0 to %d", top, TOP_LOGPROBS_MAX);
    call->request.top_logprobs = (int)top;
    call->request.thought_begin = tokenizer_find(s->m->tokenizer, "<|channel>");
    call->request.thought_end = tokenizer_find(s->m->tokenizer, "<channel|>");
    call->request.thinks = chat.enable_thinking;
    TRY(get_forms(s, call, choice, format));
    MediumOptions reading = s->o->reading;
    reading.allowed = reading.folder = s->o->media;
    reading.no_files = !s->o->media;
    TRY(dialog_prompt(&prompt, &s->m->g, s->m->tokenizer, messages, call->tools, &chat, &reading));
    call->prompt = prompt.ids;
    call->prompt_text = prompt.text;
    call->media = prompt.media;
    return check_room(s, call);
}

static Status read_completion(const Server *s, Call *call) {
    const json_t *prompt = json_object_get(call->body, "prompt");
    int64_t logprobs = -1;
    TRY(get_sampling(s, call, 16));
    TRY(get_integer(&logprobs, call->body, "logprobs"));
    if (logprobs > TOP_LOGPROBS_MAX)
        FAIL(ERR_USAGE, "'logprobs' is %" PRId64 ", expected 0 to %d", logprobs, TOP_LOGPROBS_MAX);
    call->request.top_logprobs = logprobs > 0 ? (int)logprobs : 0;
    if (json_is_array(prompt) && json_array_size(prompt) == 1 &&
        json_is_string(json_array_get(prompt, 0)))
        prompt = json_array_get(prompt, 0);
    if (json_is_string(prompt)) {
        Slice text = json_slice(prompt);
        if (text.size < 5 || memcmp(text.bytes, "<bos>", 5))
            tokens_add(&call->prompt, (int32_t)s->m->g.config.bos_token_id);
        tokenizer_encode(s->m->tokenizer, &call->prompt, text.bytes, text.size, NULL, 0, false);
    } else {
        size_t i;
        json_t *id;
        if (!json_is_array(prompt) || !json_array_size(prompt))
            return wrong("prompt", "text or a list of token ids");
        json_array_foreach(prompt, i, id) {
            if (!json_is_integer(id)) return wrong("prompt", "text or a list of token ids");
            tokens_add(&call->prompt, (int32_t)json_integer_value(id));
        }
    }
    return check_room(s, call);
}

/* ---- calls ---- */

static void call_free(Call *call) {
    for (int i = 0; i < call->count && call->parts; i++) {
        text_free(&call->parts[i].text);
        tokens_free(&call->parts[i].ids);
        free(call->parts[i].logprobs);
        free(call->parts[i].tops);
    }
    free(call->parts);
    free((void *)call->request.stop_texts);
    media_list_free(&call->media);
    soft_media_free(&call->soft);
    tokens_free(&call->prompt);
    text_free(&call->prompt_text);
    json_decref(call->tools);
    json_decref(call->body);
    grammar_free(call->grammar);
    grammar_free(call->call_grammar);
    free(call->error);
    pthread_cond_destroy(&call->changed);
    free(call);
}

static Call *call_new(Server *s, json_t *body, bool chat) {
    Call *call = must_calloc(1, sizeof *call);
    call->board = &s->board;
    call->body = body;
    call->created = time(NULL);
    pthread_cond_init(&call->changed, NULL);
    snprintf(call->id, sizeof call->id, "%s-%" PRIx64 "-%" PRId64, chat ? "chatcmpl" : "cmpl",
             (uint64_t)s->started, __atomic_add_fetch(&s->number, 1, __ATOMIC_RELAXED));
    return call;
}

static void make_parts(Call *call) {
    call->parts = must_calloc((size_t)call->count, sizeof *call->parts);
    for (int i = 0; i < call->count; i++) call->parts[i] = (Part){.call = call, .index = i};
}

/* Whether the client has gone. */
static bool client_gone(struct MHD_Connection *c) {
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
    struct pollfd p = {.fd = info ? (int)info->connect_fd : -1, .events = POLLRDHUP};
    return info && poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

/* ---- JSON of answers ---- */

static json_t *token_json(const Server *s, int32_t id, float logprob) {
    Text text = {0};
    json_t *bytes = json_array();
    tokenizer_decode(s->m->tokenizer, &text, &id, 1, false);
    for (size_t i = 0; i < text.size; i++)
        json_array_append_new(bytes, json_integer((uint8_t)text.bytes[i]));
    json_t *out = json_pack("{s:o, s:f, s:o}", "token", json_stringn(text.bytes, text.size),
                            "logprob", (double)logprob, "bytes", bytes);
    text_free(&text);
    return out;
}

/* Tokens first .. end - 1 of a part, as chats give their log-probabilities. */
static json_t *logprobs_json(const Server *s, const Part *p, int64_t first, int64_t end) {
    json_t *content = json_array();
    int top = p->call->request.top_logprobs;
    for (int64_t i = first; i < end; i++) {
        json_t *token = token_json(s, p->ids.ids[i], p->logprobs[i]), *best = json_array();
        for (int t = 0; t < top; t++)
            json_array_append_new(
                best, token_json(s, p->tops[i * top + t].id, p->tops[i * top + t].logprob));
        json_object_set_new(token, "top_logprobs", best);
        json_array_append_new(content, token);
    }
    return json_pack("{s:o}", "content", content);
}

/* The older form of completions. */
static json_t *completion_logprobs(const Server *s, const Part *p, int64_t first, int64_t end) {
    json_t *tokens = json_array(), *values = json_array(), *tops = json_array();
    int top = p->call->request.top_logprobs;
    for (int64_t i = first; i < end; i++) {
        json_t *token = token_json(s, p->ids.ids[i], p->logprobs[i]), *best = json_object();
        json_array_append(tokens, json_object_get(token, "token"));
        json_array_append(values, json_object_get(token, "logprob"));
        for (int t = 0; t < top; t++) {
            json_t *other = token_json(s, p->tops[i * top + t].id, p->tops[i * top + t].logprob);
            json_object_set(best, json_string_value(json_object_get(other, "token")),
                            json_object_get(other, "logprob"));
            json_decref(other);
        }
        json_array_append_new(tops, best);
        json_decref(token);
    }
    return json_pack("{s:o, s:o, s:o}", "tokens", tokens, "token_logprobs", values, "top_logprobs",
                     tops);
}

static json_t *usage_json(const Call *call) {
    int64_t answer = 0;
    for (int i = 0; i < call->count; i++) answer += call->parts[i].ids.count;
    return json_pack("{s:I, s:I, s:I, s:{s:I}}", "prompt_tokens", (json_int_t)call->prompt.count,
                     "completion_tokens", (json_int_t)answer, "total_tokens",
                     (json_int_t)(call->prompt.count + answer), "prompt_tokens_details",
                     "cached_tokens", (json_int_t)call->reused);
}

static const char *finish_reason(const Part *p, int calls) {
    if (calls && p->ending == ENDING_STOP) return "tool_calls";
    return p->ending == ENDING_LENGTH ? "length" : "stop";
}

static json_t *call_json(const Call *call, int part, int index, const json_t *function) {
    Text arguments = {0};
    text_add_json(&arguments, json_object_get(function, "arguments"));
    json_t *out = json_pack("{s:i, s:o, s:s, s:{s:O, s:o}}", "index", index, "id",
                            json_sprintf("call_%s_%d_%d", call->id, part, index), "type",
                            "function", "function", "name", json_object_get(function, "name"),
                            "arguments", json_stringn(arguments.bytes, arguments.size));
    text_free(&arguments);
    return out;
}

/* A message from all its pieces. */
typedef struct Gathered {
    const Call *call;
    int part;
    Text thought, content;
    json_t *calls;
} Gathered;

static void gather(void *context, PieceKind kind, Slice text, const json_t *function) {
    Gathered *g = context;
    if (kind == PIECE_CALL)
        json_array_append_new(
            g->calls, call_json(g->call, g->part, (int)json_array_size(g->calls), function));
    else
        text_add(kind == PIECE_THOUGHT ? &g->thought : &g->content, text.bytes, text.size);
}

static json_t *text_json(const Text *t) {
    return json_stringn(t->bytes ? t->bytes : "", t->size);
}

static json_t *choice_json(const Server *s, const Part *p, bool chat) {
    const Call *call = p->call;
    bool logprobs = chat ? json_is_true(json_object_get(call->body, "logprobs"))
                         : json_is_integer(json_object_get(call->body, "logprobs"));
    if (!chat)
        return json_pack("{s:i, s:o, s:o, s:s}", "index", p->index, "text", text_json(&p->text),
                         "logprobs",
                         logprobs ? completion_logprobs(s, p, 0, p->ids.count) : json_null(),
                         "finish_reason", finish_reason(p, 0));
    Gathered g = {.call = call, .part = p->index, .calls = json_array()};
    Pieces pieces;
    pieces_init(&pieces, (Slice){call->prompt_text.bytes, call->prompt_text.size}, call->tools,
                gather, &g);
    pieces_feed(&pieces, (Slice){p->text.bytes ? p->text.bytes : "", p->text.size}, true);
    int calls = (int)json_array_size(g.calls);
    json_t *message = json_pack("{s:s, s:o}", "role", "assistant", "content",
                                calls && !g.content.size ? json_null() : text_json(&g.content));
    if (g.thought.size) json_object_set_new(message, "reasoning_content", text_json(&g.thought));
    if (calls) json_object_set(message, "tool_calls", g.calls);
    json_decref(g.calls);
    text_free(&g.thought);
    text_free(&g.content);
    return json_pack("{s:i, s:o, s:o, s:s}", "index", p->index, "message", message, "logprobs",
                     logprobs ? logprobs_json(s, p, 0, p->ids.count) : json_null(), "finish_reason",
                     finish_reason(p, calls));
}

static enum MHD_Result reply_whole(Server *s, struct MHD_Connection *c, Call *call, bool chat) {
    pthread_mutex_lock(&s->board.lock);
    while (call->ended < call->count) {
        call_wait(call);
        if (client_gone(c)) call->cancelled = true;
    }
    pthread_mutex_unlock(&s->board.lock);
    if (call->error) return refuse(c, 400, "invalid_request", call->error);
    if (s->board.stopping) return refuse(c, 503, "stopping", "the server is going down");
    json_t *choices = json_array();
    for (int i = 0; i < call->count; i++)
        json_array_append_new(choices, choice_json(s, &call->parts[i], chat));
    return reply_json(c, 200,
                      json_pack("{s:s, s:s, s:I, s:s, s:o, s:o}", "id", call->id, "object",
                                chat ? "chat.completion" : "text_completion", "created",
                                (json_int_t)call->created, "model", call->model, "choices", choices,
                                "usage", usage_json(call)));
}

/* ---- streams ---- */

/* What of a part has gone into the stream. */
typedef struct Sent {
    size_t text;    /* bytes seen by the pieces, or sent */
    int64_t tokens; /* with their log-probabilities */
    bool opened, closed;
    Pieces pieces;
} Sent;

typedef struct Stream {
    Server *s;
    struct MHD_Connection *connection;
    Call *call;
    bool chat, logprobs, usage, ended;
    Text out; /* waits for the client */
    size_t out_at;
    Sent *sent; /* (parts) */
    int part;   /* being dealt with */
} Stream;

/* One event; `choice` NULL: none, with the usage. */
static void add_event(Stream *t, json_t *choice) {
    const Call *call = t->call;
    json_t *choices = json_array(),
           *event = json_pack("{s:s, s:s, s:I, s:s}", "id", call->id, "object",
                              t->chat ? "chat.completion.chunk" : "text_completion", "created",
                              (json_int_t)call->created, "model", call->model);
    if (choice) json_array_append_new(choices, choice);
    json_object_set_new(event, "choices", choices);
    if (t->usage) json_object_set_new(event, "usage", choice ? json_null() : usage_json(call));
    text_adds(&t->out, "data: ");
    text_add_json(&t->out, event);
    text_adds(&t->out, "\n\n");
    json_decref(event);
}

static json_t *new_logprobs(Stream *t, const Part *p) {
    Sent *sent = &t->sent[p->index];
    if (!t->logprobs || sent->tokens == p->ids.count) return json_null();
    json_t *out =
        (t->chat ? logprobs_json : completion_logprobs)(t->s, p, sent->tokens, p->ids.count);
    sent->tokens = p->ids.count;
    return out;
}

static void add_delta(Stream *t, const Part *p, json_t *delta, const char *reason) {
    add_event(t, json_pack("{s:i, s:o, s:o, s:s?}", "index", p->index, "delta", delta, "logprobs",
                           new_logprobs(t, p), "finish_reason", reason));
}

static void stream_piece(void *context, PieceKind kind, Slice text, const json_t *function) {
    Stream *t = context;
    const Part *p = &t->call->parts[t->part];
    if (kind == PIECE_CALL) {
        json_t *call = call_json(t->call, p->index, t->sent[p->index].pieces.calls - 1, function);
        add_delta(t, p, json_pack("{s:[o]}", "tool_calls", call), NULL);
    } else {
        add_delta(t, p,
                  json_pack("{s:o}", kind == PIECE_THOUGHT ? "reasoning_content" : "content",
                            json_stringn(text.bytes, text.size)),
                  NULL);
    }
}

/* What a part has that the client has not; under the lock. */
static void stream_part(Stream *t, Part *p) {
    Sent *sent = &t->sent[p->index];
    bool last = p->ending != ENDING_NONE;
    Slice text = {p->text.bytes ? p->text.bytes : "", p->text.size};
    if (sent->closed) return;
    t->part = p->index;
    if (t->chat && !sent->opened)
        add_delta(t, p, json_pack("{s:s, s:s}", "role", "assistant", "content", ""), NULL);
    sent->opened = true;
    if (t->chat) {
        pieces_feed(&sent->pieces, text, last);
    } else if (text.size > sent->text) {
        add_event(t, json_pack("{s:i, s:o, s:o, s:n}", "index", p->index, "text",
                               json_stringn(text.bytes + sent->text, text.size - sent->text),
                               "logprobs", new_logprobs(t, p), "finish_reason"));
        sent->text = text.size;
    }
    if (!last) return;
    sent->closed = true;
    const char *reason = finish_reason(p, sent->pieces.calls);
    if (t->chat)
        add_delta(t, p, json_object(), reason);
    else
        add_event(t, json_pack("{s:i, s:s, s:o, s:s}", "index", p->index, "text", "", "logprobs",
                               new_logprobs(t, p), "finish_reason", reason));
}

static void stream_more(Stream *t) {
    Call *call = t->call;
    Board *b = call->board;
    t->out.size = t->out_at = 0;
    pthread_mutex_lock(&b->lock);
    while (!t->out.size && !t->ended) {
        int ended = call->ended;
        for (int i = 0; i < call->count && !call->error; i++) stream_part(t, &call->parts[i]);
        if (ended == call->count) {
            if (call->error) {
                json_t *error = error_json(400, "invalid_request", call->error);
                text_adds(&t->out, "data: ");
                text_add_json(&t->out, error);
                text_adds(&t->out, "\n\n");
                json_decref(error);
            } else if (t->usage) {
                add_event(t, NULL);
            }
            text_adds(&t->out, "data: [DONE]\n\n");
            t->ended = true;
        }
        if (!t->out.size) call_wait(call);
        if (!t->out.size && client_gone(t->connection)) call->cancelled = true;
    }
    pthread_mutex_unlock(&b->lock);
}

static ssize_t stream_read(void *context, uint64_t position, char *buffer, size_t most) {
    Stream *t = context;
    (void)position;
    if (t->out_at == t->out.size) {
        if (t->ended) return MHD_CONTENT_READER_END_OF_STREAM;
        stream_more(t);
    }
    size_t n = t->out.size - t->out_at < most ? t->out.size - t->out_at : most;
    memcpy(buffer, t->out.bytes + t->out_at, n);
    t->out_at += n;
    return (ssize_t)n;
}

static void close_stream(void *context) {
    Stream *t = context;
    call_end(t->call);
    call_free(t->call);
    text_free(&t->out);
    free(t->sent);
    free(t);
}

static enum MHD_Result reply_stream(Server *s, struct MHD_Connection *c, Call *call, bool chat) {
    Stream *t = must_calloc(1, sizeof *t);
    const json_t *options = json_object_get(call->body, "stream_options");
    *t = (Stream){.s = s, .connection = c, .call = call, .chat = chat};
    t->usage = json_is_true(json_object_get(options, "include_usage"));
    t->logprobs = chat ? json_is_true(json_object_get(call->body, "logprobs"))
                       : json_is_integer(json_object_get(call->body, "logprobs"));
    t->sent = must_calloc((size_t)call->count, sizeof *t->sent);
    for (int i = 0; i < call->count; i++)
        pieces_init(
            &t->sent[i].pieces,
            (Slice){call->prompt_text.bytes ? call->prompt_text.bytes : "", call->prompt_text.size},
            call->tools, stream_piece, t);
    struct MHD_Response *r = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, STREAM_BLOCK,
                                                               stream_read, t, close_stream);
    MHD_add_response_header(r, "Content-Type", "text/event-stream");
    MHD_add_response_header(r, "Cache-Control", "no-cache");
    enum MHD_Result result = MHD_queue_response(c, 200, r);
    MHD_destroy_response(r);
    return result;
}

/* ---- routes ---- */

static enum MHD_Result complete(Server *s, struct MHD_Connection *c, const Exchange *x, bool chat) {
    json_t *body = NULL;
    if (!utf8_valid(x->body.bytes ? x->body.bytes : "", x->body.size))
        return refuse(c, 400, "invalid_json", "the body is not UTF-8");
    if (json_read(&body, x->body.bytes ? x->body.bytes : "", x->body.size, "the body") != OK)
        return refuse(c, 400, "invalid_json", status_message());
    if (!json_is_object(body)) {
        json_decref(body);
        return refuse(c, 400, "invalid_json", "the body is no object");
    }
    Call *call = call_new(s, body, chat);
    bool stream = false;
    Status status = get_model(s, call);
    unsigned code = status == OK ? 400 : 404;
    if (status == OK) status = get_bool(&stream, body, "stream");
    if (status == OK) status = (chat ? read_chat : read_completion)(s, call);
    if (status != OK) {
        const char *name = code == 404            ? "model_not_found"
                           : status == ERR_CONFIG ? "context_length_exceeded"
                                                  : "invalid_request";
        call->count = 0;
        call_free(call);
        return refuse(c, code, name, status_message());
    }
    make_parts(call);
    if (!board_submit(&s->board, call, s->o->queue)) {
        call_free(call);
        return refuse(c, 429, "queue_full", "too many requests are waiting");
    }
    if (stream) return reply_stream(s, c, call, chat);
    enum MHD_Result result = reply_whole(s, c, call, chat);
    call_end(call);
    call_free(call);
    return result;
}

static enum MHD_Result list_models(Server *s, struct MHD_Connection *c) {
    json_t *data = json_array();
    for (int a = -1; a < s->m->adapters; a++)
        json_array_append_new(data,
                              json_pack("{s:s, s:s, s:I, s:s, s:s*}", "id",
                                        a < 0 ? s->o->name : s->o->adapters[a], "object", "model",
                                        "created", (json_int_t)s->started, "owned_by", "lapidary",
                                        "parent", a < 0 ? NULL : s->o->name));
    return reply_json(c, 200, json_pack("{s:s, s:o}", "object", "list", "data", data));
}

static enum MHD_Result show_metrics(Server *s, struct MHD_Connection *c) {
    Text t = {0};
    pthread_mutex_lock(&s->board.lock);
    BoardCounts n = s->board.counts;
    int64_t waiting = s->board.waiting, running = s->board.running;
    pthread_mutex_unlock(&s->board.lock);
    const struct {
        const char *name, *kind, *help;
        int64_t value;
    } rows[] = {
        {"requests_total", "counter", "Requests that reached the queue.", n.requests},
        {"requests_refused_total", "counter", "Requests that found the queue full.", n.refused},
        {"requests_failed_total", "counter", "Answers the engine refused.", n.failed},
        {"requests_cancelled_total", "counter", "Answers nobody waited for.", n.cancelled},
        {"prompt_tokens_total", "counter", "Tokens of prompts.", n.prompt_tokens},
        {"prompt_tokens_reused_total", "counter", "Of those, found in the cache.", n.reused_tokens},
        {"answer_tokens_total", "counter", "Tokens answered.", n.answer_tokens},
        {"sequences_waiting", "gauge", "Answers in line.", waiting},
        {"sequences_running", "gauge", "Answers under way.", running}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        text_addf(&t, "# HELP lapidary_%s %s\n# TYPE lapidary_%s %s\nlapidary_%s %" PRId64 "\n",
                  rows[i].name, rows[i].help, rows[i].name, rows[i].kind, rows[i].name,
                  rows[i].value);
    enum MHD_Result result =
        reply(c, 200, "text/plain; version=0.0.4; charset=utf-8", t.bytes, t.size);
    text_free(&t);
    return result;
}

/* Equal without telling, by its time, how far. */
static bool same_secret(const char *a, const char *b) {
    size_t n = strlen(a), m = strlen(b);
    unsigned different = n != m;
    for (size_t i = 0; i < m; i++)
        different |= (unsigned char)(n ? a[i % n] : 0) ^ (unsigned char)b[i];
    return !different;
}

static bool allowed(const Server *s, struct MHD_Connection *c) {
    const char *given = MHD_lookup_connection_value(c, MHD_HEADER_KIND, "Authorization");
    return !s->o->key ||
           (given && !strncmp(given, "Bearer ", 7) && same_secret(given + 7, s->o->key));
}

static enum MHD_Result route(Server *s, struct MHD_Connection *c, const char *url,
                             const char *method, const Exchange *x) {
    bool get = !strcmp(method, "GET") || !strcmp(method, "HEAD"), post = !strcmp(method, "POST");
    bool chat = !strcmp(url, "/v1/chat/completions"), text = !strcmp(url, "/v1/completions");
    if (get && !strcmp(url, "/health"))
        return reply_json(c, 200, json_pack("{s:s}", "status", "ok"));
    if (get && !strcmp(url, "/"))
        return reply(c, 200, "text/html; charset=utf-8", chat_page,
                     (size_t)(chat_page_end - chat_page));
    if (!allowed(s, c)) return refuse(c, 401, "invalid_api_key", "the key is missing or wrong");
    if (get && !strcmp(url, "/metrics")) return show_metrics(s, c);
    if (get && !strcmp(url, "/v1/models")) return list_models(s, c);
    if ((chat || text) && !post)
        return refuse(c, 405, "method_not_allowed", "this address takes POST only");
    if (!chat && !text) return refuse(c, 404, "not_found", "no such address");
    if (x->too_large) return refuse(c, 413, "body_too_large", "the request is too large");
    return complete(s, c, x, chat);
}

static enum MHD_Result handle(void *context, struct MHD_Connection *c, const char *url,
                              const char *method, const char *version, const char *data,
                              size_t *size, void **state) {
    Server *s = context;
    Exchange *x = *state;
    (void)version;
    if (!x) {
        *state = must_calloc(1, sizeof *x);
        return MHD_YES;
    }
    if (*size) {
        x->too_large |= x->body.size + *size > (size_t)s->o->body;
        if (!x->too_large) text_add(&x->body, data, *size);
        *size = 0;
        return MHD_YES;
    }
    return route(s, c, url, method, x);
}

static void forget(void *context, struct MHD_Connection *c, void **state,
                   enum MHD_RequestTerminationCode code) {
    Exchange *x = *state;
    (void)context, (void)c, (void)code;
    if (!x) return;
    text_free(&x->body);
    free(x);
    *state = NULL;
}

/* ---- starting and stopping ---- */

static Status listen_on(int *out, const ServeOptions *o, int64_t *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o->port)};
    socklen_t size = sizeof address;
    int yes = 1, fd;
    const char *host = !strcmp(o->host, "localhost") ? "127.0.0.1" : o->host;
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        FAIL(ERR_USAGE, "--host is '%s', expected an IPv4 address", o->host);
    bool loopback = (ntohl(address.sin_addr.s_addr) >> 24) == 127;
    if (!loopback && !o->key)
        FAIL(ERR_USAGE, "--host %s can be reached from elsewhere: give --key", o->host);
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, size) || listen(fd, 512) ||
        getsockname(fd, (struct sockaddr *)&address, &size)) {
        int reason = errno;
        if (fd >= 0) close(fd);
        FAIL(ERR_IO, "%s:%" PRId64 ": %s", o->host, o->port, strerror(reason));
    }
    *port = ntohs(address.sin_port);
    *out = fd;
    return OK;
}

static Status start_engine(Server *s) {
    const ServeOptions *o = s->o;
    EngineOptions options = {.sequences = o->sequences, .share = true};
    options.chunk = o->sequences > 512 ? o->sequences : 512;
    options.tokens = o->cache                               ? o->cache
                     : 2 * o->context > o->sequences * 1024 ? 2 * o->context
                                                            : o->sequences * 1024;
    if (options.tokens < o->context)
        FAIL(ERR_USAGE, "--cache holds %" PRId64 " tokens, a request takes up to %" PRId64,
             options.tokens, o->context);
    TRY(kv_dtype(&options.kv, &s->m->g, o->kv));
    if (o->draft) {
        TRY(drafter_open(&s->drafter, o->draft, &s->m->g));
        options.drafter = &s->drafter;
        options.draft = DRAFT_TOKENS;
        if (options.chunk < o->sequences * (DRAFT_TOKENS + 1))
            options.chunk = o->sequences * (DRAFT_TOKENS + 1);
    }
    return engine_init(&s->engine, &s->m->g, s->m->tokenizer, &options);
}

Status serve(Model *m, const ServeOptions *o) {
    Server s = {.m = m, .o = o, .started = time(NULL)};
    struct MHD_Daemon *daemon = NULL;
    int fd = -1, got;
    int64_t port = 0;
    sigset_t signals;
    bool opened = false;
    Status status = OK;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    TRY_DONE(listen_on(&fd, o, &port));
    TRY_DONE(sampling_load(&s.sampling, m->dir, &m->g.config));
    TRY_DONE(start_engine(&s));
    pthread_sigmask(SIG_BLOCK, &signals, NULL); /* every thread's; one waits for them below */
    signal(SIGPIPE, SIG_IGN);
    TRY_DONE(board_open(&s.board, &s.engine));
    opened = true;
    daemon = MHD_start_daemon(
        MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL, 0, NULL,
        NULL, handle, &s, MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_NOTIFY_COMPLETED, forget, NULL,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)o->connections, MHD_OPTION_CONNECTION_TIMEOUT,
        (unsigned)IDLE_SECONDS, MHD_OPTION_THREAD_STACK_SIZE, (size_t)STACK_BYTES, MHD_OPTION_END);
    if (!daemon) FAIL_DONE(ERR_IO, "%s:%" PRId64 ": the server cannot be started", o->host, port);
    fprintf(stderr, "http://%s:%" PRId64 "/ serves %s", o->host, port, o->name);
    for (int a = 0; a < m->adapters; a++) fprintf(stderr, ", %s", o->adapters[a]);
    fprintf(stderr, "\n");
    sigwait(&signals, &got);
done:
    if (opened) board_close(&s.board); /* answers under way end first, so that nobody waits */
    if (daemon)
        MHD_stop_daemon(daemon);
    else if (fd >= 0)
        close(fd);
    engine_free(&s.engine);
    drafter_close(&s.drafter);
    return status;
}
