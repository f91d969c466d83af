/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of int8_avx2.h that VNNI does better; included after it. One instruction, DPBUSD(sum, unsigned bytes,
 * signed bytes), adds products by fours into 32 bits: sums of pairs are then sums of fours and never need widening. */
static inline i32x8 vnni_add(i32x8 sum, i8x32 w, i8x32 x) { return DPBUSD(sum, w, x); }
static inline i32x8 vnni_products(i8x32 w, i8x32 x) { return DPBUSD(i32_zero(), w, x); }
static inline i32x8 vnni_add_signed(i32x8 sum, i8x32 w, i8x32 x)
{
    return DPBUSD(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
static inline i32x8 vnni_signed_products(i8x32 w, i8x32 x) { return vnni_add_signed(i32_zero(), w, x); }
static inline i32x8 vnni_sums(i32x8 a, i32x8 b, i32x8 c, i32x8 d, int fit)
{
    (void)fit;
    return i32_sums_of_fours(a, b, c, d);
}
static inline i32x8 vnni_set_pair(const int16_t p[2]) { return _mm256_set1_epi32(p[0] + p[1]); }

#define i16_set_pair vnni_set_pair
#define i16_add_pairs vnni_add
#define i16_pairs vnni_products
#define i32_from_pairs(a) (a)
#define i32_sums_of_pairs vnni_sums
#define i32_add_fours vnni_add_signed
#define i32_fours vnni_signed_products
