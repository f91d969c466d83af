/* SPDX-License-Identifier: Apache-2.0 */
#define DPBUSD _mm256_dpbusd_avx_epi32
#define DPWSSD _mm256_dpwssd_avx_epi32
#include "kernels/simd_avx2.h"
#include "kernels/int8_vnni.h"

#include "kernels/bodies.h"

extern const g4_kernels g4_kernels_avx_vnni;
const g4_kernels g4_kernels_avx_vnni = {
    .isa = G4_ISA_AVX_VNNI,
#define G4_KERNEL(result, name, args) .name = name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
