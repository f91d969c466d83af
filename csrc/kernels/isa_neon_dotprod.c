/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_neon.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_neon_dotprod
#define ISA G4_ISA_NEON_DOTPROD
#include "kernels/table.h"
