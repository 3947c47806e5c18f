/* test_grammar.c - what a schema lets through, and answers that are held to it. */
#include "formats/file.h"
#include "infer/engine.h"
#include "infer/schema.h"
#include "tests/small_model.h"
#include "tests/test.h"

#include <string.h>

static json_t *read_json(const char *text) {
    json_error_t error;
    json_t *value = json_loads(text, JSON_DECODE_ANY, &error);
    EXPECT(value, "%s: %s", text, error.text);
    return value;
}

/* Whether a grammar reads the whole text, byte by byte and mark by mark. */
static bool reads(const Grammar *g, const Tokenizer *t, const char *text) {
    GrammarState state = {0};
    Tokens tokens = {0};
    tokenizer_encode(t, &tokens, text, strlen(text), NULL, 0, false);
    grammar_begin(g, &state);
    bool good = true;
    for (int64_t i = 0; i < tokens.count && good; i++) {
        good = grammar_allows(g, &state, t, tokens.ids[i]);
        EXPECT(grammar_take(g, &state, t, tokens.ids[i]) == good);
    }
    good = good && grammar_complete(&state);
    grammar_end(&state);
    tokens_free(&tokens);
    return good;
}

static Tokenizer *demo_tokenizer(void) {
    Tokenizer *t;
    EXPECT_OK(tokenizer_load(&t, "demo/tokenizer"));
    return t;
}

CASE(grammar, a_schema_lets_through_what_fits_it) {
    static const struct {
        const char *schema, *fit[8], *wrong[8];
    } cases[] = {
        {"{}",
         {"{}", "[1, -2.5e+3, 0]", "\"a\\u00e9\\n\"", "{\"a\": {\"b\": [null, true]}}", "-0"},
         {"01", "{a: 1}", "\"a", "[1,]", "tru", "\"\\x\"", "1.", "nul"}},
        {"{\"type\": \"integer\"}", {"0", "-12", "1234567890123"}, {"1.5", "1e3", "+1", "", "--1"}},
        {"{\"type\": [\"number\", \"null\"]}", {"1.5E-7", "null"}, {"\"1\"", "true"}},
        {"{\"enum\": [\"red\", \"reddish\", 7, null]}",
         {"\"red\"", "\"reddish\"", "7", "null"},
         {"\"re\"", "77", "\"green\""}},
        {"{\"const\": {\"a\": 1}}", {"{\"a\": 1}"}, {"{\"a\": 2}", "{}"}},
        {"{\"type\": \"array\", \"items\": {\"type\": \"integer\"}}",
         {"[]", "[1]", "[1,2, 3]"},
         {"[1 2]", "[,]", "[\"1\"]", "1"}},
        {"{\"type\": \"array\", \"minItems\": 2, \"maxItems\": 3, \"items\": {\"const\": 1}}",
         {"[1, 1]", "[1, 1, 1]"},
         {"[]", "[1]", "[1, 1, 1, 1]"}},
        {"{\"type\": \"array\", \"minItems\": 2, \"items\": {\"const\": 1}}",
         {"[1, 1]", "[1, 1, 1, 1, 1]"},
         {"[]", "[1]"}},
        {"{\"type\": \"array\", \"maxItems\": 2, \"items\": {\"const\": 1}}",
         {"[]", "[1]", "[1, 1]"},
         {"[1, 1, 1]"}},
        {"{\"type\": \"array\", \"maxItems\": 0}", {"[]", "[ ]"}, {"[1]"}},
        {"{\"type\": \"array\", \"minItems\": 2, \"maxItems\": 2, \"items\": {\"const\": 1}}",
         {"[1, 1]"},
         {"[1]", "[1, 1, 1]", "[]"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\"}, \"b\": "
         "{\"type\": "
         "\"string\"}, \"c\": {\"type\": \"boolean\"}}, \"required\": [\"b\"]}",
         {"{\"b\": \"\"}", "{\"a\": 1, \"b\": \"x\"}", "{\"b\":\"x\",\"c\":true}",
          "{ \"a\": 1, \"b\": \"x\", \"c\": false }"},
         {"{}", "{\"a\": 1}", "{\"b\": \"x\", \"a\": 1}", "{\"b\": 1}", "{\"b\": \"x\",}",
          "{, \"b\": \"x\"}", "{\"b\": \"x\", \"d\": 1}"}},
        {"{\"type\": \"object\", \"properties\": {\"a\": {\"const\": 1}, \"b\": {\"const\": 2}}}",
         {"{}", "{\"a\": 1}", "{\"b\": 2}", "{\"a\": 1, \"b\": 2}"},
         {"{\"a\": 1, }", "{, \"b\": 2}"}},
        {"{\"type\": \"object\", \"additionalProperties\": {\"type\": \"integer\"}}",
         {"{}", "{\"x\": 1, \"y\": 2}"},
         {"{\"x\": \"1\"}", "[]"}},
        {"{\"type\": \"object\", \"additionalProperties\": false}", {"{}"}, {"{\"x\": 1}"}},
        {"{\"anyOf\": [{\"type\": \"integer\"}, {\"type\": \"array\", \"items\": {\"$ref\": "
         "\"#\"}}]}",
         {"1", "[]", "[1, [2, []]]"},
         {"\"1\"", "[true]"}},
        {"{\"$ref\": \"#/$defs/tree\", \"$defs\": {\"tree\": {\"type\": \"object\", "
         "\"properties\": "
         "{\"of\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/tree\"}}}}}}",
         {"{}", "{\"of\": []}", "{\"of\": [{}, {\"of\": [{}]}]}"},
         {"{\"of\": {}}", "{\"of\": [1]}"}},
    };
    Tokenizer *t = demo_tokenizer();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *schema = read_json(cases[i].schema);
        Grammar *g;
        EXPECT_OK(grammar_json(&g, schema, t, NULL));
        for (int k = 0; k < 8 && cases[i].fit[k]; k++)
            EXPECT(reads(g, t, cases[i].fit[k]), "%s refuses %s", cases[i].schema, cases[i].fit[k]);
        for (int k = 0; k < 8 && cases[i].wrong[k]; k++)
            EXPECT(!reads(g, t, cases[i].wrong[k]), "%s reads %s", cases[i].schema,
                   cases[i].wrong[k]);
        grammar_free(g);
        json_decref(schema);
    }
    tokenizer_free(t);
}

