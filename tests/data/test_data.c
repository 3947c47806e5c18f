/* test_data.c - rows to samples, stores, and the order the loader gives. */
#include "data/loader.h"
#include "formats/file.h"
#include "tests/test.h"

static Tokenizer *small_tokenizer(void) {
    Tokenizer *t;
    EXPECT_OK(tokenizer_load(&t, "demo/tokenizer"));
    return t;
}

typedef struct Taken {
    Text trained[16], whole[16];
    int count;
    const Tokenizer *tokenizer;
} Taken;

static void take(void *context, const Sample *s) {
    Taken *taken = context;
    Tokens masked = {0};
    for (int64_t i = 0; i < s->count; i++)
        if (s->mask[i]) tokens_add(&masked, s->ids[i]);
    tokenizer_decode(taken->tokenizer, &taken->trained[taken->count], masked.ids, masked.count,
                     false);
    tokenizer_decode(taken->tokenizer, &taken->whole[taken->count], s->ids, s->count, false);
    taken->count++;
    tokens_free(&masked);
}

static Taken *convert(DataConfig *config, const char *row) {
    Taken *taken = must_calloc(1, sizeof *taken);
    Tokenizer *t = small_tokenizer();
    RowReader r;
    json_t *value;
    taken->tokenizer = t;
    EXPECT_OK(row_reader_init(&r, config, t, "demo/tokenizer"));
    EXPECT_OK(json_read(&value, row, strlen(row), "row"));
    EXPECT_OK(row_convert(&r, value, take, taken));
    json_decref(value);
    return taken;
}

static DataConfig small_config(const char *format) {
    DataConfig c = data_config_default();
    c.chat_format = format;
    c.max_length = 256;
    return c;
}

CASE(rows, each_kind_trains_what_it_should) {
    DataConfig c = small_config("small");
    Taken *t = convert(&c, "{\"text\": \"Milk is white.\"}");
    EXPECT(t->count == 1 && !strcmp(t->whole[0].bytes, "<bos>Milk is white.<eos>") &&
           !strcmp(t->trained[0].bytes, "Milk is white.<eos>"));
    t = convert(&c, "{\"prompt\": \"A \", \"completion\": \"hen.\"}");
    EXPECT(t->count == 1 && !strcmp(t->whole[0].bytes, "<bos>A hen.<eos>") &&
           !strcmp(t->trained[0].bytes, "hen.<eos>"));
    t = convert(&c, "{\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}, {\"from\": "
                    "\"gpt\", \"value\": \"a\"}]}");
    EXPECT(!strcmp(t->whole[0].bytes, "<bos><|turn>user\nq<turn|>\n<|turn>model\na<turn|>\n") &&
           !strcmp(t->trained[0].bytes, "a<turn|>"));
    t = convert(&c, "{\"instruction\": \"do\", \"input\": \"it\", \"output\": \"done\"}");
    EXPECT(!strcmp(t->whole[0].bytes,
                   "<bos><|turn>user\ndo\n\nit<turn|>\n<|turn>model\ndone<turn|>\n"),
           "%s", t->whole[0].bytes);
    c.loss_on = LOSS_ALL;
    t = convert(&c, "{\"prompt\": \"A \", \"completion\": \"hen.\"}");
    EXPECT(!strcmp(t->trained[0].bytes, "A hen.<eos>"));
}

#define CHAT                                                                                       \
    "{\"messages\": "                                                                              \
    "[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b\"},"           \
    "{\"role\":\"user\",\"content\":\"c\"},{\"role\":\"assistant\",\"content\":\"d\"}]}"

CASE(rows, turns_are_trained_whole_or_one_by_one) {
    DataConfig c = small_config("small");
    Taken *t = convert(&c, CHAT);
    EXPECT(t->count == 1 && !strcmp(t->trained[0].bytes, "b<turn|>d<turn|>"));
    c.loss_on = LOSS_COMPLETION;
    t = convert(&c, CHAT);
    EXPECT(t->count == 1 && !strcmp(t->trained[0].bytes, "d<turn|>"));
    c = small_config("large"); /* large models: one sample a turn, an untrained empty thought before
                                  the answer */
    t = convert(&c, CHAT);
    EXPECT(t->count == 2 && !strcmp(t->trained[0].bytes, "b<turn|>") &&
           !strcmp(t->trained[1].bytes, "d<turn|>"));
    EXPECT(!strcmp(
               t->whole[0].bytes,
               "<bos><|turn>user\na<turn|>\n<|turn>model\n<|channel>thought\n<channel|>b<turn|>\n"),
           "%s", t->whole[0].bytes);
    EXPECT(!strstr(strstr(t->whole[1].bytes, "model"), "model\n<|channel>thought\n<channel|>b"));
}

