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

/* ---- decode: a few rows of x, the weights straight from memory, row after row ------------------------------------ */

/* Scale and minimum of every GROUP of 256 inputs of a row. */
typedef struct {
    f32x8 scale[32 / GROUP], min[32 / GROUP];
} NAME(factors_);

#if BLOCK == 32
static INLINE NAME(factors_) NAME(read_factors_)(const uint8_t *w)
{
    NAME(factors_) f;
#if F16_FACTOR
    f.scale[0] = f8_from_f16(w, BLOCK_BYTES);
    f.min[0] = HAS_MIN ? f8_mul(f8_from_f16(w + 2, BLOCK_BYTES), f8_set1(-1)) : f8_set1(0);
#else
    float scale[8];
    for (int block = 0; block < 8; block++)
        scale[block] = mxfp4_scale(w[block * BLOCK_BYTES]);
    f.scale[0] = f8_load(scale);
    f.min[0] = f8_set1(0);
#endif
    return f;
}

static INLINE void NAME(read_pair_)(const uint8_t *w, int pair, i8x32 q[2])
{
    CONCAT(read_pair_of_, WEIGHT)(w + pair * 2 * BLOCK_BYTES, q);
}
#else
static INLINE NAME(factors_) NAME(read_factors_)(const uint8_t *w)
{
    NAME(factors_) f;
    block_values v;
    CONCAT(read_, WEIGHT)(w, &v);
    for (int i = 0; i < 32 / GROUP; i++) {
        f.scale[i] = f8_load(v.scale + i * 8);
        f.min[i] = f8_load(v.min + i * 8);
    }
    return f;
}

/* Of what is read, the compiler drops all but this pair: whole numbers of 256 inputs are half of the registers. */
static INLINE void NAME(read_pair_)(const uint8_t *w, int pair, i8x32 q[2])
{
    block_values v;
    CONCAT(read_, WEIGHT)(w, &v);
    q[0] = i8_low_halves(v.q[2 * pair], v.q[2 * pair + 1]);
    q[1] = i8_high_halves(v.q[2 * pair], v.q[2 * pair + 1]);
}
#endif

/* sum + the products of two blocks, their first halves and their last ones, with the scales of each of those. */
static INLINE f32x8 NAME(add_pair_)(const i8x32 q[2], i8x32 first, i8x32 last, f32x8 first_scales, f32x8 last_scales,
                                    f32x8 sum)
{
#if GROUP == 32
    (void)last_scales;
    const i32x8 dot = FIT ? i32_from_pairs(i16_add_pairs(i16_pairs(q[0], first), q[1], last))
                          : i32_add_fours(i32_fours(q[0], first), q[1], last);
    return f8_fma(first_scales, f8_from_i32(dot), sum);
#else
    sum = f8_fma(first_scales, f8_from_i32(i32_from_pairs(i16_pairs(q[0], first))), sum);
    return f8_fma(last_scales, f8_from_i32(i32_from_pairs(i16_pairs(q[1], last))), sum);
#endif
}

/* sum[i] += the products of 256 inputs of x_i, from `at` on, and w; below[i] += what the minima, or q not being raised, make
 * of them too much: (min or scale) . sums of x_i. */
