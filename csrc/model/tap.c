/* SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <string.h>

#include "model/config.h"
#include "model/text/forward.h"

static int *list_of(const g4_forward *f, g4_site site, int layer)
{
    return &f->taps.first[(int)site * f->config->n_layers + layer];
}

g4_status g4_taps_index(g4_forward *f, const g4_tap *taps, int n_taps)
{
    size_t n_lists = (size_t)G4_N_SITES * (size_t)f->config->n_layers;
    f->taps.taps = taps;
    f->taps.n_taps = n_taps;
    G4_ALLOC(&f->exec, f->taps.first, n_lists);
    G4_ALLOC(&f->exec, f->taps.next, (size_t)n_taps + 1);
    memset(f->taps.first, -1, n_lists * sizeof *f->taps.first);
    /* from the last to the first, so that each list is in the caller's order: hooks run as they were attached */
    for (int i = n_taps - 1; i >= 0; i--) {
        int *first = list_of(f, taps[i].site, taps[i].layer);
        f->taps.next[i] = *first;
        *first = i;
    }
    return G4_OK;
}

bool g4_tapped(const g4_forward *f, g4_site site, int layer)
{
    return f->taps.n_taps && *list_of(f, site, layer) >= 0;
}

static int dest_row(const g4_tap *tap, int row_in_run)
{
    return tap->rows ? tap->rows[row_in_run] : row_in_run;
}

static size_t row_bytes(const g4_forward *f, g4_site site, int layer)
{
    int64_t shape[G4_MAX_DIMS];
    int n_dims = g4_site_shape(f->config, site, layer, 1, 1, shape);
    size_t n_bytes = 4; /* float32 or int32 */
    for (int i = 1; i < n_dims; i++)
        n_bytes *= (size_t)shape[i];
    return n_bytes;
}

static void copy_rows(const g4_forward *f, const g4_tap *tap, const g4_segment *segment, const char *data,
                      size_t n_bytes)
{
    for (int i = 0; i < segment->n_rows; i++) {
        int row = dest_row(tap, f->row_in_run[segment->first_row + i]);
        if (row >= 0)
            memcpy((char *)tap->dest + (size_t)row * n_bytes, data + (size_t)i * n_bytes, n_bytes);
    }
}

g4_status g4_tap_rows(g4_forward *f, g4_site site, int layer, void *data)
{
    if (!f->taps.n_taps)
        return G4_OK;
    for (int i = *list_of(f, site, layer); i >= 0; i = f->taps.next[i]) {
        const g4_tap *tap = &f->taps.taps[i];
        if (f->segment_of_run[tap->run] < 0)
            continue;
        const g4_segment *segment = &f->segments[f->segment_of_run[tap->run]];
        size_t n_bytes = row_bytes(f, site, layer);
        char *rows = (char *)data + (size_t)segment->first_row * n_bytes;
        int64_t shape[G4_MAX_DIMS];
        int n_dims = g4_site_shape(f->config, site, layer, segment->n_rows, segment->end_position, shape);
        if (!tap->edit)
            copy_rows(f, tap, segment, rows, n_bytes);
        else if (segment->n_rows)
            G4_TRY(tap->edit(tap->context, rows, shape, n_dims, f->exec.err));
    }
    return G4_OK;
}

/* [H, T, n_keys] of a chunk into [H, rows kept, keys of the whole sequence]; later keys are masked to these queries. */
static void copy_attention(const g4_forward *f, const g4_tap *tap, const g4_segment *segment, const float *data,
                           int n_keys)
{
    const int n_all = f->run_start[tap->run] + f->runs[tap->run].n_rows;
    const float masked = tap->site == G4_SITE_ATTN_SCORES ? -INFINITY : 0;
    for (int h = 0; h < f->config->n_heads; h++) {
        for (int i = 0; i < segment->n_rows; i++) {
            int row = dest_row(tap, f->row_in_run[segment->first_row + i]);
            if (row < 0)
                continue;
            float *to = (float *)tap->dest + ((size_t)h * (size_t)tap->n_dest_rows + (size_t)row) * (size_t)n_all;
            memcpy(to, data + ((size_t)h * (size_t)segment->n_rows + (size_t)i) * (size_t)n_keys,
                   (size_t)n_keys * sizeof *to);
            for (int j = n_keys; j < n_all; j++)
                to[j] = masked;
        }
    }
}

