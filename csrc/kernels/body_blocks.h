/* SPDX-License-Identifier: Apache-2.0 */
/* Reads rows of one block format as float32. Include with
 *   WEIGHT      the suffix of read_ (formats.h)
 *   BLOCK       values in a block
 *   BLOCK_BYTES its bytes
 *   GROUP       values that share a scale, 16 or 32
 *   ZERO_POINT  offset that the format adds to its integers
 */
static inline void NAME(widen_block_)(float *out, const uint8_t *block)
{
    block_values v;
    int8_t q[BLOCK];
    CONCAT(read_, WEIGHT)(block, &v);
    for (int part = 0; part < BLOCK / 32; part++)
        i8_store(q + part * 32, i8_add(v.q[part], -ZERO_POINT));
    for (int g = 0; g < BLOCK / 16; g++) {
        f32x16 scaled = x16_mul(x16_set1(v.scale[g * 16 / GROUP]), x16_load_i8(q + g * 16));
        x16_store(out + g * 16, x16_sub(scaled, x16_set1(v.min[g * 16 / GROUP])));
    }
}

static void NAME(widen_)(float *out, const void *in, int n)
{
    const uint8_t *block = in;
    for (int i = 0; i < n; i += BLOCK, block += BLOCK_BYTES)
        NAME(widen_block_)(out + i, block);
}

#ifdef BF16_PRODUCTS
static INLINE void NAME(bf16_block_)(const uint8_t *block, uint16_t *row)
{
    block_values v;
    CONCAT(read_, WEIGHT)(block, &v);
    if (BLOCK > 32) { /* a block of 32 has one scale, and its q would be forced into memory, too */
        IN_MEMORY(v.scale);
        IN_MEMORY(v.min);
    }
    for (int part = 0; part < BLOCK / 32; part++) {
        const int first = part * 32 / GROUP, second = (part * 32 + 16) / GROUP;
        const float scale[2] = {v.scale[first], v.scale[second]}, min[2] = {v.min[first], v.min[second]};
        const i8x32 q = i8_add(v.q[part], -ZERO_POINT);
        bf16_part(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1), scale, HAS_MIN ? min : NULL,
                  row + part * 32);
    }
}

static void NAME(bf16_row_)(const void *w, int k, size_t ahead, uint16_t *row)
{
    const uint8_t *block = w;
    int l = 0;
#ifdef BF16_256 /* formats.h has bf16_256_ for this format */
    for (; l + 256 <= k; l += 256, block += WEIGHTS_IN(256)) {
        prefetch_ahead(block, WEIGHTS_IN(256), ahead);
        CONCAT(bf16_256_, WEIGHT)(block, row + l);
    }
#endif
    for (; l < k; l += BLOCK, block += BLOCK_BYTES) {
        prefetch_ahead(block, BLOCK_BYTES, ahead);
        NAME(bf16_block_)(block, row + l);
    }
}
#endif

/* out[i] and out[i][far] = dot(x_i, w) for m rows of x and two rows of w: the dot_two_ of body_matmul.h. */
static INLINE void NAME(dot_two_)(const int m, const float *x, size_t x_stride, const uint8_t *w, size_t w_stride,
                                  size_t far_weights, int k, float *out, size_t out_stride, int far)
{
    f32x16 sum[2][FEW_ROWS];
    (void)w_stride;
    float values[BLOCK];
    for (int i = 0; i < m; i++)
        sum[0][i] = sum[1][i] = x16_set1(0);
    for (int l = 0; l < k; l += BLOCK)
        for (int r = 0; r < 2; r++) {
            NAME(widen_block_)(values, w + WEIGHTS_IN((size_t)r * far_weights + (size_t)l));
            for (int at = 0; at < BLOCK; at += 16)
                for (int i = 0; i < m; i++)
                    sum[r][i] = x16_fma(x16_load(x + (size_t)i * x_stride + l + at), x16_load(values + at), sum[r][i]);
        }
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < m; i++)
            out[(size_t)i * out_stride + (size_t)(r * far)] = x16_sum(sum[r][i]);
}

static void NAME(pack_weights_)(const uint8_t *w, size_t w_stride, int n, int k, float *packed)
{
    const int n_blocks = k / 16;
    const size_t half_stride = HALF_STRIDE(TILE_N, n_blocks);
    float values[BLOCK_K];
    for (int j = 0; j < (n + TILE_N - 1) / TILE_N * TILE_N; j++) {
        NAME(widen_)(values, w + WEIGHTS_IN((size_t)(j < n ? j : 0) * w_stride), k);
        for (int b = 0; b < n_blocks; b++)
            x16_store_halves(PACKED(packed, TILE_N, n_blocks, j, b), half_stride, x16_load(values + b * 16));
    }
}
