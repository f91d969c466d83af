/* SPDX-License-Identifier: Apache-2.0 */
/* The vector operations of simd_scalar.h on AVX-512 F, BW, DQ, VL. */
#include <immintrin.h>

#include "base/dtype.h"

#define VEC_LANES 16
/* A tile of 6 x 4 dot products: 24 accumulators + 6 x + 1 w of the 32 registers; 10 loads feed 24 fma. */
#define TILE_M 6
#define TILE_N 4

typedef __m512 vec;
typedef __m512 f32x16;

static inline f32x16 x16_set1(float a) { return _mm512_set1_ps(a); }
static inline f32x16 x16_load(const float *p) { return _mm512_loadu_ps(p); }
static inline f32x16 x16_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline f32x16 x16_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline f32x16 x16_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void x16_store(float *p, f32x16 a) { _mm512_storeu_ps(p, a); }
static inline f32x16 x16_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
static inline f32x16 x16_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
static inline f32x16 x16_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
static inline f32x16 x16_div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
static inline f32x16 x16_fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
static inline f32x16 x16_max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
static inline f32x16 x16_min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
static inline f32x16 x16_abs(f32x16 a) { return _mm512_abs_ps(a); }

static inline f32x16 x16_round(f32x16 a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline f32x16 x16_floor(f32x16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

static inline f32x16 x16_if_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

static inline f32x16 x16_if_nan(f32x16 a, f32x16 yes, f32x16 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), no, yes);
}

static inline f32x16 x16_exp2_integral(f32x16 a)
{
    __m512i biased = _mm512_add_epi32(_mm512_cvttps_epi32(a), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

static inline float x16_sum(f32x16 a)
{
    __m256 by_8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
    __m128 by_2 = _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4));
    return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_movehdup_ps(by_2)));
}

static inline void x16_store_f16(uint16_t *p, f32x16 a)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

static inline void x16_store_bf16(uint16_t *p, f32x16 a)
{
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __m512i chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

static inline __m128 sum_by_4(const float *lanes)
{
    __m256 by_8 = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
    return _mm_add_ps(_mm256_castps256_ps128(by_8), _mm256_extractf128_ps(by_8, 1));
}

/* a0+a2, a1+a3, b0+b2, b1+b3 of two vectors of 4. */
static inline __m128 sum_by_2(__m128 a, __m128 b) { return _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a)); }

static inline void x16_sum4(const float *lanes, size_t half_stride, float *out)
{
    __m128 ab = sum_by_2(sum_by_4(lanes), sum_by_4(lanes + 16));
    __m128 cd = sum_by_2(sum_by_4(lanes + 32), sum_by_4(lanes + 48));
    (void)half_stride;
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
}

static inline void x16_store_halves(float *p, size_t half_stride, f32x16 a)
{
    (void)half_stride;
    _mm512_storeu_ps(p, a);
}

static inline vec vec_zero(void) { return _mm512_setzero_ps(); }
static inline vec vec_load(const float *p) { return x16_load(p); }
static inline vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline void vec_store(float *p, vec a) { _mm512_storeu_ps(p, a); }

#define x16_from_halves(low, high) _mm512_insertf32x8(_mm512_castps256_ps512(low), (high), 1)
#include "kernels/int8_avx2.h"
