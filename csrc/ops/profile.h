/* SPDX-License-Identifier: Apache-2.0 */
/* Timing of operations, for g4_step_options.profile. Without a profile each call costs one comparison. */
#ifndef GEMMA4_OPS_PROFILE_H
#define GEMMA4_OPS_PROFILE_H

#include "ops/exec.h"

/* Seconds now; 0 without a profile. */
double g4_profile_start(const g4_exec *exec);

/* Adds one call of `op`, begun at `start`. work and bytes: see g4_op_total. */
void g4_profile_end(g4_exec *exec, g4_op op, double start, double work, double bytes);

/* Time since `start` that is not attributed to any operation is added to "other", so a profile's seconds add up to
 * those of its steps. before: g4_profile_seconds at `start`. */
double g4_profile_seconds(const g4_exec *exec);
void g4_profile_end_step(g4_exec *exec, double start, double before);

#endif
