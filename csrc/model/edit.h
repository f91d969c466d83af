/* SPDX-License-Identifier: Apache-2.0 */
/* Edits as data: the arithmetic kinds of taps (g4_edit of gemma4.h). */
#ifndef GEMMA4_MODEL_EDIT_H
#define GEMMA4_MODEL_EDIT_H

#include "model/tap.h"

/* Part of g4_tap_check. G4_EVALUE: the site holds int32, a span or `values` do not fit the site's shape, or a number is NaN. */
g4_status g4_edit_check(const g4_tap *tap, const char *name, const int64_t *shape, int n_dims, g4_error *err);

/* Each element is one rounded operation (two with a factor) on float32, whatever chunk, pruning or threads; dot products
 * of G4_TAP_PROJECT_OUT are summed in double, in order. */
g4_status g4_edit_part(g4_exec *exec, const g4_tap *tap, const g4_part *part);

#endif
