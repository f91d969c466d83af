/* SPDX-License-Identifier: Apache-2.0 */
/* The vector operations of simd_scalar.h on AArch64's NEON (Advanced SIMD), which every AArch64 processor has. */
#include <arm_neon.h>

#include "base/dtype.h"

#define VEC_LANES 4
/* A tile of 6 x 4 dot products: 24 accumulators + 6 x + 1 w of the 32 registers; 10 loads feed 24 fma. */
#define TILE_M 6
#define TILE_N 4

typedef float32x4_t vec;
typedef struct {
    float32x4_t a, b, c, d;
} f32x16;

static inline vec vec_zero(void) { return vdupq_n_f32(0); }
static inline vec vec_load(const float *p) { return vld1q_f32(p); }
static inline vec vec_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline void vec_store(float *p, vec a) { vst1q_f32(p, a); }

static inline float32x4_t load_f16_4(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
static inline float32x4_t load_bf16_4(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
#define vec_load_f16 load_f16_4
#define vec_load_bf16 load_bf16_4

#define FOUR(a_, b_, c_, d_) ((f32x16){(a_), (b_), (c_), (d_)})
#define EACH1(f, x) FOUR(f((x).a), f((x).b), f((x).c), f((x).d))
#define EACH2(f, x, y) FOUR(f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d))

static inline f32x16 x16_set1(float a)
{
    const float32x4_t all = vdupq_n_f32(a);
    return FOUR(all, all, all, all);
}
static inline f32x16 x16_load(const float *p)
{
    return FOUR(vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12));
}
static inline f32x16 x16_load_f16(const uint16_t *p)
{
    return FOUR(load_f16_4(p), load_f16_4(p + 4), load_f16_4(p + 8), load_f16_4(p + 12));
}
static inline f32x16 x16_load_bf16(const uint16_t *p)
{
    return FOUR(load_bf16_4(p), load_bf16_4(p + 4), load_bf16_4(p + 8), load_bf16_4(p + 12));
}
static inline f32x16 x16_load_i8(const int8_t *p)
{
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
    return FOUR(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high)));
}

/* Stores lanes 0-3 at p and the next fours at p + step, p + 2 step and p + 3 step. */
static inline void x16_store_halves(float *p, size_t step, f32x16 x)
{
    vst1q_f32(p, x.a);
    vst1q_f32(p + step, x.b);
    vst1q_f32(p + 2 * step, x.c);
    vst1q_f32(p + 3 * step, x.d);
}
static inline void x16_store(float *p, f32x16 x) { x16_store_halves(p, 4, x); }

static inline f32x16 x16_add(f32x16 x, f32x16 y) { return EACH2(vaddq_f32, x, y); }
static inline f32x16 x16_sub(f32x16 x, f32x16 y) { return EACH2(vsubq_f32, x, y); }
static inline f32x16 x16_mul(f32x16 x, f32x16 y) { return EACH2(vmulq_f32, x, y); }
static inline f32x16 x16_div(f32x16 x, f32x16 y) { return EACH2(vdivq_f32, x, y); }
static inline f32x16 x16_fma(f32x16 x, f32x16 y, f32x16 z)
{
    return FOUR(vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d));
}

/* Not vmaxq and vminq: for unordered operands they return NaN, but this must return the second operand. */
static inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
static inline f32x16 x16_max(f32x16 x, f32x16 y) { return EACH2(larger, x, y); }
static inline f32x16 x16_min(f32x16 x, f32x16 y) { return EACH2(smaller, x, y); }

static inline f32x16 x16_abs(f32x16 x) { return EACH1(vabsq_f32, x); }
static inline f32x16 x16_round(f32x16 x) { return EACH1(vrndnq_f32, x); }
static inline f32x16 x16_floor(f32x16 x) { return EACH1(vrndmq_f32, x); }

#define IF_LESS(lane) vbslq_f32(vcltq_f32(x.lane, y.lane), yes.lane, no.lane)
static inline f32x16 x16_if_less(f32x16 x, f32x16 y, f32x16 yes, f32x16 no)
{
    return FOUR(IF_LESS(a), IF_LESS(b), IF_LESS(c), IF_LESS(d));
}

#define IF_NAN(lane) vbslq_f32(vceqq_f32(x.lane, x.lane), no.lane, yes.lane)
static inline f32x16 x16_if_nan(f32x16 x, f32x16 yes, f32x16 no)
{
    return FOUR(IF_NAN(a), IF_NAN(b), IF_NAN(c), IF_NAN(d));
}

static inline float32x4_t exp2_integral_4(float32x4_t x)
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(x), vdupq_n_s32(127)), 23));
}
static inline f32x16 x16_exp2_integral(f32x16 x) { return EACH1(exp2_integral_4, x); }

static inline float x16_sum(f32x16 x)
{
    const float32x4_t by_4 = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    const float32x2_t by_2 = vadd_f32(vget_low_f32(by_4), vget_high_f32(by_4));
    return vget_lane_f32(by_2, 0) + vget_lane_f32(by_2, 1);
}

static inline float32x4_t sum_by_4(const float *p, size_t step)
{
    return vaddq_f32(vaddq_f32(vld1q_f32(p), vld1q_f32(p + 2 * step)),
                     vaddq_f32(vld1q_f32(p + step), vld1q_f32(p + 3 * step)));
}

/* a0+a2, a1+a3, b0+b2, b1+b3. */
static inline float32x4_t sum_by_2(float32x4_t a, float32x4_t b)
{
    const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
    return vaddq_f32(vreinterpretq_f32_f64(vtrn1q_f64(x, y)), vreinterpretq_f32_f64(vtrn2q_f64(x, y)));
}

static inline void x16_sum4(const float *lanes, size_t step, float *out)
{
    const float32x4_t ab = sum_by_2(sum_by_4(lanes, step), sum_by_4(lanes + 4, step));
    const float32x4_t cd = sum_by_2(sum_by_4(lanes + 8, step), sum_by_4(lanes + 12, step));
    vst1q_f32(out, vpaddq_f32(ab, cd));
}

static inline void x16_store_f16(uint16_t *p, f32x16 x)
{
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u16(p + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}

/* bits + 0x7fff + (bit 16 of bits), upper half. A NaN keeps its upper half, with the quiet bit set. */
static inline uint16x4_t narrow_bf16_4(float32x4_t x)
{
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}

static inline void x16_store_bf16(uint16_t *p, f32x16 x)
{
    vst1q_u16(p, vcombine_u16(narrow_bf16_4(x.a), narrow_bf16_4(x.b)));
    vst1q_u16(p + 8, vcombine_u16(narrow_bf16_4(x.c), narrow_bf16_4(x.d)));
}

#include "kernels/int8_neon.h"