CASE(rows, inline_thoughts_and_string_arguments_are_repaired) {
    DataConfig c = small_config("small");
    Taken *t = convert(
        &c,
        "{\"messages\": [{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":"
        "\"<|channel>thought\\nhm<channel|>yes\"}]}");
    EXPECT(t->count == 1 &&
               !strcmp(t->trained[0].bytes, "<|channel>thought\nhm\n<channel|>yes<turn|>"),
           "%s", t->trained[0].bytes);
    EXPECT(strstr(t->whole[0].bytes, "<|think|>"));
    t = convert(&c, "{\"messages\": "
                    "[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"tool_calls\":"
                    "[{\"function\":"
                    "{\"name\":\"f\",\"arguments\":\"{\\\"x\\\": 1}\"}}]}]}");
    EXPECT(!strcmp(t->trained[0].bytes, "<|tool_call>call:f{x:1}<tool_call|><|tool_response>"),
           "%s", t->trained[0].bytes);
}

CASE(rows, literal_text_makes_no_control_tokens) {
    DataConfig c = small_config("small");
    c.literal = true;
    Taken *t = convert(&c, "{\"messages\": [{\"role\":\"user\",\"content\":\"say "
                           "<turn|>\"},{\"role\":\"assistant\",\"content\":\"no\"}]}");
    EXPECT(strstr(t->whole[0].bytes, "say <turn|><turn|>"));
    int stops = 0;
    Tokens ids = {0};
    Rendered r;
    uint8_t *mask;
    ChatOptions options = {.format = CHAT_SMALL};
    json_t *list = json_pack("[{s:s, s:s}]", "role", "user", "content", "say <turn|>");
    EXPECT_OK(chat_render(&r, list, NULL, &options));
    chat_encode(t->tokenizer, &r, true, &ids, &mask);
    for (int64_t i = 0; i < ids.count; i++)
        stops += ids.ids[i] == tokenizer_find(t->tokenizer, "<turn|>");
    EXPECT(stops == 1, "%d control tokens", stops);
}

CASE(rows, long_chats_are_dropped_or_cut_at_a_whole_turn) {
    DataConfig c = small_config("small");
    c.max_length = 16;
    Taken *t = convert(&c, CHAT);
    EXPECT(t->count == 0);
    c.cut_long = true;
    t = convert(&c, CHAT);
    EXPECT(t->count == 1 && !strcmp(t->trained[0].bytes, "b<turn|>"), "%s",
           t->count ? t->trained[0].bytes : "nothing");
}

CASE(rows, long_documents_are_cut_into_pieces_that_begin_with_bos) {
    DataConfig c = small_config("small");
    c.max_length = 8;
    Taken *t = convert(
        &c, "{\"text\": \"Anna and Ben went to the quarry on Monday. Anna carried a lens.\"}");
    EXPECT(t->count > 2);
    Text joined = {0};
    for (int i = 0; i < t->count; i++) {
        EXPECT(!strncmp(t->whole[i].bytes, "<bos>", 5));
        text_adds(&joined, t->trained[i].bytes);
    }
    EXPECT(!strcmp(joined.bytes,
                   "Anna and Ben went to the quarry on Monday. Anna carried a lens.<eos>"),
           "%s", joined.bytes);
}

/* ---- store and loader ---- */

static const char *write_rows(const char *name, const char *text) {
    static char path[400];
    snprintf(path, sizeof path, "%s/%s", test_folder(), name);
    EXPECT_OK(file_write(path, text, strlen(text)));
    return path;
}

static Status build(Store *s, const char *rows, DataConfig *c, RowReader *r, const char *h5) {
    static const char *path;
    path = rows;
    c->train = (NameList){&path, 1};
    EXPECT_OK(row_reader_init(r, c, small_tokenizer(), "demo/tokenizer"));
    TRY(store_build(h5, r, c, 7, NULL, NULL));
    return store_open(s, h5, r, c, 7);
}

