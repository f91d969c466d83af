/* SPDX-License-Identifier: Apache-2.0 */
/* The part of kernels_test about matmul, in float32 and in integers, attention's sums and panels. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/kernels_test.h"

/* ---- matmul ------------------------------------------------------------------------------------------------------ */

static _Alignas(64) float matmul_scratch[G4_MATMUL_SCRATCH], int8_scratch[G4_INT8_SCRATCH];

/* As workers do it: x is packed in two slices. */
static void matmul_packed(const g4_kernels *t, g4_dtype dtype, const float *x, size_t x_stride, int m, const void *w,
                          int n, int k, float *out, size_t out_stride)
{
    const int half = m / 2 / G4_PACK_UNIT * G4_PACK_UNIT;
    float *packed = allocate(g4_packed_rows((size_t)m) * g4_packed_inputs((size_t)k) * 4);
    t->pack_rows(x, x_stride, m, k, half, m, packed);
    t->pack_rows(x, x_stride, m, k, 0, half, packed);
    g4_matmul_packed_for(t, dtype)(packed, m, w, (size_t)k, n, k, out, out_stride, matmul_scratch);
    free(packed);
}

static void check_matmul(g4_dtype dtype, int kind, int m, int n, int k)
{
    const size_t x_stride = (size_t)k + 3, out_stride = (size_t)n + 2, n_out = (size_t)m * out_stride;
    float *x = random_row(kind, (size_t)m * x_stride), *wanted = allocate(n_out * 4), *got = allocate(n_out * 4);
    void *w = random_weights(dtype, NORMAL, (size_t)n * (size_t)k);
    g4_matmul_for(scalar, dtype)(x, x_stride, m, w, (size_t)k, n, k, wanted, out_stride, matmul_scratch);
    for (int t = 0; t < n_tables; t++) {
        g4_matmul_for(tables[t], dtype)(x, x_stride, m, w, (size_t)k, n, k, got, out_stride, matmul_scratch);
        check(same(got, wanted, n_out), tables[t], "matmul", g4_dtype_name(dtype), m, n, k);
        memset(got, 0, n_out * 4);
        matmul_packed(tables[t], dtype, x, x_stride, m, w, n, k, got, out_stride);
        check(same(got, wanted, n_out), tables[t], "matmul_packed", g4_dtype_name(dtype), m, n, k);
        for (int i = 0; i < m; i += 7)
            g4_matmul_for(tables[t], dtype)(x + (size_t)i * x_stride, x_stride, 1, w, (size_t)k, n, k,
                                            got + (size_t)i * out_stride, out_stride, NULL);
        check(same(got, wanted, n_out), tables[t], "matmul of single rows", g4_dtype_name(dtype), m, n, k);
    }
    free(x), free(wanted), free(got), free(w);
}

g4_int8_rows int8_rows_new(int m, int k)
{
    const size_t n = g4_int8_bytes(m, (size_t)k);
    return (g4_int8_rows){allocate(n),          allocate(n / 32 * 4), allocate(n / 16 * 4), allocate(n / 32 * 4),
                          allocate(n / 16 * 2), allocate(n / 32 * 4), m > G4_INT8_FEW};
}

void int8_rows_free(g4_int8_rows rows)
{
    free(rows.q), free(rows.scale), free(rows.sum16), free(rows.sum32), free(rows.minus_4);
    free(rows.minus_8);
}

static g4_int8_rows check_quantize(const float *x, int m, int k)
{
    const size_t n = g4_int8_bytes(m, (size_t)k);
    const g4_int8_rows wanted = int8_rows_new(m, k), got = int8_rows_new(m, k);
    scalar->quantize_rows(x, (size_t)k, 0, m, k, &wanted);
    for (int t = 0; t < n_tables; t++) {
        for (int i = 0; i < m; i += 3) /* slices as workers take them */
            tables[t]->quantize_rows(x + (size_t)i * (size_t)k, (size_t)k, i, m - i < 3 ? m - i : 3, k, &got);
        check(memcmp(got.q, wanted.q, n) == 0 && same(got.scale, wanted.scale, n / 32) &&
                  same(got.sum16, wanted.sum16, n / 16) && same(got.sum32, wanted.sum32, n / 32),
              tables[t], "quantize_rows", "", m, 0, k);
    }
    int8_rows_free(got);
    return wanted;
}

