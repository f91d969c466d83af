/* SPDX-License-Identifier: Apache-2.0 */
/* Sampling: the largest logits of rows, the nucleus, and a draw by weights. Sums are float64. */
#ifndef GEMMA4_OPS_PICK_H
#define GEMMA4_OPS_PICK_H

#include "base/pick.h"
#include "ops/exec.h"

/* Fills the results of a pick from the row x [n], n > 0. maxima [g4_pick_scratch(n, pick->k)]: scratch */
void g4_pick_row(const g4_kernels *kernels, const float *x, int n, float *maxima, g4_pick *pick);
int g4_pick_scratch(int n, int k);
/* Fills the results of picks[i] from rows[i] [n], in parallel over rows. n > 0 */
g4_status g4_pick_rows(g4_exec *exec, const float *const *rows, g4_pick *const *picks, int n_rows, int n);

/* The smallest weight of the nucleus: the fewest of the largest weights whose sum is at least `share` of all. w [n] of 0
 * to 1, one of them above 0. ids [n]: scratch. */
float g4_nucleus_floor(const g4_kernels *kernels, const float *w, int n, double share, int32_t *ids);

/* The first index up to which the weights >= least sum to more than `unit` (0 <= unit < 1) of their sum. Never one of
 * weight 0. w [n] as above, with one of them >= least; else -1. sums [g4_draw_scratch(n)]: scratch. */
enum { G4_DRAW_BLOCK = 512 };
static inline int g4_draw_scratch(int n)
{
    return (n + G4_DRAW_BLOCK - 1) / G4_DRAW_BLOCK;
}
int g4_draw(const g4_kernels *kernels, const float *w, int n, float least, double unit, double *sums);

#endif
