/* SPDX-License-Identifier: Apache-2.0 */
/* Products of bfloat16 summed in float32, for processors with instructions for them: precision="fast" of prompts where the
 * weights are bf16, and with AMX of any type.
 *
 * Both sides lie in tiles of 16 rows by 32 inputs, 1 KB each, padded with zeros: a row of x as it is, weights by pairs of
 * inputs, so that one register of 16 lanes has a pair of each of 16 weight rows.
 *
 * bf16 keeps 8 bits of every number. A byte of matmul_int8 keeps 7 of the largest of 32, so this is the more exact of the
 * two (measured: docs/internals.md), and needs no scales in between. Sums are in no stated order: that of
 * VDPBF16PS, a pair at a time, is another than that of TDPBF16PS, which sums even and odd inputs of a tile apart. Both take
 * subnormal numbers for zero.
 *
 * BF16_PRODUCTS names a header with
 *   tiles_begin(), tiles_end()  around the products of a call
 *   tile_products(rows, columns, x, x_stride, w, w_stride, n_tiles, out, out_stride, add_to)
 *                               1 or 2 rows of tiles of x times as many of weights
 */
#include BF16_PRODUCTS

/* 16 rows of pairs of inputs to 16 pairs, each of 16 rows. */
static INLINE void transpose_pairs(__m512i row[16])
{
    __m512i t[16];
    for (int r = 0; r < 16; r += 2) {
        t[r] = _mm512_unpacklo_epi32(row[r], row[r + 1]);
        t[r + 1] = _mm512_unpackhi_epi32(row[r], row[r + 1]);
    }
    for (int r = 0; r < 16; r += 4)
        for (int high = 0; high < 2; high++) { /* pair 2 high, + 1 of each quarter, 4 rows of it */
            row[r + 2 * high] = _mm512_unpacklo_epi64(t[r + high], t[r + 2 + high]);
            row[r + 2 * high + 1] = _mm512_unpackhi_epi64(t[r + high], t[r + 2 + high]);
        }
    for (int p = 0; p < 4; p++) { /* quarters 0 and 2, 1 and 3 of 8 rows */
        t[p] = _mm512_shuffle_i32x4(row[p], row[4 + p], 0x88);
        t[p + 4] = _mm512_shuffle_i32x4(row[p], row[4 + p], 0xdd);
        t[p + 8] = _mm512_shuffle_i32x4(row[8 + p], row[12 + p], 0x88);
        t[p + 12] = _mm512_shuffle_i32x4(row[8 + p], row[12 + p], 0xdd);
    }
    for (int p = 0; p < 8; p++) {
        row[p] = _mm512_shuffle_i32x4(t[p], t[p + 8], 0x88);
        row[p + 8] = _mm512_shuffle_i32x4(t[p], t[p + 8], 0xdd);
    }
}

/* 32 inputs of a row, or the n that are left and zeros. */
static INLINE __m512i tile_row(const float *row, int n)
{
    const __mmask16 low = n >= 16 ? 0xffff : (__mmask16)((1 << n) - 1);
    const __mmask16 high = n >= 32 ? 0xffff : n > 16 ? (__mmask16)((1 << (n - 16)) - 1) : 0;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, row + 16), _mm512_maskz_loadu_ps(low, row));
}

static void tiles_of_rows(const float *x, size_t x_stride, int m, int k, uint16_t *tiles)
{
    for (int l = 0; l < k; l += G4_TILE_INPUTS)
        for (int r = 0; r < G4_TILE_ROWS; r++, tiles += G4_TILE_INPUTS)
            _mm512_storeu_si512(tiles, r < m ? tile_row(x + (size_t)r * x_stride + l, k - l) : _mm512_setzero_si512());
}

static void tiles_of_weights(const float *w, size_t w_stride, int n, int k, uint16_t *tiles)
{
    for (int l = 0; l < k; l += G4_TILE_INPUTS, tiles += G4_TILE) {
        __m512i row[16];
        for (int r = 0; r < 16; r++)
            row[r] = r < n ? tile_row(w + (size_t)r * w_stride + l, k - l) : _mm512_setzero_si512();
        transpose_pairs(row);
        for (int pair = 0; pair < 16; pair++)
            _mm512_storeu_si512(tiles + pair * 32, row[pair]);
    }
}

/* Up to two rows of tiles times up to two of weights, where all 16 rows of each are there. */
static void whole_products(int m, int n, const g4_tiles *x, const g4_tiles *w, int n_tiles, float *out,
                           size_t out_stride, bool add_to)
{
    const uint16_t *xs = x->data, *ws = w->data;
    if (m > G4_TILE_ROWS && n > G4_TILE_ROWS)
        tile_products(2, 2, xs, x->stride, ws, w->stride, n_tiles, out, out_stride, add_to);
    else if (m > G4_TILE_ROWS)
        tile_products(2, 1, xs, x->stride, ws, w->stride, n_tiles, out, out_stride, add_to);
    else if (n > G4_TILE_ROWS)
        tile_products(1, 2, xs, x->stride, ws, w->stride, n_tiles, out, out_stride, add_to);
    else
        tile_products(1, 1, xs, x->stride, ws, w->stride, n_tiles, out, out_stride, add_to);
}

/* Others wait in memory of their own: outputs past the last are nobody's. */
static NOINLINE void some_products(int m, int n, const g4_tiles *x, const g4_tiles *w, int n_tiles, float *out,
                                   size_t out_stride, bool add_to)
{
    float padded[2 * G4_TILE_ROWS][2 * G4_TILE_ROWS] = {{0}};
    for (int r = 0; add_to && r < m; r++)
        memcpy(padded[r], out + (size_t)r * out_stride, (size_t)n * sizeof *out);
    whole_products(m, n, x, w, n_tiles, padded[0], 2 * G4_TILE_ROWS, add_to);
    for (int r = 0; r < m; r++)
        memcpy(out + (size_t)r * out_stride, padded[r], (size_t)n * sizeof *out);
}

static void matmul_tiles(const g4_tiles *x, int m, const g4_tiles *w, int n, int n_tiles, float *out, size_t out_stride,
                         bool add_to)
{
    enum { STEP = 2 * G4_TILE_ROWS };
    tiles_begin();
    for (int i = 0; i < m; i += STEP)
        for (int j = 0; j < n; j += STEP) {
            const int rows = m - i < STEP ? m - i : STEP, columns = n - j < STEP ? n - j : STEP;
            const g4_tiles x_i = g4_tiles_from(x, i), w_j = g4_tiles_from(w, j);
            const bool whole = rows % G4_TILE_ROWS == 0 && columns % G4_TILE_ROWS == 0;
            (whole ? whole_products : some_products)(rows, columns, &x_i, &w_j, n_tiles,
                                                     out + (size_t)i * out_stride + j, out_stride, add_to);
        }
    tiles_end();
}

/* n times the same 16 tiles, 16 KB, which the first-level cache keeps. */
static double spin_bf16(const uint16_t *x, float *out, int n)
{
    enum { N_TILES = 16, SIDE = 2 * G4_TILE_ROWS };
    tiles_begin();
    for (int i = 0; i < n; i++)
        tile_products(2, 2, x, 0, x, 0, N_TILES, out, SIDE, i > 0);
    tiles_end();
    return 2.0 * n * (N_TILES * SIDE * SIDE * G4_TILE_INPUTS);
}
