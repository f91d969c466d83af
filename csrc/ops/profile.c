/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/profile.h"

#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

double g4_profile_start(const g4_exec *exec)
{
    return exec->profile ? now() : 0;
}

void g4_profile_end(g4_exec *exec, g4_op op, double start, double work, double bytes)
{
    if (!exec->profile)
        return;
    g4_op_total *total = &exec->profile->ops[op];
    total->calls += 1;
    total->seconds += now() - start;
    total->work += work;
    total->bytes += bytes;
}

double g4_profile_seconds(const g4_exec *exec)
{
    double sum = 0;
    for (int op = 0; exec->profile && op < G4_N_OPS; op++)
        sum += exec->profile->ops[op].seconds;
    return sum;
}

void g4_profile_end_step(g4_exec *exec, double start, double before)
{
    g4_profile_end(exec, G4_OP_OTHER, start + g4_profile_seconds(exec) - before, 0, 0);
}
