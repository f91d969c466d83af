/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/rows.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    BLOCK_ROWS = 48,      /* queries x heads per task: each loaded key serves many of them */
    MAX_SCORES = 1 << 20, /* scores per task (4 MB), unless one query's heads need more */
    KEY_TILE = 1 << 14,   /* float32 values of keys assembled at a time: 32 keys of the largest heads */
    KEY_BLOCK = 256,      /* positions [256 i, 256 (i + 1)) are mixed first, then blocks are added in order */
};

static int min(int a, int b)
{
    return a < b ? a : b;
}

static int max(int a, int b)
{
    return a > b ? a : b;
}

static const void *kv_row(const g4_attention *a, const void *base, int position, int kv_head)
{
    size_t slot = (size_t)(position % a->kv.n_slots);
    return (const char *)base +
           g4_dtype_bytes(a->kv.dtype, slot * a->kv.stride + (size_t)kv_head * (size_t)a->head_dim);
}

/* The largest n <= end - first for which positions [first, first + n) lie in consecutive slots. */
static int contiguous(const g4_attention *a, int first, int end)
{
    return min(end - first, a->kv.n_slots - first % a->kv.n_slots);
}

/* Floats of scratch for score_keys: for matmul, and for keys that are not stored whole. */
enum { SCORE_SCRATCH = G4_MATMUL_SCRATCH + KEY_TILE };

/* score_keys for keys that are not stored whole. */
static void score_joined_keys(const g4_kernels *kernels, const g4_attention *a, int kv_head, const float *q, int n,
                              int first, int end, float *scores, size_t stride, float *scratch)
{
    float *keys = scratch + G4_MATMUL_SCRATCH;
    const size_t h = (size_t)a->head_dim;
    for (int j = first, length; j < end; j += length) {
        length = min(KEY_TILE / a->head_dim, end - j);
        g4_kv_read_keys(kernels, &a->kv, kv_head, a->head_dim, j, length, keys);
        kernels->matmul_f32(q, h, n, keys, h, length, a->head_dim, scores + (j - first), stride, scratch);
    }
}

/* scores[i][j - first] = q_i . k_j for j in [first, end); q [n, h] dense; scratch [SCORE_SCRATCH]. */
static void score_keys(const g4_kernels *kernels, const g4_attention *a, int kv_head, const float *q, int n, int first,
                       int end, float *scores, size_t stride, float *scratch)
{
    if (a->kv.gain) {
        score_joined_keys(kernels, a, kv_head, q, n, first, end, scores, stride, scratch);
        return;
    }
    for (int j = first; j < end;) {
        int length = contiguous(a, j, end);
        g4_matmul_for(kernels, a->kv.dtype)(q, (size_t)a->head_dim, n, kv_row(a, a->kv.k, j, kv_head), a->kv.stride,
                                            length, a->head_dim, scores + (j - first), stride, scratch);
        j += length;
    }
}

/* sum_i += sum over j in [first, end) of weights[i][j - first] * v_j, for n rows that see the same keys. */
static void mix_keys(const g4_kernels *kernels, const g4_attention *a, int kv_head, const float *weights, size_t stride,
                     int n, int first, int end, float *sum)
{
    for (int j = first; j < end;) {
        int length = contiguous(a, j, end);
        g4_weighted_sum_for(kernels, a->kv.dtype)(weights + (j - first), stride, n, kv_row(a, a->kv.v, j, kv_head),
                                                  a->kv.stride, length, a->head_dim, sum, (size_t)a->head_dim);
        j += length;
    }
}

static int block_end(int position, int end)
{
    return min(position / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK, end);
}

/* ---- fused ---------------------------------------------------------------------------------------------------- */

/* n queries from first_row on, with the heads that share kv_head. Their scores [n * group, stride] begin at position
 * `first`, the first that any of these queries sees. */
typedef struct {
    const g4_attention *a;
    int first_row, n, kv_head, first, end;
    size_t stride;
    float *scores;
} query_block;

static query_block block_of_queries(const g4_attention *a, int first_row, int n, int kv_head, float *scores)
{
    query_block b = {.a = a, .first_row = first_row, .n = n, .kv_head = kv_head, .scores = scores};
    b.first = g4_first_key(a, first_row);
    b.end = g4_end_key(a, first_row + n - 1);
    b.stride = (size_t)(b.end - b.first);
    return b;
}

static float *scores_of(const query_block *b, int query, int position)
{
    return b->scores + (size_t)query * (size_t)g4_head_group(b->a) * b->stride + (position - b->first);
}

