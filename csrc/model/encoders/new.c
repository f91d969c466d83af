/* SPDX-License-Identifier: Apache-2.0 */
/* Creates encoders: checks sizes, binds tensors, and with precision="fast" copies the layers' weights as 16-bit
 * integers. The input layers (the first linear layer, the convolutions) and the projection are not copied. */
#include <stdlib.h>
#include <string.h>

#include "model/encoders/encoder.h"
#include "model/model.h"

/* ---- checks ------------------------------------------------------------------------------------------------------ */

g4_status g4_encoder_check_range(const char *name, long value, long low, long high, g4_error *err)
{
    if (value < low || value > high)
        return g4_fail(err, G4_EVALUE, "encoder config: %s is %ld, expected %ld to %ld", name, value, low, high);
    return G4_OK;
}

g4_status g4_encoder_check_layers(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(g4_encoder_check_range("d_model", c->d_model, 1, 1 << 16, err));
    G4_TRY(g4_encoder_check_range("n_layers", c->n_layers, 1, 1 << 10, err));
    G4_TRY(g4_encoder_check_range("n_heads", c->n_heads, 1, 1 << 10, err));
    G4_TRY(g4_encoder_check_range("n_kv_heads", c->n_kv_heads, 1, c->n_heads, err));
    G4_TRY(g4_encoder_check_range("head_dim", c->head_dim, 1, 1 << 12, err));
    G4_TRY(g4_encoder_check_range("d_mlp", c->d_mlp, 1, 1 << 18, err));
    if (c->n_heads % c->n_kv_heads)
        return g4_fail(err, G4_EVALUE, "encoder config: %d key/value heads do not divide %d heads", c->n_kv_heads,
                       c->n_heads);
    return G4_OK;
}

static g4_status check_config(const g4_encoder_config *c, g4_error *err)
{
    G4_TRY(g4_encoder_check_range("kind", c->kind, 0, G4_AUDIO_EMBEDDER, err));
    G4_TRY(g4_encoder_check_range("d_in", c->d_in, 1, 1 << 16, err));
    G4_TRY(g4_encoder_check_range("d_soft", c->d_soft, 1, 1 << 16, err));
    G4_TRY(g4_encoder_check_range("d_out", c->d_out, 1, 1 << 17, err));
    G4_TRY(g4_encoder_check_range("pool", c->pool, 0, 64, err));
    if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps < 1))
        return g4_fail(err, G4_EVALUE, "encoder config: rms_norm_eps %g out of range", (double)c->rms_norm_eps);
    const g4_kind_row *kind = g4_kind_of(c);
    return kind->check ? kind->check(c, err) : G4_OK;
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

static int64_t letter_size(const void *config, int layer, char letter)
{
    (void)layer;
    return g4_kind_of(config)->axis(config, letter, 0);
}

static const g4_bind_row projection_row = {
    "embedding_projection.weight", offsetof(g4_soft_weights, projection), G4_BIND_MATRIX, "O I", 0, G4_OP_PROJECTION};

static g4_status bind_with(g4_encoder *e, g4_binder *b)
{
    G4_TRY(g4_bind(b, &projection_row, projection_row.name, 0, &e->soft));
    const g4_kind_row *kind = g4_kind_of(&e->config);
    return kind->bind ? kind->bind(e, b) : G4_OK;
}

static g4_status finish(g4_encoder *e, g4_binder *b)
{
    const g4_kind_row *kind = g4_kind_of(&e->config);
    return kind->finish ? kind->finish(e, b) : G4_OK;
}

g4_status g4_encoder_tensors(const g4_encoder_config *config, g4_tensor_fn each, void *context, g4_error *err)
{
    g4_encoder e = {.config = *config};
    G4_TRY(check_config(config, err));
    g4_arena *arena = g4_arena_new();
    if (!arena)
        return g4_fail_nomem(err, sizeof(void *));
    g4_binder b = {.config = &e.config,
                   .letter = letter_size,
                   .clipped = config->clipped,
                   .arena = arena,
                   .err = err,
                   .list = each,
                   .list_context = context};
    g4_status status = bind_with(&e, &b);
    g4_arena_free(arena);
    return status;
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
                   .copy_with = e->model->precision == G4_FAST ? &exec : NULL,
                   .arena = e->vectors,
                   .err = err};
    g4_status status = g4_binder_open(&b, tensors, n_tensors);
    for (size_t i = 0; i < n_tensors && status == G4_OK; i++)
        status = g4_guards_add(&e->guards, tensors[i].data, err);
    if (status == G4_OK)
        status = bind_with(e, &b);
    if (status == G4_OK)
        status = finish(e, &b);
    if (status == G4_OK)
        status = g4_guards_check(&e->guards, err);
    e->n_bytes = b.n_bytes;
    e->n_copied = b.n_copied;
    g4_binder_close(&b);
    g4_model_give_scratch(e->model, scratch);
    return status;
}

/* ---- creation ---------------------------------------------------------------------------------------------------- */

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
    g4_status status =
        e->vectors ? bind(e, tensors, n_tensors, poll, poll_context, err) : g4_fail_nomem(err, sizeof(void *));
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
    g4_guards_release(&encoder->guards);
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
