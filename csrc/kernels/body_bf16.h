/* SPDX-License-Identifier: Apache-2.0 */
/* bfloat16 matmul with float32 sums, on processors with bf16 instructions. Used by precision="fast" for prompts: with
 * bf16 weights, and with AMX for any type.
 *
 * A tile is 16 rows by 32 inputs. Weights are rows of bf16 in their own order, padded with zeros to whole tiles. x lies
 * in tiles of 1 KB, ordered by pairs of inputs: one register of 16 lanes holds a pair of each of 16 rows. x is the side
 * that is reordered because that happens once for all weights. The price: sums come as [weight row][row of x] and are
 * transposed when stored, 0.1 of an instruction for a product of 1536 inputs.
 *
 * bf16 keeps 8 bits of every number. An int8 of matmul_int8 keeps 7 bits of the largest of 32, so bf16 is the more
 * exact (measured: docs/internals.md), and it needs no scales in between. The order of sums is unspecified: VDPBF16PS
 * adds a pair at a time, TDPBF16PS sums even and odd inputs of a tile separately. Both treat subnormal numbers as zero.
 *
 * BF16_PRODUCTS names a header with
 *   tiles_begin(), tiles_end()  around the products of a call
 *   tile_products(rows, columns, w, w_stride, x, x_stride, n_tiles, sums, add)
 *                               rows x 16 rows of weights times columns x 16 rows of x; rows and columns are 1 or 2
 */
enum { TILE_SUMS = G4_TILE_ROWS * G4_TILE_ROWS, TILE_PAIR = 2 * G4_TILE_ROWS };

/* Where tile_products stores its sums: squares of 16 x 16, whose rows are `stride` apart. `right` is the offset to the
 * next 16 rows of x, `down` to the next 16 rows of weights. */
typedef struct {
    float *at;
    size_t stride, right, down;
} tile_sums;

#include BF16_PRODUCTS

/* Transposes 16 x 16 elements of 32 bits, or of pairs of 16 bits. */
static INLINE void transpose_16(__m512i row[16])
{
    __m512i t[16];
    for (int r = 0; r < 16; r += 2) {
        t[r] = _mm512_unpacklo_epi32(row[r], row[r + 1]);
        t[r + 1] = _mm512_unpackhi_epi32(row[r], row[r + 1]);
    }
    for (int r = 0; r < 16; r += 4)
        for (int high = 0; high < 2; high++) { /* columns 2 high and 2 high + 1 of each quarter, 4 rows each */
            row[r + 2 * high] = _mm512_unpacklo_epi64(t[r + high], t[r + 2 + high]);
            row[r + 2 * high + 1] = _mm512_unpackhi_epi64(t[r + high], t[r + 2 + high]);
        }
    for (int p = 0; p < 4; p++) { /* quarters 0 and 2, then 1 and 3, of 8 rows */
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

/* The lanes of inputs 0 to 15, and of 16 to 31, of n. */
static INLINE __mmask16 low_lanes(int n) { return n >= 16 ? 0xffff : (__mmask16)((1 << n) - 1); }
static INLINE __mmask16 high_lanes(int n) { return n > 16 ? low_lanes(n - 16) : 0; }

/* 32 inputs of a row; only n if n < 32, then zeros. */
static INLINE __m512i tile_row(const float *row, int n)
{
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high_lanes(n), row + 16),
                                        _mm512_maskz_loadu_ps(low_lanes(n), row));
}

/* 2 x 16 weights as bf16: each half times its scale, minus its minimum unless min is NULL. */
static INLINE void bf16_part(__m128i low, __m128i high, const float scale[2], const float *min, uint16_t *out)
{
    __m512 half[2] = {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high))};
    for (int i = 0; i < 2; i++) {
        half[i] = _mm512_mul_ps(half[i], _mm512_set1_ps(scale[i]));
        if (min)
            half[i] = _mm512_sub_ps(half[i], _mm512_set1_ps(min[i]));
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
}

