/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/linear.h"

#include "ops/blas.h"
#include "ops/inputs.h"
#include "ops/linear_bf16.h"
#include "ops/linear_f32.h"
#include "ops/profile.h"

enum {
    PANEL = 32,        /* weight rows per task: at least one block of the int8 kernels, */
    PACKED_PANEL = 64, /* or of those for packed x. */
    SOME_PANEL = 512,  /* A few rows of x as int8: several blocks. Each one prefetches the next, so that only the … */
    SOME_WORK = 4096,  /* … first one waits for memory. With more rows of x (this many products), it counts less. */
    PANEL_TASKS = 4,   /* tasks per thread that the larger panels must leave */
    STREAM_ROWS = 4,   /* of plain weights: see few_rows */
    MIN_STREAM = 64 << 10,  /* bytes of weights per streaming task: many, because each start is slow, */
    MAX_STREAM = 512 << 10, /* but several tasks per thread */
    STREAM_TASKS = 4,
    MATRIX_ROWS = 48,           /* with fewer rows, widening the weights for panels or sgemm does not pay off */
    TILE_ROWS = 32,             /* the same for AVX-512 BF16 tiles; AMX tiles pay off from STREAM_ROWS + 1 on */
    BLAS_PANEL_FLOATS = 1 << 17 /* a widened panel stays in the second-level cache */
};

typedef struct {
    const g4_exec *exec;
    const g4_linear_job *jobs;
    const int *first_task; /* [n_jobs + 1] */
    int n_jobs;
    float *scratch; /* [workers, scratch_floats] */
    size_t scratch_floats;
    const g4_inputs *inputs; /* x of the int8 jobs … */
    const g4_int8_rows *xs;  /* … as int8 */
    const g4_inputs *many;   /* x of the jobs with many rows in float32 … */
    float *const *packed;    /* … packed */
} linear_task;

static bool uses_int8(const g4_exec *exec, const g4_linear_job *job)
{
    return exec->fast && g4_is_quantised(job->w.dtype);
}

static int blas_panel_rows(const g4_linear_job *job)
{
    int rows = BLAS_PANEL_FLOATS / (int)job->w.n_cols / PANEL * PANEL;
    return rows < PANEL ? PANEL : rows > 4 * PANEL ? 4 * PANEL : rows;
}

/* How a job is computed. */
typedef enum {
    BY_ROWS,   /* the kernels' own blocks: all of `exact`, a few rows, and quantised weights with int8 x */
    BY_BLAS,   /* OpenBLAS */
    BY_PANELS, /* float32 panels: ops/linear_f32.h */
    BY_TILES   /* bf16 tiles: ops/linear_bf16.h */
} method;

static bool has_tiles(const g4_kernels *kernels, g4_dtype dtype)
{
    const bool amx = kernels->isa == G4_ISA_AMX;
    return kernels->matmul_tiles && (dtype == G4_BF16 || (amx && g4_is_quantised(dtype)));
}

static int least_tile_rows(const g4_kernels *kernels)
{
    return kernels->isa == G4_ISA_AMX ? STREAM_ROWS + 1 : TILE_ROWS;
}

/* 32 rows go by rows or by tiles. By rows, a float32 row has its own bits. The int8 kernels add a few rows in another
 * order than many. */
int g4_linear_least_rows(const g4_exec *exec, const g4_matrix *w)
{
    if (!exec->fast)
        return 1;
    if (has_tiles(exec->kernels, w->dtype))
        return least_tile_rows(exec->kernels);
    return g4_is_quantised(w->dtype) ? G4_INT8_FEW + 1 : 1;
}

/* All methods but BY_ROWS are for many rows in `fast`, where the order of additions is free. In `high`, bf16 weights
 * always go BY_TILES on AMX, however few the rows, so that none depends on another; all else is as in `exact`. On
 * AVX-512 BF16, three products take longer than one in float32: it multiplies only twice as fast (Zen 4: 460 and 232
 * GFLOP/s).
 *
 * Plain weights on AVX2: panels, because OpenBLAS packs the widened weights once more. bf16 linear layers of E2B at 512
 * rows reach 158 to 177 GFLOP/s by panels and 117 to 143 by sgemm (two Zen 3 cores). With wider registers: OpenBLAS,
 * whose kernels use them; the panels' kernels do not.
 *
 * bf16 instructions do twice as much, AMX another 16 times. AMX also takes the quantised types; AVX-512 BF16 multiplies
 * them at half the rate of int8 with VNNI. On two Sapphire Rapids cores AMX is faster as soon as weights are not
 * streamed: 5 rows of Q4_0, Q4_K and Q8_0 take 19 ms, with int8 22, 23 and 25 ms. 10 rows of bf16 take 27 ms instead of
 * 62 (20 layers of 6144 x 1536, medians of 9 rounds). */
