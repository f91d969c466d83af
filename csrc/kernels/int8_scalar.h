/* SPDX-License-Identifier: Apache-2.0 */
/* The operations of body_int8.h in plain C: int8 products, summed by fours into 8 lanes.
 *
 * i8x32 32 bytes: of one row, or 4 inputs each of 8 rows of a panel     i32x8, f32x8 8 lanes of sums, or 8 factors
 * i16x16 sums of neighbouring pairs of products: 8 * 2 of up to 15 * 127 still fit
 */
typedef struct {
    int8_t byte[32];
} i8x32;
typedef struct {
    int16_t lane[16];
} i16x16;
typedef struct {
    int32_t lane[8];
} i32x8;
typedef struct {
    float lane[8];
} f32x8;

#define FOR_8 for (int l = 0; l < 8; l++)
#define RETURN_LANES(type, n, expression) \
    do {                                  \
        type result_;                     \
        for (int l = 0; l < (n); l++)     \
            result_.lane[l] = expression; \
        return result_;                   \
    } while (0)

static inline float f16_at(const uint8_t *p)
{
    uint16_t bits;
    memcpy(&bits, p, 2);
    return g4_f16_to_f32(bits);
}

static inline i8x32 i8_load(const int8_t *p)
{
    i8x32 a;
    memcpy(a.byte, p, 32);
    return a;
}

/* The same 4 bytes, repeated eight times. */
static inline i8x32 i8_load4(const int8_t *p)
{
    i8x32 a;
    for (int l = 0; l < 32; l++)
        a.byte[l] = p[l % 4];
    return a;
}

static inline void i8_store(int8_t *p, i8x32 a) { memcpy(p, a.byte, 32); }

#define RETURN_BYTES(expression)                    \
    do {                                            \
        i8x32 result_;                              \
        for (int l = 0; l < 32; l++)                \
            result_.byte[l] = (int8_t)(expression); \
        return result_;                             \
    } while (0)

/* The low nibbles of 16 bytes, then their high nibbles. */
static inline i8x32 i8_nibbles(const uint8_t *p) { RETURN_BYTES(l < 16 ? p[l] & 15 : p[l - 16] >> 4); }
/* (a >> shift) & mask of each byte, shift + bits of mask <= 8. */
static inline i8x32 i8_bits(i8x32 a, int shift, int mask) { RETURN_BYTES((uint8_t)a.byte[l] >> shift & mask); }
/* (a << shift) & mask of each byte. */
static inline i8x32 i8_bits_up(i8x32 a, int shift, int mask) { RETURN_BYTES((uint8_t)a.byte[l] << shift & mask); }
static inline i8x32 i8_or(i8x32 a, i8x32 b) { RETURN_BYTES(a.byte[l] | b.byte[l]); }
static inline i8x32 i8_add(i8x32 a, int b) { RETURN_BYTES(a.byte[l] + b); }
static inline i8x32 i8_lookup(const int8_t *table, i8x32 a) { RETURN_BYTES(table[a.byte[l]]); }
/* Bit l of 32 as byte l: 0 or mask. */
static inline i8x32 i8_spread(const uint8_t *p, int mask) { RETURN_BYTES(p[l / 8] >> (l % 8) & 1 ? mask : 0); }
/* The first 16 bytes of a, then of b; and the last 16 bytes of each. */
static inline i8x32 i8_low_halves(i8x32 a, i8x32 b) { RETURN_BYTES(l < 16 ? a.byte[l] : b.byte[l - 16]); }
static inline i8x32 i8_high_halves(i8x32 a, i8x32 b) { RETURN_BYTES(l < 16 ? a.byte[l + 16] : b.byte[l]); }
/* 16 bytes at a, then 16 at b. */
static inline i8x32 i8_load_halves(const uint8_t *a, const uint8_t *b) { RETURN_BYTES(l < 16 ? a[l] : b[l - 16]); }

/* The same two numbers, repeated eight times. */
static inline i16x16 i16_set_pair(const int16_t p[2]) { RETURN_LANES(i16x16, 16, p[l % 2]); }
static inline i16x16 i16_zero(void) { RETURN_LANES(i16x16, 16, 0); }
/* w in 0..63 times x in -127..127, added by pairs. */
static inline i16x16 i16_pairs(i8x32 w, i8x32 x)
{
    RETURN_LANES(i16x16, 16, (int16_t)(w.byte[2 * l] * x.byte[2 * l] + w.byte[2 * l + 1] * x.byte[2 * l + 1]));
}
static inline i16x16 i16_add_pairs(i16x16 sum, i8x32 w, i8x32 x)
{
    const i16x16 pairs = i16_pairs(w, x);
    RETURN_LANES(i16x16, 16, (int16_t)(sum.lane[l] + pairs.lane[l]));
}
static inline i32x8 i32_zero(void) { RETURN_LANES(i32x8, 8, 0); }
static inline i32x8 i32_add(i32x8 a, i32x8 b) { RETURN_LANES(i32x8, 8, a.lane[l] + b.lane[l]); }
static inline i32x8 i32_from_pairs(i16x16 a) { RETURN_LANES(i32x8, 8, a.lane[2 * l] + a.lane[2 * l + 1]); }
/* Any w in -128..127 times x in -127..127, added by fours. */
static inline i32x8 i32_fours(i8x32 w, i8x32 x)
{
    i32x8 sum;
    FOR_8
    sum.lane[l] = w.byte[4 * l] * x.byte[4 * l] + w.byte[4 * l + 1] * x.byte[4 * l + 1] +
                  w.byte[4 * l + 2] * x.byte[4 * l + 2] + w.byte[4 * l + 3] * x.byte[4 * l + 3];
    return sum;
}
static inline i32x8 i32_add_fours(i32x8 sum, i8x32 w, i8x32 x) { return i32_add(sum, i32_fours(w, x)); }

