/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/rows.h"

#include <math.h>

#include "ops/profile.h"

/* Operands of the row operations; each operation uses some of them. */
typedef struct {
    float *out;
    const float *a, *b, *scale, *bias;
    const g4_matrix *table;
    const int32_t *ids;
    float factor, eps, low, high;
    int n, n_heads;
    size_t stride;
} operands;

#define ROW(pointer, i) ((pointer) + (size_t)(i) * (size_t)o->n)

/* Cost per value of a row: arithmetic operations, and float32 arrays read or written. */
typedef struct {
    g4_op op;
    int work, arrays;
} row_cost;

enum { EXP_WORK = 30, TANH_WORK = 50 }; /* operations of x16_exp and x16_tanh */

/* g4_exec_rows, recorded in the profile. */
static g4_status run_rows(g4_exec *exec, row_cost cost, int n_rows, size_t n, g4_rows_fn fn, void *context)
{
    const double start = g4_profile_start(exec), n_values = (double)n_rows * (double)n;
    G4_TRY(g4_exec_rows(exec, n_rows, n, fn, context));
    g4_profile_end(exec, cost.op, start, n_values * cost.work, n_values * cost.arrays * (double)sizeof(float));
    return G4_OK;
}

static void rms_scale_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        o->out[i] = sqrtf(exec->kernels->sum_squares(ROW(o->a, i), o->n) / (float)o->n + o->eps);
}

g4_status g4_rms_scale(g4_exec *exec, const float *x, int n_rows, int n, float eps, float *scale)
{
    operands o = {.out = scale, .a = x, .eps = eps, .n = n};
    return run_rows(exec, (row_cost){G4_OP_NORM, 2, 1}, n_rows, (size_t)n, rms_scale_rows, &o);
}

static void normalize_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->scale_mul(ROW(o->out, i), ROW(o->a, i), 1.0f / o->scale[i], NULL, o->n);
}

g4_status g4_normalize(g4_exec *exec, const float *x, const float *scale, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = x, .scale = scale, .n = n};
    return run_rows(exec, (row_cost){G4_OP_NORM, 1, 2}, n_rows, (size_t)n, normalize_rows, &o);
}

static void scale_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->scale_mul(ROW(o->out, i), ROW(o->a, i), o->factor, o->b, o->n);
}

g4_status g4_scale_rows(g4_exec *exec, const float *x, float factor, const float *gain, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = x, .b = gain, .factor = factor, .n = n};
    return run_rows(exec, (row_cost){G4_OP_SCALE, 1, 2}, n_rows, (size_t)n, scale_rows, &o);
}

static void rms_norm_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++) {
        float scale = sqrtf(exec->kernels->sum_squares(ROW(o->a, i), o->n) / (float)o->n + o->eps);
        exec->kernels->scale_mul(ROW(o->out, i), ROW(o->a, i), 1.0f / scale, o->b, o->n);
    }
}

g4_status g4_rms_norm(g4_exec *exec, const float *x, const float *gain, int n_rows, int n, float eps, float *out)
{
    operands o = {.out = out, .a = x, .b = gain, .eps = eps, .n = n};
    return run_rows(exec, (row_cost){G4_OP_NORM, 4, 2}, n_rows, (size_t)n, rms_norm_rows, &o);
}

static void add_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->add(ROW(o->out, i), ROW(o->a, i), ROW(o->b, i), o->n);
}

g4_status g4_add_rows(g4_exec *exec, const float *a, const float *b, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = a, .b = b, .n = n};
    return run_rows(exec, (row_cost){G4_OP_ADD, 1, 3}, n_rows, (size_t)n, add_rows, &o);
}

static void mul_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->mul(ROW(o->out, i), ROW(o->a, i), ROW(o->b, i), o->n);
}

g4_status g4_mul_rows(g4_exec *exec, const float *a, const float *b, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = a, .b = b, .n = n};
    return run_rows(exec, (row_cost){G4_OP_MUL, 1, 3}, n_rows, (size_t)n, mul_rows, &o);
}

static void gelu_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->gelu(ROW(o->out, i), ROW(o->a, i), o->n);
}

g4_status g4_gelu_rows(g4_exec *exec, const float *x, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = x, .n = n};
    return run_rows(exec, (row_cost){G4_OP_GELU, EXP_WORK + 8, 2}, n_rows, (size_t)n, gelu_rows, &o);
}

