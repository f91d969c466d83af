/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/profile.h"

#include <time.h>

#include "ops/attention/tiles.h"

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

void g4_profile_end_linear(g4_exec *exec, double start, const g4_linear_job *jobs, int n_jobs)
{
    double work[2] = {0}, bytes = 0;
    if (!exec->profile || !n_jobs)
        return;
    for (int j = 0; j < n_jobs; j++) {
        const g4_matrix *w = &jobs[j].w;
        const bool int8 = exec->fast && g4_is_quantised(w->dtype);
        work[int8] += 2.0 * jobs[j].m * (double)w->n_rows * (double)w->n_cols;
        bytes += jobs[j].m ? (double)w->n_rows * (double)g4_dtype_bytes(w->dtype, w->n_cols) : 0;
    }
    exec->profile->ops[jobs[0].w.op].int8_work += work[1];
    g4_profile_end(exec, jobs[0].w.op, start, work[0], bytes);
}

void g4_profile_end_attention(g4_exec *exec, double start, const g4_attention *runs, int n_runs)
{
    const g4_op op = n_runs && runs[0].window ? G4_OP_ATTEND_LOCAL : G4_OP_ATTEND_GLOBAL;
    double work[2] = {0}, bytes = 0;
    if (!exec->profile || !n_runs)
        return;
    for (int r = 0; r < n_runs; r++) {
        const g4_attention *a = &runs[r];
        double pairs = 0;
        int first = a->n_keys;
        for (int i = 0; i < a->n_rows; i++) {
            const int end = a->positions[i] + 1, seen = a->window && end > a->window ? a->window : end;
            pairs += seen;
            first = end - seen < first ? end - seen : first;
        }
        const double n_keys = a->n_rows ? a->positions[a->n_rows - 1] + 1 - first : 0;
        work[g4_wants_tiles(exec, a)] += 4.0 * pairs * a->n_heads * a->head_dim;
        bytes += 2.0 * n_keys * a->n_kv_heads * (double)g4_dtype_bytes(a->kv.dtype, (size_t)a->head_dim);
    }
    exec->profile->ops[op].bf16_work += work[1];
    g4_profile_end(exec, op, start, work[0], bytes);
}
