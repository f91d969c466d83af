/* SPDX-License-Identifier: Apache-2.0 */
/* GGUF's block formats. Each is read into integers q and, for every GROUP of them (16 or 32), a scale and a minimum:
 * value = scale * (q - ZERO_POINT) - min. ZERO_POINT keeps the stored q >= 0. In float32 and in this order the bits
 * equal those of the gguf package's dequantiser (quants.py, also the reference for the layouts). Where a format has no
 * minimum, x - 0 is x.
 *
 * Format        value                           stored in a block
 * Q8_0          d q                             d:f16 q:i8[32]
 * Q4_0 Q5_0     d (q - 8), d (q - 16)           d:f16 (high bits:32) nibbles: values 0-15 low, 16-31 high
 * Q4_1 Q5_1     d q + m                         d:f16 m:f16 (high bits:32) nibbles
 * IQ4_NL MXFP4  d table[q]                      d:f16, or the exponent of d:u8; nibbles
 * Q4_K Q5_K     d sc q - dmin m                 d:f16 dmin:f16 (sc, m):6 bits for 8 x 32 values, (high bits), nibbles
 * Q2_K          d sc q - dmin m                 (sc, m):4 bits for 16 x 16 values, 2 bits, d:f16 dmin:f16
 * Q3_K Q6_K     d sc (q - 4), d sc (q - 32)     high and low bits, sc for 16 x 16 values, d:f16
 * IQ4_XS        d sc table[q]                   d:f16 sc:6 bits for 8 x 32 values, nibbles
 */
#ifndef GEMMA4_KERNELS_FORMATS_H
#define GEMMA4_KERNELS_FORMATS_H

typedef struct {
    i8x32 q[8];
    float scale[16], min[16]; /* one per group */
} block_values;

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* 2 x e2m1 */

static inline i8x32 bytes_32(const uint8_t *p) { return i8_load((const int8_t *)p); }

/* For a block of 32. */
static inline void set_scale(block_values *v, float scale, float min)
{
    v->scale[0] = scale;
    v->min[0] = min;
}

/* For a block of 256: d sc and dmin m, for 16 groups or for 8. */
static inline void set_scales(block_values *v, float d, const int8_t sc[16], float dmin, const int8_t m[16])
{
    x16_store(v->scale, x16_mul(x16_set1(d), x16_load_i8(sc)));
    x16_store(v->min, x16_mul(x16_set1(dmin), x16_load_i8(m)));
}

static inline void set_8_scales(block_values *v, float d, uint64_t sc, float dmin, uint64_t m)
{
    f8_store(v->scale, f8_mul(f8_set1(d), f8_from_i8(sc)));
    f8_store(v->min, f8_mul(f8_set1(dmin), f8_from_i8(m)));
}

static const int8_t no_minima[16] = {0};

static inline void read_q8_0(const uint8_t *b, block_values *v)
{
    v->q[0] = bytes_32(b + 2);
    set_scale(v, f16_at(b), 0);
}

static inline void read_q4_0(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_nibbles(b + 2);
    set_scale(v, f16_at(b), 0);
}

static inline void read_q4_1(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_nibbles(b + 4);
    set_scale(v, f16_at(b), -f16_at(b + 2));
}

static inline void read_q5_0(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_or(i8_nibbles(b + 6), i8_spread(b + 2, 16));
    set_scale(v, f16_at(b), 0);
}

static inline void read_q5_1(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_or(i8_nibbles(b + 8), i8_spread(b + 4, 16));
    set_scale(v, f16_at(b), -f16_at(b + 2));
}

static inline void read_iq4_nl(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_lookup(iq4_values, i8_nibbles(b + 2));
    set_scale(v, f16_at(b), 0);
}

static inline float mxfp4_scale(uint32_t exponent)
{
    return g4_f32_from_bits(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23); /* 2^(exponent - 128) */
}

static inline void read_mxfp4(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_lookup(mxfp4_values, i8_nibbles(b + 1));
    set_scale(v, mxfp4_scale(b[0]), 0);
}

/* The integers of two blocks of 32, four blocks apart, in the order of the decode kernel: the first halves of both,
 * then the last halves. Nibbles unpack into this order almost for free. */
#define TWO_BLOCKS(b, block_bytes, at) i8_load_halves((b) + (at), (b) + 4 * (block_bytes) + (at))

static inline void read_pair_of_q8_0(const uint8_t *b, i8x32 q[2])
{
    q[0] = TWO_BLOCKS(b, 34, 2);
    q[1] = TWO_BLOCKS(b, 34, 18);
}

static inline void split_nibbles(i8x32 nibbles, i8x32 q[2])
{
    q[0] = i8_bits(nibbles, 0, 15);
    q[1] = i8_bits(nibbles, 4, 15);
}

