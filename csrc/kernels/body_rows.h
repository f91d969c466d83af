/* SPDX-License-Identifier: Apache-2.0 */
/* Row kernels: norms, sums, activations, softmax, rotary embedding, conversions. */

static float sum_squares(const float *x, int n)
{
    f32x16 sum = x16_set1(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        f32x16 v = x16_load(x + i);
        sum = x16_fma(v, v, sum);
    }
    if (i < n) {
        f32x16 v = x16_load_some(x + i, n - i);
        sum = x16_fma(v, v, sum);
    }
    return x16_sum(sum);
}

/* The loop of all lanewise kernels: `STEP(load, store)` is written once and runs on whole and on partial blocks. */
#define LANEWISE_KERNEL(n, STEP)         \
    do {                                 \
        int i = 0;                       \
        for (; i + 16 <= (n); i += 16) { \
            STEP(x16_load, x16_store)    \
        }                                \
        if (i < (n)) {                   \
            const int rest = (n) - i;    \
            STEP(LOAD_REST, STORE_REST)  \
        }                                \
    } while (0)
#define LOAD_REST(p) x16_load_some((p), rest)
#define STORE_REST(p, a) x16_store_some((p), (a), rest)

static void scale_mul(float *out, const float *x, float scale, const float *gain, int n)
{
    const f32x16 s = x16_set1(scale);
    if (gain) {
#define STEP(load, store) store(out + i, x16_mul(x16_mul(load(x + i), s), load(gain + i)));
        LANEWISE_KERNEL(n, STEP);
#undef STEP
    } else {
#define STEP(load, store) store(out + i, x16_mul(load(x + i), s));
        LANEWISE_KERNEL(n, STEP);
#undef STEP
    }
}