/* Forces the array into memory. A load broadcasts a value from memory; a value in a register would use the shuffle
 * unit. */
#define IN_MEMORY(array) __asm__("" : "+m"(array))

/* Tables of the 16 values of 4 bits, one for each of two scales (and minima, or NULL). One instruction builds both
 * tables, and one looks up 32 weights. That takes 9 instructions for 32 weights; bf16_part and its preparation take 25.
 * Both share two units with all shuffles, so fewer is better. */
static INLINE __m512i bf16_tables(__m512 values, const float scale[2], const float *min)
{
    __m512 of[2];
    for (int i = 0; i < 2; i++) {
        of[i] = _mm512_mul_ps(values, _mm512_set1_ps(scale[i]));
        if (min)
            of[i] = _mm512_sub_ps(of[i], _mm512_set1_ps(min[i]));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(of[1], of[0]);
}

/* Looks up the low 4 bits of each 16-bit word, in the first or the second table. */
static INLINE void look_up_bf16(__m512i words, bool second, __m512i tables, uint16_t *out)
{
    enum { AND_OR = 0xea };
    const __m512i nibble = _mm512_set1_epi16(15), sixteen = _mm512_set1_epi16(16);
    const __m512i at =
        second ? _mm512_ternarylogic_epi32(words, nibble, sixteen, AND_OR) : _mm512_and_si512(words, nibble);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(at, tables));
}

/* 16 bytes as 32 words: the low 4 bits of the words are the low nibbles of all bytes, then the high nibbles. */
static INLINE __m512i words_of_nibbles(const uint8_t *p)
{
    const __m256i byte_at =
        _mm256_setr_epi64x(0x0003000200010000, 0x0007000600050004, 0x000b000a00090008, 0x000f000e000d000c);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
    const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i64x4(byte_at));
    return _mm512_srlv_epi16(words, _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1));
}

static INLINE __m512 values_from(int first)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(first)));
}

static void bf16_row_bf16(const void *w, int k, size_t ahead, uint16_t *row)
{
    const uint16_t *from = w;
    int l = 0;
    for (; l + G4_TILE_INPUTS <= k; l += G4_TILE_INPUTS) {
        __builtin_prefetch((const char *)(from + l) + ahead);
        _mm512_storeu_si512(row + l, _mm512_loadu_si512(from + l));
    }
    if (l < k) {
        memset(row + l, 0, G4_TILE_INPUTS * sizeof *row);
        memcpy(row + l, from + l, (size_t)(k - l) * sizeof *row);
    }
}

static void tiles_of_x(const float *x, size_t x_stride, int m, int k, uint16_t *tiles)
{
    for (int l = 0; l < k; l += G4_TILE_INPUTS, tiles += G4_TILE) {
        __m512i row[16];
        for (int r = 0; r < 16; r++)
            row[r] = r < m ? tile_row(x + (size_t)r * x_stride + l, k - l) : _mm512_setzero_si512();
        transpose_16(row);
        for (int pair = 0; pair < 16; pair++)
            _mm512_storeu_si512(tiles + pair * 32, row[pair]);
    }
}

/* x = high + middle + low to the last bit: the first 8 bits of x, the next 8, the last 8. Infinities and NaN are in high
 * alone. (What is below 2^-126 in middle or low counts as zero in products.) */
static INLINE void pieces_of(__m512 x, __m512 piece[G4_PIECES])
{
    const __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32((int)0xffff0000));
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ);
    piece[0] = _mm512_mask_and_ps(x, finite, x, top);
    const __m512 rest = _mm512_maskz_sub_ps(finite, x, piece[0]);
    piece[1] = _mm512_and_ps(rest, top);
    piece[2] = _mm512_sub_ps(rest, piece[1]);
}

