/* SPDX-License-Identifier: Apache-2.0 */
/* The part of kernels_test about ops/linear.h. Whichever method an instruction set, a type and a number of rows select,
 * the output equals the matmul of x and the weights within that method's rounding, with any number of threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ops/blas.h"
#include "ops/linear.h"
#include "tests/kernels_test.h"

enum { K = 768, W_STRIDE = K + 256, N_JOBS = 5, MOST_ROWS = 70 };

/* Two linear layers of one x, one of another x with few rows, one without rows (an expert with no tokens), and one
 * of the first x with another number of rows. */
typedef struct {
    g4_linear_job jobs[N_JOBS];
    float *x[2], *out[N_JOBS];
    void *w[N_JOBS];
} test_jobs;

static const int columns[N_JOBS] = {70, 17, 33, 9, 21};

static test_jobs jobs_new(g4_dtype dtype, int m)
{
    test_jobs t;
    for (int i = 0; i < 2; i++)
        t.x[i] = random_row(NORMAL, (size_t)MOST_ROWS * (K + 5));
    for (int j = 0; j < N_JOBS; j++) {
        const int rows = j < 2 ? m : j == 2 ? 5 : j == 3 ? 0 : 4;
        const size_t n = (size_t)columns[j];
        t.w[j] = random_weights(dtype, NORMAL, n * W_STRIDE);
        t.out[j] = allocate((size_t)MOST_ROWS * (n + 2) * 4);
        t.jobs[j] = (g4_linear_job){t.x[j == 2], K + 5, rows, {t.w[j], dtype, n, K, W_STRIDE, (g4_op)(G4_OP_QKV + j)},
                                    t.out[j],    n + 2};
    }
    return t;
}

static void jobs_free(test_jobs *t)
{
    free(t->x[0]), free(t->x[1]);
    for (int j = 0; j < N_JOBS; j++)
        free(t->w[j]), free(t->out[j]);
}

typedef enum { EXACT, HIGH, FAST } precision;

static const char *const names[] = {"linear layers, exact", "linear layers, high", "linear layers, fast"};

static g4_exec exec_new(const g4_kernels *t, precision p, int n_threads, g4_error *err)
{
    return (g4_exec){.kernels = t,
                     .fast = p == FAST,
                     .high = p == HIGH,
                     .pool = g4_pool_new(n_threads),
                     .arena = g4_arena_new(),
                     .err = err};
}

static void exec_free(g4_exec *exec)
{
    g4_pool_free(exec->pool);
    g4_arena_free(exec->arena);
}

/* Allowed error of a sum against float64: float32's rounding; in `fast` x as int8 (half of 1 / 127 of the largest,
 * which is 1 here), or x and weights as bf16 (2^-9 of each product, twice). */
static bool is_near(const g4_linear_job *job, const float *w, int row, int column, precision p)
{
    enum { OF_HIGH = 16 }; /* rounds like a random walk; the least piece of x left out would be seen */
    const float *x = job->x + (size_t)row * job->x_stride;
    double exact = 0, products = 0, weights = 0;
    for (int l = 0; l < K; l++) {
        exact += (double)x[l] * (double)w[l];
        products += fabs((double)x[l] * (double)w[l]);
        weights += fabs((double)w[l]);
    }
    const double bytes = g4_is_quantised(job->w.dtype) ? weights / 253 : 0;
    const double bf16 = job->w.dtype == G4_BF16 || g4_is_quantised(job->w.dtype) ? products * 0x1.01p-8 : 0;
    const double rounding = products * (p == HIGH ? OF_HIGH : K + 8) * 0x1p-24,
                 got = job->out[(size_t)row * job->out_stride + (size_t)column];
    return fabs(got - exact) <= rounding + (p == FAST ? fmax(bytes, bf16) : 0);
}

static bool all_near(const g4_linear_job *job, precision p)
{
    float w[K];
    bool good = true;
    for (int j = 0; j < (int)job->w.n_rows; j++) {
        g4_widen_for(scalar, job->w.dtype)(w, g4_matrix_row(&job->w, (size_t)j), K);
        for (int i = 0; i < job->m; i += 3)
            good &= is_near(job, w, i, j, p);
    }
    return good;
}

