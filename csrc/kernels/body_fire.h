/* SPDX-License-Identifier: Apache-2.0 */
/* Which features of a dictionary fire. Few do, so 64 are tested at a time, and only where one fires are they listed. */

enum { FIRE_AT_ONCE = 64 };

/* The values of up to 16 features from `at` on; 1 in hits where one fires, else 0. Returns the hits, with NaN in the lane
 * of a feature whose value is NaN or an infinity. Lanes past n are 0 throughout: 0 > least never holds. */
static INLINE f32x16 fire_16(float *x, const g4_firing *f, int at, int n, f32x16 least, float *hits)
{
    const bool whole = n >= 16;
    const f32x16 zero = x16_set1(0);
#define FIRE_LOAD(p) (whole ? x16_load(p) : x16_load_some((p), n))
    const f32x16 raw = FIRE_LOAD(x);
    f32x16 value = raw, fires = x16_set1(1);
    if (f->before)
        value = x16_add(value, FIRE_LOAD(f->before + at));
    if (f->scale)
        value = x16_mul(value, FIRE_LOAD(f->scale + at));
    if (f->after)
        value = x16_add(value, FIRE_LOAD(f->after + at));
    if (f->gate)
        fires = x16_if_less(zero, x16_add(raw, FIRE_LOAD(f->gate + at)), fires, zero);
    if (f->threshold)
        least = x16_max(least, FIRE_LOAD(f->threshold + at));
#undef FIRE_LOAD
    if (whole)
        x16_store(x, value);
    else
        x16_store_some(x, value, n);
    fires = x16_if_less(least, value, fires, zero);
    x16_store(hits, fires);
    return x16_add(fires, x16_sub(value, value));
}

static int fire(float *x, const g4_firing *firing, int first, int n, float least, int32_t *ids)
{
    int n_ids = 0;
    for (int j = 0; j < n; j += FIRE_AT_ONCE) {
        const int some = n - j < FIRE_AT_ONCE ? n - j : FIRE_AT_ONCE;
        float hits[FIRE_AT_ONCE];
        f32x16 any = x16_set1(0);
        for (int l = 0; l < some; l += 16)
            any = x16_add(any, fire_16(x + j + l, firing, first + j + l, some - l, x16_set1(least), hits + l));
        const float total = x16_sum(any);
        if (total == 0)
            continue;
        if (total != total)
            return -1;
        for (int l = 0; l < some; l++)
            if (hits[l] > 0)
                ids[n_ids++] = j + l;
    }
    return n_ids;
}
