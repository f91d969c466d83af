/* SPDX-License-Identifier: Apache-2.0 */
/* Linear maps in bfloat16 for processors that have instructions for it (kernels/body_bf16.h): in `fast`, prompts of
 * bf16 weights, and with AMX of quantised ones. */
#ifndef GEMMA4_OPS_LINEAR_BF16_H
#define GEMMA4_OPS_LINEAR_BF16_H

#include "ops/linear.h"

/* As g4_linear_jobs, of x and weights rounded to bf16. Only where the kernels have matmul_tiles. */
g4_status g4_tile_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs);

#endif
