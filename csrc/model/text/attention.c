/* SPDX-License-Identifier: Apache-2.0 */
/* Self-attention of a decoder layer. Ref: transformers models/gemma4 Gemma4TextAttention. */
#include <string.h>

#include "model/config.h"
#include "model/text/forward.h"
#include "ops/attention/attention.h"
#include "ops/linear.h"
#include "ops/profile.h"
#include "ops/rows.h"

static size_t kv_width(const g4_forward *f, int layer)
{
    return (size_t)f->config->layers[layer].n_kv_heads * (size_t)f->config->layers[layer].head_dim;
}

/* RMSNorm of each head in place, then announces the site. gain NULL: no gain. */
static g4_status head_norm(g4_forward *f, int layer, g4_site site, float *x, const float *gain, int n_heads)
{
    G4_TRY(g4_rms_norm(&f->exec, x, gain, f->n_rows * n_heads, f->config->layers[layer].head_dim,
                       f->config->rms_norm_eps, x));
    return g4_tap_rows(f, site, layer, x);
}

static g4_status rotate(g4_forward *f, int layer, g4_site site, float *x, int n_heads)
{
    int rope = f->config->layers[layer].rope;
    G4_TRY(g4_rope_rows(&f->exec, x, f->cosine[rope], f->sine[rope], f->n_rows, n_heads, f->config->rope_half[rope]));
    return g4_tap_rows(f, site, layer, x);
}

/* Stores k = RoPE(norm(W_k x)) and v = norm(W_v x) in the cache; with k_eq_v, v = norm(W_k x). Either norm may be
 * absent. */
static g4_status cache_keys_and_values(g4_forward *f, int layer, const float *x)
{
    const g4_layer_config *lc = &f->config->layers[layer];
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    const size_t width = kv_width(f, layer), d_model = (size_t)f->config->d_model;
    float *k, *v;
    G4_ALLOC(&f->exec, k, (size_t)f->n_rows * width);
    G4_ALLOC(&f->exec, v, (size_t)f->n_rows * width);
    g4_linear_job jobs[] = {{x, d_model, f->n_rows, w->k, k, width}, {x, d_model, f->n_rows, w->v, v, width}};
    G4_TRY(g4_text_linear_jobs(f, jobs, lc->k_eq_v ? 1 : 2));
    G4_TRY(g4_tap_rows(f, G4_SITE_K, layer, k));
    if (lc->k_eq_v)
        memcpy(v, k, (size_t)f->n_rows * width * sizeof *v);
    else
        G4_TRY(g4_tap_rows(f, G4_SITE_V, layer, v));
    if (f->config->k_norm)
        G4_TRY(head_norm(f, layer, G4_SITE_K_NORMED, k, w->k_norm, lc->n_kv_heads));
    if (f->config->v_norm)
        G4_TRY(head_norm(f, layer, G4_SITE_V_NORMED, v, NULL, lc->n_kv_heads));
    G4_TRY(rotate(f, layer, G4_SITE_ROT_K, k, lc->n_kv_heads));
    for (int s = 0; s < f->n_segments; s++) {
        const g4_segment *segment = &f->segments[s];
        const size_t row = (size_t)segment->first_row;
        G4_TRY(g4_kv_store(segment->seq, layer, segment->first_position, segment->n_rows, k + row * width,
                           v + row * width, f->exec.err));
    }
    return G4_OK;
}

/* Unrolls the cached positions to float32 [n_keys, K, h], in order; zeros before the first cached position. */
static g4_status unroll_cache(g4_forward *f, int layer, const g4_attention *run, const g4_kv_view *cached, float **out)
{
    const size_t width = kv_width(f, layer), h = (size_t)run->head_dim;
    G4_ALLOC(&f->exec, *out, (size_t)run->n_keys * width);
    memset(*out, 0, (size_t)run->kv.first * width * sizeof **out);
    for (int p = run->kv.first; p < run->n_keys; p++)
        for (int head = 0; head < run->n_kv_heads; head++)
            g4_kv_read_keys(f->exec.kernels, cached, head, run->head_dim, p, 1,
                            *out + (size_t)p * width + (size_t)head * h);
    return G4_OK;
}

/* If the cached keys or values are tapped, attention reads float32 copies. Edits affect this layer only. */
static g4_status tap_keys_used(g4_forward *f, int layer, const g4_segment *segment, g4_attention *run)
{
    float *k, *v;
    if (!g4_tapped(f, G4_SITE_K_USED, layer) && !g4_tapped(f, G4_SITE_V_USED, layer))
        return G4_OK;
    g4_kv_view values = run->kv;
    values.k = values.v, values.gain = NULL;
    G4_TRY(unroll_cache(f, layer, run, &run->kv, &k));
    G4_TRY(unroll_cache(f, layer, run, &values, &v));
    G4_TRY(g4_tap_keys(f, G4_SITE_K_USED, layer, segment, run, k));
    G4_TRY(g4_tap_keys(f, G4_SITE_V_USED, layer, segment, run, v));
    run->kv = (g4_kv_view){
        .k = k, .v = v, .dtype = G4_F32, .stride = kv_width(f, layer), .n_slots = run->n_keys, .first = run->kv.first};
    return G4_OK;
}

