/* SPDX-License-Identifier: Apache-2.0 */
#define GROUP_DOTS "kernels/dots_i8mm.h"
#include "kernels/simd_neon.h"

#include "kernels/bodies.h"

extern const g4_kernels g4_kernels_neon_i8mm;
const g4_kernels g4_kernels_neon_i8mm = {
    .isa = G4_ISA_NEON_I8MM,
#define G4_KERNEL(result, name, args) .name = name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
