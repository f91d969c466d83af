/* SPDX-License-Identifier: Apache-2.0 */
#include "base/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

/* An idle worker spins this many times (about 20 microseconds) before it sleeps. The gap between two operations of one
 * step is shorter, the gap between two steps is longer. An idle pool costs nothing. */
enum { SPINS = 2000 };

/* Stack of each started thread, independent of the system's default (128 KiB with musl, `ulimit -s` with glibc). glibc
 * takes thread-local storage out of it. The compiler checks frames against a limit (CMakeLists.txt). */
enum { STACK_BYTES = 1 << 20 };

typedef struct {
    g4_pool *pool;
    pthread_t thread;
    int worker;
} member;

/* The current run and its next task in one word, so that a worker that wakes late claims a task of the current run or
 * none. Fields: run (16 bits) · number of tasks (24) · next task (24). */
enum { TASK_BITS = 24, MAX_TASKS = 1 << 23 };
static const uint64_t TASK_MASK = ((uint64_t)1 << TASK_BITS) - 1;

struct g4_pool {
    int n_threads;
    /* The process that started the threads; negative while it is starting them. A fork's child has no threads. */
    _Atomic(pid_t) owner;
    member *members;

    pthread_mutex_t run_lock; /* one run at a time */
    pthread_mutex_t lock;     /* guards sleep and wake-up */
    pthread_cond_t wake;
    atomic_uint generation; /* a new value wakes the workers */
    atomic_bool stopping;   /* a worker that has just seen the last run's generation reads it without the lock */

    _Atomic(uint64_t) ticket;
    atomic_int n_unfinished; /* tasks of this run; fn and context do not change until it is 0 */
    g4_task_fn fn;
    void *context;
    atomic_bool cancelled;
};

/* The pool whose tasks this thread hands out. Its poll may run a signal handler that uses the same pool again. */
static _Thread_local const g4_pool *running;

static void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static unsigned await_run(g4_pool *pool, unsigned seen)
{
    for (int i = 0; i < SPINS; i++) {
        unsigned generation = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (generation != seen)
            return generation;
        pause_cpu();
    }
    pthread_mutex_lock(&pool->lock);
    unsigned generation;
    while ((generation = atomic_load_explicit(&pool->generation, memory_order_acquire)) == seen)
        pthread_cond_wait(&pool->wake, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    return generation;
}

/* Claims a task and runs it (in a cancelled run: drops it). False: none is left. The run waits for tasks, not for
 * workers: a worker that the system keeps off its CPU without a task delays nothing. */
static bool do_task(g4_pool *pool, int worker)
{
    uint64_t ticket = atomic_fetch_add_explicit(&pool->ticket, 1, memory_order_acquire);
    int task = (int)(ticket & TASK_MASK), n_tasks = (int)((ticket >> TASK_BITS) & TASK_MASK);
    if (task >= n_tasks)
        return false;
    if (!atomic_load_explicit(&pool->cancelled, memory_order_relaxed))
        pool->fn(pool->context, task, worker);
    atomic_fetch_sub_explicit(&pool->n_unfinished, 1, memory_order_release);
    return true;
}

static void *member_main(void *argument)
{
    member *self = argument;
    g4_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        seen = await_run(pool, seen);
        if (atomic_load_explicit(&pool->stopping, memory_order_relaxed))
            return NULL;
        while (do_task(pool, self->worker))
            continue;
    }
}

static void announce(g4_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static bool start_thread(member *self)
{
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0)
        return false;
    const bool started = pthread_attr_setstacksize(&attributes, STACK_BYTES) == 0 &&
                         pthread_create(&self->thread, &attributes, member_main, self) == 0;
    pthread_attr_destroy(&attributes);
    return started;
}

