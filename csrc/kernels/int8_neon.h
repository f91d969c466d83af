/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of int8_scalar.h on NEON. With the dotprod extension (Armv8.2) one instruction multiplies 16 bytes and
 * adds the products by fours into 32 bits: sums of pairs are then sums of fours and never need widening. i8mm:
 * dots_i8mm.h. */
typedef struct {
    int8x16_t lo, hi;
} i8x32;
typedef struct {
    int32x4_t lo, hi;
} i32x8;
typedef struct {
    float32x4_t lo, hi;
} f32x8;

static inline float f16_at(const uint8_t *p)
{
    __fp16 value;
    memcpy(&value, p, 2);
    return (float)value;
}

static inline i8x32 i8_load(const int8_t *p) { return (i8x32){vld1q_s8(p), vld1q_s8(p + 16)}; }
static inline i8x32 i8_load4(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return (i8x32){all, all};
}
static inline void i8_store(int8_t *p, i8x32 a)
{
    vst1q_s8(p, a.lo);
    vst1q_s8(p + 16, a.hi);
}

static inline i8x32 i8_nibbles(const uint8_t *p)
{
    const uint8x16_t bytes = vld1q_u8(p);
    return (i8x32){vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4))};
}
/* The shift is constant only after inlining. Shifting by a register with a negative count shifts right. */
static inline int8x16_t bits_16(int8x16_t a, int shift, int mask)
{
    const uint8x16_t shifted = vshlq_u8(vreinterpretq_u8_s8(a), vdupq_n_s8((int8_t)shift));
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8((uint8_t)mask)));
}
static inline i8x32 i8_bits(i8x32 a, int shift, int mask)
{
    return (i8x32){bits_16(a.lo, -shift, mask), bits_16(a.hi, -shift, mask)};
}
static inline i8x32 i8_bits_up(i8x32 a, int shift, int mask)
{
    return (i8x32){bits_16(a.lo, shift, mask), bits_16(a.hi, shift, mask)};
}
static inline i8x32 i8_or(i8x32 a, i8x32 b) { return (i8x32){vorrq_s8(a.lo, b.lo), vorrq_s8(a.hi, b.hi)}; }
static inline i8x32 i8_add(i8x32 a, int b)
{
    const int8x16_t all = vdupq_n_s8((int8_t)b);
    return (i8x32){vaddq_s8(a.lo, all), vaddq_s8(a.hi, all)};
}
static inline i8x32 i8_lookup(const int8_t *table, i8x32 a)
{
    const int8x16_t values = vld1q_s8(table);
    return (i8x32){vqtbl1q_s8(values, vreinterpretq_u8_s8(a.lo)), vqtbl1q_s8(values, vreinterpretq_u8_s8(a.hi))};
}
static inline int8x16_t spread_16(const uint8_t *p, int mask)
{
    const uint8x16_t bit_of = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t bytes = vcombine_u8(vdup_n_u8(p[0]), vdup_n_u8(p[1]));
    return vreinterpretq_s8_u8(vandq_u8(vtstq_u8(bytes, bit_of), vdupq_n_u8((uint8_t)mask)));
}
static inline i8x32 i8_spread(const uint8_t *p, int mask)
{
    return (i8x32){spread_16(p, mask), spread_16(p + 2, mask)};
}
static inline i8x32 i8_low_halves(i8x32 a, i8x32 b) { return (i8x32){a.lo, b.lo}; }
static inline i8x32 i8_high_halves(i8x32 a, i8x32 b) { return (i8x32){a.hi, b.hi}; }
static inline i8x32 i8_load_halves(const uint8_t *a, const uint8_t *b)
{
    return (i8x32){vreinterpretq_s8_u8(vld1q_u8(a)), vreinterpretq_s8_u8(vld1q_u8(b))};
}

static inline i32x8 i32_zero(void) { return (i32x8){vdupq_n_s32(0), vdupq_n_s32(0)}; }
static inline i32x8 i32_add(i32x8 a, i32x8 b) { return (i32x8){vaddq_s32(a.lo, b.lo), vaddq_s32(a.hi, b.hi)}; }

static inline int32x4_t sums_of_4(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d)
{
    return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}
static inline i32x8 i32_sums_of_fours(i32x8 a, i32x8 b, i32x8 c, i32x8 d)
{
    return (i32x8){sums_of_4(a.lo, b.lo, c.lo, d.lo), sums_of_4(a.hi, b.hi, c.hi, d.hi)};
}