/* Blocks of AT_ONCE values: mul reads the output of gelu from the first-level cache. */
static void gelu_mul_rows(const g4_exec *exec, void *context, int first, int end)
{
    enum { AT_ONCE = 2048 };
    const operands *o = context;
    for (int i = first; i < end; i++)
        for (int j = 0; j < o->n; j += AT_ONCE) {
            const int n = o->n - j < AT_ONCE ? o->n - j : AT_ONCE;
            exec->kernels->gelu(ROW(o->out, i) + j, ROW(o->a, i) + j, n);
            exec->kernels->mul(ROW(o->out, i) + j, ROW(o->out, i) + j, ROW(o->b, i) + j, n);
        }
}

g4_status g4_gelu_mul_rows(g4_exec *exec, const float *gate, const float *up, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = gate, .b = up, .n = n};
    return run_rows(exec, (row_cost){G4_OP_GELU, EXP_WORK + 9, 3}, n_rows, (size_t)n, gelu_mul_rows, &o);
}

static void glu_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->glu(ROW(o->out, i), o->a + (size_t)i * o->stride, o->b + (size_t)i * o->stride, o->n);
}

g4_status g4_glu_rows(g4_exec *exec, const float *x, const float *gate, size_t stride, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = x, .b = gate, .n = n, .stride = stride};
    return run_rows(exec, (row_cost){G4_OP_GLU, EXP_WORK + 3, 3}, n_rows, (size_t)n, glu_rows, &o);
}

static void clamp_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->clamp(ROW(o->out, i), ROW(o->a, i), o->low, o->high, o->n);
}

g4_status g4_clamp_rows(g4_exec *exec, const float *x, float low, float high, int n_rows, int n, float *out)
{
    operands o = {.out = out, .a = x, .low = low, .high = high, .n = n};
    const double start = g4_profile_start(exec), n_values = (double)n_rows * (double)n;
    G4_TRY(g4_exec_rows(exec, n_rows, (size_t)n / 4 + 1, clamp_rows, &o));
    g4_profile_end(exec, G4_OP_CLAMP, start, 2 * n_values, 2 * n_values * (double)sizeof(float));
    return G4_OK;
}

static void layer_norm_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context; /* b = gain */
    for (int i = first; i < end; i++)
        exec->kernels->layer_norm(ROW(o->out, i), ROW(o->a, i), o->b, o->bias, o->eps, o->n);
}

g4_status g4_layer_norm_rows(g4_exec *exec, const float *x, const float *gain, const float *bias, float eps, int n_rows,
                             int n, float *out)
{
    operands o = {.out = out, .a = x, .b = gain, .bias = bias, .eps = eps, .n = n};
    return run_rows(exec, (row_cost){G4_OP_NORM, 8, 2}, n_rows, (size_t)n, layer_norm_rows, &o);
}

static void softmax_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++)
        exec->kernels->softmax(ROW(o->out, i), o->n);
}

g4_status g4_softmax_rows(g4_exec *exec, float *x, int n_rows, int n)
{
    operands o = {.out = x, .n = n};
    return run_rows(exec, (row_cost){G4_OP_SOFTMAX, EXP_WORK + 4, 2}, n_rows, (size_t)n, softmax_rows, &o);
}

/* One row of logits is large (262,144 values), so tasks are slices of rows. */
typedef struct {
    float *x;
    float cap;
    size_t n;
} softcap_operands;

enum { SOFTCAP_SLICE = 1 << 13 };

static void softcap_slices(const g4_exec *exec, void *context, int first, int end)
{
    const softcap_operands *o = context;
    for (int i = first; i < end; i++) {
        size_t start = (size_t)i * SOFTCAP_SLICE;
        size_t length = o->n - start < SOFTCAP_SLICE ? o->n - start : SOFTCAP_SLICE;
        exec->kernels->softcap(o->x + start, o->cap, (int)length);
    }
}

g4_status g4_softcap_rows(g4_exec *exec, float *x, float cap, int n_rows, int n)
{
    softcap_operands o = {x, cap, (size_t)n_rows * (size_t)n};
    const int n_slices = (int)((o.n + SOFTCAP_SLICE - 1) / SOFTCAP_SLICE);
    const double start = g4_profile_start(exec);
    G4_TRY(g4_exec_rows(exec, n_slices, SOFTCAP_SLICE, softcap_slices, &o));
    g4_profile_end(exec, G4_OP_SOFTCAP, start, (double)o.n * (TANH_WORK + 2), 2.0 * (double)o.n * sizeof *x);
    return G4_OK;
}

