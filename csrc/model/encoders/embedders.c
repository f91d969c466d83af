/* SPDX-License-Identifier: Apache-2.0 */
/* The unified model's image and audio embedders, without a tower. Ref: transformers models/gemma4_unified
 * Gemma4UnifiedVisionEmbedder, Gemma4UnifiedMultimodalEmbedder.
 *
 *   image: soft = norm(norm(W norm(p) + b) + table[px][0] + table[py][1])     layer norms with gain and bias
 *   audio: soft = samples
 *   out = W norm(soft)
 */
#include <string.h>

#include "model/encoders/encoder.h"
#include "ops/linear_f32.h"
#include "ops/rows.h"

#define TAP(site, data) G4_TRY(g4_encoder_tap(p, G4_SITE_##site, 0, data))
#define MEMBER(member) offsetof(g4_embedder_weights, member)

static const float LAYER_NORM_EPS = 1e-5f; /* as torch.nn.LayerNorm; the config's eps is for the final norm */

/* clang-format off */
static const g4_bind_row rows[] = {
    {"patch_dense.weight", MEMBER(dense),         G4_BIND_MATRIX, "D X",   0, G4_OP_INPUT},
    {"patch_dense.bias",   MEMBER(dense_bias),    G4_BIND_VECTOR, "D",     0, G4_OP_OTHER},
    {"pos_embedding",      MEMBER(positions),     G4_BIND_MATRIX, "P 2 D", 0, G4_OP_EMBED},
    {"patch_ln1.weight",   MEMBER(ln1),           G4_BIND_VECTOR, "X",     0, G4_OP_OTHER},
    {"patch_ln1.bias",     MEMBER(ln1_bias),      G4_BIND_VECTOR, "X",     0, G4_OP_OTHER},
    {"patch_ln2.weight",   MEMBER(ln2),           G4_BIND_VECTOR, "D",     0, G4_OP_OTHER},
    {"patch_ln2.bias",     MEMBER(ln2_bias),      G4_BIND_VECTOR, "D",     0, G4_OP_OTHER},
    {"pos_norm.weight",    MEMBER(pos_norm),      G4_BIND_VECTOR, "D",     0, G4_OP_OTHER},
    {"pos_norm.bias",      MEMBER(pos_norm_bias), G4_BIND_VECTOR, "D",     0, G4_OP_OTHER},
};
/* clang-format on */

static g4_status check_image(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(g4_encoder_check_range("d_model", c->d_model, 1, 1 << 16, err));
    G4_TRY(g4_encoder_check_range("d_soft", c->d_soft, c->d_model, c->d_model, err));
    return g4_encoder_check_range("n_positions", c->n_positions, 1, 1 << 20, err);
}

static g4_status check_audio(const g4_encoder_config *c, g4_error *err)
{
    return g4_encoder_check_range("d_soft", c->d_soft, c->d_in, c->d_in, err);
}

/* One soft token per row. */
static int soft_tokens(const g4_encoder_config *c, int n_rows)
{
    (void)c;
    return n_rows;
}

static g4_status bind(g4_encoder *encoder, g4_binder *b)
{
    return g4_bind_table(b, rows, (int)(sizeof rows / sizeof *rows), "", 0, &encoder->embedder);
}

/* Concatenates the rows of all media of the pass. */
static g4_status gather_rows(g4_encode_pass *p, float **rows_out)
{
    const size_t width = (size_t)p->config->d_in;
    G4_ALLOC(&p->exec, *rows_out, (size_t)p->n_rows * width);
    float *at = *rows_out;
    for (int m = 0; m < p->n_media; m++) {
        const g4_medium *medium = &p->media[p->first_medium + m];
        memcpy(at, medium->rows, (size_t)medium->n_rows * width * sizeof *at);
        at += (size_t)medium->n_rows * width;
    }
    return G4_OK;
}

static g4_status add_positions(g4_encode_pass *p, const g4_embedder_weights *w, float *soft)
{
    const int d = p->config->d_model;
    float *x, *y;
    int32_t *ids;
    G4_ALLOC(&p->exec, x, (size_t)p->n_rows * (size_t)d);
    G4_ALLOC(&p->exec, y, (size_t)p->n_rows * (size_t)d);
    G4_ALLOC(&p->exec, ids, (size_t)p->n_rows);
    g4_encoder_positions(p, 0, 2, 0, ids);
    G4_TRY(g4_gather_rows(&p->exec, &w->positions, ids, p->n_rows, 1.0f, x));
    g4_encoder_positions(p, 1, 2, 1, ids);
    G4_TRY(g4_gather_rows(&p->exec, &w->positions, ids, p->n_rows, 1.0f, y));
    G4_TRY(g4_add_rows(&p->exec, x, y, p->n_rows, d, x));
    return g4_add_rows(&p->exec, soft, x, p->n_rows, d, soft);
}

static g4_status encode_image(g4_encode_pass *p)
{
    const g4_encoder_config *c = p->config;
    const g4_embedder_weights *w = &p->encoder->embedder;
    const size_t d = (size_t)c->d_model;
    float *pixels, *soft;
    G4_TRY(gather_rows(p, &pixels));
    G4_ALLOC(&p->exec, soft, (size_t)p->n_rows * d);
    G4_TRY(g4_layer_norm_rows(&p->exec, pixels, w->ln1, w->ln1_bias, LAYER_NORM_EPS, p->n_rows, c->d_in, pixels));
    TAP(V_PATCH_NORMED, pixels);
    G4_TRY(g4_panel_linear(&p->exec, pixels, p->n_rows, &w->dense, soft));
    for (int row = 0; row < p->n_rows; row++)
        p->exec.kernels->add(soft + (size_t)row * d, soft + (size_t)row * d, w->dense_bias, c->d_model);
    TAP(V_PATCH_DENSE, soft);
    G4_TRY(g4_layer_norm_rows(&p->exec, soft, w->ln2, w->ln2_bias, LAYER_NORM_EPS, p->n_rows, c->d_model, soft));
    TAP(V_PATCH_DENSE_NORMED, soft);
    G4_TRY(add_positions(p, w, soft));
    TAP(V_POS_ADDED, soft);
    G4_TRY(
        g4_layer_norm_rows(&p->exec, soft, w->pos_norm, w->pos_norm_bias, LAYER_NORM_EPS, p->n_rows, c->d_model, soft));
    return g4_encoder_project(p, &g4_vision_soft_sites, soft);
}

static g4_status encode_audio(g4_encode_pass *p)
{
    float *soft;
    G4_TRY(gather_rows(p, &soft));
    return g4_encoder_project(p, &g4_audio_soft_sites, soft);
}

const g4_kind_row g4_vision_embedder = {.positions = true,
                                        .check = check_image,
                                        .axis = g4_encoder_axis,
                                        .soft_tokens = soft_tokens,
                                        .bind = bind,
                                        .encode = encode_image};
const g4_kind_row g4_audio_embedder = {
    .check = check_audio, .axis = g4_encoder_axis, .soft_tokens = soft_tokens, .encode = encode_audio};
