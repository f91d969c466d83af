/* SPDX-License-Identifier: Apache-2.0 */
/* Integer matmul of precision="fast": x rounded to int8 in blocks of 32 (quantize_rows), times one block format.
 * Include with the macros of body_blocks.h and
 *   HAS_MIN        whether the format has minima
 *   F16_FACTOR     whether a block begins with its scale as f16
 *   SUMS_IN_INT16  how many products of 2 * 127 * the largest q fit 16 bits, as INT8_TILES has it; 0 if q is signed
 *
 *   sum_l x_l w_l = sum over groups of dx (scale * sum q_x q_w - min * sum q_x)
 *
 * The products of a group are exact (8 by 8 bits into 32). Rounding happens only in x, once, and in one fma per group.
 */

/* ---- decode: a few rows of x, weights read in place -------------------------------------------------------------- */

/* Scale and minimum of each GROUP of 256 inputs of a row. */
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
    CONCAT(read_pair_of_, WEIGHT)(w + pair * BLOCK_BYTES, q);
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

/* The compiler drops everything read except this pair: the integers of 256 inputs would take half of the registers. */
static INLINE void NAME(read_pair_)(const uint8_t *w, int pair, i8x32 q[2])
{
    block_values v;
    CONCAT(read_, WEIGHT)(w, &v);
    q[0] = i8_low_halves(v.q[pair], v.q[pair + 4]);
    q[1] = i8_high_halves(v.q[pair], v.q[pair + 4]);
}
#endif

/* Dot products q . x of 8 blocks. GROUP 32: dot[0] of whole blocks. GROUP 16, where each half has its own scale: dot[0]
 * of the first halves, dot[1] of the last halves. q and x hold pairs of blocks: both first halves, then both last
 * halves. */
static INLINE void NAME(dot_blocks_)(const i8x32 q[4][2], const int8_t *x, i32x8 *dot)
{
#define FIRST(pair) q[pair][0], i8_load(x + (pair) * 64)
#define LAST(pair) q[pair][1], i8_load(x + (pair) * 64 + 32)
#if GROUP == 32 && SUMS_IN_INT16
#define WHOLE(pair) i16_add_pairs(i16_pairs(FIRST(pair)), LAST(pair))
    dot[0] = i32_sums_of_pairs(WHOLE(0), WHOLE(1), WHOLE(2), WHOLE(3), SUMS_IN_INT16 / 4);
#undef WHOLE
#elif GROUP == 32
#define WHOLE(pair) i32_add_fours(i32_fours(FIRST(pair)), LAST(pair))
    dot[0] = i32_sums_of_fours(WHOLE(0), WHOLE(1), WHOLE(2), WHOLE(3));
#undef WHOLE
#else
    dot[0] = i32_sums_of_pairs(i16_pairs(FIRST(0)), i16_pairs(FIRST(1)), i16_pairs(FIRST(2)), i16_pairs(FIRST(3)),
                               SUMS_IN_INT16 / 2);
    dot[1] = i32_sums_of_pairs(i16_pairs(LAST(0)), i16_pairs(LAST(1)), i16_pairs(LAST(2)), i16_pairs(LAST(3)),
                               SUMS_IN_INT16 / 2);
#endif
#undef FIRST
#undef LAST
}

/* Rows of w that a stretch has in registers. Two share the loads of x, which saves 5 to 10 % of the time with 32
 * registers, if factors take few of them (blocks of 256 take more) and no sign must be moved to x. */
#if VEC_LANES == 16 && !defined PLAIN_C && BLOCK == 32 && SUMS_IN_INT16
#define TOGETHER 2
#else
#define TOGETHER 1
#endif

/* sum[r][i] += products of row r of w (`all` TOGETHER, `far_bytes` apart, or one) and 256 inputs of x_i from `at`, one
 * lane per block of 32 (8 lanes). correction[r][i] += (min or scale) . sums of x_i, the correction for block minima or
 * the zero point. Blocks from n_blocks on are ignored. */
