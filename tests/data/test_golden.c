/* test_golden.c - the released tokenizer and chat format against the shared golden cases. */
#include "data/chat.h"
#include "formats/file.h"
#include "infer/answer.h"
#include "tests/test.h"

typedef void CaseFunction(const json_t *row, void *context);

static int for_each_row(const char *name, CaseFunction *run, void *context) {
    char *path = shared_path(name), *bytes;
    size_t size;
    int count = 0;
    EXPECT_OK(file_read(&bytes, &size, path, (size_t)1 << 30));
    for (char *line = bytes, *end; (end = strchr(line, '\n')); line = end + 1, count++) {
        json_t *row;
        EXPECT_OK(json_read(&row, line, (size_t)(end - line), path));
        run(row, context);
        json_decref(row);
    }
    free(bytes);
    free(path);
    return count;
}

static Tokenizer *released_tokenizer(void) {
    char *path = shared_path("tokenizer/tokenizer.json");
    *strrchr(path, '/') = 0;
    Tokenizer *t;
    EXPECT_OK(tokenizer_load(&t, path));
    free(path);
    return t;
}

static int case_id(const json_t *row) {
    return (int)json_integer_value(json_object_get(row, "id"));
}

static void expect_ids(const json_t *row, const Tokens *tokens) {
    const json_t *ids = json_object_get(row, "ids");
    EXPECT((size_t)tokens->count == json_array_size(ids), "case %d: %d ids, expected %d",
           case_id(row), (int)tokens->count, (int)json_array_size(ids));
    for (size_t i = 0; i < json_array_size(ids); i++)
        EXPECT(tokens->ids[i] == json_integer_value(json_array_get(ids, i)), "case %d: id %d is %d",
               case_id(row), (int)i, tokens->ids[i]);
}

static void encode_case(const json_t *row, void *context) {
    Tokens tokens = {0};
    Slice text = json_slice(json_object_get(row, "text"));
    tokenizer_encode(context, &tokens, text.bytes, text.size, NULL, 0, false);
    expect_ids(row, &tokens);
    tokens_free(&tokens);
}

CASE(golden, tokenizer_cases_are_exact) {
    Tokenizer *t = released_tokenizer();
    EXPECT(for_each_row("tokenizer/cases.jsonl", encode_case, t) > 100);
    tokenizer_free(t);
}

static void decode_case(const json_t *row, void *context) {
    Tokens tokens = {0};
    size_t i;
    json_t *id;
    json_array_foreach(json_object_get(row, "ids"), i, id)
        tokens_add(&tokens, (int32_t)json_integer_value(id));
    for (int skip = 0; skip < 2; skip++) {
        Text text = {0};
        tokenizer_decode(context, &text, tokens.ids, tokens.count, skip);
        Slice expected = json_slice(json_object_get(row, skip ? "text_skip_special" : "text"));
        EXPECT(text.size == expected.size && !memcmp(text.bytes, expected.bytes, text.size),
               "case %d: '%s', expected '%s'", case_id(row), text.bytes, expected.bytes);
        text_free(&text);
    }
    tokens_free(&tokens);
}

CASE(golden, decoding_cases_are_exact) {
    Tokenizer *t = released_tokenizer();
    EXPECT(for_each_row("tokenizer/decode-cases.jsonl", decode_case, t) > 10);
    tokenizer_free(t);
}

static void chat_case(const json_t *row, void *context) {
    const json_t *expected = json_object_get(row, "rendered");
    Slice name = json_slice(json_object_get(row, "template"));
    ChatOptions options = {
        .format = slice_is(name, "2026-07-small") ? CHAT_SMALL : CHAT_LARGE,
        .add_generation_prompt = json_is_true(json_object_get(row, "add_generation_prompt")),
        .enable_thinking = json_is_true(json_object_get(row, "enable_thinking")),
        .preserve_thinking = json_is_true(json_object_get(row, "preserve_thinking"))};
    Rendered rendered;
    Status status = chat_render(&rendered, json_object_get(row, "messages"),
                                json_object_get(row, "tools"), &options);
    if (!expected) {
        EXPECT(status != OK, "case %d: the template refuses this", case_id(row));
        return;
    }
    EXPECT(status == OK, "case %d: %s", case_id(row), status_message());
    EXPECT(!strcmp(rendered.text.bytes, json_string_value(expected)), "case %d:\n%s\nexpected\n%s",
           case_id(row), rendered.text.bytes, json_string_value(expected));
    Tokens tokens = {0};
    uint8_t *mask;
    chat_encode(context, &rendered, false, &tokens, &mask);
    expect_ids(row, &tokens);
    const json_t *spans = json_object_get(row, "train_spans");
    uint8_t *wanted = must_calloc((size_t)tokens.count + 1, 1);
    for (size_t i = 0; i < json_array_size(spans); i++) {
        const json_t *span = json_array_get(spans, i);
        for (json_int_t k = json_integer_value(json_array_get(span, 0));
             k < json_integer_value(json_array_get(span, 1)); k++)
            wanted[k] = 1;
    }
    for (int64_t i = 0; i < tokens.count; i++)
        EXPECT(mask[i] == wanted[i], "case %d: token %d is %strained", case_id(row), (int)i,
               mask[i] ? "" : "not ");
    free(wanted);
    free(mask);
    tokens_free(&tokens);
    rendered_free(&rendered);
}

CASE(golden, chat_cases_are_exact_in_text_ids_and_mask) {
    Tokenizer *t = released_tokenizer();
    EXPECT(for_each_row("chat/cases.jsonl", chat_case, t) > 50);
    tokenizer_free(t);
}

static void parse_case(const json_t *row, void *context) {
    (void)context;
    Slice prefix = json_slice(json_object_get(row, "prefix")),
          text = json_slice(json_object_get(row, "text"));
    const json_t *tools = json_object_get(row, "tools"), *parsed = json_object_get(row, "parsed");
    json_t *recommended = json_object_get(row, "recommended");
    if (!recommended) recommended = json_object_get(row, "parsed");
    json_t *message = answer_parse(prefix, text, tools);
    EXPECT(json_equal(message, recommended), "case %d: %s", case_id(row), json_dumps(message, 0));
    json_decref(message);
    Status status = answer_parse_strict(&message, prefix, text, tools);
    if (!parsed) {
        EXPECT(status != OK, "case %d: strict mode reads what the released rule does not",
               case_id(row));
        return;
    }
    EXPECT(status == OK, "case %d: %s", case_id(row), status_message());
    EXPECT(json_equal(message, (json_t *)parsed), "case %d strict: %s", case_id(row),
           json_dumps(message, 0));
    json_decref(message);
}

CASE(golden, answers_parse_exactly) {
    EXPECT(for_each_row("chat/parse-cases.jsonl", parse_case, NULL) > 30);
}
