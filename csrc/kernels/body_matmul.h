/* SPDX-License-Identifier: Apache-2.0 */
/* matmul and weighted_sum for one weight type: include with
 *   WEIGHT        the suffix of the kernels and of vec_load_: f32, f16, bf16
 *   weight        the element type
 *   WEIGHT_TO_F32 its scalar conversion
 *
 * matmul works on the file's own row-major rows: nothing is packed. A block of 32 weight rows stays in the second-level
 * cache while the rows of x pass by in blocks of 24; k goes in chunks of about 1024 so that a tile's rows of x (3 x 4 KB)
 * and of w (4 x 2 KB) stay in the first-level cache. Between chunks the 16-lane accumulators wait in memory, so blocking
 * never changes the order of additions. Where a register holds 8 lanes, a tile runs over the even halves of the blocks of
 * 16 inputs and then over the odd ones: same 16 lanes, full-size tile.
 */
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(base) CONCAT(base, WEIGHT)
#define LOAD_WEIGHT NAME(vec_load_)

/* acc[i][j] (16 lanes at acc + (i * BLOCK_N + j) * 16) += x_i * w_j over n inputs, n a multiple of 16. */
static inline __attribute__((always_inline)) void NAME(tile_)(const int tile_m, const int tile_n, const float *x,
                                                              size_t x_stride, const weight *w, size_t w_stride, int n,
                                                              float *acc, bool first)
{
    for (int half = 0; half < 16; half += VEC_LANES) {
        vec sum[TILE_M][TILE_N], xs[TILE_M];
        for (int i = 0; i < tile_m; i++)
            for (int j = 0; j < tile_n; j++)
                sum[i][j] = first ? vec_zero() : vec_load_f32(acc + (i * BLOCK_N + j) * 16 + half);
        for (int l = half; l < n; l += 16) {
            for (int i = 0; i < tile_m; i++)
                xs[i] = vec_load_f32(x + (size_t)i * x_stride + l);
            for (int j = 0; j < tile_n; j++) {
                vec ws = LOAD_WEIGHT(w + (size_t)j * w_stride + l);
                for (int i = 0; i < tile_m; i++)
                    sum[i][j] = vec_fma(xs[i], ws, sum[i][j]);
            }
        }
        for (int i = 0; i < tile_m; i++)
            for (int j = 0; j < tile_n; j++)
                vec_store(acc + (i * BLOCK_N + j) * 16 + half, sum[i][j]);
    }
}

/* The last k % 16 inputs, padded with zeros to one more block. */
static void NAME(tail_)(const float *x, size_t x_stride, int m, const weight *w, size_t w_stride, int n, int rest,
                        float *acc)
{
    for (int j = 0; j < n; j++) {
        float padded[16] = {0};
        for (int l = 0; l < rest; l++)
            padded[l] = WEIGHT_TO_F32(w[(size_t)j * w_stride + l]);
        f32x16 ws = x16_load(padded);
        for (int i = 0; i < m; i++) {
            float *sum = acc + (i * BLOCK_N + j) * 16;
            x16_store(sum, x16_fma(x16_load_some(x + (size_t)i * x_stride, rest), ws, x16_load(sum)));
        }
    }
}

/* One chunk of inputs for a block of m <= BLOCK_M rows of x and n <= BLOCK_N rows of w. */
static void NAME(chunk_)(const float *x, size_t x_stride, int m, const weight *w, size_t w_stride, int n, int k,
                         float *acc, bool first)
{
    int i = 0;
    for (; i + TILE_M <= m; i += TILE_M) {
        const float *xi = x + (size_t)i * x_stride;
        float *acc_i = acc + i * BLOCK_N * 16;
        int j = 0;
        for (; j + TILE_N <= n; j += TILE_N)
            NAME(tile_)(TILE_M, TILE_N, xi, x_stride, w + (size_t)j * w_stride, w_stride, k, acc_i + j * 16, first);
        for (; j < n; j++)
            NAME(tile_)(TILE_M, 1, xi, x_stride, w + (size_t)j * w_stride, w_stride, k, acc_i + j * 16, first);
    }
    for (; i < m; i++) {
        const float *xi = x + (size_t)i * x_stride;
        float *acc_i = acc + i * BLOCK_N * 16;
        int j = 0;
        for (; j + TILE_N <= n; j += TILE_N)
            NAME(tile_)(1, TILE_N, xi, x_stride, w + (size_t)j * w_stride, w_stride, k, acc_i + j * 16, first);
        for (; j < n; j++)
            NAME(tile_)(1, 1, xi, x_stride, w + (size_t)j * w_stride, w_stride, k, acc_i + j * 16, first);
    }
}

