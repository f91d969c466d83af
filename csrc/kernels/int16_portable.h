/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of body_panel16.h in plain C: 16-bit products, summed by pairs into 16 lanes of 32 bits. */
typedef struct {
    int32_t lane[16];
} i32x16;

static inline i32x16 i32x16_zero(void) { return (i32x16){{0}}; }

/* sum + x[0] w[l][0] + x[1] w[l][1] in lane l; w [16][2]. */
static inline i32x16 i32x16_add_pairs(i32x16 sum, const int16_t *w, const int16_t *x)
{
    for (int l = 0; l < 16; l++)
        sum.lane[l] += (int32_t)w[2 * l] * x[0] + (int32_t)w[2 * l + 1] * x[1];
    return sum;
}

static inline f32x16 x16_from_i32(i32x16 a)
{
    float lanes[16];
    for (int l = 0; l < 16; l++)
        lanes[l] = (float)a.lane[l];
    return x16_load(lanes);
}

/* Rounds to nearest, ties to even; the values must fit int16. */
static inline void x16_store_i16(int16_t *p, f32x16 a)
{
    float lanes[16];
    x16_store(lanes, a);
    for (int l = 0; l < 16; l++)
        p[l] = (int16_t)rintf(lanes[l]);
}
