/* SPDX-License-Identifier: Apache-2.0 */
/* Operations on arrays of rows, in parallel on the pool: norms, sums, activations, rotary embedding, gathers. */
#ifndef GEMMA4_OPS_ROWS_H
#define GEMMA4_OPS_ROWS_H

#include "ops/exec.h"

/* scale[i] = sqrt(mean(x_i^2) + eps), rows of n. */
g4_status g4_rms_scale(g4_exec *exec, const float *x, int n_rows, int n, float eps, float *scale);
/* out_i = x_i / scale[i] (one reciprocal per row), rows of n. */
g4_status g4_normalize(g4_exec *exec, const float *x, const float *scale, int n_rows, int n, float *out);
/* out_i = x_i * factor (* gain); gain [n] or NULL. */
g4_status g4_scale_rows(g4_exec *exec, const float *x, float factor, const float *gain, int n_rows, int n, float *out);
/* The three above in one pass, with the same bits. Ref: Gemma4RMSNorm. */
g4_status g4_rms_norm(g4_exec *exec, const float *x, const float *gain, int n_rows, int n, float eps, float *out);

g4_status g4_add_rows(g4_exec *exec, const float *a, const float *b, int n_rows, int n, float *out);
g4_status g4_mul_rows(g4_exec *exec, const float *a, const float *b, int n_rows, int n, float *out);
g4_status g4_gelu_rows(g4_exec *exec, const float *x, int n_rows, int n, float *out);
/* gelu(gate) * up in one pass, with the same bits. */
g4_status g4_gelu_mul_rows(g4_exec *exec, const float *gate, const float *up, int n_rows, int n, float *out);
/* x * sigmoid(gate); silu if gate = x. stride: of x and gate; out is dense [n_rows, n]. */
g4_status g4_glu_rows(g4_exec *exec, const float *x, const float *gate, size_t stride, int n_rows, int n, float *out);
g4_status g4_clamp_rows(g4_exec *exec, const float *x, float low, float high, int n_rows, int n, float *out);
/* Ref: torch.nn.LayerNorm; bias may be NULL. */
g4_status g4_layer_norm_rows(g4_exec *exec, const float *x, const float *gain, const float *bias, float eps, int n_rows,
                             int n, float *out);
g4_status g4_softmax_rows(g4_exec *exec, float *x, int n_rows, int n);
g4_status g4_softcap_rows(g4_exec *exec, float *x, float cap, int n_rows, int n);

/* out_i = factor * table[ids[i]], widened to float32. A table on disk is read only at these rows. */
g4_status g4_gather_rows(g4_exec *exec, const g4_matrix *table, const int32_t *ids, int n_rows, float factor,
                         float *out);

/* cosine, sine [n_rows, half] of positions[i] * inv_freq[j]; the angle is rounded to float32, as in the reference. */
g4_status g4_rope_table(g4_exec *exec, const int32_t *positions, int n_rows, const float *inv_freq, int half,
                        float *cosine, float *sine);
/* Rotates each of the n_heads heads of 2 * half values in every row of x. */
g4_status g4_rope_rows(g4_exec *exec, float *x, const float *cosine, const float *sine, int n_rows, int n_heads,
                       int half);

/* Rotates by two positions: the first half of every head by axis 0, the second by axis 1. Each half has its own pairs
 * (i, i + quarter). cosine, sine [n_rows, 2, quarter]. */
g4_status g4_rope_axes_rows(g4_exec *exec, float *x, const float *cosine, const float *sine, int n_rows, int n_heads,
                            int quarter);

#endif