static INLINE void NAME(add_stretch_)(const int m, const bool all, const int n_blocks, const g4_int8_rows *x, size_t at,
                                      size_t stride, const uint8_t *w, size_t far_bytes, few_sums *sum,
                                      few_sums *correction)
{
    const int n_rows = all ? TOGETHER : 1;
    NAME(factors_) f[TOGETHER];
    i8x32 q[TOGETHER][4][2];
#pragma GCC unroll 2
    for (int r = 0; r < n_rows; r++) {
        const uint8_t *row = w + (size_t)r * far_bytes;
        f[r] = NAME(read_factors_)(row);
        if (n_blocks < 8) { /* the others belong to another row, or to none, and 0 × inf is NaN */
            f[r].scale[0] = f8_first(f[r].scale[0], n_blocks);
            f[r].min[0] = f8_first(f[r].min[0], n_blocks);
        }
        NAME(read_pair_)(row, 0, q[r][0]);
        NAME(read_pair_)(row, 1, q[r][1]);
        NAME(read_pair_)(row, 2, q[r][2]);
        NAME(read_pair_)(row, 3, q[r][3]);
    }
#pragma GCC unroll 1 /* once unrolled, 4 rows of Q4_K took the time of 7 */
    for (int i = 0; i < m; i++) {
        const size_t at_i = at + (size_t)i * stride;
        const f32x8 dx = f8_load(x->scale + at_i / 32);
        const float *sums = (GROUP == 32 ? x->sum32 : x->sum16) + at_i / GROUP;
        i32x8 dot[TOGETHER][32 / GROUP];
#pragma GCC unroll 2
        for (int r = 0; r < n_rows; r++)
            NAME(dot_blocks_)(q[r], x->q + at_i, dot[r]);
#pragma GCC unroll 2
        for (int r = 0; r < n_rows; r++) {
#if GROUP == 32
            sum[r][i] = f8_fma(f8_mul(f[r].scale[0], dx), f8_from_i32(dot[r][0]), sum[r][i]);
#else
            const f32x8 evens = f8_evens(f[r].scale[0], f[r].scale[1]), odds = f8_odds(f[r].scale[0], f[r].scale[1]);
            sum[r][i] = f8_fma(f8_mul(evens, dx), f8_from_i32(dot[r][0]), sum[r][i]);
            sum[r][i] = f8_fma(f8_mul(odds, dx), f8_from_i32(dot[r][1]), sum[r][i]);
#endif
            for (int g = 0; g < 32 / GROUP && (HAS_MIN || ZERO_POINT != 0); g++)
                correction[r][i] =
                    f8_fma(HAS_MIN ? f[r].min[g] : f[r].scale[g], f8_load(sums + g * 8), correction[r][i]);
        }
    }
}

static INLINE void NAME(add_some_)(const int m, int n_blocks, const g4_int8_rows *x, size_t at, size_t stride,
                                   const uint8_t *w, few_sums *sum, few_sums *correction)
{
    NAME(add_stretch_)(m, false, n_blocks, x, at, stride, w, 0, sum, correction);
}

/* The tail of a row whose length is no multiple of 256, where no readable memory follows. It is copied, which costs as
 * much as two stretches of 256 inputs. */
static NOINLINE void NAME(add_end_)(int m, int n_inputs, const g4_int8_rows *x, size_t at, size_t stride,
                                    const uint8_t *w, few_sums *sum, few_sums *correction)
{
    uint8_t end[WEIGHTS_IN(256)];
    memset(end, 0, sizeof end);
    memcpy(end, w, WEIGHTS_IN(n_inputs));
    NAME(add_some_)(m, n_inputs / 32, x, at, stride, end, sum, correction);
}