static void gather_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context;
    for (int i = first; i < end; i++) {
        const void *row = g4_matrix_row(o->table, (size_t)o->ids[i]);
        g4_widen_for(exec->kernels, o->table->dtype)(ROW(o->out, i), row, o->n);
        exec->kernels->scale_mul(ROW(o->out, i), ROW(o->out, i), o->factor, NULL, o->n);
    }
}

g4_status g4_gather_rows(g4_exec *exec, const g4_matrix *table, const int32_t *ids, int n_rows, float factor,
                         float *out)
{
    operands o = {.out = out, .table = table, .ids = ids, .factor = factor, .n = (int)table->n_cols};
    const double start = g4_profile_start(exec), n_values = (double)n_rows * (double)table->n_cols;
    G4_TRY(g4_exec_rows(exec, n_rows, table->n_cols, gather_rows, &o));
    const double row_bytes = (double)(g4_dtype_bytes(table->dtype, table->n_cols) + table->n_cols * sizeof *out);
    g4_profile_end(exec, table->op, start, n_values, n_rows * row_bytes);
    return G4_OK;
}

typedef struct {
    const int32_t *positions;
    const float *inv_freq;
    float *cosine, *sine;
    int half;
} rope_table_operands;

static void rope_table_rows(const g4_exec *exec, void *context, int first, int end)
{
    const rope_table_operands *o = context;
    (void)exec;
    for (int i = first; i < end; i++) {
        for (int j = 0; j < o->half; j++) {
            float angle = (float)o->positions[i] * o->inv_freq[j];
            o->cosine[(size_t)i * (size_t)o->half + (size_t)j] = (float)cos((double)angle);
            o->sine[(size_t)i * (size_t)o->half + (size_t)j] = (float)sin((double)angle);
        }
    }
}

g4_status g4_rope_table(g4_exec *exec, const int32_t *positions, int n_rows, const float *inv_freq, int half,
                        float *cosine, float *sine)
{
    rope_table_operands o = {positions, inv_freq, cosine, sine, half};
    const row_cost cost = {G4_OP_ROPE_TABLE, 2, 0}; /* sine and cosine of an angle count as the work of 32 values */
    return run_rows(exec, cost, n_rows, (size_t)half * 32, rope_table_rows, &o);
}

static void rope_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context; /* n = half, a = cosine, b = sine */
    for (int i = first; i < end; i++)
        for (int h = 0; h < o->n_heads; h++)
            exec->kernels->rope(o->out + ((size_t)i * (size_t)o->n_heads + (size_t)h) * 2 * (size_t)o->n, ROW(o->a, i),
                                ROW(o->b, i), o->n);
}

g4_status g4_rope_rows(g4_exec *exec, float *x, const float *cosine, const float *sine, int n_rows, int n_heads,
                       int half)
{
    operands o = {.out = x, .a = cosine, .b = sine, .n = half, .n_heads = n_heads};
    return run_rows(exec, (row_cost){G4_OP_ROPE, 3, 2}, n_rows, (size_t)n_heads * (size_t)half * 2, rope_rows, &o);
}

static void rope_axes_rows(const g4_exec *exec, void *context, int first, int end)
{
    const operands *o = context; /* n = quarter, a = cosine, b = sine */
    const size_t quarter = (size_t)o->n;
    for (int i = first; i < end; i++)
        for (int h = 0; h < o->n_heads; h++)
            for (size_t axis = 0; axis < 2; axis++) {
                float *x = o->out + (((size_t)i * (size_t)o->n_heads + (size_t)h) * 2 + axis) * 2 * quarter;
                const size_t angles = ((size_t)i * 2 + axis) * quarter;
                exec->kernels->rope(x, o->a + angles, o->b + angles, o->n);
            }
}

g4_status g4_rope_axes_rows(g4_exec *exec, float *x, const float *cosine, const float *sine, int n_rows, int n_heads,
                            int quarter)
{
    operands o = {.out = x, .a = cosine, .b = sine, .n = quarter, .n_heads = n_heads};
    return run_rows(exec, (row_cost){G4_OP_ROPE, 3, 2}, n_rows, (size_t)n_heads * (size_t)quarter * 4, rope_axes_rows,
                    &o);
}
