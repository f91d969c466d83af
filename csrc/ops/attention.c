/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "ops/profile.h"

enum {
    BLOCK_ROWS = 48,      /* queries x heads of a task: enough that each key is loaded for many of them */
    MAX_SCORES = 1 << 20, /* scores a task may hold (4 MB), unless one query's heads need more */
};

static int first_key(const g4_attention *a, int position)
{
    return a->window && position >= a->window ? position - a->window + 1 : 0;
}

static const void *kv_row(const g4_attention *a, const void *base, int position, int kv_head)
{
    size_t slot = (size_t)(position % a->kv.n_slots);
    return (const char *)base +
           (slot * a->kv.stride + (size_t)kv_head * (size_t)a->head_dim) * g4_block_bytes(a->kv.dtype);
}

/* Positions [first, first + n) that lie in consecutive slots, n <= end - first. */
static int contiguous(const g4_attention *a, int first, int end)
{
    int until_wrap = a->kv.n_slots - first % a->kv.n_slots;
    return end - first < until_wrap ? end - first : until_wrap;
}

/* scores[i][j - first] = q_i . k_j for j in [first, end); q [n, h] dense. */
static void score_keys(const g4_kernels *kernels, const g4_attention *a, int kv_head, const float *q, int n, int first,
                       int end, float *scores, size_t stride)
{
    for (int j = first; j < end;) {
        int length = contiguous(a, j, end);
        g4_matmul_for(kernels, a->kv.dtype)(q, (size_t)a->head_dim, n, kv_row(a, a->kv.k, j, kv_head), a->kv.stride,
                                            length, a->head_dim, scores + (j - first), stride);
        j += length;
    }
}

/* z_i = sum over j in [first, end) of weights[i][j - first] * v_j, for n rows that see the same keys. */
static void mix_values(const g4_kernels *kernels, const g4_attention *a, int kv_head, const float *weights,
                       size_t stride, int n, int first, int end, float *z)
{
    memset(z, 0, (size_t)n * (size_t)a->head_dim * sizeof *z);
    for (int j = first; j < end;) {
        int length = contiguous(a, j, end);
        g4_weighted_sum_for(kernels, a->kv.dtype)(weights + (j - first), stride, n, kv_row(a, a->kv.v, j, kv_head),
                                                  a->kv.stride, length, a->head_dim, z, (size_t)a->head_dim);
        j += length;
    }
}

/* ---- fused ---------------------------------------------------------------------------------------------------- */

/* How one run is cut into tasks: blocks of queries x groups of heads that share a kv head. */
typedef struct {
    int heads, n_head_groups; /* query heads per task, tasks per query block */
    int queries, n_blocks;
    int max_span; /* keys that a block's queries see together, at most */
    int first_task;
} plan;

typedef struct {
    const g4_exec *exec;
    const g4_attention *runs;
    const plan *plans;
    int n_runs;
    float *scratch;
    size_t scratch_stride, max_scores, max_queries;
} attend_task;

/* Long contexts of few queries are cut by heads, so that decoding one sequence keeps several threads busy. */
static plan make_plan(const g4_attention *a, int n_threads)
{
    plan p = {0};
    int group = a->n_heads / a->n_kv_heads;
    p.heads = group;
    if (a->n_rows * a->n_kv_heads < 2 * n_threads && group > 4 && group % 4 == 0)
        p.heads = 4;
    p.n_head_groups = a->n_heads / p.heads;
    int span = a->window && a->window < a->n_keys ? a->window : a->n_keys;
    p.queries = BLOCK_ROWS / p.heads > 0 ? BLOCK_ROWS / p.heads : 1;
    while (p.queries > 1 && (size_t)p.queries * (size_t)p.heads * (size_t)(span + p.queries) > MAX_SCORES)
        p.queries /= 2;
    p.n_blocks = (a->n_rows + p.queries - 1) / p.queries;
    p.max_span = span + p.queries < a->n_keys ? span + p.queries : a->n_keys;
    /* rows wanted may lie far apart after pruning: then a block spans what its positions say */
    if (a->n_rows && a->positions[a->n_rows - 1] - a->positions[0] >= a->n_rows)
        p.max_span = a->n_keys;
    return p;
}

