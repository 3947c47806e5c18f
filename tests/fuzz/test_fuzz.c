/* test_fuzz.c - every parser of outside bytes on mutated input, under whatever sanitizer is built
 * in.
 *
 * Each target runs for LAPIDARY_FUZZ_SECONDS (0.2). Inputs are seeds with bytes flipped, spans
 * copied, cut or repeated; the stream of mutations is keyed, so a finding repeats with the same
 * count. */
#include "configs/model_config.h"
#include "configs/run_config.h"
#include "data/picture.h"
#include "data/rows.h"
#include "data/sound.h"
#include "data/store.h"
#include "data/video.h"
#include "eval/table.h"
#include "formats/adapter.h"
#include "formats/file.h"
#include "formats/gguf_model.h"
#include "formats/mmproj.h"
#include "formats/parts.h"
#include "infer/answer.h"
#include "infer/schema.h"
#include "kernels/random.h"
#include "tests/fixture.h"
#include "train/metrics.h"

#include <time.h>
#ifdef HAVE_JPEG
#include <jpeglib.h>
#endif
#ifdef HAVE_PNG
#include <png.h>
#endif
#ifdef HAVE_WEBP
#include <webp/encode.h>
#endif
#ifdef HAVE_SNDFILE
#include <sndfile.h>
#endif

typedef void Target(const char *bytes, size_t size);

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const char *const words[] = {"{",
                                    "}",
                                    "[",
                                    "]",
                                    "\"",
                                    ":",
                                    ",",
                                    "null",
                                    "-1",
                                    "9223372036854775808",
                                    "1e999",
                                    "<|\"|>",
                                    "<|tool_call>call:",
                                    "<tool_call|>",
                                    "<|channel>thought\n",
                                    "<channel|>",
                                    "<turn|>",
                                    "\\u0000",
                                    "\xff",
                                    "data_offsets",
                                    "shape",
                                    "0",
                                    "4294967296",
                                    "\n",
                                    "  ",
                                    "- ",
                                    "&a",
                                    "*a",
                                    "type",
                                    "object"};

static void fuzz(const char *const *seeds, const size_t *sizes, int count, Target *target) {
    const char *text = getenv("LAPIDARY_FUZZ_SECONDS");
    double end = now() + (text ? atof(text) : 0.2);
    size_t space = 1 << 18;
    char *bytes = must_malloc(space + 64);
    for (uint64_t run = 0; now() < end; run++) {
        uint64_t key = random_key(99, run), draw = 0;
#define DRAW(n) ((size_t)(random_u64(key, draw++) % (uint64_t)((n) ? (n) : 1)))
        int seed = (int)DRAW(count);
        size_t size = sizes[seed] < space ? sizes[seed] : space;
        memcpy(bytes, seeds[seed], size);
        for (size_t edits = run ? 1 + DRAW(8) : 0; edits; edits--) {
            size_t at = DRAW(size), length = 1 + DRAW(16), kind = DRAW(6);
            const char *word = words[DRAW(sizeof words / sizeof *words)];
            if (kind == 0 && size) {
                bytes[at] = (char)DRAW(256);
            } else if (kind == 1 && size) {
                bytes[at] ^= (char)(1 << DRAW(8));
            } else if (kind == 2 && at + length < size) {
                memmove(bytes + at, bytes + at + length, size - at - length);
                size -= length;
            } else if (kind == 3 && size + length < space && at + length < size) {
                memmove(bytes + at + length, bytes + at, size - at);
                size += length;
            } else if (kind == 4 && size + strlen(word) < space) {
                memmove(bytes + at + strlen(word), bytes + at, size - at);
                memcpy(bytes + at, word, strlen(word));
                size += strlen(word);
            } else if (kind == 5) {
                size = at;
            }
        }
        char *exact = must_malloc(size); /* so that reading beyond the end is seen */
        memcpy(exact, bytes, size);
        target(exact, size);
        free(exact);
    }
    free(bytes);
}

#define FUZZ_TEXTS(target, ...)                                                                    \
    do {                                                                                           \
        const char *texts[] = {__VA_ARGS__};                                                       \
        size_t lengths[sizeof texts / sizeof *texts];                                              \
        for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) lengths[i] = strlen(texts[i]);   \
        fuzz(texts, lengths, (int)(sizeof texts / sizeof *texts), target);                         \
    } while (0)

