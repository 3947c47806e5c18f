/* engine.h - many sequences through one model: continuous batching over a paged cache.
 *
 * Every pass takes a token of each sequence that is answering and, in what room is left, the next
 * pieces of prompts. Pages are shared by prompts that begin alike; a prompt whose beginning is just
 * being computed for another waits for it. When the cache is full the youngest sequence gives its
 * pages up and starts again later. What a sequence answers depends on its own request alone. */
#ifndef ENGINE_H
#define ENGINE_H

#include "infer/drafter.h"
#include "infer/grammar.h"
#include "infer/pages.h"
#include "infer/reading.h"
#include "infer/stream.h"

#define TOP_LOGPROBS_MAX 20

typedef struct EngineOptions {
    int64_t sequences; /* running at once, at most */
    int64_t tokens;    /* keys kept by full layers, all sequences together */
    int64_t chunk;     /* rows of a pass, at most */
    DType kv;          /* of keys and values: the model's dtype, Q8_0 or Q4_0 */
    bool share;        /* prompts that begin alike share pages */
    Drafter *drafter;  /* guesses tokens ahead, which the model checks; NULL: none. Borrowed */
    int64_t draft;     /* tokens it guesses each time */
} EngineOptions;

typedef struct Sequence Sequence;
typedef void SequenceFunction(void *context, Sequence *s);

typedef struct Request {
    const int32_t *ids; /* (count) the prompt */
    int64_t count;
    const MediaItem *media; /* (media_count) whose soft tokens take the prompt's slots, ascending;
                             * `soft` is there, and borrowed until the sequence ends */
    int64_t media_count;
    int64_t score_from;        /* prompt tokens from here on get a log-probability; 0: none */
    const int32_t *candidates; /* tokens whose log-probability right after the prompt is wanted */
    int candidate_count;
    int adapter;                   /* 0: the base model alone; else one of Model's, from 1 */
    Sampling sampling;             /* max_tokens 0: nothing is answered */
    int top_logprobs;              /* best tokens kept beside each one of the answer */
    const char *const *stop_texts; /* the answer ends before the first of these */
    int stop_text_count;
    int32_t thought_begin, thought_end; /* between these stop texts mean nothing; 0: no thoughts */
    int64_t thought_most; /* tokens of a thought before its end is put there; 0: any number */
    /* Borrowed; NULL: anything. What the answer must be outside thoughts, and what a call must be
     * once its first token came. */
    const Grammar *grammar, *call_grammar;
    int32_t call_begin;         /* that token */
    bool thinks;                /* an answer that must be something may begin with a thought */
    SequenceFunction *on_token; /* after every token of the answer, and at the end; may set
                                 * `cancelled`, may not drop; NULL: nobody */
    void *context;
} Request;

typedef enum Ending {
    ENDING_NONE,   /* still under way */
    ENDING_STOP,   /* a stop token, which is the last of ids, or a stop text */
    ENDING_LENGTH, /* max_tokens, the model's positions or the cache are used up */
    ENDING_CANCELLED,
} Ending;

typedef struct TokenChoice {
    int32_t id;
    float logprob; /* natural logarithm, by the model's logits, before temperature and penalties */
} TokenChoice;

struct Sequence {
    Request request; /* its arrays are the sequence's own */
    int32_t *ids;    /* (count) prompt and answer */
    int32_t *keys;   /* (count) what pages are shared by: the ids, but slots by their content */
    float *logprobs; /* (count) of each token after those before it; NAN: not asked for */
    uint8_t *best;   /* (count) whether it is the most likely one, where logprobs has a number */
    int64_t count, capacity;
    float *candidate_logprobs; /* (candidate_count) */
    bool *candidate_best;
    TokenChoice *tops; /* (answer tokens, top_logprobs) */
    TextStream stream; /* text of the answer, without the stop token */
    size_t text_size;  /* of that, what counts: a stop text and what follows do not */
    Ending ending;
    int64_t thought; /* tokens of the thought under way; 0: none is */
    bool cancelled;  /* set by whoever no longer wants it */
    int64_t reused;  /* prompt tokens whose keys were found in the cache */
    /* the engine's own */
    PageList pages;
    int64_t limit;       /* most tokens */
    int64_t done;        /* tokens whose keys are there */
    int64_t scored;      /* tokens before this have their log-probability, where one is wanted */
    const Grammar *form; /* the grammar that holds now; NULL: none */
    GrammarState form_state;
    int32_t guesses[DRAFT_MAX]; /* of the tokens after the last */
    int guess_count, checked;   /* how many; and how many proved right so far */
    int64_t seat;               /* among those running */
    bool running;
    struct Sequence *next; /* in line */
};

typedef struct EngineCounts {
    int64_t passes, rows, reused; /* rows computed, and prompt tokens that needed none */
    int64_t restarts;             /* sequences that gave up their pages */
    int64_t guessed, right;       /* tokens that the drafter guessed, and that came */
} EngineCounts;

typedef struct Engine {
    Gemma *g;
    const Tokenizer *tokenizer;
    EngineOptions options;
    Pages pages;
    KvSlot *slots;
    Arena cache, activations, scratch;
    /* with a drafter only, (sequences, D): the final state behind each sequence's last token, by
     * its seat; and those of the sequences being guessed on */
    Tensor states, guessing, seat_rows;
    ReadingMemory reading;
    bool *seats;        /* (sequences) which are taken */
    Sequence **running; /* (sequences) the oldest first */
    int64_t running_count;
    Sequence *line; /* of those who wait */
    EngineCounts counts;
    int adapters; /* how many there are */
    bool apart;   /* rows of different adapters cannot share a pass: some are on experts */
    int turn;     /* whose pass is next, where they cannot */
} Engine;

/* The dtype that an option names: NULL or the model's own dtype, q8_0, q4_0. */
Status kv_dtype(DType *kv, const Gemma *g, const char *name);

/* Takes the memory: cache, activations, temporaries. `tokenizer` may be NULL: answers have no text
 * then. */
Status engine_init(Engine *e, Gemma *g, const Tokenizer *tokenizer, const EngineOptions *options);
void engine_free(Engine *e);

/* Copies the request and puts it in line. ERR_CONFIG when the model's positions or the cache are
 * too few for its prompt. */
Status engine_submit(Engine *e, Sequence **out, const Request *request);

/* One pass. False when nothing is left to do. */
bool engine_step(Engine *e);

/* Gives a sequence up, wherever it is, and frees it. */
void engine_drop(Engine *e, Sequence *s);

/* Tokens of the answer. */
static inline int64_t sequence_answered(const Sequence *s) {
    return s->count - s->request.count;
}

#endif
