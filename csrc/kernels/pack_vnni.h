/* SPDX-License-Identifier: Apache-2.0 */
/* Packs the integers of 16 weight rows into a panel (body_int8_tile.h) while they are still nibbles: 16 bytes of each
 * row are one transposition of 4 registers, 8 shuffles. Row by row and unpacked first, a few rows of x paid as much for
 * packing as for reading the weights from memory.
 *
 * fours_of_FORMAT(block, stride, q): one block of each of 16 rows, `stride` bytes apart. The integers are those that
 * read_FORMAT (formats.h, also on the layouts) gives. */
typedef int8_t panel_four[2][8][4]; /* 4 inputs of 16 rows */

/* fours[t]: bytes [4 t, 4 t + 4) of each row. */
static INLINE void fours_of_rows(const uint8_t *p, size_t stride, __m512i fours[4])
{
    __m512i row[4]; /* rows r, r + 4, r + 8 and r + 12 */
    for (size_t r = 0; r < 4; r++) {
        const uint8_t *at = p + r * stride;
#define ROW(i) _mm_loadu_si128((const __m128i *)(at + (i) * stride))
        row[r] = _mm512_inserti32x4(_mm512_castsi128_si512(ROW(0)), ROW(4), 1);
        row[r] = _mm512_inserti32x4(_mm512_inserti32x4(row[r], ROW(8), 2), ROW(12), 3);
#undef ROW
    }
    const __m512i low_01 = _mm512_unpacklo_epi32(row[0], row[1]), high_01 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low_23 = _mm512_unpacklo_epi32(row[2], row[3]), high_23 = _mm512_unpackhi_epi32(row[2], row[3]);
    fours[0] = _mm512_unpacklo_epi64(low_01, low_23);
    fours[1] = _mm512_unpackhi_epi64(low_01, low_23);
    fours[2] = _mm512_unpacklo_epi64(high_01, high_23);
    fours[3] = _mm512_unpackhi_epi64(high_01, high_23);
}

/* `bits` from `shift` on of each byte, moved up to `to`; neighbouring bytes' bits are cut off. */
static INLINE __m512i bits_at(__m512i a, int shift, int bits, int to)
{
    const __m512i mask = _mm512_set1_epi8((char)(((1 << bits) - 1) << to));
    return _mm512_and_si512(
        shift > to ? _mm512_srli_epi16(a, (unsigned)(shift - to)) : _mm512_slli_epi16(a, (unsigned)(to - shift)), mask);
}

static INLINE void store_fours(panel_four *q, const __m512i fours[4])
{
    for (int t = 0; t < 4; t++)
        _mm512_storeu_si512(q[t], fours[t]);
}

/* fours = high bits of `high`, moved up to `to`, above the low ones of `low`. */
static INLINE void join_bits(const __m512i low[4], int low_shift, int low_bits, const __m512i high[4], int high_shift,
                             int high_bits, __m512i fours[4])
{
    for (int t = 0; t < 4; t++)
        fours[t] =
            _mm512_or_si512(bits_at(low[t], low_shift, low_bits, 0), bits_at(high[t], high_shift, high_bits, low_bits));
}

/* 16 bytes of nibbles: inputs [0, 16) from the low ones, [further, further + 16) from the high ones. table: of the
 * nibbles' values, or NULL. */
static INLINE void fours_of_nibbles(const uint8_t *p, size_t stride, int further, const int8_t *table, panel_four *q)
{
    __m512i bytes[4], fours[2][4];
    fours_of_rows(p, stride, bytes);
    for (int high = 0; high < 2; high++)
        for (int t = 0; t < 4; t++) {
            fours[high][t] = bits_at(bytes[t], 4 * high, 4, 0);
            if (table)
                fours[high][t] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)),
                                                     fours[high][t]);
        }
    store_fours(q, fours[0]);
    store_fours(q + further / 4, fours[1]);
}

static INLINE void fours_of_q8_0(const uint8_t *block, size_t stride, panel_four *q)
{
    for (int part = 0; part < 2; part++) {
        __m512i fours[4];
        fours_of_rows(block + 2 + part * 16, stride, fours);
        store_fours(q + part * 4, fours);
    }
}

static INLINE void fours_of_q4_0(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_of_nibbles(block + 2, stride, 16, NULL, q);
}

static INLINE void fours_of_q4_1(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_of_nibbles(block + 4, stride, 16, NULL, q);
}

static INLINE void fours_of_iq4_nl(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_of_nibbles(block + 2, stride, 16, iq4_values, q);
}

