/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/full.h"

#include <math.h>

#include "ops/profile.h"

enum {
    PANEL = 16,
    BLOCK_KEYS = 256,          /* keys per mix block: 16 KB of values stay in the first-level cache for all queries */
    MAX_QUERIES = 96,          /* queries per task … */
    SCORES_FLOATS = 96 << 10,  /* … and fewer if their scores would exceed the second-level cache (384 KB) … */
    SCORES_FLOATS16 = 64 << 10 /* … or, in `fast`, the scores with their int16 copies */
};

_Static_assert(BLOCK_KEYS % G4_GROUP16 == 0, "a block of keys is whole groups");

/* Keys and values in panels, kv head after kv head: keys [T / 16][h][16], values [h / 16][T][16], both padded. In
 * `fast`, keys, values and queries (head after head) are 12-bit integers instead, and values are transposed first. */
typedef struct {
    const g4_full_attention *run;
    bool fast;
    float *k, *v; /* v in `fast`: transposed values [K, h, T] */
    g4_panel16 k16, v16;
    g4_rows16 q16;
    size_t k_floats, v_floats; /* per kv head */
    int queries, n_blocks;
    int first_task;
} plan;

static int n_panels(int n)
{
    return (n + PANEL - 1) / PANEL;
}

static g4_panel16 panel16_of(const g4_panel16 *panels, int index, int k)
{
    return (g4_panel16){panels->q + (size_t)index * PANEL * (size_t)g4_stride16(k),
                        panels->scale + (size_t)index * PANEL * (size_t)g4_groups16(k)};
}

static g4_status alloc_panels16(g4_exec *exec, int n, int k, g4_panel16 *panels)
{
    G4_ALLOC(exec, panels->q, (size_t)n * PANEL * (size_t)g4_stride16(k));
    G4_ALLOC(exec, panels->scale, (size_t)n * PANEL * (size_t)g4_groups16(k));
    return G4_OK;
}

static g4_status alloc_rows16(g4_exec *exec, size_t n, int k, g4_rows16 *rows)
{
    rows->stride = g4_stride16(k);
    G4_ALLOC(exec, rows->q, n * (size_t)rows->stride);
    G4_ALLOC(exec, rows->scale, n * (size_t)g4_groups16(k));
    return G4_OK;
}

static g4_status alloc_operands(g4_exec *exec, plan *p)
{
    const g4_full_attention *run = p->run;
    const int n_kv = run->n_kv_heads;
    G4_ALLOC(exec, p->v, p->v_floats * (size_t)n_kv);
    if (!p->fast) {
        G4_ALLOC(exec, p->k, p->k_floats * (size_t)n_kv);
        return G4_OK;
    }
    G4_TRY(alloc_panels16(exec, n_kv * n_panels(run->n_rows), run->head_dim, &p->k16));
    G4_TRY(alloc_panels16(exec, n_kv * n_panels(run->head_dim), run->n_rows, &p->v16));
    return alloc_rows16(exec, (size_t)run->n_heads * (size_t)run->n_rows, run->head_dim, &p->q16);
}

static g4_status make_plan(g4_exec *exec, const g4_full_attention *run, plan *p)
{
    *p = (plan){.run = run,
                .fast = exec->fast,
                .k_floats = (size_t)n_panels(run->n_rows) * PANEL * (size_t)run->head_dim,
                .v_floats = (size_t)n_panels(run->head_dim) * PANEL * (size_t)run->n_rows};
    const int floats = p->fast ? SCORES_FLOATS16 : SCORES_FLOATS;
    p->queries = run->n_rows ? floats / run->n_rows / 12 * 12 : MAX_QUERIES;
    p->queries = p->queries < 12 ? 12 : p->queries > MAX_QUERIES ? MAX_QUERIES : p->queries;
    p->n_blocks = (run->n_rows + p->queries - 1) / p->queries;
    return alloc_operands(exec, p);
}

/* ---- packing ----------------------------------------------------------------------------------------------------- */

typedef struct {
    plan *plans;
    int n_plans;
} pack_task;

