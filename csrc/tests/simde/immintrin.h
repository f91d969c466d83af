/* SPDX-License-Identifier: Apache-2.0 */
/* For tests only (GEMMA4_SIMDE). Found before the compiler's own header, it implements the intrinsics of AVX-512 and
 * VNNI with AVX2's, so that those kernels run on processors without them. Most come from SIMDe; the rest, which its
 * 0.7.4 lacks, is here. */
#ifndef GEMMA4_TESTS_IMMINTRIN_H
#define GEMMA4_TESTS_IMMINTRIN_H
#include_next <immintrin.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

typedef struct {
    __m256i lo, hi;
} g4_halves;

static inline g4_halves g4_split(__m512i a)
{
    g4_halves halves;
    memcpy(&halves, &a, sizeof halves);
    return halves;
}

static inline __m512i g4_join(__m256i lo, __m256i hi)
{
    const g4_halves halves = {lo, hi};
    __m512i a;
    memcpy(&a, &halves, sizeof halves);
    return a;
}

static inline __m256 g4_half(__m512 a, int half)
{
    __m256 part;
    memcpy(&part, (const char *)&a + 32 * half, sizeof part);
    return part;
}

static inline __m512 g4_join_ps(__m256 lo, __m256 hi)
{
    return _mm512_castsi512_ps(g4_join(_mm256_castps_si256(lo), _mm256_castps_si256(hi)));
}

static inline __m512 g4_cvtepi32_ps(__m512i a)
{
    return g4_join_ps(_mm256_cvtepi32_ps(g4_split(a).lo), _mm256_cvtepi32_ps(g4_split(a).hi));
}

static inline __m512i g4_cvttps_epi32(__m512 a)
{
    return g4_join(_mm256_cvttps_epi32(g4_half(a, 0)), _mm256_cvttps_epi32(g4_half(a, 1)));
}

static inline __m512i g4_cvtps_epi32(__m512 a)
{
    return g4_join(_mm256_cvtps_epi32(g4_half(a, 0)), _mm256_cvtps_epi32(g4_half(a, 1)));
}

static inline __m512i g4_cvtepi8_epi32(__m128i a)
{
    return g4_join(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}

static inline __m512i g4_cvtepu8_epi16(__m256i a)
{
    return g4_join(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)),
                   _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)));
}

static inline __m512i g4_cvtepu16_epi32(__m256i a)
{
    return g4_join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                   _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}

/* Keeps the low 16 bits of each element. */
static inline __m256i g4_cvtepi32_epi16(__m512i a)
{
    const __m256i low = _mm256_set1_epi32(0xffff), lo = g4_split(a).lo, hi = g4_split(a).hi;
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(lo, low), _mm256_and_si256(hi, low)), 0xd8);
}

static inline __m512 g4_cvtph_ps(__m256i a)
{
    return g4_join_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}

#define _mm512_cvtepi32_ps g4_cvtepi32_ps
#define _mm512_cvttps_epi32 g4_cvttps_epi32
#define _mm512_cvtps_epi32 g4_cvtps_epi32
#define _mm512_cvtepi8_epi32 g4_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 g4_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 g4_cvtepi32_epi16
#define _mm512_cvtph_ps g4_cvtph_ps
#define _mm512_extractf32x8_ps g4_half
#undef _mm512_roundscale_ps /* SIMDe's splits an argument of two flags, `a | b` */
#define _mm512_roundscale_ps(a, rounding) \
    g4_join_ps(_mm256_round_ps(g4_half(a, 0), (rounding)), _mm256_round_ps(g4_half(a, 1), (rounding)))
#define _mm512_cvtps_ph(a, rounding) \
    _mm256_set_m128i(_mm256_cvtps_ph(g4_half(a, 1), (rounding)), _mm256_cvtps_ph(g4_half(a, 0), (rounding)))
#undef _mm512_madd_epi16 /* SIMDe's alias has four arguments */
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#undef _mm256_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _mm256_dpwssd_avx_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32
#define _mm256_dpbusd_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32

/* ---- bfloat16 and tiles ------------------------------------------------------------------------------------------ */

static inline float g4_no_subnormal(float x)
{
    return x < 0x1p-126f && x > -0x1p-126f ? x * 0.0f : x;
}

static inline float g4_bf16_value(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return g4_no_subnormal(x);
}

/* One product added, rounded once. */
static inline float g4_bf16_fma(uint16_t a, uint16_t b, float sum)
{
    return g4_no_subnormal(__builtin_fmaf(g4_bf16_value(a), g4_bf16_value(b), g4_no_subnormal(sum)));
}

