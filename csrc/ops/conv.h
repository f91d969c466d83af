/* SPDX-License-Identifier: Apache-2.0 */
/* Convolutions of the audio encoder. Channels are the last axis. */
#ifndef GEMMA4_OPS_CONV_H
#define GEMMA4_OPS_CONV_H

#include "ops/exec.h"

/* 3 x 3, stride 2, zero padding of 1 on each side. x [height, width, channels], out [ceil(height / 2), ceil(width / 2),
 * w.n_rows], w [outputs, 3 * 3 * channels], channels last. */
g4_status g4_conv_3x3(g4_exec *exec, const float *x, int height, int width, int channels, const g4_matrix *w,
                      float *out);

/* out[t][c] = sum over i of w[i][c] * x[t - size + 1 + i][c]; frames before the first one are zero. w [size, n], x and
 * out [n_rows, n]. */
g4_status g4_conv_depthwise(g4_exec *exec, const float *x, const float *w, int size, int n_rows, int n, float *out);

#endif