static void pack_head(const g4_kernels *kernels, const plan *p, int head)
{
    const g4_full_attention *run = p->run;
    const size_t stride = (size_t)run->n_kv_heads * (size_t)run->head_dim;
    const float *k = run->k + (size_t)head * (size_t)run->head_dim, *v = run->v + (size_t)head * (size_t)run->head_dim;
    float *k_panels = p->k + (size_t)head * p->k_floats, *v_panels = p->v + (size_t)head * p->v_floats;
    for (int j = 0; j < run->n_rows; j += PANEL)
        kernels->pack_panel(k + (size_t)j * stride, stride, run->n_rows - j < PANEL ? run->n_rows - j : PANEL,
                            run->head_dim, k_panels + (size_t)j * (size_t)run->head_dim);
    for (int c = 0; c < run->head_dim; c += PANEL) {
        const int n = run->head_dim - c < PANEL ? run->head_dim - c : PANEL;
        float *panel = v_panels + (size_t)c * (size_t)run->n_rows;
        for (int j = 0; j < run->n_rows; j++)
            for (int l = 0; l < PANEL; l++)
                panel[(size_t)j * PANEL + (size_t)l] = l < n ? v[(size_t)j * stride + (size_t)(c + l)] : 0;
    }
}

static void pack_head16(const g4_kernels *kernels, const plan *p, int head)
{
    const g4_full_attention *run = p->run;
    const int n_rows = run->n_rows, h = run->head_dim;
    const size_t stride = (size_t)run->n_kv_heads * (size_t)h;
    const float *k = run->k + (size_t)head * (size_t)h, *v = run->v + (size_t)head * (size_t)h;
    float *transposed = p->v + (size_t)head * p->v_floats;
    for (int j = 0; j < n_rows; j += PANEL) {
        const g4_panel16 panel = panel16_of(&p->k16, head * n_panels(n_rows) + j / PANEL, h);
        kernels->pack_panel16(k + (size_t)j * stride, stride, n_rows - j < PANEL ? n_rows - j : PANEL, h, &panel);
    }
    for (int j = 0; j < n_rows; j++)
        for (int c = 0; c < h; c++)
            transposed[(size_t)c * (size_t)n_rows + (size_t)j] = v[(size_t)j * stride + (size_t)c];
    for (int c = 0; c < h; c += PANEL) {
        const g4_panel16 panel = panel16_of(&p->v16, head * n_panels(h) + c / PANEL, n_rows);
        kernels->pack_panel16(transposed + (size_t)c * (size_t)n_rows, (size_t)n_rows, h - c < PANEL ? h - c : PANEL,
                              n_rows, &panel);
    }
}

static g4_rows16 queries16(const plan *p, int head, int row)
{
    return g4_rows16_from(&p->q16, head * p->run->n_rows + row);
}

static size_t q_offset(const g4_full_attention *run, int row, int head)
{
    return ((size_t)row * (size_t)run->n_heads + (size_t)head) * (size_t)run->head_dim;
}

/* Item i, counted over all plans: one head of queries, and the kv head of the same number if there is one. */
static void pack_heads(const g4_exec *exec, void *context, int first, int end)
{
    const pack_task *t = context;
    for (int i = 0, from = 0; i < t->n_plans; from += t->plans[i++].run->n_heads) {
        const plan *p = &t->plans[i];
        const g4_full_attention *run = p->run;
        for (int head = 0; head < run->n_heads; head++) {
            if (from + head < first || from + head >= end)
                continue;
            if (p->fast) {
                const g4_rows16 rows = queries16(p, head, 0);
                exec->kernels->quantize_rows16(run->q + q_offset(run, 0, head), q_offset(run, 1, 0), run->n_rows,
                                               run->head_dim, -INFINITY, INFINITY, &rows);
            }
            if (head < run->n_kv_heads)
                (p->fast ? pack_head16 : pack_head)(exec->kernels, p, head);
        }
    }
}

static g4_status pack_all(g4_exec *exec, plan *plans, int n_plans)
{
    int n_heads = 0;
    size_t most = 0;
    for (int i = 0; i < n_plans; i++) {
        n_heads += plans[i].run->n_heads;
        most = plans[i].k_floats > most ? plans[i].k_floats : most;
    }
    pack_task t = {plans, n_plans};
    return g4_exec_rows(exec, n_heads, most, pack_heads, &t);
}

/* ---- a block of queries of one head ------------------------------------------------------------------------------ */

static int kv_head(const g4_full_attention *run, int head)
{
    return head / (run->n_heads / run->n_kv_heads);
}

