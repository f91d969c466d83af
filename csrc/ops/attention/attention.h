/* SPDX-License-Identifier: Apache-2.0 */
/* Causal attention of one run's queries over its cached keys, sliding window or not, grouped heads.
 *
 * Prompts in bf16 by tiles: ops/attention/tiles.h. Otherwise a query's numbers depend on its own keys only, taken in order of position from the first one it sees: chunking, other
 * runs in the step, the cache's capacity and the number of threads change no bit.
 */
#ifndef GEMMA4_OPS_ATTENTION_ATTENTION_H
#define GEMMA4_OPS_ATTENTION_ATTENTION_H

#include "ops/exec.h"
#include "ops/attention/kv_view.h"

typedef struct {
    const float *q;           /* [T, H, h], rotated */
    float *z;                 /* [T, H, h] */
    const int32_t *positions; /* [T], ascending */
    const int32_t *ends;      /* [T], ascending: row i sees positions before ends[i]; NULL: up to its own */
    int n_rows, n_heads, n_kv_heads, head_dim;
    int window; /* keys a query sees, itself included; 0 = all */
    int n_keys; /* positions in the cache, the run's own included */
    bool bf16;  /* a fast exec may round q, keys, values and patterns to it */
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

/* The shortest range of a row outside which every value is `blank`; the whole row if it is all blank. */
void g4_occupied(const float *row, int n, float blank, int *first, int *end);

/* z of several runs at once. Scores live in scratch, a block of queries at a time. */
g4_status g4_attend(g4_exec *exec, const g4_attention *runs, int n_runs);

/* The same in three steps over whole arrays [H, T, n_keys], for whoever wants to see or change them in between.
 * Untouched arrays give the same bits as g4_attend. */
g4_status g4_attention_scores(g4_exec *exec, const g4_attention *run, float *scores);  /* masked = -infinity */
g4_status g4_attention_pattern(g4_exec *exec, const g4_attention *run, float *scores); /* softmax in place */
/* Fails with G4_EVALUE if a weight was given to a position that the cache no longer holds. */
g4_status g4_attention_mix(g4_exec *exec, const g4_attention *run, const float *pattern);

#endif
