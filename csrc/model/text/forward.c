/* SPDX-License-Identifier: Apache-2.0 */
/* What all parts of a forward pass share: the norm with its sites, and dropping rows. */
#include "model/text/forward.h"

#include <string.h>

#include "ops/rows.h"

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
    f->n_with_logits = 0;
    for (int row = 0; row < kept; row++)
        f->n_with_logits += f->logits_slot[row] >= 0;
}
