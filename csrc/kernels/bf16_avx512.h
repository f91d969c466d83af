/* SPDX-License-Identifier: Apache-2.0 */
/* Products of tiles (body_bf16.h) with AVX-512 BF16: one instruction adds the products of a pair of inputs to 16 sums. */
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}

enum { ROWS_BF16 = 8 }; /* times 2 columns: 16 sums in flight, 2 loads of weights and 8 of x for 16 instructions */

static INLINE __m512bh pairs_of_weights(const uint16_t *w) { return (__m512bh)_mm512_loadu_si512(w); }

static INLINE __m512bh pair_of_x(const uint16_t *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

static INLINE void tile_products(const int rows, const int columns, const uint16_t *x, size_t x_stride,
                                 const uint16_t *w, size_t w_stride, int n_tiles, float *out, size_t out_stride,
                                 bool add_to)
{
    for (int i = 0; i < rows * G4_TILE_ROWS; i += ROWS_BF16) {
        const uint16_t *xs = x + (size_t)(i / G4_TILE_ROWS) * x_stride + (size_t)(i % G4_TILE_ROWS * G4_TILE_INPUTS);
        float *rows_out = out + (size_t)i * out_stride;
        __m512 sum[ROWS_BF16][2];
        for (int r = 0; r < ROWS_BF16; r++)
            for (int c = 0; c < 2; c++)
                sum[r][c] = _mm512_setzero_ps();
        for (int r = 0; add_to && r < ROWS_BF16; r++)
            for (int c = 0; c < columns; c++)
                sum[r][c] = _mm512_loadu_ps(rows_out + (size_t)r * out_stride + c * 16);
        for (int t = 0; t < n_tiles; t++)
            for (int pair = 0; pair < 16; pair++) {
                const uint16_t *ws = w + (size_t)t * G4_TILE + (size_t)pair * 32;
                const __m512bh w0 = pairs_of_weights(ws), w1 = pairs_of_weights(columns > 1 ? ws + w_stride : ws);
                for (int r = 0; r < ROWS_BF16; r++) {
                    const __m512bh two = pair_of_x(xs + (size_t)t * G4_TILE + (size_t)(r * G4_TILE_INPUTS + 2 * pair));
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w0, two);
                    if (columns > 1)
                        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w1, two);
                }
            }
        for (int r = 0; r < ROWS_BF16; r++)
            for (int c = 0; c < columns; c++)
                _mm512_storeu_ps(rows_out + (size_t)r * out_stride + c * 16, sum[r][c]);
    }
}
