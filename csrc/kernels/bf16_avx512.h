/* SPDX-License-Identifier: Apache-2.0 */
/* Matmul of tiles (body_bf16.h) with AVX-512 BF16. One instruction adds the products of a pair of inputs to 16 sums. */
static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}

enum { ROWS_BF16 = 8 }; /* with 2 columns: 16 sums in flight; 2 loads of x and 8 of weights for 16 instructions */

static INLINE __m512bh pairs_of_x(const uint16_t *x) { return (__m512bh)_mm512_loadu_si512(x); }

static INLINE __m512bh pair_of_weights(const uint16_t *w)
{
    int32_t pair;
    memcpy(&pair, w, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

static INLINE void tile_products(const int rows, const int columns, const uint16_t *w, size_t w_stride,
                                 const uint16_t *x, size_t x_stride, int n_tiles, tile_sums sums, bool add)
{
    for (int j = 0; j < rows * G4_TILE_ROWS; j += ROWS_BF16) {
        const int row = j / G4_TILE_ROWS, from = j % G4_TILE_ROWS;
        const uint16_t *ws = w + (size_t)j * w_stride;
        float *to = sums.at + (size_t)row * sums.down + (size_t)from * sums.stride;
        __m512 sum[ROWS_BF16][2];
        for (int r = 0; r < ROWS_BF16; r++)
            for (int c = 0; c < 2; c++)
                sum[r][c] = _mm512_setzero_ps();
        for (int r = 0; add && r < ROWS_BF16; r++)
            for (int c = 0; c < columns; c++)
                sum[r][c] = _mm512_loadu_ps(to + (size_t)c * sums.right + (size_t)r * sums.stride);
        for (int t = 0; t < n_tiles; t++)
            for (int pair = 0; pair < 16; pair++) {
                const uint16_t *xs = x + (size_t)t * G4_TILE + (size_t)pair * 32;
                const __m512bh x0 = pairs_of_x(xs), x1 = pairs_of_x(columns > 1 ? xs + x_stride : xs);
                for (int r = 0; r < ROWS_BF16; r++) {
                    const __m512bh two =
                        pair_of_weights(ws + (size_t)r * w_stride + (size_t)(t * G4_TILE_INPUTS + 2 * pair));
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x0, two);
                    if (columns > 1)
                        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x1, two);
                }
            }
        for (int r = 0; r < ROWS_BF16; r++)
            for (int c = 0; c < columns; c++)
                _mm512_storeu_ps(to + (size_t)c * sums.right + (size_t)r * sums.stride, sum[r][c]);
    }
}