CASE(grammar, a_schema_that_is_not_understood_is_refused_by_name) {
    static const char *const cases[][2] = {
        {"{\"type\": \"text\"}", "type 'text'"},
        {"{\"type\": \"string\", \"pattern\": \"a+\"}", "'pattern'"},
        {"{\"type\": \"integer\", \"minimum\": 3}", "'minimum'"},
        {"{\"$ref\": \"#\"}", "refers to itself"},
        {"{\"anyOf\": [{\"type\": \"integer\"}, {\"$ref\": \"#\"}]}", "refers to itself"},
        {"{\"$ref\": \"#/nowhere\"}", "points to nothing"},
        {"{\"$ref\": \"http://example.org/s\"}", "points elsewhere"},
        {"{\"type\": \"array\", \"minItems\": 3, \"maxItems\": 2}", "minItems"},
        {"{\"type\": \"object\", \"properties\": {\"a\": {}}, \"required\": [\"b\"]}", "'b'"},
    };
    Tokenizer *t = demo_tokenizer();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *schema = read_json(cases[i][0]);
        Grammar *g;
        EXPECT(grammar_json(&g, schema, t, NULL) == ERR_CONFIG, "%s", cases[i][0]);
        EXPECT(strstr(status_message(), cases[i][1]), "%s: %s", cases[i][0], status_message());
        json_decref(schema);
    }
    tokenizer_free(t);
}

#define TOOLS                                                                                      \
    "[{\"type\": \"function\", \"function\": {\"name\": \"weigh\", \"parameters\": {\"type\": "    \
    "\"object\", \"properties\": {\"stone\": {\"type\": \"string\", \"enum\": [\"ruby\", "         \
    "\"opal\"]}, \"exact\": {\"type\": \"boolean\"}}, \"required\": [\"stone\"]}}}, "              \
    "{\"type\": \"function\", \"function\": {\"name\": \"stop\", \"parameters\": {}}}]"
#define Q "<|\"|>"

