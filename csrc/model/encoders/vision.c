/* SPDX-License-Identifier: Apache-2.0 */
/* The vision tower, from patches to soft tokens. Ref: transformers models/gemma4 Gemma4VisionModel.
 *
 *   x      = W (2 p - 1) + (table_x[px] + table_y[py])
 *   layer:   x += norm(attention(norm(x)))      full attention; q, k rotated by px and py
 *            x += norm(mlp(norm(x)))
 *   soft   = mean of 3 x 3 patches * sqrt(D)    (- std_bias) * std_scale
 *   out    = W norm(soft)
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/encoders/encoder.h"
#include "ops/attention/full.h"
#include "ops/linear_f32.h"
#include "ops/rows.h"

/* MLP rows per slice, a multiple of the kernel's 6: gate and up take 19 MB each at a width of 3,072. */
enum { MLP_ROWS = 1536 };

#define TAP(site, layer, data) G4_TRY(g4_encoder_tap(p, G4_SITE_##site, layer, data))

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

static g4_status check(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(g4_encoder_check_layers(c, err));
    G4_TRY(g4_encoder_check_range("d_soft", c->d_soft, c->d_model, c->d_model, err));
    G4_TRY(g4_encoder_check_range("n_positions", c->n_positions, 1, 1 << 20, err));
    G4_TRY(g4_encoder_check_range("pool", c->pool, 1, 64, err));
    if (c->head_dim % 4)
        return g4_fail(err, G4_EVALUE, "encoder config: head_dim %d is no multiple of 4", c->head_dim);
    return G4_OK;
}

