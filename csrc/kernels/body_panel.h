/* SPDX-License-Identifier: Apache-2.0 */
/* Matrix products by panels of 16 columns, for the encoders' many rows: each output is summed over the inputs in their
 * order, so no lanes have to be added up at the end, which at the head sizes of 64 and 72 would cost as much as the
 * products. */

/* 6 rows x 16 columns: 12 accumulators, 2 of the panel and 1 of x fill the 16 registers of AVX2. */
enum { PANEL_ROWS = 6 };

static INLINE void panel_rows(const int m, const float *x, size_t x_stride, const float *w, int k, float *out,
                              size_t out_stride, int n, bool add_to)
{
    f32x16 sum[PANEL_ROWS];
    for (int i = 0; i < m; i++)
        sum[i] = !add_to   ? x16_set1(0)
                 : n == 16 ? x16_load(out + (size_t)i * out_stride)
                           : x16_load_some(out + (size_t)i * out_stride, n);
    for (int l = 0; l < k; l++) {
        f32x16 ws = x16_load(w + (size_t)l * 16);
        for (int i = 0; i < m; i++)
            sum[i] = x16_fma(x16_set1(x[(size_t)i * x_stride + (size_t)l]), ws, sum[i]);
    }
    for (int i = 0; i < m; i++) {
        if (n == 16)
            x16_store(out + (size_t)i * out_stride, sum[i]);
        else
            x16_store_some(out + (size_t)i * out_stride, sum[i], n);
    }
}

static void matmul_panel(const float *x, size_t x_stride, int m, const float *w, int k, float *out, size_t out_stride,
                         int n, bool add_to)
{
    int i = 0;
    for (; i + PANEL_ROWS <= m; i += PANEL_ROWS)
        panel_rows(PANEL_ROWS, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride, n,
                   add_to);
    for (; i + 2 <= m; i += 2)
        panel_rows(2, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride, n, add_to);
    for (; i < m; i++)
        panel_rows(1, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride, n, add_to);
}

static void pack_panel(const float *w, size_t w_stride, int n, int k, float *panel)
{
    const float *rows[16];
    for (int j = 0; j < 16; j++)
        rows[j] = w + (size_t)(j < n ? j : 0) * w_stride;
    for (int l = 0; l < k; l++)
        for (int j = 0; j < 16; j++)
            panel[(size_t)l * 16 + (size_t)j] = rows[j][l];
}
