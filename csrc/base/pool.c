/* SPDX-License-Identifier: Apache-2.0 */
#include "base/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

/* A worker that runs out of work spins this many times (about 20 microseconds) before it sleeps: the gap between two
 * operations of one step is shorter, the gap between two steps is longer, and an idle pool costs nothing. */
enum { SPINS = 2000 };

typedef struct {
    g4_pool *pool;
    pthread_t thread;
    int worker;
} member;

struct g4_pool {
    int n_threads;
    pid_t owner; /* the process that started the threads: a fork's child has none */
    member *members;

    pthread_mutex_t run_lock; /* one run at a time */
    pthread_mutex_t lock;     /* guards sleeping and `stopping` */
    pthread_cond_t wake;
    bool stopping;
    atomic_uint generation; /* a new value starts a run */
    atomic_int n_busy;      /* members that have not finished this run */

    g4_task_fn fn;
    void *context;
    int n_tasks;
    atomic_int next_task;
    atomic_bool cancelled;
};

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

static void work(g4_pool *pool, int worker)
{
    while (!atomic_load_explicit(&pool->cancelled, memory_order_relaxed)) {
        int task = atomic_fetch_add_explicit(&pool->next_task, 1, memory_order_relaxed);
        if (task >= pool->n_tasks)
            return;
        pool->fn(pool->context, task, worker);
    }
}

static void *member_main(void *argument)
{
    member *self = argument;
    g4_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        seen = await_run(pool, seen);
        if (pool->stopping)
            return NULL;
        work(pool, self->worker);
        atomic_fetch_sub_explicit(&pool->n_busy, 1, memory_order_release);
    }
}

static void announce(g4_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add_explicit(&pool->generation, 1, memory_order_release);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

/* Starts the threads; if the system gives fewer than asked for, the pool is that much smaller. */
static void start_threads(g4_pool *pool)
{
    pthread_mutex_init(&pool->run_lock, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    atomic_init(&pool->generation, 0);
    atomic_init(&pool->n_busy, 0);
    pool->stopping = false;
    pool->owner = getpid();
    for (int i = 1; i < pool->n_threads; i++) {
        pool->members[i] = (member){.pool = pool, .worker = i};
        if (pthread_create(&pool->members[i].thread, NULL, member_main, &pool->members[i]) != 0)
            pool->n_threads = i;
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
    start_threads(pool);
    return pool;
}

void g4_pool_free(g4_pool *pool)
{
    if (!pool)
        return;
    if (pool->owner == getpid()) {
        pthread_mutex_lock(&pool->lock);
        pool->stopping = true;
        pthread_mutex_unlock(&pool->lock);
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

/* The caller's share of the work, asking after each task whether to go on. */
static void work_and_poll(g4_pool *pool, g4_poll_fn poll, void *poll_context)
{
    while (!atomic_load_explicit(&pool->cancelled, memory_order_relaxed)) {
        int task = atomic_fetch_add_explicit(&pool->next_task, 1, memory_order_relaxed);
        if (task >= pool->n_tasks)
            return;
        pool->fn(pool->context, task, 0);
        if (poll && poll(poll_context))
            atomic_store_explicit(&pool->cancelled, true, memory_order_relaxed);
    }
}

static void await_members(g4_pool *pool)
{
    for (int spins = 0; atomic_load_explicit(&pool->n_busy, memory_order_acquire) > 0; spins++) {
        if (spins < 1 << 16)
            pause_cpu();
        else
            sched_yield();
    }
}

g4_status g4_pool_run(g4_pool *pool, int n_tasks, g4_task_fn fn, void *context, g4_poll_fn poll, void *poll_context)
{
    if (n_tasks <= 0)
        return G4_OK;
    if (pool->owner != getpid())
        start_threads(pool);
    pthread_mutex_lock(&pool->run_lock);
    pool->fn = fn;
    pool->context = context;
    pool->n_tasks = n_tasks;
    atomic_store_explicit(&pool->next_task, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->cancelled, false, memory_order_relaxed);
    bool alone = n_tasks == 1 || pool->n_threads == 1;
    if (!alone) {
        atomic_store_explicit(&pool->n_busy, pool->n_threads - 1, memory_order_relaxed);
        announce(pool);
    }
    work_and_poll(pool, poll, poll_context);
    if (!alone)
        await_members(pool);
    bool cancelled = atomic_load_explicit(&pool->cancelled, memory_order_relaxed);
    pthread_mutex_unlock(&pool->run_lock);
    return cancelled ? G4_ECANCELLED : G4_OK;
}
