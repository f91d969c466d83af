/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/limits.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "base/pool.h"
#include "kernels/kernels.h"

/* Threads claim tasks dynamically, so a delayed thread does not delay the measurement. A task is a spin of 30
 * microseconds on AVX2, or a slice of 1 MiB. */
enum { SPIN_ROUNDS = 1 << 14, SPINS_PER_THREAD = 256, READ_SLICE = 1 << 18, MAX_SUMS = 24 * 16 };
enum { TILE_ROUNDS = 64, TILE_VALUES = 16 * G4_TILE }; /* a round is half a million multiply-adds */

typedef struct {
    const g4_kernels *kernels;
    g4_spin kind;
    const float *x;
    size_t n;
    const uint16_t *tiles; /* [TILE_VALUES] for bf16 matmuls */
    double *results;       /* [tasks] operations done, or the sum of a slice */
} limit_task;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void spin(void *context, int task, int worker)
{
    const limit_task *t = context;
    float sums[MAX_SUMS];
    int8_t bytes[512];
    int16_t shorts[512];
    float products[4 * G4_TILE_ROWS * G4_TILE_ROWS];
    int32_t sum;
    (void)worker;
    for (int i = 0; i < MAX_SUMS; i++)
        sums[i] = (float)i;
    memset(bytes, 1, sizeof bytes);
    for (int i = 0; i < 512; i++)
        shorts[i] = 1;
    switch (t->kind) {
    case G4_SPIN_F32: t->results[task] = t->kernels->spin_f32(sums, SPIN_ROUNDS); break;
    case G4_SPIN_INT8: t->results[task] = t->kernels->spin_int8(bytes, &sum, SPIN_ROUNDS); break;
    case G4_SPIN_BF16: t->results[task] = t->kernels->spin_bf16(t->tiles, products, TILE_ROUNDS); break;
    default: t->results[task] = t->kernels->spin_int16(shorts, &sum, SPIN_ROUNDS);
    }
}

static void read_slice(void *context, int task, int worker)
{
    const limit_task *t = context;
    const size_t first = (size_t)task * READ_SLICE, left = t->n - first;
    (void)worker;
    t->results[task] = (double)t->kernels->read_sum(t->x + first, left < READ_SLICE ? left : READ_SLICE);
}

/* Seconds for the tasks, and the sum of their results. Uses a pool of its own, whose threads are woken by a first round
 * that is not counted. */
static g4_status measure(limit_task *t, int n_threads, int n_tasks, g4_task_fn fn, double *seconds, double *total,
                         g4_error *err)
{
    g4_pool *pool = g4_pool_new(n_threads);
    t->results = calloc((size_t)n_tasks, sizeof *t->results);
    g4_status status = pool && t->results ? G4_OK : g4_fail_nomem(err, (size_t)n_tasks * sizeof *t->results);
    *total = 0;
    if (status == G4_OK) {
        (void)g4_pool_run(pool, n_threads < n_tasks ? n_threads : n_tasks, false, fn, t, NULL, NULL);
        const double start = now();
        (void)g4_pool_run(pool, n_tasks, false, fn, t, NULL, NULL);
        *seconds = now() - start;
        for (int i = 0; i < n_tasks; i++)
            *total += t->results[i];
    }
    g4_pool_free(pool);
    free(t->results);
    return status;
}

static g4_status check_threads(int *n_threads, g4_error *err)
{
    if (*n_threads < 0 || *n_threads > 1024)
        return g4_fail(err, G4_EVALUE, "threads = %d: expected 1 to 1024, or 0 for the default", *n_threads);
    *n_threads = *n_threads ? *n_threads : g4_cpu_count();
    return G4_OK;
}

/* Ones in bf16, read by every task. The caller frees the array. */
static uint16_t *ones_in_tiles(void)
{
    uint16_t *tiles = malloc(TILE_VALUES * sizeof *tiles);
    for (int i = 0; tiles && i < TILE_VALUES; i++)
        tiles[i] = g4_f32_to_bf16(1.0f);
    return tiles;
}

g4_status g4_arithmetic_rate(g4_spin kind, int n_threads, double *per_second, g4_error *err)
{
    limit_task t = {.kind = kind};
    double seconds, operations;
    G4_TRY(check_threads(&n_threads, err));
    G4_TRY(g4_kernels_select(&t.kernels, err));
    *per_second = 0;
    if (kind == G4_SPIN_BF16 && !t.kernels->spin_bf16)
        return G4_OK;
    uint16_t *tiles = ones_in_tiles();
    if (!tiles)
        return g4_fail_nomem(err, TILE_VALUES * sizeof *tiles);
    t.tiles = tiles;
    g4_status status = measure(&t, n_threads, n_threads * SPINS_PER_THREAD, spin, &seconds, &operations, err);
    free(tiles);
    G4_TRY(status);
    *per_second = operations / seconds;
    return G4_OK;
}

g4_status g4_read_rate(const float *x, size_t n, int n_threads, double *per_second, double *sum, g4_error *err)
{
    limit_task t = {.x = x, .n = n};
    const size_t n_slices = (n + READ_SLICE - 1) / READ_SLICE;
    double seconds;
    G4_TRY(check_threads(&n_threads, err));
    G4_TRY(g4_kernels_select(&t.kernels, err));
    if (n_slices < 1 || n_slices > 1 << 20)
        return g4_fail(err, G4_EVALUE, "%zu floats to read: expected 1 to 2^38", n);
    G4_TRY(measure(&t, n_threads, (int)n_slices, read_slice, &seconds, sum, err));
    *per_second = (double)n * (double)sizeof *x / seconds;
    return G4_OK;
}
