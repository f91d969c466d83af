/* SPDX-License-Identifier: Apache-2.0 */
/* matmul in whole numbers, precision="fast": x rounded to bytes by 32 (quantize_rows), against one block format. Include
 * with the macros of body_blocks.h and
 *   HAS_MIN  whether the format has minima
 *   F16_FACTOR  whether a block begins with its scale as f16
 *   FIT      how many 2 * 127 * (the largest q) fit 16 bits; 0 if q has a sign
 *
 *   sum_l x_l w_l = sum over groups of dx (scale * sum q_x q_w - min * sum q_x)
 *
 * The products of a group are exact (8 by 8 bits into 32), so what rounds is x, once, and one fma per group.
 */

/* Each group's scale times that of its x, for one block. */
static inline void NAME(int8_scales_)(const block_values *v, const float *dx, float scales[BLOCK / GROUP])
{
    if (BLOCK == 32)
        scales[0] = v->scale[0] * dx[0];
    else if (GROUP == 32)
        f8_store(scales, f8_mul(f8_load(v->scale), f8_load(dx)));
    else
        x16_store(scales, x16_mul(x16_load(v->scale), x16_load_twice(dx)));
}

/* What the minima, or q not being raised, add too much: *below += (min or scale) . sums of one block of x. */
static inline void NAME(int8_below_)(const block_values *v, const float *sums, float *below_1, f32x8 *below_8)
{
    const float *factors = HAS_MIN ? v->min : v->scale;
    if (!HAS_MIN && RAISE == 0)
        return;
    if (BLOCK == 32)
        *below_1 = fmaf(factors[0], sums[0], *below_1);
    for (int g = 0; g < BLOCK / GROUP / 8; g++)
        *below_8 = f8_fma(f8_load(factors + g * 8), f8_load(sums + g * 8), *below_8);
}

/* out[i][j] = dot(x_i, w_j) for m rows of x, n of w. The weights come straight from memory; several rows at a time,
 * because each waits 4 cycles for its last sum at every 32 values. */
static inline __attribute__((always_inline)) void NAME(int8_dots_)(const int m, const int n, const g4_int8_rows *x,
                                                                   const uint8_t *w, size_t w_bytes, int k, float *out,
                                                                   size_t out_stride)
{
    f32x8 sum[2][4], below_8[2][4];
    float below_1[2][4] = {{0}};
    block_values v;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++)
            sum[i][j] = below_8[i][j] = f8_set1(0);
    for (int l = 0; l < k; l += BLOCK, w += BLOCK_BYTES)
        for (int j = 0; j < n; j++) {
            for (int byte = 0; byte < BLOCK_BYTES; byte += 64) /* the same place in the next n rows */
                __builtin_prefetch(w + (size_t)(j + n) * w_bytes + byte);
            CONCAT(read_, WEIGHT)(w + (size_t)j * w_bytes, &v);
            for (int i = 0; i < m; i++) {
                const g4_int8_rows row = g4_int8_rows_from(x, (size_t)i, (size_t)k);
                float scales[BLOCK / GROUP];
                NAME(int8_scales_)(&v, row.scale + l / 32, scales);
                for (int part = 0; part < BLOCK / 32; part++) {
                    const i8x32 xs = i8_load(row.q + l + part * 32);
                    const f32x8 scale =
                        GROUP == 32 ? f8_set1(scales[part]) : f8_set_halves(scales[2 * part], scales[2 * part + 1]);
                    const i32x8 dot = FIT ? i32_from_pairs(i16_pairs(v.q[part], xs)) : i32_fours(v.q[part], xs);
                    sum[i][j] = f8_fma(scale, f8_from_i32(dot), sum[i][j]);
                }
                NAME(int8_below_)
                (&v, (GROUP == 32 ? row.sum32 : row.sum16) + l / GROUP, &below_1[i][j], &below_8[i][j]);
            }
        }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            const float below = below_1[i][j] + f8_sum(below_8[i][j]);
            out[(size_t)i * out_stride + (size_t)j] = f8_sum(sum[i][j]) - (HAS_MIN ? 1.0f : (float)RAISE) * below;
        }
}

#if BLOCK == 32 && F16_FACTOR
/* The same bits for one row of x and four of w, whose factors are turned into float32 together: one by one that is four of
 * a block's 17 instructions. */
static void NAME(int8_dot_4_)(const g4_int8_rows *x, const uint8_t *w, size_t w_bytes, int k, float *out)
{
    f32x8 sum[4];
    f32x4 below = f4_set1(0);
    float below_4[4], scales[4];
    block_values v;
    for (int j = 0; j < 4; j++)
        sum[j] = f8_set1(0);
    for (int b = 0; b < k / 32; b++, w += BLOCK_BYTES) {
        const f32x4 factors = f4_from_f16(w, w_bytes);
        const i8x32 xs = i8_load(x->q + b * 32);
        f4_store(scales, f4_mul(factors, f4_set1(x->scale[b])));
        if (HAS_MIN)
            below = f4_fma(f4_mul(f4_from_f16(w + 2, w_bytes), f4_set1(-1)), f4_set1(x->sum32[b]), below);
        else if (RAISE)
            below = f4_fma(factors, f4_set1(x->sum32[b]), below);
        for (int j = 0; j < 4; j++) {
            __builtin_prefetch(w + (size_t)(j + 4) * w_bytes);
            CONCAT(read_, WEIGHT)(w + (size_t)j * w_bytes, &v);
            const i32x8 dot = FIT ? i32_from_pairs(i16_pairs(v.q[0], xs)) : i32_fours(v.q[0], xs);
            sum[j] = f8_fma(f8_set1(scales[j]), f8_from_i32(dot), sum[j]);
        }
    }
    f4_store(below_4, below);
    for (int j = 0; j < 4; j++)
        out[j] = f8_sum(sum[j]) - (HAS_MIN ? 1.0f : (float)RAISE) * below_4[j];
}
#else
static inline void NAME(int8_dot_4_)(const g4_int8_rows *x, const uint8_t *w, size_t w_bytes, int k, float *out)
{
    NAME(int8_dots_)(1, 4, x, w, w_bytes, k, out, 0);
}
#endif

/* Decode: a few rows of x. */
static void NAME(int8_few_)(const g4_int8_rows *x, int m, const uint8_t *w, size_t w_stride, int n, int k, float *out,
                            size_t out_stride)
{
    const size_t w_bytes = WEIGHTS_IN(w_stride);
    for (int i = 0; i < m; i += 2) {
        const g4_int8_rows rows = g4_int8_rows_from(x, (size_t)i, (size_t)k);
        float *to = out + (size_t)i * out_stride;
        int j = 0;
        for (; j + 4 <= n; j += 4)
            if (i + 1 < m)
                NAME(int8_dots_)(2, 4, &rows, w + (size_t)j * w_bytes, w_bytes, k, to + j, out_stride);
            else
                NAME(int8_dot_4_)(&rows, w + (size_t)j * w_bytes, w_bytes, k, to + j);
        for (; j < n; j++)
            for (int r = i; r < m && r < i + 2; r++) {
                const g4_int8_rows row = g4_int8_rows_from(x, (size_t)r, (size_t)k);
                NAME(int8_dots_)(1, 1, &row, w + (size_t)j * w_bytes, w_bytes, k, out + (size_t)r * out_stride + j, 0);
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
                i8_store(rows[r] + l + part * 32, v.q[part]);
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
