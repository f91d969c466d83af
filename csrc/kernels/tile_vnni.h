/* SPDX-License-Identifier: Apache-2.0 */
/* int8_tile of body_int8_tile.h with one register for 4 inputs of each of 16 rows of w. One instruction, DPBUSD, adds
 * their products with 4 bytes of x to 16 sums. Even and odd steps have separate sums: with 4 rows of x that makes the 8
 * sums in flight that two units with a latency of 5 cycles need. */
static INLINE __m512i panel_rows_16(const int8_panel *panels, int at)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(i8_load(panels[0].q[at][0])), i8_load(panels[1].q[at][0]), 1);
}

static INLINE f32x16 factors_16(const float *low, const float *high)
{
    return x16_from_halves(f8_load(low), f8_load(high));
}

/* Start value of the sums, from the pair of -4 sum x. With a zero point of 8: -8 sum x (times = 1). With signed q,
 * which DPBUSD needs offset by 128: -128 sum x (times = 16). */
static INLINE __m512i start_at(const int16_t minus_4[2], int times)
{
    int32_t pair;
    memcpy(&pair, minus_4, sizeof pair);
    return _mm512_madd_epi16(_mm512_set1_epi32(pair), _mm512_set1_epi16((short)times));
}

static INLINE void int8_tile(const int m, const int group, const int fit, const bool lowered, const g4_int8_rows *x,
                             size_t row, int input, size_t x_inputs, const int8_panel *panels, int k, float *acc)
{
    const bool has_sign = fit == 0, has_min = fit && !lowered;
    const size_t at = row * x_inputs + 4 * (size_t)input;
    const int8_t *q = x->q + at;
    const float *scale = x->scale + at / 32;
    const float *sums = (group == 32 ? x->sum32 : x->sum16) + at / (size_t)group;
    const int16_t(*minus_4)[2] = (const int16_t(*)[2])x->minus_4 + at / 32;
    const __m512i raise = _mm512_set1_epi8((char)0x80);
    f32x16 total[4];
    for (int i = 0; i < m; i++)
        total[i] = x16_load(acc + i * INT8_N);
    for (int g = 0; g < k / group; g++, q += group * 4) {
        __m512i dot[4][2];
        for (int i = 0; i < m; i++) {
            dot[i][0] = has_sign || lowered ? start_at(minus_4[g * 4 + i], has_sign ? 16 : 1) : _mm512_setzero_si512();
            dot[i][1] = _mm512_setzero_si512();
        }
#pragma GCC unroll 8
        for (int t = 0; t < group / 4; t++) {
            const __m512i rows = panel_rows_16(panels, g * group / 4 + t);
            const __m512i w = has_sign ? _mm512_xor_si512(rows, raise) : rows;
            for (int i = 0; i < m; i++) {
                int32_t bytes;
                memcpy(&bytes, q + place_in_x(i, t), 4);
                dot[i][t % 2] = _mm512_dpbusd_epi32(dot[i][t % 2], w, _mm512_set1_epi32(bytes));
            }
        }
        const f32x16 scales = factors_16(panels[0].scale[g], panels[1].scale[g]);
        for (int i = 0; i < m; i++) {
            const f32x16 dots = _mm512_cvtepi32_ps(_mm512_add_epi32(dot[i][0], dot[i][1]));
            total[i] = x16_fma(x16_mul(scales, x16_set1(scale[g * group / 32 * 4 + i])), dots, total[i]);
            if (has_min)
                total[i] = _mm512_fnmadd_ps(factors_16(panels[0].min[g], panels[1].min[g]), x16_set1(sums[g * 4 + i]),
                                            total[i]);
        }
    }
    for (int i = 0; i < m; i++)
        x16_store(acc + i * INT8_N, total[i]);
}

/* spin_int8 of body_limits.h, bit for bit, with the tile's instruction: 16 sums in flight, where two units with a
 * latency of 5 cycles need ten. */
#define OWN_SPIN_INT8
static double spin_int8(const int8_t *x, int32_t *sums, int n)
{
    enum { STEPS = 8 };
    __m512i w[2], dot[STEPS][2], total = _mm512_setzero_si512();
    for (int c = 0; c < 2; c++)
        w[c] = _mm512_and_si512(_mm512_loadu_si512(x + 64 * c), _mm512_set1_epi8(15));
    for (int j = 0; j < STEPS; j++)
        dot[j][0] = dot[j][1] = total;
    for (int i = 0; i < n; i++)
#pragma GCC unroll 8
        for (int j = 0; j < STEPS; j++) {
            const __m512i bytes = _mm512_broadcast_i64x4(i8_load(x + 32 * (j + i % STEPS)));
            for (int c = 0; c < 2; c++)
                dot[j][c] = _mm512_dpbusd_epi32(dot[j][c], w[c], bytes);
        }
    for (int j = 0; j < STEPS; j++)
        total = _mm512_add_epi32(total, _mm512_add_epi32(dot[j][0], dot[j][1]));
    sums[0] = (int32_t)f8_sum(f8_from_i32(i32_add(_mm512_castsi512_si256(total), _mm512_extracti64x4_epi64(total, 1))));
    return 2.0 * n * (STEPS * 2 * 64);
}
