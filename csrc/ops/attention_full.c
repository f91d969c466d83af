/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention_full.h"

enum {
    PANEL = 16,
    BLOCK_KEYS = 256,        /* of the mix: 16 KB of values stay in the first-level cache for a block of queries */
    MAX_QUERIES = 96,        /* of a task … */
    SCORES_FLOATS = 96 << 10 /* … and fewer where their scores would leave the second-level cache (384 KB) */
};

/* Keys and values of one kv head as panels: keys [T / 16][h][16], values [h / 16][T][16], both padded. */
typedef struct {
    float *k, *v;
} packed;

typedef struct {
    const g4_full_attention *run;
    packed heads;
    size_t k_floats, v_floats; /* of one kv head */
    int queries, n_blocks;
    int first_task;
} plan;

static size_t round_up(int n)
{
    return (size_t)((n + PANEL - 1) / PANEL * PANEL);
}

static g4_status make_plan(g4_exec *exec, const g4_full_attention *run, plan *p)
{
    *p = (plan){.run = run,
                .k_floats = round_up(run->n_rows) * (size_t)run->head_dim,
                .v_floats = round_up(run->head_dim) * (size_t)run->n_rows};
    p->queries = run->n_rows ? SCORES_FLOATS / run->n_rows / 6 * 6 : MAX_QUERIES;
    p->queries = p->queries < 6 ? 6 : p->queries > MAX_QUERIES ? MAX_QUERIES : p->queries;
    p->n_blocks = (run->n_rows + p->queries - 1) / p->queries;
    G4_ALLOC(exec, p->heads.k, p->k_floats * (size_t)run->n_kv_heads);
    G4_ALLOC(exec, p->heads.v, p->v_floats * (size_t)run->n_kv_heads);
    return G4_OK;
}

/* ---- packing ----------------------------------------------------------------------------------------------------- */

typedef struct {
    plan *plans;
    int n_plans;
} pack_task;

/* Item i of all plans: a kv head. */
static void pack_heads(const g4_exec *exec, void *context, int first, int end)
{
    const pack_task *t = context;
    for (int i = 0, from = 0; i < t->n_plans; from += t->plans[i++].run->n_kv_heads) {
        const plan *p = &t->plans[i];
        const g4_full_attention *run = p->run;
        const size_t stride = (size_t)run->n_kv_heads * (size_t)run->head_dim;
        for (int head = 0; head < run->n_kv_heads; head++) {
            if (from + head < first || from + head >= end)
                continue;
            const float *k = run->k + (size_t)head * (size_t)run->head_dim;
            const float *v = run->v + (size_t)head * (size_t)run->head_dim;
            float *k_panels = p->heads.k + (size_t)head * p->k_floats,
                  *v_panels = p->heads.v + (size_t)head * p->v_floats;
            for (int j = 0; j < run->n_rows; j += PANEL)
                exec->kernels->pack_panel(k + (size_t)j * stride, stride,
                                          run->n_rows - j < PANEL ? run->n_rows - j : PANEL, run->head_dim,
                                          k_panels + (size_t)j * (size_t)run->head_dim);
            for (int c = 0; c < run->head_dim; c += PANEL) {
                const int n = run->head_dim - c < PANEL ? run->head_dim - c : PANEL;
                float *panel = v_panels + (size_t)c * (size_t)run->n_rows;
                for (int j = 0; j < run->n_rows; j++)
                    for (int l = 0; l < PANEL; l++)
                        panel[(size_t)j * PANEL + (size_t)l] = l < n ? v[(size_t)j * stride + (size_t)(c + l)] : 0;
            }
        }
    }
}

static g4_status pack_all(g4_exec *exec, plan *plans, int n_plans)
{
    int n_heads = 0;
    size_t most = 0;
    for (int i = 0; i < n_plans; i++) {
        n_heads += plans[i].run->n_kv_heads;
        most = plans[i].k_floats > most ? plans[i].k_floats : most;
    }
    pack_task t = {plans, n_plans};
    return g4_exec_rows(exec, n_heads, most, pack_heads, &t);
}

/* ---- a block of queries of one head ---------------------------------------------------------------------------------- */

static size_t q_offset(const g4_full_attention *run, int row, int head)
{
    return ((size_t)row * (size_t)run->n_heads + (size_t)head) * (size_t)run->head_dim;
}

/* scores[i][j] = q_i . k_j for n queries from `row` on. */
static void score_block(const g4_kernels *kernels, const plan *p, int head, int row, int n, float *scores,
                        size_t stride)
{
    const g4_full_attention *run = p->run;
    const size_t q_stride = (size_t)run->n_heads * (size_t)run->head_dim;
    const float *panels = p->heads.k + (size_t)(head / (run->n_heads / run->n_kv_heads)) * p->k_floats;
    for (int j = 0; j < run->n_rows; j += PANEL)
        kernels->matmul_panel(run->q + q_offset(run, row, head), q_stride, n,
                              panels + (size_t)j * (size_t)run->head_dim, run->head_dim, scores + j, stride,
                              run->n_rows - j < PANEL ? run->n_rows - j : PANEL, false);
}

