/* SPDX-License-Identifier: Apache-2.0 */
/* Parts common to encoders: announcing sites, clipped linear layers, the projection, tables of tensors. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/pages.h"
#include "model/encoders/encoder.h"
#include "ops/linear_f32.h"
#include "ops/rows.h"

/* ---- sizes ------------------------------------------------------------------------------------------------------- */

int64_t g4_encoder_axis(const g4_encoder_config *c, char letter, int n_rows)
{
    switch (letter) {
    case 'T':
    case 'S': return n_rows;
    case 'N': return g4_encoder_soft_tokens(c, n_rows);
    case 'X': return c->d_in;
    case 'D': return c->d_model;
    case 'I': return c->d_soft;
    case 'O': return c->d_out;
    case 'H': return c->n_heads;
    case 'K': return c->n_kv_heads;
    case 'h': return c->head_dim;
    case 'F': return c->d_mlp;
    case 'P': return c->n_positions;
    default: return 1;
    }
}

/* ---- sites ------------------------------------------------------------------------------------------------------- */

bool g4_encoder_tapped(const g4_encode_pass *p, g4_site site, int layer)
{
    return g4_taps_first(&p->taps, site, layer) >= 0;
}

static g4_part part_of_medium(const g4_encode_pass *p, g4_site site, int medium, void *data)
{
    g4_part part = {.data = data};
    part.n_dims = g4_encoder_site_shape(p->config, site, p->media[p->first_medium + medium].n_rows, part.shape);
    part.n_all_keys = (int)part.shape[part.n_dims - 1]; /* for sites whose last axis is keys */
    return part;
}

static g4_status act(g4_encode_pass *p, g4_site site, int layer, int medium, const g4_part *part)
{
    bool changed = false;
    for (int i = g4_taps_first(&p->taps, site, layer); i >= 0; i = p->taps.next[i]) {
        if (p->taps.taps[i].run != p->first_medium + medium)
            continue;
        changed = changed || p->taps.taps[i].kind != G4_TAP_COPY;
        G4_TRY(g4_tap_act(&p->exec, &p->taps.taps[i], part));
    }
    return changed ? g4_tap_check_keys_left(&p->exec, site, layer, part, NULL) : G4_OK;
}

g4_status g4_encoder_tap_one(g4_encode_pass *p, g4_site site, int layer, int medium, const g4_visible *visible,
                             void *data)
{
    if (!g4_encoder_tapped(p, site, layer))
        return G4_OK;
    g4_part part = part_of_medium(p, site, medium, data);
    part.visible = visible;
    return act(p, site, layer, medium, &part);
}

g4_status g4_encoder_tap(g4_encode_pass *p, g4_site site, int layer, void *data)
{
    if (!g4_encoder_tapped(p, site, layer))
        return G4_OK;
    float *at = data;
    for (int m = 0; m < p->n_media; m++) {
        const g4_part part = part_of_medium(p, site, m, at);
        G4_TRY(act(p, site, layer, m, &part));
        size_t n = 1;
        for (int i = 0; i < part.n_dims; i++)
            n *= (size_t)part.shape[i];
        at += n;
    }
    return G4_OK;
}

/* ---- linear layers ----------------------------------------------------------------------------------------------- */

static bool clips(float low, float high)
{
    return low > -INFINITY || high < INFINITY;
}

/* *input: x clamped to the bounds of layer i; reuses the input of an earlier layer with the same bounds. */
static g4_status clipped_input(g4_exec *exec, const float *x, int m, const g4_clipped *const *linears, int i,
                               const g4_linear_job *jobs, const float **input)
{
    const g4_clipped *linear = linears[i];
    float *copy;
    *input = x;
    if (!clips(linear->input_min, linear->input_max))
        return G4_OK;
    for (int j = 0; j < i; j++)
        if (linears[j]->input_min == linear->input_min && linears[j]->input_max == linear->input_max) {
            *input = jobs[j].x;
            return G4_OK;
        }
    G4_ALLOC(exec, copy, (size_t)m * linear->w.n_cols);
    *input = copy;
    return g4_clamp_rows(exec, x, linear->input_min, linear->input_max, m, (int)linear->w.n_cols, copy);
}

