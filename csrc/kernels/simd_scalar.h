/* SPDX-License-Identifier: Apache-2.0 */
/* The vector operations in plain C: the definition that the other simd_*.h match bit for bit.
 *
 * vec    VEC_LANES float32, one register: tiles are built of it.
 * f32x16 16 float32, the unit of every stated order of additions.
 */
#include <math.h>

#include "base/dtype.h"

#define VEC_LANES 16
#define PLAIN_C
#define TILE_M 1
#define TILE_N 4

typedef struct {
    float lane[16];
} f32x16;
typedef f32x16 vec;

#define FOR_LANES for (int l = 0; l < 16; l++)
#define LANEWISE(expression)            \
    do {                                \
        f32x16 result_;                 \
        FOR_LANES                       \
        result_.lane[l] = (expression); \
        return result_;                 \
    } while (0)

static inline f32x16 x16_set1(float a) { LANEWISE(a); }
static inline f32x16 x16_load(const float *p) { LANEWISE(p[l]); }
static inline f32x16 x16_load_f16(const uint16_t *p) { LANEWISE(g4_f16_to_f32(p[l])); }
static inline f32x16 x16_load_bf16(const uint16_t *p) { LANEWISE(g4_bf16_to_f32(p[l])); }
static inline f32x16 x16_load_i8(const int8_t *p) { LANEWISE((float)p[l]); }
static inline f32x16 x16_add(f32x16 a, f32x16 b) { LANEWISE(a.lane[l] + b.lane[l]); }
static inline f32x16 x16_sub(f32x16 a, f32x16 b) { LANEWISE(a.lane[l] - b.lane[l]); }
static inline f32x16 x16_mul(f32x16 a, f32x16 b) { LANEWISE(a.lane[l] * b.lane[l]); }
static inline f32x16 x16_div(f32x16 a, f32x16 b) { LANEWISE(a.lane[l] / b.lane[l]); }
static inline f32x16 x16_fma(f32x16 a, f32x16 b, f32x16 c) { LANEWISE(fmaf(a.lane[l], b.lane[l], c.lane[l])); }
/* Returns the second operand if the two are unordered, as the x86 instructions do. */
static inline f32x16 x16_max(f32x16 a, f32x16 b) { LANEWISE(a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]); }
static inline f32x16 x16_min(f32x16 a, f32x16 b) { LANEWISE(a.lane[l] < b.lane[l] ? a.lane[l] : b.lane[l]); }
static inline f32x16 x16_abs(f32x16 a) { LANEWISE(fabsf(a.lane[l])); }
static inline f32x16 x16_round(f32x16 a) { LANEWISE(rintf(a.lane[l])); }
static inline f32x16 x16_floor(f32x16 a) { LANEWISE(floorf(a.lane[l])); }
/* a < b ? yes : no; `no` if unordered. */
static inline f32x16 x16_if_less(f32x16 a, f32x16 b, f32x16 yes, f32x16 no)
{
    LANEWISE(a.lane[l] < b.lane[l] ? yes.lane[l] : no.lane[l]);
}
static inline f32x16 x16_if_nan(f32x16 a, f32x16 yes, f32x16 no)
{
    LANEWISE(a.lane[l] != a.lane[l] ? yes.lane[l] : no.lane[l]);
}
/* 2^a for integral a in [-126, 127]. */
static inline f32x16 x16_exp2_integral(f32x16 a) { LANEWISE(g4_f32_from_bits((uint32_t)((int)a.lane[l] + 127) << 23)); }

static inline void x16_store(float *p, f32x16 a)
{
    FOR_LANES
        p[l] = a.lane[l];
}

static inline void x16_store_f16(uint16_t *p, f32x16 a)
{
    FOR_LANES
        p[l] = g4_f32_to_f16(a.lane[l]);
}

static inline void x16_store_bf16(uint16_t *p, f32x16 a)
{
    FOR_LANES
        p[l] = g4_f32_to_bf16(a.lane[l]);
}

/* Adds the lanes by halving: l with l + 8, then l + 4, l + 2, l + 1. */
static inline float x16_sum(f32x16 a)
{
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++)
            a.lane[l] += a.lane[l + half];
    return a.lane[0];
}

/* Four such sums, for a tile's row: 4 vectors of VEC_LANES, with their upper lanes half_stride further. */
static inline void x16_sum4(const float *lanes, size_t half_stride, float *out)
{
    (void)half_stride;
    for (int i = 0; i < 4; i++)
        out[i] = x16_sum(x16_load(lanes + i * 16));
}

/* Stores lanes 0..VEC_LANES-1 at p, the upper lanes half_stride further. */
static inline void x16_store_halves(float *p, size_t half_stride, f32x16 a)
{
    (void)half_stride;
    x16_store(p, a);
}

static inline vec vec_zero(void) { return x16_set1(0); }
static inline vec vec_load(const float *p) { return x16_load(p); }
static inline vec vec_fma(vec a, vec b, vec c) { return x16_fma(a, b, c); }
static inline void vec_store(float *p, vec a) { x16_store(p, a); }

#include "kernels/int8_scalar.h"
