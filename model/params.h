/* params.h - the registry of parameters, under the checkpoint's names.
 *
 * Layers declare parameters by shape; nothing is taken until params_place (space.h), which puts
 * frozen values in one arena in the working dtype and every trainable parameter in one flat f32
 * space (values, or master copies when the working value is bf16; gradients beside it in the same
 * order). Loading, saving, counting, decay and adapter targets are loops over this list. */
#ifndef PARAMS_H
#define PARAMS_H

#include "model/space.h"

#define PARAM_NAME_MAX 160

struct Param {
    char name[PARAM_NAME_MAX]; /* as in the checkpoint */
    Tensor value;  /* working dtype; f32 for adapters and for everything under dtype f32 */
    Tensor grad;   /* f32, same shape; absent: frozen */
    Tensor master; /* what the optimizer updates: a f32 copy; the value itself when that is f32, or
                    * when there are no masters; absent where only a share of it is here */
    bool trainable;
    bool decay;     /* weight decay applies */
    bool adapter;   /* part of an adapter, not of the checkpoint; always f32 */
    bool buffer;    /* in the checkpoint but never trained (layer_scalar) */
    bool mapped;    /* the value may stay in the mapped file when frozen (per-layer table) */
    bool tower;     /* of what reads pictures and sound: never packed, trained only when named */
    int layer;      /* of the text model that it is part of; -1: none */
    int64_t offset; /* of its states in the flat space, when trainable */
    int64_t group, groups; /* of experts that several ranks have between them: value is groups
                            * `group` and on of so many; groups 0: it is all there is */
    Tensor here[2];        /* value and master, while param_fetch has others in their place */
};

struct ParamList {
    Param **items;
    int count, capacity;
    char path[PARAM_NAME_MAX]; /* prefix of names being declared */
    bool tower;                /* what is declared now is a tower's */
    DType dtype;               /* of working values */
    Tensor **derived;          /* made from values, never stored (params_add_derived) */
    int derived_count;
    Space space;
};

void params_init(ParamList *params, DType dtype, const char *prefix);
void params_free(ParamList *params);

/* Names inside are below `format`: params_enter("layers.%d", 3) ... params_leave. */
void params_enter(ParamList *params, const char *format, ...) __attribute__((format(printf, 2, 3)));
void params_leave(ParamList *params);

/* Declares path.name with a shape; the pointer stays valid until params_free. */
Param *params_add(ParamList *params, const char *name, int ndim, const int64_t *shape);
#define PARAMS_ADD(params, name, ...)                                                              \
    params_add(params, name, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)),            \
               (const int64_t[]){__VA_ARGS__})

/* Declares `module`.name, whatever path is entered: a trainable f32 part of an adapter. */
Param *params_add_adapter(ParamList *params, const char *module, const char *name, int ndim,
                          const int64_t *shape);

/* A f32 tensor that is computed from values: placed beside them, in no file. Its shape is set. */
void params_add_derived(ParamList *params, Tensor *t);

/* The most exact value of it that is here: the master of what is trained in bf16, if all of that
 * is.
 */
static inline Tensor param_source(const Param *p) {
    return p->trainable && tensor_present(p->master) ? p->master : p->value;
}

/* The parameter of that full name; NULL when there is none. */
Param *params_find(const ParamList *params, const char *name);

/* Whether the weight is one that is stored in few bits where it fits: a matrix, and no router,
 * whose choices are delicate, nor a tower's. */
bool param_takes_blocks(const Param *p);

/* Values that a trainable parameter takes of the flat space: whole blocks of 8-bit states. */
int64_t param_span(const Param *p);

#endif
