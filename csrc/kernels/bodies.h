/* SPDX-License-Identifier: Apache-2.0 */
/* The bodies of all kernels, written once with the vector operations of simd_*.h. Each isa_*.c includes its simd header
 * and this file, and exports one table. Everything else is static, so no function compiled for one instruction set can
 * leak into another's. */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"

enum { BLOCK_M = VEC_LANES == 16 ? 144 : 72, BLOCK_N = 64, BLOCK_K = 512, FEW_ROWS = 4, ROWS_AHEAD = 8 };
_Static_assert(BLOCK_M *BLOCK_N * 16 + (BLOCK_M + BLOCK_N) * BLOCK_K <= G4_MATMUL_SCRATCH, "what matmul keeps there");

#define x16_load_f32 x16_load
#define vec_load_f32 vec_load
#if VEC_LANES == 16
#define vec_load_f16 x16_load_f16
#define vec_load_bf16 x16_load_bf16
#endif
#define ITSELF(x) (x)

/* Always inline: fast only when sizes are compile-time constants. Plain C and builds that check every access gain
 * nothing from it, and one file took the compiler more than three minutes. */
#if defined PLAIN_C || defined G4_NO_INLINING
#define INLINE
#else
#define INLINE inline __attribute__((always_inline))
#endif

#define NOINLINE __attribute__((noinline))

#ifdef __clang__ /* "unroll" is only a hint: the scalar loops over plain arrays are too long for it */
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

#include "kernels/body_ahead.h"
#include "kernels/body_math.h"
#include "kernels/body_rows.h"
#include "kernels/body_panel.h"
#include "kernels/body_fire.h"
#include "kernels/body_pick.h"
#include "kernels/body_tile.h"
#include "kernels/body_int8_rows.h"
#include "kernels/body_int8_tile.h"
#include "kernels/body_panel16.h"
#ifdef BF16_PRODUCTS /* the instruction set has bf16 instructions */
#include "kernels/body_bf16.h"
#endif
#include "kernels/formats.h"
#ifdef INT8_PACK /* defined by INT8_TILE */
#include INT8_PACK
#endif
#include "kernels/body_limits.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(base) CONCAT(base, WEIGHT)
#define INT8_TILES_OF_(group, sums_in_int16) int8_tiles_##group##_##sums_in_int16
#define INT8_TILES_OF(group, sums_in_int16) INT8_TILES_OF_(group, sums_in_int16)

#define WEIGHT f32
#define weight float
#define WEIGHT_TO_F32 ITSELF
#include "kernels/body_plain_type.h"

#define WEIGHT f16
#define weight uint16_t
#define WEIGHT_TO_F32 g4_f16_to_f32
#include "kernels/body_plain_type.h"

#define WEIGHT bf16
#define weight uint16_t
#define WEIGHT_TO_F32 g4_bf16_to_f32
#include "kernels/body_plain_type.h"

#define WEIGHT q8_0
#define BLOCK 32
#define BLOCK_BYTES 34
#define GROUP 32
#define HAS_MIN 0
#define F16_FACTOR 1
#define ZERO_POINT 0
#define SUMS_IN_INT16 0
#define BF16_256
#define CACHED 1 /* keys and values may be cached in this type */
#include "kernels/body_block_type.h"

#define WEIGHT q4_0
#define BLOCK 32
#define BLOCK_BYTES 18
#define GROUP 32
#define HAS_MIN 0
#define F16_FACTOR 1
#define ZERO_POINT 8
#define SUMS_IN_INT16 8
#define BF16_256
#include "kernels/body_block_type.h"

#define WEIGHT q4_1
#define BLOCK 32
#define BLOCK_BYTES 20
#define GROUP 32
#define HAS_MIN 1
#define F16_FACTOR 1
#define ZERO_POINT 0
#define SUMS_IN_INT16 8
#include "kernels/body_block_type.h"

#define WEIGHT q5_0
#define BLOCK 32
#define BLOCK_BYTES 22
#define GROUP 32
#define HAS_MIN 0
#define F16_FACTOR 1
#define ZERO_POINT 16
#define SUMS_IN_INT16 4
#include "kernels/body_block_type.h"

#define WEIGHT q5_1
#define BLOCK 32
#define BLOCK_BYTES 24
#define GROUP 32
#define HAS_MIN 1
#define F16_FACTOR 1
#define ZERO_POINT 0
#define SUMS_IN_INT16 4
#include "kernels/body_block_type.h"

#define WEIGHT iq4_nl
#define BLOCK 32
#define BLOCK_BYTES 18
#define GROUP 32
#define HAS_MIN 0
#define F16_FACTOR 1
#define ZERO_POINT 0
#define SUMS_IN_INT16 0
#include "kernels/body_block_type.h"

#define WEIGHT mxfp4
#define BLOCK 32
#define BLOCK_BYTES 17
#define GROUP 32
#define HAS_MIN 0
#define F16_FACTOR 0
#define ZERO_POINT 0
#define SUMS_IN_INT16 0
#include "kernels/body_block_type.h"

#define WEIGHT q2_k
#define BLOCK 256
#define BLOCK_BYTES 84
#define GROUP 16
#define HAS_MIN 1
#define F16_FACTOR 0
#define ZERO_POINT 0
#define SUMS_IN_INT16 8
#include "kernels/body_block_type.h"

#define WEIGHT q3_k
#define BLOCK 256
#define BLOCK_BYTES 110
#define GROUP 16
#define HAS_MIN 0
#define F16_FACTOR 0
#define ZERO_POINT 4
#define SUMS_IN_INT16 8
#include "kernels/body_block_type.h"

#define WEIGHT q4_k
#define BLOCK 256
#define BLOCK_BYTES 144
#define GROUP 32
#define HAS_MIN 1
#define F16_FACTOR 0
#define ZERO_POINT 0
#define SUMS_IN_INT16 8
#define BF16_256
#include "kernels/body_block_type.h"

#define WEIGHT q5_k
#define BLOCK 256
#define BLOCK_BYTES 176
#define GROUP 32
#define HAS_MIN 1
#define F16_FACTOR 0
#define ZERO_POINT 0
#define SUMS_IN_INT16 4
#include "kernels/body_block_type.h"

#define WEIGHT q6_k
#define BLOCK 256
#define BLOCK_BYTES 210
#define GROUP 16
#define HAS_MIN 0
#define F16_FACTOR 0
#define ZERO_POINT 32
#define SUMS_IN_INT16 2
#include "kernels/body_block_type.h"

#define WEIGHT iq4_xs
#define BLOCK 256
#define BLOCK_BYTES 136
#define GROUP 32
#define HAS_MIN 0
#define F16_FACTOR 0
#define ZERO_POINT 0
#define SUMS_IN_INT16 0
#include "kernels/body_block_type.h"
