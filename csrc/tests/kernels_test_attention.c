/* SPDX-License-Identifier: Apache-2.0 */
/* The part of kernels_test about ops/attention/attention.h. On every instruction set, exact or fast, z equals float64's
 * result for the same queries, keys and values within the rounding. At once or in three steps, with one thread or
 * three, it has the same bits. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ops/attention/attention.h"
#include "tests/kernels_test.h"

/* Rows of a prompt at positions [begin, begin + n_rows) in a ring of slots. */
typedef struct {
    int n_rows, begin, n_heads, n_kv_heads, head_dim, window, n_slots;
    int ends;      /* 0: none; n: rows of a block of n attend up to the block's end; -n: each row attends to n ahead */
    bool joined;   /* keys derive from values, except the pairs that RoPE rotates */
    float softcap; /* softcap of the scores; 0: none */
} shape;

static const shape shapes[] = {{40, 0, 4, 1, 64, 0, 64, 0, false, 0},      {33, 70, 2, 2, 32, 0, 128, 0, false, 0},
                               {50, 100, 8, 1, 64, 17, 66, 0, false, 0},   {70, 0, 4, 2, 96, 40, 128, 7, false, 0},
                               {35, 5, 3, 3, 32, 8, 45, 7, false, 0},      {64, 31, 2, 1, 128, 0, 95, 0, true, 0},
                               {40, 300, 1, 1, 512, 0, 512, 0, false, 0},  {40, 0, 4, 1, 64, 0, 64, 0, false, 5},
                               {70, 0, 4, 2, 96, 40, 128, 7, false, 2},    {64, 31, 2, 1, 128, 0, 95, 0, true, 3},
                               {70, 20, 4, 2, 32, 17, 128, -16, false, 0}, {70, 0, 2, 2, 64, 0, 128, -70, false, 4}};

enum { N_SHAPES = sizeof shapes / sizeof *shapes, N_ROTATED = 8 };

typedef struct {
    g4_attention a;
    float *q, *z, *gain, *scores;
    void *k, *v;
    int32_t *positions, *ends;
} test_run;

static void *narrow_row(const float *row, g4_dtype dtype, size_t n)
{
    void *out = allocate(g4_dtype_bytes(dtype, n));
    g4_narrow_for(scalar, dtype)(out, row, (int)n);
    return out;
}

static test_run run_new(const shape *s, g4_dtype dtype)
{
    test_run t = {.a = {.n_rows = s->n_rows,
                        .n_deciding = s->n_rows,
                        .n_heads = s->n_heads,
                        .n_kv_heads = s->n_kv_heads,
                        .head_dim = s->head_dim,
                        .window = s->window,
                        .softcap = s->softcap,
                        .n_keys = s->begin + s->n_rows,
                        .bf16 = true}};
    const size_t h = (size_t)s->head_dim, width = (size_t)s->n_kv_heads * h, n = (size_t)s->n_slots;
    const size_t k_width = s->joined ? (size_t)(s->n_kv_heads * 2 * N_ROTATED) : width;
    const size_t n_q = (size_t)s->n_rows * (size_t)s->n_heads * h;
    float *k = random_row(NORMAL, n * k_width), *v = random_row(NORMAL, n * width);
    t.q = random_row(NORMAL, n_q), t.z = allocate(n_q * 4), t.gain = random_row(NORMAL, h);
    t.scores = allocate((size_t)s->n_heads * (size_t)s->n_rows * (size_t)t.a.n_keys * 4);
    t.k = narrow_row(k, dtype, n * k_width), t.v = narrow_row(v, dtype, n * width);
    t.positions = allocate((size_t)s->n_rows * 4), t.ends = allocate((size_t)s->n_rows * 4);
    for (int i = 0; i < s->n_rows; i++) {
        const int end = s->ends > 0 ? (i / s->ends + 1) * s->ends : i + 1 - s->ends;
        t.positions[i] = s->begin + i, t.ends[i] = s->begin + (end < s->n_rows ? end : s->n_rows);
    }
    t.a.kv = (g4_kv_view){.k = t.k, .v = t.v, .dtype = dtype, .stride = width, .n_slots = s->n_slots};
    t.a.kv.first = t.a.n_keys > s->n_slots ? t.a.n_keys - s->n_slots : 0;
    if (s->joined)
        t.a.kv.gain = t.gain, t.a.kv.n_rotated = N_ROTATED;
    t.a.q = t.q, t.a.z = t.z, t.a.positions = t.positions, t.a.ends = s->ends ? t.ends : NULL;
    free(k), free(v);
    return t;
}

