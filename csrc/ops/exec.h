/* SPDX-License-Identifier: Apache-2.0 */
/* Execution context of an operation: kernels, threads, scratch memory, cancellation. */
#ifndef GEMMA4_OPS_EXEC_H
#define GEMMA4_OPS_EXEC_H

#include <stdbool.h>

#include "base/arena.h"
#include "base/pool.h"
#include "base/profile.h"
#include "base/status.h"
#include "base/tensor.h"
#include "kernels/kernels.h"

typedef struct {
    const g4_kernels *kernels;
    g4_pool *pool;
    g4_arena *arena;
    bool fast;       /* may change the order of additions, and round x */
    bool high;       /* may change the order of additions, the same way for every row */
    g4_poll_fn poll; /* the user's; may be slow, so it is called at most every 20 ms */
    void *poll_context;
    double last_poll_ms;
    g4_profile *profile; /* receives times; NULL: no profile */
    g4_error *err;
} g4_exec;

/* Nonzero if the user's poll requests a stop. Cheap enough to call for every task. */
int g4_exec_poll(void *exec);

/* Runs tasks on the pool. A cancelled run fills *err. work: total multiply-adds or equivalent. If the total is too
 * small, the caller runs all tasks. */
g4_status g4_exec_run(g4_exec *exec, int n_tasks, double work, g4_task_fn fn, void *context);

/* Calls fn on slices of [0, n_rows) in parallel, or once on the caller's thread if the total work is too small.
 * row_size: elements per row. */
typedef void (*g4_rows_fn)(const g4_exec *exec, void *context, int first, int end);
g4_status g4_exec_rows(g4_exec *exec, int n_rows, size_t row_size, g4_rows_fn fn, void *context);

/* Scratch for n elements of element_size bytes. NULL: out of memory, and *err is filled. */
void *g4_exec_alloc(g4_exec *exec, size_t n, size_t element_size);

#define G4_ALLOC(exec, pointer, n)                                 \
    do {                                                           \
        (pointer) = g4_exec_alloc((exec), (n), sizeof *(pointer)); \
        if (!(pointer))                                            \
            return G4_ENOMEM;                                      \
    } while (0)

#endif
