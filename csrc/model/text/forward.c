/* SPDX-License-Identifier: Apache-2.0 */
/* Parts shared by the forward pass: announcing sites, norms with their two sites, and pruning rows. */
#include "model/text/forward.h"

#include <string.h>

#include "model/config.h"
#include "ops/rows.h"

/* ---- sites ------------------------------------------------------------------------------------------------------- */

bool g4_tapped(const g4_forward *f, g4_site site, int layer)
{
    return g4_taps_first(&f->taps, site, layer) >= 0;
}

/* Fails if a site's row in sites.inc names the wrong side of pruning: captures would be slow or incomplete. */
static g4_status check_row(const g4_forward *f, g4_site site, int layer)
{
    char name[G4_SITE_NAME];
    const g4_site_row *row = g4_site_row_of(site);
    if (row->after_pruning == f->pruned || (g4_site_is_per_layer(site) && layer != g4_last_kv_layer(f->config)))
        return G4_OK;
    g4_site_name(site, layer, name);
    return g4_fail(f->exec.err, G4_ESTATE,
                   "%s is announced %s rows are pruned, but its row in csrc/model/sites.inc says %s", name,
                   f->pruned ? "after" : "before", row->after_pruning ? "AFTER" : "BEFORE");
}

/* The segment's rows of an array [T, ...]. */
static g4_part rows_of_segment(const g4_forward *f, g4_site site, int layer, const g4_segment *segment, void *data)
{
    g4_part part = {.row_in_run = f->row_in_run + segment->first_row};
    size_t row_bytes = sizeof(float); /* or of int32_t */
    part.n_dims = g4_site_shape(f->config, site, layer, segment->n_rows, 0, part.shape);
    for (int i = 1; i < part.n_dims; i++)
        row_bytes *= (size_t)part.shape[i];
    part.data = (char *)data + (size_t)segment->first_row * row_bytes;
    return part;
}

g4_status g4_tap_rows(g4_forward *f, g4_site site, int layer, void *data)
{
    int i = g4_taps_first(&f->taps, site, layer);
    if (i < 0)
        return G4_OK;
    G4_TRY(check_row(f, site, layer));
    for (; i >= 0; i = f->taps.next[i]) {
        const g4_tap *tap = &f->taps.taps[i];
        const int segment = f->segment_of_run[tap->run];
        if (segment < 0)
            continue;
        const g4_part part = rows_of_segment(f, site, layer, &f->segments[segment], data);
        G4_TRY(g4_tap_act(&f->exec, tap, &part));
    }
    return G4_OK;
}

static void visible_keys(const void *context, int row, int *first, int *end)
{
    const g4_attention *run = context;
    *first = g4_first_key(run, row);
    *end = g4_end_key(run, row);
}

static int first_visible(const g4_forward *f, int layer, const g4_segment *segment)
{
    int window = f->config->layers[layer].window;
    return window && segment->first_position >= window ? segment->first_position - window + 1 : 0;
}

g4_status g4_tap_keys(g4_forward *f, g4_site site, int layer, const g4_segment *segment, const g4_attention *run,
                      float *data)
{
    int i = g4_taps_first(&f->taps, site, layer);
    if (i < 0)
        return G4_OK;
    G4_TRY(check_row(f, site, layer));
    const g4_visible visible = {visible_keys, run};
    g4_part part = {.data = data,
                    .row_in_run = f->row_in_run + segment->first_row,
                    .first_key = first_visible(f, layer, segment),
                    .n_all_keys = f->run_start[segment->run] + f->runs[segment->run].n_rows,
                    .visible = g4_site_row_of(site)->keys == G4_KEYS_CACHED ? NULL : &visible};
    part.n_dims = g4_site_shape(f->config, site, layer, segment->n_rows, run->n_keys, part.shape);
    bool changed = false;
    for (; i >= 0; i = f->taps.next[i]) {
        if (f->taps.taps[i].run != segment->run)
            continue;
        changed = changed || f->taps.taps[i].kind != G4_TAP_COPY;
        G4_TRY(g4_tap_act(&f->exec, &f->taps.taps[i], &part));
    }
    return changed ? g4_tap_check_keys_left(&f->exec, site, layer, &part, run->positions) : G4_OK;
}

static bool is_cached_keys(g4_site site)
{
    return g4_site_row_of(site)->keys == G4_KEYS_CACHED;
}

