/* SPDX-License-Identifier: Apache-2.0 */
/* The audio tower, from a log-mel spectrogram to soft tokens. Ref: transformers models/gemma4 Gemma4AudioModel.
 *
 *   x     = W conv(conv(mel))                      each relu(norm(3 x 3, stride 2)): 1/4 of the frames
 *   layer:  x += 0.5 mlp(x)                        mlp = norm(W silu(W norm(x)))
 *           x += norm(attention(norm(x)))          12 frames, one vector per distance, softcapped scores
 *           x += W silu(norm(conv(glu(W norm(x)))))  depthwise conv over 5 frames
 *           x  = norm(x + 0.5 mlp(x))
 *   soft  = W x + b
 *   out   = W norm(soft)
 * Values are clamped to ± gradient_clipping where the reference does.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/encoders/encoder.h"
#include "ops/attention/band.h"
#include "ops/conv.h"
#include "ops/linear_f32.h"
#include "ops/rows.h"

#define TAP(site, layer, data) G4_TRY(g4_encoder_tap(p, G4_SITE_##site, layer, data))

static const float EPS = 1e-6f; /* of all norms except those of the convolutions; the config's eps does not apply */

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

static g4_status check(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(g4_encoder_check_layers(c, err));
    G4_TRY(g4_encoder_check_range("d_in", c->d_in, 1, 1 << 12, err)); /* frames times bins fit an int */
    G4_TRY(g4_encoder_check_range("conv_channels[0]", c->conv_channels[0], 1, 1 << 12, err));
    G4_TRY(g4_encoder_check_range("conv_channels[1]", c->conv_channels[1], 1, 1 << 12, err));
    G4_TRY(g4_encoder_check_range("conv_kernel", c->conv_kernel, 1, 1 << 8, err));
    G4_TRY(g4_encoder_check_range("chunk", c->chunk, 1, 1 << 8, err));
    G4_TRY(g4_encoder_check_range("context_left", c->context_left, 2, 1 << 8, err));
    G4_TRY(g4_encoder_check_range("context_right", c->context_right, 0, 1 << 8, err));
    if (c->n_heads * c->head_dim != c->d_model || c->d_model % 2 || c->n_kv_heads != c->n_heads)
        return g4_fail(err, G4_EVALUE, "encoder config: %d heads of %d do not make a d_model of %d, or it is odd",
                       c->n_heads, c->head_dim, c->d_model);
    if (!(c->logit_cap > 0) || !(c->gradient_clipping > 0) || !isfinite(c->residual_weight))
        return g4_fail(err, G4_EVALUE, "encoder config: logit_cap %g, gradient_clipping %g or residual_weight %g",
                       (double)c->logit_cap, (double)c->gradient_clipping, (double)c->residual_weight);
    return G4_OK;
}

/* Output length of a 3-tap, stride-2 convolution over n values, padded by 1 on each side. */
static int halved(int n)
{
    return (n + 1) / 2;
}

static int soft_tokens(const g4_encoder_config *c, int n_rows)
{
    (void)c;
    return halved(halved(n_rows));
}

static int64_t axis(const g4_encoder_config *c, char letter, int n_rows)
{
    switch (letter) {
    case 'T':
    case 'S': return soft_tokens(c, n_rows);
    case 'U': return halved(n_rows);
    case 'B': return halved(c->d_in);
    case 'b': return halved(halved(c->d_in));
    case 'C': return c->conv_channels[0];
    case 'c': return c->conv_channels[1];
    case 's': return c->conv_kernel;
    default: return g4_encoder_axis(c, letter, n_rows);
    }
}

/* ---- weights ----------------------------------------------------------------------------------------------------- */

#define TOWER(member) offsetof(g4_audio_weights, member)
#define LAYER(member) offsetof(g4_audio_layer, member)
#define MATRIX G4_BIND_MATRIX
#define VECTOR G4_BIND_VECTOR
#define CLIPPED G4_BIND_CLIPPED

