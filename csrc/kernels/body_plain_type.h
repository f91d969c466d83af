/* SPDX-License-Identifier: Apache-2.0 */
/* All kernels of one plain type; the included headers list the macros to define. */
#define WEIGHTS_IN(k) (k)
#define ROW_BYTES(k) ((k) * sizeof(weight))
#include "kernels/body_plain.h"

#define GROUPS
#include "kernels/body_matmul.h"
#undef GROUPS
#include "kernels/body_mix_rows.h"
#define PLAIN_ROWS
#include "kernels/body_mix.h"
#undef PLAIN_ROWS

#undef WEIGHTS_IN
#undef ROW_BYTES
#undef WEIGHT
#undef weight
#undef WEIGHT_TO_F32
