/* SPDX-License-Identifier: Apache-2.0 */
/* The text decoder, from tokens to logits. Ref: transformers models/gemma4 Gemma4TextModel, Gemma4TextDecoderLayer.
 *
 *   x      = embed(tokens) * sqrt(D)
 *   ple    = (norm(W_c x / sqrt(D)) + table(tokens) * sqrt(P)) / sqrt(2)
 *   layer:   x += norm(attention(norm(x)))                    (the outer norms if config.post_norms)
 *            x += norm(mlp(norm(x)))                          (+ experts in parallel)
 *            x += norm(W_p (gelu(W_g x) * ple[layer]))        (models with per-layer embeddings)
 *            x *= layer_scalar                                (models with layer scalars)
 *   logits = softcap(embed^T norm(x))
 */
#include <math.h>
#include <string.h>

#include "base/pages.h"
#include "model/config.h"
#include "model/text/forward.h"
#include "ops/linear.h"
#include "ops/pick.h"
#include "ops/rows.h"

enum { LOGITS_BLOCK = 32 }; /* rows of logits in scratch at once: 32 MB with a vocabulary of 262,144 */

#define TAP(site, layer, data) G4_TRY(g4_tap_rows(f, G4_SITE_##site, layer, data))

/* ---- embeddings -------------------------------------------------------------------------------------------------- */

/* Gathers rows of the PLE table. Linux maps up to 360 KB around each 18 KB row that is read (E2B, Linux 6.18: 180 MB
 * for 512 tokens). So the pages of a table on disk are released every 64 rows. */
static g4_status gather_per_layer(g4_forward *f, const int32_t *tokens, float *out)
{
    const g4_matrix *table = &f->model->weights.ple_table;
    const int slice = f->config->ple_on_disk ? 64 : f->n_rows;
    for (int row = 0; row < f->n_rows; row += slice) {
        const int n = f->n_rows - row < slice ? f->n_rows - row : slice;
        float *to = out + (size_t)row * table->n_cols;
        G4_TRY(g4_gather_rows(&f->exec, table, tokens + row, n, f->config->ple_scale, to));
        if (f->config->ple_on_disk)
            g4_pages_release(table->data, g4_dtype_bytes(table->dtype, table->n_rows * table->n_cols));
    }
    return G4_OK;
}

/* Per-layer embeddings: the sum of a table row of the token and a projection of its embedding. */
static g4_status embed_per_layer(g4_forward *f, const int32_t *tokens)
{
    const g4_config *c = f->config;
    const g4_weights *w = &f->model->weights;
    const int width = c->n_layers * c->d_ple, n_slices = f->n_rows * c->n_layers;
    float *token;
    G4_ALLOC(&f->exec, token, (size_t)f->n_rows * (size_t)width);
    G4_TRY(gather_per_layer(f, tokens, token));
    TAP(PLE_TOKEN, 0, token);
    G4_TRY(g4_text_linear(f, f->resid, &w->ple_context, f->ple));
    G4_TRY(g4_scale_rows(&f->exec, f->ple, 1.0f / sqrtf((float)c->d_model), NULL, f->n_rows, width, f->ple));
    G4_TRY(g4_rms_norm(&f->exec, f->ple, w->ple_context_norm, n_slices, c->d_ple, c->rms_norm_eps, f->ple));
    TAP(PLE_CONTEXT, 0, f->ple);
    G4_TRY(g4_add_rows(&f->exec, f->ple, token, f->n_rows, width, f->ple));
    return g4_scale_rows(&f->exec, f->ple, sqrtf(0.5f), NULL, f->n_rows, width, f->ple);
}

g4_status g4_text_embed(g4_forward *f, const int32_t *tokens, const float *const *embeddings)
{
    const g4_config *c = f->config;
    const size_t d = (size_t)c->d_model;
    G4_ALLOC(&f->exec, f->resid, (size_t)f->n_rows * d);
    G4_TRY(g4_gather_rows(&f->exec, &f->model->weights.embed, tokens, f->n_rows, c->embed_scale, f->resid));
    for (int row = 0; row < f->n_rows; row++)
        if (embeddings[row])
            memcpy(f->resid + (size_t)row * d, embeddings[row], d * sizeof *f->resid);
    TAP(EMBED, 0, f->resid);
    for (int r = 0; r < c->n_ropes; r++) {
        G4_ALLOC(&f->exec, f->cosine[r], (size_t)f->n_rows * (size_t)c->rope_half[r]);
        G4_ALLOC(&f->exec, f->sine[r], (size_t)f->n_rows * (size_t)c->rope_half[r]);
        G4_TRY(g4_rope_table(&f->exec, f->positions, f->n_rows, c->rope_inv_freq[r], c->rope_half[r], f->cosine[r],
                             f->sine[r]));
    }
    if (!c->d_ple)
        return G4_OK;
    G4_ALLOC(&f->exec, f->ple, (size_t)f->n_rows * (size_t)c->n_layers * (size_t)c->d_ple);
    g4_arena_mark mark = g4_arena_save(f->exec.arena);
    G4_TRY(embed_per_layer(f, tokens));
    g4_arena_restore(f->exec.arena, mark);
    return G4_OK;
}

