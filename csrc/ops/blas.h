/* SPDX-License-Identifier: Apache-2.0 */
/* OpenBLAS's sgemm, called from the pool's threads (BLAS itself stays single-threaded). */
#ifndef GEMMA4_OPS_BLAS_H
#define GEMMA4_OPS_BLAS_H

#include <stdbool.h>
#include <stddef.h>

/* Whether this build has OpenBLAS. */
bool g4_has_blas(void);

/* Sets BLAS to one thread. Models in `fast` call it before any thread computes. */
void g4_blas_init(void);

/* out = x * w^T: x [m, k], w [n, k], out [m, n]. */
void g4_blas_matmul(const float *x, size_t x_stride, int m, const float *w, size_t w_stride, int n, int k, float *out,
                    size_t out_stride);

/* Version and kernels of the OpenBLAS in use; "" without it. */
const char *g4_blas_config(void);

#endif
