/* SPDX-License-Identifier: Apache-2.0 */
/* Element types of weights and caches, and their scalar conversions: the reference that every kernel agrees with. */
#ifndef GEMMA4_BASE_DTYPE_H
#define GEMMA4_BASE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum { G4_F32, G4_F16, G4_BF16, G4_N_DTYPES } g4_dtype;

static inline size_t g4_dtype_size(g4_dtype dtype)
{
    return dtype == G4_F32 ? 4 : 2;
}

/* The names that safetensors uses. */
const char *g4_dtype_name(g4_dtype dtype);

/* G4_N_DTYPES if there is none of that name. */
g4_dtype g4_dtype_parse(const char *name);

static inline float g4_f32_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t g4_f32_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float g4_bf16_to_f32(uint16_t x)
{
    return g4_f32_from_bits((uint32_t)x << 16);
}

/* Round to nearest even; a NaN stays a (quiet) NaN. */
static inline uint16_t g4_f32_to_bf16(float x)
{
    uint32_t bits = g4_f32_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float g4_f16_to_f32(uint16_t x);

#endif