static void check_matmul_int8(g4_dtype dtype, int kind, int m, int n, int k)
{
    const size_t n_out = (size_t)m * (size_t)n;
    float *x = random_row(kind, (size_t)m * (size_t)k), *wanted = allocate(n_out * 4), *got = allocate(n_out * 4);
    void *w = random_weights(dtype, NORMAL, (size_t)n * (size_t)k);
    const g4_int8_rows rows = check_quantize(x, m, k);
    g4_matmul_int8_for(scalar, dtype)(&rows, m, w, (size_t)k, n, k, wanted, (size_t)n, int8_scratch);
    for (int t = 0; t < n_tables; t++) {
        g4_matmul_int8_for(tables[t], dtype)(&rows, m, w, (size_t)k, n, k, got, (size_t)n, int8_scratch);
        check(same(got, wanted, n_out), tables[t], "matmul_int8", g4_dtype_name(dtype), m, n, k);
    }
    free(x), free(wanted), free(got), free(w);
    int8_rows_free(rows);
}

/* The largest products of one sign: nothing may saturate, neither with few rows nor in the tile. */
static void check_int8_at_the_ends(g4_dtype dtype, uint8_t fill, float x_value, int m)
{
    enum { N = 20, K = 512, END_ROWS = G4_INT8_FEW + 1 };
    const size_t n_bytes = g4_dtype_bytes(dtype, N * K), size = g4_block_bytes(dtype);
    const uint16_t d = g4_f32_to_f16(0.01f);
    uint8_t *w = allocate(n_bytes);
    float x[END_ROWS * K], wanted[END_ROWS * N], got[END_ROWS * N];
    memset(w, fill, n_bytes);
    for (size_t at = 0; at < n_bytes; at += size)
        for (int f = 0; f < 2; f++)
            memcpy(w + at + factors_of[dtype][f], &d, dtype == G4_MXFP4 ? 1 : 2);
    for (int i = 0; i < m * K; i++)
        x[i] = x_value;
    const g4_int8_rows rows = check_quantize(x, m, K);
    g4_matmul_int8_for(scalar, dtype)(&rows, m, w, K, N, K, wanted, N, int8_scratch);
    for (int t = 0; t < n_tables; t++) {
        g4_matmul_int8_for(tables[t], dtype)(&rows, m, w, K, N, K, got, N, int8_scratch);
        check(same(got, wanted, (size_t)m * N), tables[t], "largest matmul_int8", g4_dtype_name(dtype), m, N, fill);
    }
    free(w);
    int8_rows_free(rows);
}

void test_products(void)
{
    static const int sizes[][3] = {{1, 1, 1},     {2, 3, 15},     {3, 4, 16},   {5, 17, 33},
                                   {24, 31, 100}, {49, 34, 1040}, {73, 65, 31}, {290, 7, 2100},
                                   {5, 4, 16},    {6, 31, 256},   {7, 2, 512},  {8, 33, 512}};
    static const int block_sizes[][3] = {{1, 1, 256}, {3, 5, 768}, {6, 37, 1280}, {151, 70, 512}};
    static const int int8_sizes[][3] = {{1, 19, 768}, {2, 3, 256},  {3, 17, 512}, {4, 8, 256},   {5, 40, 1280},
                                        {6, 9, 1024}, {7, 40, 768}, {16, 5, 256}, {17, 19, 768}, {259, 40, 768}};
    for (g4_dtype dtype = G4_F32; dtype < G4_N_DTYPES; dtype++) {
        for (int s = 0; !g4_is_quantised(dtype) && s < 12; s++)
            for (int kind = 0; kind < N_KINDS; kind++)
                check_matmul(dtype, kind, sizes[s][0], sizes[s][1], sizes[s][2]);
        for (int s = 0; g4_is_quantised(dtype) && s < 4; s++)
            check_matmul(dtype, s, block_sizes[s][0], block_sizes[s][1], block_sizes[s][2]);
        for (int s = 0; g4_is_quantised(dtype) && s < 10; s++)
            check_matmul_int8(dtype, s % N_KINDS, int8_sizes[s][0], int8_sizes[s][1], int8_sizes[s][2]);
        for (int m = 1; g4_block_size(dtype) == 32 && m < 40; m += 19) /* a tail of less than 256 inputs */
            check_matmul_int8(dtype, NORMAL, m, 17, 352);
        static const uint8_t fills[] = {0x00, 0xff, 0x0f, 0xf0, 0x80, 0x7f};
        for (int f = 0; g4_is_quantised(dtype) && f < 6; f++)
            for (int m = 1; m <= G4_INT8_FEW + 1; m += G4_INT8_FEW) {
                check_int8_at_the_ends(dtype, fills[f], 1, m);
                check_int8_at_the_ends(dtype, fills[f], -1, m);
            }
    }
}

