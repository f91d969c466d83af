/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers out = x * w^T. Several jobs share one parallel region (q, k, v; gate, up; all experts of a layer). */
#ifndef GEMMA4_OPS_LINEAR_H
#define GEMMA4_OPS_LINEAR_H

#include "ops/exec.h"

typedef struct {
    const float *x; /* [m, w.n_cols] */
    size_t x_stride;
    int m;
    g4_matrix w;
    float *out; /* [m, w.n_rows] */
    size_t out_stride;
} g4_linear_job;

/* The fewest rows of x that `fast` computes by the method of 32 rows: fewer could give other bits. 1 if the number of rows
 * (up to 32) changes nothing. */
int g4_linear_least_rows(const g4_exec *exec, const g4_matrix *w);

g4_status g4_linear_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs);

/* One linear layer between dense arrays. */
g4_status g4_linear(g4_exec *exec, const float *x, int m, const g4_matrix *w, float *out);

#endif