static void gather_queries(const g4_attention *a, const plan *p, int first_row, int n, int first_head, float *q)
{
    size_t width = (size_t)p->heads * (size_t)a->head_dim;
    for (int i = 0; i < n; i++)
        memcpy(q + (size_t)i * width,
               a->q + ((size_t)(first_row + i) * (size_t)a->n_heads + (size_t)first_head) * (size_t)a->head_dim,
               width * sizeof *q);
}

static void attend_block(const attend_task *t, const g4_attention *a, const plan *p, int block, int head_group,
                         float *scratch)
{
    const g4_kernels *kernels = t->exec->kernels;
    const int first_row = block * p->queries, first_head = head_group * p->heads;
    const int n = a->n_rows - first_row < p->queries ? a->n_rows - first_row : p->queries;
    const int kv_head = first_head / (a->n_heads / a->n_kv_heads);
    const int span_first = first_key(a, a->positions[first_row]), span_end = a->positions[first_row + n - 1] + 1;
    const size_t stride = (size_t)(span_end - span_first);
    float *scores = scratch, *q = scratch + t->max_scores;
    float *z_first = a->z + ((size_t)first_row * (size_t)a->n_heads + (size_t)first_head) * (size_t)a->head_dim;

    gather_queries(a, p, first_row, n, first_head, q);
    score_keys(kernels, a, kv_head, q, n * p->heads, span_first, span_end, scores, stride);
    for (int i = 0; i < n; i++) {
        int first = first_key(a, a->positions[first_row + i]), end = a->positions[first_row + i] + 1;
        float *row = scores + (size_t)i * (size_t)p->heads * stride + (first - span_first);
        for (int h = 0; h < p->heads; h++)
            kernels->softmax(row + (size_t)h * stride, end - first);
        mix_values(kernels, a, kv_head, row, stride, p->heads, first, end,
                   z_first + (size_t)i * (size_t)a->n_heads * (size_t)a->head_dim);
    }
}

static void run_attend_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    int r = 0;
    while (r + 1 < t->n_runs && task >= t->plans[r + 1].first_task)
        r++;
    const plan *p = &t->plans[r];
    /* the last block sees the most keys: start with it, so that the threads finish together */
    int local = task - p->first_task;
    int block = p->n_blocks - 1 - local / p->n_head_groups;
    attend_block(t, &t->runs[r], p, block, local % p->n_head_groups, t->scratch + (size_t)worker * t->scratch_stride);
}

g4_status g4_attend(g4_exec *exec, const g4_attention *runs, int n_runs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    attend_task t = {.exec = exec, .runs = runs, .n_runs = n_runs};
    plan *plans;
    int n_tasks = 0;
    double work = 0;
    const double start = g4_profile_start(exec);
    G4_ALLOC(exec, plans, (size_t)n_runs);
    for (int r = 0; r < n_runs; r++) {
        plan *p = &plans[r];
        *p = make_plan(&runs[r], g4_pool_size(exec->pool));
        p->first_task = n_tasks;
        n_tasks += p->n_blocks * p->n_head_groups;
        work += 2.0 * runs[r].n_rows * runs[r].n_heads * runs[r].head_dim * p->max_span;
        size_t n_scores = (size_t)p->queries * (size_t)p->heads * (size_t)p->max_span;
        size_t n_queries = (size_t)p->queries * (size_t)p->heads * (size_t)runs[r].head_dim;
        t.max_scores = n_scores > t.max_scores ? n_scores : t.max_scores;
        t.max_queries = n_queries > t.max_queries ? n_queries : t.max_queries;
    }
    t.plans = plans;
    t.scratch_stride = (t.max_scores + t.max_queries + 15) / 16 * 16;
    G4_ALLOC(exec, t.scratch, (size_t)g4_pool_size(exec->pool) * t.scratch_stride);
    g4_status status = g4_exec_run(exec, n_tasks, work, run_attend_task, &t);
    g4_profile_end_attention(exec, start, runs, n_runs);
    g4_arena_restore(exec->arena, mark);
    return status;
}

/* ---- in three steps --------------------------------------------------------------------------------------------- */

typedef struct {
    const g4_attention *a;
    float *array;         /* [H, T, n_keys] */
    atomic_int forgotten; /* a position that got weight but is not in the cache, or -1 */
} steps;

