/* SPDX-License-Identifier: Apache-2.0 */
/* Reading rows of float32, f16 or bf16: include with
 *   WEIGHT        the suffix of x16_load_
 *   weight        the element type
 *   WEIGHT_TO_F32 its scalar conversion
 */
/* The last k % 16 inputs of one weight row, padded with zeros to a block. */
static inline f32x16 NAME(load_some_)(const weight *w, int rest)
{
    float padded[16] = {0};
    for (int l = 0; l < rest; l++)
        padded[l] = WEIGHT_TO_F32(w[l]);
    return x16_load(padded);
}

/* out[i] and out[i][far] = dot(x_i, w) of m rows of x, for two rows of w: what dot_two_ is in body_matmul.h. */
static INLINE void NAME(dot_two_)(const int m, const float *x, size_t x_stride, const weight *w, size_t w_stride,
                                  size_t far_weights, int k, float *out, size_t out_stride, int far)
{
    const int k16 = k / 16 * 16;
    const size_t ahead = bytes_ahead((size_t)k * sizeof *w, w_stride * sizeof *w);
    f32x16 sum[2][FEW_ROWS];
    for (int i = 0; i < m; i++)
        sum[0][i] = sum[1][i] = x16_set1(0);
    for (int l = 0; l < k16; l += 16)
        for (int r = 0; r < 2; r++) {
            const weight *block = w + (size_t)r * far_weights + l;
            const f32x16 ws = CONCAT(x16_load_, WEIGHT)(block);
            __builtin_prefetch((const char *)block + ahead);
            for (int i = 0; i < m; i++)
                sum[r][i] = x16_fma(x16_load(x + (size_t)i * x_stride + l), ws, sum[r][i]);
        }
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < m; i++) {
            if (k16 < k)
                sum[r][i] = x16_fma(x16_load_some(x + (size_t)i * x_stride + k16, k - k16),
                                    NAME(load_some_)(w + (size_t)r * far_weights + k16, k - k16), sum[r][i]);
            out[(size_t)i * out_stride + (size_t)(r * far)] = x16_sum(sum[r][i]);
        }
}

static void NAME(pack_weights_)(const weight *w, size_t w_stride, int n, int k, float *packed)
{
    const int n_blocks = (k + 15) / 16, n_whole = k / 16;
    const size_t half_stride = HALF_STRIDE(TILE_N, n_blocks);
    for (int j = 0; j < (n + TILE_N - 1) / TILE_N * TILE_N; j++) {
        const weight *row =
            w + (size_t)(j < n ? j : 0) * w_stride; /* rows that fill up a tile: any, nobody reads them */
        for (int b = 0; b < n_blocks; b++) {
            f32x16 block =
                b < n_whole ? CONCAT(x16_load_, WEIGHT)(row + b * 16) : NAME(load_some_)(row + b * 16, k - b * 16);
            x16_store_halves(PACKED(packed, TILE_N, n_blocks, j, b), half_stride, block);
        }
    }
}