static void fuzz_file(const char *path, Target *target) {
    char *bytes;
    size_t size;
    EXPECT_OK(file_read(&bytes, &size, path, 1 << 26));
    const char *seeds[] = {bytes};
    fuzz(seeds, &size, 1, target);
    free(bytes);
}

static void on_safetensors(const char *bytes, size_t size) {
    Safetensors s;
    if (safetensors_parse(&s, (const uint8_t *)bytes, size, "fuzz") != OK) return;
    for (int i = 0; i < s.count; i++)
        for (size_t k = 0; k < s.tensors[i].size; k += s.tensors[i].size / 4 + 1)
            if (s.tensors[i].bytes[k] == 255) status_message();
    safetensors_close(&s);
}

CASE(fuzz, safetensors) {
    char seed[400] = {0};
    const char *header = "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]},\"b\":"
                         "{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[16,22]}}";
    seed[0] = (char)strlen(header);
    memcpy(seed + 8, header, strlen(header));
    const char *seeds[] = {seed};
    size_t size = 8 + strlen(header) + 22;
    fuzz(seeds, &size, 1, on_safetensors);
}

/* Weights in several tensors, from other packages. */
static void on_parts(const char *bytes, size_t size) {
    Safetensors s;
    PartsList list;
    if (safetensors_parse(&s, (const uint8_t *)bytes, size, "fuzz") != OK) return;
    const StoredTensor **tensors = must_malloc((size_t)(s.count + 1) * sizeof *tensors);
    int count = s.count;
    for (int i = 0; i < count; i++) tensors[i] = &s.tensors[i];
    if (parts_collect(&list, tensors, &count) == OK) {
        for (int i = 0; i < list.count; i++) {
            void *blocks = must_malloc(list.whole[i].size);
            (void)!parts_read(&list.whole[i], blocks);
            free(blocks);
        }
        parts_free(&list);
    }
    free(tensors);
    safetensors_close(&s);
}

CASE(fuzz, parts) {
    static const char *const names[] = {"module_nf4", "module_nf4_nested", "module_int4",
                                        "module_int8", "module_int8_packed"};
    const char *seeds[5];
    size_t sizes[5];
    Fixture f = fixture_open_plain("quantize.h5");
    for (int i = 0; i < 5; i++) {
        int64_t size;
        seeds[i] = (const char *)fixture_bytes(&f, names[i], &size);
        sizes[i] = (size_t)size;
    }
    fuzz(seeds, sizes, 5, on_parts);
}

static void on_model_config(const char *bytes, size_t size) {
    ModelConfig c;
    if (model_config_parse(&c, bytes, size, "fuzz") != OK) return;
    for (int l = 0; l < c.num_hidden_layers; l++) block_config(&c, l);
}

CASE(fuzz, model_config) {
    char *a = preset_config("e2b", 6), *b = preset_config("26b-a4b", 6);
    FUZZ_TEXTS(on_model_config, a, b);
    free(a), free(b);
}

static void on_run_config(const char *bytes, size_t size) {
    RunConfig c;
    char *text = must_calloc(size + 1, 1);
    memcpy(text, bytes, size);
    if (run_config_parse(&c, text, "fuzz", NULL, 0) == OK) {
        free(run_config_text(&c));
        run_config_free(&c);
    }
    free(text);
}

CASE(fuzz, run_config) {
    FUZZ_TEXTS(on_run_config,
               "model: m\noutput: o\nlora: {rank: 4, targets: [a, b], rank_pattern: {x: 3}}\n"
               "data: {train: [a, b], eval: 0.1, fields: {prompt: q}}\nclip: null\n");
}

static void on_tokenizer(const char *bytes, size_t size) {
    Tokenizer *t;
    Tokens ids = {0};
    if (tokenizer_parse(&t, bytes, size, "fuzz") != OK) return;
    tokenizer_encode(t, &ids, "Milk <turn|> \xc3\xa9", 16, NULL, 0, true);
    Text text = {0};
    tokenizer_decode(t, &text, ids.ids, ids.count, false);
    text_free(&text);
    tokens_free(&ids);
    tokenizer_free(t);
}

CASE(fuzz, tokenizer) {
    fuzz_file("demo/tokenizer/tokenizer.json", on_tokenizer);
}

