/* run_config.h - a training run: the keys of a run file, typed and checked. */
#ifndef RUN_CONFIG_H
#define RUN_CONFIG_H

#include "configs/node.h"

typedef struct NameList {
    const char **items;
    int count;
} NameList;

typedef struct NumberMap {
    const char **keys;
    double *values;
    int count;
} NumberMap;

typedef enum Method {
    METHOD_FULL,
    METHOD_LORA,
    METHOD_QLORA,
    METHOD_QAT,
    METHOD_QAT_LORA,
} Method;

/* The keys of `quant.format`: what a frozen base is stored as, or what training rounds to. */
typedef enum QuantName {
    QUANT_NF4,
    QUANT_Q4_0,
    QUANT_Q8_0,
    QUANT_INT8,
    QUANT_INT4,
} QuantName;

/* Whether the method trains an adapter; else it trains the weights themselves. */
static inline bool method_has_adapter(Method method) {
    return method != METHOD_FULL && method != METHOD_QAT;
}

/* Whether it trains through rounding. */
static inline bool method_rounds(Method method) {
    return method == METHOD_QAT || method == METHOD_QAT_LORA;
}
typedef enum LossOn { LOSS_ASSISTANT, LOSS_COMPLETION, LOSS_ALL } LossOn;
typedef enum Turns { TURNS_AUTO, TURNS_WHOLE, TURNS_PER_TURN } Turns;
typedef enum Recompute { RECOMPUTE_AUTO, RECOMPUTE_ON, RECOMPUTE_OFF, RECOMPUTE_OFFLOAD } Recompute;
typedef enum ScheduleName {
    SCHEDULE_CONSTANT,
    SCHEDULE_LINEAR,
    SCHEDULE_COSINE,
    SCHEDULE_WSD
} ScheduleName;

/* What rows become: the keys of `data`. */
typedef struct DataConfig {
    NameList train, eval;
    double eval_share;                  /* 0: eval is a list, or nothing */
    NameList field_names, field_values; /* our name -> the file's name */
    int64_t max_length;
    bool media_original; /* the store keeps media as their files are, not as the model reads them */
    int64_t image_tokens, video_tokens, video_frames; /* of a picture, a frame, a video; 0: the
                                                       * model's 280, 70, 32 */
    bool shuffle, packing, add_eos, literal, skip_bad, cut_long, trl_mask;
    bool inline_thoughts, string_arguments, empty_thought;
    LossOn loss_on;
    Turns turns;
    const char *chat_format;
} DataConfig;

typedef struct RunConfig {
    const char *model, *output, *device, *dtype;
    int64_t seed;
    Method method;
    struct {
        int64_t rank;
        double alpha, dropout;
        NameList targets, train_also;
        NumberMap rank_pattern, alpha_pattern;
        bool experts, rslora, dora;
        const char *init; /* a PEFT folder, or NULL */
    } lora;
    struct {
        QuantName format;
        bool nested;                /* `double`: NF4's scales in 8 bits */
        int64_t start_step, warmup; /* steps before rounding begins, and until it is whole */
        bool activations, embeddings, learned_scale;
    } quant;
    DataConfig data;
    struct {
        bool sgd;
        double lr, beta1, beta2, eps, weight_decay, momentum;
        bool states_8bit, no_masters, fused;
    } optimizer;
    struct {
        ScheduleName name;
        double warmup, min_lr;
    } schedule;
    int64_t sequences, accumulate;
    int64_t shard;   /* of several ranks: 0 nothing is shared out, 1 the optimizer's states are,
                      * 2 gradients too, 3 values too */
    int64_t context; /* ranks that share the rows of a micro-batch; 1: each has its own */
    int64_t experts; /* ranks that have the experts between them; 1: each has all */
    int64_t within; /* ranks that share out among them, each such group having everything; 0: all */
    double timeout; /* seconds that a rank waits for another; 0: for ever */
    double clip;    /* 0: none */
    int64_t steps;  /* 0: by epochs */
    double epochs;
    double aux_loss; /* resolved */
    bool train_router;
    Recompute recompute;
    int64_t save_every, save_keep;
    bool save_best;
    int64_t eval_every, early_stop; /* 0: never */
    struct {                        /* suites that the model is asked at every evaluation */
        NameList names;
        const char *data;                   /* folder of questions */
        double limit;                       /* questions of each; 0: all */
        int64_t shots;                      /* -1: the task's own */
        int64_t samples, max_tokens, batch; /* 0: the task's own */
        bool chat, think, run_code;
    } eval_tasks;
    bool stop_on_bad_step;
    Node *tree; /* owns every text above */
} RunConfig;

/* Reads a run file and then `key.path=value` overrides. A wrong run file is ERR_CONFIG, an unknown
 * override key ERR_USAGE. */
Status run_config_load(RunConfig *config, const char *path, char **overrides, int count);
Status run_config_parse(RunConfig *config, const char *text, const char *name, char **overrides,
                        int count);
void run_config_free(RunConfig *config);

/* The defaults of `data`, for commands without a run file. */
DataConfig data_config_default(void);

/* The resolved run as YAML: reading it gives the same run. Caller frees. */
char *run_config_text(const RunConfig *config);

#endif