static void add(float *out, const float *a, const float *b, int n)
{
#define STEP(load, store) store(out + i, x16_add(load(a + i), load(b + i)));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static void mul(float *out, const float *a, const float *b, int n)
{
#define STEP(load, store) store(out + i, x16_mul(load(a + i), load(b + i)));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static void axpy(float *y, float a, const float *x, int n)
{
    const f32x16 factor = x16_set1(a);
#define STEP(load, store) store(y + i, x16_fma(factor, load(x + i), load(y + i)));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static void gelu(float *out, const float *x, int n)
{
#define STEP(load, store) store(out + i, x16_gelu(load(x + i)));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static void glu(float *out, const float *x, const float *gate, int n)
{
    const f32x16 one = x16_set1(1), zero = x16_set1(0);
#define STEP(load, store) store(out + i, x16_div(load(x + i), x16_add(one, x16_exp(x16_sub(zero, load(gate + i))))));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static void clamp(float *out, const float *x, float low, float high, int n)
{
    const f32x16 least = x16_set1(low), most = x16_set1(high);
#define STEP(load, store)                                                   \
    {                                                                       \
        f32x16 v = load(x + i);                                             \
        store(out + i, x16_if_nan(v, v, x16_min(x16_max(v, least), most))); \
    }
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static void mul_add(float *y, const float *a, const float *x, int n)
{
#define STEP(load, store) store(y + i, x16_fma(load(a + i), load(x + i), load(y + i)));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

/* Sum of (x - shift) or of its square, on 16 lanes. */
static float sum_shifted(const float *x, float shift, bool squared, int n)
{
    const f32x16 minus = x16_set1(shift), one = x16_set1(1);
    f32x16 sum = x16_set1(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        f32x16 d = x16_sub(x16_load(x + i), minus);
        sum = x16_fma(d, squared ? d : one, sum);
    }
    if (i < n) {
        float rest[16];
        x16_store(rest, x16_sub(x16_load_some(x + i, n - i), minus));
        f32x16 d = x16_load_some(rest, n - i);
        sum = x16_fma(d, squared ? d : one, sum);
    }
    return x16_sum(sum);
}

static void layer_norm(float *out, const float *x, const float *gain, const float *bias, float eps, int n)
{
    const float mean = sum_shifted(x, 0, false, n) / (float)n;
    const float variance = sum_shifted(x, mean, true, n) / (float)n;
    const f32x16 m = x16_set1(mean), r = x16_set1(1.0f / sqrtf(variance + eps));
#define STEP(load, store) store(out + i, x16_mul(x16_mul(x16_sub(load(x + i), m), r), load(gain + i)));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
    if (bias)
        add(out, out, bias, n);
}

static void softcap(float *x, float cap, int n)
{
    const f32x16 c = x16_set1(cap);
#define STEP(load, store) store(x + i, x16_mul(c, x16_tanh(x16_div(load(x + i), c))));
    LANEWISE_KERNEL(n, STEP);
#undef STEP
}

static float row_max(const float *x, int n)
{
    float lanes[16];
    f32x16 max = x16_set1(-INFINITY);
    int i = 0;
    for (; i + 16 <= n; i += 16)
        max = x16_max(max, x16_load(x + i));
    x16_store(lanes, max);
    for (int l = 0; i + l < n; l++)
        lanes[l] = lanes[l] > x[i + l] ? lanes[l] : x[i + l];
    for (int l = 1; l < 16; l++)
        lanes[0] = lanes[0] > lanes[l] ? lanes[0] : lanes[l];
    return lanes[0];
}

/* e^(x - max) / sum, the sum on 16 lanes from the row's first element. */
static void softmax(float *x, int n)
{
    const f32x16 max = x16_set1(row_max(x, n));
    f32x16 sum = x16_set1(0);
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        f32x16 e = x16_exp_negative(x16_sub(x16_load(x + i), max));
        x16_store(x + i, e);
        sum = x16_add(sum, e);
    }
    if (i < n) {
        x16_store_some(x + i, x16_exp_negative(x16_sub(x16_load_some(x + i, n - i), max)), n - i);
        sum = x16_add(sum, x16_load_some(x + i, n - i));
    }
    scale_mul(x, x, 1.0f / x16_sum(sum), NULL, n);
}

static void rope(float *x, const float *cosine, const float *sine, int half)
{
    float *y = x + half;
#define STEP(load, store)                                                                  \
    {                                                                                      \
        f32x16 a = load(x + i), b = load(y + i), c = load(cosine + i), s = load(sine + i); \
        store(x + i, x16_sub(x16_mul(a, c), x16_mul(b, s)));                               \
        store(y + i, x16_add(x16_mul(b, c), x16_mul(a, s)));                               \
    }
    LANEWISE_KERNEL(half, STEP);
#undef STEP
}

static void widen_f32(float *out, const void *in, int n) { memcpy(out, in, (size_t)n * sizeof *out); }

static void widen_f16(float *out, const void *in, int n)
{
    const uint16_t *x = in;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        x16_store(out + i, x16_load_f16(x + i));
    for (; i < n; i++)
        out[i] = g4_f16_to_f32(x[i]);
}

static void widen_bf16(float *out, const void *in, int n)
{
    const uint16_t *x = in;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        x16_store(out + i, x16_load_bf16(x + i));
    for (; i < n; i++)
        out[i] = g4_bf16_to_f32(x[i]);
}

/* Converts a row to a cache's type, rounding to nearest, ties to even. */
static void narrow_f32(void *out, const float *in, int n) { memcpy(out, in, (size_t)n * sizeof *in); }

static void narrow_bf16(void *out, const float *in, int n)
{
    uint16_t *to = out;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        x16_store_bf16(to + i, x16_load(in + i));
    for (; i < n; i++)
        to[i] = g4_f32_to_bf16(in[i]);
}

static void narrow_f16(void *out, const float *in, int n)
{
    uint16_t *to = out;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        x16_store_f16(to + i, x16_load(in + i));
    for (; i < n; i++)
        to[i] = g4_f32_to_f16(in[i]);
}