/* ---- attention's sums and panels --------------------------------------------------------------------------------- */

static void check_weighted_sum(g4_dtype dtype, int kind, int m, int n_keys, int d)
{
    const size_t p_stride = (size_t)n_keys + 1, n_out = (size_t)m * (size_t)d;
    float *p = random_row(kind, (size_t)m * p_stride), *start = random_row(NORMAL, n_out);
    float *wanted = allocate(n_out * 4), *got = allocate(n_out * 4);
    void *v = random_weights(dtype, NORMAL, (size_t)n_keys * (size_t)d);
    memcpy(wanted, start, n_out * 4);
    g4_weighted_sum_for(scalar, dtype)(p, p_stride, m, v, (size_t)d, n_keys, d, wanted, (size_t)d);
    for (int t = 0; t < n_tables; t++) {
        memcpy(got, start, n_out * 4);
        g4_weighted_sum_for(tables[t], dtype)(p, p_stride, m, v, (size_t)d, n_keys, d, got, (size_t)d);
        check(same(got, wanted, n_out), tables[t], "weighted_sum", g4_dtype_name(dtype), m, n_keys, d);
    }
    free(p), free(start), free(wanted), free(got), free(v);
}

static void check_panel(int kind, int m, int n, int k, bool add)
{
    float *w = random_row(kind, (size_t)(n * k)), *x = random_row(kind, (size_t)(m * k));
    float *panel = allocate((size_t)k * 64), *other = allocate((size_t)k * 64);
    float *start = random_row(NORMAL, (size_t)(m * n));
    float *wanted = allocate((size_t)(m * n) * 4), *got = allocate((size_t)(m * n) * 4);
    scalar->pack_panel(w, (size_t)k, n, k, panel);
    memcpy(wanted, start, (size_t)(m * n) * 4);
    scalar->matmul_panel(x, (size_t)k, m, panel, k, wanted, (size_t)n, n, add);
    for (int t = 0; t < n_tables; t++) {
        tables[t]->pack_panel(w, (size_t)k, n, k, other);
        check(same(other, panel, (size_t)k * 16), tables[t], "pack_panel", "", m, n, k);
        memcpy(got, start, (size_t)(m * n) * 4);
        tables[t]->matmul_panel(x, (size_t)k, m, panel, k, got, (size_t)n, n, add);
        check(same(got, wanted, (size_t)(m * n)), tables[t], "matmul_panel", "", m, n, k);
    }
    free(w), free(x), free(panel), free(other), free(start), free(wanted), free(got);
}

/* Integer matmul; the table itself rounds both sides. */
static void panel16_of(const g4_kernels *table, const float *x, const float *w, int m, int n, int k, float *out)
{
    const g4_rows16 rows = {allocate((size_t)(m * g4_stride16(k)) * 2), allocate((size_t)(m * g4_groups16(k)) * 4),
                            g4_stride16(k)};
    const g4_panel16 panel = {allocate((size_t)g4_stride16(k) * 32), allocate((size_t)g4_groups16(k) * 64)};
    table->quantize_rows16(x, (size_t)k, m, k, -0.75f, INFINITY, &rows);
    table->pack_panel16(w, (size_t)k, n, k, &panel);
    for (int at = 0; at < rows.stride; at += G4_GROUP16) {
        const g4_rows16 x_at = g4_rows16_at(&rows, at);
        const g4_panel16 w_at = g4_panel16_at(&panel, at);
        const int length = rows.stride - at < G4_GROUP16 ? rows.stride - at : G4_GROUP16;
        table->matmul_panel16(&x_at, m, &w_at, length, out, (size_t)n, n, at > 0);
    }
    free(rows.q), free(rows.scale), free(panel.q), free(panel.scale);
}

