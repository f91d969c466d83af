/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_avx512.h"

#include "kernels/bodies.h"

extern const g4_kernels g4_kernels_avx512;
const g4_kernels g4_kernels_avx512 = {
    .isa = G4_ISA_AVX512,
#define G4_KERNEL(result, name, args) .name = name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
