/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers in bfloat16 for processors with bf16 instructions (kernels/body_bf16.h). In `fast`, prompts use them
 * with bf16 weights, and on AMX with quantised weights, too. In `high`, x is three bf16 numbers, whose sum is x. */
#ifndef GEMMA4_OPS_LINEAR_BF16_H
#define GEMMA4_OPS_LINEAR_BF16_H

#include "ops/linear.h"

/* As g4_linear_jobs, with weights rounded to bf16, and x unless exec->high. A row's result does not depend on the other
 * rows. Only for kernels that have matmul_tiles. */
g4_status g4_tile_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs);

#endif
