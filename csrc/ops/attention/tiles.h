/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of prompts in bfloat16 for processors with bf16 instructions (kernels/body_bf16.h). Queries, keys, patterns
 * and values are rounded to bf16; scores, softmax and sums are float32. The reference implementation in bf16 rounds the
 * scores, too.
 *
 * Each query depends only on its own keys, as in ops/attention/attention.h. Whether a run uses this method depends on
 * its number of rows (n_deciding).
 */
#ifndef GEMMA4_OPS_ATTENTION_TILES_H
#define GEMMA4_OPS_ATTENTION_TILES_H

#include "ops/attention/run.h"
#include "ops/exec.h"

/* Whether the run uses the functions below. */
bool g4_wants_tiles(const g4_exec *exec, const g4_attention *run);

/* g4_attend of one run. *done is false, and z is not valid, if the run does not use tiles, or if a cached value is NaN
 * or 2^127 or more in magnitude. Masked positions have weight 0 here, and 0 × inf is NaN. */
g4_status g4_tiles_attend(g4_exec *exec, const g4_attention *run, bool *done);

/* g4_attention_scores and g4_attention_mix, with the same bits. *forgotten: a position that has weight but was evicted
 * from the cache; else unchanged. */
g4_status g4_tiles_scores(g4_exec *exec, const g4_attention *run, float *scores, bool *done);
g4_status g4_tiles_mix(g4_exec *exec, const g4_attention *run, const float *pattern, int *forgotten, bool *done);

#endif
