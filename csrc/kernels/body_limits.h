/* SPDX-License-Identifier: Apache-2.0 */
/* Peak rates of this processor: the yardsticks of `gemma4 bench`, made of the instructions that the matmul kernels
 * use. */

/* As many independent sums as the register tile has, so that no fma waits for its operands. The caller supplies the
 * sums, so that no compiler can fold them. */
static double spin_f32(float *sums, int n)
{
    vec acc[TILE_M * TILE_N];
    const float half[16] = {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f,
                            0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f};
    const vec factor = vec_load(half);
    for (int t = 0; t < TILE_M * TILE_N; t++)
        acc[t] = vec_load(sums + t * VEC_LANES);
    for (int i = 0; i < n; i++)
#pragma GCC unroll 24 /* otherwise gcc keeps AVX-512's 24 sums in memory */
        for (int t = 0; t < TILE_M * TILE_N; t++)
            acc[t] = vec_fma(acc[t], factor, factor);
    for (int t = 0; t < TILE_M * TILE_N; t++)
        vec_store(sums + t * VEC_LANES, acc[t]);
    return 2.0 * n * (TILE_M * TILE_N * VEC_LANES);
}

#ifndef OWN_SPIN_INT8 /* defined by the tile's header */
/* int8 products with 4-bit weights: 8 x 2 of 15 * 127 fit 16 bits before they must be widened (body_int8_tile.h). Each
 * round reads other bytes of x; otherwise a compiler could compute one round only. */
static double spin_int8(const int8_t *x, int32_t *sums, int n)
{
    enum { CHAINS = 4, FITS = 8 };
    i8x32 w[CHAINS];
    i32x8 total = i32_zero();
    for (int c = 0; c < CHAINS; c++)
        w[c] = i8_bits(i8_load(x + 32 * c), 0, 15);
    for (int i = 0; i < n; i++) {
        i16x16 acc[CHAINS];
        for (int c = 0; c < CHAINS; c++)
            acc[c] = i16_zero();
        for (int j = 0; j < FITS; j++) {
            const i8x32 bytes = i8_load(x + 32 * (j + i % FITS));
            for (int c = 0; c < CHAINS; c++)
                acc[c] = i16_add_pairs(acc[c], w[c], bytes);
        }
        for (int c = 0; c < CHAINS; c++)
            total = i32_add(total, i32_from_pairs(acc[c]));
    }
    f32x8 lanes = f8_from_i32(total);
    sums[0] = (int32_t)f8_sum(lanes);
    return 2.0 * n * (CHAINS * FITS * 32);
}
#endif

/* Products of 16 bits summed by pairs into 32 bits: 16 columns and 2 inputs in one or two instructions, with as many
 * rows as the encoders' tile (body_panel16.h). Each round has other columns; otherwise a compiler could compute one
 * round only. */
static double spin_int16(const int16_t *x, int32_t *sums, int n)
{
    enum { STEPS = 16 };
    i32x16 dot[ROWS16];
    f32x16 total = x16_set1(0);
    for (int r = 0; r < ROWS16; r++)
        dot[r] = i32x16_zero();
    for (int i = 0; i < n; i++) {
        const int16_t *w = x + 32 * (i % STEPS);
        for (int j = 0; j < STEPS; j += 2)
            for (int half = 0; half < 4; half += 2)
                for (int r = 0; r < ROWS16; r++)
                    dot[r] = i32x16_add_pairs(dot[r], w, x + 64 * r + 2 * j + half);
    }
    for (int r = 0; r < ROWS16; r++)
        total = x16_add(total, x16_from_i32(dot[r]));
    sums[0] = (int32_t)x16_sum(total);
    return 2.0 * n * (STEPS * ROWS16 * 32);
}

static float read_sum(const float *x, size_t n)
{
    f32x16 acc[4] = {x16_set1(0), x16_set1(0), x16_set1(0), x16_set1(0)};
    float sum = 0;
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        prefetch_ahead(x + i, 256, AHEAD_BYTES); /* same distance as decode */
        for (int c = 0; c < 4; c++)
            acc[c] = x16_add(acc[c], x16_load(x + i + 16 * (size_t)c));
    }
    for (; i < n; i++)
        sum += x[i];
    return sum + x16_sum(x16_add(x16_add(acc[0], acc[1]), x16_add(acc[2], acc[3])));
}
