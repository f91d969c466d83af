/* SPDX-License-Identifier: Apache-2.0 */
/* kernels_test --time: each kernel on every level that runs here, next to the scalar one and to the level before. The
 * report is for reading before and after a change, on a quiet machine; it cannot fail. Sizes are those of one task of a
 * model, which lie in the second-level cache. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tests/kernels_test.h"

enum { N = 32, K = 1536, MOST_ROWS = 32, N_KEYS = 256, HEAD = 256, REPEATS = 5 };

/* The operands of a timed kernel. */
typedef struct {
    g4_dtype dtype;
    int m, row; /* rows of x; index of a row kernel */
    float *x, *y, *z, *out, *panel, *packed;
    void *w;
    g4_int8_rows bytes;
    g4_rows16 rows16;
    g4_panel16 panel16;
    g4_tiles tiles;
    uint16_t *narrow; /* N rows of bf16 */
} operands;

typedef void (*timed)(const g4_kernels *t, const operands *o);

static _Alignas(64) float scratch[G4_MATMUL_SCRATCH];

static void time_matmul(const g4_kernels *t, const operands *o)
{
    g4_matmul_for(t, o->dtype)(o->x, K, o->m, o->w, K, N, K, o->out, N, scratch);
}

static void time_packed(const g4_kernels *t, const operands *o)
{
    t->pack_rows(o->x, K, o->m, K, 0, o->m, o->packed);
    g4_matmul_packed_for(t, o->dtype)(o->packed, o->m, o->w, K, N, K, o->out, N, scratch);
}

static void time_int8(const g4_kernels *t, const operands *o)
{
    g4_matmul_int8_for(t, o->dtype)(&o->bytes, o->m, o->w, K, N, K, o->out, N, scratch);
}

static void time_widen(const g4_kernels *t, const operands *o)
{
    g4_widen_for(t, o->dtype)(o->out, o->w, K);
}

static void time_narrow(const g4_kernels *t, const operands *o)
{
    g4_narrow_for(t, o->dtype)(o->narrow, o->x, K);
}

static void time_bf16_row(const g4_kernels *t, const operands *o)
{
    g4_bf16_row_for(t, o->dtype)(o->w, K, 0, o->narrow);
}

static void time_weighted_sum(const g4_kernels *t, const operands *o)
{
    memset(o->out, 0, (size_t)(o->m * HEAD) * sizeof *o->out);
    g4_weighted_sum_for(t, o->dtype)(o->x, N_KEYS, o->m, o->w, HEAD, N_KEYS, HEAD, o->out, HEAD);
}

static void time_quantize(const g4_kernels *t, const operands *o)
{
    t->quantize_rows(o->x, K, 0, o->m, K, &o->bytes);
}

static void time_pack_panel(const g4_kernels *t, const operands *o)
{
    t->pack_panel(o->y, K, 16, K, o->panel);
}

static void time_panel(const g4_kernels *t, const operands *o)
{
    t->matmul_panel(o->x, K, o->m, o->panel, K, o->out, N, 16, false);
}

static void time_rows16(const g4_kernels *t, const operands *o)
{
    t->quantize_rows16(o->x, K, o->m, K, -3, 3, &o->rows16);
}

static void time_pack16(const g4_kernels *t, const operands *o)
{
    t->pack_panel16(o->y, K, 16, K, &o->panel16);
}

static void time_panel16(const g4_kernels *t, const operands *o)
{
    t->matmul_panel16(&o->rows16, o->m, &o->panel16, K, o->out, N, 16, false);
}

static void time_tiles_of_x(const g4_kernels *t, const operands *o)
{
    t->tiles_of_x(o->x, K, G4_TILE_ROWS, K, o->tiles.data);
}

static void time_pieces(const g4_kernels *t, const operands *o)
{
    uint16_t *const tiles[G4_PIECES] = {o->tiles.data, o->tiles.data + o->tiles.stride,
                                        o->tiles.data + 2 * o->tiles.stride};
    t->tiles_of_pieces(o->x, K, G4_TILE_ROWS, K, tiles);
}

static void time_tiles(const g4_kernels *t, const operands *o)
{
    t->matmul_tiles(&o->tiles, o->m, o->narrow, K, N, g4_tiles_of(K), o->z, false, o->out, N);
}

static void time_row(const g4_kernels *t, const operands *o)
{
    memcpy(o->out, o->x, K * sizeof *o->out);
    run_row(t, o->row, o->out, o->y, o->y + K, K);
}

static operands operands_new(void)
{
    operands o = {.m = MOST_ROWS};
    const size_t n_out = (size_t)MOST_ROWS * K, stride16 = (size_t)g4_stride16(K), groups = (size_t)g4_groups16(K);
    o.x = random_row(NORMAL, n_out), o.y = random_row(NORMAL, n_out), o.out = allocate(n_out * 4);
    o.z = allocate((g4_tile_sums(MOST_ROWS, N) + n_out) * 4), o.panel = allocate((size_t)K * 64);
    o.packed = allocate(g4_packed_rows(MOST_ROWS) * g4_packed_inputs(K) * 4);
    o.bytes = int8_rows_new(MOST_ROWS, K);
    o.rows16 = (g4_rows16){allocate(MOST_ROWS * stride16 * 2), allocate(MOST_ROWS * groups * 4), (int)stride16};
    o.panel16 = (g4_panel16){allocate(stride16 * 32), allocate(groups * 64)};
    o.tiles = (g4_tiles){allocate(G4_PIECES * (size_t)g4_tiles_of(K) * G4_TILE * 2), (size_t)g4_tiles_of(K) * G4_TILE};
    o.narrow = allocate((size_t)N * K * 2);
    scalar->pack_panel(o.y, K, 16, K, o.panel);
    time_rows16(scalar, &o), time_pack16(scalar, &o);
    return o;
}