static int soft_tokens(const g4_encoder_config *c, int n_rows)
{
    return n_rows / (c->pool * c->pool);
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

#define TOWER(member) offsetof(g4_vision_weights, member)
#define LAYER(member) offsetof(g4_vision_layer, member)
#define MATRIX G4_BIND_MATRIX
#define VECTOR G4_BIND_VECTOR
#define CLIPPED G4_BIND_CLIPPED

/* clang-format off */
static const g4_bind_row tower_rows[] = {
    {"patch_embedder.input_proj.weight",         TOWER(patch),     MATRIX, "D X", 0, G4_OP_INPUT},
    {"patch_embedder.position_embedding_table",  TOWER(positions), MATRIX, "2 P D", 0, G4_OP_EMBED},
};

static const g4_bind_row standardize_rows[] = {
    {"std_bias",                                 TOWER(std_bias),  VECTOR, "D", 0, G4_OP_OTHER},
    {"std_scale",                                TOWER(std_scale), VECTOR, "D", 0, G4_OP_OTHER},
};

static const g4_bind_row layer_rows[] = {
    {"input_layernorm.weight",            LAYER(ln1),      VECTOR,  "D", 0, G4_OP_OTHER},
    {"post_attention_layernorm.weight",   LAYER(ln1_post), VECTOR,  "D", 0, G4_OP_OTHER},
    {"pre_feedforward_layernorm.weight",  LAYER(ln2),      VECTOR,  "D", 0, G4_OP_OTHER},
    {"post_feedforward_layernorm.weight", LAYER(ln2_post), VECTOR,  "D", 0, G4_OP_OTHER},
    {"self_attn.q_norm.weight",           LAYER(q_norm),   VECTOR,  "h", 0, G4_OP_OTHER},
    {"self_attn.k_norm.weight",           LAYER(k_norm),   VECTOR,  "h", 0, G4_OP_OTHER},
    {"self_attn.q_proj",                  LAYER(q),        CLIPPED, "Hh D", 0, G4_OP_QKV},
    {"self_attn.k_proj",                  LAYER(k),        CLIPPED, "Kh D", 0, G4_OP_QKV},
    {"self_attn.v_proj",                  LAYER(v),        CLIPPED, "Kh D", 0, G4_OP_QKV},
    {"self_attn.o_proj",                  LAYER(o),        CLIPPED, "D Hh", 0, G4_OP_O},
    {"mlp.gate_proj",                     LAYER(gate),     CLIPPED, "F D", 0, G4_OP_GATE_UP},
    {"mlp.up_proj",                       LAYER(up),       CLIPPED, "F D", 0, G4_OP_GATE_UP},
    {"mlp.down_proj",                     LAYER(down),     CLIPPED, "D F", 0, G4_OP_DOWN},
};
/* clang-format on */

#define COUNT(rows) ((int)(sizeof(rows) / sizeof *(rows)))

/* Copies the caller's frequencies. */
static g4_status finish(g4_encoder *encoder, g4_binder *b)
{
    g4_encoder_config *config = &encoder->config;
    const size_t n_bytes = (size_t)(config->head_dim / 4) * sizeof *config->rope_inv_freq;
    float *copy = g4_arena_alloc(b->arena, n_bytes + 1);
    if (!copy)
        return g4_fail_nomem(b->err, n_bytes);
    memcpy(copy, config->rope_inv_freq, n_bytes);
    config->rope_inv_freq = copy;
    return G4_OK;
}

static g4_status bind(g4_encoder *encoder, g4_binder *b)
{
    g4_vision_weights *w = &encoder->vision;
    char prefix[64];
    G4_TRY(g4_bind_table(b, tower_rows, COUNT(tower_rows), "", 0, w));
    if (encoder->config.standardize)
        G4_TRY(g4_bind_table(b, standardize_rows, COUNT(standardize_rows), "", 0, w));
    const size_t n_bytes = (size_t)encoder->config.n_layers * sizeof *w->layers;
    w->layers = g4_arena_alloc(b->arena, n_bytes);
    if (!w->layers)
        return g4_fail_nomem(b->err, n_bytes);
    memset(w->layers, 0, n_bytes);
    for (int layer = 0; layer < encoder->config.n_layers; layer++) {
        snprintf(prefix, sizeof prefix, "encoder.layers.%d.", layer);
        G4_TRY(g4_bind_table(b, layer_rows, COUNT(layer_rows), prefix, layer, &w->layers[layer]));
    }
    return G4_OK;
}

/* ---- the tower --------------------------------------------------------------------------------------------------- */

typedef struct {
    g4_encode_pass *pass;
    const g4_vision_weights *weights;
    float *resid;         /* [T, D] */
    float *cosine, *sine; /* [T, 2, h / 4] */
} tower;

static g4_status add_positions(tower *t)
{
    g4_encode_pass *p = t->pass;
    const size_t n = (size_t)p->n_rows * (size_t)p->config->d_model;
    float *x, *y;
    int32_t *ids;
    G4_ALLOC(&p->exec, x, n);
    G4_ALLOC(&p->exec, y, n);
    G4_ALLOC(&p->exec, ids, (size_t)p->n_rows);
    g4_encoder_positions(p, 0, 1, 0, ids);
    G4_TRY(g4_gather_rows(&p->exec, &t->weights->positions, ids, p->n_rows, 1.0f, x));
    g4_encoder_positions(p, 1, 1, p->config->n_positions, ids);
    G4_TRY(g4_gather_rows(&p->exec, &t->weights->positions, ids, p->n_rows, 1.0f, y));
    G4_TRY(g4_add_rows(&p->exec, x, y, p->n_rows, p->config->d_model, x));
    return g4_add_rows(&p->exec, t->resid, x, p->n_rows, p->config->d_model, t->resid);
}

static g4_status embed_patches(tower *t)
{
    g4_encode_pass *p = t->pass;
    const size_t width = (size_t)p->config->d_in;
    float *pixels, *at;
    G4_ALLOC(&p->exec, pixels, (size_t)p->n_rows * width);
    at = pixels;
    for (int m = 0; m < p->n_media; m++) {
        const g4_medium *image = &p->media[p->first_medium + m];
        for (size_t i = 0; i < (size_t)image->n_rows * width; i++)
            at[i] = 2 * (image->rows[i] - 0.5f);
        at += (size_t)image->n_rows * width;
    }
    G4_TRY(g4_panel_linear(&p->exec, pixels, p->n_rows, &t->weights->patch, t->resid));
    TAP(V_PATCH_EMBED, 0, t->resid);
    G4_TRY(add_positions(t));
    return g4_encoder_tap(p, G4_SITE_V_EMBED, 0, t->resid);
}

/* Rotary angles, x then y for each patch. */
static g4_status make_angles(tower *t)
{
    g4_encode_pass *p = t->pass;
    const int quarter = p->config->head_dim / 4;
    const size_t n = (size_t)p->n_rows * 2;
    int32_t *positions;
    G4_ALLOC(&p->exec, t->cosine, n * (size_t)quarter);
    G4_ALLOC(&p->exec, t->sine, n * (size_t)quarter);
    G4_ALLOC(&p->exec, positions, n);
    int32_t *at = positions;
    for (int m = 0; m < p->n_media; m++) {
        const g4_medium *image = &p->media[p->first_medium + m];
        memcpy(at, image->positions, (size_t)image->n_rows * 2 * sizeof *at);
        at += (size_t)image->n_rows * 2;
    }
    return g4_rope_table(&p->exec, positions, (int)n, p->config->rope_inv_freq, quarter, t->cosine, t->sine);
}

/* Norm of each head, then rotation; v has no gain and is not rotated. */
static g4_status finish_heads(tower *t, int layer, float *x, const float *gain, int n_heads, g4_site normed,
                              g4_site rotated)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    G4_TRY(g4_rms_norm(&p->exec, x, gain, p->n_rows * n_heads, c->head_dim, c->rms_norm_eps, x));
    G4_TRY(g4_encoder_tap(p, normed, layer, x));
    if (!gain)
        return G4_OK;
    G4_TRY(g4_rope_axes_rows(&p->exec, x, t->cosine, t->sine, p->n_rows, n_heads, c->head_dim / 4));
    return g4_encoder_tap(p, rotated, layer, x);
}

