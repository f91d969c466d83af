/* SPDX-License-Identifier: Apache-2.0 */
/* x as int8: rounded in blocks of 32 and stored in the layout that the kernels of precision="fast" read (g4_int8_rows).
 * Keys and values in Q8_0 are rounded the same way. */

/* The largest lane. A NaN may be lost. */
static inline float x16_largest(f32x16 a)
{
    float lanes[16];
    x16_store(lanes, a);
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] = lanes[l] > lanes[l + half] ? lanes[l] : lanes[l + half];
    return lanes[0];
}

/* Rounds 16 values to integers in -127..127, or to 0 if NaN or out of range. Returns the sum of the integers. */
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
    int sum[2]; /* of each half of q */
    float scale;
} byte_block;

/* 32 values share the scale max |x| / 127; q = x / scale, rounded to nearest, ties to even. A NaN or an infinity makes
 * the scale NaN. */
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

/* Q8_0 blocks: quantize_block with the scale rounded to f16. n is a multiple of 32. */
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

/* Stores block b of a row in the layout of g4_int8_rows. */
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
        rows->minus_8[at] = -8 * sum;
    } else
        for (int half = 0; half < 2; half++)
            memcpy(q + b / 8 * 256 + b % 4 * 64 + half * 32 + b / 4 % 2 * 16, block->q + half * 16, 16);
}

/* x [m, k] to int8, as rows from `first` on, padded with blocks of zeros. */
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

/* 8 partial sums of one row of weights with each of a few rows of x. */
typedef f32x8 few_sums[G4_INT8_FEW];
