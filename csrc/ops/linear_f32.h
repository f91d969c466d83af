/* SPDX-License-Identifier: Apache-2.0 */
/* Linear maps of hundreds or thousands of rows at once, by panels of 16 outputs: the encoders', and on AVX2 the text
 * model's prompts with plain weights in `fast` (ops/linear.c). Each output is one sum over the inputs in their order,
 * so it depends on nothing but its row and its weights. */
#ifndef GEMMA4_OPS_LINEAR_F32_H
#define GEMMA4_OPS_LINEAR_F32_H

#include "ops/linear.h"

/* As g4_linear_jobs; the order of additions differs. */
g4_status g4_panel_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs);

/* One map between dense arrays. */
g4_status g4_panel_linear(g4_exec *exec, const float *x, int m, const g4_matrix *w, float *out);

#endif
