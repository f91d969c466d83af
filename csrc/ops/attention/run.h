/* SPDX-License-Identifier: Apache-2.0 */
/* Operands of one run's attention, for all methods (ops/attention/attention.h selects one). */
#ifndef GEMMA4_OPS_ATTENTION_RUN_H
#define GEMMA4_OPS_ATTENTION_RUN_H

#include "ops/attention/kv_view.h"

typedef struct {
    const float *q;           /* [T, H, h], rotated */
    float *z;                 /* [T, H, h] */
    const int32_t *positions; /* [T], ascending */
    const int32_t *ends;      /* [T], ascending: row i sees positions before ends[i]; NULL: up to its own position */
    int n_rows, n_heads, n_kv_heads, head_dim;
    int n_deciding; /* number of rows that selects tiles.h or rows.h: at most n_rows */
    int window;     /* keys that a query sees up to and including its own; 0: all */
    float softcap;  /* scores are cap * tanh(q . k / cap); 0: q . k */
    int n_keys;     /* positions in the cache, the run's own included */
    bool bf16;      /* a fast exec may round q, keys, values and patterns to bf16 */
    g4_kv_view kv;
} g4_attention;

/* Heads that share a kv head. */
static inline int g4_head_group(const g4_attention *a)
{
    return a->n_heads / a->n_kv_heads;
}

/* A row sees positions [first, end). */
static inline int g4_first_key(const g4_attention *a, int row)
{
    const int position = a->positions[row];
    return a->window && position >= a->window ? position - a->window + 1 : 0;
}

static inline int g4_end_key(const g4_attention *a, int row)
{
    return a->ends ? a->ends[row] : a->positions[row] + 1;
}

/* Applies the softcap to n scores of one row. */
static inline void g4_cap_scores(const g4_kernels *kernels, const g4_attention *a, float *scores, int n)
{
    if (a->softcap != 0)
        kernels->softcap(scores, a->softcap, n);
}

/* The shortest range [*first, *end) of a row outside which every value is `blank`; the whole row if all are blank. */
void g4_occupied(const float *row, int n, float blank, int *first, int *end);

/* Row (head, query) of a whole array [H, T, n_keys]. */
static inline float *g4_array_row(const g4_attention *a, float *array, int head, int row)
{
    return array + ((size_t)head * (size_t)a->n_rows + (size_t)row) * (size_t)a->n_keys;
}

static inline void g4_fill(float *x, float value, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = value;
}

#endif
