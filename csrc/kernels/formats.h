/* SPDX-License-Identifier: Apache-2.0 */
/* GGUF's block formats. Each is read into the same three things: whole numbers q, and for every 16 of them a scale and a
 * minimum, value = scale * q - min. In float32 and in this order that gives the bits of the gguf package's dequantiser
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
    int8_t q[256];
    float scale[16], min[16]; /* one for 16 values */
} block_values;

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t mxfp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* twice e2m1 */

static inline void set_groups(block_values *v, int first, int n, float scale, float min)
{
    for (int g = first; g < first + n; g++) {
        v->scale[g] = scale;
        v->min[g] = min;
    }
}

/* q[0..15] the low and q[16..31] the high halves of 16 bytes, plus an offset. */
static inline void nibbles_16(const uint8_t *bytes, int offset, int8_t *q)
{
    for (int i = 0; i < 16; i++)
        q[i] = (int8_t)((bytes[i] & 15) + offset);
    for (int i = 0; i < 16; i++)
        q[16 + i] = (int8_t)((bytes[i] >> 4) + offset);
}

/* The same with a fifth bit each: value i's is bit i of `high`. */
static inline void nibbles_16_high(const uint8_t *bytes, const uint8_t *high, int offset, int8_t *q)
{
    nibbles_16(bytes, offset, q);
    for (int i = 0; i < 32; i++)
        q[i] = (int8_t)(q[i] + ((high[i / 8] >> (i % 8) & 1) << 4));
}

static inline void nibbles_16_table(const uint8_t *bytes, const int8_t *table, int8_t *q)
{
    for (int i = 0; i < 16; i++) {
        q[i] = table[bytes[i] & 15];
        q[16 + i] = table[bytes[i] >> 4];
    }
}

static inline void read_q8_0(const uint8_t *b, block_values *v)
{
    memcpy(v->q, b + 2, 32);
    set_groups(v, 0, 2, f16_at(b), 0);
}

static inline void read_q4_0(const uint8_t *b, block_values *v)
{
    nibbles_16(b + 2, -8, v->q);
    set_groups(v, 0, 2, f16_at(b), 0);
}

static inline void read_q4_1(const uint8_t *b, block_values *v)
{
    nibbles_16(b + 4, 0, v->q);
    set_groups(v, 0, 2, f16_at(b), -f16_at(b + 2));
}

static inline void read_q5_0(const uint8_t *b, block_values *v)
{
    nibbles_16_high(b + 6, b + 2, -16, v->q);
    set_groups(v, 0, 2, f16_at(b), 0);
}

static inline void read_q5_1(const uint8_t *b, block_values *v)
{
    nibbles_16_high(b + 8, b + 4, 0, v->q);
    set_groups(v, 0, 2, f16_at(b), -f16_at(b + 2));
}

static inline void read_iq4_nl(const uint8_t *b, block_values *v)
{
    nibbles_16_table(b + 2, iq4_values, v->q);
    set_groups(v, 0, 2, f16_at(b), 0);
}

static inline void read_mxfp4(const uint8_t *b, block_values *v)
{
    uint32_t exponent = b[0], bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23; /* 2^(e - 128) */
    nibbles_16_table(b + 1, mxfp4_values, v->q);
    set_groups(v, 0, 2, g4_f32_from_bits(bits), 0);
}

static inline void read_q2_k(const uint8_t *b, block_values *v)
{
    const uint8_t *scales = b, *bits = b + 16;
    const float d = f16_at(b + 80), dmin = f16_at(b + 82);
    for (int g = 0; g < 16; g++)
        set_groups(v, g, 1, d * (float)(scales[g] & 15), dmin * (float)(scales[g] >> 4));
    for (int part = 0; part < 8; part++)
        for (int i = 0; i < 32; i++)
            v->q[part * 32 + i] = (int8_t)(bits[part / 4 * 32 + i] >> (part % 4 * 2) & 3);
}