/* scores[i][j] = q_i . k_j for n queries from `row` on. */
static void score_block(const g4_kernels *kernels, const plan *p, int head, int row, int n, float *scores)
{
    const g4_full_attention *run = p->run;
    const size_t q_stride = q_offset(run, 1, 0), stride = (size_t)run->n_rows;
    const float *panels = p->k + (size_t)kv_head(run, head) * p->k_floats;
    for (int j = 0; j < run->n_rows; j += PANEL)
        kernels->matmul_panel(run->q + q_offset(run, row, head), q_stride, n,
                              panels + (size_t)j * (size_t)run->head_dim, run->head_dim, scores + j, stride,
                              run->n_rows - j < PANEL ? run->n_rows - j : PANEL, false);
}

static void score_block16(const g4_kernels *kernels, const plan *p, int head, int row, int n, float *scores)
{
    const g4_full_attention *run = p->run;
    const g4_rows16 q = queries16(p, head, row);
    const int first = kv_head(run, head) * n_panels(run->n_rows);
    for (int j = 0; j < run->n_rows; j += PANEL) {
        const g4_panel16 panel = panel16_of(&p->k16, first + j / PANEL, run->head_dim);
        kernels->matmul_panel16(&q, n, &panel, q.stride, scores + j, (size_t)run->n_rows,
                                run->n_rows - j < PANEL ? run->n_rows - j : PANEL, false);
    }
}

/* z_i = sum over j of weights[i][j] * v_j */
static void mix_block(const g4_kernels *kernels, const plan *p, int head, int row, int n, const float *weights)
{
    const g4_full_attention *run = p->run;
    const size_t z_stride = q_offset(run, 1, 0), stride = (size_t)run->n_rows;
    const float *panels = p->v + (size_t)kv_head(run, head) * p->v_floats;
    for (int j = 0; j < run->n_rows; j += BLOCK_KEYS) {
        const int keys = run->n_rows - j < BLOCK_KEYS ? run->n_rows - j : BLOCK_KEYS;
        for (int c = 0; c < run->head_dim; c += PANEL)
            kernels->matmul_panel(weights + j, stride, n, panels + (size_t)c * (size_t)run->n_rows + (size_t)j * PANEL,
                                  keys, run->z + q_offset(run, row, head) + c, z_stride,
                                  run->head_dim - c < PANEL ? run->head_dim - c : PANEL, j > 0);
    }
}

static void mix_block16(const g4_kernels *kernels, const plan *p, int head, int row, int n, const g4_rows16 *rows)
{
    const g4_full_attention *run = p->run;
    const int first = kv_head(run, head) * n_panels(run->head_dim);
    for (int j = 0; j < rows->stride; j += BLOCK_KEYS) {
        const g4_rows16 x = g4_rows16_at(rows, j);
        const int keys = rows->stride - j < BLOCK_KEYS ? rows->stride - j : BLOCK_KEYS;
        for (int c = 0; c < run->head_dim; c += PANEL) {
            const g4_panel16 panel = panel16_of(&p->v16, first + c / PANEL, run->n_rows), w = g4_panel16_at(&panel, j);
            kernels->matmul_panel16(&x, n, &w, keys, run->z + q_offset(run, row, head) + c, q_offset(run, 1, 0),
                                    run->head_dim - c < PANEL ? run->head_dim - c : PANEL, j > 0);
        }
    }
}

/* ---- tasks ------------------------------------------------------------------------------------------------------- */

enum { SCORE = 1, PATTERN = 2, MIX = 4 };

/* A task is a block of queries of one head. steps: the steps that it runs. */
typedef struct {
    const g4_exec *exec;
    const plan *plans;
    int n_plans, steps;
    float *array;   /* [H, T, T] of the only plan; NULL: scores are in the worker's scratch */
    float *scratch; /* [workers, scratch_stride] */
    size_t scratch_stride;
    g4_rows16 *weights; /* [workers] in `fast`: patterns as integers */
} attend_task;

/* A block's pattern as integers. With PATTERN, softmax writes the integers directly: no float32 pattern is stored. */
static g4_rows16 weights16(const attend_task *t, float *scores, int n_rows, int n, int worker)
{
    g4_rows16 weights = t->weights[worker];
    weights.stride = g4_stride16(n_rows);
    if (t->steps & PATTERN)
        t->exec->kernels->softmax_rows16(scores, (size_t)n_rows, n, n_rows, &weights);
    else
        t->exec->kernels->quantize_rows16(scores, (size_t)n_rows, n, n_rows, -INFINITY, INFINITY, &weights);
    return weights;
}