/* Computes scores, pattern and z as separate arrays, so that they can be tapped. */
static g4_status attend_in_steps(g4_forward *f, int layer, const g4_segment *segment, const g4_attention *run)
{
    float *scores;
    const double start = g4_profile_start(&f->exec);
    G4_ALLOC(&f->exec, scores, (size_t)run->n_heads * (size_t)run->n_rows * (size_t)run->n_keys);
    G4_TRY(g4_attention_scores(&f->exec, run, scores));
    G4_TRY(g4_tap_keys(f, G4_SITE_ATTN_SCORES, layer, segment, run, scores));
    G4_TRY(g4_attention_pattern(&f->exec, run, scores));
    G4_TRY(g4_tap_keys(f, G4_SITE_PATTERN, layer, segment, run, scores));
    G4_TRY(g4_attention_mix(&f->exec, run, scores));
    g4_profile_end_attention(&f->exec, start, run, 1);
    return G4_OK;
}

/* Weight types whose linear layers may round to bf16 in `fast` (ops/linear.c). Attention rounds with the same types:
 * not with F32 or F16. */
static bool rounds_to_bf16(const g4_matrix *w)
{
    return w->dtype == G4_BF16 || g4_is_quantised(w->dtype);
}

/* The number of rows that chooses the method: rows with logits only, if rows are split. So reading through taps changes
 * no bit. */
static int deciding_rows(const g4_forward *f, const g4_segment *segment)
{
    int n = 0;
    for (int i = 0; g4_rows_are_split(f) && i < segment->n_rows; i++)
        n += f->logits_slot[segment->first_row + i] >= 0;
    return n ? n : segment->n_rows;
}

/* out [T]: in this layer each row sees positions before its entry; NULL: up to its own (causal). */
static g4_status ends_of_layer(g4_forward *f, int layer, const int32_t **out)
{
    const int ahead = f->config->layers[layer].ahead;
    int32_t *ends;
    *out = f->ends;
    if (!f->ends || ahead == G4_WHOLE_STRETCH)
        return G4_OK;
    *out = NULL;
    if (!ahead)
        return G4_OK;
    G4_ALLOC(&f->exec, ends, (size_t)f->n_rows);
    for (int row = 0; row < f->n_rows; row++) {
        const int own = f->positions[row] + 1;
        ends[row] = f->ends[row] - own > ahead ? own + ahead : f->ends[row];
    }
    *out = ends;
    return G4_OK;
}

static g4_status attend(g4_forward *f, int layer, const float *q, float *z)
{
    const g4_layer_config *lc = &f->config->layers[layer];
    const size_t width = (size_t)f->config->n_heads * (size_t)lc->head_dim;
    const bool in_steps = g4_tapped(f, G4_SITE_ATTN_SCORES, layer) || g4_tapped(f, G4_SITE_PATTERN, layer);
    const int32_t *ends;
    g4_attention *runs;
    G4_TRY(ends_of_layer(f, layer, &ends));
    G4_ALLOC(&f->exec, runs, (size_t)f->n_segments);
    for (int s = 0; s < f->n_segments; s++) {
        const g4_segment *segment = &f->segments[s];
        runs[s] = (g4_attention){.q = q + (size_t)segment->first_row * width,
                                 .z = z + (size_t)segment->first_row * width,
                                 .positions = f->positions + segment->first_row,
                                 .ends = ends ? ends + segment->first_row : NULL,
                                 .n_rows = segment->n_rows,
                                 .n_deciding = deciding_rows(f, segment),
                                 .n_heads = f->config->n_heads,
                                 .n_kv_heads = lc->n_kv_heads,
                                 .head_dim = lc->head_dim,
                                 .window = lc->window,
                                 .softcap = f->config->attention_softcap,
                                 .n_keys = segment->end_position,
                                 .bf16 = rounds_to_bf16(&f->model->weights.layers[layer].q),
                                 .kv = g4_kv_view_of(segment->seq, layer)};
        G4_TRY(tap_keys_used(f, layer, segment, &runs[s]));
        if (in_steps)
            G4_TRY(attend_in_steps(f, layer, segment, &runs[s]));
    }
    if (!in_steps)
        G4_TRY(g4_attend(&f->exec, runs, f->n_segments));
    return g4_tap_rows(f, G4_SITE_Z, layer, z);
}

/* Column slices of a quantised matrix must be a multiple of the block size. If head_dim is not, copies w to float32. */
static g4_status with_whole_heads(g4_forward *f, g4_matrix *w, size_t head_dim)
{
    float *plain;
    if (head_dim % g4_block_size(w->dtype) == 0)
        return G4_OK;
    G4_ALLOC(&f->exec, plain, w->n_rows * w->n_cols);
    for (size_t row = 0; row < w->n_rows; row++)
        g4_widen_for(f->exec.kernels, w->dtype)(plain + row * w->n_cols, g4_matrix_row(w, row), (int)w->n_cols);
    *w = (g4_matrix){plain, G4_F32, w->n_rows, w->n_cols, w->n_cols, w->op};
    return G4_OK;
}

