/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of int8_scalar.h on AVX2. */
typedef __m256i i8x32;
typedef __m256i i16x16;
typedef __m256i i32x8;
typedef __m256 f32x8;

static inline float f16_at(const uint8_t *p)
{
    uint16_t bits;
    memcpy(&bits, p, 2);
    return _cvtsh_ss(bits);
}

static inline i8x32 i8_load(const int8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline i8x32 i8_load4(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

static inline void i8_store(int8_t *p, i8x32 a) { _mm256_storeu_si256((__m256i *)p, a); }
static inline i8x32 i8_nibbles(const uint8_t *p)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
}
/* Shifts 16-bit words; the mask clears the bits from the neighbouring byte. */
static inline i8x32 i8_bits(i8x32 a, int shift, int mask)
{
    return _mm256_and_si256(_mm256_srli_epi16(a, shift), _mm256_set1_epi8((char)mask));
}
static inline i8x32 i8_bits_up(i8x32 a, int shift, int mask)
{
    return _mm256_and_si256(_mm256_slli_epi16(a, shift), _mm256_set1_epi8((char)mask));
}
static inline i8x32 i8_or(i8x32 a, i8x32 b) { return _mm256_or_si256(a, b); }
static inline i8x32 i8_add(i8x32 a, int b) { return _mm256_add_epi8(a, _mm256_set1_epi8((char)b)); }
static inline i8x32 i8_lookup(const int8_t *table, i8x32 a)
{
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)), a);
}
static inline i8x32 i8_spread(const uint8_t *p, int mask)
{
    int32_t bits;
    memcpy(&bits, p, 4);
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x((long long)0x8040201008040201);
    __m256i bit = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of), bit_of);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bit, bit_of), _mm256_set1_epi8((char)mask));
}
static inline i8x32 i8_low_halves(i8x32 a, i8x32 b) { return _mm256_permute2x128_si256(a, b, 0x20); }
static inline i8x32 i8_high_halves(i8x32 a, i8x32 b) { return _mm256_permute2x128_si256(a, b, 0x31); }
static inline i8x32 i8_load_halves(const uint8_t *a, const uint8_t *b)
{
    return _mm256_set_m128i(_mm_loadu_si128((const __m128i *)b), _mm_loadu_si128((const __m128i *)a));
}

static inline i16x16 i16_set_pair(const int16_t p[2])
{
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm256_set1_epi32(pair);
}
static inline i16x16 i16_zero(void) { return _mm256_setzero_si256(); }
/* The empty asm stops gcc from reordering the additions, which would keep 64 products live at once, in memory. */
static inline __m256i in_order(__m256i a)
{
    __asm__("" : "+x"(a));
    return a;
}
static inline i16x16 i16_pairs(i8x32 w, i8x32 x) { return _mm256_maddubs_epi16(w, x); }
static inline i16x16 i16_add_pairs(i16x16 sum, i8x32 w, i8x32 x)
{
    return in_order(_mm256_add_epi16(sum, i16_pairs(w, x)));
}
static inline i32x8 i32_zero(void) { return _mm256_setzero_si256(); }
static inline i32x8 i32_add(i32x8 a, i32x8 b) { return in_order(_mm256_add_epi32(a, b)); }
static inline i32x8 i32_from_pairs(i16x16 a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
/* The instruction needs one unsigned factor: |w|; x takes the sign of w. 2 * 128 * 127 fits 16 bits. */
static inline i32x8 i32_fours(i8x32 w, i8x32 x)
{
    return i32_from_pairs(_mm256_maddubs_epi16(_mm256_sign_epi8(w, w), _mm256_sign_epi8(x, w)));
}
static inline i32x8 i32_add_fours(i32x8 sum, i8x32 w, i8x32 x) { return i32_add(sum, i32_fours(w, x)); }

/* The even, or the odd, 4-byte lanes of two registers, within each 16 bytes. */
#define FOURS(a, b, which) _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), which))
static inline i32x8 i32_neighbours(i32x8 a, i32x8 b) { return _mm256_add_epi32(FOURS(a, b, 0x88), FOURS(a, b, 0xdd)); }
static inline i32x8 i32_sums_of_fours(i32x8 a, i32x8 b, i32x8 c, i32x8 d)
{
    return i32_neighbours(i32_neighbours(a, b), i32_neighbours(c, d));
}
static inline i16x16 i16_halves(i16x16 a, i16x16 b)
{
    return _mm256_add_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}
/* Added in 16 bits while the sums fit: a third fewer instructions than widening every register. */
static inline i32x8 i32_sums_of_pairs(i16x16 a, i16x16 b, i16x16 c, i16x16 d, int fit)
{
    const i16x16 ab = i16_halves(a, b), cd = i16_halves(c, d);
    if (fit < 2)
        return i32_neighbours(i32_from_pairs(ab), i32_from_pairs(cd));
    return i32_from_pairs(_mm256_add_epi16(FOURS(ab, cd, 0x88), FOURS(ab, cd, 0xdd)));
}

static inline f32x8 f8_set1(float a) { return _mm256_set1_ps(a); }
static inline f32x8 f8_load(const float *p) { return _mm256_loadu_ps(p); }
static inline f32x8 f8_from_i8(uint64_t bytes)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes)));
}
static inline __m128i two_f16(const uint8_t *p, size_t stride)
{
    uint16_t a, b;
    memcpy(&a, p, 2);
    memcpy(&b, p + stride, 2);
    return _mm_insert_epi16(_mm_cvtsi32_si128(a), b, 1);
}
/* The f16 of eight blocks of 18 bytes: four loads instead of eight. In load i, the f16 of block 2i lies in the low half
 * of one 4-byte lane of the first 16 bytes; that of block 2i + 1 in the high half of the same lane of the last 16. */
