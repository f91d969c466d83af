/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/simd_scalar.h"

#include "kernels/bodies.h"

#define ISA_TABLE g4_kernels_scalar
#define ISA G4_ISA_SCALAR
#include "kernels/table.h"