static inline void read_q3_k(const uint8_t *b, block_values *v)
{
    const uint8_t *high = b, *bits = b + 32, *scales = b + 96;
    const float d = f16_at(b + 108);
    for (int g = 0; g < 16; g++) {
        int low_4 = scales[g % 8] >> (g / 8 * 4) & 15, high_2 = scales[8 + g % 4] >> (g / 4 * 2) & 3;
        set_groups(v, g, 1, d * (float)((low_4 | high_2 << 4) - 32), 0);
    }
    for (int part = 0; part < 8; part++)
        for (int i = 0; i < 32; i++) {
            int low = bits[part / 4 * 32 + i] >> (part % 4 * 2) & 3;
            v->q[part * 32 + i] = (int8_t)(low + (high[i] >> part & 1) * 4 - 4);
        }
}

/* The eight 6-bit scales and minima of Q4_K and Q5_K: 4 whole ones each in bytes 0-3 and 4-7, whose top bits complete
 * the nibbles of bytes 8-11. */
static inline void read_k_scales(const uint8_t *packed, float d, float dmin, block_values *v)
{
    for (int g = 0; g < 4; g++) {
        int scale = packed[g] & 63, min = packed[4 + g] & 63;
        set_groups(v, 2 * g, 2, d * (float)scale, dmin * (float)min);
        scale = (packed[8 + g] & 15) | (packed[g] >> 6) << 4;
        min = packed[8 + g] >> 4 | (packed[4 + g] >> 6) << 4;
        set_groups(v, 2 * g + 8, 2, d * (float)scale, dmin * (float)min);
    }
}

/* 32 bytes at a time hold the next 32 values in their low halves and the 32 after them in their high halves. */
static inline void nibbles_32(const uint8_t *bytes, int8_t *q)
{
    for (int i = 0; i < 32; i++)
        q[i] = (int8_t)(bytes[i] & 15);
    for (int i = 0; i < 32; i++)
        q[32 + i] = (int8_t)(bytes[i] >> 4);
}

static inline void read_q4_k(const uint8_t *b, block_values *v)
{
    read_k_scales(b + 4, f16_at(b), f16_at(b + 2), v);
    for (int part = 0; part < 4; part++)
        nibbles_32(b + 16 + part * 32, v->q + part * 64);
}

static inline void read_q5_k(const uint8_t *b, block_values *v)
{
    const uint8_t *high = b + 16;
    read_k_scales(b + 4, f16_at(b), f16_at(b + 2), v);
    for (int part = 0; part < 4; part++)
        nibbles_32(b + 48 + part * 32, v->q + part * 64);
    for (int part = 0; part < 8; part++)
        for (int i = 0; i < 32; i++)
            v->q[part * 32 + i] = (int8_t)(v->q[part * 32 + i] | (high[i] >> part & 1) << 4);
}

static inline void read_q6_k(const uint8_t *b, block_values *v)
{
    const float d = f16_at(b + 208);
    for (int g = 0; g < 16; g++)
        set_groups(v, g, 1, d * (float)(int8_t)b[192 + g], 0);
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = b + half * 64, *high = b + 128 + half * 32;
        int8_t *q = v->q + half * 128;
        for (int i = 0; i < 32; i++) {
            q[i] = (int8_t)(((low[i] & 15) | (high[i] & 3) << 4) - 32);
            q[32 + i] = (int8_t)(((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4) - 32);
            q[64 + i] = (int8_t)((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
            q[96 + i] = (int8_t)((low[32 + i] >> 4 | high[i] >> 6 << 4) - 32);
        }
    }
}

static inline void read_iq4_xs(const uint8_t *b, block_values *v)
{
    const float d = f16_at(b);
    const int high = b[2] | b[3] << 8;
    for (int part = 0; part < 8; part++) {
        int scale = (b[4 + part / 2] >> (part % 2 * 4) & 15) | (high >> (part * 2) & 3) << 4;
        set_groups(v, 2 * part, 2, d * (float)(scale - 32), 0);
        nibbles_16_table(b + 8 + part * 16, iq4_values, v->q + part * 32);
    }
}

#endif