static INLINE void NAME(add_stretch_)(const int m, const g4_int8_rows *x, size_t at, size_t stride, const uint8_t *w,
                                      f32x8 *sum, f32x8 *below)
{
    const NAME(factors_) f = NAME(read_factors_)(w);
    f32x8 scales[FEW_ROWS][32 / GROUP]; /* lane l of those: l < 4 of the first block of pair l, else of the second */
    for (int i = 0; i < m; i++) {
        const size_t at_i = at + (size_t)i * stride;
        const f32x8 dx = f8_load(x->scale + at_i / 32);
#if GROUP == 32
        scales[i][0] = f8_evens_odds(f8_mul(f.scale[0], dx));
#else
        scales[i][0] = f8_evens_odds(f8_mul(f8_evens(f.scale[0], f.scale[1]), dx));
        scales[i][1] = f8_evens_odds(f8_mul(f8_odds(f.scale[0], f.scale[1]), dx));
#endif
        const float *sums = (GROUP == 32 ? x->sum32 : x->sum16) + at_i / GROUP;
        for (int g = 0; g < 32 / GROUP && (HAS_MIN || RAISE != 0); g++)
            below[i] = f8_fma(HAS_MIN ? f.min[g] : f.scale[g], f8_load(sums + g * 8), below[i]);
    }
#define ADD_PAIR(pair)                                                                                \
    do {                                                                                              \
        i8x32 q[2];                                                                                   \
        NAME(read_pair_)(w, pair, q);                                                                 \
        for (int i = 0; i < m; i++) {                                                                 \
            const int8_t *xs = x->q + at + (size_t)i * stride + (pair) * 64;                          \
            sum[i] = NAME(add_pair_)(q, i8_load(xs), i8_load(xs + 32), f8_spread(scales[i][0], pair), \
                                     f8_spread(scales[i][32 / GROUP - 1], pair), sum[i]);             \
        }                                                                                             \
    } while (0)
    ADD_PAIR(0);
    ADD_PAIR(1);
    ADD_PAIR(2);
    ADD_PAIR(3);
#undef ADD_PAIR
}

/* out[i] = dot(x_i, w) for m rows of x and one of w: rows one after the other are what memory gives fastest. */
static INLINE void NAME(int8_dots_)(const int m, const g4_int8_rows *x, const uint8_t *w, int k, float *out,
                                    size_t out_stride)
{
    const size_t stride = g4_int8_stride((size_t)k);
    f32x8 sum[FEW_ROWS], below[FEW_ROWS];
    int l = 0;
    for (int i = 0; i < m; i++)
        sum[i] = below[i] = f8_set1(0);
    for (; l + 256 <= k; l += 256) {
        prefetch_ahead(w + WEIGHTS_IN(l), WEIGHTS_IN(256));
        NAME(add_stretch_)(m, x, (size_t)l, stride, w + WEIGHTS_IN(l), sum, below);
    }
    if (l < k) { /* x is padded with zeros, too */
        uint8_t padded[WEIGHTS_IN(256)] = {0};
        memcpy(padded, w + WEIGHTS_IN(l), WEIGHTS_IN(k - l));
        NAME(add_stretch_)(m, x, (size_t)l, stride, padded, sum, below);
    }
    for (int i = 0; i < m; i++)
        out[(size_t)i * out_stride] = f8_sum(sum[i]) - (HAS_MIN ? 1.0f : (float)RAISE) * f8_sum(below[i]);
}

/* A row of w stays in the first-level cache for the next four rows of x. */
static void NAME(int8_few_)(const g4_int8_rows *x, int m, const uint8_t *w, size_t w_stride, int n, int k, float *out,
                            size_t out_stride)
{
    const size_t w_bytes = WEIGHTS_IN(w_stride);
    for (int j = 0; j < n; j++, w += w_bytes)
        for (int i = 0; i < m; i += FEW_ROWS) {
            const g4_int8_rows rows = g4_int8_rows_from(x, (size_t)i, (size_t)k);
            float *to = out + (size_t)i * out_stride + (size_t)j;
            switch (m - i) {
            case 1: NAME(int8_dots_)(1, &rows, w, k, to, out_stride); break;
            case 2: NAME(int8_dots_)(2, &rows, w, k, to, out_stride); break;
            case 3: NAME(int8_dots_)(3, &rows, w, k, to, out_stride); break;
            default: NAME(int8_dots_)(4, &rows, w, k, to, out_stride); break;
            }
        }
}

/* ---- prefill ------------------------------------------------------------------------------------------------------ */

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
    if (m <= INT8_FEW) {
        NAME(int8_few_)(x, m, weights, w_stride, n, k, out, out_stride);
        return;
    }
    const size_t stride = g4_int8_stride((size_t)k);
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
                INT8_TILES_OF(GROUP, FIT)(x, (size_t)i, l, block_m, stride, panels, length, acc);
            }
            for (int r = 0; r < block_m; r++)
                memcpy(out + (size_t)(i + r) * out_stride + j, acc + r * INT8_N, (size_t)block_n * sizeof *acc);
        }
}