static int first_visible(const g4_forward *f, int layer, const g4_segment *segment)
{
    int window = f->config->layers[layer].window;
    return window && segment->first_position >= window ? segment->first_position - window + 1 : 0;
}

g4_status g4_tap_keys(g4_forward *f, g4_site site, int layer, const g4_segment *segment, float *data, int n_keys)
{
    const bool attention = site == G4_SITE_ATTN_SCORES || site == G4_SITE_PATTERN;
    int64_t shape[G4_MAX_DIMS];
    int n_dims = g4_site_shape(f->config, site, layer, segment->n_rows, n_keys, shape);
    for (int i = *list_of(f, site, layer); i >= 0; i = f->taps.next[i]) {
        const g4_tap *tap = &f->taps.taps[i];
        if (tap->run != segment->run)
            continue;
        if (tap->edit) {
            G4_TRY(tap->edit(tap->context, data, shape, n_dims, f->exec.err));
        } else if (attention) {
            copy_attention(f, tap, segment, data, n_keys);
        } else {
            size_t n_bytes = (size_t)shape[1] * (size_t)shape[2] * sizeof(float);
            size_t first = (size_t)first_visible(f, layer, segment);
            memcpy((char *)tap->dest + first * n_bytes, (char *)data + first * n_bytes,
                   ((size_t)n_keys - first) * n_bytes);
        }
    }
    return G4_OK;
}

/* Sites of a layer that are announced before its queries: all positions pass them even in the last layer with keys. */
static bool is_before_queries(g4_site site)
{
    switch (site) {
    case G4_SITE_RESID_PRE:
    case G4_SITE_LN1_SCALE:
    case G4_SITE_LN1_NORMALIZED:
    case G4_SITE_LN1_OUT:
    case G4_SITE_K:
    case G4_SITE_V:
    case G4_SITE_K_NORMED:
    case G4_SITE_V_NORMED:
    case G4_SITE_ROT_K: return true;
    default: return false;
    }
}

static bool is_keys_used(g4_site site)
{
    return site == G4_SITE_K_USED || site == G4_SITE_V_USED;
}

static bool needs_rows_above(const g4_tap *tap, int last_kv_layer)
{
    if (!g4_site_is_per_layer(tap->site))
        return tap->site >= G4_SITE_FINAL_SCALE;
    if (is_keys_used(tap->site))
        return false;
    return tap->layer > last_kv_layer || (tap->layer == last_kv_layer && !is_before_queries(tap->site));
}

void g4_taps_mark_wanted(g4_forward *f, int last_kv_layer)
{
    for (int row = 0; row < f->n_rows; row++)
        f->wanted[row] = f->logits_slot[row] >= 0;
    for (int t = 0; t < f->taps.n_taps; t++) {
        const g4_tap *tap = &f->taps.taps[t];
        int s = f->segment_of_run[tap->run];
        if (s < 0 || !needs_rows_above(tap, last_kv_layer))
            continue;
        for (int i = 0; i < f->segments[s].n_rows; i++) {
            int row = f->segments[s].first_row + i;
            f->wanted[row] |= tap->edit || dest_row(tap, f->row_in_run[row]) >= 0;
        }
    }
}

bool g4_taps_want_keys(const g4_forward *f, int layer)
{
    for (int t = 0; t < f->taps.n_taps; t++)
        if (is_keys_used(f->taps.taps[t].site) && f->taps.taps[t].layer >= layer)
            return true;
    return false;
}
