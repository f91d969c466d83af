/* SPDX-License-Identifier: Apache-2.0 */
/* Matmul by panels of 16 columns, for the encoders' many rows. Each output sums its inputs in their order, so there are
 * no lanes to add at the end. At head sizes of 64 and 72 that addition would cost as much as the products. */

/* 6 rows x 16 columns: 12 accumulators, 2 registers of the panel and 1 of x, in the 16 registers of AVX2. A register of
 * 16 lanes holds a whole row of sums: 12 rows keep two multipliers busy, each of which takes 4 cycles. */
#if VEC_LANES == 16 && !defined PLAIN_C
enum { PANEL_ROWS = 12 };
#else
enum { PANEL_ROWS = 6 };
#endif

/* m rows of x times the panel, stored in or added to out [m][16]. Unrolled: gcc otherwise keeps the sums in memory
 * before and after the products, a tenth of the time at 64 inputs. */
static INLINE void panel_rows(const int m, const float *x, size_t x_stride, const float *w, int k, float *out,
                              size_t out_stride, bool add_to)
{
    f32x16 sum[PANEL_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < PANEL_ROWS; i++)
        sum[i] = x16_set1(0);
    if (add_to) {
#pragma GCC unroll 12
        for (int i = 0; i < m; i++)
            sum[i] = x16_load(out + (size_t)i * out_stride);
    }
    for (int l = 0; l < k; l++) {
        f32x16 ws = x16_load(w + (size_t)l * 16);
#pragma GCC unroll 12
        for (int i = 0; i < m; i++)
            sum[i] = x16_fma(x16_set1(x[(size_t)i * x_stride + (size_t)l]), ws, sum[i]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < m; i++)
        x16_store(out + (size_t)i * out_stride, sum[i]);
}

static void panel_whole(const float *x, size_t x_stride, int m, const float *w, int k, float *out, size_t out_stride,
                        bool add_to)
{
    int i = 0;
    for (; i + PANEL_ROWS <= m; i += PANEL_ROWS)
        panel_rows(PANEL_ROWS, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride,
                   add_to);
    for (; i + 4 <= m; i += 4)
        panel_rows(4, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride, add_to);
    for (; i + 2 <= m; i += 2)
        panel_rows(2, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride, add_to);
    for (; i < m; i++)
        panel_rows(1, x + (size_t)i * x_stride, x_stride, w, k, out + (size_t)i * out_stride, out_stride, add_to);
}

/* The last panel has fewer than 16 columns: its rows pass through a padded copy. */
static NOINLINE void panel_some(const float *x, size_t x_stride, int m, const float *w, int k, float *out,
                                size_t out_stride, int n, bool add_to)
{
    float padded[PANEL_ROWS][16] = {{0}};
    for (int i = 0; i < m; i += PANEL_ROWS) {
        const int rows = m - i < PANEL_ROWS ? m - i : PANEL_ROWS;
        for (int r = 0; add_to && r < rows; r++)
            memcpy(padded[r], out + (size_t)(i + r) * out_stride, (size_t)n * sizeof *out);
        panel_whole(x + (size_t)i * x_stride, x_stride, rows, w, k, padded[0], 16, add_to);
        for (int r = 0; r < rows; r++)
            memcpy(out + (size_t)(i + r) * out_stride, padded[r], (size_t)n * sizeof *out);
    }
}

static void matmul_panel(const float *x, size_t x_stride, int m, const float *w, int k, float *out, size_t out_stride,
                         int n, bool add_to)
{
    if (n == 16)
        panel_whole(x, x_stride, m, w, k, out, out_stride, add_to);
    else
        panel_some(x, x_stride, m, w, k, out, out_stride, n, add_to);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TRANSPOSES 1
typedef float float4 __attribute__((vector_size(16)));

static inline float4 load4(const float *p)
{
    float4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void store4(float *p, float4 v) { memcpy(p, &v, sizeof v); }

/* Transposes 4 values of each of 4 rows into 4 rows of a panel. */
static inline void transpose4(const float *const rows[4], int l, float *panel)
{
    float4 a = load4(rows[0] + l), b = load4(rows[1] + l), c = load4(rows[2] + l), d = load4(rows[3] + l);
    float4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    store4(panel, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
    store4(panel + 16, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
    ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store4(panel + 32, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
    store4(panel + 48, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
}
#endif
#endif

static void pack_panel(const float *w, size_t w_stride, int n, int k, float *panel)
{
    const float *rows[16];
    int l = 0;
    for (int j = 0; j < 16; j++)
        rows[j] = w + (size_t)(j < n ? j : 0) * w_stride;
#ifdef TRANSPOSES
    for (; l + 4 <= k; l += 4)
        for (int j = 0; j < 16; j += 4)
            transpose4(rows + j, l, panel + (size_t)l * 16 + (size_t)j);
#endif
    for (; l < k; l++)
        for (int j = 0; j < 16; j++)
            panel[(size_t)l * 16 + (size_t)j] = rows[j][l];
}
