/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers of hundreds or thousands of rows, by panels of 16 outputs. Used by the encoders and, on AVX2 in `fast`,
 * by prompts of the text model with plain weights (ops/linear.c). Each output is one sum over the inputs in order, so
 * it depends only on its row and its weights. */
#ifndef GEMMA4_OPS_LINEAR_F32_H
#define GEMMA4_OPS_LINEAR_F32_H

#include "ops/linear.h"

/* As g4_linear_jobs, with a different order of additions. */
g4_status g4_panel_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs);

/* One linear layer between dense arrays. */
g4_status g4_panel_linear(g4_exec *exec, const float *x, int m, const g4_matrix *w, float *out);

#endif
