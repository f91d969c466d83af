/* SPDX-License-Identifier: Apache-2.0 */
/* What an operation needs besides its operands: kernels, threads, scratch memory, and whether to go on. */
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
    g4_poll_fn poll; /* the user's; may be slow, so it is asked every 20 ms only */
    void *poll_context;
    double last_poll_ms;
    g4_profile *profile; /* times go here; NULL: nobody asked */
    g4_error *err;
} g4_exec;

/* Nonzero once the user's poll said stop. Cheap enough for every task. */
int g4_exec_poll(void *exec);

/* Runs tasks on the pool; a cancelled run fills *err. work: multiply-adds (or as much) in all; too few stay with the
 * caller. */
g4_status g4_exec_run(g4_exec *exec, int n_tasks, double work, g4_task_fn fn, void *context);

/* fn over [0, n_rows) in slices; on the caller alone where the whole is too little work to share out. */
typedef void (*g4_rows_fn)(const g4_exec *exec, void *context, int first, int end);
g4_status g4_exec_rows(g4_exec *exec, int n_rows, size_t row_size, g4_rows_fn fn, void *context);

/* Scratch of n elements of that size; NULL and *err filled if there is no memory. */
void *g4_exec_alloc(g4_exec *exec, size_t n, size_t element_size);

#define G4_ALLOC(exec, pointer, n)                                 \
    do {                                                           \
        (pointer) = g4_exec_alloc((exec), (n), sizeof *(pointer)); \
        if (!(pointer))                                            \
            return G4_ENOMEM;                                      \
    } while (0)

#endif
