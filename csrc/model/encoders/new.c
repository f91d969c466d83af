/* SPDX-License-Identifier: Apache-2.0 */
/* Making an encoder: its sizes checked, its tensors bound, and with precision="fast" the maps of its layers copied as
 * whole numbers. What reads pixels and sound (the first map, the convolutions) and the projection stay as they are. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/pages.h"
#include "model/encoders/encoder.h"
#include "model/model.h"

/* ---- checks --------------------------------------------------------------------------------------------------------- */

static g4_status check_range(const char *name, long value, long low, long high, g4_error *err)
{
    if (value < low || value > high)
        return g4_fail(err, G4_EVALUE, "encoder config: %s is %ld, expected %ld to %ld", name, value, low, high);
    return G4_OK;
}

static g4_status check_tower(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(check_range("d_model", c->d_model, 1, 1 << 16, err));
    G4_TRY(check_range("n_layers", c->n_layers, 1, 1 << 10, err));
    G4_TRY(check_range("n_heads", c->n_heads, 1, 1 << 10, err));
    G4_TRY(check_range("n_kv_heads", c->n_kv_heads, 1, c->n_heads, err));
    G4_TRY(check_range("head_dim", c->head_dim, 1, 1 << 12, err));
    G4_TRY(check_range("d_mlp", c->d_mlp, 1, 1 << 18, err));
    if (c->n_heads % c->n_kv_heads)
        return g4_fail(err, G4_EVALUE, "encoder config: %d key/value heads do not divide %d heads", c->n_kv_heads,
                       c->n_heads);
    return G4_OK;
}

static g4_status check_embedder(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(check_range("d_model", c->d_model, 1, 1 << 16, err));
    return check_range("n_positions", c->n_positions, 1, 1 << 20, err);
}

static g4_status check_audio(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(check_tower(c, err));
    G4_TRY(check_range("conv_channels[0]", c->conv_channels[0], 1, 1 << 12, err));
    G4_TRY(check_range("conv_channels[1]", c->conv_channels[1], 1, 1 << 12, err));
    G4_TRY(check_range("conv_kernel", c->conv_kernel, 1, 1 << 8, err));
    G4_TRY(check_range("chunk", c->chunk, 1, 1 << 8, err));
    G4_TRY(check_range("context_left", c->context_left, 2, 1 << 8, err));
    G4_TRY(check_range("context_right", c->context_right, 0, 1 << 8, err));
    if (c->n_heads * c->head_dim != c->d_model || c->d_model % 2 || c->n_kv_heads != c->n_heads)
        return g4_fail(err, G4_EVALUE, "encoder config: %d heads of %d do not make a d_model of %d, or it is odd",
                       c->n_heads, c->head_dim, c->d_model);
    if (!(c->logit_cap > 0) || !(c->gradient_clipping > 0) || !isfinite(c->residual_weight))
        return g4_fail(err, G4_EVALUE, "encoder config: logit_cap %g, gradient_clipping %g or residual_weight %g",
                       (double)c->logit_cap, (double)c->gradient_clipping, (double)c->residual_weight);
    return G4_OK;
}

static g4_status check_config(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(check_range("kind", c->kind, 0, G4_AUDIO_EMBEDDER, err));
    G4_TRY(check_range("d_in", c->d_in, 1, 1 << 16, err));
    G4_TRY(check_range("d_soft", c->d_soft, 1, 1 << 16, err));
    G4_TRY(check_range("d_out", c->d_out, 1, 1 << 17, err));
    if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps < 1))
        return g4_fail(err, G4_EVALUE, "encoder config: rms_norm_eps %g out of range", (double)c->rms_norm_eps);
    if (c->kind == G4_VISION_TOWER) {
        G4_TRY(check_tower(c, err));
        G4_TRY(check_range("n_positions", c->n_positions, 1, 1 << 20, err));
        G4_TRY(check_range("pool", c->pool, 1, 64, err));
        if (c->head_dim % 4)
            return g4_fail(err, G4_EVALUE, "encoder config: head_dim %d is no multiple of 4", c->head_dim);
    }
    return c->kind == G4_VISION_EMBEDDER ? check_embedder(c, err)
           : c->kind == G4_AUDIO_TOWER   ? check_audio(c, err)
                                         : G4_OK;
}

/* ---- tensors -------------------------------------------------------------------------------------------------------- */

static g4_status copy_map(g4_binder *b, g4_clipped *map)
{
    G4_TRY(g4_matrix16_new(b->copy_with, b->arena, &map->w, &map->w16));
    b->n_copied += g4_matrix16_bytes(map->w16);
    if (((const g4_encoder_config *)b->config)->on_disk) /* else both would be in memory at the end */
        g4_pages_release(map->w.data, g4_dtype_bytes(map->w.dtype, map->w.n_rows * map->w.n_cols));
    return G4_OK;
}