/* clang-format off */
static const g4_bind_row tower_rows[] = {
    {"subsample_conv_projection.layer0.conv.weight",      TOWER(conv[0]),      VECTOR, "C 1 3 3", 0, G4_OP_OTHER},
    {"subsample_conv_projection.layer0.norm.weight",      TOWER(conv_norm[0]), VECTOR, "C",       0, G4_OP_OTHER},
    {"subsample_conv_projection.layer1.conv.weight",      TOWER(conv[1]),      VECTOR, "c C 3 3", 0, G4_OP_OTHER},
    {"subsample_conv_projection.layer1.norm.weight",      TOWER(conv_norm[1]), VECTOR, "c",       0, G4_OP_OTHER},
    {"subsample_conv_projection.input_proj_linear.weight", TOWER(input),       MATRIX, "D bc",    0, G4_OP_INPUT},
    {"output_proj.weight",                                TOWER(output),       MATRIX, "I D",     0, G4_OP_PROJECTION},
    {"output_proj.bias",                                  TOWER(output_bias),  VECTOR, "I",       0, G4_OP_OTHER},
};

static const g4_bind_row layer_rows[] = {
    {"feed_forward1.ffw_layer_1",            LAYER(mlp1.up),       CLIPPED, "F D",   0, G4_OP_GATE_UP},
    {"feed_forward1.ffw_layer_2",            LAYER(mlp1.down),     CLIPPED, "D F",   0, G4_OP_DOWN},
    {"feed_forward1.pre_layer_norm.weight",  LAYER(mlp1.pre),      VECTOR,  "D",     0, G4_OP_OTHER},
    {"feed_forward1.post_layer_norm.weight", LAYER(mlp1.post),     VECTOR,  "D",     0, G4_OP_OTHER},
    {"feed_forward2.ffw_layer_1",            LAYER(mlp2.up),       CLIPPED, "F D",   0, G4_OP_GATE_UP},
    {"feed_forward2.ffw_layer_2",            LAYER(mlp2.down),     CLIPPED, "D F",   0, G4_OP_DOWN},
    {"feed_forward2.pre_layer_norm.weight",  LAYER(mlp2.pre),      VECTOR,  "D",     0, G4_OP_OTHER},
    {"feed_forward2.post_layer_norm.weight", LAYER(mlp2.post),     VECTOR,  "D",     0, G4_OP_OTHER},
    {"norm_pre_attn.weight",                 LAYER(ln1),           VECTOR,  "D",     0, G4_OP_OTHER},
    {"norm_post_attn.weight",                LAYER(ln1_post),      VECTOR,  "D",     0, G4_OP_OTHER},
    {"norm_out.weight",                      LAYER(out_norm),      VECTOR,  "D",     0, G4_OP_OTHER},
    {"lconv1d.pre_layer_norm.weight",        LAYER(conv_pre),      VECTOR,  "D",     0, G4_OP_OTHER},
    {"lconv1d.conv_norm.weight",             LAYER(conv_norm),     VECTOR,  "D",     0, G4_OP_OTHER},
    {"self_attn.q_proj",                     LAYER(q),             CLIPPED, "Hh D",  0, G4_OP_QKV},
    {"self_attn.k_proj",                     LAYER(k),             CLIPPED, "Hh D",  0, G4_OP_QKV},
    {"self_attn.v_proj",                     LAYER(v),             CLIPPED, "Hh D",  0, G4_OP_QKV},
    {"self_attn.post",                       LAYER(post),          CLIPPED, "D Hh",  0, G4_OP_O},
    {"self_attn.relative_k_proj.weight",     LAYER(relative_k),    MATRIX,  "Hh D",  0, G4_OP_O},
    {"self_attn.per_dim_scale",              LAYER(per_dim_scale), VECTOR,  "h",     0, G4_OP_OTHER},
    {"lconv1d.linear_start",                 LAYER(conv_start),    CLIPPED, "2D D",  0, G4_OP_CONV},
    {"lconv1d.linear_end",                   LAYER(conv_end),      CLIPPED, "D D",   0, G4_OP_CONV},
    {"lconv1d.depthwise_conv1d.weight",      LAYER(depthwise),     VECTOR,  "D 1 s", 0, G4_OP_OTHER},
};
/* clang-format on */

