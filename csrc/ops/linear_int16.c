/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/linear_int16.h"

#include <math.h>

#include "ops/profile.h"

/* A task is TASK_BYTES of x by TASK_COLUMNS columns. Both stay in the second-level cache (columns: 196 KB at 768
 * inputs). The next task has the same columns. Long blocks of inputs: see ops/linear_f32.c. */
enum { PANEL = 16, TASK_BYTES = 64 << 10, MIN_ROWS = 24, MAX_ROWS = 256, TASK_COLUMNS = 128, BLOCK_K = 6 * G4_GROUP16 };

static int n_panels(const g4_matrix16 *w)
{
    return (w->n_rows + PANEL - 1) / PANEL;
}

static g4_panel16 panel_of(const g4_matrix16 *w, int index)
{
    const size_t at = (size_t)index * PANEL;
    return (g4_panel16){w->q + at * (size_t)g4_stride16(w->n_cols), w->scale + at * (size_t)g4_groups16(w->n_cols)};
}

/* Integers and scales of w, padded to whole panels. */
static size_t n_numbers(const g4_matrix16 *w)
{
    return (size_t)n_panels(w) * PANEL * (size_t)g4_stride16(w->n_cols);
}

static size_t n_scales(const g4_matrix16 *w)
{
    return (size_t)n_panels(w) * PANEL * (size_t)g4_groups16(w->n_cols);
}

/* ---- packed weights ---------------------------------------------------------------------------------------------- */

typedef struct {
    const g4_exec *exec;
    const g4_matrix *from;
    const g4_matrix16 *to;
    float *widened; /* [workers, 16, n_cols] */
} pack_task;

static void pack_one(void *context, int index, int worker)
{
    const pack_task *t = context;
    const g4_matrix *w = t->from;
    const int first = index * PANEL, k = (int)w->n_cols;
    const int n = (int)w->n_rows - first < PANEL ? (int)w->n_rows - first : PANEL;
    const g4_panel16 panel = panel_of(t->to, index);
    float *widened = t->widened + (size_t)worker * PANEL * w->n_cols;
    if (w->dtype == G4_F32) {
        t->exec->kernels->pack_panel16(g4_matrix_row(w, (size_t)first), w->row_stride, n, k, &panel);
        return;
    }
    for (int r = 0; r < n; r++)
        g4_widen_for(t->exec->kernels, w->dtype)(widened + (size_t)r * w->n_cols, g4_matrix_row(w, (size_t)(first + r)),
                                                 k);
    t->exec->kernels->pack_panel16(widened, w->n_cols, n, k, &panel);
}

static void *alloc_bytes(g4_exec *exec, g4_arena *arena, size_t n_bytes)
{
    void *data = g4_arena_alloc(arena, n_bytes);
    if (!data)
        g4_fail_nomem(exec->err, n_bytes);
    return data;
}

g4_status g4_matrix16_new(g4_exec *exec, g4_arena *arena, const g4_matrix *w, const g4_matrix16 **result)
{
    g4_matrix16 *copy = alloc_bytes(exec, arena, sizeof *copy);
    if (!copy)
        return G4_ENOMEM;
    *copy = (g4_matrix16){.n_rows = (int)w->n_rows, .n_cols = (int)w->n_cols, .op = w->op};
    copy->q = alloc_bytes(exec, arena, n_numbers(copy) * sizeof *copy->q);
    copy->scale = alloc_bytes(exec, arena, n_scales(copy) * sizeof *copy->scale);
    if (!copy->q || !copy->scale)
        return G4_ENOMEM;
    g4_arena_mark mark = g4_arena_save(exec->arena);
    pack_task t = {exec, w, copy, NULL};
    G4_ALLOC(exec, t.widened, (size_t)g4_pool_size(exec->pool) * PANEL * w->n_cols);
    g4_status status = g4_exec_run(exec, n_panels(copy), (double)n_numbers(copy) * 8, pack_one, &t);
    g4_arena_restore(exec->arena, mark);
    *result = copy;
    return status;
}

size_t g4_matrix16_bytes(const g4_matrix16 *w)
{
    return n_numbers(w) * sizeof *w->q + n_scales(w) * sizeof *w->scale;
}

/* ---- x as integers: once for all layers with the same clamp ------------------------------------------------------ */

typedef struct {
    const float *x;
    const g4_job16 *job;
    const g4_rows16 *rows;
} quantize_task;

static void quantize_slice(const g4_exec *exec, void *context, int first, int end)
{
    const quantize_task *t = context;
    const size_t k = (size_t)t->job->w->n_cols;
    const g4_rows16 rows = g4_rows16_from(t->rows, first);
    exec->kernels->quantize_rows16(t->x + (size_t)first * k, k, end - first, (int)k, t->job->input_min,
                                   t->job->input_max, &rows);
}

