/* SPDX-License-Identifier: Apache-2.0 */
/* Attention's weighted sums over rows of one plain type, read in place. Include after body_plain.h, with its macros.
 * Keys are prefetched one block ahead, a few cache lines for every 16 columns. */

/* 16 columns of m <= 4 accumulators, kept in registers over all keys. */
static INLINE void NAME(mix_columns_)(const int m, const float *p, size_t p_stride, const weight *v, size_t v_stride,
                                      int n_keys, float *acc, size_t acc_stride)
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

static void NAME(mix_4_rows_)(int m, const float *p, size_t p_stride, const weight *v, size_t v_stride, int n_keys,
                              int d, float *acc, size_t acc_stride, prefetch_rows *next, size_t n_lines)
{
    const int d16 = d / 16 * 16;
    for (int c = 0; c < d16; c += 16) {
        prefetch_lines(next, n_lines);
        switch (m) {
        case 4: NAME(mix_columns_)(4, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        case 3: NAME(mix_columns_)(3, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        case 2: NAME(mix_columns_)(2, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        default: NAME(mix_columns_)(1, p, p_stride, v + c, v_stride, n_keys, acc + c, acc_stride); break;
        }
    }
    for (int i = 0; i < m; i++)
        for (int c = d16; c < d; c++) {
            float *sum = acc + (size_t)i * acc_stride + (size_t)c;
            for (int j = 0; j < n_keys; j++)
                *sum =
                    fmaf(p[(size_t)i * p_stride + (size_t)j], WEIGHT_TO_F32(v[(size_t)j * v_stride + (size_t)c]), *sum);
        }
}

/* acc_i += sum_j p[i][j] * v_j */
static void NAME(mix_rows_)(const float *p, size_t p_stride, int m, const weight *v, size_t v_stride, int n_keys, int d,
                            float *acc, size_t acc_stride, prefetch_rows next)
{
    const size_t n_steps = (size_t)((m + 3) / 4) * (size_t)(d / 16 ? d / 16 : 1);
    const size_t n_lines = (count_lines(&next) + n_steps - 1) / n_steps;
    for (int i = 0; i < m; i += 4) {
        const int rows = m - i < 4 ? m - i : 4;
        NAME(mix_4_rows_)
        (rows, p + (size_t)i * p_stride, p_stride, v, v_stride, n_keys, d, acc + (size_t)i * acc_stride, acc_stride,
         &next, n_lines);
    }
}