static void run_free(test_run *t)
{
    free(t->q), free(t->z), free(t->gain), free(t->scores), free(t->k), free(t->v), free(t->positions), free(t->ends);
}

static float *read_head(const g4_attention *a, bool values, int kv_head)
{
    float *rows = allocate((size_t)a->n_keys * (size_t)a->head_dim * 4);
    g4_kv_view kv = a->kv;
    if (values)
        kv.k = kv.v, kv.gain = NULL;
    g4_kv_read_keys(scalar, &kv, kv_head, a->head_dim, kv.first, a->n_keys - kv.first,
                    rows + (size_t)kv.first * (size_t)a->head_dim);
    return rows;
}

/* Allowed error of z against float64: float32's rounding, or bf16's. A score that is wrong by d makes a weight wrong by
 * the factor e^d; each of the h products of a score is wrong by 2^-8 at most. */
static bool row_is_near(const g4_attention *a, int row, int head, const float *keys, const float *values, bool bf16)
{
    const int h = a->head_dim, first = g4_first_key(a, row), end = g4_end_key(a, row);
    const size_t at = ((size_t)row * (size_t)a->n_heads + (size_t)head) * (size_t)h;
    const double unit = bf16 ? 0x1.02p-8 : (h + 8) * 0x1p-24;
    double *z = allocate((size_t)h * 8), *weights = allocate((size_t)a->n_keys * 8), sum = 0, worst = 0,
           most = -INFINITY;
    bool good = true;
    for (int j = first; j < end; j++) {
        double size = 0;
        for (int l = 0; l < h; l++) {
            const double product = (double)a->q[at + (size_t)l] * (double)keys[j * h + l];
            weights[j] += product, size += fabs(product);
        }
        if (a->softcap != 0)
            weights[j] = (double)a->softcap * tanh(weights[j] / (double)a->softcap);
        most = fmax(most, weights[j]), worst = fmax(worst, size);
    }
    for (int j = first; j < end; j++)
        sum += weights[j] = exp(weights[j] - most);
    for (int j = first; j < end; j++)
        for (int l = 0; l < h; l++)
            z[l] += weights[j] / sum * (double)values[j * h + l];
    for (int l = 0; l < h; l++)
        good &= fabs(z[l] - a->z[at + (size_t)l]) <= 2 * expm1(worst * unit) + 2 * unit + (end - first) * 0x1p-22;
    free(z), free(weights);
    return good;
}

static bool z_is_near(const g4_attention *a, bool bf16)
{
    bool good = true;
    for (int head = 0; head < a->n_heads; head++) {
        float *keys = read_head(a, false, head / g4_head_group(a)),
              *values = read_head(a, true, head / g4_head_group(a));
        for (int row = 0; row < a->n_rows; row++)
            good &= row_is_near(a, row, head, keys, values, bf16);
        free(keys), free(values);
    }
    return good;
}

static g4_exec exec_new(const g4_kernels *t, bool fast, int n_threads, g4_profile *profile, g4_error *err)
{
    g4_exec exec = {.kernels = t, .fast = fast, .profile = profile, .err = err};
    exec.pool = g4_pool_new(n_threads);
    exec.arena = g4_arena_new();
    return exec;
}

static void exec_free(g4_exec *exec)
{
    g4_pool_free(exec->pool);
    g4_arena_free(exec->arena);
}

/* z of the run in a new array: computed at once, or in steps. */
static float *attend(const g4_kernels *t, test_run *run, bool fast, bool steps, int n_threads, double *bf16_work)
{
    g4_error err;
    g4_profile profile = {0};
    g4_exec exec = exec_new(t, fast, n_threads, &profile, &err);
    const size_t n = (size_t)run->a.n_rows * (size_t)run->a.n_heads * (size_t)run->a.head_dim;
    for (size_t i = 0; i < n; i++)
        run->z[i] = NAN;
    bool good = true;
    if (steps)
        good = g4_attention_scores(&exec, &run->a, run->scores) == G4_OK &&
               g4_attention_pattern(&exec, &run->a, run->scores) == G4_OK &&
               g4_attention_mix(&exec, &run->a, run->scores) == G4_OK;
    else
        good = g4_attend(&exec, &run->a, 1) == G4_OK;
    *bf16_work = profile.ops[G4_OP_ATTEND_LOCAL].bf16_work + profile.ops[G4_OP_ATTEND_GLOBAL].bf16_work;
    exec_free(&exec);
    float *z = allocate(n * 4);
    memcpy(z, run->z, n * 4);
    check(good, t, "attention's status", g4_dtype_name(run->a.kv.dtype), run->a.n_rows, run->a.n_keys, run->a.head_dim);
    return z;
}