#define COUNT(rows) ((int)(sizeof(rows) / sizeof *(rows)))

/* Transposes x [outer, rows, columns] to [outer, columns, rows] in the binder's arena; NULL and *err: out of memory. */
static float *transposed(g4_binder *b, const float *x, size_t outer, size_t rows, size_t columns)
{
    float *out = g4_arena_alloc(b->arena, outer * rows * columns * sizeof *out);
    if (!out) {
        g4_fail_nomem(b->err, outer * rows * columns * sizeof *out);
        return NULL;
    }
    for (size_t o = 0; o < outer; o++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++)
                out[(o * columns + j) * rows + i] = x[(o * rows + i) * columns + j];
    return out;
}

/* Transposes the stored [C, I, 3, 3] to [C, 3, 3, I], for g4_conv_3x3. */
static g4_status make_conv_matrices(g4_binder *b, const g4_encoder_config *c, g4_audio_weights *w)
{
    for (int i = 0; i < 2; i++) {
        const size_t inputs = i ? (size_t)c->conv_channels[0] : 1, outputs = (size_t)c->conv_channels[i];
        const float *matrix = transposed(b, w->conv[i], outputs, inputs, 9);
        if (!matrix)
            return G4_ENOMEM;
        w->conv_matrices[i] = (g4_matrix){matrix, G4_F32, outputs, 9 * inputs, 9 * inputs, G4_OP_INPUT};
    }
    return G4_OK;
}

/* Sinusoids of each distance, from the farthest to 0. Ref: Gemma4AudioRelPositionalEncoding. */
static g4_status make_distances(g4_binder *b, const g4_encoder_config *c, g4_audio_weights *w)
{
    const int context = c->chunk + c->context_left - 1 + c->context_right, half = c->d_model / 2;
    const float increment = (float)(log(10000.0) / (half > 1 ? half - 1 : 1));
    w->n_distances = context / 2 + 1;
    if (c->chunk - 1 + context / 2 >= context)
        return g4_fail(b->err, G4_EUNSUPPORTED,
                       "audio attention in chunks of %d with %d frames before and %d after: the reference's relative "
                       "positions overlap",
                       c->chunk, c->context_left, c->context_right);
    const size_t n_bytes = (size_t)w->n_distances * (size_t)c->d_model * sizeof *w->distances;
    w->distances = g4_arena_alloc(b->arena, n_bytes);
    if (!w->distances)
        return g4_fail_nomem(b->err, n_bytes);
    for (int i = 0; i < w->n_distances; i++) {
        float *row = w->distances + (size_t)i * (size_t)c->d_model;
        for (int j = 0; j < half; j++) {
            const float scale = (float)exp((double)((float)j * -increment)),
                        angle = (float)(w->n_distances - 1 - i) * scale;
            row[j] = (float)sin((double)angle);
            row[half + j] = (float)cos((double)angle);
        }
    }
    return G4_OK;
}

/* Replaces per_dim_scale by the factors of q: head_dim^-1/2 / ln 2 * softplus(scale). */
static g4_status make_q_factors(g4_binder *b, const g4_encoder_config *c, g4_audio_layer *layer)
{
    float *factors = g4_arena_alloc(b->arena, (size_t)c->head_dim * sizeof *factors);
    if (!factors)
        return g4_fail_nomem(b->err, (size_t)c->head_dim * sizeof *factors);
    for (int i = 0; i < c->head_dim; i++) {
        const double x = (double)layer->per_dim_scale[i], softplus = x > 20 ? x : log1p(exp(x));
        factors[i] = (float)(softplus / sqrt((double)c->head_dim) / log(2.0));
    }
    layer->per_dim_scale = factors;
    return G4_OK;
}

