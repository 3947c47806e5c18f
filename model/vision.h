/* vision.h - the vision tower: patches of one picture to soft tokens.
 *
 * Patches come cell by cell, the pooling_kernel_size^2 of a cell behind each other, so that pooling
 * is a mean over runs of rows; attention does not care for their order. */
#ifndef VISION_H
#define VISION_H

#include "model/block.h"

typedef struct Vision {
    VisionConfig config;
    Linear input_proj;               /* of the patch embedder */
    Param *position_embedding_table; /* (2, positions, D): of columns, of rows */
    Block *blocks;
    Param *std_bias, *std_scale; /* (D), buffers; NULL: not standardised */
} Vision;

/* One picture on its way: what the backward pass needs, where the mode keeps it. */
typedef struct VisionSaved {
    StackMode mode;
    int64_t N; /* patches */
    Rows rows;
    Tensor columns, lines; /* (N) i32: x and y of each patch */
    Tensor pixels;         /* (N, 768) */
    KvSlot *slots;         /* one a block */
    BlockSaved *saved;     /* one a block */
    Tensor *residual;      /* (N, D): input of each block, and the last one's output */
} VisionSaved;

/* Declares vision_tower.* below the path that is entered. */
void vision_declare(Vision *v, ParamList *params, LinearList *list, const VisionConfig *c);
void vision_free(Vision *v);

/* Takes the lists of a picture's tensors; vision_place puts those of N patches in `arena`. */
void vision_open(VisionSaved *s, const Vision *v, StackMode mode);
void vision_close(VisionSaved *s);
void vision_place(VisionSaved *s, const Vision *v, Arena *arena, DType dtype, int64_t N);

/* out (N / cell, D) from the patches' pixels in [0, 1], (N, 768) f32, and their places
 * (N, 2) i32, x before y; both in host memory. */
void vision_forward(const Vision *v, VisionSaved *s, Tensor out, const float *pixels,
                    const int32_t *places, Pass *p);

/* Gradients of the tower's weights from dout (N / cell, D); mode KEEP or RECOMPUTE. */
void vision_backward(const Vision *v, VisionSaved *s, Tensor dout, Pass *p);

#endif
