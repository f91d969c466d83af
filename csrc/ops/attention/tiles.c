/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/tiles.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    LEAST_QUERIES = 32,          /* per run: with fewer, packing all its keys and values does not pay off */
    MAX_HEAD = 512,              /* head size */
    UNIT = G4_TILE_INPUTS,       /* positions packed at a time, from multiples of UNIT on */
    BLOCK_ROWS = 128,            /* queries x heads per task: 8 rows of tiles for each tile of keys */
    MAX_SCORES = 1 << 21,        /* per task: 8 MB, and half of that as bf16 */
    MAX_TILES_OF_HEAD = 1 << 27, /* elements of one kv head's keys and values: 256 MB, 131,072 positions of 512 */
    TILES_AT_ONCE = 1 << 24      /* elements of several kv heads, if they fit */
};

enum { SCORE = 1, PATTERN = 2, MIX = 4 };

/* A worker's scratch for a block of queries. Row strides are an odd number of cache lines, so 16 rows fall into 16
 * cache sets. */
typedef struct {
    uint16_t *q;       /* [rows, h] */
    float *scores;     /* [rows, span] */
    uint16_t *pattern; /* [rows, span] */
    float *sums;       /* [rows, h] */
    float *unit;       /* [UNIT, h] of keys or values */
} block_scratch;

typedef struct {
    const g4_exec *exec;
    const g4_attention *a;
    int steps;
    float *array;            /* [H, T, n_keys] if the steps run one by one */
    int first, n_units;      /* the tiles hold n_units * UNIT positions from `first` on */
    int first_head, n_heads; /* … of these kv heads */
    uint16_t *keys;          /* [n_heads, 2 n_units, h / 32] tiles */
    uint16_t *values;        /* [n_heads, h / 16, n_units] tiles */
    int queries, n_blocks;   /* a task is up to `queries` queries of one kv head */
    size_t q_stride, score_stride, pattern_stride, sum_stride;
    block_scratch *scratch; /* [workers] */
    atomic_bool too_large;  /* some value is 2^127 or more in magnitude, or NaN: 0 × inf is NaN */
    atomic_int forgotten;
} tile_run;

static int min(int a, int b)
{
    return a < b ? a : b;
}

static int max(int a, int b)
{
    return a > b ? a : b;
}

static int whole_units(int position)
{
    return (position + UNIT - 1) / UNIT * UNIT;
}

static int first_unit(int position)
{
    return position / UNIT * UNIT;
}

/* Elements of one kv head's keys and values in tiles. */
static size_t tiles_of_head(const g4_attention *a)
{
    return 2 * (size_t)(whole_units(a->n_keys) - first_unit(a->kv.first)) * (size_t)a->head_dim;
}

bool g4_wants_tiles(const g4_exec *exec, const g4_attention *a)
{
    return exec->fast && a->bf16 && exec->kernels->matmul_by_tiles && a->n_deciding >= LEAST_QUERIES &&
           a->head_dim % G4_TILE_INPUTS == 0 && a->head_dim <= MAX_HEAD && tiles_of_head(a) <= MAX_TILES_OF_HEAD;
}

/* ---- keys and values, once for all queries ----------------------------------------------------------------------- */

static g4_tiles keys_of(const tile_run *t, int kv_head)
{
    const size_t h = (size_t)t->a->head_dim, of_head = (size_t)t->n_units * UNIT * h;
    return (g4_tiles){t->keys + (size_t)(kv_head - t->first_head) * of_head, G4_TILE_ROWS * h};
}

static g4_tiles values_of(const tile_run *t, int kv_head)
{
    const size_t of_head = (size_t)t->n_units * UNIT * (size_t)t->a->head_dim;
    return (g4_tiles){t->values + (size_t)(kv_head - t->first_head) * of_head, (size_t)t->n_units * G4_TILE};
}

/* float32 [UNIT, h]; zeros for positions that are not cached. */
static void read_unit(const tile_run *t, const g4_kv_view *kv, int kv_head, int position, float *rows)
{
    const size_t h = (size_t)t->a->head_dim;
    const int from = max(position, kv->first), end = min(position + UNIT, t->a->n_keys);
    if (end - from < UNIT)
        memset(rows, 0, UNIT * h * sizeof *rows);
    g4_kv_read_keys(t->exec->kernels, kv, kv_head, t->a->head_dim, from, end - from,
                    rows + (size_t)(from - position) * h);
}