/* out[i] and out[i][far] = dot(x_i, w) for m rows of x and two rows of w (body_matmul.h says why two). */
static INLINE void NAME(int8_dots_)(const int m, const g4_int8_rows *x, const uint8_t *w, size_t far_bytes, int k,
                                    bool reads_on, float *out, size_t out_stride, int far)
{
    const size_t stride = g4_int8_stride((size_t)k);
    few_sums sum[2], correction[2];
    for (int i = 0; i < m; i++)
        sum[0][i] = sum[1][i] = correction[0][i] = correction[1][i] = f8_set1(0);
    int l = 0;
    for (; l + 256 <= k; l += 256)
        for (int r = 0; r < 2; r += TOGETHER) {
            const uint8_t *stretch = w + (size_t)r * far_bytes + WEIGHTS_IN(l);
            for (int near = 0; near < TOGETHER; near++)
                prefetch_ahead(stretch + (size_t)near * far_bytes, WEIGHTS_IN(256), AHEAD_BYTES);
            NAME(add_stretch_)
            (m, true, 8, x, (size_t)l, stride, stretch, far_bytes, sum + r, correction + r);
        }
    for (int r = 0; r < 2 && l < k; r++) {
        const uint8_t *end = w + (size_t)r * far_bytes + WEIGHTS_IN(l);
        few_sums s, b; /* copies: arrays whose address is taken are not kept in registers */
        memcpy(s, sum[r], sizeof s);
        memcpy(b, correction[r], sizeof b);
        if (reads_on)
            NAME(add_some_)(m, (k - l) / 32, x, (size_t)l, stride, end, &s, &b);
        else
            NAME(add_end_)(m, k - l, x, (size_t)l, stride, end, &s, &b);
        memcpy(sum[r], s, sizeof s);
        memcpy(correction[r], b, sizeof b);
    }
    for (int r = 0; r < 2; r++)
        for (int i = 0; i < m; i++)
            out[(size_t)i * out_stride + (size_t)(r * far)] =
                f8_sum(f8_minus_product(sum[r][i], f8_set1(HAS_MIN ? 1.0f : (float)ZERO_POINT), correction[r][i]));
}

static void NAME(int8_few_)(const g4_int8_rows *x, int m, const uint8_t *w, size_t w_stride, int n, int k, float *out,
                            size_t out_stride)
{
    const int far = n / 2;
    const size_t w_bytes = WEIGHTS_IN(w_stride), far_bytes = (size_t)far * w_bytes;
    for (int j = 0; j < n - far; j++, w += w_bytes, out++) {
        const bool reads_on = (size_t)(n - far - 1 - j) * w_bytes >= WEIGHTS_IN(256);
        switch (m) {
        case 1: NAME(int8_dots_)(1, x, w, far_bytes, k, reads_on, out, out_stride, far); break;
        case 2: NAME(int8_dots_)(2, x, w, far_bytes, k, reads_on, out, out_stride, far); break;
        case 3: NAME(int8_dots_)(3, x, w, far_bytes, k, reads_on, out, out_stride, far); break;
        case 4: NAME(int8_dots_)(4, x, w, far_bytes, k, reads_on, out, out_stride, far); break;
        case 5: NAME(int8_dots_)(5, x, w, far_bytes, k, reads_on, out, out_stride, far); break;
        default: NAME(int8_dots_)(6, x, w, far_bytes, k, reads_on, out, out_stride, far); break;
        }
    }
}
_Static_assert(G4_INT8_FEW == 6, "the cases");
#undef TOGETHER

/* ---- prefill ----------------------------------------------------------------------------------------------------- */

/* Packs 8 rows of k <= INT8_K inputs into a half of the panel. If only n >= 1 rows exist, the first row fills the
 * rest; those products are unused. For formats with a zero point, min holds zero point times scale; only for Q4_0
 * (ZERO_POINT 8) the tile subtracts the zero point itself. */