CASE(store, bad_rows_are_named_or_skipped_and_counted) {
    DataConfig c = small_config("small");
    RowReader r;
    Store s;
    char h5[400];
    snprintf(h5, sizeof h5, "%s/data.h5", test_folder());
    EXPECT_ERROR(build(&s, write_rows("a.jsonl", "{\"text\": \"one\"}\n{\"text\": \n"), &c, &r, h5),
                 "a.jsonl:2");
    EXPECT(!file_exists(h5));
    EXPECT_ERROR(
        build(&s, write_rows("b.jsonl", "{\"text\": \"one\"}\n\n{\"txet\": 3}\n"), &c, &r, h5),
        "b.jsonl:3");
    EXPECT_ERROR(build(&s, write_rows("c.jsonl", "{\"text\": \"\xff\"}\n"), &c, &r, h5),
                 "is not UTF-8");
    EXPECT_ERROR(build(&s, write_rows("d.jsonl", ""), &c, &r, h5), "no row gave a training sample");
    c.skip_bad = true;
    EXPECT_OK(build(&s,
                    write_rows("e.jsonl", "{\"text\": \"one\"}\nnonsense\n{\"text\": \"two\"}\n"),
                    &c, &r, h5));
    EXPECT(s.counts.rows == 3 && s.counts.bad == 1 && s.train.count == 2);
    EXPECT(s.train.sources[3] == 3, "the second sample came from line %d", s.train.sources[3]);
    store_close(&s);
}

CASE(store, stale_and_cut_files_are_refused) {
    DataConfig c = small_config("small");
    RowReader r;
    Store s;
    char h5[400], rows[400];
    snprintf(h5, sizeof h5, "%s/data.h5", test_folder());
    snprintf(rows, sizeof rows, "%s", write_rows("a.jsonl", "{\"text\": \"one\"}\n"));
    EXPECT_OK(build(&s, rows, &c, &r, h5));
    store_close(&s);
    EXPECT_OK(store_open(&s, h5, &r, &c, 7));
    store_close(&s);
    c.add_eos = false;
    EXPECT_ERROR(store_open(&s, h5, &r, &c, 7), "other data settings");
    c.add_eos = true;
    write_rows("a.jsonl", "{\"text\": \"other\"}\n");
    EXPECT_ERROR(store_open(&s, h5, &r, &c, 7), "has changed since");
    char *bytes;
    size_t size;
    EXPECT_OK(file_read(&bytes, &size, h5, 1 << 24));
    EXPECT_OK(file_write(h5, bytes, size / 2));
    EXPECT_ERROR(store_open(&s, h5, NULL, NULL, 0), "no readable HDF5 file");
    bytes[size - 9] ^= 1;
    EXPECT_OK(file_write(h5, bytes, size));
    EXPECT_ERROR(store_open(&s, h5, NULL, NULL, 0), "damaged");
    free(bytes);
}

/* Samples of lengths 3 .. 12 over and over. */
static void build_lengths(Store *s, int count, RowReader *r, DataConfig *c) {
    Text rows = {0};
    char h5[400];
    for (int i = 0; i < count; i++) {
        text_adds(&rows, "{\"text\": \"");
        for (int k = 0; k < 1 + i % 10; k++) text_adds(&rows, "7");
        text_adds(&rows, "\"}\n");
    }
    snprintf(h5, sizeof h5, "%s/lengths.h5", test_folder());
    EXPECT_OK(build(s, write_rows("lengths.jsonl", rows.bytes), c, r, h5));
    text_free(&rows);
}

