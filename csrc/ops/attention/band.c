/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/band.h"

#include <math.h>
#include <string.h>

#include "ops/attention/run.h"
#include "ops/profile.h"

enum { MAX_BAND = 256 }; /* keys per row; the models have 12 */

typedef struct {
    const g4_band_attention *run;
    float *array; /* [H, T, T] or NULL */
} task;

static size_t row_width(const g4_band_attention *a)
{
    return (size_t)a->n_heads * (size_t)a->head_dim;
}

static const float *head_row(const g4_band_attention *a, const float *x, int row, int head)
{
    return x + (size_t)row * row_width(a) + (size_t)head * (size_t)a->head_dim;
}

/* Capped scores of one row and head, for the keys of the row's band. */
static void score_row(const g4_kernels *kernels, const g4_band_attention *a, int row, int head, float *scores)
{
    const int first = g4_band_first_key(a, row), n = g4_band_end_key(a, row) - first;
    const float *q = head_row(a, a->q, row, head);
    float by_distance[MAX_BAND];
    /* key j has distance vector past - (row - j) */
    const int at = a->past - (row - first), n_near = a->n_distances - at < n ? a->n_distances - at : n;
    kernels->matmul_f32(q, 0, 1, head_row(a, a->k, first, head), row_width(a), n, a->head_dim, scores, 0, NULL);
    if (n_near > 0) {
        kernels->matmul_f32(q, 0, 1, head_row(a, a->distances, at, head), row_width(a), n_near, a->head_dim,
                            by_distance, 0, NULL);
        kernels->add(scores, scores, by_distance, n_near);
    }
    kernels->softcap(scores, a->cap, n);
}

static void mix_row(const g4_kernels *kernels, const g4_band_attention *a, int row, int head, const float *weights,
                    int first, int n)
{
    float *z = a->z + (size_t)row * row_width(a) + (size_t)head * (size_t)a->head_dim;
    memset(z, 0, (size_t)a->head_dim * sizeof *z);
    kernels->weighted_sum_f32(weights, 0, 1, head_row(a, a->v, first, head), row_width(a), n, a->head_dim, z, 0);
}

static void attend_rows(const g4_exec *exec, void *context, int first, int end)
{
    const g4_band_attention *a = ((task *)context)->run;
    float scores[MAX_BAND];
    for (int row = first; row < end; row++)
        for (int head = 0; head < a->n_heads; head++) {
            const int from = g4_band_first_key(a, row), n = g4_band_end_key(a, row) - from;
            score_row(exec->kernels, a, row, head, scores);
            exec->kernels->softmax(scores, n);
            mix_row(exec->kernels, a, row, head, scores, from, n);
        }
}

static g4_status run_rows(g4_exec *exec, const g4_band_attention *run, float *array, g4_rows_fn fn)
{
    if (run->past + run->future > MAX_BAND || run->past < 1)
        return g4_fail(exec->err, G4_EUNSUPPORTED,
                       "audio attention over %d frames before and %d after: expected 1 to %d in all", run->past,
                       run->future, MAX_BAND);
    task t = {run, array};
    const double start = g4_profile_start(exec), n_values = (double)run->n_rows * (double)row_width(run);
    G4_TRY(g4_exec_rows(exec, run->n_rows, row_width(run) * (size_t)(run->past + run->future) / 2, fn, &t));
    g4_profile_end(exec, G4_OP_ATTEND_LOCAL, start, 6 * n_values * (run->past + run->future), 4 * 4 * n_values);
    return G4_OK;
}

g4_status g4_attend_band(g4_exec *exec, const g4_band_attention *run)
{
    return run_rows(exec, run, NULL, attend_rows);
}

/* ---- in three steps ---------------------------------------------------------------------------------------------- */

static float *array_row(const task *t, int head, int row)
{
    return t->array + ((size_t)head * (size_t)t->run->n_rows + (size_t)row) * (size_t)t->run->n_rows;
}

static void score_rows(const g4_exec *exec, void *context, int first, int end)
{
    const task *t = context;
    for (int row = first; row < end; row++)
        for (int head = 0; head < t->run->n_heads; head++) {
            float *scores = array_row(t, head, row);
            for (int j = 0; j < t->run->n_rows; j++)
                scores[j] = -INFINITY;
            score_row(exec->kernels, t->run, row, head, scores + g4_band_first_key(t->run, row));
        }
}

/* Softmax from the first to the last unmasked key: the same sums as over the band alone. */
static void pattern_rows(const g4_exec *exec, void *context, int first, int end)
{
    const task *t = context;
    const int n = t->run->n_rows;
    for (int row = first; row < end; row++)
        for (int head = 0; head < t->run->n_heads; head++) {
            float *x = array_row(t, head, row);
            int from = 0, to = n;
            while (from < n && x[from] == -INFINITY)
                from++;
            while (to > from && x[to - 1] == -INFINITY)
                to--;
            memset(x, 0, (size_t)from * sizeof *x);
            memset(x + to, 0, (size_t)(n - to) * sizeof *x);
            exec->kernels->softmax(x + from, to - from);
        }
}

static void mix_rows(const g4_exec *exec, void *context, int first, int end)
{
    const task *t = context;
    for (int row = first; row < end; row++)
        for (int head = 0; head < t->run->n_heads; head++) {
            const float *weights = array_row(t, head, row);
            int from, to;
            g4_occupied(weights, t->run->n_rows, 0, &from, &to); /* other frames may be infinite: 0 × inf is NaN */
            mix_row(exec->kernels, t->run, row, head, weights + from, from, to - from);
        }
}

g4_status g4_band_scores(g4_exec *exec, const g4_band_attention *run, float *scores)
{
    return run_rows(exec, run, scores, score_rows);
}

g4_status g4_band_pattern(g4_exec *exec, const g4_band_attention *run, float *scores)
{
    return run_rows(exec, run, scores, pattern_rows);
}

g4_status g4_band_mix(g4_exec *exec, const g4_band_attention *run, const float *pattern)
{
    return run_rows(exec, run, (float *)pattern, mix_rows);
}