static void check_attention(const g4_kernels *t, const shape *s, g4_dtype dtype, bool fast)
{
    test_run run = run_new(s, dtype);
    const size_t n = (size_t)run.a.n_rows * (size_t)run.a.n_heads * (size_t)run.a.head_dim;
    const bool bf16 = fast && t->matmul_by_tiles;
    const char *name = g4_dtype_name(dtype);
    double work, none;
    float *z = attend(t, &run, fast, false, 1, &work), *threads = attend(t, &run, fast, false, 3, &none);
    check(z_is_near(&run.a, bf16), t, fast ? "attention, fast" : "attention", name, s->n_rows, run.a.n_keys,
          s->head_dim);
    check((work > 0) == bf16, t, "attention's work", name, s->n_rows, run.a.n_keys, s->head_dim);
    check(same(z, threads, n), t, "attention, threads", name, s->n_rows, run.a.n_keys, s->head_dim);
    float *steps = attend(t, &run, fast, true, 3, &none);
    check(same(z, steps, n), t, "attention in steps", name, s->n_rows, run.a.n_keys, s->head_dim);
    free(z), free(threads), free(steps);
    run_free(&run);
}

/* A non-finite value reaches only the queries that attend to it. All other queries get the bits of float32: such a run
 * is not rounded. */
static void check_infinite_value(const g4_kernels *t, bool steps)
{
    test_run run = run_new(&shapes[0], G4_F32);
    const int h = run.a.head_dim, seen_from = 21;
    const size_t width = (size_t)(run.a.n_heads * h);
    double work;
    ((float *)run.v)[seen_from * h + 3] = INFINITY;
    float *z = attend(t, &run, true, steps, 3, &work), *exact = attend(t, &run, false, false, 1, &work);
    bool good = same(z, exact, (size_t)run.a.n_rows * width);
    for (int row = 0; row < run.a.n_rows; row++)
        for (int i = 0; i < run.a.n_heads; i++)
            good &= isfinite(z[(size_t)row * width + (size_t)(i * h + 3)]) == (row < seen_from);
    check(good, t, "attention, infinite value", "", run.a.n_rows, run.a.n_keys, h);
    free(z), free(exact);
    run_free(&run);
}

/* An edited pattern may look ahead. Rows without any weight are zero. A position overwritten in the ring is an
 * error. */
static void check_edited_pattern(const g4_kernels *t)
{
    test_run run = run_new(&shapes[2], G4_BF16);
    g4_error err;
    g4_exec exec = exec_new(t, true, 3, NULL, &err);
    const int h = run.a.head_dim, n_keys = run.a.n_keys, last = n_keys - 1;
    bool good = run.a.kv.first > 0;
    for (int i = 0; i < run.a.n_heads; i++)
        run.scores[(size_t)i * (size_t)(run.a.n_rows * n_keys) + (size_t)last] = 2; /* the first row of each head */
    good &= g4_attention_mix(&exec, &run.a, run.scores) == G4_OK;
    float *values = read_head(&run.a, true, 0);
    for (int i = 0; i < run.a.n_rows * run.a.n_heads * h; i++)
        good &= run.z[i] == (i < run.a.n_heads * h ? 2 * values[last * h + i % h] : 0);
    run.scores[run.a.kv.first - 1] = 1;
    good &= g4_attention_mix(&exec, &run.a, run.scores) == G4_EVALUE;
    check(good, t, "attention, edited pattern", "", run.a.n_rows, n_keys, h);
    free(values);
    exec_free(&exec);
    run_free(&run);
}

void test_attention(void)
{
    static const g4_dtype dtypes[] = {G4_F32, G4_F16, G4_BF16, G4_Q8_0};
    for (int t = 0; t < n_tables; t++) {
        for (int s = 0; s < N_SHAPES; s++)
            for (int d = 0; d < 4; d++)
                for (int fast = 0; fast < 2; fast++)
                    if (dtypes[d] != G4_Q8_0 || !shapes[s].joined)
                        check_attention(tables[t], &shapes[s], dtypes[d], fast);
        check_infinite_value(tables[t], false);
        check_infinite_value(tables[t], true);
        check_edited_pattern(tables[t]);
    }
}