static inline void read_pair_of_q4_0(const uint8_t *b, i8x32 q[2]) { split_nibbles(TWO_BLOCKS(b, 18, 2), q); }
static inline void read_pair_of_q4_1(const uint8_t *b, i8x32 q[2]) { split_nibbles(TWO_BLOCKS(b, 20, 4), q); }

static inline void add_fifth_bits(const uint8_t *first, const uint8_t *second, i8x32 q[2])
{
    const i8x32 a = i8_spread(first, 16), b = i8_spread(second, 16);
    q[0] = i8_or(q[0], i8_low_halves(a, b));
    q[1] = i8_or(q[1], i8_high_halves(a, b));
}

static inline void read_pair_of_q5_0(const uint8_t *b, i8x32 q[2])
{
    split_nibbles(TWO_BLOCKS(b, 22, 6), q);
    add_fifth_bits(b + 2, b + 4 * 22 + 2, q);
}

static inline void read_pair_of_q5_1(const uint8_t *b, i8x32 q[2])
{
    split_nibbles(TWO_BLOCKS(b, 24, 8), q);
    add_fifth_bits(b + 4, b + 4 * 24 + 4, q);
}

static inline void look_up_pair(const int8_t *table, i8x32 q[2])
{
    q[0] = i8_lookup(table, q[0]);
    q[1] = i8_lookup(table, q[1]);
}

static inline void read_pair_of_iq4_nl(const uint8_t *b, i8x32 q[2])
{
    split_nibbles(TWO_BLOCKS(b, 18, 2), q);
    look_up_pair(iq4_values, q);
}

static inline void read_pair_of_mxfp4(const uint8_t *b, i8x32 q[2])
{
    split_nibbles(TWO_BLOCKS(b, 17, 1), q);
    look_up_pair(mxfp4_values, q);
}

/* Each of the two runs of 32 bytes holds four sets of 32 values of 2 bits. */
static inline void read_q2_k(const uint8_t *b, block_values *v)
{
    int8_t sc[16], m[16];
    for (int g = 0; g < 16; g++) {
        sc[g] = (int8_t)(b[g] & 15);
        m[g] = (int8_t)(b[g] >> 4);
    }
    set_scales(v, f16_at(b + 80), sc, f16_at(b + 82), m);
    for (int part = 0; part < 8; part++)
        v->q[part] = i8_bits(bytes_32(b + 16 + part / 4 * 32), part % 4 * 2, 3);
}

/* As Q2_K, with a third bit in the first 32 bytes. The 16 scales of 6 bits: low nibbles of 8 bytes, high nibbles of
 * them, and their two more bits each in the four sets of 2 bits of 4 bytes. Eight are put together at once; 32 is
 * subtracted from each byte by (+ 96) ^ 128, which carries nothing over. */
static inline void read_q3_k(const uint8_t *b, block_values *v)
{
    const uint64_t twos = 0x0303030303030303, nibbles = 0x0f0f0f0f0f0f0f0f;
    const uint64_t less_32[2] = {0x6060606060606060, 0x8080808080808080};
    uint64_t nibble_pairs, sc[2];
    uint32_t twos_of_8;
    memcpy(&nibble_pairs, b + 96, 8);
    memcpy(&twos_of_8, b + 104, 4);
    for (int half = 0; half < 2; half++) {
        const uint64_t two = ((uint64_t)(twos_of_8 >> (4 * half + 2)) << 32 | (uint32_t)(twos_of_8 >> 4 * half)) & twos;
        sc[half] = (((nibble_pairs >> 4 * half & nibbles) | two << 4) + less_32[0]) ^ less_32[1];
    }
    set_scales(v, f16_at(b + 108), (const int8_t *)sc, 0, no_minima);
    for (int part = 0; part < 8; part++) {
        i8x32 low = i8_bits(bytes_32(b + 32 + part / 4 * 32), part % 4 * 2, 3);
        i8x32 high = part < 3 ? i8_bits_up(bytes_32(b), 2 - part, 4) : i8_bits(bytes_32(b), part - 2, 4);
        v->q[part] = i8_or(low, high);
    }
}

/* The eight 6-bit scales and minima of Q4_K and Q5_K, four at a time. Bytes 0-3 hold four complete scales, bytes 4-7
 * four complete minima; their top bits complete the nibbles of bytes 8-11. All stay in registers: storing 4 bytes at a
 * time and loading 8 would stall on the store. */
static inline void read_k_scales(const uint8_t *packed, float d, float dmin, block_values *v)
{
    uint32_t word[3];
    memcpy(word, packed, 12);
    const uint32_t last_scales = (word[2] & 0x0f0f0f0fu) | (word[0] >> 2 & 0x30303030u);
    const uint32_t last_minima = (word[2] >> 4 & 0x0f0f0f0fu) | (word[1] >> 2 & 0x30303030u);
    set_8_scales(v, d, (uint64_t)last_scales << 32 | (word[0] & 0x3f3f3f3fu), dmin,
                 (uint64_t)last_minima << 32 | (word[1] & 0x3f3f3f3fu));
}

