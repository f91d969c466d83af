/* SPDX-License-Identifier: Apache-2.0 */
/* Taps: every kind of edit against a plain computation, which a G4_TAP_CALL does element by element on whole runs. The
 * engine must give the same bits in chunks, with pruned rows and in continued sequences, and refuse invalid edits. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/csrc_test.h"

enum { N_TOKENS = 37, PREFIX = 14, N_VALUES = 1 << 14 };

static const g4_tap_kind EDITS[] = {G4_TAP_ADD, G4_TAP_SCALE, G4_TAP_SET, G4_TAP_PROJECT_OUT, G4_TAP_CLAMP};
enum { N_EDITS = 5, N_VARIANTS = 4 * N_EDITS };

static int32_t tokens[N_TOKENS], all_rows[N_TOKENS];
static float values[N_VALUES];

/* ---- the plain computation --------------------------------------------------------------------------------------- */

typedef struct {
    const g4_tap *tap;
    bool (*sees)(const void *context, int row, int key); /* for scores and patterns */
    const void *context;
    int n_calls;
} plain;

/* The new value of the element at idx, or NULL if the edit does not change it. */
static const float *value_of(const plain *p, const int64_t *idx, int n_dims)
{
    static const float none = 0;
    const g4_edit *e = &p->tap->edit;
    const int row_axis = g4_site_row_axis(p->tap->site);
    const g4_site_keys keys = g4_site_row_of(p->tap->site)->keys;
    int64_t at = 0;
    for (int axis = 0; axis < n_dims; axis++) {
        int64_t index = idx[axis];
        if (axis == row_axis) {
            index = p->tap->rows ? p->tap->rows[index] : index;
            if (index < 0)
                return NULL;
        } else if (e->span[axis].end) {
            if (index < e->span[axis].first || index >= e->span[axis].end)
                return NULL;
            index -= e->span[axis].first;
        }
        at += index * e->stride[axis];
    }
    if ((keys == G4_KEYS_SCORES || keys == G4_KEYS_PATTERN) &&
        !p->sees(p->context, (int)idx[row_axis], (int)idx[n_dims - 1]))
        return NULL;
    return e->values ? &e->values[at] : &none;
}

/* The plain edit of the vector along the last axis through idx. */
static void plain_vector(const plain *p, float *x, int64_t *idx, const int64_t *shape, int n_dims)
{
    const g4_edit *e = &p->tap->edit;
    double dot = 0, norm = 0;
    int64_t *j = &idx[n_dims - 1];
    const int64_t n = shape[n_dims - 1];
    for (*j = 0; *j < n; ++*j) {
        const float *v = value_of(p, idx, n_dims);
        dot += v ? (double)x[*j] * (double)*v : 0;
        norm += v ? (double)*v * (double)*v : 0;
    }
    for (*j = 0; *j < n; ++*j) {
        const float *v = value_of(p, idx, n_dims);
        if (!v)
            continue;
        float *to = &x[*j];
        switch (p->tap->kind) {
        case G4_TAP_ADD: *to = *to + e->factor * *v; break;
        case G4_TAP_SCALE: *to = *to * e->factor; break;
        case G4_TAP_SET: *to = *v; break;
        case G4_TAP_PROJECT_OUT: *to = norm == 0 ? *to : *to - (float)((double)e->factor * dot / norm) * *v; break;
        default: *to = fminf(fmaxf(*to, e->low), e->high);
        }
    }
}

static g4_status plain_edit(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    plain *p = context;
    int64_t idx[G4_MAX_DIMS] = {0}, n_vectors = 1;
    (void)err;
    p->n_calls++;
    for (int axis = 0; axis + 1 < n_dims; axis++)
        n_vectors *= shape[axis];
    for (int64_t i = 0; i < n_vectors; i++) {
        int64_t left = i;
        for (int axis = n_dims - 2; axis >= 0; axis--) {
            idx[axis] = left % shape[axis];
            left /= shape[axis];
        }
        plain_vector(p, (float *)data + i * shape[n_dims - 1], idx, shape, n_dims);
    }
    return G4_OK;
}

/* ---- edits to try ------------------------------------------------------------------------------------------------ */

static int32_t chosen[1 << 10];

/* One of N_VARIANTS edits of a site. All kinds; all rows with one vector along the last axis, or every third row with
 * its own values; the whole of the other axes, or an inner part. */