/* For each of a, b, c, d: the sum of its lower half in lanes 0..3, the sum of its upper half in lanes 4..7. */
static inline i32x8 i32_sums_of_fours(i32x8 a, i32x8 b, i32x8 c, i32x8 d)
{
    const i32x8 *const of[] = {&a, &b, &c, &d};
    i32x8 sums = {{0}};
    for (int l = 0; l < 8; l++)
        for (int i = 0; i < 4; i++)
            sums.lane[l] += of[l % 4]->lane[l / 4 * 4 + i];
    return sums;
}
/* The same for pairs. fit >= 1: how many times four lanes can be added in 16 bits. */
static inline i32x8 i32_sums_of_pairs(i16x16 a, i16x16 b, i16x16 c, i16x16 d, int fit)
{
    (void)fit;
    return i32_sums_of_fours(i32_from_pairs(a), i32_from_pairs(b), i32_from_pairs(c), i32_from_pairs(d));
}

static inline f32x8 f8_set1(float a) { RETURN_LANES(f32x8, 8, a); }
static inline f32x8 f8_load(const float *p) { RETURN_LANES(f32x8, 8, p[l]); }
/* The bytes of a number, lowest first, each signed. */
static inline f32x8 f8_from_i8(uint64_t bytes) { RETURN_LANES(f32x8, 8, (float)(int8_t)(bytes >> (8 * l))); }
/* Eight f16, `stride` bytes apart. */
static inline f32x8 f8_from_f16(const uint8_t *p, size_t stride)
{
    RETURN_LANES(f32x8, 8, f16_at(p + (size_t)l * stride));
}
static inline f32x8 f8_from_i32(i32x8 a) { RETURN_LANES(f32x8, 8, (float)a.lane[l]); }
static inline f32x8 f8_mul(f32x8 a, f32x8 b) { RETURN_LANES(f32x8, 8, a.lane[l] * b.lane[l]); }
static inline f32x8 f8_fma(f32x8 a, f32x8 b, f32x8 c) { RETURN_LANES(f32x8, 8, fmaf(a.lane[l], b.lane[l], c.lane[l])); }
static inline f32x8 f8_minus_product(f32x8 c, f32x8 a, f32x8 b)
{
    RETURN_LANES(f32x8, 8, fmaf(-a.lane[l], b.lane[l], c.lane[l]));
}
static inline void f8_store(float *p, f32x8 a) { memcpy(p, a.lane, sizeof a.lane); }
/* The first n lanes, then zeros. */
static inline f32x8 f8_first(f32x8 a, int n) { RETURN_LANES(f32x8, 8, l < n ? a.lane[l] : 0); }
/* The even lanes, and the odd lanes, of the 16 lanes of a and b. */
static inline f32x8 f8_evens(f32x8 a, f32x8 b) { RETURN_LANES(f32x8, 8, l < 4 ? a.lane[2 * l] : b.lane[2 * l - 8]); }
static inline f32x8 f8_odds(f32x8 a, f32x8 b) { RETURN_LANES(f32x8, 8, l < 4 ? a.lane[2 * l + 1] : b.lane[2 * l - 7]); }
/* Adds the lanes by halving: l with l + 4, then l + 2, l + 1. */
static inline float f8_sum(f32x8 a)
{
    for (int half = 4; half; half /= 2)
        for (int l = 0; l < half; l++)
            a.lane[l] += a.lane[l + half];
    return a.lane[0];
}

/* to[c][r] = from[r][c] for 8 rows, `stride` apart, of 8 groups of 4 bytes; groups of `to` are to_stride apart. */
static inline void transpose_fours(const int8_t *from, size_t stride, int8_t *to, size_t to_stride)
{
    for (int r = 0; r < 8; r++)
        for (int c = 0; c < 8; c++)
            memcpy(to + (size_t)c * to_stride + r * 4, from + (size_t)r * stride + c * 4, 4);
}
