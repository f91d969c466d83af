/* SPDX-License-Identifier: Apache-2.0 */
/* matmul and weighted_sum for one weight type: include with
 *   WEIGHT        the suffix of the kernels and of x16_load_: f32, f16, bf16
 *   weight        the element type
 *   WEIGHT_TO_F32 its scalar conversion
 *
 * matmul reads the file's own row-major rows: no second copy of the weights is kept. 32 weight rows x 512 inputs at a
 * time are widened into 64 KB of scratch for up to 72 rows of x, and the tiles of body_tile.h run over that.
 */
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(base) CONCAT(base, WEIGHT)

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

/* A few rows of x, decode: four weight rows at a time pass all of them while they are in the first-level cache. */
static void NAME(matmul_few_)(const float *x, size_t x_stride, int m, const weight *w, size_t w_stride, int n, int k,
                              float *out, size_t out_stride)
{
    for (int j = 0; j < n; j += TILE_N) {
        const weight *wj = w + (size_t)j * w_stride;
        const int rows = n - j < TILE_N ? n - j : TILE_N;
        for (int i = 0; i < m; i++)
            NAME(dot_rows_)(x + (size_t)i * x_stride, wj, w_stride, rows, k, out + (size_t)i * out_stride + j);
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

static void NAME(matmul_)(const float *x, size_t x_stride, int m, const void *weights, size_t w_stride, int n, int k,
                          float *out, size_t out_stride)
{
    const weight *w = weights;
    if (m <= FEW_ROWS) {
        NAME(matmul_few_)(x, x_stride, m, w, w_stride, n, k, out, out_stride);
        return;
    }
    _Alignas(64) float acc[BLOCK_M * BLOCK_N * 16], x_tiles[BLOCK_M * BLOCK_K], w_tiles[BLOCK_N * BLOCK_K];
    for (int j = 0; j < n; j += BLOCK_N) {
        const int block_n = n - j < BLOCK_N ? n - j : BLOCK_N;
        for (int i = 0; i < m; i += BLOCK_M) {
            const int block_m = m - i < BLOCK_M ? m - i : BLOCK_M;
            for (int l = 0; l < k; l += BLOCK_K) {
                const int length = k - l < BLOCK_K ? k - l : BLOCK_K;
                pack_x(x + (size_t)i * x_stride + l, x_stride, block_m, length, x_tiles);
                NAME(pack_weights_)(w + (size_t)j * w_stride + l, w_stride, block_n, length, w_tiles);
                tile_block(x_tiles, block_m, w_tiles, block_n, (length + 15) / 16, acc, l == 0);
            }
            sum_block(acc, block_m, block_n, out + (size_t)i * out_stride + j, out_stride);
        }
    }
}

/* 16 columns of m <= 4 accumulators over the keys, in registers. */
static inline __attribute__((always_inline)) void NAME(columns_)(const int m, const float *p, size_t p_stride,
                                                                 const weight *v, size_t v_stride, int n_keys,
                                                                 float *acc, size_t acc_stride)
{
    f32x16 sum[4];
    for (int i = 0; i < m; i++)
        sum[i] = x16_load(acc + (size_t)i * acc_stride);
    for (int j = 0; j < n_keys; j++) {
        f32x16 vs = CONCAT(x16_load_, WEIGHT)(v + (size_t)j * v_stride);
        for (int i = 0; i < m; i++)
            sum[i] = x16_fma(x16_set1(p[(size_t)i * p_stride + (size_t)j]), vs, sum[i]);
    }
    for (int i = 0; i < m; i++)
        x16_store(acc + (size_t)i * acc_stride, sum[i]);
}

/* All d columns of m <= 4 rows over a block of keys. */
static void NAME(mix_rows_)(int m, const float *p, size_t p_stride, const weight *v, size_t v_stride, int n_keys, int d,
                            float *acc, size_t acc_stride)
{
    const int d16 = d / 16 * 16;
    for (int c = 0; c < d16; c += 16) {
        if (m == 4)
            NAME(columns_)(4, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride);
        else if (m == 3)
            NAME(columns_)(3, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride);
        else if (m == 2)
            NAME(columns_)(2, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride);
        else
            NAME(columns_)(1, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride);
    }
    for (int i = 0; i < m; i++)
        for (int c = d16; c < d; c++) {
            float *sum = acc + (size_t)i * acc_stride + (size_t)c;
            for (int j = 0; j < n_keys; j++)
                *sum = fmaf(p[(size_t)i * p_stride + j], WEIGHT_TO_F32(v[(size_t)j * v_stride + c]), *sum);
        }
}

static void NAME(weighted_sum_)(const float *p, size_t p_stride, int m, const void *values, size_t v_stride, int n_keys,
                                int d, float *acc, size_t acc_stride)
{
    const weight *v = values;
    /* 64 keys x 256 values of float32 are 64 KB: a block of v stays in the second-level cache for all rows. */
    for (int j = 0; j < n_keys; j += 64) {
        const int keys = n_keys - j < 64 ? n_keys - j : 64;
        const weight *vj = v + (size_t)j * v_stride;
        for (int i = 0; i < m; i += 4) {
            const int rows = m - i < 4 ? m - i : 4;
            const float *pi = p + (size_t)i * p_stride + j;
            NAME(mix_rows_)(rows, pi, p_stride, vj, v_stride, keys, d, acc + (size_t)i * acc_stride, acc_stride);
        }
    }
}

#undef CONCAT_
#undef CONCAT
#undef NAME
#undef WEIGHT
#undef weight
#undef WEIGHT_TO_F32
