/* SPDX-License-Identifier: Apache-2.0 */
/* All kernels of one block format; the included headers list the macros to define. */
#define weight uint8_t
#define WEIGHTS_IN(k) ((size_t)(k) / BLOCK * BLOCK_BYTES)
#include "kernels/body_blocks.h"

#include "kernels/body_int8.h"
#include "kernels/body_matmul.h"
#ifdef CACHED
#define ROW_BYTES WEIGHTS_IN
#include "kernels/body_mix.h"
#undef ROW_BYTES
#undef CACHED
#endif

#undef WEIGHTS_IN
#undef weight
#undef WEIGHT
#undef BLOCK
#undef BLOCK_BYTES
#undef GROUP
#undef HAS_MIN
#undef F16_FACTOR
#undef ZERO_POINT
#undef SUMS_IN_INT16
#undef BF16_256
