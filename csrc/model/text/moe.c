/* SPDX-License-Identifier: Apache-2.0 */
/* The experts in parallel with the dense MLP. Ref: transformers models/gemma4 Gemma4TextRouter, Gemma4TextExperts. */
#include <math.h>
#include <string.h>

#include "model/text/forward.h"
#include "ops/linear.h"
#include "ops/moe.h"
#include "ops/rows.h"

/* The (row, slot) pairs that each expert computes. Arrays in expert order have one row per pair. */
typedef struct {
    int n_pairs;    /* T * k */
    int32_t *ids;   /* [T, k] */
    float *weights; /* [T, k] */
    int32_t *order; /* [T * k] pair at each place of the expert order */
    int32_t *first; /* [E + 1] first place of each expert */
} dispatch;

static g4_status route(g4_forward *f, int layer, dispatch *d)
{
    const g4_config *c = f->config;
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    float *x, *probs;
    int *rows;
    G4_ALLOC(&f->exec, x, (size_t)f->n_rows * (size_t)c->d_model);
    G4_ALLOC(&f->exec, probs, (size_t)f->n_rows * (size_t)c->n_experts);
    G4_TRY(g4_rms_norm(&f->exec, f->resid, w->router_scale, f->n_rows, c->d_model, c->rms_norm_eps, x));
    G4_TRY(g4_scale_rows(&f->exec, x, 1.0f / sqrtf((float)c->d_model), NULL, f->n_rows, c->d_model, x));
    G4_TRY(g4_tap_rows(f, G4_SITE_ROUTER_IN, layer, x));
    G4_TRY(g4_text_linear(f, x, &w->router, probs));
    G4_TRY(g4_tap_rows(f, G4_SITE_ROUTER_LOGITS, layer, probs));
    G4_TRY(g4_softmax_rows(&f->exec, probs, f->n_rows, c->n_experts));
    G4_TRY(g4_tap_rows(f, G4_SITE_ROUTER_PROBS, layer, probs));
    g4_moe_route(probs, f->n_rows, c->n_experts, c->top_k_experts, w->per_expert_scale, d->ids, d->weights);
    G4_TRY(g4_tap_rows(f, G4_SITE_EXPERT_IDS, layer, d->ids));
    G4_TRY(g4_tap_rows(f, G4_SITE_EXPERT_WEIGHTS, layer, d->weights));
    for (int i = 0; i < d->n_pairs; i++)
        if (d->ids[i] < 0 || d->ids[i] >= c->n_experts)
            return g4_fail(f->exec.err, G4_EVALUE, "blocks.%d.moe.hook_expert_ids: an edit chose expert %d of %d",
                           layer, d->ids[i], c->n_experts);
    G4_ALLOC(&f->exec, rows, (size_t)f->n_rows);
    g4_order_rows(f, rows);
    g4_moe_group(d->ids, rows, f->n_rows, c->top_k_experts, c->n_experts, d->order, d->first);
    return G4_OK;
}

/* to[pair] = from[place] if to_pairs, else to[place] = from[pair]; n values each. */
static void permute(const dispatch *d, const float *from, float *to, size_t n, bool to_pairs)
{
    for (int place = 0; place < d->n_pairs; place++) {
        size_t pair = (size_t)d->order[place] * n, at = (size_t)place * n;
        memcpy(to + (to_pairs ? pair : at), from + (to_pairs ? at : pair), n * sizeof *to);
    }
}

/* Announces an array in expert order as [T, k, n]. */
static g4_status tap_pairs(g4_forward *f, g4_site site, int layer, const dispatch *d, float *sorted, size_t n)
{
    float *pairs;
    if (!g4_tapped(f, site, layer))
        return G4_OK;
    G4_ALLOC(&f->exec, pairs, (size_t)d->n_pairs * n);
    permute(d, sorted, pairs, n, true);
    G4_TRY(g4_tap_rows(f, site, layer, pairs));
    permute(d, pairs, sorted, n, false);
    return G4_OK;
}

/* The end of an expert's places that belong to rows with logits; its first place if rows are not split. */
static int end_with_logits(const g4_forward *f, const dispatch *d, int expert)
{
    int place = d->first[expert];
    if (g4_rows_are_split(f))
        while (place < d->first[expert + 1] && f->logits_slot[d->order[place] / f->config->top_k_experts] >= 0)
            place++;
    return place;
}

/* One job per expert that has rows, two if rows are split. Expert e uses weight rows [e * rows_each, + n_out). */
static int expert_jobs(const g4_forward *f, const dispatch *d, const g4_matrix *w, size_t rows_each, size_t n_out,
                       const float *x, float *out, g4_linear_job *jobs)
{
    int n_jobs = 0;
    for (int e = 0; e < f->config->n_experts; e++) {
        const int ends[] = {d->first[e], end_with_logits(f, d, e), d->first[e + 1]};
        for (int part = 0; part < 2; part++) {
            const size_t at = (size_t)ends[part];
            const int n = ends[part + 1] - ends[part];
            if (n)
                jobs[n_jobs++] =
                    (g4_linear_job){x + at * w->n_cols, w->n_cols, n, g4_matrix_rows(w, (size_t)e * rows_each, n_out),
                                    out + at * n_out,   n_out};
        }
    }
    return n_jobs;
}

