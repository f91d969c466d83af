/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers of the encoders with precision="fast": as ops/linear_f32.h, but with integer matmuls
 * (kernels/body_panel16.h). The weights are copied once, when an encoder is bound, into the layout that the kernel
 * reads: 2 bytes each. */
#ifndef GEMMA4_OPS_LINEAR_INT16_H
#define GEMMA4_OPS_LINEAR_INT16_H

#include "ops/exec.h"

typedef struct {
    int16_t *q;
    float *scale;
    int n_rows, n_cols; /* outputs, inputs */
    g4_op op;
} g4_matrix16;

/* Rounds w, of any type, to 12 bits. Allocates in `arena`. */
g4_status g4_matrix16_new(g4_exec *exec, g4_arena *arena, const g4_matrix *w, const g4_matrix16 **result);
size_t g4_matrix16_bytes(const g4_matrix16 *w);

/* out [m, w.n_rows] = clamp(clamp(x) * w^T); infinite bounds change nothing. */
typedef struct {
    const g4_matrix16 *w;
    float input_min, input_max, output_min, output_max;
    float *out;
} g4_job16;

/* Linear layers of one x [m, n_cols] in one parallel region. Each output depends only on its row and its weights. */
g4_status g4_jobs16(g4_exec *exec, const float *x, int m, const g4_job16 *jobs, int n_jobs);

#endif
