/* SPDX-License-Identifier: Apache-2.0 */
/* Unmasked attention among all rows of an image. Scores are kept for a block of queries of one head at a time, never
 * for all. Each row depends only on its own image. A fast exec rounds queries, keys, patterns and values to 12 bits
 * (kernels/body_panel16.h). */
#ifndef GEMMA4_OPS_ATTENTION_FULL_H
#define GEMMA4_OPS_ATTENTION_FULL_H

#include "ops/exec.h"

typedef struct {
    const float *q;     /* [T, H, h] */
    const float *k, *v; /* [T, K, h] */
    float *z;           /* [T, H, h] */
    int n_rows, n_heads, n_kv_heads, head_dim;
} g4_full_attention;

g4_status g4_attend_full(g4_exec *exec, const g4_full_attention *runs, int n_runs);

/* The same in three steps over a whole array [H, T, T]. Unchanged, it gives the same bits as g4_attend_full. */
g4_status g4_full_scores(g4_exec *exec, const g4_full_attention *run, float *scores);
g4_status g4_full_pattern(g4_exec *exec, const g4_full_attention *run, float *scores); /* softmax in place */
g4_status g4_full_mix(g4_exec *exec, const g4_full_attention *run, const float *pattern);

#endif
