/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of prompts in bfloat16 for processors that have instructions for it (kernels/body_bf16.h): queries, keys,
 * patterns and values are rounded, scores, softmax and sums are float32. That is what the reference implementation
 * rounds when a model runs in bf16, and less: there scores are, too.
 *
 * A query's numbers depend on its own keys only, as in ops/attention/attention.h, once it goes this way; whether it
 * does depends on how many rows its run has.
 */
#ifndef GEMMA4_OPS_ATTENTION_TILES_H
#define GEMMA4_OPS_ATTENTION_TILES_H

#include "ops/attention/run.h"
#include "ops/exec.h"

/* Whether the functions below have something to do for the run. */
bool g4_wants_tiles(const g4_exec *exec, const g4_attention *run);

/* g4_attend of one run. *done is false, and z untouched, if the run does not want tiles, or a value in the cache is not
 * finite: a position that is masked has the weight zero here, and zero times infinity is no zero. */
g4_status g4_tiles_attend(g4_exec *exec, const g4_attention *run, bool *done);

/* g4_attention_scores and g4_attention_mix, with the same bits. *forgotten: a position that got weight but is not in
 * the cache, or left as it is. */
g4_status g4_tiles_scores(g4_exec *exec, const g4_attention *run, float *scores, bool *done);
g4_status g4_tiles_mix(g4_exec *exec, const g4_attention *run, const float *pattern, int *forgotten, bool *done);

#endif
