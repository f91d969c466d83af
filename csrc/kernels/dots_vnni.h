/* SPDX-License-Identifier: Apache-2.0 */
/* group_dots of body_int8_tile.h where 16 rows of w fill one register. Even and odd steps are added up apart: with 4 rows of
 * x that makes the 8 sums in flight which two units of 4 to 5 cycles want. */
static INLINE __m512i panel_rows_16(const int8_panel *panels, int at)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(i8_load(panels[0].q[at][0])), i8_load(panels[1].q[at][0]), 1);
}

static INLINE void group_dots(const int m, const int group, const int fit, const int8_t *x, const int16_t (*start)[2],
                              const int8_panel *panels, int four, i32x8 dot[4][2])
{
    const __m512i zero = _mm512_setzero_si512();
    __m512i sum[4][2];
    for (int i = 0; i < m; i++) {
        sum[i][0] = start ? _mm512_set1_epi32(start[i][0] + start[i][1]) : zero;
        sum[i][1] = zero;
    }
    for (int t = 0; t < group / 4; t += 2)
        for (int odd = 0; odd < 2; odd++) {
            const __m512i w = panel_rows_16(panels, four + t + odd);
            const __mmask64 negative = _mm512_movepi8_mask(w);
            const __m512i magnitude = fit ? w : _mm512_abs_epi8(w);
            for (int i = 0; i < m; i++) {
                int32_t bytes;
                memcpy(&bytes, x + place_in_x(i, t + odd), 4);
                __m512i xs = _mm512_set1_epi32(bytes);
                if (fit == 0)
                    xs = _mm512_mask_sub_epi8(xs, negative, zero, xs);
                sum[i][odd] = _mm512_dpbusd_epi32(sum[i][odd], magnitude, xs);
            }
        }
    for (int i = 0; i < m; i++) {
        const __m512i total = _mm512_add_epi32(sum[i][0], sum[i][1]);
        dot[i][0] = _mm512_castsi512_si256(total);
        dot[i][1] = _mm512_extracti64x4_epi64(total, 1);
    }
}
