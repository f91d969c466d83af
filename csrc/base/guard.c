/* SPDX-License-Identifier: Apache-2.0 */
#include "base/guard.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* Node of a list that only grows: the handler walks it without a lock. Nodes of freed guards are reused. */
struct g4_guard {
    atomic_bool taken;
    atomic_bool torn;
    _Atomic(uintptr_t) start, end; /* whole pages; end 0: guards nothing */
    g4_guard *next;
};

static _Atomic(g4_guard *) guards;
static struct sigaction previous;
static atomic_bool stepped_aside; /* the previous handler was restored since the last g4_guard_arm */
static uintptr_t page_size;       /* set before the handler can run: handlers must not call sysconf */

static g4_guard *find(uintptr_t at)
{
    for (g4_guard *guard = atomic_load_explicit(&guards, memory_order_acquire); guard; guard = guard->next)
        if (at < atomic_load(&guard->end) && at >= atomic_load(&guard->start))
            return guard;
    return NULL;
}

/* ---- the handler ------------------------------------------------------------------------------------------------- */

/* Maps zeros from the page at `at` to the end of the range: if a page is gone, all pages after it are gone, too. One
 * mapping covers them, so a large file does not use up the process's mappings. mmap is a plain system call here. */
static bool patch(g4_guard *guard, uintptr_t at)
{
    const uintptr_t page = at / page_size * page_size, end = atomic_load(&guard->end);
    atomic_store(&guard->torn, true); /* before any thread can read a zero */
    return mmap((void *)page, end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

/* Restores the previous handler: the instruction then faults again, or the signal is raised again. A second call means
 * that the previous handler passed the signal on. The system's default action follows. */
static void step_aside(int number, bool sent)
{
    struct sigaction standard = {.sa_handler = SIG_DFL};
    const bool again = atomic_exchange(&stepped_aside, true);
    sigaction(number, again ? &standard : &previous, NULL);
    if (sent)
        raise(number);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    const bool sent = info->si_code <= 0; /* by kill() or similar: no fault address */
    g4_guard *guard = sent ? NULL : find((uintptr_t)info->si_addr);
    (void)context;
    if (!guard || !patch(guard, (uintptr_t)info->si_addr))
        step_aside(number, sent);
    errno = saved;
}

void g4_guard_arm(void)
{
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    if (sigaction(SIGBUS, NULL, &now) != 0)
        return;
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_sigbus)
        return;
    previous = now;
    atomic_store(&stepped_aside, false);
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, NULL);
}

/* ---- guards ------------------------------------------------------------------------------------------------------ */

static g4_guard *take(void)
{
    for (g4_guard *guard = atomic_load(&guards); guard; guard = guard->next)
        if (!atomic_exchange(&guard->taken, true))
            return guard;
    g4_guard *guard = calloc(1, sizeof *guard);
    if (!guard)
        return NULL;
    atomic_init(&guard->taken, true);
    guard->next = atomic_load(&guards);
    while (!atomic_compare_exchange_weak(&guards, &guard->next, guard))
        continue;
    return guard;
}

g4_guard *g4_guard_new(const void *map, size_t n_bytes)
{
    page_size = (uintptr_t)sysconf(_SC_PAGESIZE);
    g4_guard *guard = take();
    if (!guard)
        return NULL;
    atomic_store(&guard->torn, false);
    atomic_store(&guard->start, (uintptr_t)map / page_size * page_size);
    atomic_store(&guard->end, ((uintptr_t)map + n_bytes + page_size - 1) / page_size * page_size);
    g4_guard_arm();
    return guard;
}

void g4_guard_free(g4_guard *guard)
{
    if (!guard)
        return;
    atomic_store(&guard->end, 0);
    atomic_store(&guard->taken, false);
}

bool g4_guard_is_torn(const g4_guard *guard)
{
    return atomic_load(&guard->torn);
}

g4_status g4_guards_add(g4_guard_set *set, const void *data, g4_error *err)
{
    const g4_guard *guard = find((uintptr_t)data);
    if (!guard)
        return G4_OK;
    for (size_t i = 0; i < set->n; i++)
        if (set->items[i] == guard)
            return G4_OK;
    const g4_guard **items = realloc(set->items, (set->n + 1) * sizeof *items);
    if (!items)
        return g4_fail_nomem(err, (set->n + 1) * sizeof *items);
    set->items = items;
    set->items[set->n++] = guard;
    return G4_OK;
}

g4_status g4_guards_check(const g4_guard_set *set, g4_error *err)
{
    for (size_t i = 0; i < set->n; i++)
        if (g4_guard_is_torn(set->items[i]))
            return g4_fail(err, G4_EFORMAT,
                           "a file of weights became shorter while it was read, and what was computed is dropped; "
                           "sequences keep what they held. Put the file back and load the model again");
    return G4_OK;
}

void g4_guards_release(g4_guard_set *set)
{
    free(set->items);
    *set = (g4_guard_set){0};
}
