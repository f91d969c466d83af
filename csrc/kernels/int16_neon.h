/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of int16_portable.h on NEON, whose loads deinterleave pairs. */
typedef struct {
    int32x4_t a, b, c, d;
} i32x16;

static inline i32x16 i32x16_zero(void)
{
    const int32x4_t zero = vdupq_n_s32(0);
    return (i32x16){zero, zero, zero, zero};
}

static inline i32x16 i32x16_add_pairs(i32x16 sum, const int16_t *w, const int16_t *x)
{
    int32_t two;
    memcpy(&two, x, sizeof two);
    const int16x4_t xs = vreinterpret_s16_s32(vdup_n_s32(two));
    const int16x8x2_t low = vld2q_s16(w), high = vld2q_s16(w + 16);
    for (int i = 0; i < 2; i++) {
        const int16x4_t xi = i ? vdup_lane_s16(xs, 1) : vdup_lane_s16(xs, 0);
        sum.a = vmlal_s16(sum.a, vget_low_s16(low.val[i]), xi);
        sum.b = vmlal_high_s16(sum.b, low.val[i], vcombine_s16(xi, xi));
        sum.c = vmlal_s16(sum.c, vget_low_s16(high.val[i]), xi);
        sum.d = vmlal_high_s16(sum.d, high.val[i], vcombine_s16(xi, xi));
    }
    return sum;
}

static inline f32x16 x16_from_i32(i32x16 x) { return EACH1(vcvtq_f32_s32, x); }

static inline void x16_store_i16(int16_t *p, f32x16 x)
{
    vst1q_s16(p, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.a)), vqmovn_s32(vcvtnq_s32_f32(x.b))));
    vst1q_s16(p + 8, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.c)), vqmovn_s32(vcvtnq_s32_f32(x.d))));
}