static void pack_unit(void *context, int task, int worker)
{
    tile_run *t = context;
    const int kv_head = t->first_head + task / t->n_units, unit = task % t->n_units;
    const g4_kernels *kernels = t->exec->kernels;
    const int h = t->a->head_dim, position = t->first + unit * UNIT;
    const g4_tiles keys = keys_of(t, kv_head), values = values_of(t, kv_head);
    g4_kv_view kv = t->a->kv;
    float *rows = t->scratch[worker].unit;
    read_unit(t, &kv, kv_head, position, rows);
    for (int row = 0; row < UNIT; row += G4_TILE_ROWS)
        kernels->tiles_of_x(rows + row * h, (size_t)h, G4_TILE_ROWS, h, g4_tiles_from(&keys, unit * UNIT + row).data);
    kv.k = kv.v, kv.gain = NULL;
    read_unit(t, &kv, kv_head, position, rows);
    const g4_tiles at = {values.data + (size_t)unit * G4_TILE, values.stride};
    if (!kernels->tiles_of_values(rows, (size_t)h, UNIT, h, &at))
        atomic_store(&t->too_large, true);
}

/* ---- a block of queries ------------------------------------------------------------------------------------------ */

/* n queries from first_row on, with the heads that share kv_head. [first, end): the positions that any of these queries
 * gives weight, in whole units. */
typedef struct {
    int first_row, n, kv_head, first, end;
} query_block;

static int rows_of(const tile_run *t, const query_block *b)
{
    return b->n * g4_head_group(t->a);
}

/* Row r of a block is one head of one query. */
static int query_of(const tile_run *t, const query_block *b, int r)
{
    return b->first_row + r / g4_head_group(t->a);
}

static int head_of(const tile_run *t, const query_block *b, int r)
{
    return b->kv_head * g4_head_group(t->a) + r % g4_head_group(t->a);
}

static size_t row_offset(const tile_run *t, const query_block *b, int r)
{
    return ((size_t)query_of(t, b, r) * (size_t)t->a->n_heads + (size_t)head_of(t, b, r)) * (size_t)t->a->head_dim;
}

static float *array_row(const tile_run *t, const query_block *b, int r)
{
    return g4_array_row(t->a, t->array, head_of(t, b, r), query_of(t, b, r));
}

static void score(const tile_run *t, const query_block *b, const block_scratch *s)
{
    const g4_kernels *kernels = t->exec->kernels;
    const int h = t->a->head_dim;
    const g4_tiles all = keys_of(t, b->kv_head), keys = g4_tiles_from(&all, b->first - t->first);
    for (int r = 0; r < rows_of(t, b); r++)
        kernels->narrow_bf16(s->q + (size_t)r * t->q_stride, t->a->q + row_offset(t, b, r), h);
    kernels->matmul_by_tiles(s->q, t->q_stride, rows_of(t, b), &keys, b->end - b->first, h / G4_TILE_INPUTS, s->scores,
                             t->score_stride);
}

static void show_scores(const tile_run *t, const query_block *b, const block_scratch *s)
{
    for (int r = 0; r < rows_of(t, b); r++) {
        const int from = g4_first_key(t->a, query_of(t, b, r)), to = g4_end_key(t->a, query_of(t, b, r));
        float *row = array_row(t, b, r);
        g4_fill(row, -INFINITY, from);
        memcpy(row + from, s->scores + (size_t)r * t->score_stride + (from - b->first),
               (size_t)(to - from) * sizeof *row);
        g4_cap_scores(t->exec->kernels, t->a, row + from, to - from);
        g4_fill(row + to, -INFINITY, t->a->n_keys - to);
    }
}

/* pattern_r = weights of positions [from, to), zeros for the block's other positions. */
static void set_pattern(const tile_run *t, const query_block *b, const block_scratch *s, int r, const float *weights,
                        int from, int to)
{
    uint16_t *row = s->pattern + (size_t)r * t->pattern_stride;
    memset(row, 0, (size_t)(from - b->first) * sizeof *row);
    t->exec->kernels->narrow_bf16(row + (from - b->first), weights, to - from);
    memset(row + (to - b->first), 0, (size_t)(b->end - to) * sizeof *row);
}

