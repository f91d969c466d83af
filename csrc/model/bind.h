/* SPDX-License-Identifier: Apache-2.0 */
/* Binds named tensors to struct members, and checks them against tables of the tensors that a config needs. Each table
 * row describes one tensor and the member it fills. With `list` set, a binder walks the same tables and reports the
 * tensors instead of binding them. */
#ifndef GEMMA4_MODEL_BIND_H
#define GEMMA4_MODEL_BIND_H

#include "base/arena.h"
#include "base/tensor.h"
#include "gemma4.h"
#include "ops/linear_int16.h"

typedef enum {
    G4_BIND_MATRIX, /* g4_matrix: a view; the last axis is the columns, the others are flattened into rows */
    G4_BIND_VECTOR, /* const float *: a float32 copy of any rank */
    G4_BIND_GAIN,   /* a norm's gain: G4_BIND_VECTOR, plus 1 with unit_gains */
    G4_BIND_CLIPPED /* g4_clipped: NAME.linear.weight, and bounds NAME.input_min … with `clipped` */
} g4_bind_kind;

/* A linear layer whose input and output are clamped. Ref: Gemma4ClippableLinear. */
typedef struct {
    g4_matrix w;
    const g4_matrix16 *w16;                             /* copy as 16-bit integers; NULL: no copy */
    float input_min, input_max, output_min, output_max; /* -inf, inf: no bound */
} g4_clipped;

typedef struct {
    const char *name;
    size_t offset; /* of the member that it fills */
    g4_bind_kind kind;
    const char *axes; /* axes separated by spaces; an axis is the product of its letters and digits */
    int when;         /* condition on config and layer; its meaning belongs to the table */
    g4_op op;         /* profile row of a matrix */
} g4_bind_row;

/* Length of the axis that a letter stands for. */
typedef int64_t (*g4_letter_fn)(const void *config, int layer, char letter);

typedef struct {
    const void *config;
    g4_letter_fn letter;
    bool clipped;    /* G4_BIND_CLIPPED rows have bounds */
    bool unit_gains; /* G4_BIND_GAIN tensors hold w; the gain is 1 + w */
    const g4_named_tensor **sorted;
    size_t n_tensors;
    g4_arena *arena;          /* owns the float32 copies */
    g4_exec *copy_with;       /* copies G4_BIND_CLIPPED weights as 16-bit integers; NULL: no copies */
    size_t n_bytes, n_copied; /* of the tensors bound so far, and of the integer copies */
    g4_error *err;
    g4_tensor_fn list; /* called for each tensor; no tensor is looked up, no member filled. NULL: bind */
    void *list_context;
} g4_binder;

/* Fills `sorted`; release it with g4_binder_close. */
g4_status g4_binder_open(g4_binder *b, const g4_named_tensor *tensors, size_t n_tensors);
void g4_binder_close(g4_binder *b);

/* NULL if no tensor has that name. */
const g4_named_tensor *g4_binder_find(const g4_binder *b, const char *name);

/* Binds the tensor `name` to the row's member of `owner`. G4_EFORMAT if it is missing or has another shape. */
g4_status g4_bind(g4_binder *b, const g4_bind_row *row, const char *name, int layer, void *owner);

#endif
