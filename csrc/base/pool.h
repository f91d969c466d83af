/* SPDX-License-Identifier: Apache-2.0 */
/* A fixed set of threads that share out numbered tasks. The caller is worker 0.
 *
 * Results never depend on which worker takes a task, so scheduling is dynamic. Two callers of one pool take turns.
 * After fork() the child's pool starts its threads again at the first run.
 */
#ifndef GEMMA4_BASE_POOL_H
#define GEMMA4_BASE_POOL_H

#include <stdbool.h>

#include "base/status.h"

typedef struct g4_pool g4_pool;

typedef void (*g4_task_fn)(void *context, int task, int worker);

/* Asked on the caller's thread after each task it does (so: be quick): nonzero cancels what has not started. */
typedef int (*g4_poll_fn)(void *context);

g4_pool *g4_pool_new(int n_threads); /* NULL: out of memory or no threads */
void g4_pool_free(g4_pool *pool);
int g4_pool_size(const g4_pool *pool);

/* Calls fn for every task in [0, n_tasks), then returns G4_OK, or G4_ECANCELLED if poll said so. small: waking the
 * others would cost more than the work, so the caller does it all; tasks see worker 0 then. */
g4_status g4_pool_run(g4_pool *pool, int n_tasks, bool small, g4_task_fn fn, void *context, g4_poll_fn poll,
                      void *poll_context);

#endif
