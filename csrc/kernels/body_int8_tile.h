/* SPDX-License-Identifier: Apache-2.0 */
/* The tile of precision="fast": 4 rows of x against 16 weight rows, which a panel holds as whole numbers.
 *
 * One instruction multiplies 32 bytes and adds the products by pairs into 16 bits. Weights of up to 4 bits leave room to
 * add eight such results before the pairs must be widened to 32 bits, 5 bits four, 6 bits two: that is what makes this
 * three times as fast as float32 on AVX2 (measured: docs/benchmarks.md). Eight-bit weights need their sign moved to x first.
 */
enum { INT8_M = 256, INT8_N = 16, INT8_K = 512 };

/* 8 weight rows. Inputs lie by fours, so that one load meets 4 bytes of x repeated. */
typedef struct {
    int8_t q[INT8_K / 4][8][4];
    float scale[INT8_K / 16][8], min[INT8_K / 16][8];
} int8_panel;

/* Where four inputs lie in 4 rows of x (g4_int8_rows) from their group on. */
static inline int place_in_x(int row, int four) { return four / 2 * 32 + row * 8 + four % 2 * 4; }

#ifdef GROUP_DOTS /* a header of that instruction set */
#include GROUP_DOTS
#else
/* dot[i][half] = x_i . w over a group of inputs, for m rows of x and 2 x 8 of w; `four` counts the panel's inputs. start: of
 * each row two numbers that the pairs begin at, or NULL. */
static INLINE void group_dots(const int m, const int group, const int fit, const int8_t *x, const int16_t (*start)[2],
                              const int8_panel *panels, int four, i32x8 dot[4][2])
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
            const i8x32 w0 = i8_load(panels[0].q[four + t][0]), w1 = i8_load(panels[1].q[four + t][0]);
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

/* acc[i][16] += x_i . w for m <= 4 rows of x over k inputs, k a multiple of 32. fit: see body_int8.h.
 *
 * lowered: q, which is raised by 8 (Q4_0), is lowered again by beginning at -8 times x's sums. That is cheaper than to take
 * it off in float32, as a minimum is, by 8 % of the time. A pair of lanes shares -8 sum x evenly: 16 times 0..15 times x_l
 * stays within 30,480 of 0 with that, whatever x. */
static INLINE void int8_tile(const int m, const int group, const int fit, const bool lowered, const g4_int8_rows *x,
                             size_t row, int input, size_t x_inputs, const int8_panel *panels, int k, float *acc)
{
    const bool has_min = fit && !lowered;
    const size_t at = row * x_inputs + 4 * (size_t)input;
    const int8_t *q = x->q + at;
    const float *scale = x->scale + at / 32;
    const float *sums = (group == 32 ? x->sum32 : x->sum16) + at / (size_t)group;
    const int16_t(*start)[2] = (const int16_t(*)[2])x->minus_4 + at / 32;
    for (int g = 0; g < k / group; g++) {
        i32x8 dot[4][2];
        group_dots(m, group, fit, q + g * group * 4, lowered ? start + g * 4 : NULL, panels, g * group / 4, dot);
        for (int i = 0; i < m; i++) {
            const f32x8 dx = f8_set1(scale[g * group / 32 * 4 + i]);
            for (int half = 0; half < 2; half++) {
                float *a = acc + i * INT8_N + half * 8;
                f32x8 total = f8_fma(f8_mul(f8_load(panels[half].scale[g]), dx), f8_from_i32(dot[i][half]), f8_load(a));
                if (has_min)
                    total = f8_minus_product(total, f8_load(panels[half].min[g]), f8_set1(sums[g * 4 + i]));
                f8_store(a, total);
            }
        }
    }
}

/* One for each kind of format; not inlined into every format, which took the compiler minutes. */
#define INT8_TILES(name, group, fit, lowered)                                                                        \
    static void name(const g4_int8_rows *x, size_t row, int input, int m, size_t x_inputs, const int8_panel *panels, \
                     int k, float *acc)                                                                              \
    {                                                                                                                \
        int i = 0;                                                                                                   \
        for (; i + 4 <= m; i += 4)                                                                                   \
            int8_tile(4, group, fit, lowered, x, row + (size_t)i, input, x_inputs, panels, k, acc + i * INT8_N);     \
        float *end = acc + i * INT8_N;                                                                               \
        switch (m - i) {                                                                                             \
        case 3: int8_tile(3, group, fit, lowered, x, row + (size_t)i, input, x_inputs, panels, k, end); break;       \
        case 2: int8_tile(2, group, fit, lowered, x, row + (size_t)i, input, x_inputs, panels, k, end); break;       \
        case 1: int8_tile(1, group, fit, lowered, x, row + (size_t)i, input, x_inputs, panels, k, end); break;       \
        default: break;                                                                                              \
        }                                                                                                            \
    }