#if BLOCK == 32
static INLINE void NAME(pack_factors_)(const uint8_t *block, size_t row_bytes, int n, float scale[8], float min[8])
{
    if (F16_FACTOR && n >= 8) {
        const f32x8 scales = f8_from_f16(block, row_bytes);
        f8_store(scale, scales);
        if (HAS_MIN)
            f8_store(min, f8_mul(f8_from_f16(block + 2, row_bytes), f8_set1(-1)));
        else if (ZERO_POINT > 0 && ZERO_POINT != 8)
            f8_store(min, f8_mul(scales, f8_set1((float)ZERO_POINT)));
        return;
    }
    for (int r = 0; r < 8; r++) {
        block_values v;
        CONCAT(read_, WEIGHT)(block + (r < n ? (size_t)r : 0) * row_bytes, &v);
        scale[r] = v.scale[0];
        min[r] = v.min[0] + (float)ZERO_POINT * v.scale[0];
    }
}

static void NAME(int8_pack_)(const uint8_t *w, size_t w_stride, int n, int k, int8_panel *panel, int half)
{
    const size_t row_bytes = WEIGHTS_IN(w_stride);
    for (int l = 0; l < k; l += 32) {
        const uint8_t *block = w + WEIGHTS_IN((size_t)l);
        int8_t rows[8][32];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            block_values v;
            CONCAT(read_, WEIGHT)(block + (r < n ? (size_t)r : 0) * row_bytes, &v);
            i8_store(rows[r], v.q[0]);
        }
        transpose_fours(rows[0], 32, panel->q[l / 4][half][0], FOURS_STRIDE);
        NAME(pack_factors_)(block, row_bytes, n, panel->scale[l / 32][half], panel->min[l / 32][half]);
    }
}
#else
static void NAME(int8_pack_)(const uint8_t *w, size_t w_stride, int n, int k, int8_panel *panel, int half)
{
    for (int l = 0; l < k; l += BLOCK) {
        int8_t rows[8][BLOCK];
        for (int r = 0; r < 8; r++) {
            block_values v;
            CONCAT(read_, WEIGHT)(w + WEIGHTS_IN((size_t)(r < n ? r : 0) * w_stride + (size_t)l), &v);
            for (int part = 0; part < BLOCK / 32; part++)
                i8_store(rows[r] + part * 32, v.q[part]);
            for (int g = 0; g < BLOCK / GROUP; g++) {
                panel->scale[l / GROUP + g][half][r] = v.scale[g];
                panel->min[l / GROUP + g][half][r] = v.min[g] + (float)ZERO_POINT * v.scale[g];
            }
        }
        for (int part = 0; part < BLOCK / 32; part++)
            transpose_fours(rows[0] + part * 32, BLOCK, panel->q[l / 4 + part * 8][half][0], FOURS_STRIDE);
    }
}
#endif

#ifdef INT8_PACK
#if BLOCK == 32
static INLINE void NAME(pack_8_factors_)(const uint8_t *block, size_t row_bytes, int8_panel *panel, int group, int half)
{
    NAME(pack_factors_)(block, row_bytes, 8, panel->scale[group][half], panel->min[group][half]);
}
#else
static INLINE void NAME(pack_8_factors_)(const uint8_t *block, size_t row_bytes, int8_panel *panel, int group, int half)
{
    enum { N_GROUPS = BLOCK / GROUP, STRIDE = sizeof(float[16]) }; /* bytes from a group of the panel to the next */
    float scales[8][16], mins[8][16];
    for (int r = 0; r < 8; r++) {
        block_values v; /* the compiler drops what is read of q */
        CONCAT(read_, WEIGHT)(block + (size_t)r * row_bytes, &v);
        for (int g = 0; g < N_GROUPS; g++) {
            scales[r][g] = v.scale[g];
            mins[r][g] = v.min[g] + (float)ZERO_POINT * v.scale[g];
        }
    }
    for (int g = 0; g < N_GROUPS; g += 8) {
        const int to = (group + g) * STRIDE + half * (STRIDE / 2);
        transpose_fours((const int8_t *)scales + g * sizeof(float), STRIDE, (int8_t *)panel->scale + to, STRIDE);
        transpose_fours((const int8_t *)mins + g * sizeof(float), STRIDE, (int8_t *)panel->min + to, STRIDE);
    }
}
#endif

