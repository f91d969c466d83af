/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers of hundreds or thousands of rows, by panels of 16 outputs. Used by the encoders and, on AVX2 in `fast`,
 * by prompts of the text model with plain weights (ops/linear.c). Each output is one sum over the inputs in order, so
 * it depends only on its row and its weights. */
#ifndef GEMMA4_OPS_LINEAR_F32_H
#define GEMMA4_OPS_LINEAR_F32_H

#include "ops/linear.h"

/* For callers with tasks of their own: up to G4_PANEL_COLUMNS outputs at a time, over G4_PANEL_INPUTS inputs at a time.
 * Floats of scratch per worker: the packed columns, and 16 widened rows. */
enum {
    G4_PANEL = 16,
    G4_PANEL_COLUMNS = 64,
    G4_PANEL_INPUTS = 1152,
    G4_PANEL_SCRATCH = (G4_PANEL_COLUMNS + G4_PANEL) * G4_PANEL_INPUTS
};

/* Packs the weights of outputs [first, first + n), inputs [at, at + k), into panels, G4_PANEL_INPUTS inputs apart.
 * widened: floats [16, G4_PANEL_INPUTS] of scratch. g4_pack_rows is for outputs as rows. */
typedef void (*g4_pack_fn)(const g4_kernels *kernels, const g4_matrix *w, int first, int n, int at, int k,
                           float *panels, float *widened);
void g4_pack_rows(const g4_kernels *kernels, const g4_matrix *w, int first, int n, int at, int k, float *panels,
                  float *widened);

/* Outputs [column, column + n) of the rows [first_row, end_row) of a job, to out[row * out_stride], row from first_row
 * on. The job's own out is not used. */
void g4_panel_columns(const g4_kernels *kernels, const g4_linear_job *job, g4_pack_fn pack, int first_row, int end_row,
                      int column, int n, float *out, size_t out_stride, float *scratch);

/* As g4_linear_jobs, with a different order of additions. */
g4_status g4_panel_jobs(g4_exec *exec, const g4_linear_job *jobs, int n_jobs);

/* One linear layer between dense arrays. */
g4_status g4_panel_linear(g4_exec *exec, const float *x, int m, const g4_matrix *w, float *out);

#endif
