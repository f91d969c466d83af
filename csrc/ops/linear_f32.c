/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/linear_f32.h"

#include "ops/profile.h"

enum {
    PANEL = G4_PANEL,
    TASK_COLUMNS = G4_PANEL_COLUMNS, /* per task: x is read once for four panels */
    TASK_ROWS = 2304,                /* per task: packing 64 columns costs about 1 % of the matmul with this many … */
    LEAST_ROWS = 96,                 /* … and 20 % with this few, used only to keep more threads busy */
    KERNEL_ROWS = 6,                 /* rows at once of AVX2's kernel, half of AVX-512's: fewer cost as much */
    MOST_K = G4_PANEL_INPUTS,        /* inputs at once: four panels (288 KB) … */
    BLOCK_ROWS = 24                  /* … and this many rows of x (108 KB) stay in the second-level cache (512 KB) */
};
/* Long blocks of inputs matter, because sums leave the registers between blocks. One Zen 3 core did 1.73 fma/cycle (of
 * 2) with blocks of 256 inputs, which fit a first-level cache, and 192 rows; 1.84 with 512 and 48; 1.89 with these. */

typedef struct {
    const g4_exec *exec;
    const g4_linear_job *jobs;
    const int *first_task; /* [n_jobs + 1] */
    float *scratch;        /* [workers, G4_PANEL_SCRATCH] */
} panel_task;

static int n_column_groups(const g4_linear_job *job)
{
    return ((int)job->w.n_rows + TASK_COLUMNS - 1) / TASK_COLUMNS;
}

/* With few columns and many rows (convolutions), tasks split the rows. */
static int rows_of_task(const g4_exec *exec, const g4_linear_job *job)
{
    const int wanted = 4 * g4_pool_size(exec->pool) / n_column_groups(job) + 1; /* row groups if this job ran alone */
    int rows = (job->m + wanted - 1) / wanted;
    if (g4_pool_size(exec->pool) == 1 || rows > TASK_ROWS)
        rows = TASK_ROWS;
    rows = rows < LEAST_ROWS ? LEAST_ROWS : rows;
    int n_groups = (job->m + rows - 1) / rows;
    rows = (job->m + n_groups - 1) / n_groups;
    return (rows + KERNEL_ROWS - 1) / KERNEL_ROWS * KERNEL_ROWS;
}

/* Inputs per block: blocks have about the same length and begin at block boundaries of quantised weights. */
static int inputs_of_block(int k, int unit)
{
    const int n_blocks = (k + MOST_K - 1) / MOST_K, most = MOST_K / unit * unit;
    const int length = (k + n_blocks * unit - 1) / (n_blocks * unit) * unit;
    return length < most ? length : most;
}

void g4_pack_rows(const g4_kernels *kernels, const g4_matrix *w, int first, int n, int at, int k, float *panels,
                  float *widened)
{
    for (int j = 0; j < n; j += PANEL) {
        const int rows = n - j < PANEL ? n - j : PANEL;
        const float *source = widened;
        size_t stride = MOST_K;
        if (w->dtype == G4_F32) {
            source = (const float *)g4_matrix_row(w, (size_t)(first + j)) + at;
            stride = w->row_stride;
        } else {
            for (int r = 0; r < rows; r++)
                g4_widen_for(kernels, w->dtype)(
                    widened + (size_t)r * MOST_K,
                    (const char *)g4_matrix_row(w, (size_t)(first + j + r)) + g4_dtype_bytes(w->dtype, (size_t)at), k);
        }
        kernels->pack_panel(source, stride, rows, k, panels + (size_t)j * MOST_K);
    }
}

static void run_block(const g4_kernels *kernels, const g4_linear_job *job, const float *panels, int row, int m, int n,
                      int at, int k, float *out, size_t out_stride)
{
    const float *x = job->x + (size_t)row * job->x_stride + at;
    for (int j = 0; j < n; j += PANEL)
        kernels->matmul_panel(x, job->x_stride, m, panels + (size_t)j * MOST_K, k, out + j, out_stride,
                              n - j < PANEL ? n - j : PANEL, at > 0);
}