CASE(grammar, calls_are_of_declared_functions) {
    static const char *const fit[] = {
        "<|tool_call>call:weigh{stone:" Q "ruby" Q "}<tool_call|>",
        "<|tool_call>call:weigh{exact:true,stone:" Q "opal" Q "}<tool_call|>",
        "<|tool_call>call:stop{}<tool_call|><|tool_call>call:stop{a:[1,{b:" Q "x" Q
        "}]}<tool_call|>"};
    static const char *const wrong[] = {"",
                                        "<|tool_call>call:weigh{stone:" Q "jade" Q "}<tool_call|>",
                                        "<|tool_call>call:weigh{exact:true}<tool_call|>",
                                        "<|tool_call>call:weigh{stone:\"ruby\"}<tool_call|>",
                                        "<|tool_call>call:polish{}<tool_call|>",
                                        "<|tool_call>call:stop{}",
                                        "weigh it"};
    Tokenizer *t = demo_tokenizer();
    json_t *tools = read_json(TOOLS);
    Grammar *g, *other;
    EXPECT_OK(grammar_calls(&g, t, tools, NULL, true));
    for (size_t i = 0; i < sizeof fit / sizeof *fit; i++) EXPECT(reads(g, t, fit[i]), "%s", fit[i]);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        EXPECT(!reads(g, t, wrong[i]), "%s", wrong[i]);
    EXPECT_OK(grammar_calls(&other, t, tools, "stop", true));
    EXPECT(reads(other, t, fit[2]) && !reads(other, t, fit[0]));
    grammar_free(other);
    EXPECT_OK(grammar_calls(&other, t, tools, NULL, false));
    EXPECT(reads(other, t, fit[0] + strlen("<|tool_call>")) && !reads(other, t, fit[0]));
    grammar_free(other);
    EXPECT(grammar_calls(&other, t, tools, "polish", true) == ERR_USAGE);
    EXPECT_OK(grammar_json(&other, NULL, t, tools)); /* an object or calls */
    EXPECT(reads(other, t, fit[0]) && reads(other, t, "{\"a\": 1}") && !reads(other, t, "[1]"));
    grammar_free(other);
    grammar_free(g);
    json_decref(tools);
    tokenizer_free(t);
}

/* A model of random weights says nothing sensible: what it says within a form is read all the same,
 * and every token it may say next is among those the mask leaves. */
CASE(grammar, answers_of_any_model_fit_the_form) {
    static const char schema_text[] =
        "{\"type\": \"object\", \"properties\": {\"name\": {\"enum\": [\"ruby\", \"opal\"]}, "
        "\"carats\": {\"type\": \"array\", \"items\": {\"type\": \"boolean\"}, \"maxItems\": 3}, "
        "\"cut\": {\"type\": \"boolean\"}}, \"required\": [\"name\", \"carats\", \"cut\"]}";
    Tokenizer *t = demo_tokenizer();
    json_t *schema = read_json(schema_text), *tools = read_json(TOOLS);
    Grammar *forms[2];
    Loaded m;
    char *dir = small_make(small_kinds[0]);
    small_load(&m, dir, F32, STACK_SCORE, NULL);
    EXPECT_OK(grammar_json(&forms[0], schema, t, NULL));
    EXPECT_OK(grammar_calls(&forms[1], t, tools, "weigh", true));
    Engine e;
    EXPECT_OK(engine_init(
        &e, &m.g, t,
        &(EngineOptions){.sequences = 8, .tokens = 8192, .chunk = 64, .kv = F32, .share = true}));
    Sequence *all[24];
    int32_t prompt[] = {2, 40, 41};
    for (int i = 0; i < 24; i++) {
        Request r = {.ids = prompt,
                     .count = 3,
                     .grammar = forms[i % 2],
                     .sampling = {.temperature = i < 4 ? 0 : 1.5,
                                  .top_p = i % 3 ? 1 : 0.9,
                                  .repetition_penalty = 1,
                                  .seed = (uint64_t)i,
                                  .stops = {1},
                                  .stop_count = 1,
                                  .max_tokens = 200}};
        EXPECT_OK(engine_submit(&e, &all[i], &r));
    }
    while (engine_step(&e)) continue;
    for (int i = 0; i < 24; i++) {
        Text said = {0};
        tokenizer_decode(t, &said, all[i]->ids + 3, sequence_answered(all[i]) - 1, false);
        if (all[i]->ending == ENDING_STOP)
            EXPECT(reads(forms[i % 2], t, said.bytes), "%s", said.bytes);
        else
            EXPECT(i % 2, "%s", said.bytes); /* a call after a call may go on; an object ends */
        EXPECT(strstr(said.bytes, i % 2 ? "call:weigh{" : "\"name\""), "%s", said.bytes);
        text_free(&said);
        engine_drop(&e, all[i]);
    }
    engine_free(&e);
    small_unload(&m);
    tree_remove(dir);
    grammar_free(forms[0]);
    grammar_free(forms[1]);
    json_decref(schema);
    json_decref(tools);
    tokenizer_free(t);
}
