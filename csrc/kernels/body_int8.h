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

/* 256 inputs of one weight row: whole numbers by pairs of blocks, scale and minimum of every GROUP. */
typedef struct {
    i8x32 q[8];
    f32x8 scale[32 / GROUP], min[32 / GROUP];
} NAME(stretch_);

#if BLOCK == 32
static INLINE NAME(stretch_) NAME(read_stretch_)(const uint8_t *w)
{
    NAME(stretch_) s;
    for (int pair = 0; pair < 4; pair++)
        CONCAT(read_pair_, WEIGHT)(w + pair * 2 * BLOCK_BYTES, s.q + 2 * pair);
#if F16_FACTOR
    s.scale[0] = f8_from_f16(w, BLOCK_BYTES);
    s.min[0] = HAS_MIN ? f8_mul(f8_from_f16(w + 2, BLOCK_BYTES), f8_set1(-1)) : f8_set1(0);
#else
    float scale[8];
    for (int block = 0; block < 8; block++)
        scale[block] = mxfp4_scale(w[block * BLOCK_BYTES]);
    s.scale[0] = f8_load(scale);
    s.min[0] = f8_set1(0);
#endif
    return s;
}
#else
static INLINE NAME(stretch_) NAME(read_stretch_)(const uint8_t *w)
{
    NAME(stretch_) s;
    block_values v;
    CONCAT(read_, WEIGHT)(w, &v);
    for (int pair = 0; pair < 8; pair += 2) {
        s.q[pair] = i8_low_halves(v.q[pair], v.q[pair + 1]);
        s.q[pair + 1] = i8_high_halves(v.q[pair], v.q[pair + 1]);
    }
    for (int i = 0; i < 32 / GROUP; i++) {
        s.scale[i] = f8_load(v.scale + i * 8);
        s.min[i] = f8_load(v.min + i * 8);
    }
    return s;
}
#endif

/* *sum += scales . products of 256 inputs; two sums, because each fma waits 4 cycles for the last. */
static INLINE void NAME(add_stretch_)(const NAME(stretch_) * s, const int8_t *x, const float *dx, f32x8 sum[2])
{
#if GROUP == 32
    const f32x8 scales = f8_evens_odds(f8_mul(s->scale[0], f8_load(dx)));
#define ADD_PAIR(i)                                                                                              \
    do {                                                                                                         \
        const i8x32 first = i8_load(x + (i) * 64), last = i8_load(x + (i) * 64 + 32);                            \
        const i32x8 dot = FIT ? i32_from_pairs(i16_add(i16_pairs(s->q[2 * (i)], first),                          \
                                                       i16_pairs(s->q[2 * (i) + 1], last)))                      \
                              : i32_add(i32_fours(s->q[2 * (i)], first), i32_fours(s->q[2 * (i) + 1], last));    \
        sum[(i) % 2] = f8_fma(f8_spread(scales, i), f8_from_i32(dot), sum[(i) % 2]);                             \
    } while (0)
#else
    const f32x8 first_scales = f8_evens_odds(f8_mul(f8_evens(s->scale[0], s->scale[1]), f8_load(dx)));
    const f32x8 last_scales = f8_evens_odds(f8_mul(f8_odds(s->scale[0], s->scale[1]), f8_load(dx)));
#define ADD_PAIR(i)                                                                                              \
    do {                                                                                                         \
        const i32x8 first = i32_from_pairs(i16_pairs(s->q[2 * (i)], i8_load(x + (i) * 64)));                     \
        const i32x8 last = i32_from_pairs(i16_pairs(s->q[2 * (i) + 1], i8_load(x + (i) * 64 + 32)));             \
        sum[0] = f8_fma(f8_spread(first_scales, i), f8_from_i32(first), sum[0]);                                 \
        sum[1] = f8_fma(f8_spread(last_scales, i), f8_from_i32(last), sum[1]);                                   \
    } while (0)
#endif
    ADD_PAIR(0);
    ADD_PAIR(1);
    ADD_PAIR(2);
    ADD_PAIR(3);
#undef ADD_PAIR
}

/* Those of m rows of x, and what the minima, or q not being raised, add too much: below += (min or scale) . sums of x. */
static INLINE void NAME(add_rows_)(const int m, const NAME(stretch_) * s, const g4_int8_rows *x, size_t at,
                                   size_t stride, f32x8 sum[][2], f32x8 *below)
{
    for (int i = 0; i < m; i++, at += stride) {
        NAME(add_stretch_)(s, x->q + at, x->scale + at / 32, sum[i]);
        for (int g = 0; g < 32 / GROUP && (HAS_MIN || RAISE); g++)
            below[i] = f8_fma(HAS_MIN ? s->min[g] : s->scale[g],
                              f8_load((GROUP == 32 ? x->sum32 : x->sum16) + at / GROUP + (size_t)g * 8), below[i]);
    }
}

/* out[i] = dot(x_i, w) for m rows of x and one of w. */
static INLINE void NAME(int8_row_)(const int m, const g4_int8_rows *x, const uint8_t *w,
                                                                  int k, float *out, size_t out_stride)
{
    const size_t stride = g4_int8_stride((size_t)k);
    f32x8 sum[FEW_ROWS][2], below[FEW_ROWS];
    int l = 0;
    for (int i = 0; i < m; i++)
        sum[i][0] = sum[i][1] = below[i] = f8_set1(0);
    for (; l + 256 <= k; l += 256) {
        prefetch_ahead(w + WEIGHTS_IN(l), WEIGHTS_IN(256));
        const NAME(stretch_) s = NAME(read_stretch_)(w + WEIGHTS_IN(l));
        NAME(add_rows_)(m, &s, x, (size_t)l, stride, sum, below);
    }
    if (l < k) { /* x is padded with zeros, too */
        uint8_t padded[WEIGHTS_IN(256)] = {0};
        memcpy(padded, w + WEIGHTS_IN(l), WEIGHTS_IN(k - l));
        const NAME(stretch_) s = NAME(read_stretch_)(padded);
        NAME(add_rows_)(m, &s, x, (size_t)l, stride, sum, below);
    }
    for (int i = 0; i < m; i++)
        out[(size_t)i * out_stride] =
            f8_sum(f8_add(sum[i][0], sum[i][1])) - (HAS_MIN ? 1.0f : (float)RAISE) * f8_sum(below[i]);
}

static void NAME(int8_few_)(const g4_int8_rows *x, int m, const uint8_t *w, size_t w_stride, int n, int k, float *out,
                            size_t out_stride)
{
    const size_t w_bytes = WEIGHTS_IN(w_stride);
    for (int j = 0; j < n; j++, w += w_bytes, out++)
        switch (m) {
        case 1: NAME(int8_row_)(1, x, w, k, out, out_stride); break;
        case 2: NAME(int8_row_)(2, x, w, k, out, out_stride); break;
        case 3: NAME(int8_row_)(3, x, w, k, out, out_stride); break;
        default: NAME(int8_row_)(4, x, w, k, out, out_stride); break;
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
    if (m <= FEW_ROWS) {
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