/* out = W_o z. If hook_result is tapped, also computes the heads' contributions [T, H, D]. */
static g4_status project_out(g4_forward *f, int layer, const float *z, float *out)
{
    const g4_matrix *w = &f->model->weights.layers[layer].o;
    g4_matrix by_head = *w;
    const int n_heads = f->config->n_heads, h = f->config->layers[layer].head_dim, d = f->config->d_model;
    if (!g4_tapped(f, G4_SITE_RESULT, layer))
        return g4_text_linear(f, z, w, out);
    float *result;
    g4_linear_job *jobs;
    G4_TRY(with_whole_heads(f, &by_head, (size_t)h));
    G4_ALLOC(&f->exec, result, (size_t)f->n_rows * (size_t)n_heads * (size_t)d);
    G4_ALLOC(&f->exec, jobs, (size_t)n_heads);
    for (int i = 0; i < n_heads; i++)
        jobs[i] = (g4_linear_job){z + (size_t)i * (size_t)h,
                                  w->n_cols,
                                  f->n_rows,
                                  g4_matrix_cols(&by_head, (size_t)i * (size_t)h, (size_t)h),
                                  result + (size_t)i * (size_t)d,
                                  (size_t)n_heads * (size_t)d};
    G4_TRY(g4_linear_jobs(&f->exec, jobs, n_heads));
    /* Reading the contributions must not change the output; editing must. Only edited rows are summed anew. */
    float *before;
    size_t n_bytes = (size_t)f->n_rows * (size_t)n_heads * (size_t)d * sizeof *result;
    G4_ALLOC(&f->exec, before, n_bytes / sizeof *before);
    memcpy(before, result, n_bytes);
    G4_TRY(g4_tap_rows(f, G4_SITE_RESULT, layer, result));
    G4_TRY(g4_text_linear(f, z, w, out));
    if (memcmp(before, result, n_bytes) == 0)
        return G4_OK;
    for (int row = 0; row < f->n_rows; row++) {
        const size_t offset = (size_t)row * (size_t)n_heads * (size_t)d;
        if (memcmp(before + offset, result + offset, (size_t)n_heads * (size_t)d * sizeof *result) == 0)
            continue;
        float *sum = out + (size_t)row * (size_t)d;
        memcpy(sum, result + offset, (size_t)d * sizeof *sum);
        for (int i = 1; i < n_heads; i++)
            f->exec.kernels->add(sum, sum, result + offset + (size_t)i * (size_t)d, d);
    }
    return G4_OK;
}

g4_status g4_text_attention(g4_forward *f, int layer, float *attn_out)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    const int n_heads = f->config->n_heads;
    const size_t width = (size_t)n_heads * (size_t)f->config->layers[layer].head_dim;
    const g4_norm_sites post = {G4_SITE_LN1_POST_SCALE, G4_SITE_LN1_POST_NORMALIZED};
    float *x, *q, *z, *projected = attn_out;
    G4_ALLOC(&f->exec, x, (size_t)f->n_rows * (size_t)f->config->d_model);

    G4_TRY(g4_norm(f, layer, (g4_norm_sites){G4_SITE_LN1_SCALE, G4_SITE_LN1_NORMALIZED}, w->ln1, f->resid, x));
    G4_TRY(g4_tap_rows(f, G4_SITE_LN1_OUT, layer, x));
    if (g4_computes_kv(f->config, layer))
        G4_TRY(cache_keys_and_values(f, layer, x));
    if (layer == g4_last_kv_layer(f->config))
        g4_forward_prune(f, x);

    G4_ALLOC(&f->exec, q, (size_t)f->n_rows * width);
    G4_ALLOC(&f->exec, z, (size_t)f->n_rows * width);
    G4_TRY(g4_text_linear(f, x, &w->q, q));
    G4_TRY(g4_tap_rows(f, G4_SITE_Q, layer, q));
    if (f->config->q_norm)
        G4_TRY(head_norm(f, layer, G4_SITE_Q_NORMED, q, w->q_norm, n_heads));
    G4_TRY(rotate(f, layer, G4_SITE_ROT_Q, q, n_heads));
    if (f->config->attention_scale != 1) /* scales q instead of each score */
        G4_TRY(g4_scale_rows(&f->exec, q, f->config->attention_scale, NULL, f->n_rows, (int)width, q));
    G4_TRY(attend(f, layer, q, z));

    if (f->config->post_norms)
        G4_ALLOC(&f->exec, projected, (size_t)f->n_rows * (size_t)f->config->d_model);
    G4_TRY(project_out(f, layer, z, projected));
    G4_TRY(g4_tap_rows(f, G4_SITE_ATTN_PROJ, layer, projected));
    if (f->config->post_norms)
        G4_TRY(g4_norm(f, layer, post, w->ln1_post, projected, attn_out));
    return g4_tap_rows(f, G4_SITE_ATTN_OUT, layer, attn_out);
}
