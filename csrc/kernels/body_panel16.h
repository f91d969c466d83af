/* SPDX-License-Identifier: Apache-2.0 */
/* Integer matmul by panels of 16 columns, for the encoders with precision="fast". Both sides have 12 bits; up to 256
 * inputs of a row share a scale:
 *
 *   sum_l x_l w_l = sum over groups of dx dw sum q_x q_w       q in -2047..2047, so a group's sum fits 31 bits
 *
 * One instruction multiplies 16-bit integers and adds the products by pairs, twice as many as float32's fma. int8 would
 * need a second instruction to widen its sums, so 8 bits are no faster on AVX2 (one Zen 3 core, multiply-adds/ns: 12
 * bits 83, 7 bits 115, 8 bits 61 as the text's Q8_0, float32 48). With 7 bits an audio tower's output keeps a cosine of
 * only 0.996.
 */
#if defined PLAIN_C
#include "kernels/int16_portable.h"
#elif defined __aarch64__
#include "kernels/int16_neon.h"
#else
#include "kernels/int16_x86.h"
#endif

/* A row's sums are one register on AVX-512, where two units with a latency of 5 cycles need ten sums in flight. One
 * core of a Sapphire Rapids, the other core busy, did 104 Gop/s with 4 rows, 143 with 8, 142 with 12. */
enum { ROWS16 = VEC_LANES == 16 ? 8 : 4, MOST16 = 2047 };

/* sum[i] += x_i . w for m rows of x over k inputs. */
static INLINE void panel16_rows(const int m, const g4_rows16 *x, const g4_panel16 *w, int k, f32x16 sum[ROWS16])
{
    const int stride = x->stride, groups = g4_groups16(stride);
    for (int g = 0; g < g4_groups16(k); g++) {
        const int first = g * G4_GROUP16, end = k - first < G4_GROUP16 ? k : first + G4_GROUP16;
        const f32x16 dw = x16_load(w->scale + g * 16);
        i32x16 dot[ROWS16];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS16; i++)
            dot[i] = i32x16_zero();
        for (int l = first; l < end; l += 4)
#pragma GCC unroll 2
            for (int half = 0; half < 4; half += 2)
#pragma GCC unroll 8
                for (int i = 0; i < m; i++)
                    dot[i] = i32x16_add_pairs(dot[i], w->q + (size_t)(l + half) * 16,
                                              x->q + (size_t)i * (size_t)stride + (size_t)(l + half));
#pragma GCC unroll 8
        for (int i = 0; i < m; i++)
            sum[i] = x16_fma(x16_mul(dw, x16_set1(x->scale[(size_t)i * (size_t)groups + (size_t)g])),
                             x16_from_i32(dot[i]), sum[i]);
    }
}

/* Rows from `row` on, stored in or added to out [m][16]. Unrolled so that the sums stay in registers, as in
 * body_panel.h. */
static INLINE void panel16_block(const int m, const g4_rows16 *x, int row, const g4_panel16 *w, int k, float *out,
                                 size_t out_stride, bool add_to)
{
    const g4_rows16 from = g4_rows16_from(x, row);
    f32x16 sum[ROWS16];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS16; i++)
        sum[i] = x16_set1(0);
    if (add_to) {
#pragma GCC unroll 8
        for (int i = 0; i < m; i++)
            sum[i] = x16_load(out + (size_t)i * out_stride);
    }
    panel16_rows(m, &from, w, k, sum);
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
        x16_store(out + (size_t)i * out_stride, sum[i]);
}

static void panel16_whole(const g4_rows16 *x, int row, int m, const g4_panel16 *w, int k, float *out, size_t out_stride,
                          bool add_to)
{
    int i = 0;
    for (; i + ROWS16 <= m; i += ROWS16)
        panel16_block(ROWS16, x, row + i, w, k, out + (size_t)i * out_stride, out_stride, add_to);
    for (; i + 4 <= m; i += 4)
        panel16_block(4, x, row + i, w, k, out + (size_t)i * out_stride, out_stride, add_to);
    for (; i < m; i++)
        panel16_block(1, x, row + i, w, k, out + (size_t)i * out_stride, out_stride, add_to);
}

