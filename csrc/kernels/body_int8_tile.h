/* SPDX-License-Identifier: Apache-2.0 */
/* The tile of precision="fast": 4 rows of x against panels of 16 weight rows, held as integers.
 *
 * One instruction multiplies 32 bytes and adds pairs of products into 16 bits. Weights of up to 4 bits allow adding
 * eight such results before the pairs must be widened to 32 bits, 5 bits four, 6 bits two. That makes the tile three
 * times as fast as float32 on AVX2 (measured: docs/benchmarks.md). For 8-bit weights the sign is moved to x first.
 */
#ifndef INT8_PANELS
#define INT8_PANELS 1 /* panels per tile */
#endif
enum { INT8_M = 256, INT8_N = 16 * INT8_PANELS, INT8_K = 512 };

/* 16 weight rows, in halves of 8. Each row has 4 consecutive inputs together, so that one load matches 4 broadcast
 * bytes of x. The halves lie side by side: AVX-512 loads both at once, without crossing a cache line. */
typedef struct {
    _Alignas(64) int8_t q[INT8_K / 4][2][8][4];
    float scale[INT8_K / 16][2][8], min[INT8_K / 16][2][8];
} int8_panel;
enum { FOURS_STRIDE = 2 * 8 * 4 }; /* bytes from 4 inputs of a half to the next 4 */

/* The layout of the scratch of matmul_int8_. */
typedef struct {
    int8_panel panels[INT8_PANELS];
    float acc[INT8_M * INT8_N];
} int8_scratch;

_Static_assert(sizeof(int8_scratch) <= G4_INT8_SCRATCH * sizeof(float), "callers lend that much");

/* The offset of four inputs of a row in x (g4_int8_rows, interleaved by 4 rows), from the start of their group. */
static inline int place_in_x(int row, int four) { return four / 2 * 32 + row * 8 + four % 2 * 4; }

#ifdef INT8_TILE /* a header of that instruction set has the whole tile … */
#include INT8_TILE
#else
_Static_assert(INT8_PANELS == 1, "this tile takes one panel");
#ifdef GROUP_DOTS /* … or only group_dots */
#include GROUP_DOTS
#else
/* dot[i][half] = x_i . w over a group of inputs, for m rows of x and 2 x 8 rows of w. `four`: index of the group's
 * first 4 inputs in the panel. start: two initial values for the pairs of each row, or NULL. */
static INLINE void group_dots(const int m, const int group, const int fit, const int8_t *x, const int16_t (*start)[2],
                              const int8_panel *panel, int four, i32x8 dot[4][2])
{
    const int steps = group / 4, run = fit && fit < steps ? fit : steps;
    for (int i = 0; i < m; i++)
        dot[i][0] = dot[i][1] = i32_zero();
#pragma GCC unroll 8
    for (int s = 0; s < steps; s += run) {
        i16x16 pairs[4][2];
        for (int i = 0; i < m; i++)
            pairs[i][0] = pairs[i][1] = start ? i16_set_pair(start[i]) : i16_zero();
#pragma GCC unroll 8
        for (int t = s; t < s + run; t++) {
            const i8x32 w0 = i8_load(panel->q[four + t][0][0]), w1 = i8_load(panel->q[four + t][1][0]);
            for (int i = 0; i < m; i++) {
                const i8x32 xs = i8_load4(x + place_in_x(i, t));
                if (fit) {
                    pairs[i][0] = i16_add_pairs(pairs[i][0], w0, xs);
                    pairs[i][1] = i16_add_pairs(pairs[i][1], w1, xs);
                } else {
                    dot[i][0] = i32_add_fours(dot[i][0], w0, xs);
                    dot[i][1] = i32_add_fours(dot[i][1], w1, xs);
                }
            }
        }
        for (int i = 0; i < m && fit; i++) {
            dot[i][0] = i32_add(dot[i][0], i32_from_pairs(pairs[i][0]));
            dot[i][1] = i32_add(dot[i][1], i32_from_pairs(pairs[i][1]));
        }
    }
}
#endif

