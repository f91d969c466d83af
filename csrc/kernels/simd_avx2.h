/* SPDX-License-Identifier: Apache-2.0 */
/* The vector operations of simd_scalar.h on AVX2 + FMA + F16C. */
#include <immintrin.h>

#include "base/dtype.h"

#define VEC_LANES 8
/* A tile of 3 x 4 dot products: 12 accumulators + 3 x + 1 w fill the 16 registers; 7 loads feed 12 fma. */
#define TILE_M 3
#define TILE_N 4

typedef __m256 vec;
typedef struct {
    __m256 lo, hi;
} f32x16;

static inline vec vec_zero(void) { return _mm256_setzero_ps(); }
static inline vec vec_load(const float *p) { return _mm256_loadu_ps(p); }
static inline __m256 load_f16_8(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline __m256 load_bf16_8(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline void vec_store(float *p, vec a) { _mm256_storeu_ps(p, a); }
#define vec_load_f16 load_f16_8
#define vec_load_bf16 load_bf16_8

#define BOTH(lo_, hi_) ((f32x16){(lo_), (hi_)})

static inline f32x16 x16_set1(float a) { return BOTH(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
static inline f32x16 x16_load(const float *p) { return BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline f32x16 x16_load_f16(const uint16_t *p) { return BOTH(load_f16_8(p), load_f16_8(p + 8)); }
static inline f32x16 x16_load_bf16(const uint16_t *p) { return BOTH(load_bf16_8(p), load_bf16_8(p + 8)); }

static inline f32x16 x16_load_i8(const int8_t *p)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return BOTH(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))));
}

static inline void x16_store(float *p, f32x16 a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

#define LANEWISE2(name, instruction) \
    static inline f32x16 name(f32x16 a, f32x16 b) { return BOTH(instruction(a.lo, b.lo), instruction(a.hi, b.hi)); }
LANEWISE2(x16_add, _mm256_add_ps)
LANEWISE2(x16_sub, _mm256_sub_ps)
LANEWISE2(x16_mul, _mm256_mul_ps)
LANEWISE2(x16_div, _mm256_div_ps)
LANEWISE2(x16_max, _mm256_max_ps)
LANEWISE2(x16_min, _mm256_min_ps)

static inline f32x16 x16_fma(f32x16 a, f32x16 b, f32x16 c)
{
    return BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}

static inline f32x16 x16_abs(f32x16 a)
{
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return BOTH(_mm256_and_ps(a.lo, magnitude), _mm256_and_ps(a.hi, magnitude));
}

static inline f32x16 x16_round(f32x16 a)
{
    enum { NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC };
    return BOTH(_mm256_round_ps(a.lo, NEAREST), _mm256_round_ps(a.hi, NEAREST));
}

static inline f32x16 x16_floor(f32x16 a) { return BOTH(_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)); }

static inline f32x16 x16_if_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no)
{
    return BOTH(_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
                _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)));
}

static inline f32x16 x16_if_nan(f32x16 a, f32x16 yes, f32x16 no)
{
    return BOTH(_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
                _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)));
}

static inline __m256 exp2_integral_8(__m256 a)
{
    __m256i biased = _mm256_add_epi32(_mm256_cvttps_epi32(a), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
static inline f32x16 x16_exp2_integral(f32x16 a) { return BOTH(exp2_integral_8(a.lo), exp2_integral_8(a.hi)); }

static inline float x16_sum(f32x16 a)
{
    __m256 by_8 = _mm256_add_ps(a.lo, a.hi);
    __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
    __m128 by_2 = _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4));
    return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_movehdup_ps(by_2)));
}

static inline __m128 sum_by_4(const float *lower, const float *upper)
{
    __m256 by_8 = _mm256_add_ps(_mm256_loadu_ps(lower), _mm256_loadu_ps(upper));
    return _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
}

/* a0+a2, a1+a3, b0+b2, b1+b3 of two vectors of 4. */
static inline __m128 sum_by_2(__m128 a, __m128 b) { return _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)); }

static inline void x16_sum4(const float *lanes, size_t half_stride, float *out)
{
    const float *upper = lanes + half_stride;
    __m128 ab = sum_by_2(sum_by_4(lanes, upper), sum_by_4(lanes + 8, upper + 8));
    __m128 cd = sum_by_2(sum_by_4(lanes + 16, upper + 16), sum_by_4(lanes + 24, upper + 24));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}

static inline void x16_store_halves(float *p, size_t half_stride, f32x16 a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + half_stride, a.hi);
}

/* bits + 0x7fff + (bit 16 of bits), upper half. A NaN keeps its upper half, with the quiet bit set. */
static inline __m128i narrow_bf16_8(__m256 a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

static inline void x16_store_f16(uint16_t *p, f32x16 a)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

static inline void x16_store_bf16(uint16_t *p, f32x16 a)
{
    _mm_storeu_si128((__m128i *)p, narrow_bf16_8(a.lo));
    _mm_storeu_si128((__m128i *)(p + 8), narrow_bf16_8(a.hi));
}

#define x16_from_halves BOTH
#include "kernels/int8_avx2.h"
