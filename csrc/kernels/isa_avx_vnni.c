/* SPDX-License-Identifier: Apache-2.0 */
#define DPBUSD _mm256_dpbusd_avx_epi32
#define DPWSSD _mm256_dpwssd_avx_epi32
#include "kernels/simd_avx2.h"
#include "kernels/int8_vnni.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_avx_vnni
#define ISA G4_ISA_AVX_VNNI
#include "kernels/table.h"
