/* SPDX-License-Identifier: Apache-2.0 */
/* weighted_sum for one type of cached rows: include after body_matmul.h, with the same macros. */
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