/* Queries and outputs of one kv head's group are adjacent in a row. */
static size_t row_offset(const query_block *b, int query)
{
    const g4_attention *a = b->a;
    return ((size_t)(b->first_row + query) * (size_t)a->n_heads + (size_t)(b->kv_head * g4_head_group(a))) *
           (size_t)a->head_dim;
}

static size_t group_width(const g4_attention *a)
{
    return (size_t)g4_head_group(a) * (size_t)a->head_dim;
}

/* scratch: SCORE_SCRATCH floats, then the queries [n * group, h]. */
static void score_block(const g4_kernels *kernels, const query_block *b, int first, int end, float *scratch)
{
    float *q = scratch + SCORE_SCRATCH;
    for (int i = 0; i < b->n; i++)
        memcpy(q + (size_t)i * group_width(b->a), b->a->q + row_offset(b, i), group_width(b->a) * sizeof *q);
    score_keys(kernels, b->a, b->kv_head, q, b->n * g4_head_group(b->a), first, end, scores_of(b, 0, first), b->stride,
               scratch);
}

/* h: index among the heads that share kv_head. */
static void softmax_head(const g4_kernels *kernels, const query_block *b, int query, int h)
{
    const int row = b->first_row + query, first = g4_first_key(b->a, row), n = g4_end_key(b->a, row) - first;
    float *scores = scores_of(b, query, first) + (size_t)h * b->stride;
    g4_cap_scores(kernels, b->a, scores, n);
    kernels->softmax(scores, n);
}

/* Mixes the positions in [first, end) that one query sees. */
static void mix_query(const g4_kernels *kernels, const query_block *b, int query, int first, int end, float *sum)
{
    const int row = b->first_row + query;
    first = max(first, g4_first_key(b->a, row));
    end = min(end, g4_end_key(b->a, row));
    if (first < end)
        mix_keys(kernels, b->a, b->kv_head, scores_of(b, query, first), b->stride, g4_head_group(b->a), first, end,
                 sum + (size_t)query * group_width(b->a));
}

/* sum [n * group, h] = contribution of positions [first, end), which lie in one key block. Positions that all queries
 * see are read once for all queries. Positions that a query does not see are skipped, not weighted with 0: 0 × inf is
 * NaN. */
static void mix_block(const g4_kernels *kernels, const query_block *b, int first, int end, float *sum)
{
    int common = max(first, g4_first_key(b->a, b->first_row + b->n - 1));
    int common_end = min(end, g4_end_key(b->a, b->first_row));
    if (common >= common_end)
        common = common_end = end;
    memset(sum, 0, (size_t)b->n * group_width(b->a) * sizeof *sum);
    for (int i = 0; i < b->n; i++)
        mix_query(kernels, b, i, first, common, sum);
    if (common < common_end)
        mix_keys(kernels, b->a, b->kv_head, scores_of(b, 0, common), b->stride, b->n * g4_head_group(b->a), common,
                 common_end, sum);
    for (int i = 0; i < b->n; i++)
        mix_query(kernels, b, i, common_end, end, sum);
}

static void add_to_z(const g4_kernels *kernels, const query_block *b, int query, const float *sum)
{
    float *z = b->a->z + row_offset(b, query);
    kernels->add(z, z, sum + (size_t)query * group_width(b->a), (int)group_width(b->a));
}

static void clear_z(const query_block *b, int query)
{
    memset(b->a->z + row_offset(b, query), 0, group_width(b->a) * sizeof *b->a->z);
}

static void attend_block(const g4_kernels *kernels, const query_block *b, float *scratch, float *sum)
{
    score_block(kernels, b, b->first, b->end, scratch);
    for (int i = 0; i < b->n; i++) {
        for (int h = 0; h < g4_head_group(b->a); h++)
            softmax_head(kernels, b, i, h);
        clear_z(b, i);
    }
    for (int first = b->first, end; first < b->end; first = end) {
        end = block_end(first, b->end);
        mix_block(kernels, b, first, end, sum);
        for (int i = 0; i < b->n; i++)
            add_to_z(kernels, b, i, sum);
    }
}

/* Split of one run into tasks: blocks of queries x kv heads. If that gives too few tasks for the threads (decoding one
 * sequence), all its queries x kv heads x blocks of keys. */