static void make_patterns(const tile_run *t, const query_block *b, const block_scratch *s)
{
    for (int r = 0; r < rows_of(t, b); r++) {
        const int from = g4_first_key(t->a, query_of(t, b, r)), to = g4_end_key(t->a, query_of(t, b, r));
        float *scores = s->scores + (size_t)r * t->score_stride + (from - b->first);
        g4_cap_scores(t->exec->kernels, t->a, scores, to - from);
        t->exec->kernels->softmax(scores, to - from);
        set_pattern(t, b, s, r, scores, from, to);
    }
}

/* An edited pattern may give weight to any position. */
static void take_patterns(tile_run *t, query_block *b, const block_scratch *s)
{
    int first = t->a->n_keys, end = t->a->kv.first;
    for (int r = 0; r < rows_of(t, b); r++) {
        const float *row = array_row(t, b, r);
        int from, to;
        g4_occupied(row, t->a->n_keys, 0, &from, &to);
        if (row[from] == 0)
            continue;
        if (from < t->a->kv.first)
            atomic_store(&t->forgotten, from);
        first = min(first, from), end = max(end, to);
    }
    first = max(min(first, end - 1), t->a->kv.first);
    b->first = first_unit(first), b->end = max(whole_units(end), b->first + UNIT);
    for (int r = 0; r < rows_of(t, b); r++)
        set_pattern(t, b, s, r, array_row(t, b, r) + first, first, max(end, first));
}

static void mix(const tile_run *t, const query_block *b, const block_scratch *s)
{
    const size_t h = (size_t)t->a->head_dim, unit = (size_t)((b->first - t->first) / UNIT);
    const g4_tiles all = values_of(t, b->kv_head), values = {all.data + unit * G4_TILE, all.stride};
    t->exec->kernels->matmul_by_tiles(s->pattern, t->pattern_stride, rows_of(t, b), &values, t->a->head_dim,
                                      (b->end - b->first) / UNIT, s->sums, t->sum_stride);
    for (int r = 0; r < rows_of(t, b); r++)
        memcpy(t->a->z + row_offset(t, b, r), s->sums + (size_t)r * t->sum_stride, h * sizeof *s->sums);
}

static query_block block_of_task(const tile_run *t, int task)
{
    /* the last block sees the most keys: it goes first, so that the threads finish together */
    const int row = (t->n_blocks - 1 - task / t->n_heads) * t->queries;
    query_block b = {.first_row = row, .n = min(t->queries, t->a->n_rows - row)};
    b.kv_head = t->first_head + task % t->n_heads;
    b.first = first_unit(g4_first_key(t->a, row));
    b.end = whole_units(g4_end_key(t->a, row + b.n - 1));
    return b;
}

static void run_block(void *context, int task, int worker)
{
    tile_run *t = context;
    const block_scratch *s = &t->scratch[worker];
    query_block b = block_of_task(t, task);
    if (t->steps & SCORE)
        score(t, &b, s);
    if (t->steps == SCORE)
        show_scores(t, &b, s);
    if (t->steps & PATTERN)
        make_patterns(t, &b, s);
    if (t->steps == MIX)
        take_patterns(t, &b, s);
    if (t->steps & MIX)
        mix(t, &b, s);
}

/* ---- a run ------------------------------------------------------------------------------------------------------- */

/* Maximum number of positions that a block's queries see together, in whole units. */
static int most_positions(const tile_run *t, int queries)
{
    int most = 0;
    if (t->steps == MIX)
        return t->n_units * UNIT;
    for (int row = 0; row < t->a->n_rows; row += queries) {
        const int last = min(row + queries, t->a->n_rows) - 1;
        most = max(most, whole_units(g4_end_key(t->a, last)) - first_unit(g4_first_key(t->a, row)));
    }
    return most;
}

/* Row stride in elements for rows of n: an odd number of cache lines. */
static size_t odd_lines(int n, size_t element_size)
{
    const size_t in_line = 64 / element_size;
    return (((size_t)n + in_line - 1) / in_line | 1) * in_line;
}

