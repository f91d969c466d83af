/* SPDX-License-Identifier: Apache-2.0 */
/* Attention of one run's queries over its cached keys: causal or up to g4_attention.ends, sliding window or not, grouped
 * heads.
 *
 * bf16 prompts use tiles.h, all other runs rows.h. In rows.h each query depends only on its own keys, in position order
 * from the first key it sees. Chunking, other runs of the step, the cache's capacity and the number of threads change
 * no bit.
 */
#ifndef GEMMA4_OPS_ATTENTION_ATTENTION_H
#define GEMMA4_OPS_ATTENTION_ATTENTION_H

#include "ops/attention/run.h"
#include "ops/exec.h"

/* Computes z of several runs. Scores are kept in scratch, for a block of queries at a time. */
g4_status g4_attend(g4_exec *exec, const g4_attention *runs, int n_runs);

/* The same in three steps over whole arrays [H, T, n_keys], which callers may read and change between steps. Unchanged
 * arrays give the same bits as g4_attend. */
g4_status g4_attention_scores(g4_exec *exec, const g4_attention *run, float *scores);  /* masked = -infinity */
g4_status g4_attention_pattern(g4_exec *exec, const g4_attention *run, float *scores); /* softmax in place */
/* Fails with G4_EVALUE if a position that was evicted from the cache has weight. */
g4_status g4_attention_mix(g4_exec *exec, const g4_attention *run, const float *pattern);

/* Adds the time since `start` and the runs' work and bytes to the profile. */
void g4_profile_end_attention(g4_exec *exec, double start, const g4_attention *runs, int n_runs);

#endif