static inline uint16_t g4_to_bf16(float x)
{
    uint32_t bits;
    x = g4_no_subnormal(x);
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline __m512bh g4_cvtne2ps_pbh(__m512 high, __m512 low)
{
    float from[32];
    uint16_t to[32];
    __m512bh result;
    memcpy(from, &low, 64);
    memcpy(from + 16, &high, 64);
    for (int i = 0; i < 32; i++)
        to[i] = g4_to_bf16(from[i]);
    memcpy(&result, to, sizeof result);
    return result;
}

/* The odd product of a pair first. */
static inline __m512 g4_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b)
{
    float s[16];
    uint16_t x[32], y[32];
    memcpy(s, &sum, sizeof s);
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    for (int i = 0; i < 16; i++)
        s[i] = g4_bf16_fma(x[2 * i], y[2 * i], g4_bf16_fma(x[2 * i + 1], y[2 * i + 1], s[i]));
    memcpy(&sum, s, sizeof s);
    return sum;
}

static inline __m512 g4_maskz_loadu_ps(__mmask16 mask, const float *p)
{
    float values[16] = {0};
    __m512 result;
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            values[i] = p[i];
    memcpy(&result, values, sizeof result);
    return result;
}

static inline void g4_mask_storeu_ps(float *p, __mmask16 mask, __m512 a)
{
    float values[16];
    memcpy(values, &a, sizeof values);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            p[i] = values[i];
}

/* 8 tiles per thread. An unconfigured tile has no rows, so it has no effect. */
typedef struct {
    uint8_t tile[8][16][64];
    int rows[8], row_bytes[8];
} g4_tile_state;

static _Thread_local g4_tile_state g4_tile_registers;

static inline void g4_tile_loadconfig(const void *config)
{
    const uint8_t *bytes = config;
    memset(&g4_tile_registers, 0, sizeof g4_tile_registers);
    for (int t = 0; bytes[0] == 1 && t < 8; t++) {
        g4_tile_registers.row_bytes[t] = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
        g4_tile_registers.rows[t] = bytes[48 + t];
    }
}

static inline void g4_tile_release(void)
{
    memset(&g4_tile_registers, 0, sizeof g4_tile_registers);
}
static inline void g4_tile_zero(int t)
{
    memset(g4_tile_registers.tile[t], 0, sizeof g4_tile_registers.tile[t]);
}

static inline void g4_tile_loadd(int t, const void *p, size_t stride)
{
    g4_tile_zero(t);
    for (int r = 0; r < g4_tile_registers.rows[t]; r++)
        memcpy(g4_tile_registers.tile[t][r], (const char *)p + (size_t)r * stride,
               (size_t)g4_tile_registers.row_bytes[t]);
}

static inline void g4_tile_stored(int t, void *p, size_t stride)
{
    for (int r = 0; r < g4_tile_registers.rows[t]; r++)
        memcpy((char *)p + (size_t)r * stride, g4_tile_registers.tile[t][r], (size_t)g4_tile_registers.row_bytes[t]);
}

/* Even and odd inputs are summed separately, then added to the previous sum. */
static inline void g4_tile_dpbf16ps(int to, int a, int b)
{
    g4_tile_state *s = &g4_tile_registers;
    for (int m = 0; m < s->rows[to]; m++)
        for (int n = 0; n < s->row_bytes[to] / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < s->row_bytes[a] / 4; k++) {
                uint16_t x[2], w[2];
                memcpy(x, s->tile[a][m] + 4 * k, 4);
                memcpy(w, s->tile[b][k] + 4 * n, 4);
                even = g4_bf16_fma(x[0], w[0], even);
                odd = g4_bf16_fma(x[1], w[1], odd);
            }
            memcpy(&sum, s->tile[to][m] + 4 * n, 4);
            sum = g4_no_subnormal(sum + g4_no_subnormal(even + odd));
            memcpy(s->tile[to][m] + 4 * n, &sum, 4);
        }
}

#undef _mm512_dpbf16_ps
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _mm512_cvtne2ps_pbh g4_cvtne2ps_pbh
#define _mm512_dpbf16_ps g4_dpbf16_ps
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps g4_maskz_loadu_ps
#undef _mm512_cvtepu8_epi16
#define _mm512_cvtepu8_epi16 g4_cvtepu8_epi16
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps g4_mask_storeu_ps
#define _tile_loadconfig g4_tile_loadconfig
#define _tile_release g4_tile_release
#define _tile_loadd g4_tile_loadd
#define _tile_stored g4_tile_stored
#define _tile_zero g4_tile_zero
#define _tile_dpbf16ps g4_tile_dpbf16ps
#endif