g4_status g4_bind_table(g4_binder *b, const g4_bind_row *rows, int n_rows, const char *prefix, int layer, void *owner)
{
    char name[128];
    for (int i = 0; i < n_rows; i++) {
        snprintf(name, sizeof name, "%s%s", prefix, rows[i].name);
        G4_TRY(g4_bind(b, &rows[i], name, layer, owner));
        if (b->copy_with && rows[i].kind == G4_BIND_CLIPPED)
            G4_TRY(copy_map(b, (g4_clipped *)((char *)owner + rows[i].offset)));
    }
    return G4_OK;
}

static int64_t letter_size(const void *config, int layer, char letter)
{
    const g4_encoder_config *c = config;
    (void)layer;
    switch (letter) {
    case 'D': return c->d_model;
    case 'H': return c->n_heads;
    case 'K': return c->n_kv_heads;
    case 'h': return c->head_dim;
    case 'F': return c->d_mlp;
    case 'X': return c->d_in;
    case 'I': return c->d_soft;
    case 'O': return c->d_out;
    case 'C': return c->conv_channels[0];
    case 'c': return c->conv_channels[1];
    case 'b': return ((c->d_in + 1) / 2 + 1) / 2; /* bins after both convolutions */
    case 's': return c->conv_kernel;
    default: return c->n_positions; /* P */
    }
}

static const g4_bind_row projection_row = {
    "embedding_projection.weight", offsetof(g4_soft_weights, projection), G4_BIND_MATRIX, "O I", 0, G4_OP_PROJECTION};

static g4_status bind_kind(g4_encoder *e, g4_binder *b)
{
    switch (e->config.kind) {
    case G4_VISION_TOWER: return g4_vision_bind(e, b);
    case G4_VISION_EMBEDDER: return g4_vision_embedder_bind(e, b);
    case G4_AUDIO_TOWER: return g4_audio_bind(e, b);
    default: return G4_OK;
    }
}

static g4_status bind_with(g4_encoder *e, g4_binder *b)
{
    G4_TRY(g4_bind(b, &projection_row, projection_row.name, 0, &e->soft));
    return bind_kind(e, b);
}

static g4_status bind(g4_encoder *e, const g4_named_tensor *tensors, size_t n_tensors, g4_poll_fn poll,
                      void *poll_context, g4_error *err)
{
    g4_arena *scratch = g4_model_take_scratch(e->model);
    if (!scratch)
        return g4_fail_nomem(err, sizeof(void *));
    g4_exec exec = {.kernels = e->model->kernels,
                    .pool = e->model->pool,
                    .arena = scratch,
                    .poll = poll,
                    .poll_context = poll_context,
                    .err = err};
    g4_binder b = {.config = &e->config,
                   .letter = letter_size,
                   .clipped = e->config.clipped,
                   .copy_with = e->model->fast ? &exec : NULL,
                   .arena = e->vectors,
                   .err = err};
    g4_status status = g4_binder_open(&b, tensors, n_tensors);
    if (status == G4_OK)
        status = bind_with(e, &b);
    e->n_bytes = b.n_bytes;
    e->n_copied = b.n_copied;
    g4_binder_close(&b);
    g4_model_give_scratch(e->model, scratch);
    return status;
}

static g4_status copy_frequencies(g4_encoder *e, g4_error *err)
{
    const size_t n = (size_t)e->config.head_dim / 4;
    if (e->config.kind != G4_VISION_TOWER)
        return G4_OK;
    float *copy = g4_arena_alloc(e->vectors, n * sizeof *copy + 1);
    if (!copy)
        return g4_fail_nomem(err, n * sizeof *copy);
    memcpy(copy, e->config.rope_inv_freq, n * sizeof *copy);
    e->config.rope_inv_freq = copy;
    return G4_OK;
}

/* ---- making one ----------------------------------------------------------------------------------------------------- */

g4_status g4_encoder_new(g4_model *model, const g4_encoder_config *config, const g4_named_tensor *tensors,
                         size_t n_tensors, int (*poll)(void *context), void *poll_context, g4_encoder **encoder,
                         g4_error *err)
{
    G4_TRY(check_config(config, err));
    g4_encoder *e = calloc(1, sizeof *e);
    if (!e)
        return g4_fail_nomem(err, sizeof *e);
    e->model = model;
    e->config = *config;
    e->vectors = g4_arena_new();
    g4_status status = e->vectors ? copy_frequencies(e, err) : g4_fail_nomem(err, sizeof(void *));
    if (status == G4_OK)
        status = bind(e, tensors, n_tensors, poll, poll_context, err);
    if (status != G4_OK) {
        g4_encoder_free(e);
        return status;
    }
    *encoder = e;
    return G4_OK;
}

void g4_encoder_free(g4_encoder *encoder)
{
    if (!encoder)
        return;
    g4_arena_free(encoder->vectors);
    free(encoder);
}

const g4_encoder_config *g4_encoder_config_of(const g4_encoder *encoder)
{
    return &encoder->config;
}

size_t g4_encoder_weight_bytes(const g4_encoder *encoder)
{
    return encoder->n_bytes;
}

size_t g4_encoder_copied_bytes(const g4_encoder *encoder)
{
    return encoder->n_copied;
}
