/* SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/pool.h"
#include "tests/csrc_test.h"

enum { N_TASKS = 16 };

static void count_task(void *context, int task, int worker)
{
    (void)worker;
    atomic_fetch_add(&((atomic_int *)context)[task], 1);
}

/* A pool freed right after its run, while its threads are still going to sleep or have not yet seen the run. Every task
 * of every run is done once; TSan checks the rest. */
static void test_pool_freed_after_run(void)
{
    for (int n_threads = 1; n_threads <= 5; n_threads++) {
        for (int round = 0; round < 100; round++) {
            atomic_int done[N_TASKS] = {0};
            g4_pool *pool = g4_pool_new(n_threads);
            for (int run = 0; run <= round % 3; run++)
                CHECK(g4_pool_run(pool, N_TASKS, false, count_task, done, NULL, NULL) == G4_OK);
            g4_pool_free(pool);
            int n_done = 0;
            for (int i = 0; i < N_TASKS; i++)
                n_done += atomic_load(&done[i]) == 1 + round % 3;
            CHECK(n_done == N_TASKS);
        }
    }
}

typedef struct {
    g4_pool *pool, *other;
    atomic_int done[N_TASKS];
    int n_inner;
} nested;

/* A poll that uses the pool it interrupts, and another one from which it comes back to the first. */
static int run_inside(void *context)
{
    nested *n = context;
    g4_pool *const pools[] = {n->pool, n->other, n->pool};
    for (int i = 0; i < 3; i++)
        CHECK(g4_pool_run(pools[i], N_TASKS, false, count_task, n->done, NULL, NULL) == G4_OK);
    n->n_inner += 3;
    return 0;
}

static void test_pool_inside_its_own_poll(void)
{
    nested n = {.pool = g4_pool_new(3), .other = g4_pool_new(2)};
    while (!n.n_inner) /* the other threads may take every task: then the caller does not poll */
        CHECK(g4_pool_run(n.pool, N_TASKS, false, count_task, n.done, run_inside, &n) == G4_OK);
    bool even = true;
    for (int i = 1; i < N_TASKS; i++)
        even &= atomic_load(&n.done[i]) == atomic_load(&n.done[0]);
    CHECK(even && atomic_load(&n.done[0]) > n.n_inner);
    CHECK(g4_pool_run(n.pool, N_TASKS, false, count_task, n.done, NULL, NULL) == G4_OK); /* not locked */
    g4_pool_free(n.pool);
    g4_pool_free(n.other);
}

#ifndef __SANITIZE_THREAD__ /* TSan starts no threads in a forked child */
enum { N_CALLERS = 4, FORK_THREADS = 3 };

typedef struct {
    g4_pool *pool;
    atomic_int *n_ready; /* all threads begin together */
    atomic_int done[N_TASKS];
} caller;

static void *run_from_a_thread(void *argument)
{
    caller *self = argument;
    atomic_fetch_add(self->n_ready, 1);
    while (atomic_load(self->n_ready) < N_CALLERS)
        sched_yield();
    g4_pool_run(self->pool, N_TASKS, false, count_task, self->done, NULL, NULL);
    return NULL;
}

/* The child's first runs, from several threads at once: only one of them may start the pool's threads. */
static bool run_in_child(g4_pool *pool)
{
    static caller callers[N_CALLERS];
    atomic_int n_ready = 0;
    pthread_t threads[N_CALLERS];
    int n_done = 0;
    for (int i = 0; i < N_CALLERS; i++) {
        callers[i].pool = pool;
        callers[i].n_ready = &n_ready;
        pthread_create(&threads[i], NULL, run_from_a_thread, &callers[i]);
    }
    for (int i = 0; i < N_CALLERS; i++) {
        pthread_join(threads[i], NULL);
        for (int task = 0; task < N_TASKS; task++)
            n_done += atomic_load(&callers[i].done[task]) == 1;
    }
    g4_pool_free(pool);
    return n_done == N_CALLERS * N_TASKS;
}

static void meet_task(void *context, int task, int worker)
{
    (void)task, (void)worker;
    atomic_fetch_add((atomic_int *)context, 1);
    while (atomic_load((atomic_int *)context) < FORK_THREADS)
        sched_yield();
}

static void test_pool_after_fork(void)
{
    for (int round = 0; round < 50; round++) {
        atomic_int done[N_TASKS] = {0};
        atomic_int n_there = 0;
        g4_pool *pool = g4_pool_new(FORK_THREADS);
        g4_pool_run(pool, N_TASKS, false, count_task, done, NULL, NULL);
        /* all threads run by now: AddressSanitizer locks while one starts, and a child would inherit the lock */
        g4_pool_run(pool, FORK_THREADS, false, meet_task, &n_there, NULL, NULL);
        const pid_t child = fork();
        int status = -1;
        if (child == 0) {
            alarm(20); /* a child that hangs counts as failed */
            _exit(run_in_child(pool) ? 0 : 1);
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
        CHECK(g4_pool_run(pool, N_TASKS, false, count_task, done, NULL, NULL) == G4_OK && done[0] == 2);
        g4_pool_free(pool);
    }
}
#endif

void test_pool(void)
{
    test_pool_freed_after_run();
    test_pool_inside_its_own_poll();
#ifndef __SANITIZE_THREAD__
    test_pool_after_fork();
#endif
}
