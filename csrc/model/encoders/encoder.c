/* SPDX-License-Identifier: Apache-2.0 */
/* What all encoders share: announcing sites, clipped maps, the projection, and the pass over the media. */
#include "model/encoders/encoder.h"

#include <math.h>
#include <string.h>

#include "model/model.h"
#include "ops/panels.h"
#include "ops/profile.h"
#include "ops/rows.h"

/* Rows of one pass: two images of 280 soft tokens (2,520 patches each). More only cost memory. */
enum { PASS_ROWS = 5120 };

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

/* The same with the maps' copies as whole numbers, which clamp what they read and write. */
static g4_status clipped_jobs16(g4_exec *exec, const float *x, int m, const g4_clipped *const *maps, float *const *outs,
                                int n)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    g4_job16 *jobs;
    G4_ALLOC(exec, jobs, (size_t)n);
    for (int i = 0; i < n; i++)
        jobs[i] = (g4_job16){.w = maps[i]->w16,
                             .input_min = maps[i]->input_min,
                             .input_max = maps[i]->input_max,
                             .output_min = maps[i]->output_min,
                             .output_max = maps[i]->output_max,
                             .out = outs[i]};
    G4_TRY(g4_jobs16(exec, x, m, jobs, n));
    g4_arena_restore(exec->arena, mark);
    return G4_OK;
}

g4_status g4_clipped_jobs(g4_exec *exec, const float *x, int m, const g4_clipped *const *maps, float *const *outs,
                          int n)
{
    if (maps[0]->w16)
        return clipped_jobs16(exec, x, m, maps, outs, n);
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
                    int (*poll)(void *context), void *poll_context, g4_profile *profile, g4_error *err)
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
                                 .profile = profile,
                                 .err = err},
                        .encoder = encoder,
                        .config = &encoder->config,
                        .media = media,
                        .taps = taps,
                        .n_taps = n_taps};
    const double before = g4_profile_seconds(&p.exec), start = g4_profile_start(&p.exec);
    g4_status status = run_passes(&p, n_media);
    g4_profile_end_step(&p.exec, start, before);
    g4_model_give_scratch(encoder->model, arena);
    return status;
}
