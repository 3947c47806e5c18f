/* checkpoint.h - a Hugging Face checkpoint folder, a GGUF file or a folder of those: which stored
 * tensor is which parameter. */
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "formats/gguf.h"
#include "formats/mmproj.h"
#include "formats/parts.h"
#include "model/gemma.h"

#define TOKEN_ORDERING "masked_embedding.token_ordering"

typedef enum TensorRole {
    ROLE_PARAM, /* a parameter of the text model */
    ROLE_DEAD,  /* k, v of a layer that shares: in released files, used by nobody */
    ROLE_TOWER, /* vision or audio: read when media are declared, else carried through unchanged */
    ROLE_TIED,  /* an lm_head.weight, which must equal the embedding */
    ROLE_DERIVED, /* follows from the config (GGUF's rope_freqs) */
    ROLE_ORDER,   /* a drafter's tokens by centroid: integers, not a parameter */
} TensorRole;

typedef struct CheckpointTensor {
    const StoredTensor *stored;
    TensorRole role;
} CheckpointTensor;

typedef struct Checkpoint {
    char *dir; /* the folder, of safetensors or of GGUF files, or one of those */
    ModelConfig config;
    Safetensors *files;
    int file_count;
    PartsList parts; /* weights that the files hold in several tensors */
    bool is_gguf;
    Gguf gguf;
    StoredTensor *renamed;     /* the GGUF's tensors under the checkpoint's names */
    Mmproj towers;             /* beside it */
    CheckpointTensor *tensors; /* sorted by name, over all files */
    int count;
} Checkpoint;

/* Opens config.json and the weights (model.safetensors, or the shards its index names), or a GGUF.
 * A tensor that is neither a parameter nor knowingly left alone is an error naming it. */
Status checkpoint_open(Checkpoint *c, const char *dir);
void checkpoint_close(Checkpoint *c);

/* The same, or where the folder has no weights yet its config alone: for plans. */
Status checkpoint_describe(Checkpoint *c, const char *dir);

/* Gives frozen parameters of a model that is not placed yet the dtype they will have in memory:
 * packed weights stay packed, in the order products read them; vectors stored in f32 stay f32. */
void checkpoint_formats(const Checkpoint *c, Gemma *g);

/* Fills every parameter of a placed model, quantising what is stored dense and shall be packed; a
 * missing tensor or a wrong shape is an error naming it. Mapped parameters keep pointing into the
 * open checkpoint. */
Status checkpoint_load(const Checkpoint *c, Gemma *g);

/* Whether the checkpoint holds what reads pictures or sound. */
bool checkpoint_has_towers(const Checkpoint *c);

/* Lets the kernel drop the pages of a mapped parameter that was read. */
void checkpoint_release(const Checkpoint *c, const Param *p);

/* Writes the model as a checkpoint folder: config, tokenizer, template and generation settings of
 * `source`, its towers and dead tensors unchanged, every parameter in `dtype` (adapters merged in),
 * sharded at 5 GB. The folder appears whole or not at all. A scheme other than SCHEME_NONE stores
 * the linears as compressed-tensors does, each expert's as a module of its own:
 *   SCHEME_INT4  pack-quantized, w4a16: eight 4-bit codes to an int32, a bf16 scale for each 32
 *   SCHEME_INT8  int-quantized: 8-bit codes, a bf16 scale a row; activations in 8 bits a token */
Status checkpoint_save(const Checkpoint *source, Gemma *g, DType dtype, QuantScheme scheme,
                       const char *dir);

/* What the other ranks call while rank 0 saves a model of which they have parts, with SCHEME_NONE.
 */
Status checkpoint_save_along(const Checkpoint *source, Gemma *g);

#endif
