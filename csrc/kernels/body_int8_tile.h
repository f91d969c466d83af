/* SPDX-License-Identifier: Apache-2.0 */
/* The tile of precision="fast": 4 rows of x against 16 weight rows, which a panel holds as whole numbers.
 *
 * One instruction multiplies 32 bytes and adds the products by pairs into 16 bits. Weights of up to 4 bits leave room to
 * add eight such results before the pairs must be widened to 32 bits, 5 bits four, 6 bits two: that is what makes this
 * three times as fast as float32 on AVX2 (measured: docs/benchmarks.md). Eight-bit weights need their sign moved to x first.
 */
enum {
    INT8_M = 256,
    INT8_N = 16,
    INT8_K = 512,
    INT8_FEW = 16 /* up to so many rows of x, putting the weights in place for the tile costs more than it saves */
};

/* 8 weight rows. Inputs lie by fours, so that one load meets 4 bytes of x repeated. */
typedef struct {
    int8_t q[INT8_K / 4][8][4];
    float scale[INT8_K / 16][8], min[INT8_K / 16][8];
} int8_panel;

/* Where the four inputs t of group g lie in a row of x, whose blocks of 32 are stored in pairs (g4_int8_rows). */
static inline int block_in_x(int block) { return block / 8 * 256 + block % 4 * 64 + block / 4 % 2 * 16; }

static inline int place_in_x(int group, int g, int t)
{
    const int block = g * group / 32, four = g * group / 4 % 8 + t;
    return block_in_x(block) + four / 4 * 32 + four % 4 * 4;
}

#ifdef GROUP_DOTS /* a header of that instruction set */
#include GROUP_DOTS
#else
/* dot[i][half] = x_i . w of the inputs of group g, for m rows of x and 2 x 8 of w. */
static INLINE void group_dots(const int m, const int group, const int fit, const int8_t *q, size_t x_inputs, int g,
                              const int8_panel *panels, i32x8 dot[4][2])
{
    const bool is_signed = fit == 0;
    const int steps = group / 4;
    for (int i = 0; i < m; i++)
        dot[i][0] = dot[i][1] = i32_zero();
    for (int s = 0; s < steps; s += is_signed ? steps : fit) {
        i16x16 pairs[4][2];
        for (int i = 0; i < m; i++)
            pairs[i][0] = pairs[i][1] = i16_zero();
        for (int t = s; t < (is_signed ? steps : s + fit) && t < steps; t++) {
            const int at = g * steps + t;
            const i8x32 w0 = i8_load(panels[0].q[at][0]), w1 = i8_load(panels[1].q[at][0]);
            for (int i = 0; i < m; i++) {
                const i8x32 xs = i8_load4(q + (size_t)i * x_inputs + place_in_x(group, g, t));
                if (is_signed) {
                    dot[i][0] = i32_add_fours(dot[i][0], w0, xs);
                    dot[i][1] = i32_add_fours(dot[i][1], w1, xs);
                } else {
                    pairs[i][0] = i16_add_pairs(pairs[i][0], w0, xs);
                    pairs[i][1] = i16_add_pairs(pairs[i][1], w1, xs);
                }
            }
        }
        for (int i = 0; i < m && !is_signed; i++) {
            dot[i][0] = i32_add(dot[i][0], i32_from_pairs(pairs[i][0]));
            dot[i][1] = i32_add(dot[i][1], i32_from_pairs(pairs[i][1]));
        }
    }
}
#endif

