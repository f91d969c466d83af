/* SPDX-License-Identifier: Apache-2.0 */
/* Mapped files that shrink while they are read: by one thread or many, by a step, and beside foreign signal
 * handlers. */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/guard.h"
#include "tests/csrc_test.h"

enum { N_PAGES = 16, N_THREADS = 4 };

typedef struct {
    int fd;
    size_t n_bytes, page;
    unsigned char *data;
} map;

/* An unnamed file of ones. */
static map new_map(void)
{
    char name[] = "/tmp/guard_test_XXXXXX";
    map m = {.fd = mkstemp(name), .page = (size_t)sysconf(_SC_PAGESIZE)};
    m.n_bytes = N_PAGES * m.page - 7;
    unsigned char *ones = malloc(m.n_bytes);
    memset(ones, 1, m.n_bytes);
    if (m.fd < 0 || write(m.fd, ones, m.n_bytes) != (ssize_t)m.n_bytes)
        exit(1);
    unlink(name);
    free(ones);
    m.data = mmap(NULL, m.n_bytes, PROT_READ, MAP_SHARED, m.fd, 0);
    return m;
}

static void free_map(map *m)
{
    munmap(m->data, m->n_bytes);
    close(m->fd);
}

static void shrink(const map *m, size_t n_pages)
{
    if (ftruncate(m->fd, (off_t)(n_pages * m->page)) != 0)
        exit(1);
}

/* TSan reports the mapping of zeros as a write. */
__attribute__((no_sanitize("thread"))) static size_t sum(const map *m)
{
    size_t total = 0;
    for (size_t i = 0; i < m->n_bytes; i++)
        total += ((volatile unsigned char *)m->data)[i];
    return total;
}

static void test_lost_pages_are_zeros(void)
{
    map m = new_map();
    g4_guard *guard = g4_guard_new(m.data, m.n_bytes);
    CHECK(sum(&m) == m.n_bytes && !g4_guard_is_torn(guard));
    shrink(&m, 3);
    CHECK(!g4_guard_is_torn(guard)); /* nobody has read the lost pages */
    CHECK(sum(&m) == 3 * m.page && g4_guard_is_torn(guard));
    shrink(&m, N_PAGES); /* longer again, but the range stays torn */
    CHECK(sum(&m) == 3 * m.page && g4_guard_is_torn(guard));
    g4_guard_free(guard);
    free_map(&m);
}

static void test_sets(void)
{
    map a = new_map(), b = new_map();
    g4_guard *guards[] = {g4_guard_new(a.data, a.n_bytes), g4_guard_new(b.data, b.n_bytes)};
    g4_guard_set both = {0}, one = {0};
    g4_error err;
    int local = 0;
    CHECK(g4_guards_add(&both, a.data + 5, &err) == G4_OK &&
          g4_guards_add(&both, a.data + a.n_bytes - 1, &err) == G4_OK);
    CHECK(g4_guards_add(&both, b.data, &err) == G4_OK && g4_guards_add(&both, &local, &err) == G4_OK && both.n == 2);
    CHECK(g4_guards_add(&one, a.data, &err) == G4_OK && one.n == 1);
    CHECK(g4_guards_check(&both, &err) == G4_OK);
    shrink(&b, 1);
    sum(&b);
    CHECK(g4_guards_check(&both, &err) == G4_EFORMAT && strstr(err.message, "shorter"));
    CHECK(g4_guards_check(&one, &err) == G4_OK);
    g4_guards_release(&both);
    g4_guards_release(&one);
    g4_guard_free(guards[1]);
    map c = new_map();
    g4_guard *again = g4_guard_new(c.data, c.n_bytes); /* reuses the freed guard, and is not torn */
    CHECK(again == guards[1] && !g4_guard_is_torn(again));
    g4_guard_free(again);
    g4_guard_free(guards[0]);
    free_map(&a), free_map(&b), free_map(&c);
}

