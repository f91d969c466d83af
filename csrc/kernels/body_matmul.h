/* SPDX-License-Identifier: Apache-2.0 */
/* matmul for one weight type. Include after
 *   WEIGHT           the suffix of the kernel: f32, f16, bf16, q4_0, …
 *   weight           the type in memory: elements, or the bytes of blocks
 *   WEIGHTS_IN(k)    how many `weight` k inputs take
 *   dot_two_ and pack_weights_ of that type (body_plain.h, body_blocks.h)
 *
 * matmul reads the file's own row-major rows; no second copy of the weights is kept. It widens 64 weight rows x 512
 * inputs at a time into 128 KB of scratch for a block of rows of x, and runs the tiles of body_tile.h over them.
 */
/* Decode, a few rows of x: reads the weights in place, in two streams, j and far + j. Two streams far apart read faster
 * than one, or than neighbouring rows, where the hardware prefetcher stops at every row's end: bf16 rows of 3 KB at 39
 * GB/s on two Zen 3 cores instead of 32 or 28. With an odd n, both streams compute the middle row. */
static void NAME(matmul_few_)(const float *x, size_t x_stride, int m, const weight *w, size_t w_stride, int n, int k,
                              float *out, size_t out_stride)
{
    const int far = n / 2;
    const size_t far_weights = (size_t)far * w_stride;
    for (int j = 0; j < n - far; j++, w += WEIGHTS_IN(w_stride), out++)
        switch (m) {
        case 1: NAME(dot_two_)(1, x, x_stride, w, w_stride, far_weights, k, out, out_stride, far); break;
        case 2: NAME(dot_two_)(2, x, x_stride, w, w_stride, far_weights, k, out, out_stride, far); break;
        case 3: NAME(dot_two_)(3, x, x_stride, w, w_stride, far_weights, k, out, out_stride, far); break;
        default: NAME(dot_two_)(4, x, x_stride, w, w_stride, far_weights, k, out, out_stride, far); break;
        }
}

/* The products of inputs [l, l + 512) of packed rows of x and of up to 64 rows of w, added to those of inputs [0, l).
 * scratch: their accumulators, then the packed weights. */
static void NAME(multiply_block_)(const float *x_tiles, int m, const weight *w, size_t w_stride, int n, int l, int k,
                                  float *restrict scratch)
{
    const int length = k - l < BLOCK_K ? k - l : BLOCK_K;
    float *w_tiles = scratch + BLOCK_M * BLOCK_N * 16;
    NAME(pack_weights_)(w + WEIGHTS_IN((size_t)l), w_stride, n, length, w_tiles);
    tile_block(x_tiles, m, w_tiles, n, (length + 15) / 16, scratch, l == 0);
}

static void NAME(matmul_)(const float *x, size_t x_stride, int m, const void *weights, size_t w_stride, int n, int k,
                          float *out, size_t out_stride, float *restrict scratch)
{
    const weight *w = weights;
    if (m <= FEW_ROWS) {
        NAME(matmul_few_)(x, x_stride, m, w, w_stride, n, k, out, out_stride);
        return;
    }
#ifdef GROUPS
    if (m <= G4_GROUP_ROWS && k <= G4_GROUP_K && k % 16 == 0) {
        NAME(matmul_group_)(x, x_stride, m, w, w_stride, n, k, out, out_stride);
        return;
    }
#endif
    float *x_tiles = scratch + BLOCK_M * BLOCK_N * 16 + BLOCK_N * BLOCK_K;
    for (int i = 0; i < m; i += BLOCK_M) {
        const int block_m = m - i < BLOCK_M ? m - i : BLOCK_M;
        for (int j = 0; j < n; j += BLOCK_N) {
            const int block_n = n - j < BLOCK_N ? n - j : BLOCK_N;
            for (int l = 0; l < k; l += BLOCK_K) {
                if (j == 0 || k > BLOCK_K)
                    pack_x(x + (size_t)i * x_stride + l, x_stride, block_m, k - l < BLOCK_K ? k - l : BLOCK_K, x_tiles);
                NAME(multiply_block_)
                (x_tiles, block_m, w + WEIGHTS_IN((size_t)j * w_stride), w_stride, block_n, l, k, scratch);
            }
            sum_block(scratch, block_m, block_n, out + (size_t)i * out_stride + j, out_stride);
        }
    }
}

static void NAME(matmul_packed_)(const float *x, int m, const void *weights, size_t w_stride, int n, int k, float *out,
                                 size_t out_stride, float *restrict scratch)
{
    const weight *w = weights;
    for (int j = 0; j < n; j += BLOCK_N)
        for (int i = 0; i < m; i += BLOCK_M) {
            const int block_m = m - i < BLOCK_M ? m - i : BLOCK_M, block_n = n - j < BLOCK_N ? n - j : BLOCK_N;
            const weight *rows = w + WEIGHTS_IN((size_t)j * w_stride);
            for (int l = 0; l < k; l += BLOCK_K) {
                const float *tiles = x + packed_block(m, k, i, l);
                NAME(multiply_block_)(tiles, block_m, rows, w_stride, block_n, l, k, scratch);
            }
            sum_block(scratch, block_m, block_n, out + (size_t)i * out_stride + j, out_stride);
        }
}