static void run_attend_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    const g4_kernels *kernels = t->exec->kernels;
    int i = 0;
    while (i + 1 < t->n_plans && task >= t->plans[i + 1].first_task)
        i++;
    const plan *p = &t->plans[i];
    const int local = task - p->first_task, head = local / p->n_blocks, row = local % p->n_blocks * p->queries;
    const int n = p->run->n_rows - row < p->queries ? p->run->n_rows - row : p->queries;
    const size_t n_rows = (size_t)p->run->n_rows;
    float *scores = t->array ? t->array + ((size_t)head * n_rows + (size_t)row) * n_rows
                             : t->scratch + (size_t)worker * t->scratch_stride;
    if (t->steps & SCORE)
        (p->fast ? score_block16 : score_block)(kernels, p, head, row, n, scores);
    if (t->steps & MIX && p->fast) {
        const g4_rows16 weights = weights16(t, scores, p->run->n_rows, n, worker);
        mix_block16(kernels, p, head, row, n, &weights);
        return;
    }
    for (int r = 0; t->steps & PATTERN && r < n; r++)
        kernels->softmax(scores + (size_t)r * n_rows, p->run->n_rows);
    if (t->steps & MIX)
        mix_block(kernels, p, head, row, n, scores);
}

static g4_status alloc_scratch(g4_exec *exec, attend_task *t)
{
    const int n_workers = g4_pool_size(exec->pool);
    size_t most_numbers = 0, most_scales = 0;
    for (int i = 0; i < t->n_plans; i++) {
        const plan *p = &t->plans[i];
        const size_t queries = (size_t)p->queries, n = queries * (size_t)p->run->n_rows,
                     numbers = queries * (size_t)g4_stride16(p->run->n_rows),
                     scales = queries * (size_t)g4_groups16(p->run->n_rows);
        t->scratch_stride = n > t->scratch_stride ? n : t->scratch_stride;
        most_numbers = numbers > most_numbers ? numbers : most_numbers;
        most_scales = scales > most_scales ? scales : most_scales;
    }
    if (!t->array)
        G4_ALLOC(exec, t->scratch, (size_t)n_workers * t->scratch_stride);
    if (!exec->fast)
        return G4_OK;
    G4_ALLOC(exec, t->weights, (size_t)n_workers);
    for (int worker = 0; worker < n_workers; worker++) {
        G4_ALLOC(exec, t->weights[worker].q, most_numbers);
        G4_ALLOC(exec, t->weights[worker].scale, most_scales);
    }
    return G4_OK;
}

static g4_status attend(g4_exec *exec, const g4_full_attention *runs, int n_runs, int steps, float *array)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    const double start = g4_profile_start(exec);
    attend_task t = {.exec = exec, .n_plans = n_runs, .steps = steps, .array = array};
    plan *plans;
    int n_tasks = 0;
    double work = 0;
    G4_ALLOC(exec, plans, (size_t)n_runs + 1);
    for (int i = 0; i < n_runs; i++) {
        G4_TRY(make_plan(exec, &runs[i], &plans[i]));
        plans[i].first_task = n_tasks;
        n_tasks += plans[i].n_blocks * runs[i].n_heads;
        work += 2.0 * runs[i].n_rows * (double)runs[i].n_rows * runs[i].n_heads * runs[i].head_dim;
    }
    t.plans = plans;
    if (steps != PATTERN)
        G4_TRY(pack_all(exec, plans, n_runs));
    G4_TRY(alloc_scratch(exec, &t));
    g4_status status = g4_exec_run(exec, n_tasks, work, run_attend_task, &t);
    if (steps & MIX) { /* steps run one by one: the last records the work of all */
        g4_profile_end(exec, G4_OP_ATTEND_GLOBAL, start, exec->fast ? 0 : 2 * work, 0);
        if (exec->profile && exec->fast)
            exec->profile->ops[G4_OP_ATTEND_GLOBAL].int8_work += 2 * work;
    }
    g4_arena_restore(exec->arena, mark);
    return status;
}

g4_status g4_attend_full(g4_exec *exec, const g4_full_attention *runs, int n_runs)
{
    return attend(exec, runs, n_runs, SCORE | PATTERN | MIX, NULL);
}

g4_status g4_full_scores(g4_exec *exec, const g4_full_attention *run, float *scores)
{
    return attend(exec, run, 1, SCORE, scores);
}

g4_status g4_full_pattern(g4_exec *exec, const g4_full_attention *run, float *scores)
{
    return attend(exec, run, 1, PATTERN, scores);
}

g4_status g4_full_mix(g4_exec *exec, const g4_full_attention *run, const float *pattern)
{
    return attend(exec, run, 1, MIX, (float *)pattern);
}
