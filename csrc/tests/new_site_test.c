/* SPDX-License-Identifier: Apache-2.0 */
/* Sites added by the documented steps (new_site.cmake). One declares pruning correctly: it is complete and costs what
 * its row says. One declares the wrong side of pruning: it fails the pass that reads it. Exit status 0: all passed. */
#include <stdlib.h>
#include <string.h>

#include "tests/csrc_test.h"

enum { N_TOKENS = 23, LAST_KV_LAYER = 3 };

atomic_int n_checks, n_failed;

static int32_t tokens[N_TOKENS];

/* Rows that pass o_proj in all layers, for a prompt with logits of its last row only. */
static double rows_computed(g4_model *model, const g4_tap *taps, int n_taps, g4_status *status, g4_error *err)
{
    static float logits[VOCAB];
    const int32_t last = N_TOKENS - 1;
    g4_sequence *seq = NULL;
    g4_profile profile = {0};
    CHECK(g4_sequence_new(model, G4_F32, 0, &seq, err) == G4_OK);
    const g4_run run = {
        .seq = seq, .n_rows = N_TOKENS, .tokens = tokens, .logits_rows = &last, .n_logits = 1, .logits = logits};
    const g4_step_options options = {.stop_at_layer = -1, .profile = &profile};
    *status = g4_step(model, &run, 1, taps, n_taps, &options, err);
    g4_sequence_free(seq);
    return profile.ops[G4_OP_O].work;
}

static double rows_for(g4_model *model, const g4_tap *tap)
{
    g4_status status;
    g4_error err = {0};
    const double rows = rows_computed(model, tap, 1, &status, &err);
    CHECK(status == G4_OK);
    return rows;
}

/* A capture of all rows holds the same as the site `beside`. */
static void check_complete(g4_model *model, g4_site site, g4_site beside)
{
    static float got[N_TOKENS * D], expected[N_TOKENS * D];
    g4_status status;
    g4_error err = {0};
    memset(got, 0, sizeof got);
    const g4_tap tap = {.site = site, .layer = LAST_KV_LAYER, .dest = got, .n_dest_rows = N_TOKENS};
    const g4_tap other = {.site = beside, .layer = LAST_KV_LAYER, .dest = expected, .n_dest_rows = N_TOKENS};
    rows_for(model, &tap);
    rows_computed(model, &other, 1, &status, &err);
    CHECK(status == G4_OK && memcmp(got, expected, sizeof got) == 0);
}

static void test_honest_rows(g4_model *model)
{
    static float dest[N_TOKENS * D];
    int32_t last[N_TOKENS];
    const g4_tap none = {.site = G4_SITE_EMBED, .dest = dest, .n_dest_rows = N_TOKENS};
    const double pruned = rows_for(model, &none);
    g4_tap tap = {.site = G4_SITE_NEW_BEFORE, .layer = LAST_KV_LAYER, .dest = dest, .n_dest_rows = N_TOKENS};
    CHECK(rows_for(model, &tap) == pruned);
    tap.site = G4_SITE_NEW_AFTER;
    CHECK(rows_for(model, &tap) > 1.5 * pruned);
    for (int i = 0; i < N_TOKENS; i++)
        last[i] = i == N_TOKENS - 1 ? 0 : -1;
    tap.rows = last;
    CHECK(rows_for(model, &tap) == pruned);
    check_complete(model, G4_SITE_NEW_BEFORE, G4_SITE_RESID_PRE);
    check_complete(model, G4_SITE_NEW_AFTER, G4_SITE_RESID_MID);
}

static void check_lie(g4_model *model, g4_site site, const char *said)
{
    static float dest[N_TOKENS * D];
    g4_status status;
    g4_error err = {0};
    g4_tap tap = {.site = site, .layer = LAST_KV_LAYER, .dest = dest, .n_dest_rows = N_TOKENS};
    rows_computed(model, &tap, 1, &status, &err);
    CHECK(status == G4_ESTATE && strstr(err.message, g4_site_row_of(site)->name + strlen("blocks.{}.")) &&
          strstr(err.message, said));
    tap.layer = 1; /* this layer prunes nothing */
    rows_for(model, &tap);
}

static g4_status leave_it(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    (void)context, (void)data, (void)shape, (void)n_dims, (void)err;
    return G4_OK;
}

static void test_read_only(g4_model *model)
{
    static float dest[N_TOKENS * D];
    g4_status status;
    g4_error err = {0};
    for (int kind = 0; kind < G4_N_TAP_KINDS; kind++) {
        const g4_tap tap = {.kind = (g4_tap_kind)kind,
                            .site = G4_SITE_NEW_READ,
                            .layer = LAST_KV_LAYER,
                            .dest = dest,
                            .n_dest_rows = N_TOKENS,
                            .call = leave_it,
                            .edit = {.values = dest, .n_values = D, .stride = {0, 1}, .factor = 1, .high = 1}};
        rows_computed(model, &tap, 1, &status, &err);
        CHECK(kind == G4_TAP_COPY ? status == G4_OK
                                  : status == G4_EVALUE && strstr(err.message, "blocks.3.NEW_READ can be read"));
    }
}

int main(void)
{
    static fixture f;
    fixture_init(&f);
    for (int i = 0; i < N_TOKENS; i++)
        tokens[i] = (i * 17 + i * i) % VOCAB;
    g4_model *model = new_model(&f, 1);
    test_honest_rows(model);
    check_lie(model, G4_SITE_LIES_BEFORE, "says BEFORE");
    check_lie(model, G4_SITE_LIES_AFTER, "says AFTER");
    test_read_only(model);
    g4_model_free(model);
    fixture_free(&f);
    printf("%d passed, %d failed\n", n_checks - n_failed, n_failed);
    return n_failed != 0;
}