static void check_panel16(int kind, int m, int n, int k)
{
    float *w = random_row(NORMAL, (size_t)(n * k)), *x = random_row(kind, (size_t)(m * k));
    float *wanted = allocate((size_t)(m * n) * 4), *got = allocate((size_t)(m * n) * 4);
    panel16_of(scalar, x, w, m, n, k, wanted);
    for (int t = 0; t < n_tables; t++) {
        panel16_of(tables[t], x, w, m, n, k, got);
        check(same(got, wanted, (size_t)(m * n)), tables[t], "panel16", "", m, n, k);
    }
    free(w), free(x), free(wanted), free(got);
}

/* The bits of scalar's softmax followed by rounding. */
static void check_softmax16(int kind, int n)
{
    const size_t stride = (size_t)g4_stride16(n), groups = (size_t)g4_groups16(n);
    float *x = random_row(kind, (size_t)n), *pattern = allocate((size_t)n * 4);
    const g4_rows16 wanted = {allocate(stride * 2), allocate(groups * 4), (int)stride};
    const g4_rows16 got = {allocate(stride * 2), allocate(groups * 4), (int)stride};
    memcpy(pattern, x, (size_t)n * 4);
    scalar->softmax(pattern, n);
    scalar->quantize_rows16(pattern, (size_t)n, 1, n, -INFINITY, INFINITY, &wanted);
    for (int t = 0; t < n_tables; t++) {
        memcpy(pattern, x, (size_t)n * 4);
        tables[t]->softmax_rows16(pattern, (size_t)n, 1, n, &got);
        check(same(got.scale, wanted.scale, groups) && memcmp(got.q, wanted.q, stride * 2) == 0, tables[t],
              "softmax_rows16", "", 1, n, 0);
    }
    free(x), free(pattern), free(wanted.q), free(wanted.scale), free(got.q), free(got.scale);
}

/* ---- tiles of bfloat16 ------------------------------------------------------------------------------------------- */

/* Rounds like the instructions: subnormal numbers become zero. */
static uint16_t rounded(float x)
{
    return g4_f32_to_bf16(fabsf(x) < 0x1p-126f ? copysignf(0, x) : x);
}

static bool same_bf16(uint16_t a, uint16_t b)
{
    return a == b || (isnan(g4_bf16_to_f32(a)) && isnan(g4_bf16_to_f32(b)));
}

/* Checks tiles by pairs of inputs; everything outside the rows and inputs is zero. */
static bool rounds_to_tiles(const float *rows, int n, int k, const uint16_t *tiles)
{
    bool good = true;
    for (int l = 0; l < g4_tiles_of(k) * G4_TILE_INPUTS; l++)
        for (int r = 0; r < G4_TILE_ROWS; r++) {
            const int tile = l / G4_TILE_INPUTS, in = l % G4_TILE_INPUTS;
            good &= same_bf16(tiles[tile * G4_TILE + in / 2 * 32 + r * 2 + in % 2],
                              r < n && l < k ? rounded(rows[r * k + l]) : 0);
        }
    return good;
}

static g4_tiles tiles_new(int n, int k)
{
    const size_t stride = (size_t)g4_tiles_of(k) * G4_TILE;
    return (g4_tiles){allocate((size_t)((n + G4_TILE_ROWS - 1) / G4_TILE_ROWS) * stride * 2), stride};
}

