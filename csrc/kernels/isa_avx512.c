/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_avx512.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_avx512
#define ISA G4_ISA_AVX512
#include "kernels/table.h"
