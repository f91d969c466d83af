/* SPDX-License-Identifier: Apache-2.0 */
/* matmul in whole numbers, precision="fast": x rounded to bytes by 32 (quantize_rows), against one block format. Include
 * with the macros of body_blocks.h and
 *   HAS_MIN  whether the format has minima
 *   RAISE    what makes every q >= 0
 *   FIT      how many 2 * 127 * (the largest q + RAISE) fit 16 bits; 0 if q needs all of its 8 bits, sign included
 *
 *   sum_l x_l w_l = sum over groups of dx (scale * sum q_x q_w - min * sum q_x)
 *
 * The products of a group are exact (8 by 8 bits into 32), so what rounds is x, once, and one fma per group.
 */

/* out[i] = dot(x_i, row) for m <= 2 rows of x; the weights come straight from memory. */
static inline __attribute__((always_inline)) void NAME(int8_dot_)(const int m, const g4_int8_rows *x, const uint8_t *w,
                                                                  int k, float *out, size_t out_stride)
{
    f32x8 sum[2], below[2];
    block_values v;
    for (int i = 0; i < m; i++)
        sum[i] = below[i] = f8_set1(0);
    for (int l = 0; l < k; l += BLOCK, w += BLOCK_BYTES) {
        CONCAT(read_, WEIGHT)(w, &v);
        for (int part = 0; part < BLOCK / 32; part++) {
            for (int i = 0; i < m; i++) {
                const float dx = x->scale[(size_t)i * (size_t)(k / 32) + (size_t)(l / 32 + part)];
                const f32x8 scale = GROUP == 32 ? f8_set1(v.scale[part] * dx)
                                                : f8_set_halves(v.scale[2 * part] * dx, v.scale[2 * part + 1] * dx);
                i32x8 dot = i32_fours(v.q[part], i8_load(x->q + (size_t)i * (size_t)k + (size_t)(l + part * 32)));
                sum[i] = f8_fma(scale, f8_from_i32(dot), sum[i]);
            }
        }
        for (int g = 0; HAS_MIN && g < BLOCK / GROUP; g += 8)
            for (int i = 0; i < m; i++) {
                const float *sums = (GROUP == 32 ? x->sum32 : x->sum16) + (size_t)i * (size_t)(k / GROUP);
                below[i] = BLOCK == 32 ? f8_fma(f8_set1(v.min[0]), f8_set1(sums[l / 32]), below[i])
                                       : f8_fma(f8_load(v.min + g), f8_load(sums + l / GROUP + g), below[i]);
            }
    }
    for (int i = 0; i < m; i++) /* a block of 32 has one minimum, in all 8 lanes */
        out[(size_t)i * out_stride] = f8_sum(sum[i]) - (BLOCK == 32 ? 0.125f : 1.0f) * f8_sum(below[i]);
}

static void NAME(int8_few_)(const g4_int8_rows *x, int m, const uint8_t *w, size_t w_stride, int n, int k, float *out,
                            size_t out_stride)
{
    for (int j = 0; j < n; j++) {
        const uint8_t *row = w + WEIGHTS_IN((size_t)j * w_stride);
        int i = 0;
        for (; i + 2 <= m; i += 2) {
            const g4_int8_rows two = g4_int8_rows_from(x, (size_t)i, (size_t)k);
            NAME(int8_dot_)(2, &two, row, k, out + (size_t)i * out_stride + j, out_stride);
        }
        if (i < m) {
            const g4_int8_rows one = g4_int8_rows_from(x, (size_t)i, (size_t)k);
            NAME(int8_dot_)(1, &one, row, k, out + (size_t)i * out_stride + j, out_stride);
        }
    }
}

/* 8 rows of k <= INT8_K inputs into place in the panel; rows from n on are zero. */
static void NAME(int8_pack_)(const uint8_t *w, size_t w_stride, int n, int k, int8_panel *panel)
{
    block_values v;
    int8_t rows[8][INT8_K];
    for (int r = 0; r < 8; r++)
        for (int l = 0; l < k; l += BLOCK) {
            if (r < n)
                CONCAT(read_, WEIGHT)(w + WEIGHTS_IN((size_t)r * w_stride + (size_t)l), &v);
            else
                memset(&v, 0, sizeof v);
            for (int part = 0; part < BLOCK / 32; part++)
                i8_store(rows[r] + l + part * 32, i8_add(v.q[part], RAISE));
            for (int g = 0; g < BLOCK / GROUP; g++) {
                panel->scale[l / GROUP + g][r] = v.scale[g];
                panel->min[l / GROUP + g][r] = v.min[g] + (float)RAISE * v.scale[g];
            }
        }
    for (int l = 0; l < k; l += 32)
        transpose_fours(rows[0] + l, INT8_K, panel->q[l / 4][0]);
}

static void NAME(matmul_int8_)(const g4_int8_rows *x, int m, const void *weights, size_t w_stride, int n, int k,
                               float *out, size_t out_stride)
{
    if (m <= FEW_ROWS) {
        NAME(int8_few_)(x, m, weights, w_stride, n, k, out, out_stride);
        return;
    }
    _Alignas(64) int8_panel panels[2];
    _Alignas(64) float acc[INT8_M * INT8_N];
    for (int j = 0; j < n; j += INT8_N)
        for (int i = 0; i < m; i += INT8_M) {
            const int block_m = m - i < INT8_M ? m - i : INT8_M, block_n = n - j < INT8_N ? n - j : INT8_N;
            memset(acc, 0, sizeof acc);
            for (int l = 0; l < k; l += INT8_K) {
                const int length = k - l < INT8_K ? k - l : INT8_K;
                for (int half = 0; half < 2; half++)
                    NAME(int8_pack_)
                ((const uint8_t *)weights + WEIGHTS_IN((size_t)(j + half * 8) * w_stride + (size_t)l), w_stride,
                 block_n - half * 8, length, &panels[half]);
                INT8_TILES_OF(GROUP, FIT)(x, (size_t)i, l, block_m, (size_t)k, panels, length, acc);
            }
            for (int r = 0; r < block_m; r++)
                memcpy(out + (size_t)(i + r) * out_stride + j, acc + r * INT8_N, (size_t)block_n * sizeof *acc);
        }
}
