/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/exec.h"

#include <time.h>

enum { POLL_MS = 20 };

/* Multiply-adds that one core does in about 5 microseconds, the time to hand work to another thread and wait for it. */
static const double SMALL_WORK = 1 << 17;

/* Approximate cost of a row operation per element, in multiply-adds. */
enum { WORK_PER_ELEMENT = 8 };

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

int g4_exec_poll(void *context)
{
    g4_exec *exec = context;
    if (!exec->poll)
        return 0;
    double now = now_ms();
    if (now - exec->last_poll_ms < POLL_MS)
        return 0;
    exec->last_poll_ms = now;
    return exec->poll(exec->poll_context);
}

g4_status g4_exec_run(g4_exec *exec, int n_tasks, double work, g4_task_fn fn, void *context)
{
    if (g4_pool_run(exec->pool, n_tasks, work < SMALL_WORK, fn, context, g4_exec_poll, exec) != G4_OK)
        return g4_fail(exec->err, G4_ECANCELLED, "cancelled");
    return G4_OK;
}

typedef struct {
    const g4_exec *exec;
    g4_rows_fn fn;
    void *context;
    int n_rows, slice;
} rows_task;

static void run_slice(void *context, int task, int worker)
{
    const rows_task *t = context;
    int first = task * t->slice;
    int end = first + t->slice < t->n_rows ? first + t->slice : t->n_rows;
    (void)worker;
    t->fn(t->exec, t->context, first, end);
}

g4_status g4_exec_rows(g4_exec *exec, int n_rows, size_t row_size, g4_rows_fn fn, void *context)
{
    if (n_rows <= 0)
        return G4_OK;
    const double work = (double)n_rows * (double)row_size * WORK_PER_ELEMENT;
    if (n_rows == 1 || work < SMALL_WORK) {
        fn(exec, context, 0, n_rows);
        return G4_OK;
    }
    int n_slices = 4 * g4_pool_size(exec->pool);
    int slice = (n_rows + n_slices - 1) / n_slices;
    rows_task t = {exec, fn, context, n_rows, slice};
    return g4_exec_run(exec, (n_rows + slice - 1) / slice, work, run_slice, &t);
}

void *g4_exec_alloc(g4_exec *exec, size_t n, size_t element_size)
{
    size_t n_bytes;
    if (__builtin_mul_overflow(n, element_size, &n_bytes)) {
        g4_fail_nomem(exec->err, ~0ull);
        return NULL;
    }
    void *data = g4_arena_alloc(exec->arena, n_bytes);
    if (!data)
        g4_fail_nomem(exec->err, n_bytes);
    return data;
}
