/* SPDX-License-Identifier: Apache-2.0 */
/* Finds named tensors and checks them against tables of what a config calls for. One row of a table is one tensor, and
 * the member of a struct that it fills. A binder that lists walks the same tables and tells what they call for. */
#ifndef GEMMA4_MODEL_BIND_H
#define GEMMA4_MODEL_BIND_H

#include "base/arena.h"
#include "base/tensor.h"
#include "gemma4.h"
#include "ops/linear_int16.h"

typedef enum {
    G4_BIND_MATRIX, /* g4_matrix: a view; the last axis is the row, the others are its number */
    G4_BIND_VECTOR, /* const float *: a float32 copy, of any number of axes */
    G4_BIND_GAIN,   /* the same of a norm, 1 added to each value if the config stores gains so */
    G4_BIND_CLIPPED /* g4_clipped: NAME.linear.weight, and bounds NAME.input_min … if the config has them */
} g4_bind_kind;

/* A linear map whose input and output are clamped. Ref: Gemma4ClippableLinear. */
typedef struct {
    g4_matrix w;
    const g4_matrix16 *w16;                             /* its copy as whole numbers; NULL: there is none */
    float input_min, input_max, output_min, output_max; /* -inf, inf: none */
} g4_clipped;

typedef struct {
    const char *name;
    size_t offset; /* of the member it fills */
    g4_bind_kind kind;
    const char *axes; /* axes separated by spaces, each a product of letters and digits */
    int when;         /* for whoever walks the table: which configs and layers have it */
    g4_op op;         /* of a matrix, for profiles */
} g4_bind_row;

/* How long an axis is that a letter stands for. */
typedef int64_t (*g4_letter_fn)(const void *config, int layer, char letter);

typedef struct {
    const void *config;
    g4_letter_fn letter;
    bool clipped;    /* G4_BIND_CLIPPED rows have bounds */
    bool unit_gains; /* G4_BIND_GAIN rows hold w of 1 + w */
    const g4_named_tensor **sorted;
    size_t n_tensors;
    g4_arena *arena;          /* of the float32 copies */
    g4_exec *copy_with;       /* copies as whole numbers the maps with bounds; NULL: there are none */
    size_t n_bytes, n_copied; /* of all tensors bound so far, and of those copies */
    g4_error *err;
    g4_tensor_fn list; /* told of every tensor, instead of finding it: no member is filled. NULL: bind */
    void *list_context;
} g4_binder;

/* Fills `sorted`; release it with g4_binder_close. */
g4_status g4_binder_open(g4_binder *b, const g4_named_tensor *tensors, size_t n_tensors);
void g4_binder_close(g4_binder *b);

/* NULL if there is none of that name. */
const g4_named_tensor *g4_binder_find(const g4_binder *b, const char *name);

/* The tensor `name` into the row's member of `owner`. G4_EFORMAT if it is missing or not of the shape that the row says. */
g4_status g4_bind(g4_binder *b, const g4_bind_row *row, const char *name, int layer, void *owner);

#endif