static RowReader reader;
static DataConfig config;

static void drop_sample(void *context, const Sample *sample) {
    (void)context;
    if (sample->count && sample->ids[0] < 0) abort();
}

static void on_row(const char *bytes, size_t size) {
    json_t *row;
    if (!utf8_valid(bytes, size) || json_read(&row, bytes, size, "fuzz") != OK) return;
    if (row_convert(&reader, row, drop_sample, NULL) != OK) status_message();
    json_decref(row);
}

CASE(fuzz, rows_and_chat_templates) {
    Tokenizer *t;
    EXPECT_OK(tokenizer_load(&t, "demo/tokenizer"));
    config = data_config_default();
    config.chat_format = "large";
    EXPECT_OK(row_reader_init(&reader, &config, t, "demo/tokenizer"));
    FUZZ_TEXTS(on_row,
               "{\"messages\": [{\"role\": \"system\", \"content\": [{\"type\": \"text\", "
               "\"text\": \"s\"}]}, {\"role\": \"user\", \"content\": \"q\"},"
               "{\"role\": \"assistant\", \"reasoning\": \"r\", \"content\": "
               "\"<|channel>thought\\nx<channel|>y\", \"tool_calls\": [{\"id\": \"1\","
               "\"function\": {\"name\": \"f\", \"arguments\": {\"a\": [1, 2.5, {\"b\": "
               "null}]}}}]}, {\"role\": \"tool\", \"tool_call_id\": \"1\","
               "\"content\": \"ok\"}, {\"role\": \"assistant\", \"content\": \"done\"}], "
               "\"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\","
               "\"description\": \"d\", \"parameters\": {\"type\": \"object\", \"properties\": "
               "{\"a\": {\"type\": \"array\", \"items\": {\"type\":"
               "[\"integer\", \"null\"], \"properties\": {\"z\": {\"type\": \"object\"}}}}}, "
               "\"required\": [\"a\"]}}}]}",
               "{\"conversations\": [{\"from\": \"human\", \"value\": \"q\"}, {\"from\": \"gpt\", "
               "\"value\": \"a\"}]}",
               "{\"prompt\": \"a\", \"completion\": \"b\"}", "{\"text\": \"some text\"}");
    tokenizer_free(t);
}

static void on_answer(const char *bytes, size_t size) {
    json_t *message, *tools = json_pack("[{s:{s:s, s:{s:{s:{s:s}}}}}]", "function", "name", "f",
                                        "parameters", "properties", "a", "type", "integer");
    json_decref(answer_parse((Slice){"<|turn>model\n", 13}, (Slice){bytes, size}, tools));
    if (answer_parse_strict(&message, (Slice){"", 0}, (Slice){bytes, size}, tools) == OK)
        json_decref(message);
    json_decref(tools);
}

CASE(fuzz, answers) {
    FUZZ_TEXTS(on_answer,
               "<|channel>thought\nhm<channel|>text<|tool_call>call:f{a:<|\"|>3<|\"|>,b:[1,{c:null}"
               "]}<tool_call|><|tool_response>",
               "<|tool_call>call:f{\"a\": 1, 'b': tru}<turn|>", "plain<turn|>");
}

static void on_file(const char *name, const char *bytes, size_t size) {
    char *path = path_join(test_folder(), name);
    EXPECT_OK(file_write(path, bytes, size));
    free(path);
}

static void on_adapter_config(const char *bytes, size_t size) {
    AdapterSpec spec;
    on_file("adapter_config.json", bytes, size);
    if (peft_load_spec(&spec, test_folder()) == OK) adapter_spec_free(&spec);
}

CASE(fuzz, adapter_config) {
    FUZZ_TEXTS(on_adapter_config,
               "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, \"target_modules\": "
               "[\"q_proj\"], \"rank_pattern\": {\"a\": 3}}");
}

static void on_store(const char *bytes, size_t size) {
    char *path = path_join(test_folder(), "data.h5");
    Store s;
    on_file("data.h5", bytes, size);
    if (store_open(&s, path, NULL, NULL, 0) == OK) store_close(&s);
    free(path);
}