/* Allowed error of products of rounded numbers: k roundings to float32 of partial sums no larger than `size`. */
static bool near_products(const float *x, const float *w, int k, float got)
{
    double exact = 0, size = 0;
    for (int l = 0; l < k; l++) {
        const double product = (double)g4_bf16_to_f32(rounded(x[l])) * (double)g4_bf16_to_f32(rounded(w[l]));
        exact += product;
        size += fabs(product);
    }
    if (!isfinite(exact))
        return isnan(exact) ? isnan(got) : got == (float)exact;
    return fabs(exact - got) <= size * (k + 3) * 0x1p-24 + (k + 3) * 0x1p-126;
}

/* The kernels' own bf16 of w, which keeps subnormal numbers, in rows padded to a whole tile, `stride` apart. */
static uint16_t *narrow_rows(const g4_kernels *t, const float *w, int n, int k, size_t stride)
{
    uint16_t *row = allocate((size_t)k * 2);
    uint16_t *rows = allocate((size_t)(n + G4_TILE_ROWS - 1) / G4_TILE_ROWS * G4_TILE_ROWS * stride * 2);
    for (int j = 0; j < n; j++) {
        t->narrow_bf16(row, w + j * k, k);
        t->bf16_row_bf16(row, k, 0, rows + (size_t)j * stride);
    }
    free(row);
    return rows;
}

static bool is_piece_sum(float x, float high, float middle, float low)
{
    if (!isfinite(x))
        return middle == 0 && low == 0 && (isnan(x) ? isnan(high) : high == x);
    const double sum = (double)high + (double)middle + (double)low;
    return fabs(sum - (double)x) < (fabsf(x) < 0x1p-100f ? 0x1p-124 : 0x1p-1000);
}

/* The three tiles of n rows of x sum to x; everything outside is zero. */
static void check_pieces(const g4_kernels *t, int kind, int n, int k)
{
    float *x = random_row(kind, (size_t)(n * k));
    uint16_t *tiles[G4_PIECES];
    bool good = true;
    for (int p = 0; p < G4_PIECES; p++)
        tiles[p] = tiles_new(n, k).data;
    t->tiles_of_pieces(x, (size_t)k, n, k, tiles);
    for (int l = 0; l < g4_tiles_of(k) * G4_TILE_INPUTS; l++)
        for (int r = 0; r < G4_TILE_ROWS; r++) {
            const int at = l / G4_TILE_INPUTS * G4_TILE + l % G4_TILE_INPUTS / 2 * 32 + r * 2 + l % 2;
            good &= is_piece_sum(r < n && l < k ? x[r * k + l] : 0, g4_bf16_to_f32(tiles[0][at]),
                                 g4_bf16_to_f32(tiles[1][at]), g4_bf16_to_f32(tiles[2][at]));
        }
    check(good, t, "tiles_of_pieces", "", n, 1, k);
    for (int p = 0; p < G4_PIECES; p++)
        free(tiles[p]);
    free(x);
}

/* In one call, or in two, where the second begins at the sums of the first. */
static void check_tiles(const g4_kernels *t, int kind, int m, int n, int k, bool twice)
{
    const size_t out_stride = (size_t)n + 3, n_out = (size_t)m * out_stride;
    float *w = random_row(NORMAL, (size_t)(n * k)), *x = random_row(kind, (size_t)(m * k));
    float *start = random_row(NORMAL, n_out), *got = allocate(n_out * 4), *sums = allocate(g4_tile_sums(m, n) * 4);
    const size_t w_stride = (size_t)(g4_tiles_of(k) + twice) * G4_TILE_INPUTS;
    const g4_tiles xs = tiles_new(m, k);
    uint16_t *ws = narrow_rows(t, w, n, k, w_stride);
    bool packed = true, good = true;
    for (int i = 0; i < m; i += G4_TILE_ROWS) {
        const int rows = m - i < G4_TILE_ROWS ? m - i : G4_TILE_ROWS;
        t->tiles_of_x(x + i * k, (size_t)k, rows, k, g4_tiles_from(&xs, i).data);
        packed &= rounds_to_tiles(x + i * k, rows, k, g4_tiles_from(&xs, i).data);
    }
    check(packed, t, "tiles_of_x", "", m, n, k);
    memcpy(got, start, n_out * 4);
    const int n_tiles = g4_tiles_of(k), first = twice ? n_tiles / 2 : 0;
    const g4_tiles x_rest = {xs.data + first * G4_TILE, xs.stride};
    if (first)
        t->matmul_tiles(&xs, m, ws, w_stride, n, first, sums, false, NULL, 0);
    t->matmul_tiles(&x_rest, m, ws + first * G4_TILE_INPUTS, w_stride, n, n_tiles - first, sums, first > 0, got,
                    out_stride);
    for (int i = 0; i < m; i++) {
        const size_t row = (size_t)i * out_stride;
        for (int j = 0; j < n; j++)
            good &= near_products(x + i * k, w + j * k, k, got[row + (size_t)j]);
        good &= same(got + row + n, start + row + n, 3);
    }
    check(good, t, "matmul_tiles", "", m, n, k);
    free(w), free(x), free(start), free(got), free(sums), free(xs.data), free(ws);
}

