/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of every frame to a band of frames around it, with a learned vector for each distance. Each row depends
 * only on its own recording. Ref: transformers models/gemma4 Gemma4AudioAttention, whose chunks cover the same band. */
#ifndef GEMMA4_OPS_ATTENTION_BAND_H
#define GEMMA4_OPS_ATTENTION_BAND_H

#include "ops/exec.h"

typedef struct {
    const float *q, *k, *v; /* [T, H, h], scaled */
    const float *distances; /* [n_distances, H, h]: vector i is added to a key `past - i` frames back */
    float *z;               /* [T, H, h] */
    int n_rows, n_heads, head_dim, n_distances;
    int past, future; /* row t sees keys t - past < j < t + future, and its own */
    float cap;        /* scores are cap * tanh(x / cap) */
} g4_band_attention;

/* A row sees frames [first, end). */
static inline int g4_band_first_key(const g4_band_attention *a, int row)
{
    return row - a->past + 1 > 0 ? row - a->past + 1 : 0;
}

static inline int g4_band_end_key(const g4_band_attention *a, int row)
{
    const int end = row + (a->future > 1 ? a->future : 1);
    return end < a->n_rows ? end : a->n_rows;
}

g4_status g4_attend_band(g4_exec *exec, const g4_band_attention *run);

/* The same in three steps over a whole array [H, T, T]. Unchanged, it gives the same values as g4_attend_band. */
g4_status g4_band_scores(g4_exec *exec, const g4_band_attention *run, float *scores);  /* -infinity outside the band */
g4_status g4_band_pattern(g4_exec *exec, const g4_band_attention *run, float *scores); /* softmax in place */
g4_status g4_band_mix(g4_exec *exec, const g4_band_attention *run, const float *pattern);

#endif
