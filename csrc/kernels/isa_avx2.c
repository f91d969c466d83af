/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_avx2.h"

#include "kernels/bodies.h"

extern const g4_kernels g4_kernels_avx2;
const g4_kernels g4_kernels_avx2 = {
    .isa = G4_ISA_AVX2,
#define G4_KERNEL(result, name, args) .name = name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
