/* SPDX-License-Identifier: Apache-2.0 */
/* A fixed set of worker threads that run numbered tasks. The caller is worker 0.
 *
 * Results never depend on which worker takes a task, so scheduling is dynamic. Two callers of one pool take turns. A poll
 * may use the pool that it interrupts: its tasks run on the caller's thread.
 * After fork() the child's pool restarts its threads at the first run.
 */
#ifndef GEMMA4_BASE_POOL_H
#define GEMMA4_BASE_POOL_H

#include <stdbool.h>

#include "base/status.h"

typedef struct g4_pool g4_pool;

typedef void (*g4_task_fn)(void *context, int task, int worker);

/* Called on the caller's thread after each task that it runs, so it must be quick. Nonzero cancels tasks not yet
 * started. */
typedef int (*g4_poll_fn)(void *context);

g4_pool *g4_pool_new(int n_threads); /* NULL: out of memory or no threads */
void g4_pool_free(g4_pool *pool);
int g4_pool_size(const g4_pool *pool);

/* Calls fn for every task in [0, n_tasks). Returns G4_OK, or G4_ECANCELLED if poll returned nonzero. small: waking the
 * workers would cost more than the work, so the caller runs all tasks as worker 0. */
g4_status g4_pool_run(g4_pool *pool, int n_tasks, bool small, g4_task_fn fn, void *context, g4_poll_fn poll,
                      void *poll_context);

#endif
