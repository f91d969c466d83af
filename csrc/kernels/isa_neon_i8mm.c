/* SPDX-License-Identifier: Apache-2.0 */
#define GROUP_DOTS "kernels/dots_i8mm.h"
#include "kernels/simd_neon.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_neon_i8mm
#define ISA G4_ISA_NEON_I8MM
#include "kernels/table.h"
