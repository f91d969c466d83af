/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of any run, by blocks of rows (queries x heads of one kv head). Each query depends only on its own keys, in
 * position order. */
#ifndef GEMMA4_OPS_ATTENTION_ROWS_H
#define GEMMA4_OPS_ATTENTION_ROWS_H

#include "ops/attention/run.h"
#include "ops/exec.h"

/* g4_attend for runs that do not use tiles. */
g4_status g4_rows_attend(g4_exec *exec, const g4_attention *runs, int n_runs);

/* g4_attention_scores and g4_attention_mix, with the same bits. *forgotten: a position that has weight but was evicted
 * from the cache, or -1. */
g4_status g4_rows_scores(g4_exec *exec, const g4_attention *run, float *scores);
g4_status g4_rows_mix(g4_exec *exec, const g4_attention *run, const float *pattern, int *forgotten);

#endif
