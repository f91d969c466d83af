/* SPDX-License-Identifier: Apache-2.0 */
/* Timing of operations, for g4_step_options.profile. Without one each costs a compare. */
#ifndef GEMMA4_OPS_PROFILE_H
#define GEMMA4_OPS_PROFILE_H

#include "ops/exec.h"

/* Seconds now; 0 without a profile. */
double g4_profile_start(const g4_exec *exec);

/* Adds one call of `op`, begun at `start`. work and bytes: see g4_op_total. */
void g4_profile_end(g4_exec *exec, g4_op op, double start, double work, double bytes);

/* What no operation accounted for since `start`, when the profile's operations had taken `before` seconds, goes to
 * "other": so the seconds of a profile add up to those of its steps. */
double g4_profile_seconds(const g4_exec *exec);
void g4_profile_end_step(g4_exec *exec, double start, double before);

#endif
