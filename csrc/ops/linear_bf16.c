/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/linear_bf16.h"

#include "ops/inputs.h"
#include "ops/profile.h"

enum {
    TASK_COLUMNS = 128, /* weight rows converted at a time … */
    BLOCK_K = 1536,     /* … over this many inputs: 384 KB, which stay in the second-level cache for all rows of x */
    STRIDE = BLOCK_K + G4_TILE_INPUTS, /* an odd number of cache lines: 16 rows of a tile fall into 16 sets */
    BYTES_AHEAD = 2048,                /* prefetch distance in the weights */
    TASK_ROWS = 512,
    LEAST_ROWS = 128, /* per task: converting the weights again costs as much as a matmul with about 100 rows */
    TILE_PAIR = 2 * G4_TILE_ROWS
};

typedef struct {
    const g4_exec *exec;
    const g4_linear_job *jobs;
    const g4_inputs *inputs;
    const g4_tiles *xs;    /* n_pieces for each distinct x */
    const int *first_task; /* [n_jobs + 1] */
    uint16_t *weights;     /* one [TASK_COLUMNS, STRIDE] for each worker */
    float *sums;           /* one [TASK_ROWS, TASK_COLUMNS] for each worker */
} tile_task;

/* x is rounded to one bf16, or split into three. */
static int n_pieces(const g4_exec *exec)
{
    return exec->high ? G4_PIECES : 1;
}

/* ---- x, once for all jobs that share it -------------------------------------------------------------------------- */

typedef struct {
    const g4_inputs *inputs;
    const g4_tiles *xs;
} pack_task;

/* Up to 16 rows of a job's x, from `row` on. */
static void pack_group(const g4_exec *exec, const g4_linear_job *job, int row, const g4_tiles *xs)
{
    const float *x = job->x + (size_t)row * job->x_stride;
    const int m = job->m - row < G4_TILE_ROWS ? job->m - row : G4_TILE_ROWS, k = (int)job->w.n_cols;
    uint16_t *tiles[G4_PIECES];
    for (int p = 0; p < n_pieces(exec); p++)
        tiles[p] = g4_tiles_from(&xs[p], row).data;
    if (exec->high)
        exec->kernels->tiles_of_pieces(x, job->x_stride, m, k, tiles);
    else
        exec->kernels->tiles_of_x(x, job->x_stride, m, k, tiles[0]);
}

static void pack_slice(const g4_exec *exec, void *context, int first, int end)
{
    const pack_task *t = context;
    while (first < end) {
        int stop;
        const int i = g4_inputs_at(t->inputs, first, end, &stop);
        for (; first < stop; first++)
            pack_group(exec, t->inputs->jobs[i], (first - t->inputs->first[i]) * G4_TILE_ROWS,
                       &t->xs[i * n_pieces(exec)]);
    }
}

static bool all_jobs(const g4_exec *exec, const g4_linear_job *job)
{
    (void)exec, (void)job;
    return true;
}

static g4_status pack_inputs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs, g4_inputs *inputs,
                             const g4_tiles **result)
{
    g4_tiles *xs;
    size_t max_k = 0;
    G4_TRY(g4_inputs_new(exec, jobs, n_jobs, G4_TILE_ROWS, all_jobs, inputs));
    G4_ALLOC(exec, xs, (size_t)(inputs->n * n_pieces(exec)));
    for (int i = 0; i < inputs->n * n_pieces(exec); i++) {
        const int of = i / n_pieces(exec);
        const size_t k = inputs->jobs[of]->w.n_cols, n_groups = (size_t)(inputs->first[of + 1] - inputs->first[of]);
        xs[i].stride = (size_t)g4_tiles_of((int)k) * G4_TILE;
        G4_ALLOC(exec, xs[i].data, n_groups * xs[i].stride);
        max_k = k > max_k ? k : max_k;
    }
    pack_task t = {inputs, xs};
    *result = xs;
    return g4_exec_rows(exec, inputs->first[inputs->n], max_k * G4_TILE_ROWS, pack_slice, &t);
}

/* ---- matmul ------------------------------------------------------------------------------------------------------ */

static int n_column_groups(const g4_linear_job *job)
{
    return ((int)job->w.n_rows + TASK_COLUMNS - 1) / TASK_COLUMNS;
}

/* Up to TASK_ROWS rows; fewer if the threads need more tasks. */
static int rows_of_task(const g4_exec *exec, const g4_linear_job *job)
{
    const int wanted = 4 * g4_pool_size(exec->pool) / n_column_groups(job) + 1;
    int rows = ((job->m + wanted - 1) / wanted + TILE_PAIR - 1) / TILE_PAIR * TILE_PAIR;
    if (g4_pool_size(exec->pool) == 1 || rows > TASK_ROWS)
        rows = TASK_ROWS;
    return rows < LEAST_ROWS ? LEAST_ROWS : rows;
}