/* Computes scores, pattern and z as separate arrays, so that they can be tapped. */
static g4_status attend_in_steps(tower *t, int layer, int medium, const g4_full_attention *run)
{
    g4_encode_pass *p = t->pass;
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    float *scores;
    G4_ALLOC(&p->exec, scores, (size_t)run->n_heads * (size_t)run->n_rows * (size_t)run->n_rows);
    G4_TRY(g4_full_scores(&p->exec, run, scores));
    G4_TRY(g4_encoder_tap_one(p, G4_SITE_V_ATTN_SCORES, layer, medium, NULL, scores));
    G4_TRY(g4_full_pattern(&p->exec, run, scores));
    G4_TRY(g4_encoder_tap_one(p, G4_SITE_V_PATTERN, layer, medium, NULL, scores));
    G4_TRY(g4_full_mix(&p->exec, run, scores));
    g4_arena_restore(p->exec.arena, mark);
    return G4_OK;
}

static g4_status attend(tower *t, int layer, const float *q, const float *k, const float *v, float *z)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const size_t q_width = (size_t)c->n_heads * (size_t)c->head_dim,
                 kv_width = (size_t)c->n_kv_heads * (size_t)c->head_dim;
    const bool in_steps =
        g4_encoder_tapped(p, G4_SITE_V_ATTN_SCORES, layer) || g4_encoder_tapped(p, G4_SITE_V_PATTERN, layer);
    g4_full_attention *runs;
    size_t row = 0;
    G4_ALLOC(&p->exec, runs, (size_t)p->n_media);
    for (int m = 0; m < p->n_media; m++) {
        const int n = p->media[p->first_medium + m].n_rows;
        runs[m] = (g4_full_attention){q + row * q_width, k + row * kv_width, v + row * kv_width, z + row * q_width, n,
                                      c->n_heads,        c->n_kv_heads,      c->head_dim};
        row += (size_t)n;
        if (in_steps)
            G4_TRY(attend_in_steps(t, layer, m, &runs[m]));
    }
    if (!in_steps)
        G4_TRY(g4_attend_full(&p->exec, runs, p->n_media));
    return g4_encoder_tap(p, G4_SITE_V_Z, layer, z);
}

