/* SPDX-License-Identifier: Apache-2.0 */
/* group_dots of body_int8_tile.h with Armv8.6's matrix instruction: 2 rows of x times 2 of w, 8 inputs each, give 4
 * sums. That is twice the work of a dot product instruction. transpose_fours puts 8 inputs of 2 rows side by side. */
/* Start values for a row of x with two rows of w, then for the next row of x. */
static inline int32x4_t start_of_rows(const int16_t a[2], const int16_t b[2])
{
    return vcombine_s32(vdup_n_s32(a[0] + a[1]), vdup_n_s32(b[0] + b[1]));
}

static INLINE void group_dots(const int m, const int group, const int fit, const int8_t *x, const int16_t (*start)[2],
                              const int8_panel *panel, int four, i32x8 dot[4][2])
{
    const int n_pairs = (m + 1) / 2;
    int32x4_t sum[2][8];
    (void)fit;
    for (int p = 0; p < n_pairs; p++)
        for (int w = 0; w < 8; w++)
            sum[p][w] = start ? start_of_rows(start[2 * p], start[2 * p + 1 < m ? 2 * p + 1 : 2 * p]) : vdupq_n_s32(0);
    for (int t = 0; t < group / 4; t += 2) {
        int8x16_t xs[2];
        for (int p = 0; p < n_pairs; p++) {
            const int second = 2 * p + 1 < m ? 2 * p + 1 : 2 * p;
            xs[p] = vcombine_s8(vld1_s8(x + place_in_x(2 * p, t)), vld1_s8(x + place_in_x(second, t)));
        }
        for (int w = 0; w < 8; w++) {
            const int8x16_t ws = vld1q_s8(panel->q[four + t + w % 4 / 2][w / 4][w % 2 * 4]);
            for (int p = 0; p < n_pairs; p++)
                sum[p][w] = vmmlaq_s32(sum[p][w], xs[p], ws);
        }
    }
    for (int i = 0; i < m; i++)
        for (int half = 0; half < 2; half++) {
            int64x2_t pair[4];
            for (int w = 0; w < 4; w++)
                pair[w] = vreinterpretq_s64_s32(sum[i / 2][half * 4 + w]);
            dot[i][half].lo =
                vreinterpretq_s32_s64(i % 2 ? vtrn2q_s64(pair[0], pair[1]) : vtrn1q_s64(pair[0], pair[1]));
            dot[i][half].hi =
                vreinterpretq_s32_s64(i % 2 ? vtrn2q_s64(pair[2], pair[3]) : vtrn1q_s64(pair[2], pair[3]));
        }
}
