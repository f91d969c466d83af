/* SPDX-License-Identifier: Apache-2.0 */
/* Taps of a pass: found by site and layer, and carried out on the part of one run. The text model and the encoders announce
 * sites (text/forward.c, encoders/parts.c); what a tap does is the same for both. */
#ifndef GEMMA4_MODEL_TAP_H
#define GEMMA4_MODEL_TAP_H

#include "gemma4.h"
#include "ops/exec.h"

typedef struct {
    const g4_tap *taps;
    int n_taps, n_layers;
    int *first; /* [G4_N_SITES * n_layers] index of the first tap or -1 */
    int *next;  /* [n_taps] the next one of the same site and layer, or -1 */
} g4_taps;

/* Which keys row i of scores or of a pattern sees: [first, end). */
typedef struct {
    void (*range)(const void *context, int row, int *first, int *end);
    const void *context;
} g4_visible;

/* An announced array, or the part of it that belongs to one run. */
typedef struct {
    void *data;
    int64_t shape[G4_MAX_DIMS];
    int n_dims;
    const int32_t *row_in_run; /* [rows] which row of its run each is; NULL: they are all there */
    int first_key;             /* of keys and values in use: positions before it are no longer cached */
    int n_all_keys;            /* of the run after the step: what a copy of an array with keys has room for */
    const g4_visible *visible; /* NULL: every key */
} g4_part;

/* In scratch memory of `exec`. Each list is in the caller's order. */
g4_status g4_taps_index(g4_exec *exec, const g4_tap *taps, int n_taps, int n_layers, g4_taps *index);

/* The first tap of a site, or -1; the others by `next`. One compare where there are no taps. */
static inline int g4_taps_first(const g4_taps *index, g4_site site, int layer)
{
    return index->n_taps ? index->first[(int)site * index->n_layers + layer] : -1;
}

/* Whether a tap of a site that exists is well-formed. shape: the site's for the whole run; number: for messages. */
g4_status g4_tap_check(const g4_tap *tap, int number, const int64_t *shape, int n_dims, g4_error *err);

/* Whether rows of its run must be computed for a tap's sake: edits change only what is computed anyway. */
static inline bool g4_tap_needs_rows(const g4_tap *tap)
{
    return tap->kind == G4_TAP_COPY || tap->kind == G4_TAP_CALL;
}

/* What the tap has for a row of its run; -1: nothing. */
static inline int g4_tap_row(const g4_tap *tap, int row_in_run)
{
    return tap->rows ? tap->rows[row_in_run] : row_in_run;
}

g4_status g4_tap_act(g4_exec *exec, const g4_tap *tap, const g4_part *part);

#endif
