/* SPDX-License-Identifier: Apache-2.0 */
/* exp, tanh and gelu on f32x16, built from additions, multiplications, fma and divisions only. All of these round
 * correctly, so every instruction set gives the same bits. Errors were measured over all finite inputs against float64
 * (see tests/reference/test_kernels.py): exp and tanh are within 2 ulp of the result. So is gelu near zero; its error
 * grows (6 ulp at |x| = 3, 88 near -10, zero below) where its own value vanishes.
 */

/* Splits x = n ln 2 + r with |r| <= ln(2)/2; returns e^r, and n. Taylor to r^7 leaves 5e-9 relative. */
static inline f32x16 x16_exp_rest(f32x16 x, f32x16 *n)
{
    const f32x16 inverse_ln2 = x16_set1(0x1.715476p+0f);
    const f32x16 minus_ln2_high = x16_set1(-0x1.62e4p-1f), minus_ln2_low = x16_set1(-0x1.7f7d1cp-20f);
    *n = x16_round(x16_mul(x, inverse_ln2));
    f32x16 r = x16_fma(*n, minus_ln2_low, x16_fma(*n, minus_ln2_high, x));
    f32x16 p = x16_set1(1.0f / 5040);
    p = x16_fma(p, r, x16_set1(1.0f / 720));
    p = x16_fma(p, r, x16_set1(1.0f / 120));
    p = x16_fma(p, r, x16_set1(1.0f / 24));
    p = x16_fma(p, r, x16_set1(1.0f / 6));
    p = x16_fma(p, r, x16_set1(0.5f));
    p = x16_fma(p, r, x16_set1(1.0f));
    return x16_fma(p, r, x16_set1(1.0f));
}

/* e^x. 2^n is applied in two factors, since n reaches -150 (subnormal results) and 128 (overflow to infinity). */
static inline f32x16 x16_exp(f32x16 x)
{
    f32x16 n, p = x16_exp_rest(x16_min(x16_max(x, x16_set1(-104.0f)), x16_set1(89.0f)), &n);
    f32x16 n_half = x16_floor(x16_mul(n, x16_set1(0.5f)));
    p = x16_mul(x16_mul(p, x16_exp2_integral(n_half)), x16_exp2_integral(x16_sub(n, n_half)));
    return x16_if_nan(x, x, p);
}

/* e^x for x <= 0, in a softmax: the same bits as x16_exp down to e^-87.6, then 0 (n = -127), for two thirds of the
 * work. */
static inline f32x16 x16_exp_negative(f32x16 x)
{
    f32x16 n, p = x16_exp_rest(x16_max(x, x16_set1(-88.0f)), &n);
    return x16_if_nan(x, x, x16_mul(p, x16_exp2_integral(n)));
}

/* tanh x: below 0.625 an odd polynomial (minimax in the relative error, 4e-9), above it 1 - 2 / (e^2x + 1). */
static inline f32x16 x16_tanh(f32x16 x)
{
    const f32x16 one = x16_set1(1.0f), two = x16_set1(2.0f);
    f32x16 z = x16_mul(x, x);
    f32x16 p = x16_set1(-5.6599848042e-03f);
    p = x16_fma(p, z, x16_set1(2.0590984213e-02f));
    p = x16_fma(p, z, x16_set1(-5.3721066610e-02f));
    p = x16_fma(p, z, x16_set1(1.3331127517e-01f));
    p = x16_fma(p, z, x16_set1(-3.3333260526e-01f));
    f32x16 near_zero = x16_fma(x16_mul(p, z), x, x);
    f32x16 magnitude = x16_abs(x);
    f32x16 far = x16_sub(one, x16_div(two, x16_add(x16_exp(x16_mul(magnitude, two)), one)));
    far = x16_if_less(x, x16_set1(0.0f), x16_sub(x16_set1(0.0f), far), far);
    return x16_if_nan(x, x, x16_if_less(magnitude, x16_set1(0.625f), near_zero, far));
}

/* gelu with the tanh approximation, x/2 (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
static inline f32x16 x16_gelu(f32x16 x)
{
    const f32x16 minus_two_root = x16_set1(-1.5957691216f), cubic = x16_set1(0.044715f), one = x16_set1(1.0f);
    f32x16 inner = x16_fma(x16_mul(x16_mul(x, x), x), cubic, x);
    return x16_div(x, x16_add(one, x16_exp(x16_mul(inner, minus_two_root))));
}

/* Loads n < 16 values; the other lanes are zero. */
static inline f32x16 x16_load_some(const float *p, int n)
{
    float padded[16] = {0};
    memcpy(padded, p, (size_t)n * sizeof *p);
    return x16_load(padded);
}

static inline void x16_store_some(float *p, f32x16 a, int n)
{
    float padded[16];
    x16_store(padded, a);
    memcpy(p, padded, (size_t)n * sizeof *p);
}
