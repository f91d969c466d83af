/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the parts of kernels_test. */
#ifndef GEMMA4_TESTS_KERNELS_TEST_H
#define GEMMA4_TESTS_KERNELS_TEST_H

#include "kernels/kernels.h"

/* The tables of all instruction sets that run here, the scalar one first. */
extern const g4_kernels *scalar, *tables[G4_N_ISAS];
extern int n_tables;

/* Counts a check, and prints it if it failed. */
void check(bool good, const g4_kernels *t, const char *what, const char *dtype, int m, int n, int k);

/* The same bits; NaN payloads may differ. */
bool same(const float *a, const float *b, size_t n);

/* Zeros, of exactly that size, so that sanitizers detect reads past it. */
void *allocate(size_t n_bytes);

/* Random values: of one size, of sizes 2^-20 to 2^20, around subnormals, half signed zeros, with infinities and NaN. */
enum { NORMAL, WIDE, TINY, ZEROS, NONFINITE, N_KINDS };
float *random_row(int kind, size_t n);
void *random_weights(g4_dtype dtype, int kind, size_t n);

/* Where a block stores its factors: f16, except for MXFP4 an exponent. */
extern const int factors_of[G4_N_DTYPES][2];

/* Kernels of one row. x is changed, y and z are read. */
enum {
    SUM_SQUARES,
    SCALE,
    SCALE_GAIN,
    ADD,
    MUL,
    AXPY,
    GELU,
    GLU,
    CLAMP,
    NORM,
    NORM_BIAS,
    MUL_ADD,
    SOFTMAX,
    SOFTCAP,
    ROPE,
    BLOCK_MAXIMA,
    LIST_WITHIN,
    BLOCK_SUMS,
    SUM_EXP,
    READ_SUM,
    N_ROW_KERNELS
};
extern const char *const row_names[N_ROW_KERNELS];
void run_row(const g4_kernels *t, int kernel, float *x, const float *y, const float *z, int n);

/* Room for m rows of k inputs as int8. */
g4_int8_rows int8_rows_new(int m, int k);
void int8_rows_free(g4_int8_rows rows);

void report_times(void);
void test_products(void);
void test_sums_and_panels(void);
void test_tiles(void);
void test_linear(void);
void test_attention(void);

#endif