/* Whether the tap keeps its rows from being pruned. Taps of cached keys need no rows. */
static bool needs_rows_above(const g4_tap *tap, int last_kv_layer)
{
    if (!g4_tap_needs_rows(tap) || is_cached_keys(tap->site))
        return false;
    const bool after = g4_site_row_of(tap->site)->after_pruning;
    if (!g4_site_is_per_layer(tap->site))
        return after;
    return tap->layer > last_kv_layer || (tap->layer == last_kv_layer && after);
}

void g4_taps_mark_wanted(g4_forward *f)
{
    const int last_kv_layer = g4_last_kv_layer(f->config);
    for (int row = 0; row < f->n_rows; row++)
        f->wanted[row] = f->logits_slot[row] >= 0;
    for (int t = 0; t < f->taps.n_taps; t++) {
        const g4_tap *tap = &f->taps.taps[t];
        int s = f->segment_of_run[tap->run];
        if (s < 0 || !needs_rows_above(tap, last_kv_layer))
            continue;
        for (int i = 0; i < f->segments[s].n_rows; i++) {
            int row = f->segments[s].first_row + i;
            f->wanted[row] |= g4_tap_row(tap, f->row_in_run[row]) >= 0;
        }
    }
}

bool g4_taps_want_keys(const g4_forward *f, int layer)
{
    for (int t = 0; t < f->taps.n_taps; t++)
        if (is_cached_keys(f->taps.taps[t].site) && g4_tap_needs_rows(&f->taps.taps[t]) &&
            f->taps.taps[t].layer >= layer)
            return true;
    return false;
}

/* ---- norm and pruning -------------------------------------------------------------------------------------------- */

g4_status g4_norm(g4_forward *f, int layer, g4_norm_sites sites, const float *gain, const float *x, float *out)
{
    const int d = f->config->d_model;
    const float eps = f->config->rms_norm_eps;
    if (sites.scale == G4_N_SITES || (!g4_tapped(f, sites.scale, layer) && !g4_tapped(f, sites.normalized, layer)))
        return g4_rms_norm(&f->exec, x, gain, f->n_rows, d, eps, out);
    float *scale;
    G4_ALLOC(&f->exec, scale, (size_t)f->n_rows);
    G4_TRY(g4_rms_scale(&f->exec, x, f->n_rows, d, eps, scale));
    G4_TRY(g4_tap_rows(f, sites.scale, layer, scale));
    G4_TRY(g4_normalize(&f->exec, x, scale, f->n_rows, d, out));
    G4_TRY(g4_tap_rows(f, sites.normalized, layer, out));
    return g4_scale_rows(&f->exec, out, 1.0f, gain, f->n_rows, d, out);
}

static void move_row(float *array, size_t width, int to, int from)
{
    if (array)
        memmove(array + (size_t)to * width, array + (size_t)from * width, width * sizeof *array);
}

static void keep_row(g4_forward *f, int to, int from, float *also)
{
    const g4_config *c = f->config;
    f->positions[to] = f->positions[from];
    f->row_in_run[to] = f->row_in_run[from];
    f->logits_slot[to] = f->logits_slot[from];
    if (f->ends)
        f->ends[to] = f->ends[from];
    move_row(f->resid, (size_t)c->d_model, to, from);
    move_row(also, (size_t)c->d_model, to, from);
    move_row(f->ple, (size_t)c->n_layers * (size_t)c->d_ple, to, from);
    for (int r = 0; r < c->n_ropes; r++) {
        move_row(f->cosine[r], (size_t)c->rope_half[r], to, from);
        move_row(f->sine[r], (size_t)c->rope_half[r], to, from);
    }
}

void g4_forward_prune(g4_forward *f, float *also)
{
    int kept = 0;
    for (int s = 0; s < f->n_segments; s++) {
        g4_segment *segment = &f->segments[s];
        int first = segment->first_row, end = first + segment->n_rows;
        segment->first_row = kept;
        for (int row = first; row < end; row++) {
            if (!f->wanted[row])
                continue;
            if (kept != row)
                keep_row(f, kept, row, also);
            kept++;
        }
        segment->n_rows = kept - segment->first_row;
    }
    f->n_rows = kept;
    f->pruned = true;
    f->n_with_logits = 0;
    for (int row = 0; row < kept; row++)
        f->n_with_logits += f->logits_slot[row] >= 0;
}