/* The last panel has fewer than 16 columns: its rows pass through a padded copy. */
static NOINLINE void panel16_some(const g4_rows16 *x, int m, const g4_panel16 *w, int k, float *out, size_t out_stride,
                                  int n, bool add_to)
{
    float padded[ROWS16][16] = {{0}};
    for (int i = 0; i < m; i += ROWS16) {
        const int rows = m - i < ROWS16 ? m - i : ROWS16;
        for (int r = 0; add_to && r < rows; r++)
            memcpy(padded[r], out + (size_t)(i + r) * out_stride, (size_t)n * sizeof *out);
        panel16_whole(x, i, rows, w, k, padded[0], 16, add_to);
        for (int r = 0; r < rows; r++)
            memcpy(out + (size_t)(i + r) * out_stride, padded[r], (size_t)n * sizeof *out);
    }
}

static void matmul_panel16(const g4_rows16 *x, int m, const g4_panel16 *w, int k, float *out, size_t out_stride, int n,
                           bool add_to)
{
    if (n == 16)
        panel16_whole(x, 0, m, w, k, out, out_stride, add_to);
    else
        panel16_some(x, m, w, k, out, out_stride, n, add_to);
}

/* x * factor in units of max / 2047, rounded to the nearest integer; n is a multiple of 16. All are 0 if the inverse of
 * the unit overflows (max below 6e-36), or if max is 0 or NaN. */
static INLINE void round_to_int16(const float *x, int n, float factor, float max, int16_t *q)
{
    const float inverse = (float)MOST16 / max;
    if (!(max > 0 && inverse < INFINITY)) {
        memset(q, 0, (size_t)n * sizeof *q);
        return;
    }
    const f32x16 f = x16_set1(factor), i = x16_set1(inverse);
    for (int l = 0; l < n; l += 16)
        x16_store_i16(q + l, x16_mul(x16_mul(x16_load(x + l), f), i));
}

/* Rounds up to 256 values, clamped to low..high, to integers in -2047..2047. q ends with zeros up to a multiple of 16.
 * Returns the scale max |x| / 2047; it is NaN if a value is NaN or infinite. All are 0 if the largest is below 6e-36,
 * whose inverse overflows. */
static INLINE float round_group16(const float *x, int n, float low, float high, int16_t q[G4_GROUP16])
{
    const f32x16 least = x16_set1(low), most = x16_set1(high), zero = x16_set1(0);
    const bool clamps = low > -INFINITY || high < INFINITY;
    const int whole = (n + 15) / 16 * 16;
    float values[G4_GROUP16];
    f32x16 largest = zero, poison = zero;
    if (clamps || whole > n) {
        memcpy(values, x, (size_t)n * sizeof *x);
        memset(values + n, 0, (size_t)(whole - n) * sizeof *x);
        for (int l = 0; clamps && l < whole; l += 16) {
            const f32x16 v = x16_load(values + l);
            x16_store(values + l, x16_if_nan(v, v, x16_min(x16_max(v, least), most)));
        }
        memset(values + n, 0, (size_t)(whole - n) * sizeof *x);
        x = values;
    }
    for (int l = 0; l < whole; l += 16) {
        const f32x16 v = x16_load(x + l);
        largest = x16_max(x16_abs(v), largest);
        poison = x16_fma(v, zero, poison);
    }
    const float max = x16_largest(largest), nan = x16_sum(poison);
    round_to_int16(x, whole, 1, nan == 0 ? max : 0, q);
    return max / (float)MOST16 + nan;
}