/* z_i = sum over j of weights[i][j] * v_j */
static void mix_block(const g4_kernels *kernels, const plan *p, int head, int row, int n, const float *weights,
                      size_t stride)
{
    const g4_full_attention *run = p->run;
    const size_t z_stride = (size_t)run->n_heads * (size_t)run->head_dim;
    const float *panels = p->heads.v + (size_t)(head / (run->n_heads / run->n_kv_heads)) * p->v_floats;
    for (int j = 0; j < run->n_rows; j += BLOCK_KEYS) {
        const int keys = run->n_rows - j < BLOCK_KEYS ? run->n_rows - j : BLOCK_KEYS;
        for (int c = 0; c < run->head_dim; c += PANEL)
            kernels->matmul_panel(weights + j, stride, n, panels + (size_t)c * (size_t)run->n_rows + (size_t)j * PANEL,
                                  keys, run->z + q_offset(run, row, head) + c, z_stride,
                                  run->head_dim - c < PANEL ? run->head_dim - c : PANEL, j > 0);
    }
}

/* ---- fused ----------------------------------------------------------------------------------------------------------- */

typedef struct {
    const g4_exec *exec;
    const plan *plans;
    int n_plans;
    float *scratch;
    size_t scratch_stride;
} attend_task;

static void run_attend_task(void *context, int task, int worker)
{
    const attend_task *t = context;
    int i = 0;
    while (i + 1 < t->n_plans && task >= t->plans[i + 1].first_task)
        i++;
    const plan *p = &t->plans[i];
    const int local = task - p->first_task, head = local / p->n_blocks, row = local % p->n_blocks * p->queries;
    const int n = p->run->n_rows - row < p->queries ? p->run->n_rows - row : p->queries;
    const size_t stride = (size_t)p->run->n_rows;
    float *scores = t->scratch + (size_t)worker * t->scratch_stride;
    score_block(t->exec->kernels, p, head, row, n, scores, stride);
    for (int r = 0; r < n; r++)
        t->exec->kernels->softmax(scores + (size_t)r * stride, p->run->n_rows);
    mix_block(t->exec->kernels, p, head, row, n, scores, stride);
}

g4_status g4_attend_full(g4_exec *exec, const g4_full_attention *runs, int n_runs)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    attend_task t = {.exec = exec, .n_plans = n_runs};
    plan *plans;
    int n_tasks = 0;
    double work = 0;
    G4_ALLOC(exec, plans, (size_t)n_runs + 1);
    for (int i = 0; i < n_runs; i++) {
        plan *p = &plans[i];
        G4_TRY(make_plan(exec, &runs[i], p));
        p->first_task = n_tasks;
        n_tasks += p->n_blocks * runs[i].n_heads;
        const size_t scores = (size_t)p->queries * (size_t)runs[i].n_rows;
        t.scratch_stride = scores > t.scratch_stride ? scores : t.scratch_stride;
        work += 2.0 * runs[i].n_rows * (double)runs[i].n_rows * runs[i].n_heads * runs[i].head_dim;
    }
    t.plans = plans;
    G4_TRY(pack_all(exec, plans, n_runs));
    G4_ALLOC(exec, t.scratch, (size_t)g4_pool_size(exec->pool) * t.scratch_stride);
    g4_status status = g4_exec_run(exec, n_tasks, work, run_attend_task, &t);
    g4_arena_restore(exec->arena, mark);
    return status;
}

/* ---- in steps -------------------------------------------------------------------------------------------------------- */

typedef struct {
    const plan *plan;
    float *array; /* [H, T, T] */
} steps;

/* Item i: query i % T of head i / T; of the mix and the scores a whole head, so that panels serve many queries. */
static void score_heads(const g4_exec *exec, void *context, int first, int end)
{
    const steps *s = context;
    const size_t n = (size_t)s->plan->run->n_rows;
    for (int head = first; head < end; head++)
        score_block(exec->kernels, s->plan, head, 0, (int)n, s->array + (size_t)head * n * n, n);
}

static void pattern_rows(const g4_exec *exec, void *context, int first, int end)
{
    const steps *s = context;
    const int n = s->plan->run->n_rows;
    for (int i = first; i < end; i++)
        exec->kernels->softmax(s->array + (size_t)i * (size_t)n, n);
}

static void mix_heads(const g4_exec *exec, void *context, int first, int end)
{
    const steps *s = context;
    const size_t n = (size_t)s->plan->run->n_rows;
    for (int head = first; head < end; head++)
        mix_block(exec->kernels, s->plan, head, 0, (int)n, s->array + (size_t)head * n * n, n);
}

static g4_status in_steps(g4_exec *exec, const g4_full_attention *run, float *array, g4_rows_fn fn)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    plan p;
    G4_TRY(make_plan(exec, run, &p));
    G4_TRY(pack_all(exec, &p, 1));
    steps s = {&p, array};
    const size_t row_size = (size_t)run->n_rows * (size_t)run->n_rows * (size_t)run->head_dim / 8;
    g4_status status = g4_exec_rows(exec, run->n_heads, row_size, fn, &s);
    g4_arena_restore(exec->arena, mark);
    return status;
}

g4_status g4_full_scores(g4_exec *exec, const g4_full_attention *run, float *scores)
{
    return in_steps(exec, run, scores, score_heads);
}

g4_status g4_full_pattern(g4_exec *exec, const g4_full_attention *run, float *scores)
{
    plan p = {.run = run};
    steps s = {&p, scores};
    return g4_exec_rows(exec, run->n_heads * run->n_rows, (size_t)run->n_rows, pattern_rows, &s);
}

g4_status g4_full_mix(g4_exec *exec, const g4_full_attention *run, const float *pattern)
{
    return in_steps(exec, run, (float *)pattern, mix_heads);
}