/* ---- a layer ---------------------------------------------------------------------------------------------------- */

static g4_status add_to_residual(g4_forward *f, const float *branch)
{
    return g4_add_rows(&f->exec, f->resid, branch, f->n_rows, f->config->d_model, f->resid);
}

/* W_down (gelu(W_gate x) * W_up x) */
static g4_status dense_mlp(g4_forward *f, int layer, const float *x, float *out)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    const int width = f->config->layers[layer].d_mlp;
    const size_t d = (size_t)f->config->d_model;
    float *gate, *up;
    G4_ALLOC(&f->exec, gate, (size_t)f->n_rows * (size_t)width);
    G4_ALLOC(&f->exec, up, (size_t)f->n_rows * (size_t)width);
    g4_linear_job jobs[] = {{x, d, f->n_rows, w->gate, gate, (size_t)width},
                            {x, d, f->n_rows, w->up, up, (size_t)width}};
    G4_TRY(g4_text_linear_jobs(f, jobs, 2));
    TAP(MLP_PRE, layer, gate);
    TAP(MLP_PRE_LINEAR, layer, up);
    G4_TRY(g4_gelu_mul_rows(&f->exec, gate, up, f->n_rows, width, gate));
    TAP(MLP_POST, layer, gate);
    G4_TRY(g4_text_linear(f, gate, &w->down, out));
    return g4_tap_rows(f, G4_SITE_MLP_PROJ, layer, out);
}

/* out = norm(out) + norm(experts); `out` holds the dense MLP's output. */
static g4_status add_experts(g4_forward *f, int layer, float *out)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    float *experts;
    G4_TRY(g4_norm(f, layer, (g4_norm_sites){G4_N_SITES, G4_N_SITES}, w->mlp_out_norm, out, out));
    TAP(MLP_OUT_NORMED, layer, out);
    G4_ALLOC(&f->exec, experts, (size_t)f->n_rows * (size_t)f->config->d_model);
    G4_TRY(g4_text_moe(f, layer, experts));
    G4_TRY(g4_add_rows(&f->exec, out, experts, f->n_rows, f->config->d_model, out));
    return g4_tap_rows(f, G4_SITE_MLP_MOE_SUM, layer, out);
}

static g4_status feed_forward(g4_forward *f, int layer, float *out)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    float *x;
    G4_ALLOC(&f->exec, x, (size_t)f->n_rows * (size_t)f->config->d_model);
    G4_TRY(g4_norm(f, layer, (g4_norm_sites){G4_SITE_LN2_SCALE, G4_SITE_LN2_NORMALIZED}, w->ln2, f->resid, x));
    TAP(MLP_IN, layer, x);
    G4_TRY(dense_mlp(f, layer, x, out));
    if (f->config->layers[layer].moe)
        G4_TRY(add_experts(f, layer, out));
    const g4_norm_sites post = {G4_SITE_LN2_POST_SCALE, G4_SITE_LN2_POST_NORMALIZED};
    if (f->config->post_norms)
        G4_TRY(g4_norm(f, layer, post, w->ln2_post, out, out));
    return g4_tap_rows(f, G4_SITE_MLP_OUT, layer, out);
}

static g4_status copy_ple_slice(g4_forward *f, int layer, float *slice)
{
    const size_t p = (size_t)f->config->d_ple, width = (size_t)f->config->n_layers * p;
    for (int row = 0; row < f->n_rows; row++)
        memcpy(slice + (size_t)row * p, f->ple + (size_t)row * width + (size_t)layer * p, p * sizeof *slice);
    return g4_tap_rows(f, G4_SITE_PLE_IN, layer, slice);
}

static g4_status per_layer_embedding(g4_forward *f, int layer, float *out)
{
    const g4_layer_weights *w = &f->model->weights.layers[layer];
    const int p = f->config->d_ple;
    float *slice, *gate;
    G4_ALLOC(&f->exec, slice, (size_t)f->n_rows * (size_t)p);
    G4_ALLOC(&f->exec, gate, (size_t)f->n_rows * (size_t)p);
    G4_TRY(copy_ple_slice(f, layer, slice));
    G4_TRY(g4_text_linear(f, f->resid, &w->ple_gate, gate));
    TAP(PLE_GATE_PRE, layer, gate);
    G4_TRY(g4_gelu_rows(&f->exec, gate, f->n_rows, p, gate));
    TAP(PLE_GATE, layer, gate);
    G4_TRY(g4_mul_rows(&f->exec, gate, slice, f->n_rows, p, gate));
    TAP(PLE_GATED, layer, gate);
    G4_TRY(g4_text_linear(f, gate, &w->ple_projection, out));
    G4_TRY(g4_norm(f, layer, (g4_norm_sites){G4_N_SITES, G4_N_SITES}, w->ple_norm, out, out));
    return g4_tap_rows(f, G4_SITE_PLE_OUT, layer, out);
}