static g4_status quantize(g4_exec *exec, const float *x, int m, const g4_job16 *jobs, int n_jobs, g4_rows16 *xs)
{
    for (int i = 0; i < n_jobs; i++) {
        int same = 0;
        while (same < i && (jobs[same].input_min != jobs[i].input_min || jobs[same].input_max != jobs[i].input_max))
            same++;
        if (same < i) {
            xs[i] = xs[same];
            continue;
        }
        xs[i].stride = g4_stride16(jobs[i].w->n_cols);
        G4_ALLOC(exec, xs[i].q, (size_t)m * (size_t)xs[i].stride);
        G4_ALLOC(exec, xs[i].scale, (size_t)m * (size_t)g4_groups16(xs[i].stride));
        quantize_task t = {x, &jobs[i], &xs[i]};
        G4_TRY(g4_exec_rows(exec, m, (size_t)xs[i].stride, quantize_slice, &t));
    }
    return G4_OK;
}

/* ---- matmul ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const g4_exec *exec;
    const g4_job16 *jobs;
    const g4_rows16 *xs;
    const int *first_task; /* [n_jobs + 1] */
    int m, rows;           /* all rows, and rows per task */
} product_task;

static int n_column_groups(const g4_matrix16 *w)
{
    return (w->n_rows + TASK_COLUMNS - 1) / TASK_COLUMNS;
}

static int rows_of_task(int stride)
{
    const int rows = TASK_BYTES / 2 / stride / 4 * 4;
    return rows < MIN_ROWS ? MIN_ROWS : rows > MAX_ROWS ? MAX_ROWS : rows;
}

static void run_task(void *context, int task, int worker)
{
    const product_task *t = context;
    int j = 0;
    (void)worker;
    while (task >= t->first_task[j + 1])
        j++;
    const g4_job16 *job = &t->jobs[j];
    const int local = task - t->first_task[j], row_groups = (t->m + t->rows - 1) / t->rows, n_rows = job->w->n_rows;
    const int row = local % row_groups * t->rows, column = local / row_groups * TASK_COLUMNS;
    const int m = t->m - row < t->rows ? t->m - row : t->rows;
    const int n = n_rows - column < TASK_COLUMNS ? n_rows - column : TASK_COLUMNS;
    const g4_rows16 x = g4_rows16_from(&t->xs[j], row);
    float *out = job->out + (size_t)row * (size_t)n_rows + (size_t)column;
    for (int at = 0; at < n; at += PANEL) {
        const g4_panel16 panel = panel_of(job->w, (column + at) / PANEL);
        for (int l = 0; l < x.stride; l += BLOCK_K) {
            const g4_rows16 x_block = g4_rows16_at(&x, l);
            const g4_panel16 w_block = g4_panel16_at(&panel, l);
            t->exec->kernels->matmul_panel16(&x_block, m, &w_block, x.stride - l < BLOCK_K ? x.stride - l : BLOCK_K,
                                             out + at, (size_t)n_rows, n - at < PANEL ? n - at : PANEL, l > 0);
        }
    }
    if (job->output_min > -INFINITY || job->output_max < INFINITY)
        for (int i = 0; i < m; i++)
            t->exec->kernels->clamp(out + (size_t)i * (size_t)n_rows, out + (size_t)i * (size_t)n_rows, job->output_min,
                                    job->output_max, n);
}

static void note(g4_exec *exec, double start, int m, const g4_job16 *jobs, int n_jobs)
{
    double work = 0, bytes = 0;
    for (int i = 0; i < n_jobs; i++) {
        work += 2.0 * m * jobs[i].w->n_rows * (double)jobs[i].w->n_cols;
        bytes += (double)g4_matrix16_bytes(jobs[i].w);
    }
    g4_profile_end(exec, jobs[0].w->op, start, 0, bytes);
    if (exec->profile)
        exec->profile->ops[jobs[0].w->op].int8_work += work;
}

g4_status g4_jobs16(g4_exec *exec, const float *x, int m, const g4_job16 *jobs, int n_jobs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    const double start = g4_profile_start(exec);
    product_task t = {.exec = exec, .jobs = jobs, .m = m};
    g4_rows16 *xs;
    int *first_task;
    double work = 0;
    G4_ALLOC(exec, xs, (size_t)n_jobs);
    G4_ALLOC(exec, first_task, (size_t)n_jobs + 1);
    G4_TRY(quantize(exec, x, m, jobs, n_jobs, xs));
    t.rows = rows_of_task(xs[0].stride);
    first_task[0] = 0;
    for (int i = 0; i < n_jobs; i++) {
        first_task[i + 1] = first_task[i] + (m + t.rows - 1) / t.rows * n_column_groups(jobs[i].w);
        work += (double)m * jobs[i].w->n_rows * (double)jobs[i].w->n_cols;
    }
    t.xs = xs;
    t.first_task = first_task;
    G4_TRY(g4_exec_run(exec, first_task[n_jobs], work, run_task, &t));
    note(exec, start, m, jobs, n_jobs);
    g4_arena_restore(exec->arena, mark);
    return G4_OK;
}
