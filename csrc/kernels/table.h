/* SPDX-License-Identifier: Apache-2.0 */
/* Exports the kernels compiled in this unit. The last include of every isa_*.c, after
 *   ISA_TABLE  the table's name
 *   ISA        its instruction set
 */
extern const g4_kernels ISA_TABLE;
const g4_kernels ISA_TABLE = {
    .isa = ISA,
#define G4_KERNEL(result, name, args) .name = name,
#ifndef BF16_PRODUCTS
#define G4_KERNEL_BF16(result, name, args) .name = NULL,
#endif
#include "kernels/kernels.inc"
#undef G4_KERNEL
};