void g4_panel_columns(const g4_kernels *kernels, const g4_linear_job *job, g4_pack_fn pack, int first_row, int end_row,
                      int column, int n, float *out, size_t out_stride, float *scratch)
{
    const int k = (int)job->w.n_cols, block = inputs_of_block(k, (int)g4_block_size(job->w.dtype));
    float *panels = scratch, *widened = panels + (size_t)TASK_COLUMNS * MOST_K;
    for (int at = 0; at < k; at += block) {
        const int length = k - at < block ? k - at : block;
        pack(kernels, &job->w, column, n, at, length, panels, widened);
        for (int row = first_row; row < end_row; row += BLOCK_ROWS)
            run_block(kernels, job, panels, row, end_row - row < BLOCK_ROWS ? end_row - row : BLOCK_ROWS, n, at, length,
                      out + (size_t)(row - first_row) * out_stride, out_stride);
    }
}

static void run_task(void *context, int task, int worker)
{
    const panel_task *t = context;
    int j = 0;
    while (task >= t->first_task[j + 1])
        j++;
    const g4_linear_job *job = &t->jobs[j];
    const int local = task - t->first_task[j], groups = n_column_groups(job), rows = rows_of_task(t->exec, job);
    const int column = local % groups * TASK_COLUMNS, first_row = local / groups * rows;
    const int n = (int)job->w.n_rows - column < TASK_COLUMNS ? (int)job->w.n_rows - column : TASK_COLUMNS;
    const int end_row = first_row + rows < job->m ? first_row + rows : job->m;
    g4_panel_columns(t->exec->kernels, job, g4_pack_rows, first_row, end_row, column, n,
                     job->out + (size_t)first_row * job->out_stride + column, job->out_stride,
                     t->scratch + (size_t)worker * G4_PANEL_SCRATCH);
}

static void note(g4_exec *exec, double start, const g4_linear_job *jobs, int n_jobs)
{
    double work = 0, bytes = 0;
    for (int i = 0; i < n_jobs; i++) {
        work += 2.0 * jobs[i].m * (double)jobs[i].w.n_rows * (double)jobs[i].w.n_cols;
        bytes += (double)jobs[i].w.n_rows * (double)g4_dtype_bytes(jobs[i].w.dtype, jobs[i].w.n_cols);
    }
    g4_profile_end(exec, jobs[0].w.op, start, work, bytes);
}

g4_status g4_panel_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    panel_task t = {.exec = exec, .jobs = jobs};
    int *first_task;
    double work = 0;
    G4_ALLOC(exec, first_task, (size_t)n_jobs + 1);
    G4_ALLOC(exec, t.scratch, (size_t)g4_pool_size(exec->pool) * G4_PANEL_SCRATCH);
    first_task[0] = 0;
    for (int j = 0; j < n_jobs; j++) {
        const int m = jobs[j].m;
        const int rows = m ? rows_of_task(exec, &jobs[j]) : 1, row_groups = (m + rows - 1) / rows;
        first_task[j + 1] = first_task[j] + row_groups * n_column_groups(&jobs[j]);
        work += (double)m * (double)jobs[j].w.n_rows * (double)jobs[j].w.n_cols;
    }
    t.first_task = first_task;
    const double start = g4_profile_start(exec);
    g4_status status = g4_exec_run(exec, first_task[n_jobs], work, run_task, &t);
    note(exec, start, jobs, n_jobs);
    g4_arena_restore(exec->arena, mark);
    return status;
}

g4_status g4_panel_linear(g4_exec *exec, const float *x, int m, const g4_matrix *w, float *out)
{
    g4_linear_job job = {x, w->n_cols, m, *w, out, w->n_rows};
    return g4_panel_jobs(exec, &job, 1);
}