static g4_status bind(g4_encoder *encoder, g4_binder *b)
{
    const g4_encoder_config *c = &encoder->config;
    g4_audio_weights *w = &encoder->audio;
    char prefix[64];
    G4_TRY(g4_bind_table(b, tower_rows, COUNT(tower_rows), "", 0, w));
    const size_t n_bytes = (size_t)c->n_layers * sizeof *w->layers;
    w->layers = g4_arena_alloc(b->arena, n_bytes);
    if (!w->layers)
        return g4_fail_nomem(b->err, n_bytes);
    memset(w->layers, 0, n_bytes);
    for (int layer = 0; layer < c->n_layers; layer++) {
        snprintf(prefix, sizeof prefix, "layers.%d.", layer);
        G4_TRY(g4_bind_table(b, layer_rows, COUNT(layer_rows), prefix, layer, &w->layers[layer]));
    }
    return G4_OK;
}

static g4_status finish(g4_encoder *encoder, g4_binder *b)
{
    const g4_encoder_config *c = &encoder->config;
    g4_audio_weights *w = &encoder->audio;
    G4_TRY(make_conv_matrices(b, c, w));
    G4_TRY(make_distances(b, c, w));
    for (int layer = 0; layer < c->n_layers; layer++) {
        G4_TRY(make_q_factors(b, c, &w->layers[layer]));
        w->layers[layer].depthwise =
            transposed(b, w->layers[layer].depthwise, 1, (size_t)c->d_model, (size_t)c->conv_kernel);
        if (!w->layers[layer].depthwise)
            return G4_ENOMEM;
    }
    return G4_OK;
}

/* ---- the convolutions -------------------------------------------------------------------------------------------- */

typedef struct {
    g4_encode_pass *pass;
    const g4_audio_weights *weights;
    float *resid; /* [T, D], T = soft tokens of the pass */
} tower;

static g4_status finish_conv(g4_encode_pass *p, const float *gain, int n_rows, int channels, g4_site site, int medium,
                             float *x)
{
    G4_TRY(g4_layer_norm_rows(&p->exec, x, gain, NULL, p->config->rms_norm_eps, n_rows, channels, x));
    G4_TRY(g4_clamp_rows(&p->exec, x, 0, INFINITY, n_rows, channels, x));
    return g4_encoder_tap_one(p, site, 0, medium, NULL, x);
}

/* Both convolutions over one medium's frames, to x [T of the medium, b * c]. */
static g4_status convolve(tower *t, int medium, float *x)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const g4_medium *audio = &p->media[p->first_medium + medium];
    const int frames = halved(audio->n_rows), bins = halved(c->d_in), channels = c->conv_channels[0];
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    float *between;
    G4_ALLOC(&p->exec, between, (size_t)frames * (size_t)bins * (size_t)channels);
    G4_TRY(g4_conv_3x3(&p->exec, audio->rows, audio->n_rows, c->d_in, 1, &t->weights->conv_matrices[0], between));
    G4_TRY(finish_conv(p, t->weights->conv_norm[0], frames * bins, channels, G4_SITE_A_CONV0, medium, between));
    G4_TRY(g4_conv_3x3(&p->exec, between, frames, bins, channels, &t->weights->conv_matrices[1], x));
    G4_TRY(finish_conv(p, t->weights->conv_norm[1], halved(frames) * halved(bins), c->conv_channels[1], G4_SITE_A_CONV1,
                       medium, x));
    g4_arena_restore(p->exec.arena, mark);
    return G4_OK;
}

static g4_status embed_frames(tower *t)
{
    g4_encode_pass *p = t->pass;
    const size_t width = t->weights->input.n_cols;
    float *x, *at;
    G4_ALLOC(&p->exec, x, (size_t)p->n_soft * width);
    at = x;
    for (int m = 0; m < p->n_media; m++) {
        G4_TRY(convolve(t, m, at));
        at += (size_t)soft_tokens(p->config, p->media[p->first_medium + m].n_rows) * width;
    }
    G4_TRY(g4_panel_linear(&p->exec, x, p->n_soft, &t->weights->input, t->resid));
    return g4_encoder_tap(p, G4_SITE_A_EMBED, 0, t->resid);
}