/* m = 1, decode: every weight is read once, straight from memory, so all 16 lanes go in one pass. */
static void NAME(row_)(const float *x, const weight *w, size_t w_stride, int n, int k, float *out)
{
    const int k16 = k / 16 * 16;
    for (int j = 0; j < n; j += TILE_N) {
        const int rows = n - j < TILE_N ? n - j : TILE_N;
        const weight *row[TILE_N];
        f32x16 sum[TILE_N];
        for (int r = 0; r < TILE_N; r++) {
            row[r] = w + (size_t)(j + (r < rows ? r : 0)) * w_stride;
            sum[r] = x16_set1(0);
        }
        for (int l = 0; l < k16; l += 16) {
            f32x16 xs = x16_load(x + l);
            for (int r = 0; r < TILE_N; r++) {
                __builtin_prefetch(row[r] + l + PREFETCH_BYTES / sizeof(weight));
                sum[r] = x16_fma(xs, CONCAT(x16_load_, WEIGHT)(row[r] + l), sum[r]);
            }
        }
        float lanes[TILE_N * 16];
        for (int r = 0; r < TILE_N; r++)
            x16_store(lanes + r * 16, sum[r]);
        for (int r = 0; r < rows; r++) {
            if (k16 < k)
                NAME(tail_)(x + k16, 0, 1, row[r] + k16, 0, 1, k - k16, lanes + r * 16);
            out[j + r] = x16_sum(x16_load(lanes + r * 16));
        }
    }
}

static void NAME(matmul_)(const float *x, size_t x_stride, int m, const void *weights, size_t w_stride, int n, int k,
                          float *out, size_t out_stride)
{
    const weight *w = weights;
    if (m == 1) {
        NAME(row_)(x, w, w_stride, n, k, out);
        return;
    }
    _Alignas(64) float acc[BLOCK_M * BLOCK_N * 16];
    const int k16 = k / 16 * 16;
    const int n_chunks = k16 / BLOCK_K + 1;
    const int chunk = (k16 / n_chunks + 15) / 16 * 16;
    for (int j = 0; j < n; j += BLOCK_N) {
        const int block_n = n - j < BLOCK_N ? n - j : BLOCK_N;
        const weight *wj = w + (size_t)j * w_stride;
        for (int i = 0; i < m; i += BLOCK_M) {
            const int block_m = m - i < BLOCK_M ? m - i : BLOCK_M;
            const float *xi = x + (size_t)i * x_stride;
            for (int l = 0; l == 0 || l < k16; l += chunk) {
                const int length = k16 - l < chunk ? k16 - l : chunk;
                NAME(chunk_)(xi + l, x_stride, block_m, wj + l, w_stride, block_n, length, acc, l == 0);
                if (!length)
                    break;
            }
            if (k16 < k)
                NAME(tail_)(xi + k16, x_stride, block_m, wj + k16, w_stride, block_n, k - k16, acc);
            for (int r = 0; r < block_m; r++)
                for (int c = 0; c < block_n; c++)
                    out[(size_t)(i + r) * out_stride + (size_t)(j + c)] = x16_sum(x16_load(acc + (r * BLOCK_N + c) * 16));
        }
    }
}

/* 16 columns of m <= 4 accumulators over the keys, in registers. */
static inline __attribute__((always_inline)) void NAME(columns_)(const int m, const float *p, size_t p_stride,
                                                                 const weight *v, size_t v_stride, int n_keys, float *acc,
                                                                 size_t acc_stride)
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

static void NAME(weighted_sum_)(const float *p, size_t p_stride, int m, const void *values, size_t v_stride, int n_keys,
                                int d, float *acc, size_t acc_stride)
{
    const weight *v = values;
    const int d16 = d / 16 * 16;
    /* 64 keys x 256 values of float32 are 64 KB: a block of v stays in the second-level cache for all rows. */
    for (int j = 0; j < n_keys; j += 64) {
        const int keys = n_keys - j < 64 ? n_keys - j : 64;
        const weight *vj = v + (size_t)j * v_stride;
        for (int i = 0; i < m; i += 4) {
            const int rows = m - i < 4 ? m - i : 4;
            const float *pi = p + (size_t)i * p_stride + j;
            float *acc_i = acc + (size_t)i * acc_stride;
            for (int c = 0; c < d16; c += 16) {
                if (rows == 4)
                    NAME(columns_)(4, pi, p_stride, vj + c, v_stride, keys, acc_i + c, acc_stride);
                else if (rows == 2)
                    NAME(columns_)(2, pi, p_stride, vj + c, v_stride, keys, acc_i + c, acc_stride);
                else
                    for (int r = 0; r < rows; r++)
                        NAME(columns_)(1, pi + (size_t)r * p_stride, 0, vj + c, v_stride, keys,
                                       acc_i + (size_t)r * acc_stride + c, 0);
            }
            for (int r = 0; r < rows; r++)
                for (int c = d16; c < d; c++)
                    for (int q = 0; q < keys; q++)
                        acc_i[(size_t)r * acc_stride + (size_t)c] =
                            fmaf(pi[(size_t)r * p_stride + (size_t)q], WEIGHT_TO_F32(vj[(size_t)q * v_stride + (size_t)c]),
                                 acc_i[(size_t)r * acc_stride + (size_t)c]);
        }
    }
}

#undef CONCAT_
#undef CONCAT
#undef NAME
#undef LOAD_WEIGHT
#undef WEIGHT
#undef weight
#undef WEIGHT_TO_F32
