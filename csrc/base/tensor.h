/* SPDX-License-Identifier: Apache-2.0 */
/* A non-owning view of a matrix of weights or of cached rows. Only rows have a stride.
 *
 * Letters for sizes, here and in all comments:
 *   T rows (positions) of a step    S key positions     D d_model     V vocabulary    L layers
 *   H query heads   K key/value heads   h head size     F mlp width   P per-layer-embedding width
 *   E experts       k experts per token  M expert width
 */
#ifndef GEMMA4_BASE_TENSOR_H
#define GEMMA4_BASE_TENSOR_H

#include "base/dtype.h"
#include "base/profile.h"

typedef struct {
    const void *data;
    g4_dtype dtype;
    size_t n_rows;     /* outputs of a linear layer */
    size_t n_cols;     /* inputs of a linear layer */
    size_t row_stride; /* in elements; a multiple of the block size if quantised */
    g4_op op;          /* the operation that reading it counts as in a profile */
} g4_matrix;

static inline const void *g4_matrix_row(const g4_matrix *w, size_t row)
{
    return (const char *)w->data + row * g4_dtype_bytes(w->dtype, w->row_stride);
}

/* The columns [first, first + n) of w; first and n are multiples of the block size if quantised. */
static inline g4_matrix g4_matrix_cols(const g4_matrix *w, size_t first, size_t n)
{
    g4_matrix cols = *w;
    cols.data = (const char *)w->data + g4_dtype_bytes(w->dtype, first);
    cols.n_cols = n;
    return cols;
}

/* The rows [first, first + n) of w. */
static inline g4_matrix g4_matrix_rows(const g4_matrix *w, size_t first, size_t n)
{
    g4_matrix rows = *w;
    rows.data = g4_matrix_row(w, first);
    rows.n_rows = n;
    return rows;
}

#endif
