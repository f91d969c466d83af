/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/blas.h"

#if G4_BLAS
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define BLAS(name) CONCAT(G4_BLAS_PREFIX, name)

/* Declared here, because the system's cblas.h and the wheel's name these functions differently. */
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
extern void BLAS(cblas_sgemm)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a,
                              int lda, const float *b, int ldb, float beta, float *c, int ldc);
extern void BLAS(openblas_set_num_threads)(int n);
extern char *BLAS(openblas_get_config)(void);

bool g4_has_blas(void)
{
    return true;
}

void g4_blas_init(void)
{
    BLAS(openblas_set_num_threads)(1);
}

void g4_blas_matmul(const float *x, size_t x_stride, int m, const float *w, size_t w_stride, int n, int k, float *out,
                    size_t out_stride)
{
    BLAS(cblas_sgemm)
    (ROW_MAJOR, NO_TRANS, TRANS, m, n, k, 1.0f, x, (int)x_stride, w, (int)w_stride, 0.0f, out, (int)out_stride);
}

const char *g4_blas_config(void)
{
    return BLAS(openblas_get_config)();
}
#else
bool g4_has_blas(void)
{
    return false;
}

void g4_blas_init(void)
{
}

void g4_blas_matmul(const float *x, size_t x_stride, int m, const float *w, size_t w_stride, int n, int k, float *out,
                    size_t out_stride)
{
    (void)x, (void)x_stride, (void)m, (void)w, (void)w_stride, (void)n, (void)k, (void)out, (void)out_stride;
}

const char *g4_blas_config(void)
{
    return "";
}
#endif