static g4_tap make_tap(g4_site site, int layer, int variant, const int64_t *shape, int n_dims)
{
    const bool by_row = variant / N_EDITS % 2, inside = variant / N_EDITS / 2;
    g4_tap tap = {.kind = EDITS[variant % N_EDITS], .site = site, .layer = layer};
    g4_edit *e = &tap.edit;
    const int row_axis = g4_site_row_axis(site);
    int64_t size[G4_MAX_DIMS], n = 1;
    *e = (g4_edit){.values = values, .factor = 0.75f, .low = -0.2f, .high = 0.3f};
    for (int axis = 0; axis < n_dims; axis++) {
        size[axis] = shape[axis];
        if (axis == row_axis) {
            if (!by_row)
                continue;
            size[axis] = 0;
            for (int i = 0; i < shape[axis]; i++)
                chosen[i] = i % 3 ? -1 : (int32_t)size[axis]++;
            tap.rows = chosen;
        } else if (inside && shape[axis] > 1) {
            const int first = (int)shape[axis] / 3;
            e->span[axis] = (g4_span){first, first + 1 + (int)(shape[axis] - first) / 2};
            size[axis] = e->span[axis].end - first;
        }
    }
    for (int axis = n_dims - 1; axis >= 0; axis--) {
        e->stride[axis] = by_row || axis == n_dims - 1 ? n : 0;
        n *= size[axis];
    }
    e->n_values = N_VALUES;
    if (g4_site_row_of(site)->keys == G4_KEYS_PATTERN)
        e->low = 0.1f;
    return tap;
}

/* ---- the text model ---------------------------------------------------------------------------------------------- */

typedef struct {
    const g4_config *config;
    int layer, first_position;
} text_run;

static bool sees_position(const void *context, int row, int key)
{
    const text_run *r = context;
    const int position = r->first_position + row, window = r->config->layers[r->layer].window;
    return key <= position && (!window || position - key < window);
}

/* Runs the prompt's tokens from `prefix` on, after the tokens before it. Logits are of the last n_logits rows. */
static g4_status run_text(g4_model *model, int prefix, const g4_tap *taps, int n_taps, int chunk, int n_logits,
                          float *logits, g4_error *err)
{
    g4_sequence *seq = new_sequence_of(model);
    const int n = N_TOKENS - prefix;
    const g4_run before = {.seq = seq, .n_rows = prefix, .tokens = tokens};
    const g4_run run = {.seq = seq,
                        .n_rows = n,
                        .tokens = tokens + prefix,
                        .logits_rows = all_rows + n - n_logits,
                        .n_logits = n_logits,
                        .logits = logits};
    const g4_step_options options = {.stop_at_layer = -1, .max_chunk = chunk};
    g4_status status = prefix ? g4_step(model, &before, 1, NULL, 0, &options, err) : G4_OK;
    if (status == G4_OK)
        status = g4_step(model, &run, 1, taps, n_taps, &options, err);
    CHECK(g4_sequence_length(seq) == (status == G4_OK ? N_TOKENS : prefix));
    g4_sequence_free(seq);
    return status;
}

