/* SPDX-License-Identifier: Apache-2.0 */
/* The table of encoder kinds, and passes over several media. */
#include "model/encoders/encoder.h"

#include <string.h>

#include "model/model.h"
#include "ops/profile.h"

/* Maximum rows per pass of several media: two images of 280 soft tokens (2,520 patches each). More only cost memory. */
enum { PASS_ROWS = 5120 };

/* ---- kinds ------------------------------------------------------------------------------------------------------- */

static const g4_kind_row *const kinds[] = {
    [G4_VISION_TOWER] = &g4_vision_tower,
    [G4_VISION_EMBEDDER] = &g4_vision_embedder,
    [G4_AUDIO_TOWER] = &g4_audio_tower,
    [G4_AUDIO_EMBEDDER] = &g4_audio_embedder,
};

const g4_kind_row *g4_kind_of(const g4_encoder_config *config)
{
    return kinds[config->kind];
}

bool g4_encoder_has_positions(const g4_encoder_config *config)
{
    return g4_kind_of(config)->positions;
}

int g4_encoder_soft_tokens(const g4_encoder_config *config, int n_rows)
{
    return g4_kind_of(config)->soft_tokens(config, n_rows);
}

int g4_encoder_site_shape(const g4_encoder_config *config, g4_site site, int n_rows, int64_t shape[G4_MAX_DIMS])
{
    const char *dims = g4_site_row_of(site)->dims;
    const int n_dims = (int)strlen(dims);
    for (int i = 0; i < n_dims; i++)
        shape[i] = g4_kind_of(config)->axis(config, dims[i], n_rows);
    return n_dims;
}

/* ---- the pass ---------------------------------------------------------------------------------------------------- */

static g4_status check_medium(const g4_encoder_config *c, const g4_medium *medium, int index, g4_error *err)
{
    const int pooled = c->pool ? c->pool * c->pool : 1;
    if (medium->n_rows < pooled || medium->n_rows % pooled || medium->n_rows > 1 << 20)
        return g4_fail(err, G4_EVALUE, "medium %d has %d rows, expected a multiple of %d, at most 1048576", index,
                       medium->n_rows, pooled);
    for (int i = 0; g4_encoder_has_positions(c) && i < medium->n_rows; i++)
        for (int axis = 0; axis < 2; axis++)
            if (medium->positions[2 * i + axis] < 0 || medium->positions[2 * i + axis] >= c->n_positions)
                return g4_fail(err, G4_EVALUE, "image %d: patch %d lies at %d, %d; each must be 0 to %d", index, i,
                               medium->positions[2 * i], medium->positions[2 * i + 1], c->n_positions - 1);
    return G4_OK;
}

static g4_status check_tap(const g4_encoder *e, const g4_medium *media, int n_media, const g4_tap *tap, int number,
                           g4_error *err)
{
    int64_t shape[G4_MAX_DIMS];
    if (tap->site < 0 || tap->site >= G4_N_SITES || !g4_encoder_site_exists(&e->config, tap->site, tap->layer) ||
        tap->run < 0 || tap->run >= n_media)
        return g4_fail(err, G4_EVALUE, "tap %d: no site %d in layer %d of medium %d", number, (int)tap->site,
                       tap->layer, tap->run);
    const int n_dims = g4_encoder_site_shape(&e->config, tap->site, media[tap->run].n_rows, shape);
    return g4_tap_check(tap, number, shape, n_dims, err);
}

static g4_status check(const g4_encoder *e, const g4_medium *media, int n_media, const g4_tap *taps, int n_taps,
                       g4_error *err)
{
    for (int m = 0; m < n_media; m++)
        G4_TRY(check_medium(&e->config, &media[m], m, err));
    for (int t = 0; t < n_taps; t++)
        G4_TRY(check_tap(e, media, n_media, &taps[t], t, err));
    return G4_OK;
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
        G4_TRY(g4_kind_of(p->config)->encode(p));
        G4_TRY(g4_guards_check(&p->encoder->guards, p->exec.err));
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
                                 .fast = encoder->model->precision == G4_FAST,
                                 .poll = poll,
                                 .poll_context = poll_context,
                                 .profile = profile,
                                 .err = err},
                        .encoder = encoder,
                        .config = &encoder->config,
                        .media = media};
    const double before = g4_profile_seconds(&p.exec), start = g4_profile_start(&p.exec);
    g4_status status = g4_taps_index(&p.exec, taps, n_taps, p.config->n_layers + 1, &p.taps);
    if (status == G4_OK)
        status = run_passes(&p, n_media);
    g4_profile_end_step(&p.exec, start, before);
    g4_model_give_scratch(encoder->model, arena);
    return status;
}