static bool wants_tiles(const g4_kernels *t, precision p, g4_dtype dtype, int m)
{
    const bool amx = t->isa == G4_ISA_AMX;
    if (p != FAST)
        return p == HIGH && amx && dtype == G4_BF16;
    return t->matmul_tiles && m >= (amx ? 5 : 32) && (dtype == G4_BF16 || (amx && g4_is_quantised(dtype)));
}

static void check_linear(const g4_kernels *t, g4_dtype dtype, int m, precision p)
{
    test_jobs layers = jobs_new(dtype, m);
    float *first = NULL;
    const size_t n_out = (size_t)MOST_ROWS * (size_t)(columns[0] + 2);
    for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
        g4_error err;
        g4_profile profile = {0};
        g4_exec exec = exec_new(t, p, n_threads, &err);
        exec.profile = &profile;
        memset(layers.out[0], 0, n_out * 4);
        bool good = g4_linear_jobs(&exec, layers.jobs, N_JOBS) == G4_OK;
        for (int j = 0; j < N_JOBS; j++)
            good &= all_near(&layers.jobs[j], p);
        check(good, t, names[p], g4_dtype_name(dtype), m, n_threads, K);
        check((profile.ops[G4_OP_QKV].bf16_work > 0) == wants_tiles(t, p, dtype, m), t, "work of linear layers",
              g4_dtype_name(dtype), m, n_threads, K);
        if (first)
            check(same(first, layers.out[0], n_out), t, "linear layers, threads", g4_dtype_name(dtype), m, n_threads,
                  K);
        else {
            first = allocate(n_out * 4);
            memcpy(first, layers.out[0], n_out * 4);
        }
        exec_free(&exec);
    }
    free(first);
    jobs_free(&layers);
}

/* In `high`, by tiles, a row's bits are those of the row alone: with any number of others, inputs and threads. */
static void check_alone(const g4_kernels *t, int m, int k)
{
    enum { N = 45 };
    float *x = random_row(NORMAL, (size_t)(m * k)), *together = allocate((size_t)(m * N) * 4), alone[N];
    void *w = random_weights(G4_BF16, NORMAL, (size_t)(N * k));
    const g4_matrix matrix = {w, G4_BF16, N, (size_t)k, (size_t)k, G4_OP_QKV};
    bool good = true;
    for (int n_threads = 1; n_threads <= 2; n_threads++) {
        g4_error err;
        g4_exec exec = exec_new(t, HIGH, n_threads, &err);
        good &= g4_linear(&exec, x, m, &matrix, together) == G4_OK;
        for (int i = 0; i < m; i++)
            good &= g4_linear(&exec, x + i * k, 1, &matrix, alone) == G4_OK && same(alone, together + i * N, N);
        exec_free(&exec);
    }
    check(good, t, "rows of high", "bf16", m, N, k);
    free(x), free(together), free(w);
}

/* The tables' bf16 kernels where AMX is, and as if it were. */
static void test_high(const g4_kernels *t)
{
    static const g4_dtype dtypes[] = {G4_F32, G4_BF16, G4_Q4_0};
    static const int rows[] = {1, 2, 16, 17, 33, MOST_ROWS}, inputs[] = {1, 100, 768, 1600, 3500};
    g4_kernels with_amx = *t;
    if (!t->matmul_tiles)
        return;
    with_amx.isa = G4_ISA_AMX;
    for (int r = 0; r < 6; r++) {
        for (int d = 0; d < 3; d++)
            check_linear(&with_amx, dtypes[d], rows[r], HIGH);
        for (int k = 0; k < 5; k++)
            check_alone(&with_amx, rows[r], inputs[k]);
    }
}

void test_linear(void)
{
    static const g4_dtype dtypes[] = {G4_F32, G4_F16, G4_BF16, G4_Q8_0, G4_Q4_0, G4_Q4_K};
    static const int rows[] = {2, 9, 33, MOST_ROWS};
    g4_blas_init();
    for (int t = 0; t < n_tables; t++) {
        for (int d = 0; d < 6; d++)
            for (int r = 0; r < 4; r++)
                for (precision p = EXACT; p <= FAST; p++)
                    check_linear(tables[t], dtypes[d], rows[r], p);
        test_high(tables[t]);
    }
}