#ifdef __ARM_FEATURE_DOTPROD
typedef i32x8 i16x16;
static inline i16x16 i16_set_pair(const int16_t p[2])
{
    return (i32x8){vdupq_n_s32(p[0] + p[1]), vdupq_n_s32(p[0] + p[1])};
}
static inline i16x16 i16_zero(void) { return i32_zero(); }
static inline i32x8 i32_add_fours(i32x8 sum, i8x32 w, i8x32 x)
{
    return (i32x8){vdotq_s32(sum.lo, w.lo, x.lo), vdotq_s32(sum.hi, w.hi, x.hi)};
}
static inline i32x8 i32_fours(i8x32 w, i8x32 x) { return i32_add_fours(i32_zero(), w, x); }
static inline i16x16 i16_add_pairs(i16x16 sum, i8x32 w, i8x32 x) { return i32_add_fours(sum, w, x); }
static inline i16x16 i16_pairs(i8x32 w, i8x32 x) { return i32_fours(w, x); }
static inline i32x8 i32_from_pairs(i16x16 a) { return a; }
static inline i32x8 i32_sums_of_pairs(i16x16 a, i16x16 b, i16x16 c, i16x16 d, int fit)
{
    (void)fit;
    return i32_sums_of_fours(a, b, c, d);
}
#else
typedef struct {
    int16x8_t lo, hi;
} i16x16;
static inline i16x16 i16_set_pair(const int16_t p[2])
{
    int32_t pair;
    memcpy(&pair, p, 4);
    const int16x8_t all = vreinterpretq_s16_s32(vdupq_n_s32(pair));
    return (i16x16){all, all};
}
static inline i16x16 i16_zero(void) { return (i16x16){vdupq_n_s16(0), vdupq_n_s16(0)}; }
/* 2 * 128 * 127 fits 16 bits. */
static inline int16x8_t pairs_16(int8x16_t w, int8x16_t x)
{
    return vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x));
}
static inline i16x16 i16_pairs(i8x32 w, i8x32 x) { return (i16x16){pairs_16(w.lo, x.lo), pairs_16(w.hi, x.hi)}; }
static inline i16x16 i16_add_pairs(i16x16 sum, i8x32 w, i8x32 x)
{
    return (i16x16){vaddq_s16(sum.lo, pairs_16(w.lo, x.lo)), vaddq_s16(sum.hi, pairs_16(w.hi, x.hi))};
}
static inline i32x8 i32_from_pairs(i16x16 a) { return (i32x8){vpaddlq_s16(a.lo), vpaddlq_s16(a.hi)}; }
static inline int32x4_t sums_of_8(int16x8_t a, int16x8_t b, int16x8_t c, int16x8_t d, int fit)
{
    const int16x8_t ab = vpaddq_s16(a, b), cd = vpaddq_s16(c, d);
    return fit < 2 ? vpaddq_s32(vpaddlq_s16(ab), vpaddlq_s16(cd)) : vpaddlq_s16(vpaddq_s16(ab, cd));
}
static inline i32x8 i32_sums_of_pairs(i16x16 a, i16x16 b, i16x16 c, i16x16 d, int fit)
{
    return (i32x8){sums_of_8(a.lo, b.lo, c.lo, d.lo, fit), sums_of_8(a.hi, b.hi, c.hi, d.hi, fit)};
}
static inline i32x8 i32_fours(i8x32 w, i8x32 x) { return i32_from_pairs(i16_pairs(w, x)); }
static inline i32x8 i32_add_fours(i32x8 sum, i8x32 w, i8x32 x)
{
    return (i32x8){vpadalq_s16(sum.lo, pairs_16(w.lo, x.lo)), vpadalq_s16(sum.hi, pairs_16(w.hi, x.hi))};
}
#endif

