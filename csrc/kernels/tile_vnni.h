/* SPDX-License-Identifier: Apache-2.0 */
/* int8_tile of body_int8_tile.h with one register for 4 inputs of each of 16 rows of w. One instruction, DPBUSD, adds
 * their products with 4 bytes of x to 16 sums. Two panels side by side make 8 sums in flight with 4 rows of x, enough
 * for two units with a latency of 4 cycles, and 6 loads for 8 products: one panel needs 5 loads for 4. One Zen 5 core,
 * 512 rows of Q4_0 at 6144 inputs: 505 Gop/s with one panel of two separate halves, 600 in one, 690 with two. */
_Static_assert(INT8_PANELS == 2, "see above");

/* Start value of the sums, from -8 sum x: that with a zero point of 8. With signed q, which DPBUSD needs offset by 128:
 * -128 sum x. (A multiplication here, one for each row, would wait for the unit of the products: 4 % of the time.) */
static INLINE __m512i start_at(int32_t minus_8, bool has_sign)
{
    const __m512i start = _mm512_set1_epi32(minus_8);
    return has_sign ? _mm512_slli_epi32(start, 4) : start;
}

static INLINE void int8_tile(const int m, const int group, const int fit, const bool lowered, const g4_int8_rows *x,
                             size_t row, int input, size_t x_inputs, const int8_panel *panels, int k, float *acc,
                             next_rows next)
{
    const bool has_sign = fit == 0, has_min = fit && !lowered;
    const size_t at = row * x_inputs + 4 * (size_t)input;
    const int8_t *q = x->q + at;
    const float *scale = x->scale + at / 32;
    const float *sums = (group == 32 ? x->sum32 : x->sum16) + at / (size_t)group;
    const int32_t *minus_8 = x->minus_8 + at / 32;
    const __m512i raise = _mm512_set1_epi8((char)0x80);
    f32x16 total[4][INT8_PANELS];
    for (int i = 0; i < m; i++)
        for (int p = 0; p < INT8_PANELS; p++)
            total[i][p] = x16_load(acc + i * INT8_N + p * 16);
    for (int g = 0; g < k / group; g++, q += group * 4) {
        __m512i dot[4][INT8_PANELS];
        prefetch_row(&next, g);
        for (int i = 0; i < m; i++)
            for (int p = 0; p < INT8_PANELS; p++)
                dot[i][p] = has_sign || lowered ? start_at(minus_8[g * 4 + i], has_sign) : _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int t = 0; t < group / 4; t++) {
            __m512i w[INT8_PANELS];
            for (int p = 0; p < INT8_PANELS; p++) {
                const __m512i rows = _mm512_load_si512(panels[p].q[g * group / 4 + t]);
                w[p] = has_sign ? _mm512_xor_si512(rows, raise) : rows;
            }
            for (int i = 0; i < m; i++) {
                int32_t bytes;
                memcpy(&bytes, q + place_in_x(i, t), 4);
                for (int p = 0; p < INT8_PANELS; p++)
                    dot[i][p] = _mm512_dpbusd_epi32(dot[i][p], w[p], _mm512_set1_epi32(bytes));
            }
        }
        for (int i = 0; i < m; i++)
            for (int p = 0; p < INT8_PANELS; p++) {
                const f32x16 factors =
                    x16_mul(x16_load(panels[p].scale[g][0]), x16_set1(scale[g * group / 32 * 4 + i]));
                total[i][p] = x16_fma(factors, _mm512_cvtepi32_ps(dot[i][p]), total[i][p]);
                if (has_min)
                    total[i][p] =
                        _mm512_fnmadd_ps(x16_load(panels[p].min[g][0]), x16_set1(sums[g * 4 + i]), total[i][p]);
            }
    }
    for (int i = 0; i < m; i++)
        for (int p = 0; p < INT8_PANELS; p++)
            x16_store(acc + i * INT8_N + p * 16, total[i][p]);
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

#define INT8_PACK "kernels/pack_vnni.h" /* how 16 rows of weights get into a panel */