/* Values [n_keys, d] as tiles. *small: whether all are small enough to be rounded. */
static g4_tiles tiles_of_rows(const g4_kernels *t, const float *v, int n_keys, int d, bool *small)
{
    const g4_tiles tiles = tiles_new(d, n_keys);
    *small = true;
    for (int l = 0; l < n_keys; l += G4_TILE_INPUTS) {
        const g4_tiles at = {tiles.data + l / G4_TILE_INPUTS * G4_TILE, tiles.stride};
        const int left = n_keys - l;
        *small &= t->tiles_of_values(v + l * d, (size_t)d, left < G4_TILE_INPUTS ? left : G4_TILE_INPUTS, d, &at);
    }
    return tiles;
}

/* Patterns [m, n_keys] times values [n_keys, d], as in attention. */
static void check_by_tiles(const g4_kernels *t, int kind, int m, int n_keys, int d)
{
    const size_t n_rows = (size_t)(m + 15) / 16 * 16, out_stride = (size_t)d + 16, n_out = n_rows * out_stride;
    const size_t w_stride = (size_t)(g4_tiles_of(n_keys) + 1) * G4_TILE_INPUTS;
    float *p = random_row(kind, (size_t)(m * n_keys)), *v = random_row(NORMAL, (size_t)(n_keys * d));
    float *columns = allocate((size_t)(n_keys * d) * 4), *got = random_row(NORMAL, n_out), *start = allocate(n_out * 4);
    uint16_t *w = narrow_rows(t, p, m, n_keys, w_stride);
    bool small, good = true;
    const g4_tiles values = tiles_of_rows(t, v, n_keys, d, &small);
    for (int i = 0; i < n_keys * d; i++)
        columns[i % d * n_keys + i / d] = v[i];
    memcpy(start, got, n_out * 4);
    t->matmul_by_tiles(w, w_stride, m, &values, d, g4_tiles_of(n_keys), got, out_stride);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < d; j++)
            good &=
                near_products(p + i * n_keys, columns + j * n_keys, n_keys, got[(size_t)i * out_stride + (size_t)j]);
    for (size_t i = 0; i < n_rows; i++)
        good &= same(got + i * out_stride + d, start + i * out_stride + d, 16);
    check(good && small, t, "matmul_by_tiles", "", m, n_keys, d);
    free(p), free(v), free(columns), free(got), free(start), free(w), free(values.data);
}

/* One number that bf16 cannot approximate, at any position. */
static void check_large_values(const g4_kernels *t)
{
    static const float large[] = {INFINITY, -INFINITY, NAN, 0x1p127f, -3e38f};
    const float largest = 0x1.fffffep126f;
    float *v = random_row(NORMAL, 37 * 48);
    for (int i = 0; i < 37 * 48; i += 53) {
        bool small;
        v[i] = i % 2 ? largest : -largest;
        free(tiles_of_rows(t, v, 37, 48, &small).data);
        check(small, t, "tiles_of_values", "", 37, 48, i);
        v[i] = large[i % 5];
        free(tiles_of_rows(t, v, 37, 48, &small).data);
        check(!small, t, "tiles_of_values, large", "", 37, 48, i);
        v[i] = 0;
    }
    free(v);
}