static inline f32x8 f8_set1(float a) { return (f32x8){vdupq_n_f32(a), vdupq_n_f32(a)}; }
static inline f32x8 f8_load(const float *p) { return (f32x8){vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline f32x8 f8_from_i32(i32x8 a) { return (f32x8){vcvtq_f32_s32(a.lo), vcvtq_f32_s32(a.hi)}; }
static inline f32x8 f8_from_i8(uint64_t bytes)
{
    const int16x8_t words = vmovl_s8(vcreate_s8(bytes));
    return f8_from_i32((i32x8){vmovl_s16(vget_low_s16(words)), vmovl_high_s16(words)});
}
static inline float32x4_t four_f16(const uint8_t *p, size_t stride)
{
    uint16_t a, b, c, d;
    memcpy(&a, p, 2);
    memcpy(&b, p + stride, 2);
    memcpy(&c, p + 2 * stride, 2);
    memcpy(&d, p + 3 * stride, 2);
    return vcvt_f32_f16(vcreate_f16(a | (uint64_t)b << 16 | (uint64_t)c << 32 | (uint64_t)d << 48));
}
static inline f32x8 f8_from_f16(const uint8_t *p, size_t stride)
{
    return (f32x8){four_f16(p, stride), four_f16(p + 4 * stride, stride)};
}
static inline f32x8 f8_mul(f32x8 a, f32x8 b) { return (f32x8){vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
static inline f32x8 f8_fma(f32x8 a, f32x8 b, f32x8 c)
{
    return (f32x8){vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}
static inline f32x8 f8_minus_product(f32x8 c, f32x8 a, f32x8 b)
{
    return (f32x8){vfmsq_f32(c.lo, a.lo, b.lo), vfmsq_f32(c.hi, a.hi, b.hi)};
}
static inline void f8_store(float *p, f32x8 a)
{
    vst1q_f32(p, a.lo);
    vst1q_f32(p + 4, a.hi);
}
static inline float32x4_t first_of_4(float32x4_t a, int first, int n)
{
    const int32x4_t lane =
        vaddq_s32(vcombine_s32(vcreate_s32(0x100000000), vcreate_s32(0x300000002)), vdupq_n_s32(first));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vcgtq_s32(vdupq_n_s32(n), lane)));
}
static inline f32x8 f8_first(f32x8 a, int n) { return (f32x8){first_of_4(a.lo, 0, n), first_of_4(a.hi, 4, n)}; }
static inline f32x8 f8_evens(f32x8 a, f32x8 b) { return (f32x8){vuzp1q_f32(a.lo, a.hi), vuzp1q_f32(b.lo, b.hi)}; }
static inline f32x8 f8_odds(f32x8 a, f32x8 b) { return (f32x8){vuzp2q_f32(a.lo, a.hi), vuzp2q_f32(b.lo, b.hi)}; }
static inline float f8_sum(f32x8 a)
{
    const float32x4_t by_4 = vaddq_f32(a.lo, a.hi);
    const float32x2_t by_2 = vadd_f32(vget_low_f32(by_4), vget_high_f32(by_4));
    return vget_lane_f32(by_2, 0) + vget_lane_f32(by_2, 1);
}

#ifdef __ARM_FEATURE_MATMUL_INT8
/* The order of the matrix instruction (dots_i8mm.h): 8 bytes of rows 0 and 1, then of 2 and 3, … */
static inline void transpose_fours(const int8_t *from, size_t stride, int8_t *to, size_t to_stride)
{
    for (int r = 0; r < 8; r += 2)
        for (int c = 0; c < 32; c += 16) {
            const int64x2_t even = vreinterpretq_s64_s8(vld1q_s8(from + (size_t)r * stride + c));
            const int64x2_t odd = vreinterpretq_s64_s8(vld1q_s8(from + (size_t)(r + 1) * stride + c));
            int8_t *at = to + (size_t)(c / 4 + r / 4) * to_stride + r % 4 * 8;
            vst1q_s8(at, vreinterpretq_s8_s64(vtrn1q_s64(even, odd)));
            vst1q_s8(at + 2 * to_stride, vreinterpretq_s8_s64(vtrn2q_s64(even, odd)));
        }
}
#else
/* Transposes 4 groups of 4 bytes in each of 4 rows, `stride` apart, into 4 groups of 4 rows, to_stride bytes apart. */
static inline void transpose_4_fours(const int8_t *from, size_t stride, int8_t *to, size_t to_stride)
{
    int32x4_t row[4];
    for (int r = 0; r < 4; r++)
        row[r] = vreinterpretq_s32_s8(vld1q_s8(from + (size_t)r * stride));
    const int64x2_t ab_02 = vreinterpretq_s64_s32(vtrn1q_s32(row[0], row[1]));
    const int64x2_t ab_13 = vreinterpretq_s64_s32(vtrn2q_s32(row[0], row[1]));
    const int64x2_t cd_02 = vreinterpretq_s64_s32(vtrn1q_s32(row[2], row[3]));
    const int64x2_t cd_13 = vreinterpretq_s64_s32(vtrn2q_s32(row[2], row[3]));
    vst1q_s8(to, vreinterpretq_s8_s64(vtrn1q_s64(ab_02, cd_02)));
    vst1q_s8(to + to_stride, vreinterpretq_s8_s64(vtrn1q_s64(ab_13, cd_13)));
    vst1q_s8(to + 2 * to_stride, vreinterpretq_s8_s64(vtrn2q_s64(ab_02, cd_02)));
    vst1q_s8(to + 3 * to_stride, vreinterpretq_s8_s64(vtrn2q_s64(ab_13, cd_13)));
}

static inline void transpose_fours(const int8_t *from, size_t stride, int8_t *to, size_t to_stride)
{
    for (int r = 0; r < 8; r += 4)
        for (int c = 0; c < 8; c += 4)
            transpose_4_fours(from + (size_t)r * stride + c * 4, stride, to + (size_t)c * to_stride + r * 4, to_stride);
}
#endif
