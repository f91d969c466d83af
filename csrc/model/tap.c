/* SPDX-License-Identifier: Apache-2.0 */
#include "model/tap.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "model/edit.h"

g4_status g4_taps_index(g4_exec *exec, const g4_tap *taps, int n_taps, int n_layers, g4_taps *index)
{
    const size_t n_lists = (size_t)G4_N_SITES * (size_t)n_layers;
    *index = (g4_taps){.taps = taps, .n_taps = n_taps, .n_layers = n_layers};
    G4_ALLOC(exec, index->first, n_lists);
    G4_ALLOC(exec, index->next, (size_t)n_taps + 1);
    memset(index->first, -1, n_lists * sizeof *index->first);
    /* prepending in reverse keeps each list in the caller's order */
    for (int i = n_taps - 1; i >= 0; i--) {
        int *first = &index->first[(int)taps[i].site * n_layers + taps[i].layer];
        index->next[i] = *first;
        *first = i;
    }
    return G4_OK;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static g4_status check_rows(const g4_tap *tap, const char *name, int n_rows, g4_error *err)
{
    const int n_to = tap->kind == G4_TAP_COPY ? tap->n_dest_rows : INT32_MAX;
    for (int i = 0; tap->rows && i < n_rows; i++)
        if (tap->rows[i] < -1 || tap->rows[i] >= n_to)
            return g4_fail(err, G4_EVALUE, "%s: a tap takes position %d to row %d: expected -1 to %d", name, i,
                           tap->rows[i], n_to - 1);
    if (tap->kind == G4_TAP_COPY && !tap->rows && n_rows > n_to)
        return g4_fail(err, G4_EVALUE, "%s: a tap copies %d rows into an array of %d", name, n_rows, n_to);
    return G4_OK;
}

g4_status g4_tap_check(const g4_tap *tap, int number, const int64_t *shape, int n_dims, g4_error *err)
{
    char name[G4_SITE_NAME];
    const int row_axis = g4_site_row_axis(tap->site);
    g4_site_name(tap->site, tap->layer, name);
    if ((int)tap->kind < 0 || tap->kind >= G4_N_TAP_KINDS)
        return g4_fail(err, G4_EVALUE, "%s: tap %d is of no kind %d", name, number, (int)tap->kind);
    if (tap->kind != G4_TAP_COPY && !g4_site_row_of(tap->site)->writable)
        return g4_fail(err, G4_EVALUE, "%s can be read but not changed: a change would have no effect", name);
    if (tap->rows && (row_axis < 0 || tap->kind == G4_TAP_CALL))
        return g4_fail(err, G4_EVALUE, "%s: tap %d chooses rows of %s", name, number,
                       row_axis < 0 ? "a site that has none" : "a call, which gets all");
    if (tap->kind == G4_TAP_COPY ? !tap->dest : tap->kind == G4_TAP_CALL && !tap->call)
        return g4_fail(err, G4_EVALUE, "%s: tap %d has no %s", name, number,
                       tap->kind == G4_TAP_COPY ? "destination" : "function");
    if (row_axis >= 0)
        G4_TRY(check_rows(tap, name, (int)shape[row_axis], err));
    return g4_tap_needs_rows(tap) ? G4_OK : g4_edit_check(tap, name, shape, n_dims, err);
}

/* ---- copies ------------------------------------------------------------------------------------------------------ */

static size_t product(const int64_t *shape, int first, int end)
{
    size_t n = 1;
    for (int i = first; i < end; i++)
        n *= (size_t)shape[i];
    return n;
}

/* Copies [S, K, h] from first_key on. Positions before it were copied by an earlier chunk, if at all. */
static void copy_cached(const g4_tap *tap, const g4_part *part)
{
    const size_t width = product(part->shape, 1, part->n_dims) * sizeof(float), first = (size_t)part->first_key;
    memcpy((char *)tap->dest + first * width, (const char *)part->data + first * width,
           ((size_t)part->shape[0] - first) * width);
}

/* Copies rows of [outer, rows, inner] to [outer, n_dest_rows, inner]. If the last axis is keys, dest also has room for
 * the keys of later chunks. These rows do not see them: they are filled with -inf or 0. */
static void copy_rows(const g4_tap *tap, const g4_part *part)
{
    const int axis = g4_site_row_axis(tap->site);
    const g4_site_keys keys = g4_site_row_of(tap->site)->keys;
    const float unseen = keys == G4_KEYS_SCORES ? -INFINITY : 0;
    const size_t outer = product(part->shape, 0, axis), inner = product(part->shape, axis + 1, part->n_dims),
                 n_rows = (size_t)part->shape[axis], inner_to = keys ? (size_t)part->n_all_keys : inner;
    for (size_t o = 0; o < outer; o++)
        for (size_t i = 0; i < n_rows; i++) {
            const int row = g4_tap_row(tap, part->row_in_run ? part->row_in_run[i] : (int)i);
            if (row < 0)
                continue;
            float *to = (float *)tap->dest + (o * (size_t)tap->n_dest_rows + (size_t)row) * inner_to;
            memcpy(to, (const float *)part->data + (o * n_rows + i) * inner, inner * sizeof *to); /* or int32 */
            for (size_t j = inner; j < inner_to; j++)
                to[j] = unseen;
        }
}

g4_status g4_tap_act(g4_exec *exec, const g4_tap *tap, const g4_part *part)
{
    const int axis = g4_site_row_axis(tap->site);
    if (axis >= 0 && !part->shape[axis])
        return G4_OK;
    switch (tap->kind) {
    case G4_TAP_COPY:
        if (axis < 0)
            copy_cached(tap, part);
        else
            copy_rows(tap, part);
        return G4_OK;
    case G4_TAP_CALL: return tap->call(tap->context, part->data, part->shape, part->n_dims, exec->err);
    default: return g4_edit_part(exec, tap, part);
    }
}

/* ---- scores ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const g4_part *part; /* [H, T, S] */
    atomic_int found;    /* the first line, head * T + row, without a key; or as many as there are */
} keyless;