INT8_TILES(int8_tiles_32_0, 32, 0, false)
INT8_TILES(int8_tiles_32_4, 32, 4, false)
INT8_TILES(int8_tiles_32_8, 32, 8, false)
INT8_TILES(int8_tiles_32_8_lowered, 32, 8, true)
INT8_TILES(int8_tiles_16_2, 16, 2, false)
INT8_TILES(int8_tiles_16_8, 16, 8, false)

/* The largest lane; NaN is not seen. */
static inline float x16_largest(f32x16 a)
{
    float lanes[16];
    x16_store(lanes, a);
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] = lanes[l] > lanes[l + half] ? lanes[l] : lanes[l + half];
    return lanes[0];
}

/* 16 values to the nearest whole numbers of -127..127, 0 where there is none; their sum. */
static inline int round_16(f32x16 x, int8_t *q)
{
    float lanes[16];
    int sum = 0;
    x16_store(lanes, x16_round(x));
    for (int l = 0; l < 16; l++)
        q[l] = lanes[l] > -128.0f && lanes[l] < 128.0f ? (int8_t)lanes[l] : 0;
    for (int l = 0; l < 16; l++)
        sum += q[l];
    return sum;
}

typedef struct {
    int8_t q[32];
    int sum[2]; /* of either half of q */
    float scale;
} byte_block;

/* 32 values share the scale max |x| / 127, q = x / scale to the nearest (ties to even). A NaN or an infinity makes its scale
 * NaN. */
static byte_block quantize_block(const float x[32])
{
    byte_block block;
    const f32x16 low = x16_load(x), high = x16_load(x + 16);
    const float max = x16_largest(x16_max(x16_abs(low), x16_abs(high)));
    const f32x16 inverse = x16_set1(max > 0 ? 127.0f / max : 0);
    block.sum[0] = round_16(x16_mul(low, inverse), block.q);
    block.sum[1] = round_16(x16_mul(high, inverse), block.q + 16);
    block.scale = max / 127.0f + 0.0f * x16_sum(x16_add(low, high));
    return block;
}

/* Blocks of Q8_0: what quantize_block does, the scale rounded to f16. n is a multiple of 32. */
static void narrow_q8_0(void *out, const float *in, int n)
{
    uint8_t *to = out;
    for (int i = 0; i < n; i += 32, to += 34) {
        const byte_block block = quantize_block(in + i);
        const uint16_t d = g4_f32_to_f16(block.scale);
        memcpy(to, &d, 2);
        memcpy(to + 2, block.q, 32);
    }
}

/* Block b of a row to its place. */
static void put_block(const byte_block *block, int row, int b, size_t stride, const g4_int8_rows *rows)
{
    const int together = rows->by_fours ? 4 : 1, lane = row % together, sum = block->sum[0] + block->sum[1];
    const size_t first = (size_t)(row - lane) * stride, at = first / 32 + (size_t)(b * together + lane);
    int8_t *q = rows->q + first;
    rows->scale[at] = block->scale;
    rows->sum32[at] = block->scale * (float)sum;
    for (int half = 0; half < 2; half++)
        rows->sum16[first / 16 + (size_t)((2 * b + half) * together + lane)] = block->scale * (float)block->sum[half];
    if (rows->by_fours) {
        for (int eight = 0; eight < 4; eight++)
            memcpy(q + (b * 4 + eight) * 32 + lane * 8, block->q + eight * 8, 8);
        rows->minus_4[2 * at] = rows->minus_4[2 * at + 1] = (int16_t)(-4 * sum);
    } else
        for (int half = 0; half < 2; half++)
            memcpy(q + b / 8 * 256 + b % 4 * 64 + half * 32 + b / 4 % 2 * 16, block->q + half * 16, 16);
}

/* x [m, k] to bytes, as rows `first` and on. They are padded with blocks of zeros. */
static void quantize_rows(const float *x, size_t x_stride, int first, int m, int k, const g4_int8_rows *rows)
{
    static const byte_block zeros;
    const size_t stride = g4_int8_stride((size_t)k);
    for (int i = 0; i < m; i++) {
        for (int b = 0; b < k / 32; b++) {
            const byte_block block = quantize_block(x + (size_t)i * x_stride + (size_t)b * 32);
            put_block(&block, first + i, b, stride, rows);
        }
        for (int b = k / 32; b < (int)stride / 32; b++)
            put_block(&zeros, first + i, b, stride, rows);
    }
}