typedef struct {
    int queries, n_blocks;
    int max_span; /* maximum number of keys that a block's queries see together */
    int first_task;
    query_block *whole; /* [K] blocks of all queries */
    float *sums;        /* [K, key blocks, n_rows * group, h] */
    int n_key_blocks;
} plan;

typedef struct {
    const g4_exec *exec;
    const g4_attention *runs;
    plan *plans;
    int n_runs;
    float *scratch;
    size_t scratch_stride, max_scores, max_queries;
} attend_task;

/* Maximum number of keys that one query sees. */
static int most_keys(const g4_attention *a)
{
    int most = a->window ? min(a->window, a->n_keys) : a->n_keys;
    for (int row = 0; a->ends && row < a->n_rows; row++)
        most = max(most, a->ends[row] - g4_first_key(a, row));
    return most;
}

static plan make_plan(const g4_attention *a)
{
    plan p = {0};
    const int group = g4_head_group(a), span = most_keys(a);
    p.queries = max(1, BLOCK_ROWS / group);
    while (p.queries > 1 && (size_t)p.queries * (size_t)group * (size_t)(span + p.queries) > MAX_SCORES)
        p.queries /= 2;
    p.n_blocks = (a->n_rows + p.queries - 1) / p.queries;
    p.max_span = min(span + p.queries, a->n_keys);
    /* after pruning, rows may lie far apart, so a block may span all keys */
    if (a->n_rows && a->positions[a->n_rows - 1] - a->positions[0] >= a->n_rows)
        p.max_span = a->n_keys;
    return p;
}

/* The run that a task belongs to. *task becomes the task's number within the run. */
static int run_of_task(const attend_task *t, int *task)
{
    int r = 0;
    while (r + 1 < t->n_runs && *task >= t->plans[r + 1].first_task)
        r++;
    *task -= t->plans[r].first_task;
    return r;
}

static void run_attend_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    const int r = run_of_task(t, &task);
    const g4_attention *a = &t->runs[r];
    const plan *p = &t->plans[r];
    /* the last block sees the most keys: it goes first, so that the threads finish together */
    const int first_row = (p->n_blocks - 1 - task / a->n_kv_heads) * p->queries;
    float *scratch = t->scratch + (size_t)worker * t->scratch_stride, *sum = scratch + SCORE_SCRATCH + t->max_queries;
    const query_block b = block_of_queries(a, first_row, min(p->queries, a->n_rows - first_row), task % a->n_kv_heads,
                                           sum + t->max_queries);
    attend_block(t->exec->kernels, &b, scratch, sum);
}

/* Per worker: SCORE_SCRATCH, queries, their sums over one key block, and (attend_by_queries only) their scores. */
static g4_status allocate_scratch(g4_exec *exec, attend_task *t)
{
    t->scratch_stride = SCORE_SCRATCH + (2 * t->max_queries + t->max_scores + 15) / 16 * 16;
    G4_ALLOC(exec, t->scratch, (size_t)g4_pool_size(exec->pool) * t->scratch_stride);
    return G4_OK;
}

static g4_status attend_by_queries(g4_exec *exec, attend_task *t, int n_tasks, double work)
{
    for (int r = 0; r < t->n_runs; r++) {
        const plan *p = &t->plans[r];
        const size_t rows = (size_t)p->queries * (size_t)g4_head_group(&t->runs[r]);
        const size_t n_scores = rows * (size_t)p->max_span, n_queries = rows * (size_t)t->runs[r].head_dim;
        t->max_scores = n_scores > t->max_scores ? n_scores : t->max_scores;
        t->max_queries = n_queries > t->max_queries ? n_queries : t->max_queries;
    }
    G4_TRY(allocate_scratch(exec, t));
    return g4_exec_run(exec, n_tasks, work, run_attend_task, t);
}

/* ---- by keys: the same sums, so the same bits ---- */

/* Bounds of key block i among the keys that the run's queries see. */
static void key_block(const query_block *b, int i, int *first, int *end)
{
    *first = i ? (b->first / KEY_BLOCK + i) * KEY_BLOCK : b->first;
    *end = block_end(*first, b->end);
}

static float *sum_of(const plan *p, const query_block *b, int i)
{
    return p->sums + ((size_t)b->kv_head * (size_t)p->n_key_blocks + (size_t)i) * (size_t)b->n * group_width(b->a);
}

static void run_score_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    const plan *p = &t->plans[run_of_task(t, &task)];
    const query_block *b = &p->whole[task / p->n_key_blocks];
    int first, end;
    key_block(b, task % p->n_key_blocks, &first, &end);
    score_block(t->exec->kernels, b, first, end, t->scratch + (size_t)worker * t->scratch_stride);
}