static void tiles_of_pieces(const float *x, size_t x_stride, int m, int k, uint16_t *const tiles[G4_PIECES])
{
    for (int l = 0; l < k; l += G4_TILE_INPUTS) {
        __m512i row[G4_PIECES][16];
        for (int r = 0; r < 16; r++) {
            __m512 low[G4_PIECES], high[G4_PIECES];
            const int n = r < m ? k - l : 0;
            const float *from = r < m ? x + (size_t)r * x_stride + l : x;
            pieces_of(_mm512_maskz_loadu_ps(low_lanes(n), from), low);
            pieces_of(_mm512_maskz_loadu_ps(high_lanes(n), from + 16), high);
            for (int p = 0; p < G4_PIECES; p++) /* exact: each piece is a bf16 */
                row[p][r] = (__m512i)_mm512_cvtne2ps_pbh(high[p], low[p]);
        }
        for (int p = 0; p < G4_PIECES; p++) {
            transpose_16(row[p]);
            for (int pair = 0; pair < 16; pair++)
                _mm512_storeu_si512(tiles[p] + (size_t)l * G4_TILE_ROWS + pair * 32, row[p][pair]);
        }
    }
}

/* n <= 32 positions of d values, padded with zeros to 32. The tile's pairs of inputs are pairs of positions here, so no
 * transposition is needed. */
static bool tiles_of_values(const float *v, size_t v_stride, int n, int d, const g4_tiles *tiles)
{
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 most = _mm512_set1_ps(0x1p127f), zero = _mm512_setzero_ps();
    __mmask16 small = 0xffff;
    for (int c = 0; c < d; c += 16) {
        uint16_t *tile = tiles->data + (size_t)(c / 16) * tiles->stride;
        for (int l = 0; l < G4_TILE_INPUTS; l += 2) {
            const __m512 even = l < n ? _mm512_loadu_ps(v + (size_t)l * v_stride + c) : zero;
            const __m512 odd = l + 1 < n ? _mm512_loadu_ps(v + (size_t)(l + 1) * v_stride + c) : zero;
            small &= _mm512_cmp_ps_mask(_mm512_abs_ps(even), most, _CMP_LT_OQ);
            small &= _mm512_cmp_ps_mask(_mm512_abs_ps(odd), most, _CMP_LT_OQ);
            const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
            _mm512_storeu_si512(tile + l * 16, _mm512_permutexvar_epi16(interleave, pair));
        }
    }
    return small == 0xffff;
}

/* Up to 32 rows of weights times up to 32 rows of x. */
static INLINE void pair_products(int m, int n, const g4_tiles *x, const uint16_t *w, size_t w_stride, int n_tiles,
                                 tile_sums sums, bool add)
{
    const uint16_t *xs = x->data;
    if (n > G4_TILE_ROWS && m > G4_TILE_ROWS)
        tile_products(2, 2, w, w_stride, xs, x->stride, n_tiles, sums, add);
    else if (n > G4_TILE_ROWS)
        tile_products(2, 1, w, w_stride, xs, x->stride, n_tiles, sums, add);
    else if (m > G4_TILE_ROWS)
        tile_products(1, 2, w, w_stride, xs, x->stride, n_tiles, sums, add);
    else
        tile_products(1, 1, w, w_stride, xs, x->stride, n_tiles, sums, add);
}

/* out[i][j] = sums[j][i], i < m <= 16, j < n <= 16 */
static INLINE void transpose_sums(const float *sums, int m, int n, float *out, size_t out_stride)
{
    const __mmask16 there = n >= 16 ? 0xffff : (__mmask16)((1 << n) - 1);
    __m512i row[16];
    for (int j = 0; j < 16; j++)
        row[j] = _mm512_loadu_si512(sums + j * G4_TILE_ROWS);
    transpose_16(row);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < m)
            _mm512_mask_storeu_ps(out + (size_t)i * out_stride, there, _mm512_castsi512_ps(row[i]));
}

static NOINLINE void store_transposed(const float *sums, int m, int n, float *out, size_t out_stride)
{
    for (int j = 0; j < n; j += G4_TILE_ROWS)
        for (int i = 0; i < m; i += G4_TILE_ROWS, sums += TILE_SUMS)
            transpose_sums(sums, m - i, n - j, out + (size_t)i * out_stride + j, out_stride);
}