CASE(fuzz, datasets) {
    Tokenizer *t;
    DataConfig c = data_config_default();
    char *rows = path_join(test_folder(), "rows.jsonl"),
         *path = path_join(test_folder(), "seed.h5");
    const char *files[] = {rows};
    EXPECT_OK(tokenizer_load(&t, "demo/tokenizer"));
    const char *text = "{\"text\": \"one\"}\n{\"text\": \"two words\"}\n";
    on_file("rows.jsonl", text, strlen(text));
    c.train = (NameList){files, 1};
    EXPECT_OK(row_reader_init(&reader, &c, t, "demo/tokenizer"));
    EXPECT_OK(store_build(path, &reader, &c, 1, NULL, NULL));
    fuzz_file(path, on_store);
    tokenizer_free(t);
    free(rows), free(path);
}

static void on_questions(const char *bytes, size_t size) {
    char *path = path_join(test_folder(), "questions.h5");
    json_t *questions;
    on_file("questions.h5", bytes, size);
    if (table_load(&questions, path) == OK) json_decref(questions);
    free(path);
}

static void on_schema(const char *bytes, size_t size) {
    json_t *schema;
    Grammar *g;
    GrammarState state = {0};
    if (json_read(&schema, bytes, size, "fuzz") != OK) return;
    if (grammar_json(&g, schema, NULL, NULL) == OK) {
        grammar_begin(g, &state);
        grammar_end(&state);
        grammar_free(g);
    }
    json_decref(schema);
}

CASE(fuzz, schemas) {
    FUZZ_TEXTS(
        on_schema,
        "{\"type\": \"object\", \"properties\": {\"a\": {\"$ref\": \"#\"}, \"b\": {\"enum\": "
        "[\"x\", 1]}}, \"required\": [\"b\"]}",
        "{\"anyOf\": [{\"type\": [\"integer\", \"null\"]}, {\"type\": \"array\", \"items\": "
        "{\"$ref\": \"#/anyOf\"}, \"minItems\": 1, \"maxItems\": 3}]}");
}

/* HDF5 that others wrote is read by another process, which may fall. */
CASE(fuzz, questions) {
    fuzz_file("tests/fixtures/questions.h5", on_questions);
}

static void on_metrics(const char *bytes, size_t size) {
    char *path = path_join(test_folder(), "metrics.csv");
    Metrics *rows;
    int64_t count;
    on_file("metrics.csv", bytes, size);
    if (metrics_read(&rows, &count, path) == OK) free(rows);
    free(path);
}

CASE(fuzz, metrics) {
    FUZZ_TEXTS(on_metrics,
               "step,epoch,loss,aux_loss,lr,grad_norm,skipped,tokens,trained_tokens,tokens_per_s,"
               "memory_bytes,eval_loss\n"
               "1,0.1,2.5,,0.1,3,0,10,9,100,1000,\n2,0.2,2.4,,0.1,3,0,10,9,100,1000,2.2\n");
}

static void target_gguf(const char *bytes, size_t size) {
    Gguf g;
    if (gguf_parse(&g, (const uint8_t *)bytes, size, "fuzz.gguf") != OK) return;
    static const char *const names[] = {"config.json", "config.json", "tokenizer.json",
                                        "generation_config.json", "chat_template.jinja"};
    for (int i = 0; i < 5; i++) {
        char *text = NULL;
        size_t length;
        /* The first time it has its own towers. */
        if (gguf_companion(&g, i ? NULL : &g, names[i], &text, &length) != OK || !text) continue;
        ModelConfig config;
        Tokenizer *t;
        Mmproj towers = {.file = g};
        if (i < 2 && model_config_parse(&config, text, length, "config.json") == OK && !i) {
            (void)!mmproj_read(&towers, &config);
            towers.file = (Gguf){0};
            mmproj_close(&towers);
        }
        if (i == 2 && tokenizer_parse(&t, text, length, "tokenizer.json") == OK) tokenizer_free(t);
        free(text);
    }
    gguf_close(&g);
}