/* y [T * k, D] = W_down (gelu(W_gate x) * W_up x) for every pair, in expert order. */
static g4_status run_experts(g4_forward *f, int layer, const dispatch *d, const float *x, float *y)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    const size_t m = (size_t)f->config->d_expert, d_model = (size_t)f->config->d_model, n = (size_t)d->n_pairs;
    float *gate, *up;
    g4_linear_job *jobs;
    G4_ALLOC(&f->exec, gate, n * m);
    G4_ALLOC(&f->exec, up, n * m);
    G4_ALLOC(&f->exec, jobs, 4 * (size_t)f->config->n_experts); /* gate and up, each split in two */

    int n_jobs = expert_jobs(f, d, &w->experts_gate, w->gate_rows, m, x, gate, jobs);
    n_jobs += expert_jobs(f, d, &w->experts_up, w->gate_rows, m, x, up, jobs + n_jobs);
    G4_TRY(g4_linear_jobs(&f->exec, jobs, n_jobs));
    G4_TRY(tap_pairs(f, G4_SITE_EXPERT_PRE, layer, d, gate, m));
    G4_TRY(tap_pairs(f, G4_SITE_EXPERT_PRE_LINEAR, layer, d, up, m));
    G4_TRY(g4_gelu_mul_rows(&f->exec, gate, up, d->n_pairs, (int)m, gate));
    G4_TRY(tap_pairs(f, G4_SITE_EXPERT_POST, layer, d, gate, m));
    n_jobs = expert_jobs(f, d, &w->experts_down, d_model, d_model, gate, y, jobs);
    return g4_linear_jobs(&f->exec, jobs, n_jobs);
}

/* out_t = sum over slots of pairs[t][slot], in slot order. */
static void sum_slots(const g4_forward *f, const float *pairs, float *out)
{
    const int k = f->config->top_k_experts, d = f->config->d_model;
    for (int row = 0; row < f->n_rows; row++) {
        const float *slots = pairs + (size_t)row * (size_t)k * (size_t)d;
        float *sum = out + (size_t)row * (size_t)d;
        memcpy(sum, slots, (size_t)d * sizeof *sum);
        for (int slot = 1; slot < k; slot++)
            f->exec.kernels->add(sum, sum, slots + (size_t)slot * (size_t)d, d);
    }
}

static g4_status dispatch_new(g4_forward *f, dispatch *d)
{
    d->n_pairs = f->n_rows * f->config->top_k_experts;
    G4_ALLOC(&f->exec, d->ids, (size_t)d->n_pairs);
    G4_ALLOC(&f->exec, d->weights, (size_t)d->n_pairs);
    G4_ALLOC(&f->exec, d->order, (size_t)d->n_pairs);
    G4_ALLOC(&f->exec, d->first, (size_t)f->config->n_experts + 1);
    return G4_OK;
}

g4_status g4_text_moe(g4_forward *f, int layer, float *moe_out)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    const int d_model = f->config->d_model;
    const size_t n_model = (size_t)d_model;
    dispatch d;
    float *x, *x_sorted, *y_sorted, *pairs;
    G4_TRY(dispatch_new(f, &d));
    G4_ALLOC(&f->exec, x, (size_t)f->n_rows * n_model);
    G4_ALLOC(&f->exec, x_sorted, (size_t)d.n_pairs * n_model);
    G4_ALLOC(&f->exec, y_sorted, (size_t)d.n_pairs * n_model);
    G4_ALLOC(&f->exec, pairs, (size_t)d.n_pairs * n_model);

    G4_TRY(route(f, layer, &d));
    G4_TRY(g4_norm(f, layer, (g4_norm_sites){G4_N_SITES, G4_N_SITES}, w->moe_in_norm, f->resid, x));
    G4_TRY(g4_tap_rows(f, G4_SITE_MOE_IN, layer, x));
    for (int place = 0; place < d.n_pairs; place++)
        memcpy(x_sorted + (size_t)place * n_model, x + (size_t)(d.order[place] / f->config->top_k_experts) * n_model,
               n_model * sizeof *x);
    G4_TRY(run_experts(f, layer, &d, x_sorted, y_sorted));
    permute(&d, y_sorted, pairs, n_model, true);
    for (int pair = 0; pair < d.n_pairs; pair++)
        f->exec.kernels->scale_mul(pairs + (size_t)pair * n_model, pairs + (size_t)pair * n_model, d.weights[pair],
                                   NULL, d_model);
    G4_TRY(g4_tap_rows(f, G4_SITE_EXPERT_OUT, layer, pairs));
    sum_slots(f, pairs, x);
    G4_TRY(g4_tap_rows(f, G4_SITE_MOE_OUT, layer, x));
    G4_TRY(g4_norm(f, layer, (g4_norm_sites){G4_N_SITES, G4_N_SITES}, w->moe_out_norm, x, moe_out));
    return g4_tap_rows(f, G4_SITE_MOE_OUT_NORMED, layer, moe_out);
}
