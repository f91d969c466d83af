/* SPDX-License-Identifier: Apache-2.0 */
/* Reads rows of float32, f16 or bf16. Include with
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

/* out[i] and out[i][far] = dot(x_i, w) for m rows of x and two rows of w: the dot_two_ of body_matmul.h. */
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

/* out[i][j] = dot(x_i, w_j), the heads of a query against keys: at most 4 rows of x and 3 of w, k a multiple of 16.
 * Where a register holds 8 lanes, the lower halves of the blocks come first: 12 sums, 3 of w and 1 of x fill 16
 * registers. */
static INLINE void NAME(dots_4_by_3_)(const int m, const int n, const float *x, size_t x_stride, const weight *w,
                                      size_t w_stride, int k, float *out, size_t out_stride)
{
    _Alignas(64) float lanes[3][N_HALVES][4 * VEC_LANES];
    for (int half = 0; half < N_HALVES; half++) {
        vec sum[3][4];
        for (int j = 0; j < 3; j++)
            for (int i = 0; i < 4; i++)
                sum[j][i] = vec_zero();
        for (int l = half * VEC_LANES; l < k; l += 16) {
            vec ws[3];
            for (int j = 0; j < n; j++)
                ws[j] = CONCAT(vec_load_, WEIGHT)(w + (size_t)j * w_stride + l);
            for (int i = 0; i < m; i++) {
                const vec xs = vec_load(x + (size_t)i * x_stride + l);
                for (int j = 0; j < n; j++)
                    sum[j][i] = vec_fma(xs, ws[j], sum[j][i]);
            }
        }
        for (int j = 0; j < n; j++)
            for (int i = 0; i < 4; i++)
                vec_store(lanes[j][half] + i * VEC_LANES, sum[j][i]);
    }
    for (int j = 0; j < n; j++) {
        float sums[4];
        x16_sum4(lanes[j][0], 4 * VEC_LANES, sums);
        for (int i = 0; i < m; i++)
            out[(size_t)i * out_stride + j] = sums[i];
    }
}

static INLINE void NAME(dots_by_3_)(const int n, const float *x, size_t x_stride, int m, const weight *w,
                                    size_t w_stride, int k, float *out, size_t out_stride, prefetch_rows next)
{
    const size_t n_steps = (size_t)((m + 3) / 4), n_lines = (count_lines(&next) + n_steps - 1) / n_steps;
#define DOTS(m) NAME(dots_4_by_3_)(m, n, x, x_stride, w, w_stride, k, out, out_stride)
    for (int i = 0; i < m; i += 4, x += 4 * x_stride, out += 4 * out_stride) {
        prefetch_lines(&next, n_lines);
        switch (m - i) {
        case 1: DOTS(1); break;
        case 2: DOTS(2); break;
        case 3: DOTS(3); break;
        default: DOTS(4); break;
        }
    }
#undef DOTS
}

/* A few rows of x, which stay in the first-level cache. Rows of w are read in place, three at a time for 4 rows of x,
 * while the next three are prefetched. This serves the heads of a token that share keys (f16 from memory, one Zen 3
 * core: 8 heads of 512 at 8.8 GB/s, of 256 at 8.7; with the large tile 4.8 and 4.6). The prefetch of the next three is
 * split evenly over the groups of 4 rows of x: 8 heads of 512 went from 5.6 to 7.7 GB/s while memory was slow. */
static void NAME(matmul_group_)(const float *x, size_t x_stride, int m, const weight *w, size_t w_stride, int n, int k,
                                float *out, size_t out_stride)
{
    prefetch_rows next = {.row_bytes = (size_t)k * sizeof *w, .stride_bytes = w_stride * sizeof *w};
    for (int j = 0; j < n; j += 3, w += 3 * w_stride) {
        next.row = (const char *)(w + 3 * w_stride);
        next.n_rows = 3;
        switch (n - j) {
        case 1: NAME(dots_by_3_)(1, x, x_stride, m, w, w_stride, k, out + j, out_stride, next); break;
        case 2: NAME(dots_by_3_)(2, x, x_stride, m, w, w_stride, k, out + j, out_stride, next); break;
        default: NAME(dots_by_3_)(3, x, x_stride, m, w, w_stride, k, out + j, out_stride, next); break;
        }
    }
}

static void NAME(pack_weights_)(const weight *w, size_t w_stride, int n, int k, float *packed)
{
    const int n_blocks = (k + 15) / 16, n_whole = k / 16;
    const size_t half_stride = HALF_STRIDE(TILE_N, n_blocks);
    for (int j = 0; j < (n + TILE_N - 1) / TILE_N * TILE_N; j++) {
        const weight *row = w + (size_t)(j < n ? j : 0) * w_stride; /* fills up a tile, unused */
        for (int b = 0; b < n_blocks; b++) {
            f32x16 block =
                b < n_whole ? CONCAT(x16_load_, WEIGHT)(row + b * 16) : NAME(load_some_)(row + b * 16, k - b * 16);
            x16_store_halves(PACKED(packed, TILE_N, n_blocks, j, b), half_stride, block);
        }
    }
}
