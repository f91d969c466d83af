/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_neon.h"

#include "kernels/bodies.h"

extern const g4_kernels g4_kernels_neon;
const g4_kernels g4_kernels_neon = {
    .isa = G4_ISA_NEON,
#define G4_KERNEL(result, name, args) .name = name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