/* acc[i][16] += x_i . w for m rows of x over k inputs, k a multiple of 32. fit: see body_int8.h. */
static INLINE void int8_tile(const int m, const int group, const int fit, const g4_int8_rows *x, size_t row, int input,
                             size_t x_inputs, const int8_panel *panels, int k, float *acc)
{
    const bool is_signed = fit == 0;
    const int8_t *q = x->q + row * x_inputs + (size_t)input;
    const float *scale = x->scale + row * (x_inputs / 32) + (size_t)(input / 32);
    const float *sums =
        (group == 32 ? x->sum32 : x->sum16) + row * (x_inputs / (size_t)group) + (size_t)(input / group);
    for (int g = 0; g < k / group; g++) {
        i32x8 dot[4][2];
        group_dots(m, group, fit, q, x_inputs, g, panels, dot);
        for (int i = 0; i < m; i++) {
            const f32x8 dx = f8_set1(scale[(size_t)i * (x_inputs / 32) + (size_t)(g * group / 32)]);
            const f32x8 sum = f8_set1(sums[(size_t)i * (x_inputs / (size_t)group) + (size_t)g]);
            for (int half = 0; half < 2; half++) {
                float *a = acc + i * INT8_N + half * 8;
                f32x8 total = f8_fma(f8_mul(f8_load(panels[half].scale[g]), dx), f8_from_i32(dot[i][half]), f8_load(a));
                f8_store(a, is_signed ? total : f8_minus_product(total, f8_load(panels[half].min[g]), sum));
            }
        }
    }
}

/* One for each kind of format; not inlined into every format, which took the compiler minutes. */
#define INT8_TILES(group, fit)                                                                                   \
    static void int8_tiles_##group##_##fit(const g4_int8_rows *x, size_t row, int input, int m, size_t x_inputs, \
                                           const int8_panel *panels, int k, float *acc)                          \
    {                                                                                                            \
        int i = 0;                                                                                               \
        for (; i + 4 <= m; i += 4)                                                                               \
            int8_tile(4, group, fit, x, row + (size_t)i, input, x_inputs, panels, k, acc + i * INT8_N);          \
        for (; i < m; i++)                                                                                       \
            int8_tile(1, group, fit, x, row + (size_t)i, input, x_inputs, panels, k, acc + i * INT8_N);          \
    }
INT8_TILES(32, 0)
INT8_TILES(32, 4)
INT8_TILES(32, 8)
INT8_TILES(16, 2)
INT8_TILES(16, 8)

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

/* 32 values as block b of a row: they share the scale max |x| / 127, q = x / scale to the nearest (ties to even). A NaN or an
 * infinity makes its scale NaN. */
static void quantize_block(const float x[32], int b, const g4_int8_rows *row)
{
    int8_t *q = row->q + block_in_x(b);
    const f32x16 low = x16_load(x), high = x16_load(x + 16);
    const float max = x16_largest(x16_max(x16_abs(low), x16_abs(high)));
    const f32x16 inverse = x16_set1(max > 0 ? 127.0f / max : 0);
    const float scale = max / 127.0f + 0.0f * x16_sum(x16_add(low, high));
    const int low_sum = round_16(x16_mul(low, inverse), q), high_sum = round_16(x16_mul(high, inverse), q + 32);
    row->scale[b] = scale;
    row->sum16[2 * b] = scale * (float)low_sum;
    row->sum16[2 * b + 1] = scale * (float)high_sum;
    row->sum32[b] = scale * (float)(low_sum + high_sum);
}

/* Blocks of Q8_0: what quantize_block does, the scale rounded to f16. n is a multiple of 32. */
static void narrow_q8_0(void *out, const float *in, int n)
{
    uint8_t *block = out;
    for (int i = 0; i < n; i += 32, block += 34) {
        int8_t q[64];
        float scale, sums[3];
        const g4_int8_rows row = {q, &scale, sums, sums + 2};
        quantize_block(in + i, 0, &row);
        const uint16_t d = g4_f32_to_f16(scale);
        memcpy(block, &d, 2);
        memcpy(block + 2, q, 16);
        memcpy(block + 18, q + 32, 16);
    }
}

/* x [m, k] to bytes. Rows are padded with blocks of zeros. */
static void quantize_rows(const float *x, size_t x_stride, int m, int k, const g4_int8_rows *rows)
{
    static const float zeros[32];
    for (int i = 0; i < m; i++) {
        const g4_int8_rows row = g4_int8_rows_from(rows, (size_t)i, (size_t)k);
        for (int b = 0; b < k / 32; b++)
            quantize_block(x + (size_t)i * x_stride + (size_t)b * 32, b, &row);
        for (int b = k / 32; b < (int)g4_int8_stride((size_t)k) / 32; b++)
            quantize_block(zeros, b, &row);
    }
}