static void *read_all(void *context)
{
    const map *m = context;
    return (void *)(uintptr_t)(sum(m) == 2 * m->page);
}

static void test_many_threads(void)
{
    for (int round = 0; round < 20; round++) {
        map m = new_map();
        g4_guard *guard = g4_guard_new(m.data, m.n_bytes);
        pthread_t threads[N_THREADS];
        void *right;
        shrink(&m, 2);
        for (int i = 0; i < N_THREADS; i++)
            pthread_create(&threads[i], NULL, read_all, &m);
        for (int i = 0; i < N_THREADS; i++) {
            pthread_join(threads[i], &right);
            CHECK(right);
        }
        CHECK(g4_guard_is_torn(guard));
        g4_guard_free(guard);
        free_map(&m);
    }
}

/* ---- foreign handlers -------------------------------------------------------------------------------------------- */

static sigjmp_buf escape;
static volatile sig_atomic_t n_caught;

static void catch_it(int number)
{
    (void)number;
    n_caught++;
    siglongjmp(escape, 1);
}

static void count_it(int number)
{
    (void)number;
    n_caught++;
}

/* Reads a lost page that has no guard. Returns whether catch_it saw the fault. */
static bool foreign_fault_is_caught(void)
{
    map m = new_map();
    int before = n_caught;
    shrink(&m, 1);
    if (sigsetjmp(escape, 1) == 0)
        sum(&m);
    free_map(&m);
    return n_caught == before + 1;
}

static void test_handlers_of_others(void)
{
    map m = new_map();
    signal(SIGBUS, catch_it);
    g4_guard *guard = g4_guard_new(m.data, m.n_bytes); /* installs the engine's handler over it */
    CHECK(foreign_fault_is_caught());
    signal(SIGBUS, catch_it); /* the foreign handler replaces the engine's until the guard is armed again */
    g4_guard_arm();
    shrink(&m, 4);
    CHECK(sum(&m) == 4 * m.page && g4_guard_is_torn(guard));
    CHECK(foreign_fault_is_caught());
    g4_guard_arm();
    CHECK(foreign_fault_is_caught());
    signal(SIGBUS, count_it);
    g4_guard_arm();
    int before = n_caught;
    raise(SIGBUS); /* sent, not a fault: goes to the foreign handler */
    CHECK(n_caught == before + 1);
    g4_guard_free(guard);
    free_map(&m);
}

static struct sigaction before_theirs;

/* Like Python's faulthandler: reports (not here), restores the previous handler, and sends the signal again. */
static void hand_back(int number)
{
    sigaction(number, &before_theirs, NULL);
    raise(number);
}

/* The exit status of a child that has a foreign fault while a handler is installed over the engine's. */
static int status_of_child(void (*handler)(int))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        map m = new_map(), other = new_map();
        struct sigaction action = {.sa_handler = handler, .sa_flags = SA_NODEFER};
        alarm(20);
        signal(SIGBUS, SIG_DFL);
        g4_guard_new(m.data, m.n_bytes);
        sigaction(SIGBUS, &action, &before_theirs);
        g4_guard_arm();
        shrink(&other, 0);
        sum(&other);
        _exit(0); /* unreachable */
    }
    int status = 0;
    waitpid(child, &status, 0);
    return status;
}

static void test_foreign_faults_still_end_the_process(void)
{
    int alone = status_of_child(SIG_DFL), handed_back = status_of_child(hand_back), ignored = status_of_child(SIG_IGN);
    CHECK(WIFSIGNALED(alone) && WTERMSIG(alone) == SIGBUS);
    CHECK(WIFSIGNALED(handed_back) && WTERMSIG(handed_back) == SIGBUS);
    CHECK(WIFSIGNALED(ignored) && WTERMSIG(ignored) == SIGBUS);
}

void test_guards(void)
{
    test_lost_pages_are_zeros();
    test_sets();
    test_many_threads();
    test_handlers_of_others();
    test_foreign_faults_still_end_the_process();
}
