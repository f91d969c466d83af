/* SPDX-License-Identifier: Apache-2.0 */
/* GGUF's block formats. Each is read into the same three things: whole numbers q, and for every GROUP of them (16 or 32) a
 * scale and a minimum, value = scale * (q - RAISE) - min, where RAISE is what keeps the stored q >= 0. In float32 and in this order that gives the bits of the gguf package's dequantiser
 * (quants.py, which also is the reference for the layouts); where a format has no minimum, x - 0 is x.
 *
 * Format        value                           stored in a block
 * Q8_0          d q                             d:f16 q:i8[32]
 * Q4_0 Q5_0     d (q - 8), d (q - 16)           d:f16 (high bits:32) nibbles: values 0-15 low, 16-31 high
 * Q4_1 Q5_1     d q + m                         d:f16 m:f16 (high bits:32) nibbles
 * IQ4_NL MXFP4  d table[q]                      d:f16, or the exponent of d:u8; nibbles
 * Q4_K Q5_K     d sc q - dmin m                 d:f16 dmin:f16 (sc, m):6 bits each for 8 x 32 values, (high bits), nibbles
 * Q2_K          d sc q - dmin m                 (sc, m):4 bits each for 16 x 16 values, 2 bits, d:f16 dmin:f16
 * Q3_K Q6_K     d sc (q - 4), d sc (q - 32)     high and low bits, sc for 16 x 16 values, d:f16
 * IQ4_XS        d sc table[q]                   d:f16 sc:6 bits for 8 x 32 values, nibbles
 */
#ifndef GEMMA4_KERNELS_FORMATS_H
#define GEMMA4_KERNELS_FORMATS_H

typedef struct {
    i8x32 q[8];
    float scale[16], min[16]; /* one for each group */
} block_values;

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* twice e2m1 */

static inline i8x32 bytes_32(const uint8_t *p) { return i8_load((const int8_t *)p); }

/* Of a block of 32. */
static inline void set_scale(block_values *v, float scale, float min)
{
    v->scale[0] = scale;
    v->min[0] = min;
}

/* Of a block of 256: d sc and dmin m, for 16 groups or for 8. */
static inline void set_scales(block_values *v, float d, const int8_t sc[16], float dmin, const int8_t m[16])
{
    x16_store(v->scale, x16_mul(x16_set1(d), x16_load_i8(sc)));
    x16_store(v->min, x16_mul(x16_set1(dmin), x16_load_i8(m)));
}

static inline void set_8_scales(block_values *v, float d, const int8_t sc[8], float dmin, const int8_t m[8])
{
    f8_store(v->scale, f8_mul(f8_set1(d), f8_load_i8(sc)));
    f8_store(v->min, f8_mul(f8_set1(dmin), f8_load_i8(m)));
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
    v->q[0] = i8_join(i8_nibbles(b + 6), i8_spread(b + 2), 4);
    set_scale(v, f16_at(b), 0);
}

static inline void read_q5_1(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_join(i8_nibbles(b + 8), i8_spread(b + 4), 4);
    set_scale(v, f16_at(b), -f16_at(b + 2));
}

static inline void read_iq4_nl(const uint8_t *b, block_values *v)
{
    v->q[0] = i8_lookup(iq4_values, i8_nibbles(b + 2));
    set_scale(v, f16_at(b), 0);
}

static inline void read_mxfp4(const uint8_t *b, block_values *v)
{
    uint32_t exponent = b[0], bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23; /* 2^(e - 128) */
    v->q[0] = i8_lookup(mxfp4_values, i8_nibbles(b + 1));
    set_scale(v, g4_f32_from_bits(bits), 0);
}

/* Each of the two runs of 32 bytes holds four times 32 values of 2 bits. */
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

/* As Q2_K, with a third bit in the first 32 bytes. */
static inline void read_q3_k(const uint8_t *b, block_values *v)
{
    const uint8_t *scales = b + 96;
    int8_t sc[16];
    for (int g = 0; g < 16; g++) {
        int low_4 = scales[g % 8] >> (g / 8 * 4) & 15, high_2 = scales[8 + g % 4] >> (g / 4 * 2) & 3;
        sc[g] = (int8_t)((low_4 | high_2 << 4) - 32);
    }
    set_scales(v, f16_at(b + 108), sc, 0, no_minima);
    for (int part = 0; part < 8; part++) {
        i8x32 low = i8_bits(bytes_32(b + 32 + part / 4 * 32), part % 4 * 2, 3);
        v->q[part] = i8_join(low, i8_bits(bytes_32(b), part, 1), 2);
    }
}

/* The eight 6-bit scales and minima of Q4_K and Q5_K, four at a time: four whole ones each in bytes 0-3 and 4-7, whose
 * top bits complete the halves of bytes 8-11. */
static inline void read_k_scales(const uint8_t *packed, float d, float dmin, block_values *v)
{
    uint32_t word[3], scales[2], minima[2];
    int8_t sc[8], m[8];
    memcpy(word, packed, 12);
    scales[0] = word[0] & 0x3f3f3f3fu;
    minima[0] = word[1] & 0x3f3f3f3fu;
    scales[1] = (word[2] & 0x0f0f0f0fu) | (word[0] >> 2 & 0x30303030u);
    minima[1] = (word[2] >> 4 & 0x0f0f0f0fu) | (word[1] >> 2 & 0x30303030u);
    memcpy(sc, scales, 8);
    memcpy(m, minima, 8);
    set_8_scales(v, d, sc, dmin, m);
}

/* 32 bytes at a time hold the next 32 values in their low halves and the 32 after them in their high halves. */
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
        v->q[part] = i8_join(low, i8_bits(bytes_32(b + 16), part, 1), 4);
    }
}

/* Each half: 64 bytes with the low halves of its first 64 values, then of the other 64; 32 bytes with 2 bits more. */
static inline void read_q6_k(const uint8_t *b, block_values *v)
{
    set_scales(v, f16_at(b + 208), (const int8_t *)b + 192, 0, no_minima);
    for (int part = 0; part < 8; part++) {
        const int half = part / 4, quarter = part % 4;
        i8x32 low = i8_bits(bytes_32(b + half * 64 + quarter % 2 * 32), quarter / 2 * 4, 15);
        i8x32 high = i8_bits(bytes_32(b + 128 + half * 32), quarter * 2, 3);
        v->q[part] = i8_join(low, high, 4);
    }
}

static inline void read_iq4_xs(const uint8_t *b, block_values *v)
{
    const int high = b[2] | b[3] << 8;
    int8_t sc[8];
    for (int part = 0; part < 8; part++) {
        int low_4 = b[4 + part / 2] >> (part % 2 * 4) & 15;
        sc[part] = (int8_t)((low_4 | (high >> (part * 2) & 3) << 4) - 32);
    }
    set_8_scales(v, f16_at(b), sc, 0, no_minima);
    for (int part = 0; part < 8; part++)
        v->q[part] = i8_lookup(iq4_values, i8_nibbles(b + 8 + part * 16));
}

#endif