/* ---- a layer ----------------------------------------------------------------------------------------------------- */

static g4_status limit(g4_encode_pass *p, const float *x, float *out)
{
    const float most = p->config->gradient_clipping < FLT_MAX ? p->config->gradient_clipping : FLT_MAX;
    return g4_clamp_rows(&p->exec, x, -most, most, p->n_soft, p->config->d_model, out);
}

static g4_status norm(g4_encode_pass *p, const float *x, const float *gain, float eps, float *out)
{
    return g4_rms_norm(&p->exec, x, gain, p->n_soft, p->config->d_model, eps, out);
}

static g4_status clipped(g4_encode_pass *p, const float *x, const g4_clipped *linear, float *out)
{
    return g4_clipped_jobs(&p->exec, x, p->n_soft, &linear, &out, 1);
}

static g4_status add_to_residual(tower *t, const float *branch)
{
    return g4_add_rows(&t->pass->exec, t->resid, branch, t->pass->n_soft, t->pass->config->d_model, t->resid);
}

typedef struct {
    g4_site in, pre, post, proj, out, resid;
} mlp_sites;

static const mlp_sites mlp1_sites = {G4_SITE_A_FFN1_IN,   G4_SITE_A_FFN1_PRE, G4_SITE_A_FFN1_POST,
                                     G4_SITE_A_FFN1_PROJ, G4_SITE_A_FFN1_OUT, G4_SITE_A_RESID_MLP1},
                       mlp2_sites = {G4_SITE_A_FFN2_IN,   G4_SITE_A_FFN2_PRE, G4_SITE_A_FFN2_POST,
                                     G4_SITE_A_FFN2_PROJ, G4_SITE_A_FFN2_OUT, G4_SITE_A_RESID_MLP2};

static g4_status mlp(tower *t, int layer, const g4_audio_mlp *w, const mlp_sites *sites)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    float *x, *inner;
    G4_ALLOC(&p->exec, x, (size_t)p->n_soft * (size_t)c->d_model);
    G4_ALLOC(&p->exec, inner, (size_t)p->n_soft * (size_t)c->d_mlp);
    G4_TRY(limit(p, t->resid, x));
    G4_TRY(norm(p, x, w->pre, EPS, x));
    G4_TRY(g4_encoder_tap(p, sites->in, layer, x));
    G4_TRY(clipped(p, x, &w->up, inner));
    G4_TRY(g4_encoder_tap(p, sites->pre, layer, inner));
    G4_TRY(g4_glu_rows(&p->exec, inner, inner, (size_t)c->d_mlp, p->n_soft, c->d_mlp, inner));
    G4_TRY(g4_encoder_tap(p, sites->post, layer, inner));
    G4_TRY(clipped(p, inner, &w->down, x));
    G4_TRY(g4_encoder_tap(p, sites->proj, layer, x));
    G4_TRY(limit(p, x, x));
    G4_TRY(norm(p, x, w->post, EPS, x));
    G4_TRY(g4_scale_rows(&p->exec, x, c->residual_weight, NULL, p->n_soft, c->d_model, x));
    G4_TRY(g4_encoder_tap(p, sites->out, layer, x));
    G4_TRY(add_to_residual(t, x));
    return g4_encoder_tap(p, sites->resid, layer, t->resid);
}

static void visible_frames(const void *context, int row, int *first, int *end)
{
    const g4_band_attention *run = context;
    *first = g4_band_first_key(run, row);
    *end = g4_band_end_key(run, row);
}

/* Computes scores, pattern and z as separate arrays, so that they can be tapped. */
static g4_status attend_in_steps(g4_encode_pass *p, int layer, int medium, const g4_band_attention *run)
{
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    const g4_visible visible = {visible_frames, run};
    float *scores;
    G4_ALLOC(&p->exec, scores, (size_t)run->n_heads * (size_t)run->n_rows * (size_t)run->n_rows);
    G4_TRY(g4_band_scores(&p->exec, run, scores));
    G4_TRY(g4_encoder_tap_one(p, G4_SITE_A_ATTN_SCORES, layer, medium, &visible, scores));
    G4_TRY(g4_band_pattern(&p->exec, run, scores));
    G4_TRY(g4_encoder_tap_one(p, G4_SITE_A_PATTERN, layer, medium, &visible, scores));
    G4_TRY(g4_band_mix(&p->exec, run, scores));
    g4_arena_restore(p->exec.arena, mark);
    return G4_OK;
}

