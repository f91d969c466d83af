/* SPDX-License-Identifier: Apache-2.0 */
/* Measures this machine's limits. A profile shows the share of them that the model reaches. */
#ifndef GEMMA4_OPS_LIMITS_H
#define GEMMA4_OPS_LIMITS_H

#include <stddef.h>

#include "base/status.h"

typedef enum { G4_SPIN_F32, G4_SPIN_INT8, G4_SPIN_INT16, G4_SPIN_BF16 } g4_spin;

/* Operations per second (a multiply-add counts as two) of a loop in registers, on all threads. The bf16 loop reads
 * tiles from the first-level cache. 0: the processor has no bf16 instructions. */
g4_status g4_arithmetic_rate(g4_spin kind, int n_threads, double *per_second, g4_error *err);

/* Bytes per second of reading the n floats at x once with all threads. *sum: the sum of the floats. */
g4_status g4_read_rate(const float *x, size_t n, int n_threads, double *per_second, double *sum, g4_error *err);

#endif
