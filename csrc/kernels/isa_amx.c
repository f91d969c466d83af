/* SPDX-License-Identifier: Apache-2.0 */
#define DPBUSD _mm256_dpbusd_epi32
#define DPWSSD _mm256_dpwssd_epi32
#define DPWSSD_512 _mm512_dpwssd_epi32
#define INT8_TILE "kernels/tile_vnni.h"
#define INT8_PANELS 2
#define BF16_PRODUCTS "kernels/bf16_amx.h"
#include "kernels/simd_avx512.h"
#include "kernels/int8_vnni.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_amx
#define ISA G4_ISA_AMX
#include "kernels/table.h"