static INLINE void fours_of_mxfp4(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_of_nibbles(block + 1, stride, 16, mxfp4_values, q);
}

/* Adds the fifth bits of 32 values, 4 bytes of each row. The product puts 4 bits into 4 bytes. */
static INLINE void add_fifths(const uint8_t *p, size_t stride, panel_four *q)
{
    int32_t bits[16];
    for (size_t r = 0; r < 16; r++)
        memcpy(&bits[r], p + r * stride, 4);
    __m512i left = _mm512_loadu_si512(bits);
    for (int t = 0; t < 8; t++, left = _mm512_srli_epi32(left, 4)) {
        const __m512i four = _mm512_and_si512(left, _mm512_set1_epi32(15));
        const __m512i spread = _mm512_mullo_epi32(four, _mm512_set1_epi32(1 << 21 | 1 << 14 | 1 << 7 | 1));
        _mm512_storeu_si512(q[t], _mm512_or_si512(_mm512_loadu_si512(q[t]), bits_at(spread, 0, 1, 4)));
    }
}

static INLINE void fours_of_q5_0(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_of_nibbles(block + 6, stride, 16, NULL, q);
    add_fifths(block + 2, stride, q);
}

static INLINE void fours_of_q5_1(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_of_nibbles(block + 8, stride, 16, NULL, q);
    add_fifths(block + 4, stride, q);
}

static INLINE void fours_of_iq4_xs(const uint8_t *block, size_t stride, panel_four *q)
{
    for (int part = 0; part < 8; part++)
        fours_of_nibbles(block + 8 + part * 16, stride, 16, iq4_values, q + part * 8);
}

/* Below, 256 inputs are 8 parts of 32, and a part has two pieces of 16. */
#define PIECE(part, piece) (q + (part) * 8 + (piece) * 4)

static INLINE void fours_of_q2_k(const uint8_t *block, size_t stride, panel_four *q)
{
    for (int at = 0; at < 4; at++) {
        __m512i bytes[4], fours[4];
        fours_of_rows(block + 16 + at * 16, stride, bytes);
        for (int set = 0; set < 4; set++) {
            for (int t = 0; t < 4; t++)
                fours[t] = bits_at(bytes[t], 2 * set, 2, 0);
            store_fours(PIECE(at / 2 * 4 + set, at % 2), fours);
        }
    }
}

/* Low bits, the sets of 32 bytes one after the other, below a bit for each part of the 32 bytes at `high_bits`. */
static INLINE void fours_below_a_bit(const uint8_t *low_bits, const uint8_t *high_bits, size_t stride, int bits,
                                     panel_four *q)
{
    const int n_sets = 8 / bits; /* parts in 32 bytes */
    for (int piece = 0; piece < 2; piece++) {
        __m512i high[4], low[4], fours[4];
        fours_of_rows(high_bits + piece * 16, stride, high);
        for (int first = 0; first < 8; first += n_sets) {
            fours_of_rows(low_bits + first / n_sets * 32 + piece * 16, stride, low);
            for (int set = 0; set < n_sets; set++) {
                join_bits(low, bits * set, bits, high, first + set, 1, fours);
                store_fours(PIECE(first + set, piece), fours);
            }
        }
    }
}

static INLINE void fours_of_q3_k(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_below_a_bit(block + 32, block, stride, 2, q);
}

static INLINE void fours_of_q4_k(const uint8_t *block, size_t stride, panel_four *q)
{
    for (int at = 0; at < 8; at++)
        fours_of_nibbles(block + 16 + at * 16, stride, 32, NULL, PIECE(at / 2 * 2, at % 2));
}

static INLINE void fours_of_q5_k(const uint8_t *block, size_t stride, panel_four *q)
{
    fours_below_a_bit(block + 48, block + 16, stride, 4, q);
}

static INLINE void fours_of_q6_k(const uint8_t *block, size_t stride, panel_four *q)
{
    for (int at = 0; at < 4; at++) { /* a half of the inputs, and a piece */
        const int half = at / 2, piece = at % 2;
        __m512i high[4], low[4], fours[4];
        fours_of_rows(block + 128 + half * 32 + piece * 16, stride, high);
        for (int side = 0; side < 2; side++) {
            fours_of_rows(block + half * 64 + side * 32 + piece * 16, stride, low);
            for (int quarter = side; quarter < 4; quarter += 2) {
                join_bits(low, quarter / 2 * 4, 4, high, quarter * 2, 2, fours);
                store_fours(PIECE(half * 4 + quarter, piece), fours);
            }
        }
    }
}
#undef PIECE