static method method_of(const g4_exec *exec, const g4_linear_job *job)
{
    const g4_kernels *kernels = exec->kernels;
    if (exec->high && kernels->isa == G4_ISA_AMX && job->w.dtype == G4_BF16)
        return BY_TILES;
    if (!exec->fast)
        return BY_ROWS;
    if (has_tiles(kernels, job->w.dtype) && job->m >= least_tile_rows(kernels))
        return BY_TILES;
    if (g4_is_quantised(job->w.dtype) || job->m < MATRIX_ROWS)
        return BY_ROWS;
    const bool wider = kernels->isa != G4_ISA_AVX2 && kernels->isa != G4_ISA_AVX_VNNI;
    return wider && g4_has_blas() ? BY_BLAS : BY_PANELS;
}

static bool uses_blas(const g4_exec *exec, const g4_linear_job *job)
{
    return method_of(exec, job) == BY_BLAS;
}

/* Up to this many rows of x, weights are streamed: memory is the limit. */
static int few_rows(const g4_exec *exec, const g4_linear_job *job)
{
    return uses_int8(exec, job) ? G4_INT8_FEW : STREAM_ROWS;
}

/* Whether x is packed once for all tasks. Otherwise matmul reads it in place: a few rows, also of a few inputs. */
static bool uses_packed(const g4_exec *exec, const g4_linear_job *job)
{
    const bool few = job->m <= STREAM_ROWS || (job->m <= G4_GROUP_ROWS && job->w.n_cols <= G4_GROUP_K);
    return !few && !uses_int8(exec, job) && !uses_blas(exec, job);
}

/* Floats of scratch per worker for a job. */
static size_t scratch_of(const g4_exec *exec, const g4_linear_job *job)
{
    if (uses_blas(exec, job))
        return (size_t)(4 * PANEL) * job->w.n_cols;
    return job->m <= few_rows(exec, job) ? 0 : uses_int8(exec, job) ? G4_INT8_SCRATCH : G4_MATMUL_SCRATCH;
}

static int stream_rows(const g4_exec *exec, const g4_linear_job *job)
{
    const size_t row_bytes = g4_dtype_bytes(job->w.dtype, job->w.n_cols);
    size_t n_bytes = row_bytes * job->w.n_rows / (STREAM_TASKS * (size_t)g4_pool_size(exec->pool));
    n_bytes = n_bytes < MIN_STREAM ? MIN_STREAM : n_bytes > MAX_STREAM ? MAX_STREAM : n_bytes;
    return n_bytes < row_bytes ? 1 : (int)(n_bytes / row_bytes);
}

static int panel_rows(const g4_exec *exec, const g4_linear_job *job)
{
    const int some = SOME_WORK / job->m < SOME_PANEL ? SOME_WORK / job->m : SOME_PANEL;
    const int most = uses_int8(exec, job) ? some : uses_packed(exec, job) ? PACKED_PANEL : PANEL;
    const int share = (int)job->w.n_rows / (PANEL_TASKS * g4_pool_size(exec->pool));
    const int rows = (share < most ? share : most) / PANEL * PANEL;
    return rows < PANEL ? PANEL : rows;
}

static int rows_per_task(const g4_exec *exec, const g4_linear_job *job)
{
    return job->m <= few_rows(exec, job) ? stream_rows(exec, job)
           : uses_blas(exec, job)        ? blas_panel_rows(job)
                                         : panel_rows(exec, job);
}

/* An expert may have no rows. */
static int count_tasks(const g4_exec *exec, const g4_linear_job *job)
{
    if (!job->m)
        return 0;
    const int rows = rows_per_task(exec, job);
    return ((int)job->w.n_rows + rows - 1) / rows;
}