/* What is said of a tower for pictures and of sound without one. */
static void put_towers(GgufWriter *w) {
    static const struct {
        const char *key;
        uint32_t value;
    } sizes[] = {
        {"clip.vision.patch_size", 16},          {"clip.vision.embedding_length", 64},
        {"clip.vision.feed_forward_length", 64}, {"clip.vision.block_count", 2},
        {"clip.vision.attention.head_count", 2}, {"clip.vision.projector.scale_factor", 3}};
    gguf_put_bool(w, "clip.has_vision_encoder", true);
    gguf_put_bool(w, "clip.has_audio_encoder", true);
    gguf_put_text(w, "clip.vision.projector_type", "gemma4v");
    gguf_put_text(w, "clip.audio.projector_type", "gemma4ua");
    gguf_put_f32(w, "clip.vision.attention.layer_norm_epsilon", 1e-6f);
    gguf_put_f32(w, "clip.audio.attention.layer_norm_epsilon", 1e-6f);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        gguf_put_u32(w, sizes[i].key, sizes[i].value);
}

/* A whole small model's metadata: few tokens, one tensor of each kind of block. */
static char *gguf_seed(size_t *size) {
    GgufWriter *w;
    char path[300], *bytes;
    int64_t table[] = {300, 256}, row[] = {256}, places[] = {2, 4, 64}, projection[] = {128, 64};
    static uint8_t data[300 * 256];
    snprintf(path, sizeof path, "%s/seed.gguf", test_folder());
    ModelConfig config;
    char *json = preset_config("tiny", 0);
    EXPECT_OK(model_config_parse(&config, json, strlen(json), "tiny"));
    GgufModel model = {&config, "demo/tokenizer", "seed", Q4_0};
    EXPECT_OK(gguf_create(&w, path));
    EXPECT_OK(gguf_put_model(w, &model, 1));
    put_towers(w);
    gguf_declare(w, "token_embd.weight", Q6_K, 2, table);
    gguf_declare(w, "output_norm.weight", F32, 1, row);
    gguf_declare(w, "blk.0.attn_q.weight", Q4_0, 1, row);
    gguf_declare(w, "v.position_embd.weight", F32, 3, places);
    gguf_declare(w, "mm.a.input_projection.weight", F32, 2, projection);
    EXPECT_OK(gguf_begin(w));
    EXPECT_OK(gguf_write(w, data, 300 * 210));
    EXPECT_OK(gguf_write(w, data, 1024));
    EXPECT_OK(gguf_write(w, data, 144));
    EXPECT_OK(gguf_write(w, data, 2 * 4 * 64 * 4));
    EXPECT_OK(gguf_write(w, data, 128 * 64 * 4));
    EXPECT_OK(gguf_commit(w));
    EXPECT_OK(file_read(&bytes, size, path, 1 << 24));
    free(json);
    return bytes;
}

CASE(fuzz, gguf) {
    size_t sizes[2];
    char *whole = gguf_seed(&sizes[0]);
    /* The head alone too: mutations then meet metadata more often than tokens. */
    const char *seeds[] = {whole, whole};
    sizes[1] = sizes[0] < 4096 ? sizes[0] : 4096;
    fuzz(seeds, sizes, 2, target_gguf);
    free(whole);
}

/* ---- pictures and sound ---- */

static void on_picture(const char *bytes, size_t size) {
    Picture p;
    /* A few bytes may say that they are millions of pixels: those are decoded, but not over again.
     */
    if (picture_decode(&p, (const uint8_t *)bytes, size, "fuzz") == OK) picture_free(&p);
}

static void draw(uint8_t *pixels, int side) {
    for (int i = 0; i < side * side * 3; i++) pixels[i] = (uint8_t)(i * 7 + i / 97);
}

