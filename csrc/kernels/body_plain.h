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

/* out[j] = dot(x, w_j) for up to TILE_N rows: every weight is read once, straight from memory. */
static void NAME(dot_rows_)(const float *x, const weight *w, size_t w_stride, int n, int k, float *out)
{
    const int k16 = k / 16 * 16;
    const weight *row[TILE_N];
    f32x16 sum[TILE_N];
    for (int r = 0; r < TILE_N; r++) {
        row[r] = w + (size_t)(r < n ? r : 0) * w_stride;
        sum[r] = x16_set1(0);
    }
    for (int l = 0; l < k16; l += 16) {
        f32x16 xs = x16_load(x + l);
        for (int r = 0; r < TILE_N; r++) {
            __builtin_prefetch(row[r] + l + PREFETCH_BYTES / sizeof(weight));
            sum[r] = x16_fma(xs, CONCAT(x16_load_, WEIGHT)(row[r] + l), sum[r]);
        }
    }
    if (k16 < k) {
        f32x16 xs = x16_load_some(x + k16, k - k16);
        for (int r = 0; r < TILE_N; r++)
            sum[r] = x16_fma(xs, NAME(load_some_)(row[r] + k16, k - k16), sum[r]);
    }
    for (int r = 0; r < n; r++)
        out[r] = x16_sum(sum[r]);
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
