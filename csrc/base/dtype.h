/* SPDX-License-Identifier: Apache-2.0 */
/* Element types of weights and caches, and their scalar conversions: the reference for every kernel.
 *
 * The quantised types are GGUF's, under its names. A row's length is a multiple of the block size; each block has its
 * own scales. Layouts: kernels/formats.h. */
#ifndef GEMMA4_BASE_DTYPE_H
#define GEMMA4_BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* X(name, suffix of its kernels, values in a block, bytes of a block) */
#define G4_EACH_QUANTISED(X)  \
    X(Q8_0, q8_0, 32, 34)     \
    X(Q4_0, q4_0, 32, 18)     \
    X(Q4_1, q4_1, 32, 20)     \
    X(Q5_0, q5_0, 32, 22)     \
    X(Q5_1, q5_1, 32, 24)     \
    X(IQ4_NL, iq4_nl, 32, 18) \
    X(MXFP4, mxfp4, 32, 17)   \
    X(Q2_K, q2_k, 256, 84)    \
    X(Q3_K, q3_k, 256, 110)   \
    X(Q4_K, q4_k, 256, 144)   \
    X(Q5_K, q5_k, 256, 176)   \
    X(Q6_K, q6_k, 256, 210)   \
    X(IQ4_XS, iq4_xs, 256, 136)

typedef enum {
    G4_F32,
    G4_F16,
    G4_BF16,
#define X(name, suffix, block, bytes) G4_##name,
    G4_EACH_QUANTISED(X)
#undef X
        G4_N_DTYPES
} g4_dtype;

static inline bool g4_is_quantised(g4_dtype dtype)
{
    return dtype > G4_BF16;
}

/* Values in a block (1 for the plain types), and bytes of a block. */
size_t g4_block_size(g4_dtype dtype);
size_t g4_block_bytes(g4_dtype dtype);

/* Bytes of n values; n is a multiple of the block size. */
static inline size_t g4_dtype_bytes(g4_dtype dtype, size_t n)
{
    return n / g4_block_size(dtype) * g4_block_bytes(dtype);
}

/* Required alignment of data. Quantised blocks are packed, and read byte by byte. */
static inline size_t g4_dtype_alignment(g4_dtype dtype)
{
    return dtype == G4_F32 ? 4 : g4_is_quantised(dtype) ? 1 : 2;
}

/* Names as in safetensors and GGUF. */
const char *g4_dtype_name(g4_dtype dtype);

/* G4_N_DTYPES if no type has that name. */
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

/* Rounds to nearest even; a NaN stays a (quiet) NaN. */
static inline uint16_t g4_f32_to_bf16(float x)
{
    uint32_t bits = g4_f32_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

float g4_f16_to_f32(uint16_t x);

/* Rounds to nearest even; overflow becomes infinity, a NaN stays a (quiet) NaN. */
uint16_t g4_f32_to_f16(float x);

#endif