/* int8_pack_ for both halves, of 16 rows that all exist. */
static void NAME(int8_pack_16_)(const uint8_t *w, size_t w_stride, int k, int8_panel *panel)
{
    const size_t row_bytes = WEIGHTS_IN(w_stride);
    for (int l = 0; l < k; l += BLOCK) {
        const uint8_t *block = w + WEIGHTS_IN((size_t)l);
        CONCAT(fours_of_, WEIGHT)(block, row_bytes, &panel->q[l / 4]);
        for (int half = 0; half < 2; half++)
            NAME(pack_8_factors_)(block + (size_t)half * 8 * row_bytes, row_bytes, panel, l / GROUP, half);
    }
}
#endif

/* Packs n >= 1 rows into a panel; the first one fills up the rest. */
static void NAME(int8_pack_panel_)(const uint8_t *w, size_t w_stride, int n, int k, int8_panel *panel)
{
#ifdef INT8_PACK
    if (n >= 16) {
        NAME(int8_pack_16_)(w, w_stride, k, panel);
        return;
    }
#endif
    for (int half = 0; half < 2; half++) {
        const int row = half * 8 < n ? half * 8 : 0;
        NAME(int8_pack_)(w + WEIGHTS_IN((size_t)row * w_stride), w_stride, n - row, k, panel, half);
    }
}

/* The weights of the next panels: inputs from l on of the same rows or, at their end, the first ones of the rows after
 * them. */
static INLINE next_rows NAME(int8_next_)(const uint8_t *w, size_t w_stride, int l, int k)
{
    const size_t row_bytes = WEIGHTS_IN(w_stride);
    const bool same_rows = l < k;
    const int left = same_rows ? k - l : k, length = left < INT8_K ? left : INT8_K;
    const uint8_t *next = same_rows ? w + WEIGHTS_IN((size_t)l) : w + INT8_N * row_bytes;
    return (next_rows){(const char *)next, row_bytes, WEIGHTS_IN((size_t)length), INT8_N};
}

static void NAME(matmul_int8_)(const g4_int8_rows *x, int m, const void *weights, size_t w_stride, int n, int k,
                               float *out, size_t out_stride, float *scratch)
{
    if (!x->by_fours) {
        NAME(int8_few_)(x, m, weights, w_stride, n, k, out, out_stride);
        return;
    }
    const size_t stride = g4_int8_stride((size_t)k);
    int8_panel *panels = ((int8_scratch *)scratch)->panels;
    float *acc = ((int8_scratch *)scratch)->acc;
    for (int j = 0; j < n; j += INT8_N)
        for (int i = 0; i < m; i += INT8_M) {
            const int block_m = m - i < INT8_M ? m - i : INT8_M, block_n = n - j < INT8_N ? n - j : INT8_N;
            memset(acc, 0, INT8_M * INT8_N * sizeof *acc);
            for (int l = 0; l < k; l += INT8_K) {
                const int length = k - l < INT8_K ? k - l : INT8_K;
                for (int p = 0; p < INT8_PANELS; p++) {
                    const int row = p * 16 < block_n ? p * 16 : 0; /* rows beyond n: the first ones again */
                    NAME(int8_pack_panel_)
                    ((const uint8_t *)weights + WEIGHTS_IN((size_t)(j + row) * w_stride + (size_t)l), w_stride,
                     block_n - row, length, &panels[p]);
                }
                (ZERO_POINT == 8 ? int8_tiles_32_8_lowered : INT8_TILES_OF(GROUP, SUMS_IN_INT16))(
                    x, (size_t)i, l, block_m, stride, panels, length, acc,
                    NAME(int8_next_)((const uint8_t *)weights + WEIGHTS_IN((size_t)j * w_stride), w_stride, l + INT8_K,
                                     k));
            }
            for (int r = 0; r < block_m; r++)
                memcpy(out + (size_t)(i + r) * out_stride + j, acc + r * INT8_N, (size_t)block_n * sizeof *acc);
        }
}