static void run_mix_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    const plan *p = &t->plans[run_of_task(t, &task)];
    const query_block *b = &p->whole[task / p->n_key_blocks];
    int first, end;
    (void)worker;
    key_block(b, task % p->n_key_blocks, &first, &end);
    mix_block(t->exec->kernels, b, first, end, sum_of(p, b, task % p->n_key_blocks));
}

/* A task of one query and one head. Tasks are numbered over all runs. */
typedef struct {
    const plan *p;
    const query_block *b;
    int query, h;
} head_of_query;

static head_of_query head_of_task(const attend_task *t, int task)
{
    int r = 0;
    for (; task >= t->runs[r].n_rows * t->runs[r].n_heads; r++)
        task -= t->runs[r].n_rows * t->runs[r].n_heads;
    const int head = task % t->runs[r].n_heads, group = g4_head_group(&t->runs[r]);
    const plan *p = &t->plans[r];
    return (head_of_query){p, &p->whole[head / group], task / t->runs[r].n_heads, head % group};
}

static void run_softmax_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    const head_of_query one = head_of_task(t, task);
    (void)worker;
    softmax_head(t->exec->kernels, one.b, one.query, one.h);
}

static void run_sum_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    const head_of_query one = head_of_task(t, task);
    const size_t h = (size_t)one.b->a->head_dim, at = (size_t)one.query * group_width(one.b->a) + (size_t)one.h * h;
    float *z = one.b->a->z + row_offset(one.b, one.query) + (size_t)one.h * h;
    (void)worker;
    memset(z, 0, h * sizeof *z);
    for (int i = 0; i < one.p->n_key_blocks; i++)
        t->exec->kernels->add(z, z, sum_of(one.p, one.b, i) + at, (int)h);
}

static g4_status plan_by_keys(g4_exec *exec, attend_task *t, int *n_tasks, int *n_heads)
{
    *n_tasks = *n_heads = 0;
    for (int r = 0; r < t->n_runs; r++) {
        const g4_attention *a = &t->runs[r];
        plan *p = &t->plans[r];
        p->first_task = *n_tasks;
        if (!a->n_rows)
            continue;
        const size_t rows = (size_t)a->n_rows * (size_t)g4_head_group(a), n = (size_t)a->n_kv_heads;
        G4_ALLOC(exec, p->whole, n);
        for (int kv_head = 0; kv_head < a->n_kv_heads; kv_head++) {
            query_block b = block_of_queries(a, 0, a->n_rows, kv_head, NULL);
            G4_ALLOC(exec, b.scores, rows * b.stride);
            p->whole[kv_head] = b;
        }
        p->n_key_blocks = (p->whole->end - 1) / KEY_BLOCK - p->whole->first / KEY_BLOCK + 1;
        G4_ALLOC(exec, p->sums, n * (size_t)p->n_key_blocks * rows * (size_t)a->head_dim);
        *n_tasks += a->n_kv_heads * p->n_key_blocks;
        *n_heads += a->n_heads * a->n_rows;
        t->max_queries = rows * (size_t)a->head_dim > t->max_queries ? rows * (size_t)a->head_dim : t->max_queries;
    }
    return G4_OK;
}

static g4_status attend_by_keys(g4_exec *exec, attend_task *t, double work)
{
    int n_tasks, n_heads;
    G4_TRY(plan_by_keys(exec, t, &n_tasks, &n_heads));
    G4_TRY(allocate_scratch(exec, t));
    G4_TRY(g4_exec_run(exec, n_tasks, work, run_score_task, t));
    G4_TRY(g4_exec_run(exec, n_heads, work / 32, run_softmax_task, t));
    G4_TRY(g4_exec_run(exec, n_tasks, work, run_mix_task, t));
    return g4_exec_run(exec, n_heads, work / KEY_BLOCK, run_sum_task, t);
}

