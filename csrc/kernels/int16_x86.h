/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of int16_portable.h on AVX2, and on AVX-512, where one register holds all 16 lanes. */
static inline int32_t two_i16(const int16_t *p)
{
    int32_t two;
    memcpy(&two, p, sizeof two);
    return two;
}

#ifndef DPWSSD /* with VNNI, one instruction does both */
#define DPWSSD(sum, w, x) in_order(_mm256_add_epi32((sum), _mm256_madd_epi16((w), (x))))
#define DPWSSD_512(sum, w, x) _mm512_add_epi32((sum), _mm512_madd_epi16((w), (x)))
#endif

#if VEC_LANES == 16
typedef __m512i i32x16;

static inline i32x16 i32x16_zero(void) { return _mm512_setzero_si512(); }
static inline i32x16 i32x16_add_pairs(i32x16 sum, const int16_t *w, const int16_t *x)
{
    return DPWSSD_512(sum, _mm512_loadu_si512(w), _mm512_set1_epi32(two_i16(x)));
}
static inline f32x16 x16_from_i32(i32x16 a) { return _mm512_cvtepi32_ps(a); }
static inline void x16_store_i16(int16_t *p, f32x16 a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
}
#else
typedef struct {
    __m256i low, high;
} i32x16;

static inline i32x16 i32x16_zero(void) { return (i32x16){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline i32x16 i32x16_add_pairs(i32x16 sum, const int16_t *w, const int16_t *x)
{
    const __m256i two = _mm256_set1_epi32(two_i16(x));
    sum.low = DPWSSD(sum.low, _mm256_loadu_si256((const __m256i *)w), two);
    sum.high = DPWSSD(sum.high, _mm256_loadu_si256((const __m256i *)w + 1), two);
    return sum;
}
static inline f32x16 x16_from_i32(i32x16 a) { return (f32x16){_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
static inline void x16_store_i16(int16_t *p, f32x16 a)
{
    const __m256i by_quarters = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(by_quarters, 0xd8));
}
#endif
