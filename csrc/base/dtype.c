/* SPDX-License-Identifier: Apache-2.0 */
#include "base/dtype.h"

typedef struct {
    const char *name;
    uint16_t block, bytes;
} format;

static const format formats[G4_N_DTYPES] = {[G4_F32] = {"F32", 1, 4},
                                            [G4_F16] = {"F16", 1, 2},
                                            [G4_BF16] = {"BF16", 1, 2},
#define X(type, suffix, block, bytes) [G4_##type] = {#type, block, bytes},
                                            G4_EACH_QUANTISED(X)
#undef X
};

const char *g4_dtype_name(g4_dtype dtype)
{
    return dtype < G4_N_DTYPES ? formats[dtype].name : "?";
}

size_t g4_block_size(g4_dtype dtype)
{
    return formats[dtype].block;
}

size_t g4_block_bytes(g4_dtype dtype)
{
    return formats[dtype].bytes;
}

g4_dtype g4_dtype_parse(const char *name)
{
    int dtype = 0;
    while (dtype < G4_N_DTYPES && strcmp(formats[dtype].name, name) != 0)
        dtype++;
    return (g4_dtype)dtype;
}

float g4_f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16;
    uint32_t exponent = (x >> 10) & 31, mantissa = x & 1023;
    if (exponent == 31) /* infinity, or a NaN, quieted as in hardware */
        return g4_f32_from_bits(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0));
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 */
        float magnitude = (float)mantissa * 0x1p-24f;
        return g4_f32_from_bits(sign | g4_f32_bits(magnitude));
    }
    return g4_f32_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t g4_f32_to_f16(float x)
{
    const uint32_t bits = g4_f32_bits(x), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520: half-way from the largest float16 to the next value */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) /* below 2^-14: steps of 2^-24, the spacing of float32 above 0.5 */
        return (uint16_t)(sign | (g4_f32_bits(g4_f32_from_bits(magnitude) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13);
}