static void run_panel(const linear_task *t, int index, int first, int n, int worker)
{
    const g4_kernels *kernels = t->exec->kernels;
    const g4_linear_job *job = &t->jobs[index];
    const int k = (int)job->w.n_cols;
    const void *rows = g4_matrix_row(&job->w, (size_t)first);
    float *scratch = t->scratch + (size_t)worker * t->scratch_floats;
    if (uses_int8(t->exec, job)) {
        g4_matmul_int8_for(kernels, job->w.dtype)(&t->xs[t->inputs->of_job[index]], job->m, rows, job->w.row_stride, n,
                                                  k, job->out + first, job->out_stride, scratch);
        return;
    }
    if (uses_packed(t->exec, job)) {
        g4_matmul_packed_for(kernels, job->w.dtype)(t->packed[t->many->of_job[index]], job->m, rows, job->w.row_stride,
                                                    n, k, job->out + first, job->out_stride, scratch);
        return;
    }
    if (!uses_blas(t->exec, job)) {
        g4_matmul_for(kernels, job->w.dtype)(job->x, job->x_stride, job->m, rows, job->w.row_stride, n, k,
                                             job->out + first, job->out_stride, scratch);
        return;
    }
    for (int j = 0; j < n; j++)
        g4_widen_for(kernels, job->w.dtype)(scratch + (size_t)j * (size_t)k,
                                            g4_matrix_row(&job->w, (size_t)(first + j)), k);
    g4_blas_matmul(job->x, job->x_stride, job->m, scratch, (size_t)k, n, k, job->out + first, job->out_stride);
}

static void run_task(void *context, int task, int worker)
{
    const linear_task *t = context;
    int j = 0;
    while (task >= t->first_task[j + 1])
        j++;
    const g4_linear_job *job = &t->jobs[j];
    int rows = rows_per_task(t->exec, job);
    int first = (task - t->first_task[j]) * rows;
    int n = (int)job->w.n_rows - first < rows ? (int)job->w.n_rows - first : rows;
    run_panel(t, j, first, n, worker);
}

/* ---- x as int8: once for all jobs that share it (q, k, v; gate, up) ---------------------------------------------- */

typedef struct {
    const g4_inputs *inputs;
    const g4_int8_rows *xs; /* one for each distinct x */
} quantize_task;

static void quantize_slice(const g4_exec *exec, void *context, int first, int end)
{
    const quantize_task *t = context;
    while (first < end) {
        int stop;
        const int i = g4_inputs_at(t->inputs, first, end, &stop), at = first - t->inputs->first[i];
        const g4_linear_job *job = t->inputs->jobs[i];
        exec->kernels->quantize_rows(job->x + (size_t)at * job->x_stride, job->x_stride, at, stop - first,
                                     (int)job->w.n_cols, &t->xs[i]);
        first = stop;
    }
}

static g4_status int8_rows_new(g4_exec *exec, const g4_linear_job *job, g4_int8_rows *rows)
{
    const size_t n = g4_int8_bytes(job->m, job->w.n_cols);
    rows->by_fours = job->m > G4_INT8_FEW;
    G4_ALLOC(exec, rows->q, n);
    G4_ALLOC(exec, rows->scale, n / 32);
    G4_ALLOC(exec, rows->sum16, n / 16);
    G4_ALLOC(exec, rows->sum32, n / 32);
    if (rows->by_fours) {
        G4_ALLOC(exec, rows->minus_4, n / 16);
        G4_ALLOC(exec, rows->minus_8, n / 32);
    }
    return G4_OK;
}

static g4_status quantize_inputs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs, g4_inputs *inputs,
                                 const g4_int8_rows **result)
{
    g4_int8_rows *xs;
    size_t max_k = 0;
    G4_TRY(g4_inputs_new(exec, jobs, n_jobs, 1, uses_int8, inputs));
    G4_ALLOC(exec, xs, (size_t)n_jobs);
    for (int i = 0; i < inputs->n; i++) {
        G4_TRY(int8_rows_new(exec, inputs->jobs[i], &xs[i]));
        max_k = inputs->jobs[i]->w.n_cols > max_k ? inputs->jobs[i]->w.n_cols : max_k;
    }
    quantize_task t = {inputs, xs};
    *result = xs;
    return g4_exec_rows(exec, inputs->first[inputs->n], max_k, quantize_slice, &t);
}

/* ---- many rows of x in float32, packed once for all jobs that share them ----------------------------------------- */

typedef struct {
    const g4_inputs *inputs;
    float *const *packed; /* one for each distinct x */
} pack_task;