/* Each 32 bytes hold the next 32 values in their low nibbles and the 32 after them in their high nibbles. */
static inline void read_q4_k(const uint8_t *b, block_values *v)
{
    read_k_scales(b + 4, f16_at(b), f16_at(b + 2), v);
    for (int part = 0; part < 8; part++)
        v->q[part] = i8_bits(bytes_32(b + 16 + part / 2 * 32), part % 2 * 4, 15);
}

static inline void read_q5_k(const uint8_t *b, block_values *v)
{
    read_k_scales(b + 4, f16_at(b), f16_at(b + 2), v);
    for (int part = 0; part < 8; part++) {
        i8x32 low = i8_bits(bytes_32(b + 48 + part / 2 * 32), part % 2 * 4, 15);
        i8x32 high = part < 4 ? i8_bits_up(bytes_32(b + 16), 4 - part, 16) : i8_bits(bytes_32(b + 16), part - 4, 16);
        v->q[part] = i8_or(low, high);
    }
}

/* Each half: 64 bytes with the low nibbles of its first 64 values, then of the other 64; 32 bytes with 2 more bits of
 * each. */
static inline void read_q6_k(const uint8_t *b, block_values *v)
{
    set_scales(v, f16_at(b + 208), (const int8_t *)b + 192, 0, no_minima);
    for (int part = 0; part < 8; part++) {
        const int half = part / 4, quarter = part % 4;
        i8x32 low = i8_bits(bytes_32(b + half * 64 + quarter % 2 * 32), quarter / 2 * 4, 15);
        i8x32 high = bytes_32(b + 128 + half * 32);
        high = quarter < 2 ? i8_bits_up(high, 4 - 2 * quarter, 48) : i8_bits(high, 2 * quarter - 4, 48);
        v->q[part] = i8_or(low, high);
    }
}

static inline void read_iq4_xs(const uint8_t *b, block_values *v)
{
    const int high = b[2] | b[3] << 8;
    uint64_t sc = 0;
    for (int part = 0; part < 8; part++) {
        int low_4 = b[4 + part / 2] >> (part % 2 * 4) & 15;
        sc |= (uint64_t)(uint8_t)((low_4 | (high >> (part * 2) & 3) << 4) - 32) << (8 * part);
    }
    set_8_scales(v, f16_at(b), sc, 0, 0);
    for (int part = 0; part < 8; part++)
        v->q[part] = i8_lookup(iq4_values, i8_nibbles(b + 8 + part * 16));
}

#ifdef BF16_PRODUCTS
/* 256 weights as bf16 (body_bf16.h): the scales of eight blocks at once, 4-bit weights by table lookup. */
static INLINE void bf16_256_q8_0(const uint8_t *b, uint16_t *row)
{
    float scale[8];
    f8_store(scale, f8_from_f16(b, 34));
    IN_MEMORY(scale);
    for (int block = 0; block < 8; block++, b += 34, row += 32) {
        const __m128i *q = (const __m128i *)(b + 2);
        const float both[2] = {scale[block], scale[block]};
        bf16_part(_mm_loadu_si128(q), _mm_loadu_si128(q + 1), both, NULL, row);
    }
}

static INLINE void bf16_256_q4_0(const uint8_t *b, uint16_t *row)
{
    float scale[8];
    f8_store(scale, f8_from_f16(b, 18));
    IN_MEMORY(scale);
    for (int pair = 0; pair < 4; pair++, b += 2 * 18, row += 64) {
        const __m512i tables = bf16_tables(values_from(-8), scale + 2 * pair, NULL);
        look_up_bf16(words_of_nibbles(b + 2), false, tables, row);
        look_up_bf16(words_of_nibbles(b + 18 + 2), true, tables, row + 32);
    }
}

static INLINE void bf16_256_q4_k(const uint8_t *b, uint16_t *row)
{
    block_values v;
    read_k_scales(b + 4, f16_at(b), f16_at(b + 2), &v);
    IN_MEMORY(v.scale);
    IN_MEMORY(v.min);
    for (int pair = 0; pair < 4; pair++, row += 64) {
        const __m512i words = _mm512_cvtepu8_epi16(bytes_32(b + 16 + pair * 32));
        const __m512i tables = bf16_tables(values_from(0), v.scale + 2 * pair, v.min + 2 * pair);
        look_up_bf16(words, false, tables, row);
        look_up_bf16(_mm512_srli_epi16(words, 4), true, tables, row + 32);
    }
}
#endif

#endif