CASE(loader, packing_is_first_fit_and_segments_are_apart) {
    DataConfig c = small_config("small");
    RowReader r;
    Store s;
    Loader *l;
    MicroBatch *batches;
    int64_t count, trained;
    build_lengths(&s, 100, &r, &c);
    LoaderConfig config = {2, 2, 16, 3, true, true, 0, 1, NULL, 0, 1};
    EXPECT_OK(loader_open(&l, &s, &config));
    EXPECT_OK(loader_start(l, 0));
    int seen[100] = {0};
    for (int64_t step = 0; step < loader_steps(l); step++) {
        EXPECT_OK(loader_next(l, &batches, &count, &trained));
        int64_t targets = 0;
        for (int64_t b = 0; b < count; b++) {
            const Batch *x = &batches[b].batch;
            EXPECT(x->N <= 32);
            for (int64_t i = 0; i < batches[b].sample_count; i++) seen[batches[b].samples[i]]++;
            for (int64_t n = 0; n < x->N; n++) {
                EXPECT(x->positions[n] == n - x->starts[n]);
                if (x->targets[n] >= 0) {
                    targets++;
                    EXPECT(x->targets[n] == x->ids[n + 1] && x->starts[n + 1] == x->starts[n]);
                    EXPECT(x->weights[n] == 1.0f / (float)trained);
                }
            }
        }
        EXPECT(targets == trained);
    }
    for (int i = 0; i < 100; i++) EXPECT(seen[i] == 1, "sample %d came %d times", i, seen[i]);
    /* 100 samples of 750 tokens in all need at least 47 rows of 16. */
    EXPECT(loader_rows(l) < 56, "%d rows", (int)loader_rows(l));
    loader_close(l);
    store_close(&s);
}

CASE(loader, starting_late_gives_the_same_batches) {
    DataConfig c = small_config("small");
    RowReader r;
    Store s;
    build_lengths(&s, 60, &r, &c);
    LoaderConfig config = {1, 3, 20, 5, true, true, 0, 2.5, NULL, 0, 1};
    Loader *whole, *late;
    EXPECT_OK(loader_open(&whole, &s, &config));
    EXPECT_OK(loader_start(whole, 0));
    for (int64_t first = 0; first < loader_steps(whole); first++) {
        MicroBatch *a, *b;
        int64_t a_count, b_count, a_trained, b_trained;
        EXPECT_OK(loader_open(&late, &s, &config));
        EXPECT_OK(loader_start(late, first));
        EXPECT_OK(loader_next(whole, &a, &a_count, &a_trained));
        EXPECT_OK(loader_next(late, &b, &b_count, &b_trained));
        EXPECT(a_count == b_count && a_trained == b_trained);
        for (int64_t i = 0; i < a_count; i++)
            EXPECT(a[i].batch.N == b[i].batch.N &&
                   !memcmp(a[i].ids, b[i].ids, (size_t)a[i].batch.N * 4));
        loader_close(late);
    }
    loader_close(whole);
    store_close(&s);
}

CASE(text, floats_print_as_python_prints_them) {
    static const struct {
        double value;
        const char *text;
    } rows[] = {{18, "18.0"},
                {1e-7, "1e-07"},
                {1e22, "1e+22"},
                {-0.0, "-0.0"},
                {0.1, "0.1"},
                {1e16, "1e+16"},
                {123456789012345680.0, "1.2345678901234568e+17"},
                {0.0001, "0.0001"},
                {0.00001, "1e-05"},
                {1.5, "1.5"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        Text t = {0};
        text_add_real(&t, rows[i].value);
        EXPECT(!strcmp(t.bytes, rows[i].text), "%s, expected %s", t.bytes, rows[i].text);
        text_free(&t);
    }
}

CASE(json, integers_beyond_64_bits_keep_their_digits) {
    json_t *v;
    const char *s = "{\"a\": 123456789012345678901234567890, \"b\": -9223372036854775808, \"c\": "
                    "\"12345678901234567890123\"}";
    EXPECT_OK(json_read(&v, s, strlen(s), "x"));
    Text t = {0};
    text_add_json(&t, v);
    EXPECT(!strcmp(t.bytes, s), "%s", t.bytes);
    text_free(&t);
    json_decref(v);
}

CASE(chat_format, unknown_and_missing_templates_name_the_flag) {
    ChatFormat format;
    char path[400];
    EXPECT_ERROR(chat_format_find(&format, test_folder(), "auto"),
                 "give --chat-format large or small");
    EXPECT_OK(chat_format_find(&format, test_folder(), "small"));
    EXPECT(format == CHAT_SMALL);
    snprintf(path, sizeof path, "%s/chat_template.jinja", test_folder());
    EXPECT_OK(file_write(path, "{{ bos_token }}", 15));
    EXPECT_ERROR(chat_format_find(&format, test_folder(), "auto"), "an unknown chat template");
    EXPECT_ERROR(chat_format_find(&format, test_folder(), "medium"),
                 "expected auto, large or small");
}