static g4_status attention(tower *t, int layer, float *out)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const g4_vision_layer *w = &t->weights->layers[layer];
    const size_t n = (size_t)p->n_rows;
    float *x, *q, *k, *v, *z;
    G4_ALLOC(&p->exec, x, n * (size_t)c->d_model);
    G4_ALLOC(&p->exec, q, n * w->q.w.n_rows);
    G4_ALLOC(&p->exec, k, n * w->k.w.n_rows);
    G4_ALLOC(&p->exec, v, n * w->v.w.n_rows);
    G4_ALLOC(&p->exec, z, n * w->q.w.n_rows);
    G4_TRY(g4_rms_norm(&p->exec, t->resid, w->ln1, p->n_rows, c->d_model, c->rms_norm_eps, x));
    TAP(V_LN1_OUT, layer, x);
    const g4_clipped *linears[] = {&w->q, &w->k, &w->v};
    float *outs[] = {q, k, v};
    G4_TRY(g4_clipped_jobs(&p->exec, x, p->n_rows, linears, outs, 3));
    TAP(V_Q, layer, q);
    TAP(V_K, layer, k);
    TAP(V_V, layer, v);
    G4_TRY(finish_heads(t, layer, q, w->q_norm, c->n_heads, G4_SITE_V_Q_NORMED, G4_SITE_V_ROT_Q));
    G4_TRY(finish_heads(t, layer, k, w->k_norm, c->n_kv_heads, G4_SITE_V_K_NORMED, G4_SITE_V_ROT_K));
    G4_TRY(finish_heads(t, layer, v, NULL, c->n_kv_heads, G4_SITE_V_V_NORMED, G4_N_SITES));
    G4_TRY(attend(t, layer, q, k, v, z));
    const g4_clipped *o[] = {&w->o};
    G4_TRY(g4_clipped_jobs(&p->exec, z, p->n_rows, o, &out, 1));
    TAP(V_ATTN_PROJ, layer, out);
    G4_TRY(g4_rms_norm(&p->exec, out, w->ln1_post, p->n_rows, c->d_model, c->rms_norm_eps, out));
    return g4_encoder_tap(p, G4_SITE_V_ATTN_OUT, layer, out);
}

/* out = W_down (gelu(W_gate x) * W_up x) for n rows. Announces sites only if these are all rows of the pass. */
static g4_status mlp_rows(tower *t, int layer, const float *x, int n, float *out)
{
    g4_encode_pass *p = t->pass;
    const g4_vision_layer *w = &t->weights->layers[layer];
    const int width = p->config->d_mlp;
    float *gate, *up;
    G4_ALLOC(&p->exec, gate, (size_t)n * (size_t)width);
    G4_ALLOC(&p->exec, up, (size_t)n * (size_t)width);
    const g4_clipped *linears[] = {&w->gate, &w->up}, *down[] = {&w->down};
    float *outs[] = {gate, up};
    G4_TRY(g4_clipped_jobs(&p->exec, x, n, linears, outs, 2));
    if (n == p->n_rows) {
        TAP(V_MLP_PRE, layer, gate);
        TAP(V_MLP_PRE_LINEAR, layer, up);
    }
    G4_TRY(g4_gelu_mul_rows(&p->exec, gate, up, n, width, gate));
    if (n == p->n_rows)
        TAP(V_MLP_POST, layer, gate);
    return g4_clipped_jobs(&p->exec, gate, n, down, &out, 1);
}

static bool mlp_tapped(const g4_encode_pass *p, int layer)
{
    return g4_encoder_tapped(p, G4_SITE_V_MLP_PRE, layer) || g4_encoder_tapped(p, G4_SITE_V_MLP_PRE_LINEAR, layer) ||
           g4_encoder_tapped(p, G4_SITE_V_MLP_POST, layer);
}

static g4_status mlp(tower *t, int layer, float *out)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const g4_vision_layer *w = &t->weights->layers[layer];
    const size_t d = (size_t)c->d_model;
    const int slice = mlp_tapped(p, layer) ? p->n_rows : MLP_ROWS;
    float *x;
    G4_ALLOC(&p->exec, x, (size_t)p->n_rows * d);
    G4_TRY(g4_rms_norm(&p->exec, t->resid, w->ln2, p->n_rows, c->d_model, c->rms_norm_eps, x));
    TAP(V_MLP_IN, layer, x);
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    for (int row = 0; row < p->n_rows; row += slice) {
        const int n = p->n_rows - row < slice ? p->n_rows - row : slice;
        G4_TRY(mlp_rows(t, layer, x + (size_t)row * d, n, out + (size_t)row * d));
        g4_arena_restore(p->exec.arena, mark);
    }
    TAP(V_MLP_PROJ, layer, out);
    G4_TRY(g4_rms_norm(&p->exec, out, w->ln2_post, p->n_rows, c->d_model, c->rms_norm_eps, out));
    return g4_encoder_tap(p, G4_SITE_V_MLP_OUT, layer, out);
}