static void pack_slice(const g4_exec *exec, void *context, int first, int end)
{
    const pack_task *t = context;
    while (first < end) {
        int stop;
        const int i = g4_inputs_at(t->inputs, first, end, &stop);
        const int row = (first - t->inputs->first[i]) * G4_PACK_UNIT,
                  end_row = (stop - t->inputs->first[i]) * G4_PACK_UNIT;
        const g4_linear_job *job = t->inputs->jobs[i];
        exec->kernels->pack_rows(job->x, job->x_stride, job->m, (int)job->w.n_cols, row,
                                 end_row < job->m ? end_row : job->m, t->packed[i]);
        first = stop;
    }
}

static g4_status pack_inputs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs, g4_inputs *inputs,
                             float *const **result)
{
    float **packed;
    size_t max_k = 0;
    G4_TRY(g4_inputs_new(exec, jobs, n_jobs, G4_PACK_UNIT, uses_packed, inputs));
    G4_ALLOC(exec, packed, (size_t)inputs->n);
    for (int i = 0; i < inputs->n; i++) {
        const size_t k = inputs->jobs[i]->w.n_cols;
        G4_ALLOC(exec, packed[i], g4_packed_rows((size_t)inputs->jobs[i]->m) * g4_packed_inputs(k));
        max_k = k > max_k ? k : max_k;
    }
    pack_task t = {inputs, packed};
    *result = packed;
    return g4_exec_rows(exec, inputs->first[inputs->n], max_k * G4_PACK_UNIT, pack_slice, &t);
}

static void end_profile(g4_exec *exec, double start, const g4_linear_job *jobs, int n_jobs)
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

static g4_status row_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    g4_inputs inputs, many;
    linear_task t = {.exec = exec, .jobs = jobs, .n_jobs = n_jobs, .inputs = &inputs, .many = &many};
    int *first_task;
    double work = 0;
    const double start = g4_profile_start(exec);
    if (exec->fast)
        G4_TRY(quantize_inputs(exec, jobs, n_jobs, &inputs, &t.xs));
    G4_TRY(pack_inputs(exec, jobs, n_jobs, &many, &t.packed));
    G4_ALLOC(exec, first_task, (size_t)n_jobs + 1);
    first_task[0] = 0;
    for (int j = 0; j < n_jobs; j++) {
        first_task[j + 1] = first_task[j] + count_tasks(exec, &jobs[j]);
        work += (double)jobs[j].m * (double)jobs[j].w.n_rows * (double)jobs[j].w.n_cols;
        const size_t n_floats = scratch_of(exec, &jobs[j]);
        t.scratch_floats = n_floats > t.scratch_floats ? n_floats : t.scratch_floats;
    }
    t.first_task = first_task;
    G4_ALLOC(exec, t.scratch, (size_t)g4_pool_size(exec->pool) * t.scratch_floats);
    g4_status status = g4_exec_run(exec, first_task[n_jobs], work, run_task, &t);
    end_profile(exec, start, jobs, n_jobs);
    g4_arena_restore(exec->arena, mark);
    return status;
}

/* Runs one round per method. Methods differ if weights have several types, or if experts have few and many rows. */
g4_status g4_linear_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs)
{
    static g4_status (*const rounds[])(g4_exec *, const g4_linear_job *, int) = {
        [BY_ROWS] = row_jobs, [BY_BLAS] = row_jobs, [BY_PANELS] = g4_panel_jobs, [BY_TILES] = g4_tile_jobs};
    g4_arena_mark mark = g4_arena_save(exec->arena);
    g4_status status = G4_OK;
    g4_linear_job *chosen;
    G4_ALLOC(exec, chosen, (size_t)n_jobs);
    for (method round = BY_ROWS; round <= BY_TILES && status == G4_OK; round++) {
        int n = 0;
        for (int j = 0; j < n_jobs; j++)
            if (method_of(exec, &jobs[j]) == round)
                chosen[n++] = jobs[j];
        if (n)
            status = rounds[round](exec, chosen, n);
    }
    g4_arena_restore(exec->arena, mark);
    return status;
}

g4_status g4_linear(g4_exec *exec, const float *x, int m, const g4_matrix *w, float *out)
{
    g4_linear_job job = {x, w->n_cols, m, *w, out, w->n_rows};
    return g4_linear_jobs(exec, &job, 1);
}
