/* SPDX-License-Identifier: Apache-2.0 */
/* Every kernel of every instruction set that runs here against the scalar one, bit for bit, and a matmul's rows against
 * the same rows alone. tests/reference/test_kernels.py does this and also compares with float64. This program serves
 * where there is no Python: cross-compiled, under an emulator.
 *
 *   kernels_test [ISA…]   exit status 0: all passed, and those instruction sets were among the tested ones
 *   kernels_test --time   no test: the time of each kernel on each level, next to the scalar one's */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/kernels_test.h"

const g4_kernels *scalar, *tables[G4_N_ISAS];
int n_tables;
static int n_passed, n_failed;

void check(bool good, const g4_kernels *t, const char *what, const char *dtype, int m, int n, int k)
{
    n_passed += good;
    n_failed += !good;
    if (!good)
        printf("failed: %s %s %s m=%d n=%d k=%d\n", g4_isa_name(t->isa), what, dtype, m, n, k);
}

bool same(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (g4_f32_bits(a[i]) != g4_f32_bits(b[i]) && !(isnan(a[i]) && isnan(b[i])))
            return false;
    return true;
}

void *allocate(size_t n_bytes)
{
    void *data = calloc(n_bytes ? n_bytes : 1, 1);
    if (!data) {
        printf("no memory\n");
        exit(2);
    }
    return data;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static uint32_t random_bits(void)
{
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static float random_value(int kind)
{
    const float x = (float)(random_bits() >> 8) / (float)(1 << 23) - 1.0f;
    const uint32_t choice = random_bits();
    switch (kind) {
    case WIDE: return ldexpf(x, (int)(choice % 41) - 20);
    case TINY: return x * 1e-38f;
    case ZEROS: return choice % 2 ? copysignf(0, x) : x;
    case NONFINITE: return choice % 97 == 0 ? INFINITY : choice % 97 == 1 ? -INFINITY : choice % 97 == 2 ? NAN : x;
    default: return x;
    }
}

float *random_row(int kind, size_t n)
{
    float *row = allocate(n * sizeof *row);
    for (size_t i = 0; i < n; i++)
        row[i] = random_value(kind);
    return row;
}

const int factors_of[G4_N_DTYPES][2] = {
    [G4_Q4_1] = {0, 2},     [G4_Q5_1] = {0, 2}, [G4_Q2_K] = {80, 82}, [G4_Q3_K] = {108, 108},
    [G4_Q6_K] = {208, 208}, [G4_Q4_K] = {0, 2}, [G4_Q5_K] = {0, 2},
};

/* Random bytes cover all integers. The factors are about 0.01; otherwise infinities would hide everything else. */
static void random_block(g4_dtype dtype, uint8_t *block)
{
    const size_t size = g4_block_bytes(dtype);
    for (size_t i = 0; i < size; i++)
        block[i] = (uint8_t)random_bits();
    if (dtype == G4_MXFP4) {
        block[0] = (uint8_t)(110 + random_bits() % 20);
        return;
    }
    for (int f = 0; f < 2; f++) {
        const uint16_t d = g4_f32_to_f16(0.02f * random_value(NORMAL));
        memcpy(block + factors_of[dtype][f], &d, 2);
    }
}

void *random_weights(g4_dtype dtype, int kind, size_t n)
{
    const size_t n_blocks = n / g4_block_size(dtype), size = g4_block_bytes(dtype);
    uint8_t *weights = allocate(n_blocks * size);
    for (size_t i = 0; i < n_blocks; i++) {
        const float x = random_value(kind);
        const uint16_t half = dtype == G4_F16 ? g4_f32_to_f16(x) : g4_f32_to_bf16(x);
        if (g4_is_quantised(dtype))
            random_block(dtype, weights + i * size);
        else
            memcpy(weights + i * size, dtype == G4_F32 ? (const void *)&x : (const void *)&half, size);
    }
    return weights;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

const char *const row_names[N_ROW_KERNELS] = {"sum_squares",
                                              "scale_mul",
                                              "scale_mul with a gain",
                                              "add",
                                              "mul",
                                              "axpy",
                                              "gelu",
                                              "glu",
                                              "clamp",
                                              "layer_norm",
                                              "layer_norm with a bias",
                                              "mul_add",
                                              "softmax",
                                              "softcap",
                                              "rope",
                                              "block_maxima",
                                              "list_within",
                                              "block_sums",
                                              "sum_exp",
                                              "read_sum"};

/* A float64 as float32, and what that leaves, if there is room. */
static void put_double(double sum, float *x, int at, int rest_at, int n)
{
    x[at] = (float)sum;
    if (rest_at < n)
        x[rest_at] = (float)(sum - (double)x[at]);
}

/* Kernels of sampling: their results replace x. */
static void run_pick(const g4_kernels *t, int kernel, float *x, int n)
{
    enum { BLOCK = 48, MOST = 4096 };
    static int32_t ids[MOST];
    static double sums[MOST];
    const int blocks = (n + BLOCK - 1) / BLOCK;
    if (kernel == BLOCK_MAXIMA) {
        t->block_maxima(x, n, BLOCK, x);
    } else if (kernel == SUM_EXP) {
        put_double(t->sum_exp(x, 1, n), x, 0, 1, n);
    } else if (kernel == BLOCK_SUMS) {
        t->block_sums(x, n, BLOCK, -0.25f, sums);
        for (int b = 0; b < blocks; b++)
            put_double(sums[b], x, b, blocks + b, n);
    } else {
        const int n_ids = t->list_within(x, n, -0.25f, 0.5f, ids);
        for (int i = 0; i < n; i++)
            x[i] = i < n_ids ? (float)ids[i] : -1;
    }
}

void run_row(const g4_kernels *t, int kernel, float *x, const float *y, const float *z, int n)
{
    switch (kernel) {
    case SUM_SQUARES: x[0] = t->sum_squares(x, n); break;
    case SCALE: t->scale_mul(x, x, 0.3f, NULL, n); break;
    case SCALE_GAIN: t->scale_mul(x, x, 0.3f, y, n); break;
    case ADD: t->add(x, x, y, n); break;
    case MUL: t->mul(x, x, y, n); break;
    case AXPY: t->axpy(x, 0.7f, y, n); break;
    case GELU: t->gelu(x, x, n); break;
    case GLU: t->glu(x, x, y, n); break;
    case CLAMP: t->clamp(x, x, -0.5f, 0.25f, n); break;
    case NORM: t->layer_norm(x, x, y, NULL, 1e-6f, n); break;
    case NORM_BIAS: t->layer_norm(x, x, y, z, 1e-6f, n); break;
    case MUL_ADD: t->mul_add(x, y, z, n); break;
    case SOFTMAX: t->softmax(x, n); break;
    case SOFTCAP: t->softcap(x, 0.8f, n); break;
    case ROPE: t->rope(x, y, z, n / 2); break;
    case BLOCK_MAXIMA:
    case LIST_WITHIN:
    case BLOCK_SUMS:
    case SUM_EXP: run_pick(t, kernel, x, n); break;
    default: x[0] = t->read_sum(x, (size_t)n); break;
    }
}

static void check_row(int kernel, int kind, int n)
{
    const size_t n_bytes = (size_t)n * 4;
    float *x = random_row(kind, (size_t)n), *y = random_row(kind == NONFINITE ? NORMAL : kind, (size_t)n);
    float *z = random_row(NORMAL, (size_t)n), *wanted = allocate(n_bytes), *got = allocate(n_bytes);
    memcpy(wanted, x, n_bytes);
    run_row(scalar, kernel, wanted, y, z, n);
    for (int t = 0; t < n_tables; t++) {
        memcpy(got, x, n_bytes);
        run_row(tables[t], kernel, got, y, z, n);
        check(same(got, wanted, (size_t)n), tables[t], row_names[kernel], "", kind, n, 0);
    }
    free(x), free(y), free(z), free(wanted), free(got);
}

/* Covers the whole range of exp and tanh: every 4099th float. */
static void check_every_size(int kernel)
{
    enum { N = 1 << 10 };
    static float x[N], wanted[N], got[N];
    for (uint32_t bits = 0; bits < 0xff000000u; bits += 4099u * N) {
        for (uint32_t i = 0; i < N; i++)
            x[i] = wanted[i] = g4_f32_from_bits(bits + i * 4099u);
        run_row(scalar, kernel, wanted, x, x, N);
        for (int t = 0; t < n_tables; t++) {
            memcpy(got, x, sizeof got);
            run_row(tables[t], kernel, got, x, x, N);
            check(same(got, wanted, N), tables[t], row_names[kernel], "of every size", 0, N, 0);
        }
    }
}

static void test_rows(void)
{
    static const int sizes[] = {1, 2, 15, 16, 17, 33, 64, 100, 1000, 2049};
    for (int kernel = 0; kernel < N_ROW_KERNELS; kernel++)
        for (int kind = 0; kind < N_KINDS; kind++)
            for (int s = 0; s < 10; s++)
                check_row(kernel, kind, sizes[s]);
    check_every_size(GELU);
    check_every_size(SOFTCAP);
}

/* ---- conversions and yardsticks ---------------------------------------------------------------------------------- */

static void check_widen(g4_dtype dtype, const void *in, int n)
{
    float *wanted = allocate((size_t)n * 4), *got = allocate((size_t)n * 4);
    g4_widen_for(scalar, dtype)(wanted, in, n);
    for (int t = 0; t < n_tables; t++) {
        g4_widen_for(tables[t], dtype)(got, in, n);
        check(same(got, wanted, (size_t)n), tables[t], "widen", g4_dtype_name(dtype), 0, n, 0);
    }
    free(wanted), free(got);
}

/* The NaN payload in the scale of a block with a NaN may differ. */
static bool same_narrowed(g4_dtype dtype, const uint8_t *got, const uint8_t *wanted, size_t n_bytes)
{
    const size_t block = g4_block_bytes(dtype);
    for (size_t at = 0; at < n_bytes; at += block) {
        const bool nan = dtype == G4_Q8_0 && isnan(g4_f16_to_f32((uint16_t)(got[at] | got[at + 1] << 8))) &&
                         isnan(g4_f16_to_f32((uint16_t)(wanted[at] | wanted[at + 1] << 8)));
        const size_t skip = nan ? 2 : 0;
        if (memcmp(got + at + skip, wanted + at + skip, block - skip) != 0)
            return false;
    }
    return true;
}

static void check_narrow(g4_dtype dtype, int kind, int n)
{
    const size_t n_bytes = g4_dtype_bytes(dtype, (size_t)n);
    float *x = random_row(kind, (size_t)n);
    uint8_t *wanted = allocate(n_bytes), *got = allocate(n_bytes);
    g4_narrow_for(scalar, dtype)(wanted, x, n);
    for (int t = 0; t < n_tables; t++) {
        g4_narrow_for(tables[t], dtype)(got, x, n);
        check(same_narrowed(dtype, got, wanted, n_bytes), tables[t], "narrow", g4_dtype_name(dtype), kind, n, 0);
    }
    free(x), free(wanted), free(got);
}

/* Whether factors_of has the factors of this type: other bytes as factors make infinities, which hide mistakes. */
static void check_size_of_weights(g4_dtype dtype, const void *rows, int n)
{
    float *values = allocate((size_t)n * 4), largest = 0;
    g4_widen_for(scalar, dtype)(values, rows, n);
    for (int i = 0; i < n; i++)
        largest = isnan(values[i]) ? INFINITY : fmaxf(largest, fabsf(values[i]));
    check(largest < 1000, scalar, "factors_of", g4_dtype_name(dtype), 0, 0, n);
    free(values);
}

static void test_conversions(void)
{
    static uint16_t every[1 << 16];
    for (int i = 0; i < 1 << 16; i++)
        every[i] = (uint16_t)i;
    for (int n = 1 << 16; n > 0; n /= 5) {
        check_widen(G4_F16, every, n);
        check_widen(G4_BF16, every, n);
    }
    for (g4_dtype dtype = G4_F32; dtype < G4_N_DTYPES; dtype++) {
        void *rows = random_weights(dtype, NORMAL, 4096);
        for (int n = 256; n <= 4096; n *= 4)
            check_widen(dtype, rows, n);
        check_size_of_weights(dtype, rows, 4096);
        free(rows);
        for (int kind = 0; g4_narrow_for(scalar, dtype) && kind < N_KINDS; kind++)
            for (int n = 32; n <= 4096; n *= 2)
                check_narrow(dtype, kind, g4_is_quantised(dtype) ? n : n - 3);
    }
}

static void test_yardsticks(void)
{
    int8_t x[512];
    int32_t wanted = 0, got = 0;
    for (int i = 0; i < 512; i++)
        x[i] = (int8_t)(random_bits() % 255 - 127);
    const double n_operations = scalar->spin_int8(x, &wanted, 40);
    for (int t = 0; t < n_tables; t++) {
        float sums[24 * 16] = {0};
        check(tables[t]->spin_int8(x, &got, 40) == n_operations && got == wanted, tables[t], "spin_int8", "", 0, 0, 40);
        check(tables[t]->spin_f32(sums, 40) > 0 && sums[0] > 0.99f && sums[0] <= 1, tables[t], "spin_f32", "", 0, 0,
              40);
        static uint16_t tiles[16 * G4_TILE]; /* all sums are 0; the operation count matches */
        float products[4 * 256];
        if (tables[t]->spin_bf16)
            check(tables[t]->spin_bf16(tiles, products, 3) == 3 * 2.0 * 16 * 32 * 32 * 32 && products[1023] == 0,
                  tables[t], "spin_bf16", "", 0, 0, 3);
    }
}

int main(int n_args, char **args)
{
    int n_missing = 0;
    for (int isa = 0; isa < G4_N_ISAS; isa++)
        if (g4_kernels_for((g4_isa)isa))
            tables[n_tables++] = g4_kernels_for((g4_isa)isa);
    scalar = tables[0];
    if (n_args == 2 && strcmp(args[1], "--time") == 0) {
        report_times();
        return 0;
    }
    for (int i = 1; i < n_args; i++) {
        const g4_isa isa = g4_isa_parse(args[i]);
        if (isa == G4_N_ISAS || !g4_kernels_for(isa)) {
            printf("not here: %s\n", args[i]);
            n_missing++;
        }
    }
    test_products();
    test_sums_and_panels();
    test_tiles();
    test_linear();
    test_attention();
    test_rows();
    test_conversions();
    test_yardsticks();
    for (int t = 0; t < n_tables; t++)
        printf("%s%s", t ? ", " : "", g4_isa_name(tables[t]->isa));
    printf(": %d passed, %d failed\n", n_passed, n_failed);
    return n_failed || n_missing;
}