/* Prefetches the rows of out for writing: a store first loads the line from memory. Prefetching before the products
 * instead of loading after them, on one core of a Sapphire Rapids: 512 rows x 128 of 6144 weights, 321 -> 340 GFLOP/s,
 * and 783 -> 1010 while its neighbours were idle. */
static INLINE void prefetch_out(float *out, size_t out_stride, int m, int n)
{
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j += 16)
            __builtin_prefetch(out + (size_t)i * out_stride + j, 1);
}

/* The layout of sums from pair_products to store_transposed: one square of 16 x 16 after the other. */
static INLINE tile_sums squares(float *sums, int m)
{
    return (tile_sums){sums, G4_TILE_ROWS, TILE_SUMS, m > G4_TILE_ROWS ? 2 * TILE_SUMS : TILE_SUMS};
}

/* x in the outer loop: two rows of its tiles stay in the first-level cache while the tiles of all weights stream
 * past. */
static void matmul_tiles(const g4_tiles *x, int m, const uint16_t *w, size_t w_stride, int n, int n_tiles, float *sums,
                         bool add, float *out, size_t out_stride)
{
    tiles_begin();
    for (int i = 0; i < m; i += TILE_PAIR)
        for (int j = 0; j < n; j += TILE_PAIR) {
            const int rows = m - i < TILE_PAIR ? m - i : TILE_PAIR, columns = n - j < TILE_PAIR ? n - j : TILE_PAIR;
            const g4_tiles x_i = g4_tiles_from(x, i);
            if (out)
                prefetch_out(out + (size_t)i * out_stride + j, out_stride, rows, columns);
            pair_products(rows, columns, &x_i, w + (size_t)j * w_stride, w_stride, n_tiles, squares(sums, rows), add);
            if (out)
                store_transposed(sums, rows, columns, out + (size_t)i * out_stride + j, out_stride);
            if (add || !out) /* otherwise the sums are no longer needed, and the next ones may overwrite them */
                sums += TILE_PAIR * TILE_PAIR;
        }
    tiles_end();
}

/* 32 columns of x over 16 tiles of inputs are 32 KB: they stay in the first-level cache while all rows of w stream
 * past. */
static void matmul_by_tiles(const uint16_t *w, size_t w_stride, int m, const g4_tiles *x, int n, int n_tiles,
                            float *out, size_t out_stride)
{
    enum { TILES_AT_ONCE = 16 };
    tiles_begin();
    for (int t = 0; t < n_tiles; t += TILES_AT_ONCE)
        for (int j = 0; j < n; j += TILE_PAIR) {
            const int length = n_tiles - t < TILES_AT_ONCE ? n_tiles - t : TILES_AT_ONCE;
            const g4_tiles x_j = {g4_tiles_from(x, j).data + (size_t)t * G4_TILE, x->stride};
            for (int i = 0; i < m; i += TILE_PAIR)
                pair_products(
                    n - j, m - i, &x_j, w + (size_t)i * w_stride + (size_t)t * G4_TILE_INPUTS, w_stride, length,
                    (tile_sums){out + (size_t)i * out_stride + j, out_stride, G4_TILE_ROWS, G4_TILE_ROWS * out_stride},
                    t > 0);
        }
    tiles_end();
}

/* Multiplies the same 16 tiles n times: 16 KB, which stay in the first-level cache. */
static double spin_bf16(const uint16_t *x, float *out, int n)
{
    enum { N_TILES = 16 };
    tiles_begin();
    for (int i = 0; i < n; i++)
        tile_products(2, 2, x, G4_TILE_INPUTS, x, 0, N_TILES, squares(out, TILE_PAIR), i > 0);
    tiles_end();
    return 2.0 * n * (N_TILES * TILE_PAIR * TILE_PAIR * G4_TILE_INPUTS);
}