static float *array_row(const steps *s, int head, int row)
{
    return s->array + ((size_t)head * (size_t)s->a->n_rows + (size_t)row) * (size_t)s->a->n_keys;
}

static void fill(float *x, float value, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = value;
}

static void score_rows(const g4_exec *exec, void *context, int first, int end)
{
    const steps *s = context;
    const g4_attention *a = s->a;
    for (int i = first; i < end; i++) {
        int from = first_key(a, a->positions[i]), to = a->positions[i] + 1;
        for (int h = 0; h < a->n_heads; h++) {
            float *row = array_row(s, h, i);
            const float *q = a->q + ((size_t)i * (size_t)a->n_heads + (size_t)h) * (size_t)a->head_dim;
            fill(row, -INFINITY, from);
            score_keys(exec->kernels, a, h / (a->n_heads / a->n_kv_heads), q, 1, from, to, row + from, 0);
            fill(row + to, -INFINITY, a->n_keys - to);
        }
    }
}

g4_status g4_attention_scores(g4_exec *exec, const g4_attention *run, float *scores)
{
    steps s = {.a = run, .array = scores};
    return g4_exec_rows(exec, run->n_rows, (size_t)run->n_heads * (size_t)run->n_keys * (size_t)run->head_dim / 8,
                        score_rows, &s);
}

/* The shortest range of a row outside which every value is `blank`; the whole row if it is all blank. */
static void occupied(const float *row, int n, float blank, int *first, int *end)
{
    *first = 0, *end = n;
    while (*first < n && row[*first] == blank)
        ++*first;
    if (*first == n) {
        *first = 0;
        return;
    }
    while (row[*end - 1] == blank)
        --*end;
}

static void pattern_rows(const g4_exec *exec, void *context, int first, int end)
{
    const steps *s = context;
    for (int i = first; i < end; i++) {
        for (int h = 0; h < s->a->n_heads; h++) {
            float *row = array_row(s, h, i);
            int from, to;
            occupied(row, s->a->n_keys, -INFINITY, &from, &to);
            fill(row, 0, from);
            exec->kernels->softmax(row + from, to - from);
            fill(row + to, 0, s->a->n_keys - to);
        }
    }
}

g4_status g4_attention_pattern(g4_exec *exec, const g4_attention *run, float *scores)
{
    steps s = {.a = run, .array = scores};
    return g4_exec_rows(exec, run->n_rows, (size_t)run->n_heads * (size_t)run->n_keys, pattern_rows, &s);
}

static void mix_rows(const g4_exec *exec, void *context, int first, int end)
{
    steps *s = context;
    const g4_attention *a = s->a;
    for (int i = first; i < end; i++) {
        for (int h = 0; h < a->n_heads; h++) {
            const float *row = array_row(s, h, i);
            float *z = a->z + ((size_t)i * (size_t)a->n_heads + (size_t)h) * (size_t)a->head_dim;
            int from, to;
            occupied(row, a->n_keys, 0, &from, &to);
            if (row[from] == 0) { /* no weight anywhere */
                memset(z, 0, (size_t)a->head_dim * sizeof *z);
                continue;
            }
            if (from < a->kv.first)
                atomic_store(&s->forgotten, from);
            else
                mix_values(exec->kernels, a, h / (a->n_heads / a->n_kv_heads), row + from, 0, 1, from, to, z);
        }
    }
}

g4_status g4_attention_mix(g4_exec *exec, const g4_attention *run, const float *pattern)
{
    steps s = {.a = run, .array = (float *)pattern};
    atomic_init(&s.forgotten, -1);
    G4_TRY(g4_exec_rows(exec, run->n_rows, (size_t)run->n_heads * (size_t)run->n_keys * (size_t)run->head_dim / 8,
                        mix_rows, &s));
    int position = atomic_load(&s.forgotten);
    if (position >= 0)
        return g4_fail(exec->err, G4_EVALUE,
                       "an edit gives attention weight to position %d, but this sliding layer's cache holds positions "
                       "%d to %d only: run the whole prompt in one call without a cached sequence",
                       position, run->kv.first, run->n_keys - 1);
    return G4_OK;
}
