/* SPDX-License-Identifier: Apache-2.0 */
/* How fast this machine reads memory: the sum of 1 GiB of floats, split over the given number of threads.
 *
 *     cc -O3 -march=native -ffast-math bandwidth.c -o bandwidth -lpthread && ./bandwidth 2
 *
 * Prints bytes per second of the best of ten passes. (-ffast-math only lets the compiler split the sum; this is a
 * program of its own, not a library.)
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_THREADS = 256, PASSES = 10 };
static const size_t n_floats = (size_t)1 << 28;

typedef struct {
    const float *first;
    size_t n;
    float sum;
} part;

static void *read_part(void *argument)
{
    part *p = argument;
    float sum = 0;
    for (size_t i = 0; i < p->n; i++)
        sum += p->first[i];
    p->sum = sum; /* stored, so that the loop cannot be dropped */
    return NULL;
}

static double one_pass(const float *floats, int n_threads)
{
    pthread_t threads[MAX_THREADS];
    part parts[MAX_THREADS];
    struct timespec start, end;
    const size_t n = n_floats / (size_t)n_threads;
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (int i = 0; i < n_threads; i++) {
        parts[i] = (part){floats + (size_t)i * n, n, 0};
        if (pthread_create(&threads[i], NULL, read_part, &parts[i]) != 0)
            exit(1);
    }
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double seconds = (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
    return (double)(n * (size_t)n_threads * sizeof *floats) / seconds;
}

int main(int argc, char **argv)
{
    const int n_threads = argc > 1 ? atoi(argv[1]) : 1;
    float *floats = malloc(n_floats * sizeof *floats);
    if (!floats || n_threads < 1 || n_threads > MAX_THREADS)
        return 1;
    for (size_t i = 0; i < n_floats; i++)
        floats[i] = (float)(i & 7);
    double best = 0;
    for (int i = 0; i < PASSES; i++) {
        const double rate = one_pass(floats, n_threads);
        best = rate > best ? rate : best;
    }
    printf("%.0f\n", best);
    free(floats);
    return 0;
}