/* Converts weight rows [first, first + n), inputs [at, at + k) to bf16. `at` is a multiple of BLOCK_K, where blocks of
 * quantised weights begin. Rows that pad the last tile are not set, and their sums are never read. */
static void narrow_weights(const g4_kernels *kernels, const g4_matrix *w, int first, int n, int at, int k,
                           uint16_t *rows)
{
    const g4_bf16_row_bf16_fn bf16_row = g4_bf16_row_for(kernels, w->dtype);
    const size_t skip = g4_dtype_bytes(w->dtype, (size_t)at);
    for (int j = 0; j < n; j++)
        bf16_row((const char *)g4_matrix_row(w, (size_t)(first + j)) + skip, k, BYTES_AHEAD, rows + (size_t)j * STRIDE);
}

static void run_task(void *context, int task, int worker)
{
    const tile_task *t = context;
    const g4_kernels *kernels = t->exec->kernels;
    int j = 0;
    while (task >= t->first_task[j + 1])
        j++;
    const g4_linear_job *job = &t->jobs[j];
    const int local = task - t->first_task[j], groups = n_column_groups(job), rows = rows_of_task(t->exec, job);
    const int column = local % groups * TASK_COLUMNS, row = local / groups * rows, k = (int)job->w.n_cols;
    const int n = (int)job->w.n_rows - column < TASK_COLUMNS ? (int)job->w.n_rows - column : TASK_COLUMNS;
    const int m = job->m - row < rows ? job->m - row : rows;
    const int pieces = n_pieces(t->exec);
    const g4_tiles *xs = &t->xs[t->inputs->of_job[j] * pieces];
    float *out = job->out + (size_t)row * job->out_stride + (size_t)column;
    uint16_t *w = t->weights + (size_t)worker * TASK_COLUMNS * STRIDE;
    float *sums = t->sums + (size_t)worker * g4_tile_sums(TASK_ROWS, TASK_COLUMNS);
    for (int at = 0; at < k; at += BLOCK_K) {
        const int length = k - at < BLOCK_K ? k - at : BLOCK_K;
        narrow_weights(kernels, &job->w, column, n, at, length, w);
        for (int p = pieces - 1; p >= 0; p--) { /* the smallest first, as long as the sums are small */
            const bool first = at == 0 && p == pieces - 1, last = at + length == k && p == 0;
            g4_tiles x = g4_tiles_from(&xs[p], row);
            x.data += (size_t)(at / G4_TILE_INPUTS) * G4_TILE;
            kernels->matmul_tiles(&x, m, w, STRIDE, n, g4_tiles_of(length), sums, !first, last ? out : NULL,
                                  job->out_stride);
        }
    }
}

static void note(g4_exec *exec, double start, const g4_linear_job *jobs, int n_jobs)
{
    double work = 0, bytes = 0;
    if (!exec->profile)
        return;
    for (int i = 0; i < n_jobs; i++) {
        work += 2.0 * n_pieces(exec) * jobs[i].m * (double)jobs[i].w.n_rows * (double)jobs[i].w.n_cols;
        bytes += (double)jobs[i].w.n_rows * (double)g4_dtype_bytes(jobs[i].w.dtype, jobs[i].w.n_cols);
    }
    exec->profile->ops[jobs[0].w.op].bf16_work += work;
    g4_profile_end(exec, jobs[0].w.op, start, 0, bytes);
}

g4_status g4_tile_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    const size_t n_workers = (size_t)g4_pool_size(exec->pool);
    const double start = g4_profile_start(exec);
    g4_inputs inputs;
    tile_task t = {.exec = exec, .jobs = jobs, .inputs = &inputs};
    int *first_task;
    double work = 0;
    G4_TRY(pack_inputs(exec, jobs, n_jobs, &inputs, &t.xs));
    G4_ALLOC(exec, first_task, (size_t)n_jobs + 1);
    G4_ALLOC(exec, t.weights, n_workers * TASK_COLUMNS * STRIDE);
    G4_ALLOC(exec, t.sums, n_workers * g4_tile_sums(TASK_ROWS, TASK_COLUMNS));
    first_task[0] = 0;
    for (int j = 0; j < n_jobs; j++) {
        const int rows = rows_of_task(exec, &jobs[j]);
        first_task[j + 1] = first_task[j] + (jobs[j].m + rows - 1) / rows * n_column_groups(&jobs[j]);
        work += (double)jobs[j].m * (double)jobs[j].w.n_rows * (double)jobs[j].w.n_cols;
    }
    t.first_task = first_task;
    g4_status status = g4_exec_run(exec, first_task[n_jobs], work, run_task, &t);
    note(exec, start, jobs, n_jobs);
    g4_arena_restore(exec->arena, mark);
    return status;
}
