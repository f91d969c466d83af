/* SPDX-License-Identifier: Apache-2.0 */
/* Every kernel's body, written once against the vocabulary of simd_*.h. An isa_*.c includes its simd header, this, and
 * exports one table. All else is static: no function compiled for one instruction set can leak into another's. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "kernels/kernels.h"

enum { BLOCK_M = 72, BLOCK_N = 32, BLOCK_K = 512, FEW_ROWS = 4, PREFETCH_BYTES = 512 };

#define x16_load_f32 x16_load
#define ITSELF(x) (x)

#include "kernels/body_math.h"
#include "kernels/body_rows.h"
#include "kernels/body_tile.h"

#define WEIGHT f32
#define weight float
#define WEIGHT_TO_F32 ITSELF
#include "kernels/body_matmul.h"

#define WEIGHT f16
#define weight uint16_t
#define WEIGHT_TO_F32 g4_f16_to_f32
#include "kernels/body_matmul.h"

#define WEIGHT bf16
#define weight uint16_t
#define WEIGHT_TO_F32 g4_bf16_to_f32
#include "kernels/body_matmul.h"
