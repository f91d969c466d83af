/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_scalar.h"

#include "kernels/bodies.h"

extern const g4_kernels g4_kernels_scalar;
const g4_kernels g4_kernels_scalar = {
    .isa = G4_ISA_SCALAR,
#define G4_KERNEL(result, name, args) .name = name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
