/* SPDX-License-Identifier: Apache-2.0 */
/* The arithmetic kinds of taps (g4_edit in gemma4.h). */
#ifndef GEMMA4_MODEL_EDIT_H
#define GEMMA4_MODEL_EDIT_H

#include "model/tap.h"

/* Part of g4_tap_check. G4_EVALUE: the site holds int32, a span or `values` does not fit its shape, or a number is NaN
 * or infinite where the edit forbids it. */
g4_status g4_edit_check(const g4_tap *tap, const char *name, const int64_t *shape, int n_dims, g4_error *err);

/* Applies an edit to one part. Each element takes one rounded float32 operation (two with a factor), independent of
 * chunks, pruning and threads. Dot products of G4_TAP_PROJECT_OUT are summed in double, in order. */
g4_status g4_edit_part(g4_exec *exec, const g4_tap *tap, const g4_part *part);

#endif