/* g4_clipped_jobs on the layers' 16-bit copies, which clamp inputs and outputs themselves. */
static g4_status clipped_jobs16(g4_exec *exec, const float *x, int m, const g4_clipped *const *linears,
                                float *const *outs, int n)
{
    g4_arena_mark mark = g4_arena_save(exec->arena);
    g4_job16 *jobs;
    G4_ALLOC(exec, jobs, (size_t)n);
    for (int i = 0; i < n; i++)
        jobs[i] = (g4_job16){.w = linears[i]->w16,
                             .input_min = linears[i]->input_min,
                             .input_max = linears[i]->input_max,
                             .output_min = linears[i]->output_min,
                             .output_max = linears[i]->output_max,
                             .out = outs[i]};
    G4_TRY(g4_jobs16(exec, x, m, jobs, n));
    g4_arena_restore(exec->arena, mark);
    return G4_OK;
}

g4_status g4_clipped_jobs(g4_exec *exec, const float *x, int m, const g4_clipped *const *linears, float *const *outs,
                          int n)
{
    if (linears[0]->w16)
        return clipped_jobs16(exec, x, m, linears, outs, n);
    g4_arena_mark mark = g4_arena_save(exec->arena);
    g4_linear_job *jobs;
    G4_ALLOC(exec, jobs, (size_t)n);
    for (int i = 0; i < n; i++) {
        const g4_matrix *w = &linears[i]->w;
        const float *input;
        G4_TRY(clipped_input(exec, x, m, linears, i, jobs, &input));
        jobs[i] = (g4_linear_job){input, w->n_cols, m, *w, outs[i], w->n_rows};
    }
    G4_TRY(g4_panel_jobs(exec, jobs, n));
    for (int i = 0; i < n; i++)
        if (clips(linears[i]->output_min, linears[i]->output_max))
            G4_TRY(g4_clamp_rows(exec, outs[i], linears[i]->output_min, linears[i]->output_max, m,
                                 (int)linears[i]->w.n_rows, outs[i]));
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

const g4_soft_sites g4_vision_soft_sites = {G4_SITE_V_SOFT, G4_SITE_V_SOFT_NORMED, G4_SITE_V_PROJECTED},
                    g4_audio_soft_sites = {G4_SITE_A_SOFT, G4_SITE_A_SOFT_NORMED, G4_SITE_A_PROJECTED};

g4_status g4_encoder_project(g4_encode_pass *p, const g4_soft_sites *sites, float *soft)
{
    const g4_encoder_config *c = p->config;
    float *projected;
    G4_TRY(g4_encoder_tap(p, sites->soft, 0, soft));
    G4_TRY(g4_rms_norm(&p->exec, soft, NULL, p->n_soft, c->d_soft, c->rms_norm_eps, soft));
    G4_TRY(g4_encoder_tap(p, sites->normed, 0, soft));
    G4_ALLOC(&p->exec, projected, (size_t)p->n_soft * (size_t)c->d_out);
    G4_TRY(g4_panel_linear(&p->exec, soft, p->n_soft, &p->encoder->soft.projection, projected));
    G4_TRY(g4_encoder_tap(p, sites->projected, 0, projected));
    const float *at = projected;
    for (int m = 0; m < p->n_media; m++) {
        const g4_medium *medium = &p->media[p->first_medium + m];
        const size_t n = (size_t)g4_encoder_soft_tokens(c, medium->n_rows) * (size_t)c->d_out;
        memcpy(medium->soft, at, n * sizeof *at);
        at += n;
    }
    return G4_OK;
}

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

static g4_status copy_linear(g4_binder *b, g4_clipped *linear)
{
    G4_TRY(g4_matrix16_new(b->copy_with, b->arena, &linear->w, &linear->w16));
    b->n_copied += g4_matrix16_bytes(linear->w16);
    if (((const g4_encoder_config *)b->config)->on_disk) /* else the original and the copy would both stay in memory */
        g4_pages_release(linear->w.data, g4_dtype_bytes(linear->w.dtype, linear->w.n_rows * linear->w.n_cols));
    return G4_OK;
}

g4_status g4_bind_table(g4_binder *b, const g4_bind_row *rows, int n_rows, const char *prefix, int layer, void *owner)
{
    char name[128];
    for (int i = 0; i < n_rows; i++) {
        snprintf(name, sizeof name, "%s%s", prefix, rows[i].name);
        G4_TRY(g4_bind(b, &rows[i], name, layer, owner));
        if (b->copy_with && rows[i].kind == G4_BIND_CLIPPED)
            G4_TRY(copy_linear(b, (g4_clipped *)((char *)owner + rows[i].offset)));
    }
    return G4_OK;
}