/* x [m, k], clamped, to int16. */
static void quantize_rows16(const float *x, size_t x_stride, int m, int k, float low, float high, const g4_rows16 *rows)
{
    int16_t q[G4_GROUP16];
    for (int i = 0; i < m; i++) {
        const g4_rows16 to = g4_rows16_from(rows, i);
        for (int l = 0; l < k; l += G4_GROUP16) {
            const int n = k - l < G4_GROUP16 ? k - l : G4_GROUP16;
            int16_t *numbers = n % 16 ? q : to.q + l; /* a row may end within a block of 16 */
            to.scale[l / G4_GROUP16] = round_group16(x + (size_t)i * x_stride + l, n, low, high, numbers);
            if (n % 16)
                memcpy(to.q + l, q, (size_t)(g4_stride16(n)) * sizeof *q);
        }
    }
}

/* Replaces n <= 256 values by e^(x - max), adds them to the 16 lanes of *sum, and returns the largest. */
static INLINE float exp_group16(float *x, int n, f32x16 max, f32x16 *sum)
{
    f32x16 largest = x16_set1(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 e = x16_exp_negative(x16_sub(x16_load(x + i), max));
        x16_store(x + i, e);
        *sum = x16_add(*sum, e);
        largest = x16_max(e, largest);
    }
    if (i < n) {
        x16_store_some(x + i, x16_exp_negative(x16_sub(x16_load_some(x + i, n - i), max)), n - i);
        *sum = x16_add(*sum, x16_load_some(x + i, n - i));
        largest = x16_max(x16_load_some(x + i, n - i), largest);
    }
    return x16_largest(largest);
}

/* Each row's softmax as int16. The bits are those of softmax followed by quantize_rows16, but the row is read three
 * times instead of five. x is scratch afterwards. */
static void softmax_rows16(float *x, size_t x_stride, int m, int n, const g4_rows16 *rows)
{
    int16_t q[G4_GROUP16];
    for (int i = 0; i < m; i++, x += x_stride) {
        const g4_rows16 to = g4_rows16_from(rows, i);
        const f32x16 max = x16_set1(row_max(x, n));
        f32x16 sum = x16_set1(0);
        for (int l = 0; l < n; l += G4_GROUP16)
            to.scale[l / G4_GROUP16] = exp_group16(x + l, n - l < G4_GROUP16 ? n - l : G4_GROUP16, max, &sum);
        const float factor = 1.0f / x16_sum(sum);
        for (int l = 0; l < n; l += G4_GROUP16) {
            const int length = n - l < G4_GROUP16 ? n - l : G4_GROUP16, whole = (length + 15) / 16 * 16;
            float *scale = &to.scale[l / G4_GROUP16], padded[G4_GROUP16], *from = x + l;
            const float most = *scale * factor;
            if (whole > length) {
                memcpy(padded, from, (size_t)length * sizeof *from);
                memset(padded + length, 0, (size_t)(whole - length) * sizeof *from);
                from = padded;
            }
            round_to_int16(from, whole, factor, most, whole > length ? q : to.q + l);
            if (whole > length)
                memcpy(to.q + l, q, (size_t)g4_stride16(length) * sizeof *q);
            *scale = most / (float)MOST16;
        }
    }
}

/* Rows w [n, k] as a panel; rows past n are zero. */
static void pack_panel16(const float *w, size_t w_stride, int n, int k, const g4_panel16 *panel)
{
    int16_t rows[16][G4_GROUP16] = {{0}};
    for (int l = 0; l < k; l += G4_GROUP16) {
        const int length = k - l < G4_GROUP16 ? k - l : G4_GROUP16;
        int16_t *to = panel->q + (size_t)l * 16;
        for (int j = 0; j < 16; j++)
            panel->scale[l / G4_GROUP16 * 16 + j] =
                j < n ? round_group16(w + (size_t)j * w_stride + l, length, -INFINITY, INFINITY, rows[j]) : 0;
        for (int i = 0; i < g4_stride16(length); i += 2)
            for (int j = 0; j < 16; j++)
                memcpy(to + i * 16 + j * 2, &rows[j][i], 2 * sizeof *to);
    }
}