static bool is_masked(const float *scores, int first, int end)
{
    while (first < end && scores[first] == -INFINITY)
        first++;
    return first >= end;
}

static void find_keyless(const g4_exec *exec, void *context, int first_line, int end_line)
{
    keyless *k = context;
    const int n_rows = (int)k->part->shape[1], n_keys = (int)k->part->shape[2];
    (void)exec;
    for (int line = first_line; line < end_line; line++) {
        const float *scores = (const float *)k->part->data + (size_t)line * (size_t)n_keys;
        int first = 0, end = n_keys;
        if (k->part->visible)
            k->part->visible->range(k->part->visible->context, line % n_rows, &first, &end);
        if (!is_masked(scores, first, end) || !is_masked(scores, 0, n_keys)) /* a function may unmask a key */
            continue;
        int before = atomic_load(&k->found);
        while (line < before && !atomic_compare_exchange_weak(&k->found, &before, line))
            continue;
    }
}

g4_status g4_tap_check_keys_left(g4_exec *exec, g4_site site, int layer, const g4_part *part, const int32_t *positions)
{
    char name[G4_SITE_NAME];
    keyless k = {.part = part};
    if (g4_site_row_of(site)->keys != G4_KEYS_SCORES)
        return G4_OK;
    const int n_rows = (int)part->shape[1], n_lines = (int)part->shape[0] * n_rows;
    atomic_init(&k.found, n_lines);
    G4_TRY(g4_exec_rows(exec, n_lines, 1, find_keyless, &k));
    const int line = atomic_load(&k.found);
    if (line == n_lines)
        return G4_OK;
    g4_site_name(site, layer, name);
    return g4_fail(exec->err, G4_EVALUE,
                   "%s: an edit leaves position %d no key in head %d: all of its scores are -inf, and their softmax is "
                   "NaN. Leave one key, or set attn.hook_z to 0 for no attention at all",
                   name, positions ? positions[line % n_rows] : line % n_rows, line / n_rows);
}