static g4_status scale_residual(g4_forward *f, int layer)
{
    TAP(RESID_UNSCALED, layer, f->resid);
    return g4_scale_rows(&f->exec, f->resid, *f->model->weights.layers[layer].layer_scalar, NULL, f->n_rows,
                         f->config->d_model, f->resid);
}

static g4_status decoder_layer(g4_forward *f, int layer)
{
    float *branch;
    G4_ALLOC(&f->exec, branch, (size_t)f->n_rows * (size_t)f->config->d_model);

    TAP(RESID_PRE, layer, f->resid);
    G4_TRY(g4_text_attention(f, layer, branch));
    G4_TRY(add_to_residual(f, branch));
    TAP(RESID_MID, layer, f->resid);

    G4_TRY(feed_forward(f, layer, branch));
    G4_TRY(add_to_residual(f, branch));
    TAP(RESID_MLP, layer, f->resid);

    if (f->config->d_ple) {
        G4_TRY(per_layer_embedding(f, layer, branch));
        G4_TRY(add_to_residual(f, branch));
    }
    if (f->config->layer_scalar)
        G4_TRY(scale_residual(f, layer));
    return g4_tap_rows(f, G4_SITE_RESID_POST, layer, f->resid);
}

void g4_text_enter(g4_forward *f)
{
    const size_t d = (size_t)f->config->d_model;
    for (int s = 0; s < f->n_segments; s++) {
        const g4_segment *segment = &f->segments[s];
        const float *resid = f->runs[segment->run].resid;
        if (resid)
            memcpy(f->resid + (size_t)segment->first_row * d, resid + (size_t)f->row_in_run[segment->first_row] * d,
                   (size_t)segment->n_rows * d * sizeof *resid);
    }
}

g4_status g4_text_layers(g4_forward *f, int first, int end)
{
    const int last_kv_layer = g4_last_kv_layer(f->config);
    g4_arena_mark mark = g4_arena_save(f->exec.arena);
    for (int layer = first; layer < end; layer++) {
        if (g4_exec_poll(&f->exec))
            return g4_fail(f->exec.err, G4_ECANCELLED, "cancelled");
        /* all keys and values are cached, and no output needs a row of this chunk */
        if (layer > last_kv_layer && f->n_rows == 0 && !g4_taps_want_keys(f, layer))
            break;
        G4_TRY(decoder_layer(f, layer));
        g4_arena_restore(f->exec.arena, mark);
    }
    return G4_OK;
}

/* ---- logits ----------------------------------------------------------------------------------------------------- */

static bool logits_tapped(const g4_forward *f)
{
    return g4_tapped(f, G4_SITE_LOGITS_RAW, 0) || g4_tapped(f, G4_SITE_LOGITS, 0);
}

/* Logits [n, V] of rows [first, first + n) of x, before the softcap. */
static g4_status head(g4_forward *f, const float *x, int first, int n, float *logits)
{
    return g4_linear(&f->exec, x + (size_t)first * (size_t)f->config->d_model, n, &f->model->weights.head, logits);
}

static g4_status cap_logits(g4_forward *f, float *logits, int n)
{
    if (f->config->logit_softcap > 0)
        return g4_softcap_rows(&f->exec, logits, f->config->logit_softcap, n, f->config->d_vocab);
    return G4_OK;
}

/* Rows of logits in which something is to be found. */
typedef struct {
    const float **rows;
    g4_pick **picks;
    int n;
} found_rows;

/* Copies the logits [V] of a row of the chunk to its run, if the run requests them, and notes what it looks for there. */
static void give_logits(g4_forward *f, int s, int row, const float *logits, found_rows *found)
{
    const size_t v = (size_t)f->config->d_vocab;
    const g4_run *run = &f->runs[f->segments[s].run];
    const int slot = f->logits_slot[row];
    if (slot < 0)
        return;
    if (run->logits)
        memcpy(run->logits + (size_t)slot * v, logits, v * sizeof *logits);
    if (run->picks) {
        found->rows[found->n] = logits;
        found->picks[found->n++] = &run->picks[slot];
    }
}

