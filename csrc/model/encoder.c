/* SPDX-License-Identifier: Apache-2.0 */
/* What all encoders share: making one, announcing sites, clipped maps, the projection, and the pass over the media. */
#include "model/encoder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "ops/panels.h"
#include "ops/rows.h"

/* Rows of one pass: two images of 280 soft tokens (2,520 patches each). More only cost memory. */
enum { PASS_ROWS = 5120 };

/* ---- making one ----------------------------------------------------------------------------------------------------- */

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

g4_status g4_bind_table(g4_binder *b, const g4_bind_row *rows, int n_rows, const char *prefix, int layer, void *owner)
{
    char name[128];
    for (int i = 0; i < n_rows; i++) {
        snprintf(name, sizeof name, "%s%s", prefix, rows[i].name);
        G4_TRY(g4_bind(b, &rows[i], name, layer, owner));
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
    "embedding_projection.weight", offsetof(g4_soft_weights, projection), G4_BIND_MATRIX, "O I", 0, G4_OP_OTHER};

static g4_status bind_kind(g4_encoder *e, g4_binder *b)
{
    switch (e->config.kind) {
    case G4_VISION_TOWER: return g4_vision_bind(e, b);
    case G4_VISION_EMBEDDER: return g4_vision_embedder_bind(e, b);
    case G4_AUDIO_TOWER: return g4_audio_bind(e, b);
    default: return G4_OK;
    }
}

static g4_status bind(g4_encoder *e, const g4_named_tensor *tensors, size_t n_tensors, g4_error *err)
{
    g4_binder b = {
        .config = &e->config, .letter = letter_size, .clipped = e->config.clipped, .arena = e->vectors, .err = err};
    G4_TRY(g4_binder_open(&b, tensors, n_tensors));
    g4_status status = g4_bind(&b, &projection_row, projection_row.name, 0, &e->soft);
    if (status == G4_OK)
        status = bind_kind(e, &b);
    e->n_bytes = b.n_bytes;
    g4_binder_close(&b);
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

g4_status g4_encoder_new(g4_model *model, const g4_encoder_config *config, const g4_named_tensor *tensors,
                         size_t n_tensors, g4_encoder **encoder, g4_error *err)
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
        status = bind(e, tensors, n_tensors, err);
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

/* ---- sites ---------------------------------------------------------------------------------------------------------- */

bool g4_encoder_tapped(const g4_encode_pass *p, g4_site site, int layer)
{
    for (int i = 0; i < p->n_taps; i++)
        if (p->taps[i].site == site && p->taps[i].layer == layer)
            return true;
    return false;
}

g4_status g4_encoder_tap_one(g4_encode_pass *p, g4_site site, int layer, int medium, void *data)
{
    int64_t shape[G4_MAX_DIMS];
    const int index = p->first_medium + medium;
    const int n_dims = g4_encoder_site_shape(p->config, site, p->media[index].n_rows, shape);
    size_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    for (int i = 0; i < p->n_taps; i++) {
        const g4_tap *tap = &p->taps[i];
        if (tap->site != site || tap->layer != layer || tap->run != index)
            continue;
        if (tap->edit)
            G4_TRY(tap->edit(tap->context, data, shape, n_dims, p->exec.err));
        else
            memcpy(tap->dest, data, n * sizeof(float));
    }
    return G4_OK;
}

g4_status g4_encoder_tap(g4_encode_pass *p, g4_site site, int layer, void *data)
{
    if (!p->n_taps || !g4_encoder_tapped(p, site, layer))
        return G4_OK;
    float *at = data;
    for (int m = 0; m < p->n_media; m++) {
        int64_t shape[G4_MAX_DIMS];
        const int n_dims = g4_encoder_site_shape(p->config, site, p->media[p->first_medium + m].n_rows, shape);
        size_t n = 1;
        for (int i = 0; i < n_dims; i++)
            n *= (size_t)shape[i];
        G4_TRY(g4_encoder_tap_one(p, site, layer, m, at));
        at += n;
    }
    return G4_OK;
}

/* ---- maps ------------------------------------------------------------------------------------------------------------ */

static bool clips(float low, float high)
{
    return low > -INFINITY || high < INFINITY;
}

/* x clamped as the map wants it; maps before it with the same bounds have it already. */
static g4_status clipped_input(g4_exec *exec, const float *x, int m, const g4_clipped *const *maps, int i,
                               const g4_linear_job *jobs, const float **input)
{
    const g4_clipped *map = maps[i];
    float *copy;
    *input = x;
    if (!clips(map->input_min, map->input_max))
        return G4_OK;
    for (int j = 0; j < i; j++)
        if (maps[j]->input_min == map->input_min && maps[j]->input_max == map->input_max) {
            *input = jobs[j].x;
            return G4_OK;
        }
    G4_ALLOC(exec, copy, (size_t)m * map->w.n_cols);
    *input = copy;
    return g4_clamp_rows(exec, x, map->input_min, map->input_max, m, (int)map->w.n_cols, copy);
}

g4_status g4_clipped_jobs(g4_exec *exec, const float *x, int m, const g4_clipped *const *maps, float *const *outs,
                          int n)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    g4_linear_job *jobs;
    G4_ALLOC(exec, jobs, (size_t)n);
    for (int i = 0; i < n; i++) {
        const g4_matrix *w = &maps[i]->w;
        const float *input;
        G4_TRY(clipped_input(exec, x, m, maps, i, jobs, &input));
        jobs[i] = (g4_linear_job){input, w->n_cols, m, *w, outs[i], w->n_rows};
    }
    G4_TRY(g4_panel_jobs(exec, jobs, n));
    for (int i = 0; i < n; i++)
        if (clips(maps[i]->output_min, maps[i]->output_max))
            G4_TRY(g4_clamp_rows(exec, outs[i], maps[i]->output_min, maps[i]->output_max, m, (int)maps[i]->w.n_rows,
                                 outs[i]));
    g4_arena_restore(exec->arena, mark);
    return G4_OK;
}

void g4_encoder_positions(const g4_encode_pass *p, int axis, int factor, int offset, int32_t *out)
{
    for (int m = 0; m < p->n_media; m++) {
        const g4_medium *image = &p->media[p->first_medium + m];
        for (int i = 0; i < image->n_rows; i++)
            *out++ = factor * image->positions[2 * i + axis] + offset;
    }
}

g4_status g4_encoder_project(g4_encode_pass *p, g4_site soft_site, float *soft)
{
    const g4_encoder_config *c = p->config;
    float *projected;
    G4_TRY(g4_encoder_tap(p, soft_site, 0, soft));
    G4_TRY(g4_rms_norm(&p->exec, soft, NULL, p->n_soft, c->d_soft, c->rms_norm_eps, soft));
    G4_TRY(g4_encoder_tap(p, (g4_site)(soft_site + 1), 0, soft));
    G4_ALLOC(&p->exec, projected, (size_t)p->n_soft * (size_t)c->d_out);
    G4_TRY(g4_panel_linear(&p->exec, soft, p->n_soft, &p->encoder->soft.projection, projected));
    G4_TRY(g4_encoder_tap(p, (g4_site)(soft_site + 2), 0, projected));
    const float *at = projected;
    for (int m = 0; m < p->n_media; m++) {
        const g4_medium *medium = &p->media[p->first_medium + m];
        const size_t n = (size_t)g4_encoder_soft_tokens(c, medium->n_rows) * (size_t)c->d_out;
        memcpy(medium->soft, at, n * sizeof *at);
        at += n;
    }
    return G4_OK;
}

/* ---- the pass ---------------------------------------------------------------------------------------------------------- */

static g4_status check_medium(const g4_encoder_config *c, const g4_medium *medium, int index, g4_error *err)
{
    const int pooled = c->kind == G4_VISION_TOWER ? c->pool * c->pool : 1;
    if (medium->n_rows < pooled || medium->n_rows % pooled || medium->n_rows > 1 << 20)
        return g4_fail(err, G4_EVALUE, "medium %d has %d rows, expected a multiple of %d, at most 1048576", index,
                       medium->n_rows, pooled);
    if (c->kind != G4_VISION_TOWER && c->kind != G4_VISION_EMBEDDER)
        return G4_OK;
    for (int i = 0; i < medium->n_rows; i++)
        for (int axis = 0; axis < 2; axis++)
            if (medium->positions[2 * i + axis] < 0 || medium->positions[2 * i + axis] >= c->n_positions)
                return g4_fail(err, G4_EVALUE, "image %d: patch %d lies at %d, %d; each must be 0 to %d", index, i,
                               medium->positions[2 * i], medium->positions[2 * i + 1], c->n_positions - 1);
    return G4_OK;
}

static g4_status check(const g4_encoder *e, const g4_medium *media, int n_media, const g4_tap *taps, int n_taps,
                       g4_error *err)
{
    for (int m = 0; m < n_media; m++)
        G4_TRY(check_medium(&e->config, &media[m], m, err));
    for (int t = 0; t < n_taps; t++)
        if (taps[t].site < 0 || taps[t].site >= G4_N_SITES ||
            !g4_encoder_site_exists(&e->config, taps[t].site, taps[t].layer) || taps[t].run < 0 ||
            taps[t].run >= n_media || (!taps[t].dest && !taps[t].edit))
            return g4_fail(err, G4_EVALUE, "tap %d: no site %d in layer %d of medium %d", t, (int)taps[t].site,
                           taps[t].layer, taps[t].run);
    return G4_OK;
}

static g4_status encode_kind(g4_encode_pass *p)
{
    switch (p->config->kind) {
    case G4_VISION_TOWER: return g4_vision_encode(p);
    case G4_VISION_EMBEDDER: return g4_vision_embedder_encode(p);
    case G4_AUDIO_TOWER: return g4_audio_encode(p);
    default: return g4_audio_embedder_encode(p);
    }
}

static g4_status run_passes(g4_encode_pass *p, int n_media)
{
    g4_arena_mark mark = g4_arena_save(p->exec.arena);
    for (p->first_medium = 0; p->first_medium < n_media; p->first_medium += p->n_media) {
        p->n_media = p->n_rows = p->n_soft = 0;
        for (int m = p->first_medium; m < n_media && (!p->n_media || p->n_rows + p->media[m].n_rows <= PASS_ROWS);
             m++) {
            p->n_media++;
            p->n_rows += p->media[m].n_rows;
            p->n_soft += g4_encoder_soft_tokens(p->config, p->media[m].n_rows);
        }
        G4_TRY(encode_kind(p));
        g4_arena_restore(p->exec.arena, mark);
    }
    return G4_OK;
}

g4_status g4_encode(const g4_encoder *encoder, const g4_medium *media, int n_media, const g4_tap *taps, int n_taps,
                    int (*poll)(void *context), void *poll_context, g4_error *err)
{
    G4_TRY(check(encoder, media, n_media, taps, n_taps, err));
    g4_arena *arena = g4_model_take_scratch(encoder->model);
    if (!arena)
        return g4_fail_nomem(err, sizeof(void *));
    g4_encode_pass p = {.exec = {.kernels = encoder->model->kernels,
                                 .pool = encoder->model->pool,
                                 .arena = arena,
                                 .fast = encoder->model->fast,
                                 .poll = poll,
                                 .poll_context = poll_context,
                                 .err = err},
                        .encoder = encoder,
                        .config = &encoder->config,
                        .media = media,
                        .taps = taps,
                        .n_taps = n_taps};
    g4_status status = run_passes(&p, n_media);
    g4_model_give_scratch(encoder->model, arena);
    return status;
}