/* acc[i][INT8_N] += x_i . w for m <= 4 rows of x over k inputs, k a multiple of 32; fit: SUMS_IN_INT16, body_int8.h.
 *
 * lowered: q has a zero point of 8 (Q4_0), which the sums remove by starting at -8 sum x. That saves 8 % of the time
 * compared with subtracting it in float32 like a minimum. The two 16-bit lanes of a pair start at -4 sum x each. With
 * the lane's 16 products of 0..15 times x_l added, the value stays within 30,480 of 0 for any x. */
static INLINE void int8_tile(const int m, const int group, const int fit, const bool lowered, const g4_int8_rows *x,
                             size_t row, int input, size_t x_inputs, const int8_panel *panel, int k, float *acc,
                             next_rows next)
{
    const bool has_min = fit && !lowered;
    const size_t at = row * x_inputs + 4 * (size_t)input;
    const int8_t *q = x->q + at;
    const float *scale = x->scale + at / 32;
    const float *sums = (group == 32 ? x->sum32 : x->sum16) + at / (size_t)group;
    const int16_t(*start)[2] = (const int16_t(*)[2])x->minus_4 + at / 32;
    for (int g = 0; g < k / group; g++) {
        i32x8 dot[4][2];
        prefetch_row(&next, g);
        group_dots(m, group, fit, q + g * group * 4, lowered ? start + g * 4 : NULL, panel, g * group / 4, dot);
        for (int i = 0; i < m; i++) {
            const f32x8 dx = f8_set1(scale[g * group / 32 * 4 + i]);
            for (int half = 0; half < 2; half++) {
                float *a = acc + i * INT8_N + half * 8;
                f32x8 total = f8_fma(f8_mul(f8_load(panel->scale[g][half]), dx), f8_from_i32(dot[i][half]), f8_load(a));
                if (has_min)
                    total = f8_minus_product(total, f8_load(panel->min[g][half]), f8_set1(sums[g * 4 + i]));
                f8_store(a, total);
            }
        }
    }
}
#endif

/* One function for each kind of format. Inlining it into every format took the compiler minutes. `next`: the weights
 * to be packed next. With a few rows of x, memory would be idle in between if they were prefetched while packing. */
#define TILE_OF(rows, group, fit, lowered)                                                                 \
    int8_tile(rows, group, fit, lowered, x, row + (size_t)i, input, x_inputs, panels, k, acc + i * INT8_N, \
              next_part(&next, i / 4 * share, share))
#define INT8_TILES(name, group, fit, lowered)                                                                        \
    static void name(const g4_int8_rows *x, size_t row, int input, int m, size_t x_inputs, const int8_panel *panels, \
                     int k, float *acc, next_rows next)                                                              \
    {                                                                                                                \
        const int n_tiles = (m + 3) / 4, share = (next.n + n_tiles - 1) / n_tiles;                                   \
        int i = 0;                                                                                                   \
        for (; i + 4 <= m; i += 4)                                                                                   \
            TILE_OF(4, group, fit, lowered);                                                                         \
        switch (m - i) {                                                                                             \
        case 3: TILE_OF(3, group, fit, lowered); break;                                                              \
        case 2: TILE_OF(2, group, fit, lowered); break;                                                              \
        case 1: TILE_OF(1, group, fit, lowered); break;                                                              \
        default: break;                                                                                              \
        }                                                                                                            \
    }
INT8_TILES(int8_tiles_32_0, 32, 0, false)
INT8_TILES(int8_tiles_32_4, 32, 4, false)
INT8_TILES(int8_tiles_32_8, 32, 8, false)
INT8_TILES(int8_tiles_32_8_lowered, 32, 8, true)
INT8_TILES(int8_tiles_16_2, 16, 2, false)
INT8_TILES(int8_tiles_16_8, 16, 8, false)
