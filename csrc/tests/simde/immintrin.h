/* SPDX-License-Identifier: Apache-2.0 */
/* For tests alone (GEMMA4_SIMDE): found before the compiler's own header, it makes the intrinsics of AVX-512 and of VNNI out
 * of AVX2's, so that those kernels run on processors without them. Most come from SIMDe; what its 0.7.4 lacks is here. */
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

static inline __m512i g4_cvtepu16_epi32(__m256i a)
{
    return g4_join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                   _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}

/* The low 16 bits of each. */
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
#undef _mm512_roundscale_ps /* SIMDe's takes an argument of two flags, `a | b`, apart */
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
#endif
