/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_avx2.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_avx2
#define ISA G4_ISA_AVX2
#include "kernels/table.h"