static g4_status plan_blocks(g4_exec *exec, tile_run *t)
{
    const int group = g4_head_group(t->a), n_workers = g4_pool_size(exec->pool), h = t->a->head_dim;
    t->queries = max(1, BLOCK_ROWS / group);
    while (t->queries > 1 && (size_t)(t->queries * group) * (size_t)most_positions(t, t->queries) > MAX_SCORES)
        t->queries /= 2;
    t->n_blocks = (t->a->n_rows + t->queries - 1) / t->queries;
    const int span = most_positions(t, t->queries);
    const size_t rows = (size_t)(t->queries * group + G4_TILE_ROWS - 1) / G4_TILE_ROWS * G4_TILE_ROWS;
    t->q_stride = odd_lines(h, sizeof *t->scratch->q);
    t->score_stride = odd_lines(span, sizeof *t->scratch->scores);
    t->pattern_stride = odd_lines(span, sizeof *t->scratch->pattern);
    t->sum_stride = odd_lines(h, sizeof *t->scratch->sums);
    G4_ALLOC(exec, t->scratch, (size_t)n_workers);
    for (int worker = 0; worker < n_workers; worker++) {
        block_scratch *s = &t->scratch[worker];
        G4_ALLOC(exec, s->q, rows * t->q_stride);
        G4_ALLOC(exec, s->scores, rows * t->score_stride);
        G4_ALLOC(exec, s->pattern, rows * t->pattern_stride);
        G4_ALLOC(exec, s->sums, rows * t->sum_stride);
        G4_ALLOC(exec, s->unit, UNIT * (size_t)h);
    }
    return G4_OK;
}

static g4_status run_heads(g4_exec *exec, tile_run *t)
{
    const int n_units = t->n_heads * t->n_units;
    const double pack_work = 16.0 * n_units * UNIT * t->a->head_dim; /* 2 arrays, an element costs 8 multiply-adds */
    double work = 0;
    for (int row = 0; row < t->a->n_rows; row++)
        work += g4_end_key(t->a, row) - g4_first_key(t->a, row);
    work *= 2.0 * t->n_heads * g4_head_group(t->a) * t->a->head_dim;
    G4_TRY(g4_exec_run(exec, n_units, pack_work, pack_unit, t));
    if (atomic_load(&t->too_large))
        return G4_OK;
    return g4_exec_run(exec, t->n_blocks * t->n_heads, work, run_block, t);
}

static g4_status run_steps(g4_exec *exec, tile_run *t)
{
    const g4_attention *a = t->a;
    const size_t of_head = tiles_of_head(a) / 2;
    const int heads_at_once = min(a->n_kv_heads, max(1, TILES_AT_ONCE / (int)(2 * of_head)));
    t->first = first_unit(a->kv.first);
    t->n_units = (whole_units(a->n_keys) - t->first) / UNIT;
    atomic_init(&t->too_large, false);
    atomic_init(&t->forgotten, -1);
    G4_ALLOC(exec, t->keys, (size_t)heads_at_once * of_head);
    G4_ALLOC(exec, t->values, (size_t)heads_at_once * of_head);
    G4_TRY(plan_blocks(exec, t));
    for (; t->first_head < a->n_kv_heads && !atomic_load(&t->too_large); t->first_head += heads_at_once) {
        t->n_heads = min(heads_at_once, a->n_kv_heads - t->first_head);
        G4_TRY(run_heads(exec, t));
    }
    return G4_OK;
}

static g4_status in_tiles(g4_exec *exec, tile_run *t, bool *done)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    *done = false;
    if (!g4_wants_tiles(exec, t->a))
        return G4_OK;
    g4_status status = run_steps(exec, t);
    *done = !atomic_load(&t->too_large);
    g4_arena_restore(exec->arena, mark);
    return status;
}

g4_status g4_tiles_attend(g4_exec *exec, const g4_attention *run, bool *done)
{
    tile_run t = {.exec = exec, .a = run, .steps = SCORE | PATTERN | MIX};
    return in_tiles(exec, &t, done);
}

g4_status g4_tiles_scores(g4_exec *exec, const g4_attention *run, float *scores, bool *done)
{
    tile_run t = {.exec = exec, .a = run, .steps = SCORE, .array = scores};
    return in_tiles(exec, &t, done);
}

g4_status g4_tiles_mix(g4_exec *exec, const g4_attention *run, const float *pattern, int *forgotten, bool *done)
{
    tile_run t = {.exec = exec, .a = run, .steps = MIX, .array = (float *)pattern};
    G4_TRY(in_tiles(exec, &t, done));
    if (*done && atomic_load(&t.forgotten) >= 0)
        *forgotten = atomic_load(&t.forgotten);
    return G4_OK;
}
