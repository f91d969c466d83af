/* SPDX-License-Identifier: Apache-2.0 */
/* Sampling reads a whole row of logits or of probabilities: these kernels find the few entries that matter. */

static float lanes_max(f32x16 a)
{
    float lane[16];
    x16_store(lane, a);
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++)
            lane[l] = lane[l] > lane[l + half] ? lane[l] : lane[l + half];
    return lane[0];
}

static void block_maxima(const float *x, int n, int block, float *maxima)
{
    for (int first = 0; first < n; first += block) {
        const int end = n - first < block ? n : first + block;
        f32x16 max = x16_set1(-INFINITY), nan = x16_set1(0);
        int i = first;
        for (; i + 16 <= end; i += 16) {
            const f32x16 v = x16_load(x + i);
            max = x16_max(v, max); /* a NaN leaves `max` as it is */
            nan = x16_if_nan(v, v, nan);
        }
        float top = lanes_max(max), odd = x16_sum(nan);
        for (; i < end; i++) {
            top = x[i] > top ? x[i] : top;
            odd = x[i] != x[i] ? x[i] : odd;
        }
        *maxima++ = odd != odd ? NAN : top;
    }
}

enum { LIST_AT_ONCE = 64 };

/* Appends the ids from `first` on whose hit is 1, not 0: an id that is not kept is overwritten by the next. */
static INLINE int32_t *append_hits(const float *hits, int n, int first, int32_t *end)
{
    enum { LOW_BIT_OF_EXPONENT = 23 }; /* set in 1.0f, not in 0.0f */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, hits + i, sizeof bits);
        *end = first + i;
        end += bits >> LOW_BIT_OF_EXPONENT & 1;
    }
    return end;
}

static int list_within(const float *x, int n, float least, float most, int32_t *ids)
{
    const f32x16 low = x16_set1(least), high = x16_set1(most), one = x16_set1(1), zero = x16_set1(0);
    int32_t *end = ids;
    for (int j = 0; j < n; j += LIST_AT_ONCE) {
        const int some = n - j < LIST_AT_ONCE ? n - j : LIST_AT_ONCE;
        float hits[LIST_AT_ONCE];
        f32x16 any = zero;
        for (int l = 0; l < some; l += 16) {
            const f32x16 v = some - l >= 16 ? x16_load(x + j + l) : x16_load_some(x + j + l, some - l);
            const f32x16 hit = x16_if_less(v, low, zero, x16_if_less(high, v, zero, one));
            x16_store(hits + l, hit);
            any = x16_max(any, hit);
        }
        if (x16_sum(any) != 0)
            end = append_hits(hits, some, j, end);
    }
    return (int)(end - ids);
}

typedef float quarter_f32 __attribute__((vector_size(16)));
typedef double quarter_f64 __attribute__((vector_size(32)));

/* Adds 16 values to the sums of their lanes. */
static INLINE void add_to_lanes(quarter_f64 sum[4], const f32x16 *values)
{
    quarter_f32 quarter[4];
    memcpy(quarter, values, sizeof quarter);
    for (int i = 0; i < 4; i++)
        sum[i] += __builtin_convertvector(quarter[i], quarter_f64);
}

static void block_sums(const float *x, int n, int block, float least, double *sums)
{
    const f32x16 low = x16_set1(least), zero = x16_set1(0);
    for (int first = 0; first < n; first += block) {
        const int end = n - first < block ? n : first + block;
        quarter_f64 sum[4] = {{0}, {0}, {0}, {0}};
        double lane[16];
        for (int i = first; i < end; i += 16) {
            const f32x16 v = end - i >= 16 ? x16_load(x + i) : x16_load_some(x + i, end - i);
            const f32x16 kept = x16_if_less(v, low, zero, v);
            add_to_lanes(sum, &kept);
        }
        memcpy(lane, sum, sizeof lane);
        for (int half = 8; half; half /= 2)
            for (int l = 0; l < half; l++)
                lane[l] += lane[l + half];
        *sums++ = lane[0];
    }
}

static double sum_exp(const float *x, float max, int n)
{
    enum { BLOCK = 256 }; /* float32 sums of 16 numbers each; everything beyond in float64 */
    const f32x16 top = x16_set1(max);
    double total = 0;
    int i = 0;
    while (i + 16 <= n) {
        const int end = n - i < BLOCK ? n : i + BLOCK;
        f32x16 sum = x16_set1(0);
        for (; i + 16 <= end; i += 16)
            sum = x16_add(sum, x16_exp_negative(x16_sub(x16_load(x + i), top)));
        total += (double)x16_sum(sum);
    }
    for (; i < n; i++) {
        float one[16];
        x16_store(one, x16_exp_negative(x16_set1(x[i] - max)));
        total += (double)one[0];
    }
    return total;
}