static void operands_free(operands *o)
{
    free(o->x), free(o->y), free(o->z), free(o->out), free(o->panel), free(o->packed), free(o->narrow),
        free(o->tiles.data);
    free(o->rows16.q), free(o->rows16.scale), free(o->panel16.q), free(o->panel16.scale);
    int8_rows_free(o->bytes);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Seconds of one call: the best of several loops, each of at least 0.2 ms. */
static double seconds(timed run, const g4_kernels *t, const operands *o)
{
    double best = 1e9;
    for (int repeat = 0, n_calls = 1; repeat < REPEATS;) {
        const double start = now();
        for (int i = 0; i < n_calls; i++)
            run(t, o);
        const double took = now() - start;
        if (took < 2e-4) {
            n_calls *= 2;
            continue;
        }
        best = took / n_calls < best ? took / n_calls : best;
        repeat++;
    }
    return best;
}

/* Prints one line. `has` tells whether a level's table has the kernel (NULL: all have it). */
static void report(const char *name, timed run, const operands *o, bool (*has)(const g4_kernels *t))
{
    double first = 0, before = 0;
    printf("%-28s", name);
    for (int t = 0; t < n_tables; t++) {
        if (has && !has(tables[t])) {
            printf(" %15s", "-");
            continue;
        }
        const double s = seconds(run, tables[t], o);
        if (first == 0)
            printf(" %12.0f ns", s * 1e9);
        else
            printf(" %8.2f (%4.2f)", first / s, before / s);
        first = first == 0 ? s : first;
        before = s;
    }
    printf("\n");
    fflush(stdout);
}

static void report_type(const char *what, timed run, operands *o, int m, bool (*has)(const g4_kernels *t))
{
    char name[64];
    o->m = m;
    snprintf(name, sizeof name, m ? "%s %s, %d rows" : "%s %s", what, g4_dtype_name(o->dtype), m);
    report(name, run, o, has);
}

static bool has_tiles(const g4_kernels *t)
{
    return t->matmul_tiles != NULL;
}

static void report_types(operands *o)
{
    for (o->dtype = G4_F32; o->dtype < G4_N_DTYPES; o->dtype++) {
        o->w = random_weights(o->dtype, NORMAL, (size_t)N * K > (size_t)N_KEYS * HEAD ? (size_t)N * K : N_KEYS * HEAD);
        for (int m = 1; m <= MOST_ROWS; m *= MOST_ROWS) {
            report_type("matmul", time_matmul, o, m, NULL);
            report_type("matmul_packed", time_packed, o, m, NULL);
            if (g4_is_quantised(o->dtype)) {
                o->bytes.by_fours = m > G4_INT8_FEW;
                time_quantize(scalar, (o->m = m, o));
                report_type("matmul_int8", time_int8, o, m, NULL);
            }
        }
        if (g4_weighted_sum_for(scalar, o->dtype))
            report_type("weighted_sum", time_weighted_sum, o, 8, NULL);
        report_type("widen", time_widen, o, 0, NULL);
        if (g4_narrow_for(scalar, o->dtype))
            report_type("narrow", time_narrow, o, 0, NULL);
        if (g4_bf16_row_for(tables[n_tables - 1], o->dtype))
            report_type("bf16_row", time_bf16_row, o, 0, has_tiles);
        free(o->w);
    }
}

void report_times(void)
{
    operands o = operands_new();
    printf(
        "time of the scalar kernel; of every other level, how many times faster than it (and than the level before)\n");
    printf("%-28s", "");
    for (int t = 0; t < n_tables; t++)
        printf(" %15s", g4_isa_name(tables[t]->isa));
    printf("\n");
    report_types(&o);
    o.m = MOST_ROWS, o.dtype = G4_F32;
    o.bytes.by_fours = true;
    report("quantize_rows", time_quantize, &o, NULL);
    report("pack_panel", time_pack_panel, &o, NULL);
    report("matmul_panel", time_panel, &o, NULL);
    report("quantize_rows16", time_rows16, &o, NULL);
    report("pack_panel16", time_pack16, &o, NULL);
    report("matmul_panel16", time_panel16, &o, NULL);
    report("tiles_of_x", time_tiles_of_x, &o, has_tiles);
    report("tiles_of_pieces", time_pieces, &o, has_tiles);
    report("matmul_tiles", time_tiles, &o, has_tiles);
    for (o.row = 0; o.row < N_ROW_KERNELS; o.row++)
        report(row_names[o.row], time_row, &o, NULL);
    operands_free(&o);
}