static bool same(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Whether the edit changed the logits. They must be the same in chunks, and with only the last row kept. */
static bool check_text_edit(g4_model *model, g4_tap tap, int prefix, const float *unedited)
{
    static float expected[N_TOKENS * VOCAB], got[N_TOKENS * VOCAB];
    g4_error err = {0};
    const int n = N_TOKENS - prefix;
    const text_run position = {g4_model_config(model), tap.layer, prefix};
    plain p = {&tap, sees_position, &position, 0};
    const g4_tap call = {.kind = G4_TAP_CALL, .site = tap.site, .layer = tap.layer, .call = plain_edit, .context = &p};
    CHECK(run_text(model, prefix, &call, 1, 0, n, expected, &err) == G4_OK && p.n_calls == 1);
    CHECK(run_text(model, prefix, &tap, 1, 5, n, got, &err) == G4_OK);
    CHECK(same(got, expected, (size_t)n * VOCAB));
    CHECK(run_text(model, prefix, &tap, 1, 16, 1, got, &err) == G4_OK);
    CHECK(same(got, expected + (size_t)(n - 1) * VOCAB, VOCAB));
    return !same(expected, unedited, (size_t)n * VOCAB);
}

/* Layers 1 and 4 slide over 5 positions; 2 and 5 are global. 3 is the last layer that computes keys, and it prunes
 * rows. */
static void test_text_edits(g4_model *model)
{
    static const struct {
        g4_site site;
        int layer;
    } sites[] = {
        {G4_SITE_EMBED, 0},       {G4_SITE_PLE_TOKEN, 0},   {G4_SITE_RESID_PRE, 3},  {G4_SITE_LN1_SCALE, 3},
        {G4_SITE_K, 3},           {G4_SITE_ROT_Q, 3},       {G4_SITE_Z, 1},          {G4_SITE_RESULT, 3},
        {G4_SITE_ATTN_SCORES, 1}, {G4_SITE_ATTN_SCORES, 2}, {G4_SITE_PATTERN, 4},    {G4_SITE_PATTERN, 5},
        {G4_SITE_K_USED, 2},      {G4_SITE_V_USED, 4},      {G4_SITE_MLP_POST, 3},   {G4_SITE_ROUTER_LOGITS, 2},
        {G4_SITE_EXPERT_OUT, 4},  {G4_SITE_PLE_GATED, 5},   {G4_SITE_RESID_POST, 5}, {G4_SITE_FINAL_OUT, 0},
        {G4_SITE_LOGITS, 0}};
    static float unedited[N_TOKENS * VOCAB];
    g4_error err = {0};
    int64_t shape[G4_MAX_DIMS];
    for (int prefix = 0; prefix <= PREFIX; prefix += PREFIX) {
        CHECK(run_text(model, prefix, NULL, 0, 0, N_TOKENS - prefix, unedited, &err) == G4_OK);
        for (size_t s = 0; s < sizeof sites / sizeof *sites; s++) {
            const int n_dims = g4_site_shape(g4_model_config(model), sites[s].site, sites[s].layer, N_TOKENS - prefix,
                                             N_TOKENS, shape);
            int n_changed = 0; /* not all: values may lie within the clamp's bounds; a pattern of one key stays 1 */
            for (int i = 0; i < N_VARIANTS; i++)
                n_changed +=
                    check_text_edit(model, make_tap(sites[s].site, sites[s].layer, i, shape, n_dims), prefix, unedited);
            CHECK(n_changed >= N_VARIANTS - 4);
        }
    }
}

/* Copies between edits of one site each show the result of the edits before them. */
static void test_order(g4_model *model)
{
    static float before[N_TOKENS * D], added[N_TOKENS * D], scaled[N_TOKENS * D], logits[VOCAB];
    g4_error err = {0};
    const g4_tap copy = {.site = G4_SITE_RESID_MID, .layer = 4, .n_dest_rows = N_TOKENS};
    g4_tap taps[] = {copy, copy, copy, copy, copy};
    taps[0].dest = before, taps[2].dest = added, taps[4].dest = scaled;
    taps[1] = (g4_tap){.kind = G4_TAP_ADD,
                       .site = copy.site,
                       .layer = 4,
                       .edit = {.values = values, .n_values = D, .stride = {0, 1}, .factor = 2}};
    taps[3] = (g4_tap){.kind = G4_TAP_SCALE, .site = copy.site, .layer = 4, .edit = {.factor = -3}};
    CHECK(run_text(model, 0, taps, 5, 6, 1, logits, &err) == G4_OK);
    bool right = true;
    for (int i = 0; i < N_TOKENS * D; i++)
        right = right && added[i] == before[i] + 2 * values[i % D] && scaled[i] == -3 * added[i];
    CHECK(right);
}

/* A copy from one run is set in another run of the same length; from there on both are equal. */
static void test_patch_from_a_copy(g4_model *model)
{
    static float kept[4 * D], clean[N_TOKENS * VOCAB], patched[N_TOKENS * VOCAB], stream[N_TOKENS * D];
    g4_error err = {0};
    int32_t rows[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++)
        rows[i] = i >= N_TOKENS - 4 ? i - (N_TOKENS - 4) : -1;
    const g4_tap copy = {.site = G4_SITE_RESID_POST, .layer = 4, .rows = rows, .dest = kept, .n_dest_rows = 4};
    const g4_edit patch = {.values = kept, .n_values = 4 * D, .stride = {D, 1}};
    const g4_tap taps[] = {{.kind = G4_TAP_SCALE, .site = G4_SITE_RESID_POST, .layer = 4, .edit = {.factor = 5}},
                           {.kind = G4_TAP_SET, .site = G4_SITE_RESID_POST, .layer = 4, .rows = rows, .edit = patch},
                           {.site = G4_SITE_RESID_POST, .layer = 4, .dest = stream, .n_dest_rows = N_TOKENS}};
    CHECK(run_text(model, 0, &copy, 1, 0, N_TOKENS, clean, &err) == G4_OK);
    CHECK(run_text(model, 0, taps, 3, 7, N_TOKENS, patched, &err) == G4_OK);
    const size_t at = (size_t)(N_TOKENS - 4);
    CHECK(same(patched + at * VOCAB, clean + at * VOCAB, 4 * VOCAB) && !same(patched, clean, at * VOCAB));
    CHECK(same(stream + at * D, kept, 4 * D));
}

static g4_status leave_alone(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    (void)context, (void)data, (void)shape, (void)n_dims, (void)err;
    return G4_OK;
}

/* A copy from one run of a step is set in a later run, however they are cut into chunks. The call keeps the run that is
 * copied in one piece, for which the first chunk has no room. */
static void test_patch_within_a_step(g4_model *model)
{
    static float kept[N_TOKENS * D], alone[N_TOKENS * VOCAB], got[N_TOKENS * VOCAB];
    static int32_t reversed[N_TOKENS];
    g4_error err = {0};
    for (int i = 0; i < N_TOKENS; i++)
        reversed[i] = tokens[N_TOKENS - 1 - i];
    const g4_edit patch = {.values = kept, .n_values = N_TOKENS * D, .stride = {D, 1}};
    g4_tap taps[3];
    for (int i = 0; i < 3; i++)
        taps[i] = (g4_tap){.site = G4_SITE_RESID_POST, .layer = 4, .run = i < 2 ? 1 : 2};
    taps[0].kind = G4_TAP_CALL, taps[0].call = leave_alone;
    taps[1].dest = kept, taps[1].n_dest_rows = N_TOKENS;
    taps[2].kind = G4_TAP_SET, taps[2].edit = patch;
    for (int chunk = 0; chunk < 30; chunk += 5) {
        g4_sequence *seqs[] = {new_sequence_of(model), new_sequence_of(model), new_sequence_of(model)};
        const g4_run runs[] = {
            {seqs[0], .n_rows = 3, .tokens = tokens},
            {seqs[1], .n_rows = N_TOKENS, .tokens = reversed},
            {seqs[2], N_TOKENS, tokens, .logits_rows = all_rows, .n_logits = N_TOKENS, .logits = got},
        };
        const g4_step_options options = {.stop_at_layer = -1, .max_chunk = chunk, .in_order = true};
        memset(kept, 0, sizeof kept);
        CHECK(g4_step(model, runs, 3, taps, 3, &options, &err) == G4_OK);
        const g4_tap set = {.kind = G4_TAP_SET, .site = G4_SITE_RESID_POST, .layer = 4, .edit = patch};
        CHECK(run_text(model, 0, &set, 1, 0, N_TOKENS, alone, &err) == G4_OK);
        CHECK(same(got, alone, N_TOKENS * VOCAB));
        for (int i = 0; i < 3; i++)
            g4_sequence_free(seqs[i]);
    }
}

/* Unlike calls, edits neither keep rows that no output needs nor hold chunks together. */
static void test_cost_of_edits(g4_model *model)
{
    static float logits[VOCAB];
    const int32_t last = N_TOKENS - 1;
    plain p = {0};
    const g4_edit add = {.values = values, .n_values = D, .stride = {0, 1}, .factor = 1};
    g4_tap taps[] = {{.kind = G4_TAP_ADD, .site = G4_SITE_RESID_POST, .layer = 5, .edit = add},
                     {.kind = G4_TAP_CALL, .site = G4_SITE_RESID_POST, .layer = 5, .call = plain_edit, .context = &p}};
    g4_op_total cost[3];
    p.tap = &taps[0];
    for (int i = 0; i < 3; i++) {
        g4_error err = {0};
        g4_profile profile = {0};
        const g4_step_options options = {.stop_at_layer = -1, .max_chunk = 10, .profile = &profile};
        g4_sequence *seq = new_sequence_of(model);
        const g4_run run = {
            .seq = seq, .n_rows = N_TOKENS, .tokens = tokens, .logits_rows = &last, .n_logits = 1, .logits = logits};
        CHECK(g4_step(model, &run, 1, &taps[i ? i - 1 : 0], i > 0, &options, &err) == G4_OK);
        cost[i] = profile.ops[G4_OP_GATE_UP];
        g4_sequence_free(seq);
    }
    CHECK(cost[1].work == cost[0].work && cost[1].calls == cost[0].calls);
    CHECK(cost[2].work > cost[0].work && cost[2].calls < cost[0].calls);
}

/* ---- refusals ---------------------------------------------------------------------------------------------------- */

static bool refused(g4_model *model, const g4_tap *tap, const char *reason)
{
    static float logits[VOCAB];
    g4_error err = {0};
    const g4_status status = run_text(model, 0, tap, 1, 0, 1, logits, &err);
    if (status == G4_EVALUE && strstr(err.message, reason))
        return true;
    printf("expected \"%s\", got status %d: %s\n", reason, (int)status, err.message);
    return false;
}

static void test_refusals(g4_model *model)
{
    static float bad[D];
    const g4_tap good = {.kind = G4_TAP_ADD,
                         .site = G4_SITE_RESID_POST,
                         .layer = 1,
                         .edit = {.values = values, .n_values = D, .stride = {0, 1}, .factor = 1}};
    g4_tap tap = good;
    tap.site = G4_SITE_EXPERT_IDS, tap.layer = 0;
    for (int i = 0; i < N_EDITS; i++) {
        tap.kind = EDITS[i];
        CHECK(refused(model, &tap, "blocks.0.moe.hook_expert_ids holds int32"));
    }
    tap = good, tap.kind = G4_N_TAP_KINDS;
    CHECK(refused(model, &tap, "no kind"));
    tap = good, tap.kind = G4_TAP_COPY;
    CHECK(refused(model, &tap, "no destination"));
    tap = good, tap.kind = G4_TAP_CALL;
    CHECK(refused(model, &tap, "no function"));
    tap = good, tap.edit.values = NULL;
    CHECK(refused(model, &tap, "no values"));
    tap = good, tap.edit.n_values = D - 1;
    CHECK(refused(model, &tap, "beyond its 39 values"));
    tap = good, tap.edit.stride[0] = 1; /* each row one value further */
    CHECK(refused(model, &tap, "beyond"));
    tap = good, tap.edit.stride[1] = -1;
    CHECK(refused(model, &tap, "stride -1"));
    tap = good, tap.edit.stride[1] = INT64_MAX;
    CHECK(refused(model, &tap, "beyond"));
    tap = good, tap.edit.span[1] = (g4_span){30, D + 1};
    CHECK(refused(model, &tap, "30 to 41"));
    tap = good, tap.edit.span[1] = (g4_span){-1, 4};
    CHECK(refused(model, &tap, "-1 to 4"));
    tap = good, tap.edit.span[1] = (g4_span){4, 4};
    CHECK(refused(model, &tap, "4 to 4"));
    tap = good, tap.edit.span[0] = (g4_span){0, 4};
    CHECK(refused(model, &tap, "where `rows` choose"));
    tap = good, tap.edit.factor = NAN;
    CHECK(refused(model, &tap, "factor"));
    tap = good, tap.kind = G4_TAP_SCALE, tap.edit.factor = INFINITY;
    CHECK(refused(model, &tap, "factor"));
    tap = good, tap.kind = G4_TAP_CLAMP, tap.edit.low = 1;
    CHECK(refused(model, &tap, "clamps"));
    tap.edit.low = NAN;
    CHECK(refused(model, &tap, "clamps"));
    tap = good, tap.edit.values = bad, bad[7] = NAN;
    CHECK(refused(model, &tap, "value 7 of an edit is nan"));
    tap.kind = G4_TAP_PROJECT_OUT, bad[7] = -INFINITY;
    CHECK(refused(model, &tap, "value 7 of an edit is -inf"));
    int32_t rows[N_TOKENS] = {[5] = -2};
    tap = good, tap.rows = rows;
    CHECK(refused(model, &tap, "position 5 to row -2"));
    rows[5] = 1 << 20, tap.edit.stride[0] = D;
    CHECK(refused(model, &tap, "beyond"));
    tap = (g4_tap){.site = good.site, .layer = 1, .dest = bad, .n_dest_rows = 1};
    CHECK(refused(model, &tap, "copies 37 rows into an array of 1"));
    rows[5] = 1, tap.rows = rows;
    CHECK(refused(model, &tap, "position 5 to row 1: expected -1 to 0"));
    tap = good, tap.site = G4_SITE_K_USED, tap.rows = all_rows;
    CHECK(refused(model, &tap, "has none"));
}

/* A query all of whose scores are -inf after all edits of the site. */
static void test_no_key_left(g4_model *model)
{
    static const float masked = -INFINITY, zero = 0;
    static float logits[VOCAB];
    g4_error err = {0};
    int32_t rows[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++)
        rows[i] = i == 20 ? 0 : -1;
    g4_tap taps[2] = {{.kind = G4_TAP_SET, .site = G4_SITE_ATTN_SCORES, .layer = 1, .rows = rows}};
    g4_tap *tap = &taps[0];
    tap->edit.values = &masked, tap->edit.n_values = 1;
    CHECK(refused(model, tap, "blocks.1.attn.hook_attn_scores: an edit leaves position 20 no key in head 0"));
    CHECK(run_text(model, 4, tap, 1, 0, 1, logits, &err) == G4_EVALUE && strstr(err.message, "leaves position 24"));
    tap->edit.span[0] = (g4_span){1, 2};
    CHECK(refused(model, tap, "position 20 no key in head 1"));
    taps[1] = taps[0];
    taps[1].edit.values = &zero, taps[1].edit.span[2] = (g4_span){20, 21};
    CHECK(run_text(model, 0, taps, 2, 0, 1, logits, &err) == G4_OK);
    tap->edit.span[2] = (g4_span){0, 20}; /* its own key is left */
    CHECK(run_text(model, 0, taps, 1, 5, 1, logits, &err) == G4_OK && isfinite(logits[0]));
}

/* ---- encoders ---------------------------------------------------------------------------------------------------- */

enum { N_MEDIA = 2, ROWS_OF_IMAGE = 16, FRAMES = 21, MOST_SOFT = FRAMES };

static const int FRAMES_OF[N_MEDIA] = {FRAMES, 9}, PATCHES_OF[N_MEDIA] = {ROWS_OF_IMAGE, 8};

typedef struct {
    g4_medium media[N_MEDIA];
    int32_t positions[N_MEDIA][2 * ROWS_OF_IMAGE];
    float soft[N_MEDIA][MOST_SOFT * D];
} media_set;

static void make_media(const g4_encoder *encoder, media_set *m)
{
    const bool image = g4_encoder_has_positions(g4_encoder_config_of(encoder));
    for (int i = 0; i < N_MEDIA; i++) {
        m->media[i] = (g4_medium){.n_rows = image ? PATCHES_OF[i] : FRAMES_OF[i],
                                  .rows = values + 100 * i,
                                  .positions = m->positions[i],
                                  .soft = m->soft[i]};
        for (int j = 0; j < ROWS_OF_IMAGE; j++)
            m->positions[i][2 * j] = j % 4, m->positions[i][2 * j + 1] = j / 4;
    }
}

static g4_status run_encoder(const g4_encoder *encoder, const g4_tap *taps, int n_taps, media_set *m, g4_error *err)
{
    make_media(encoder, m);
    return g4_encode(encoder, m->media, N_MEDIA, taps, n_taps, NULL, NULL, NULL, err);
}

static bool sees_all(const void *context, int row, int key)
{
    (void)context, (void)row, (void)key;
    return true;
}

static bool sees_band(const void *context, int row, int key)
{
    const g4_encoder_config *c = context;
    return key == row || (row - key < c->context_left - 1 && key - row < c->context_right);
}

/* Whether the edit changed the soft tokens of its medium. Those of the other medium must not change. */
static bool check_encoder_edit(const g4_encoder *encoder, g4_tap tap, const media_set *unedited)
{
    static media_set expected, got;
    const g4_encoder_config *c = g4_encoder_config_of(encoder);
    g4_error err = {0};
    plain p = {&tap, c->kind == G4_AUDIO_TOWER ? sees_band : sees_all, c, 0};
    const g4_tap call = {
        .kind = G4_TAP_CALL, .site = tap.site, .layer = tap.layer, .run = tap.run, .call = plain_edit, .context = &p};
    CHECK(run_encoder(encoder, &call, 1, &expected, &err) == G4_OK && p.n_calls == 1);
    CHECK(run_encoder(encoder, &tap, 1, &got, &err) == G4_OK);
    const int other = !tap.run;
    const size_t n = (size_t)g4_encoder_soft_tokens(c, got.media[tap.run].n_rows) * D,
                 n_other = (size_t)g4_encoder_soft_tokens(c, got.media[other].n_rows) * D;
    CHECK(same(got.soft[tap.run], expected.soft[tap.run], n));
    CHECK(same(got.soft[other], unedited->soft[other], n_other));
    return !same(expected.soft[tap.run], unedited->soft[tap.run], n);
}

/* Every site of the encoder, on one medium and then on the other. */
static void test_encoder_edits(g4_model *model, g4_encoder_kind kind)
{
    static media_set unedited;
    g4_encoder *encoder = new_encoder_of(model, kind);
    const g4_encoder_config *c = g4_encoder_config_of(encoder);
    g4_error err = {0};
    int64_t shape[G4_MAX_DIMS];
    CHECK(run_encoder(encoder, NULL, 0, &unedited, &err) == G4_OK);
    for (int s = 0; s < G4_N_SITES; s++) {
        const int layer = g4_site_is_per_layer((g4_site)s) ? c->n_layers - 1 : 0;
        int n_changed = 0;
        if (!g4_encoder_site_exists(c, (g4_site)s, layer))
            continue;
        for (int i = 0; i < N_VARIANTS; i++) {
            const int run = i % 2, n_dims = g4_encoder_site_shape(c, (g4_site)s, unedited.media[run].n_rows, shape);
            g4_tap tap = make_tap((g4_site)s, layer, i, shape, n_dims);
            tap.run = run;
            n_changed += check_encoder_edit(encoder, tap, &unedited);
        }
        CHECK(n_changed >= N_VARIANTS / 2);
    }
    g4_encoder_free(encoder);
}

/* Selected rows of a copy, in another order. */
static void test_encoder_copies(g4_model *model)
{
    static media_set m;
    static float all[8 * ROWS_OF_IMAGE * ROWS_OF_IMAGE], some[8 * ROWS_OF_IMAGE * ROWS_OF_IMAGE];
    g4_error err = {0};
    g4_encoder *encoder = new_encoder_of(model, G4_VISION_TOWER);
    const int heads = g4_encoder_config_of(encoder)->n_heads, n = PATCHES_OF[1];
    const int32_t rows[] = {-1, 1, -1, -1, 0, -1, -1, -1};
    const g4_tap taps[] = {
        {.site = G4_SITE_V_PATTERN, .layer = 1, .run = 1, .dest = all, .n_dest_rows = n},
        {.site = G4_SITE_V_PATTERN, .layer = 1, .run = 1, .rows = rows, .dest = some, .n_dest_rows = 2}};
    CHECK(run_encoder(encoder, taps, 2, &m, &err) == G4_OK);
    for (int h = 0; h < heads; h++) {
        CHECK(same(some + (size_t)(h * 2 + 1) * (size_t)n, all + (size_t)(h * n + 1) * (size_t)n, (size_t)n));
        CHECK(same(some + (size_t)(h * 2) * (size_t)n, all + (size_t)(h * n + 4) * (size_t)n, (size_t)n));
    }
    g4_tap tap = {.kind = G4_TAP_SET, .site = G4_SITE_V_PATTERN, .layer = 1, .run = 1, .edit = {.stride = {0, 0, 1}}};
    tap.edit.values = values, tap.edit.n_values = (size_t)n - 1;
    CHECK(run_encoder(encoder, &tap, 1, &m, &err) == G4_EVALUE &&
          strstr(err.message, "vision.blocks.1.attn.hook_pattern"));
    tap.run = 2;
    CHECK(run_encoder(encoder, &tap, 1, &m, &err) == G4_EVALUE);
    g4_encoder_free(encoder);
}

void test_taps(void)
{
    static fixture f;
    fixture_init(&f);
    for (int i = 0; i < N_TOKENS; i++) {
        tokens[i] = (i * 17 + i * i) % VOCAB;
        all_rows[i] = i;
    }
    for (int i = 0; i < N_VALUES; i++)
        values[i] = (float)((i * 7919 + 13) % 1009) / 1009.0f - 0.4f;
    g4_model *model = new_model(&f, 2);
    test_text_edits(model);
    test_order(model);
    test_patch_from_a_copy(model);
    test_patch_within_a_step(model);
    test_cost_of_edits(model);
    test_refusals(model);
    test_no_key_left(model);
    for (int kind = G4_VISION_TOWER; kind <= G4_AUDIO_EMBEDDER; kind++)
        test_encoder_edits(model, (g4_encoder_kind)kind);
    test_encoder_copies(model);
    g4_model_free(model);
    fixture_free(&f);
}