static g4_status attend(tower *t, int layer, const float *q, const float *k, const float *v, float *z)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const size_t d = (size_t)c->d_model;
    const bool in_steps =
        g4_encoder_tapped(p, G4_SITE_A_ATTN_SCORES, layer) || g4_encoder_tapped(p, G4_SITE_A_PATTERN, layer);
    float *distances;
    G4_ALLOC(&p->exec, distances, (size_t)t->weights->n_distances * d);
    G4_TRY(g4_panel_linear(&p->exec, t->weights->distances, t->weights->n_distances,
                           &t->weights->layers[layer].relative_k, distances));
    size_t row = 0;
    for (int m = 0; m < p->n_media; m++) {
        const int n = soft_tokens(c, p->media[p->first_medium + m].n_rows);
        g4_band_attention run = {.q = q + row * d,
                                 .k = k + row * d,
                                 .v = v + row * d,
                                 .distances = distances,
                                 .z = z + row * d,
                                 .n_rows = n,
                                 .n_heads = c->n_heads,
                                 .head_dim = c->head_dim,
                                 .n_distances = t->weights->n_distances,
                                 .past = c->context_left - 1,
                                 .future = c->context_right,
                                 .cap = c->logit_cap};
        row += (size_t)n;
        G4_TRY(in_steps ? attend_in_steps(p, layer, m, &run) : g4_attend_band(&p->exec, &run));
    }
    return g4_encoder_tap(p, G4_SITE_A_Z, layer, z);
}

static g4_status attention(tower *t, int layer)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const g4_audio_layer *w = &t->weights->layers[layer];
    const size_t n = (size_t)p->n_soft * (size_t)c->d_model;
    const int n_heads = p->n_soft * c->n_heads;
    float *x, *q, *k, *v, *z;
    G4_ALLOC(&p->exec, x, n);
    G4_ALLOC(&p->exec, q, n);
    G4_ALLOC(&p->exec, k, n);
    G4_ALLOC(&p->exec, v, n);
    G4_ALLOC(&p->exec, z, n);
    G4_TRY(limit(p, t->resid, x));
    G4_TRY(norm(p, x, w->ln1, EPS, x));
    TAP(A_LN1_OUT, layer, x);
    const g4_clipped *linears[] = {&w->q, &w->k, &w->v};
    float *outs[] = {q, k, v};
    G4_TRY(g4_clipped_jobs(&p->exec, x, p->n_soft, linears, outs, 3));
    TAP(A_Q, layer, q);
    TAP(A_K, layer, k);
    TAP(A_V, layer, v);
    G4_TRY(g4_scale_rows(&p->exec, q, 1.0f, w->per_dim_scale, n_heads, c->head_dim, q));
    G4_TRY(g4_scale_rows(&p->exec, k, (float)(log(1 + exp(1.0)) / log(2.0)), NULL, n_heads, c->head_dim, k));
    G4_TRY(attend(t, layer, q, k, v, z));
    G4_TRY(clipped(p, z, &w->post, x));
    TAP(A_ATTN_PROJ, layer, x);
    G4_TRY(limit(p, x, x));
    G4_TRY(norm(p, x, w->ln1_post, EPS, x));
    TAP(A_ATTN_OUT, layer, x);
    G4_TRY(add_to_residual(t, x));
    return g4_encoder_tap(p, G4_SITE_A_RESID_MID, layer, t->resid);
}