/* A row of weights equals the widened row, rounded; plain bf16 is unchanged. */
static void check_bf16_row(g4_dtype dtype, int kind, int k)
{
    const int padded = g4_tiles_of(k) * G4_TILE_INPUTS;
    void *w = random_weights(dtype, kind, (size_t)k);
    float *wide = allocate((size_t)k * 4);
    g4_widen_for(scalar, dtype)(wide, w, k);
    for (int t = 0; t < n_tables; t++) {
        const g4_bf16_row_bf16_fn bf16_row = g4_bf16_row_for(tables[t], dtype);
        if (!bf16_row)
            continue;
        uint16_t *row = allocate((size_t)padded * 2);
        bool good = true;
        bf16_row(w, k, 64, row);
        for (int l = 0; l < padded; l++)
            good &= same_bf16(row[l], l >= k ? 0 : dtype == G4_BF16 ? ((uint16_t *)w)[l] : rounded(wide[l]));
        check(good, tables[t], "bf16_row", g4_dtype_name(dtype), 1, 1, k);
        free(row);
    }
    free(w), free(wide);
}

void test_tiles(void)
{
    static const int sizes[][3] = {{1, 1, 1},    {3, 16, 31},   {16, 5, 32},  {17, 33, 33},
                                   {32, 32, 64}, {33, 48, 100}, {70, 97, 90}, {48, 31, 544}};
    for (int t = 0; t < n_tables; t++)
        for (int s = 0; tables[t]->matmul_tiles && s < 8; s++)
            for (int kind = 0; kind < N_KINDS; kind++) {
                check_tiles(tables[t], kind, sizes[s][0], sizes[s][1], sizes[s][2], (s + kind) % 2);
                check_pieces(tables[t], kind, sizes[s][0] % 16 + 1, sizes[s][2]);
            }
    for (int t = 0; t < n_tables; t++)
        if (tables[t]->matmul_by_tiles) {
            for (int kind = 0; kind < N_KINDS; kind++)
                for (int s = 0; s < 8; s++)
                    check_by_tiles(tables[t], kind, sizes[s][0], sizes[s][2], (sizes[s][1] + 15) / 16 * 16);
            check_by_tiles(tables[t], NORMAL, 20, 1100, 32);
            check_large_values(tables[t]);
        }
    for (int kind = 0; kind < N_KINDS; kind++) {
        check_bf16_row(G4_BF16, kind, 1);
        check_bf16_row(G4_BF16, kind, 95);
        check_bf16_row(G4_BF16, kind, 512);
#define X(type, suffix, block, bytes)       \
    check_bf16_row(G4_##type, kind, block); \
    check_bf16_row(G4_##type, kind, 512 + 3 * block);
        G4_EACH_QUANTISED(X)
#undef X
    }
}

void test_sums_and_panels(void)
{
    static const int sizes[][3] = {{1, 1, 32}, {3, 70, 64}, {9, 33, 512}, {4, 5, 2080}};
    for (int s = 0; s < 4; s++)
        for (int kind = 0; kind < N_KINDS; kind++) {
            check_weighted_sum(G4_F32, kind, sizes[s][0], sizes[s][1], sizes[s][2] + 3);
            check_weighted_sum(G4_F16, kind, sizes[s][0], sizes[s][1], sizes[s][2] + 3);
            check_weighted_sum(G4_BF16, kind, sizes[s][0], sizes[s][1], sizes[s][2] + 3);
            check_weighted_sum(G4_Q8_0, kind, sizes[s][0], sizes[s][1], sizes[s][2]);
        }
    for (int m = 1; m < 24; m += 3)
        for (int n = 1; n <= 16; n += 5)
            check_panel(m % N_KINDS, m, n, 3 * m + n, m % 2 == 0);
    for (int kind = 0; kind < N_KINDS; kind++)
        for (int m = 1; m < 10; m += 2) {
            check_panel16(kind, m, m == 3 ? 16 : m, 131 * m);
            check_softmax16(kind, 131 * m);
        }
}
