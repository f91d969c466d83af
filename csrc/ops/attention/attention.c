/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/attention.h"

#include <math.h>

#include "ops/attention/rows.h"
#include "ops/attention/tiles.h"
#include "ops/profile.h"

void g4_profile_end_attention(g4_exec *exec, double start, const g4_attention *runs, int n_runs)
{
    const g4_op op = n_runs && runs[0].window ? G4_OP_ATTEND_LOCAL : G4_OP_ATTEND_GLOBAL;
    double work[2] = {0}, bytes = 0;
    if (!exec->profile || !n_runs)
        return;
    for (int r = 0; r < n_runs; r++) {
        const g4_attention *a = &runs[r];
        double pairs = 0;
        for (int i = 0; i < a->n_rows; i++)
            pairs += g4_end_key(a, i) - g4_first_key(a, i);
        const double n_keys = a->n_rows ? g4_end_key(a, a->n_rows - 1) - g4_first_key(a, 0) : 0;
        work[g4_wants_tiles(exec, a)] += 4.0 * pairs * a->n_heads * a->head_dim;
        bytes += 2.0 * n_keys * a->n_kv_heads * (double)g4_dtype_bytes(a->kv.dtype, (size_t)a->head_dim);
    }
    exec->profile->ops[op].bf16_work += work[1];
    g4_profile_end(exec, op, start, work[0], bytes);
}

/* Runs that use tiles are computed one by one, all other runs together. */
static g4_status attend(g4_exec *exec, const g4_attention *runs, int n_runs)
{
    g4_attention *others;
    int n_others = 0;
    G4_ALLOC(exec, others, (size_t)n_runs);
    for (int r = 0; r < n_runs; r++) {
        bool done;
        G4_TRY(g4_tiles_attend(exec, &runs[r], &done));
        if (!done)
            others[n_others++] = runs[r];
    }
    return n_others ? g4_rows_attend(exec, others, n_others) : G4_OK;
}

g4_status g4_attend(g4_exec *exec, const g4_attention *runs, int n_runs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    const double start = g4_profile_start(exec);
    g4_status status = attend(exec, runs, n_runs);
    g4_profile_end_attention(exec, start, runs, n_runs);
    g4_arena_restore(exec->arena, mark);
    return status;
}

/* ---- in three steps --------------------------------------------------------------------------------------------- */

g4_status g4_attention_scores(g4_exec *exec, const g4_attention *run, float *scores)
{
    bool done;
    G4_TRY(g4_tiles_scores(exec, run, scores, &done));
    return done ? G4_OK : g4_rows_scores(exec, run, scores);
}

typedef struct {
    const g4_attention *a;
    float *array; /* [H, T, n_keys] */
} whole_array;

static void pattern_rows(const g4_exec *exec, void *context, int first, int end)
{
    const whole_array *s = context;
    for (int i = first; i < end; i++) {
        for (int h = 0; h < s->a->n_heads; h++) {
            float *row = g4_array_row(s->a, s->array, h, i);
            int from, to;
            g4_occupied(row, s->a->n_keys, -INFINITY, &from, &to);
            g4_fill(row, 0, from);
            exec->kernels->softmax(row + from, to - from);
            g4_fill(row + to, 0, s->a->n_keys - to);
        }
    }
}

g4_status g4_attention_pattern(g4_exec *exec, const g4_attention *run, float *scores)
{
    whole_array s = {run, scores};
    return g4_exec_rows(exec, run->n_rows, (size_t)run->n_heads * (size_t)run->n_keys, pattern_rows, &s);
}

g4_status g4_attention_mix(g4_exec *exec, const g4_attention *run, const float *pattern)
{
    bool done;
    int position = -1;
    G4_TRY(g4_tiles_mix(exec, run, pattern, &position, &done));
    if (!done)
        G4_TRY(g4_rows_mix(exec, run, pattern, &position));
    if (position >= 0)
        return g4_fail(exec->err, G4_EVALUE,
                       "an edit gives attention weight to position %d, but this sliding layer's cache holds positions "
                       "%d to %d only: run the whole prompt in one call without a cached sequence",
                       position, run->kv.first, run->n_keys - 1);
    return G4_OK;
}