static inline f32x8 f8_from_f16_of_18(const uint8_t *p)
{
    const __m256i words = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, /* */
                                           2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    __m256i all = _mm256_loadu_si256((const __m256i *)p);
    all = _mm256_blend_epi32(all, _mm256_loadu_si256((const __m256i *)(p + 32)), 0x22);
    all = _mm256_blend_epi32(all, _mm256_loadu_si256((const __m256i *)(p + 64)), 0x44);
    all = _mm256_blend_epi32(all, _mm256_loadu_si256((const __m256i *)(p + 96)), 0x88);
    all = _mm256_shuffle_epi8(all, words);
    return _mm256_cvtph_ps(_mm_unpacklo_epi16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
static inline f32x8 f8_from_f16(const uint8_t *p, size_t stride)
{
    if (stride == 18)
        return f8_from_f16_of_18(p);
    __m128i low = _mm_unpacklo_epi32(two_f16(p, stride), two_f16(p + 2 * stride, stride));
    __m128i high = _mm_unpacklo_epi32(two_f16(p + 4 * stride, stride), two_f16(p + 6 * stride, stride));
    return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}
static inline f32x8 f8_from_i32(i32x8 a) { return _mm256_cvtepi32_ps(a); }
static inline f32x8 f8_mul(f32x8 a, f32x8 b) { return _mm256_mul_ps(a, b); }
static inline f32x8 f8_fma(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
static inline f32x8 f8_minus_product(f32x8 c, f32x8 a, f32x8 b) { return _mm256_fnmadd_ps(a, b, c); }
static inline void f8_store(float *p, f32x8 a) { _mm256_storeu_ps(p, a); }
static inline f32x8 f8_first(f32x8 a, int n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
static inline f32x8 f8_in_order(f32x8 a) /* from four pairs of lanes: the first, third, second, fourth */
{
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), 0xd8));
}
static inline f32x8 f8_evens(f32x8 a, f32x8 b) { return f8_in_order(_mm256_shuffle_ps(a, b, 0x88)); }
static inline f32x8 f8_odds(f32x8 a, f32x8 b) { return f8_in_order(_mm256_shuffle_ps(a, b, 0xdd)); }
static inline float f8_sum(f32x8 a)
{
    __m128 by_4 = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 by_2 = _mm_add_ps(by_4, _mm_movehl_ps(by_4, by_4));
    return _mm_cvtss_f32(_mm_add_ss(by_2, _mm_movehdup_ps(by_2)));
}

static inline void transpose_fours(const int8_t *from, size_t stride, int8_t *to, size_t to_stride)
{
    __m256i row[8], pair[8], four[8];
    for (int r = 0; r < 8; r++)
        row[r] = i8_load(from + (size_t)r * stride);
    for (int r = 0; r < 8; r += 2) {
        pair[r] = _mm256_unpacklo_epi32(row[r], row[r + 1]);
        pair[r + 1] = _mm256_unpackhi_epi32(row[r], row[r + 1]);
    }
    for (int r = 0; r < 8; r += 4)
        for (int i = 0; i < 2; i++) {
            four[r + 2 * i] = _mm256_unpacklo_epi64(pair[r + i], pair[r + 2 + i]);
            four[r + 2 * i + 1] = _mm256_unpackhi_epi64(pair[r + i], pair[r + 2 + i]);
        }
    for (int c = 0; c < 4; c++) {
        _mm256_storeu_si256((__m256i *)(to + (size_t)c * to_stride),
                            _mm256_permute2x128_si256(four[c], four[4 + c], 0x20));
        _mm256_storeu_si256((__m256i *)(to + (size_t)(c + 4) * to_stride),
                            _mm256_permute2x128_si256(four[c], four[4 + c], 0x31));
    }
}