static g4_status tower_layer(tower *t, int layer)
{
    g4_encode_pass *p = t->pass;
    const int d = p->config->d_model;
    float *branch;
    G4_ALLOC(&p->exec, branch, (size_t)p->n_rows * (size_t)d);
    TAP(V_RESID_PRE, layer, t->resid);
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    G4_TRY(attention(t, layer, branch));
    g4_arena_restore(p->exec.arena, mark);
    G4_TRY(g4_add_rows(&p->exec, t->resid, branch, p->n_rows, d, t->resid));
    TAP(V_RESID_MID, layer, t->resid);
    G4_TRY(mlp(t, layer, branch));
    G4_TRY(g4_add_rows(&p->exec, t->resid, branch, p->n_rows, d, t->resid));
    return g4_encoder_tap(p, G4_SITE_V_RESID_POST, layer, t->resid);
}

/* ---- soft tokens ------------------------------------------------------------------------------------------------- */

/* Average-pools pool x pool patches per soft token; soft tokens in row-major order. */
static g4_status pool_image(g4_encode_pass *p, int index, const float *x, float *soft)
{
    const g4_encoder_config *c = p->config;
    const g4_medium *image = &p->media[index];
    const int n_soft = g4_encoder_soft_tokens(c, image->n_rows), d = c->d_model;
    int width = 0;
    for (int i = 0; i < image->n_rows; i++)
        width = image->positions[2 * i] >= width ? image->positions[2 * i] + 1 : width;
    memset(soft, 0, (size_t)n_soft * (size_t)d * sizeof *soft);
    for (int i = 0; i < image->n_rows; i++) {
        const int x_at = image->positions[2 * i] / c->pool, y_at = image->positions[2 * i + 1] / c->pool;
        const int64_t at = x_at + (int64_t)y_at * (width / c->pool);
        if (at >= n_soft)
            return g4_fail(p->exec.err, G4_EVALUE,
                           "image %d: the patch at %d, %d falls into soft token %lld of %d; expected a whole grid "
                           "whose sides are multiples of %d patches",
                           index, image->positions[2 * i], image->positions[2 * i + 1], (long long)at, n_soft, c->pool);
        p->exec.kernels->axpy(soft + (size_t)at * (size_t)d, 1.0f / (float)(c->pool * c->pool),
                              x + (size_t)i * (size_t)d, d);
    }
    return G4_OK;
}

static g4_status make_soft(tower *t, float *soft)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const size_t d = (size_t)c->d_model;
    const float *x = t->resid;
    float *at = soft;
    for (int m = 0; m < p->n_media; m++) {
        const int index = p->first_medium + m, n_rows = p->media[index].n_rows;
        G4_TRY(pool_image(p, index, x, at));
        x += (size_t)n_rows * d;
        at += (size_t)g4_encoder_soft_tokens(c, n_rows) * d;
    }
    G4_TRY(g4_scale_rows(&p->exec, soft, (float)sqrt((double)c->d_model), NULL, p->n_soft, c->d_model, soft));
    TAP(V_POOLED, 0, soft);
    for (size_t i = 0; c->standardize && i < (size_t)p->n_soft; i++)
        for (size_t j = 0; j < d; j++)
            soft[i * d + j] = (soft[i * d + j] - t->weights->std_bias[j]) * t->weights->std_scale[j];
    return G4_OK;
}

static g4_status encode(g4_encode_pass *p)
{
    tower t = {.pass = p, .weights = &p->encoder->vision};
    const size_t d = (size_t)p->config->d_model;
    float *soft;
    G4_ALLOC(&p->exec, t.resid, (size_t)p->n_rows * d);
    G4_ALLOC(&p->exec, soft, (size_t)p->n_soft * d);
    G4_TRY(make_angles(&t));
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    G4_TRY(embed_patches(&t));
    g4_arena_restore(p->exec.arena, mark);
    for (int layer = 0; layer < p->config->n_layers; layer++) {
        if (g4_exec_poll(&p->exec))
            return g4_fail(p->exec.err, G4_ECANCELLED, "cancelled");
        G4_TRY(tower_layer(&t, layer));
        g4_arena_restore(p->exec.arena, mark);
    }
    G4_TRY(make_soft(&t, soft));
    return g4_encoder_project(p, &g4_vision_soft_sites, soft);
}

const g4_kind_row g4_vision_tower = {.positions = true,
                                     .check = check,
                                     .axis = g4_encoder_axis,
                                     .soft_tokens = soft_tokens,
                                     .bind = bind,
                                     .finish = finish,
                                     .encode = encode};