g4_status g4_rows_attend(g4_exec *exec, const g4_attention *runs, int n_runs)
{
    attend_task t = {.exec = exec, .runs = runs, .n_runs = n_runs};
    int n_tasks = 0;
    double work = 0, n_scores = 0;
    G4_ALLOC(exec, t.plans, (size_t)n_runs);
    for (int r = 0; r < n_runs; r++) {
        const g4_attention *a = &runs[r];
        plan *p = &t.plans[r];
        *p = make_plan(a);
        p->first_task = n_tasks;
        n_tasks += p->n_blocks * a->n_kv_heads;
        n_scores += (double)a->n_rows * a->n_heads * p->max_span;
        work += (double)a->n_rows * a->n_heads * a->head_dim * p->max_span;
    }
    const int n_threads = g4_pool_size(exec->pool);
    const bool by_keys = n_threads > 1 && n_tasks < 2 * n_threads && n_scores < (double)n_threads * MAX_SCORES;
    return by_keys ? attend_by_keys(exec, &t, work) : attend_by_queries(exec, &t, n_tasks, work);
}

/* ---- in three steps --------------------------------------------------------------------------------------------- */

typedef struct {
    const g4_exec *exec;
    const g4_attention *a;
    float *array;         /* [H, T, n_keys] */
    float *sums;          /* [T, H, h] over one key block */
    float *scratch;       /* [workers, SCORE_SCRATCH] */
    atomic_int forgotten; /* a position that has weight but was evicted from the cache, or -1 */
} steps;

static void run_score_row(void *context, int row_number, int worker)
{
    const steps *s = context;
    const g4_attention *a = s->a;
    const int from = g4_first_key(a, row_number), to = g4_end_key(a, row_number);
    for (int h = 0; h < a->n_heads; h++) {
        float *row = g4_array_row(a, s->array, h, row_number);
        const float *q = a->q + ((size_t)row_number * (size_t)a->n_heads + (size_t)h) * (size_t)a->head_dim;
        g4_fill(row, -INFINITY, from);
        score_keys(s->exec->kernels, a, h / g4_head_group(a), q, 1, from, to, row + from, 0,
                   s->scratch + (size_t)worker * SCORE_SCRATCH);
        g4_cap_scores(s->exec->kernels, a, row + from, to - from);
        g4_fill(row + to, -INFINITY, a->n_keys - to);
    }
}

g4_status g4_rows_scores(g4_exec *exec, const g4_attention *run, float *scores)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    steps s = {.exec = exec, .a = run, .array = scores};
    G4_ALLOC(exec, s.scratch, (size_t)g4_pool_size(exec->pool) * SCORE_SCRATCH);
    g4_status status = g4_exec_run(
        exec, run->n_rows, (double)run->n_rows * (double)run->n_heads * (double)run->n_keys * (double)run->head_dim,
        run_score_row, &s);
    g4_arena_restore(exec->arena, mark);
    return status;
}

static void mix_row(const g4_kernels *kernels, const g4_attention *a, int kv_head, const float *weights, int first,
                    int end, float *sum, float *z)
{
    memset(z, 0, (size_t)a->head_dim * sizeof *z);
    for (int next; first < end; first = next) {
        next = block_end(first, end);
        memset(sum, 0, (size_t)a->head_dim * sizeof *sum);
        mix_keys(kernels, a, kv_head, weights + first, 0, 1, first, next, sum);
        kernels->add(z, z, sum, a->head_dim);
    }
}

static void mix_rows(const g4_exec *exec, void *context, int first, int end)
{
    steps *s = context;
    const g4_attention *a = s->a;
    for (int i = first; i < end; i++) {
        for (int h = 0; h < a->n_heads; h++) {
            const float *row = g4_array_row(a, s->array, h, i);
            float *z = a->z + ((size_t)i * (size_t)a->n_heads + (size_t)h) * (size_t)a->head_dim;
            int from, to;
            g4_occupied(row, a->n_keys, 0, &from, &to);
            if (row[from] == 0) { /* no weight anywhere */
                memset(z, 0, (size_t)a->head_dim * sizeof *z);
                continue;
            }
            if (from < a->kv.first)
                atomic_store(&s->forgotten, from);
            else
                mix_row(exec->kernels, a, h / g4_head_group(a), row, from, to, s->sums + (z - a->z), z);
        }
    }
}

g4_status g4_rows_mix(g4_exec *exec, const g4_attention *run, const float *pattern, int *forgotten)
{
    steps s = {.a = run, .array = (float *)pattern};
    atomic_init(&s.forgotten, -1);
    G4_ALLOC(exec, s.sums, (size_t)run->n_rows * (size_t)run->n_heads * (size_t)run->head_dim);
    G4_TRY(g4_exec_rows(exec, run->n_rows, (size_t)run->n_heads * (size_t)run->n_keys * (size_t)run->head_dim / 8,
                        mix_rows, &s));
    *forgotten = atomic_load(&s.forgotten);
    return G4_OK;
}
