/* SPDX-License-Identifier: Apache-2.0 */
/* Causal attention of one run's queries over its cached keys, sliding window or not, grouped heads.
 *
 * bf16 prompts use tiles.h, all else rows.h. In rows.h each query depends only on its own keys, in position order from
 * the first one it sees: chunking, other runs of the step, the cache's capacity and the number of threads change no
 * bit.
 */
#ifndef GEMMA4_OPS_ATTENTION_ATTENTION_H
#define GEMMA4_OPS_ATTENTION_ATTENTION_H

#include "ops/attention/run.h"
#include "ops/exec.h"

/* z of several runs at once. Scores live in scratch, a block of queries at a time. */
g4_status g4_attend(g4_exec *exec, const g4_attention *runs, int n_runs);

/* The same in three steps over whole arrays [H, T, n_keys], for whoever wants to see or change them in between.
 * Untouched arrays give the same bits as g4_attend. */
g4_status g4_attention_scores(g4_exec *exec, const g4_attention *run, float *scores);  /* masked = -infinity */
g4_status g4_attention_pattern(g4_exec *exec, const g4_attention *run, float *scores); /* softmax in place */
/* Fails with G4_EVALUE if a weight was given to a position that the cache no longer holds. */
g4_status g4_attention_mix(g4_exec *exec, const g4_attention *run, const float *pattern);

/* Adds the runs' work and bytes to the profile; begun at `start`. */
void g4_profile_end_attention(g4_exec *exec, double start, const g4_attention *runs, int n_runs);

#endif