static g4_status light_conv(tower *t, int layer)
{
    g4_encode_pass *p = t->pass;
    const g4_encoder_config *c = p->config;
    const g4_audio_layer *w = &t->weights->layers[layer];
    const size_t d = (size_t)c->d_model, n = (size_t)p->n_soft * d;
    float *x, *wide, *y;
    G4_ALLOC(&p->exec, x, n);
    G4_ALLOC(&p->exec, wide, 2 * n);
    G4_ALLOC(&p->exec, y, n);
    G4_TRY(norm(p, t->resid, w->conv_pre, c->rms_norm_eps, x));
    TAP(A_CONV_IN, layer, x);
    G4_TRY(clipped(p, x, &w->conv_start, wide));
    G4_TRY(g4_glu_rows(&p->exec, wide, wide + d, 2 * d, p->n_soft, c->d_model, x));
    TAP(A_CONV_GLU, layer, x);
    size_t row = 0;
    for (int m = 0; m < p->n_media; m++) {
        const int n_rows = soft_tokens(c, p->media[p->first_medium + m].n_rows);
        G4_TRY(g4_conv_depthwise(&p->exec, x + row * d, w->depthwise, c->conv_kernel, n_rows, c->d_model, y + row * d));
        row += (size_t)n_rows;
    }
    TAP(A_CONV_DEPTHWISE, layer, y);
    G4_TRY(limit(p, y, y));
    G4_TRY(norm(p, y, w->conv_norm, c->rms_norm_eps, y));
    G4_TRY(g4_glu_rows(&p->exec, y, y, d, p->n_soft, c->d_model, y));
    TAP(A_CONV_POST, layer, y);
    G4_TRY(clipped(p, y, &w->conv_end, x));
    TAP(A_CONV_OUT, layer, x);
    G4_TRY(add_to_residual(t, x));
    return g4_encoder_tap(p, G4_SITE_A_RESID_CONV, layer, t->resid);
}

static g4_status tower_layer(tower *t, int layer)
{
    g4_encode_pass *p = t->pass;
    const g4_audio_layer *w = &t->weights->layers[layer];
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    TAP(A_RESID_PRE, layer, t->resid);
    G4_TRY(mlp(t, layer, &w->mlp1, &mlp1_sites));
    g4_arena_restore(p->exec.arena, mark);
    G4_TRY(attention(t, layer));
    g4_arena_restore(p->exec.arena, mark);
    G4_TRY(light_conv(t, layer));
    g4_arena_restore(p->exec.arena, mark);
    G4_TRY(mlp(t, layer, &w->mlp2, &mlp2_sites));
    g4_arena_restore(p->exec.arena, mark);
    G4_TRY(limit(p, t->resid, t->resid));
    G4_TRY(norm(p, t->resid, w->out_norm, EPS, t->resid));
    return g4_encoder_tap(p, G4_SITE_A_RESID_POST, layer, t->resid);
}

static g4_status encode(g4_encode_pass *p)
{
    tower t = {.pass = p, .weights = &p->encoder->audio};
    float *soft;
    G4_ALLOC(&p->exec, t.resid, (size_t)p->n_soft * (size_t)p->config->d_model);
    G4_ALLOC(&p->exec, soft, (size_t)p->n_soft * (size_t)p->config->d_soft);
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    G4_TRY(embed_frames(&t));
    g4_arena_restore(p->exec.arena, mark);
    for (int layer = 0; layer < p->config->n_layers; layer++) {
        if (g4_exec_poll(&p->exec))
            return g4_fail(p->exec.err, G4_ECANCELLED, "cancelled");
        G4_TRY(tower_layer(&t, layer));
    }
    G4_TRY(g4_panel_linear(&p->exec, t.resid, p->n_soft, &t.weights->output, soft));
    for (int row = 0; row < p->n_soft; row++) {
        float *at = soft + (size_t)row * (size_t)p->config->d_soft;
        p->exec.kernels->add(at, at, t.weights->output_bias, p->config->d_soft);
    }
    return g4_encoder_project(p, &g4_audio_soft_sites, soft);
}

const g4_kind_row g4_audio_tower = {
    .check = check, .axis = axis, .soft_tokens = soft_tokens, .bind = bind, .finish = finish, .encode = encode};