/* Starts the threads. If the system grants fewer than requested, the pool is smaller. */
static void start_threads(g4_pool *pool)
{
    pthread_mutex_init(&pool->run_lock, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    atomic_init(&pool->generation, 0);
    atomic_init(&pool->ticket, 0);
    atomic_init(&pool->n_unfinished, 0);
    atomic_init(&pool->stopping, false);
    for (int i = 1; i < pool->n_threads; i++) {
        pool->members[i] = (member){.pool = pool, .worker = i};
        if (!start_thread(&pool->members[i]))
            pool->n_threads = i;
    }
}

/* Starts the threads if this process has none yet: in a new pool, and in a fork's child. The child's first thread to
 * arrive starts them; its other threads wait. */
static void ensure_started(g4_pool *pool)
{
    const pid_t self = getpid();
    pid_t owner = atomic_load_explicit(&pool->owner, memory_order_acquire);
    while (owner != self) {
        if (owner == -self) {
            sched_yield();
            owner = atomic_load_explicit(&pool->owner, memory_order_acquire);
        } else if (atomic_compare_exchange_strong(&pool->owner, &owner, -self)) {
            start_threads(pool);
            atomic_store_explicit(&pool->owner, self, memory_order_release);
            return;
        }
    }
}

g4_pool *g4_pool_new(int n_threads)
{
    g4_pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    pool->n_threads = n_threads < 1 ? 1 : n_threads;
    pool->members = calloc((size_t)pool->n_threads, sizeof *pool->members);
    if (!pool->members) {
        free(pool);
        return NULL;
    }
    ensure_started(pool);
    return pool;
}

void g4_pool_free(g4_pool *pool)
{
    if (!pool)
        return;
    if (atomic_load_explicit(&pool->owner, memory_order_acquire) == getpid()) {
        atomic_store_explicit(&pool->stopping, true, memory_order_relaxed); /* announce() publishes it */
        announce(pool);
        for (int i = 1; i < pool->n_threads; i++)
            pthread_join(pool->members[i].thread, NULL);
    }
    free(pool->members);
    free(pool);
}

int g4_pool_size(const g4_pool *pool)
{
    return pool->n_threads;
}

static void await_tasks(g4_pool *pool)
{
    for (int spins = 0; atomic_load_explicit(&pool->n_unfinished, memory_order_acquire) > 0; spins++) {
        if (spins < 1 << 14)
            pause_cpu();
        else
            sched_yield();
    }
}

static g4_status run_locked(g4_pool *pool, int n_tasks, g4_task_fn fn, void *context, g4_poll_fn poll,
                            void *poll_context)
{
    pool->fn = fn;
    pool->context = context;
    atomic_store_explicit(&pool->cancelled, false, memory_order_relaxed);
    atomic_store_explicit(&pool->n_unfinished, n_tasks, memory_order_relaxed);
    uint64_t run = (atomic_load_explicit(&pool->ticket, memory_order_relaxed) >> 2 * TASK_BITS) + 1;
    atomic_store_explicit(&pool->ticket, run << 2 * TASK_BITS | (uint64_t)n_tasks << TASK_BITS, memory_order_release);
    announce(pool);
    while (do_task(pool, 0))
        if (poll && poll(poll_context))
            atomic_store_explicit(&pool->cancelled, true, memory_order_relaxed);
    await_tasks(pool);
    return atomic_load_explicit(&pool->cancelled, memory_order_relaxed) ? G4_ECANCELLED : G4_OK;
}

/* On the caller's thread only: for one task, or for tasks too small to wake workers. */
static g4_status run_alone(int n_tasks, g4_task_fn fn, void *context, g4_poll_fn poll, void *poll_context)
{
    for (int task = 0; task < n_tasks; task++) {
        fn(context, task, 0);
        if (poll && poll(poll_context))
            return G4_ECANCELLED;
    }
    return G4_OK;
}

g4_status g4_pool_run(g4_pool *pool, int n_tasks, bool small, g4_task_fn fn, void *context, g4_poll_fn poll,
                      void *poll_context)
{
    ensure_started(pool);
    if (small || n_tasks <= 1 || n_tasks > MAX_TASKS || pool->n_threads == 1 || running == pool)
        return run_alone(n_tasks, fn, context, poll, poll_context);
    const g4_pool *outer = running;
    pthread_mutex_lock(&pool->run_lock);
    running = pool;
    g4_status status = run_locked(pool, n_tasks, fn, context, poll, poll_context);
    running = outer;
    pthread_mutex_unlock(&pool->run_lock);
    return status;
}