/* logits [n, V]: rows [first, first + n). */
static g4_status give_block(g4_forward *f, int first, int n, const float *logits)
{
    found_rows found = {.n = 0};
    G4_ALLOC(&f->exec, found.rows, (size_t)n);
    G4_ALLOC(&f->exec, found.picks, (size_t)n);
    for (int s = 0; s < f->n_segments; s++) {
        const int begin = f->segments[s].first_row, end = begin + f->segments[s].n_rows;
        for (int row = begin > first ? begin : first; row < end && row < first + n; row++)
            give_logits(f, s, row, logits + (size_t)(row - first) * (size_t)f->config->d_vocab, &found);
    }
    return found.n ? g4_pick_rows(&f->exec, found.rows, found.picks, found.n, f->config->d_vocab) : G4_OK;
}

/* Splits [begin, end) into blocks of LOGITS_BLOCK rows. The rows per block choose a row's method, which must not depend on
 * where chunks end. So a last block that is too short for the method overlaps the one before it. */
static int next_block(const g4_forward *f, int begin, int end, int *first)
{
    const int least = g4_linear_least_rows(&f->exec, &f->model->weights.head);
    *first = end - *first >= least ? *first : end - least;
    *first = *first < begin ? begin : *first;
    return end - *first < LOGITS_BLOCK ? end - *first : LOGITS_BLOCK;
}

/* Bounds memory when many rows have logits. */
static g4_status logits_in_blocks(g4_forward *f, const float *x)
{
    g4_arena_mark mark = g4_arena_save(f->exec.arena);
    for (int first = 0, n; first < f->n_rows; first += n) {
        float *logits;
        n = next_block(f, 0, f->n_rows, &first);
        G4_ALLOC(&f->exec, logits, (size_t)n * (size_t)f->config->d_vocab);
        G4_TRY(head(f, x, first, n, logits));
        G4_TRY(cap_logits(f, logits, n));
        G4_TRY(give_block(f, first, n, logits));
        g4_arena_restore(f->exec.arena, mark);
    }
    return G4_OK;
}

/* Computes rows [begin, end) of `rows` in the same blocks, and scatters them to logits [T, V]. */
static g4_status scatter_logits(g4_forward *f, const float *x, const int *rows, int begin, int end, float *logits)
{
    const size_t d = (size_t)f->config->d_model, v = (size_t)f->config->d_vocab;
    g4_arena_mark mark = g4_arena_save(f->exec.arena);
    for (int first = begin, n; first < end; first += n) {
        float *some_x, *some;
        n = next_block(f, begin, end, &first);
        G4_ALLOC(&f->exec, some_x, (size_t)n * d);
        G4_ALLOC(&f->exec, some, (size_t)n * v);
        for (int i = 0; i < n; i++)
            memcpy(some_x + (size_t)i * d, x + (size_t)rows[first + i] * d, d * sizeof *x);
        G4_TRY(head(f, some_x, 0, n, some));
        for (int i = 0; i < n; i++)
            memcpy(logits + (size_t)rows[first + i] * v, some + (size_t)i * v, v * sizeof *some);
        g4_arena_restore(f->exec.arena, mark);
    }
    return G4_OK;
}

/* Logits sites announce all rows at once. Rows with logits are computed in the same blocks as without taps. */
static g4_status announced_logits(g4_forward *f, const float *x)
{
    float *logits;
    int *rows;
    G4_ALLOC(&f->exec, logits, (size_t)f->n_rows * (size_t)f->config->d_vocab);
    G4_ALLOC(&f->exec, rows, (size_t)f->n_rows);
    g4_order_rows(f, rows);
    G4_TRY(scatter_logits(f, x, rows, 0, f->n_with_logits, logits));
    G4_TRY(scatter_logits(f, x, rows, f->n_with_logits, f->n_rows, logits));
    if (f->config->logit_softcap > 0)
        TAP(LOGITS_RAW, 0, logits);
    G4_TRY(cap_logits(f, logits, f->n_rows));
    TAP(LOGITS, 0, logits);
    return give_block(f, 0, f->n_rows, logits);
}

/* Keeps only rows that need logits; other rows were kept only for taps below. */
static void keep_rows_with_logits(g4_forward *f, float *x)
{
    f->ple = NULL;
    for (int row = 0; row < f->n_rows; row++)
        f->wanted[row] = f->logits_slot[row] >= 0;
    g4_forward_prune(f, x);
}

g4_status g4_text_logits(g4_forward *f)
{
    float *x;
    if (f->n_rows == 0)
        return G4_OK;
    G4_ALLOC(&f->exec, x, (size_t)f->n_rows * (size_t)f->config->d_model);
    G4_TRY(g4_norm(f, 0, (g4_norm_sites){G4_SITE_FINAL_SCALE, G4_SITE_FINAL_NORMALIZED}, f->model->weights.final_norm,
                   f->resid, x));
    TAP(FINAL_OUT, 0, x);
    if (logits_tapped(f))
        return announced_logits(f, x);
    keep_rows_with_logits(f, x);
    return logits_in_blocks(f, x);
}
