/* SPDX-License-Identifier: Apache-2.0 */
#include "base/dtype.h"

static const char *const names[G4_N_DTYPES] = {[G4_F32] = "F32", [G4_F16] = "F16", [G4_BF16] = "BF16"};

const char *g4_dtype_name(g4_dtype dtype)
{
    return dtype < G4_N_DTYPES ? names[dtype] : "?";
}

g4_dtype g4_dtype_parse(const char *name)
{
    int dtype = 0;
    while (dtype < G4_N_DTYPES && strcmp(names[dtype], name) != 0)
        dtype++;
    return (g4_dtype)dtype;
}

float g4_f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
    uint32_t exponent = (x >> 10) & 31, mantissa = x & 1023;
    if (exponent == 31) /* infinity, or a NaN made quiet as hardware does */
        return g4_f32_from_bits(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return g4_f32_from_bits(sign | g4_f32_bits(magnitude));
    }
    return g4_f32_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