CASE(fuzz, pictures) {
    enum { SIDE = 24, MOST = 4 };
    static uint8_t pixels[SIDE * SIDE * 3];
    const char *seeds[MOST];
    size_t sizes[MOST];
    int count = 0;
    char ppm[16 + sizeof pixels];
    draw(pixels, SIDE);
    int head = snprintf(ppm, 16, "P6 %d %d 255\n", SIDE, SIDE);
    memcpy(ppm + head, pixels, sizeof pixels);
    seeds[count] = ppm, sizes[count++] = (size_t)head + sizeof pixels;
#ifdef HAVE_JPEG
    struct jpeg_compress_struct jpeg = {0};
    struct jpeg_error_mgr errors;
    unsigned char *jpeg_bytes = NULL;
    unsigned long jpeg_size = 0;
    jpeg.err = jpeg_std_error(&errors);
    jpeg_create_compress(&jpeg);
    jpeg_mem_dest(&jpeg, &jpeg_bytes, &jpeg_size);
    jpeg.image_width = jpeg.image_height = SIDE;
    jpeg.input_components = 3;
    jpeg.in_color_space = JCS_RGB;
    jpeg_set_defaults(&jpeg);
    jpeg_start_compress(&jpeg, TRUE);
    for (int y = 0; y < SIDE; y++) {
        JSAMPROW row = pixels + y * SIDE * 3;
        jpeg_write_scanlines(&jpeg, &row, 1);
    }
    jpeg_finish_compress(&jpeg);
    jpeg_destroy_compress(&jpeg);
    seeds[count] = (char *)jpeg_bytes, sizes[count++] = jpeg_size;
#endif
#ifdef HAVE_PNG
    png_image png = {
        .version = PNG_IMAGE_VERSION, .width = SIDE, .height = SIDE, .format = PNG_FORMAT_RGB};
    png_alloc_size_t png_size = 1 << 16;
    char *png_bytes = must_malloc(png_size);
    EXPECT(png_image_write_to_memory(&png, png_bytes, &png_size, 0, pixels, 0, NULL), "a PNG");
    seeds[count] = png_bytes, sizes[count++] = png_size;
#endif
#ifdef HAVE_WEBP
    uint8_t *webp_bytes;
    size_t webp_size = WebPEncodeRGB(pixels, SIDE, SIDE, SIDE * 3, 80, &webp_bytes);
    seeds[count] = (char *)webp_bytes, sizes[count++] = webp_size;
#endif
    fuzz(seeds, sizes, count, on_picture);
}

#ifdef HAVE_LIBAV
static void on_video(const char *bytes, size_t size) {
    Video v;
    if (video_decode(&v, (const uint8_t *)bytes, size, 3, "fuzz") == OK) video_free(&v);
}

/* A seed without a codec: what is ours is how bytes are handed over, chosen and converted. */
CASE(fuzz, videos) {
    enum { SIDE = 16, FRAMES = 5, FRAME = 6 + SIDE * SIDE * 3 / 2 };
    char y4m[64 + FRAMES * FRAME];
    int at = snprintf(y4m, 64, "YUV4MPEG2 W%d H%d F25:1 C420\n", SIDE, SIDE);
    for (int f = 0; f < FRAMES; f++, at += FRAME) {
        memcpy(y4m + at, "FRAME\n", 6);
        memset(y4m + at + 6, 40 * f, FRAME - 6);
    }
    const char *seeds[] = {y4m};
    size_t sizes[] = {(size_t)at};
    fuzz(seeds, sizes, 1, on_video);
}
#endif

static void on_sound(const char *bytes, size_t size) {
    Sound s;
    if (sound_decode(&s, (const uint8_t *)bytes, size, "fuzz") == OK) sound_free(&s);
}

CASE(fuzz, sounds) {
    enum { SAMPLES = 900 };
    char wav[44 + 2 * SAMPLES] = "RIFF\x2c\x07\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0"
                                 "\x7d\0\0\2\0\x10\0data\x08\x07\0";
    for (int i = 0; i < 2 * SAMPLES; i++) wav[44 + i] = (char)(i * 13);
    const char *seeds[3] = {wav};
    size_t sizes[3] = {sizeof wav};
    int count = 1;
#ifdef HAVE_SNDFILE
    static const int kinds[] = {SF_FORMAT_FLAC | SF_FORMAT_PCM_16,
                                SF_FORMAT_OGG | SF_FORMAT_VORBIS};
    float samples[SAMPLES];
    for (int i = 0; i < SAMPLES; i++) samples[i] = (float)(i % 50) / 60.0f;
    for (int k = 0; k < 2; k++) {
        char *path = must_format("%s/seed%d", test_folder(), k), *bytes;
        SF_INFO info = {.samplerate = 22050, .channels = 1, .format = kinds[k]};
        SNDFILE *file = sf_open(path, SFM_WRITE, &info);
        EXPECT(file && sf_writef_float(file, samples, SAMPLES) == SAMPLES, "a seed");
        sf_close(file);
        EXPECT_OK(file_read(&bytes, &sizes[count], path, 1 << 20));
        seeds[count++] = bytes;
        free(path);
    }
#endif
    fuzz(seeds, sizes, count, on_sound);
}
