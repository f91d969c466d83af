/* SPDX-License-Identifier: Apache-2.0 */
/* The tile that prefill spends its time in: TILE_M x TILE_N dot products in registers, all operands float32.
 *
 * Each dot product has 16 lanes; where a register holds 8, a tile runs over the lower halves of the blocks of 16 inputs
 * and then over the upper ones: the same 16 lanes, a full-size tile. Between blocks of 512 inputs the lanes wait in
 * memory, so blocking never changes the order of additions.
 *
 * Sizes: 8 weight rows x 512 inputs x 4 bytes = 16 KB stay in the first-level cache while rows of x (3 x 2 KB) pass by;
 * 72 x 32 accumulators of 64 bytes (147 KB) and the widened panel (64 KB) stay in the second.
 */

/* acc[i][j] (16 lanes at acc + (i * BLOCK_N + j) * 16) += x_i * w_j over n inputs, n a multiple of 16. */
static inline __attribute__((always_inline)) void tile(const int tile_m, const int tile_n, const float *x, size_t x_stride,
                                                       const float *w, int n, float *acc, bool first)
{
    for (int half = 0; half < 16; half += VEC_LANES) {
        vec sum[TILE_M][TILE_N], xs[TILE_M];
        for (int i = 0; i < tile_m; i++)
            for (int j = 0; j < tile_n; j++)
                sum[i][j] = first ? vec_zero() : vec_load(acc + (i * BLOCK_N + j) * 16 + half);
        for (int l = half; l < n; l += 16) {
            for (int i = 0; i < tile_m; i++)
                xs[i] = vec_load(x + (size_t)i * x_stride + l);
            for (int j = 0; j < tile_n; j++) {
                vec ws = vec_load(w + j * BLOCK_K + l);
                for (int i = 0; i < tile_m; i++)
                    sum[i][j] = vec_fma(xs[i], ws, sum[i][j]);
            }
        }
        for (int i = 0; i < tile_m; i++)
            for (int j = 0; j < tile_n; j++)
                vec_store(acc + (i * BLOCK_N + j) * 16 + half, sum[i][j]);
    }
}

/* n weight rows for tile_m rows of x. */
static inline __attribute__((always_inline)) void tile_row(const int tile_m, const float *x, size_t x_stride, const float *w,
                                                           int n, int length, float *acc, bool first)
{
    int j = 0;
    for (; j + TILE_N <= n; j += TILE_N)
        tile(tile_m, TILE_N, x, x_stride, w + j * BLOCK_K, length, acc + j * 16, first);
    for (; j < n; j++)
        tile(tile_m, 1, x, x_stride, w + j * BLOCK_K, length, acc + j * 16, first);
}

static void tile_block(const float *x, size_t x_stride, int m, const float *panel, int n, int length, float *acc, bool first)
{
    for (int j = 0; j < n; j += NEAR_ROWS) {
        const int near_n = n - j < NEAR_ROWS ? n - j : NEAR_ROWS;
        const float *w = panel + j * BLOCK_K;
        float *acc_j = acc + j * 16;
        int i = 0;
        for (; i + TILE_M <= m; i += TILE_M)
            tile_row(TILE_M, x + (size_t)i * x_stride, x_stride, w, near_n, length, acc_j + i * BLOCK_N * 16, first);
        for (; i < m; i++)
            tile_row(1, x + (size_t)i * x_stride, x_stride, w, near_n, length, acc_j + i * BLOCK_N * 16, first);
    }
}

static void sum_block(const float *acc, int m, int n, float *out, size_t out_stride)
{
    for (int i = 0; i < m; i++) {
        const float *lanes = acc + i * BLOCK_N * 16;
        int j = 0;
        for (; j + 4 <= n; j += 4)
            x16_sum4(lanes + j * 16, out + (size_t)i * out_stride + j);
        for (; j < n; j++)
            out[(size_t)i * out_stride + (size_t)j] = x16_sum(x16_load(lanes + j * 16));
    }
}
