/* command.h - what the files of cli/ share: options, rows in and out. */
#ifndef COMMAND_H
#define COMMAND_H

#include "configs/run_config.h"
#include "data/medium.h"
#include "kernels/tensor.h"

typedef enum OptionKind {
    OPTION_FLAG,
    OPTION_TEXT,
    OPTION_INT,
    OPTION_REAL,
    OPTION_LIST,
    OPTION_PART /* --image FILE and the like: a part of a message at the end of a JSON list */
} OptionKind;

typedef struct OptionList {
    const char *items[64];
    int count;
} OptionList;

typedef struct Option {
    const char *name; /* with its dashes */
    OptionKind kind;
    void *target;     /* bool, const char *, int64_t, double, OptionList or json_t * */
    const char *help; /* "VALUE what it does", or just what it does for a flag */
} Option;

typedef struct Arguments {
    const char *usage, *about;
    const Option *options; /* ends with a NULL name */
    int least, most;       /* positional arguments */
    char **positional;
    int count;
    bool helped; /* --help was given and answered */
} Arguments;

/* Sorts the command line into options and positional arguments; ERR_USAGE names what is wrong. */
Status arguments_parse(Arguments *a, int argc, char **argv);

/* The options that stand for keys of a run file, wherever one is read. */
typedef struct RunOptions {
    const char *device, *dtype, *chat_format;
} RunOptions;

#define RUN_OPTIONS(run)                                                                           \
    {"--device", OPTION_TEXT, &(run).device, "auto|cpu|cuda[:n]  instead of the run file's"},      \
        {"--dtype", OPTION_TEXT, &(run).dtype, "bf16|f32  instead of the run file's"}, {           \
        "--chat-format", OPTION_TEXT, &(run).chat_format,                                          \
            "auto|large|small  instead of the run file's"                                          \
    }

/* Pictures, recordings and videos in the order they are named, as parts of a message. */
typedef struct MediaOptions {
    json_t *parts; /* list; NULL: none */
    MediumOptions reading;
} MediaOptions;

#define MEDIA_FILES(media)                                                                         \
    {"--image", OPTION_PART, &(media).parts, "FILE  a picture; several: again"},                   \
        {"--audio", OPTION_PART, &(media).parts, "FILE  a recording"}, {                           \
        "--video", OPTION_PART, &(media).parts, "FILE  a video"                                    \
    }
#define MEDIA_BUDGETS(reading)                                                                     \
    {"--image-tokens", OPTION_INT, &(reading).image_tokens,                                        \
     "70|140|280|560|1120  most of a picture (the model's, 280)"},                                 \
        {"--video-tokens", OPTION_INT, &(reading).video_tokens, "the same of a frame (70)"}, {     \
        "--video-frames", OPTION_INT, &(reading).video_frames, "N  of a video (32)"                \
    }

/* ERR_USAGE for budgets that there are not. */
Status media_budgets_check(const MediumOptions *reading);

/* A user's message: the parts, then the text; the text alone where there are none. */
json_t *media_message(const MediaOptions *media, const char *text);

/* Loads the run file of the first positional argument with the overrides of the others. */
Status run_arguments_load(RunConfig *config, const Arguments *a, const RunOptions *options);

/* Calls `handle` with every non-empty line of a JSONL file, or with the one row built from TEXT.
 * The handler adds one line to `out`; without `strict` an error of one row becomes {"error": ...}.
 */
typedef Status RowHandler(void *context, const json_t *row, Text *out);
Status rows_run(const char *path, const char *text, bool strict, RowHandler *handle, void *context);

/* [1, 2, 3] */
void text_add_ids(Text *out, const Tokens *ids);

/* The template's switches as a row gives them. */
ChatOptions row_chat_options(const json_t *row, ChatFormat format);

/* The dtype of matrices in bf16-gguf, q8_0-gguf or q4_0-gguf; ERR_USAGE for another name. */
Status gguf_format(DType *dtype, const char *name);

/* Dataset rows may spell nothing as null. */
json_t *row_get(const json_t *row, const char *key);

Status command_init(int argc, char **argv);
Status command_inspect(int argc, char **argv);
Status command_tokenize(int argc, char **argv);
Status command_parse(int argc, char **argv);
Status command_prepare(int argc, char **argv);
Status command_doctor(int argc, char **argv);
Status command_plan(int argc, char **argv);
Status command_train(int argc, char **argv);
Status command_score(int argc, char **argv);
Status command_generate(int argc, char **argv);
Status command_chat(int argc, char **argv);
Status command_serve(int argc, char **argv);
Status command_eval(int argc, char **argv);
Status command_export(int argc, char **argv);
Status command_plot(int argc, char **argv);
Status command_bench(int argc, char **argv);

#endif
