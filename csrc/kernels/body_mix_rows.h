/* SPDX-License-Identifier: Apache-2.0 */
/* Attention's weighted sums over float32 rows. The rows of a few keys at a time are widened into 16 KB, half of the
 * first-level cache, for all rows of weights: read where they lie, 512 floats apart, they evict each other. 256 columns of
 * them at most, so that sums are loaded and stored once for 16 keys (8 rows of 512: 5.6 -> 6.4 GB/s of one Zen 3 core). */
enum { MIX_VALUES = 4096, MIX_WIDTH = 256 };

/* 16 columns of m <= 4 accumulators over the keys, in registers. */
static INLINE void mix_columns(const int m, const float *p, size_t p_stride, const float *v, size_t v_stride,
                               int n_keys, float *acc, size_t acc_stride)
{
    f32x16 sum[4];
    for (int i = 0; i < m; i++)
        sum[i] = x16_load(acc + (size_t)i * acc_stride);
    for (int j = 0; j < n_keys; j++) {
        f32x16 vs = x16_load(v + (size_t)j * v_stride);
        for (int i = 0; i < m; i++)
            sum[i] = x16_fma(x16_set1(p[(size_t)i * p_stride + (size_t)j]), vs, sum[i]);
    }
    for (int i = 0; i < m; i++)
        x16_store(acc + (size_t)i * acc_stride, sum[i]);
}

/* Rows that are wanted next, read while these are multiplied: a few for every 16 columns (6.4 -> 6.9 GB/s, with one row of
 * weights 11.1 -> 12.1). All at once they would be more than the processor has in flight (24 lines on Zen 3). */
typedef struct {
    const char *row;
    size_t row_bytes, stride_bytes;
    int n_rows;
} rows_to_come;

static INLINE void ask_for(rows_to_come *next, int n)
{
    for (int r = 0; r < n && next->n_rows > 0; r++, next->n_rows--, next->row += next->stride_bytes)
        prefetch_ahead(next->row, next->row_bytes, 0);
}

static void mix_4_rows(int m, const float *p, size_t p_stride, const float *v, int n_keys, int d, float *acc,
                       size_t acc_stride, rows_to_come *next)
{
    const size_t v_stride = (size_t)d;
    const int d16 = d / 16 * 16, n_each = d16 ? (next->n_rows * 16 + d16 - 1) / d16 : 0;
    for (int c = 0; c < d16; c += 16) {
        ask_for(next, n_each);
        switch (m) {
        case 4: mix_columns(4, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        case 3: mix_columns(3, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        case 2: mix_columns(2, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        default: mix_columns(1, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        }
    }
    for (int i = 0; i < m; i++)
        for (int c = d16; c < d; c++) {
            float *sum = acc + (size_t)i * acc_stride + (size_t)c;
            for (int j = 0; j < n_keys; j++)
                *sum = fmaf(p[(size_t)i * p_stride + (size_t)j], v[(size_t)j * v_stride + (size_t)c], *sum);
        }
}

/* acc_i += sum_j p[i][j] * v_j; v [n_keys, d] dense. */
static void mix_rows(const float *p, size_t p_stride, int m, const float *v, int n_keys, int d, float *acc,
                     size_t acc_stride, rows_to_come next)
{
    for (int i = 0; i < m; i += 4)
        mix_4_rows(m - i < 4 ? m - i : 4, p + (size_t)i * p_stride, p_stride, v, n_keys, d,
                   acc + (size_t)i * acc_stride, acc_stride, &next);
}
