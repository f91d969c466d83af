/* SPDX-License-Identifier: Apache-2.0 */
/* Taps of a forward pass, indexed by site and layer and applied to the part of one run. The text model and the encoders
 * announce sites (text/forward.c, encoders/parts.c); applying a tap is common code. */
#ifndef GEMMA4_MODEL_TAP_H
#define GEMMA4_MODEL_TAP_H

#include "gemma4.h"
#include "ops/exec.h"

typedef struct {
    const g4_tap *taps;
    int n_taps, n_layers;
    int *first; /* [G4_N_SITES * n_layers] index of the first tap or -1 */
    int *next;  /* [n_taps] next tap of the same site and layer, or -1 */
} g4_taps;

/* The keys [first, end) that row i of scores or of a pattern sees. */
typedef struct {
    void (*range)(const void *context, int row, int *first, int *end);
    const void *context;
} g4_visible;

/* One run's part of an announced array. */
typedef struct {
    void *data;
    int64_t shape[G4_MAX_DIMS];
    int n_dims;
    const int32_t *row_in_run; /* [rows] index of each row in its run; NULL: all rows, in order */
    int first_key;             /* cached keys and values: the first position that is visible to this part */
    int n_all_keys;            /* size of S in a copy's destination: the run's key positions after the step */
    const g4_visible *visible; /* NULL: all keys */
} g4_part;

/* Builds the index in scratch memory of `exec`. Each list keeps the caller's order. */
g4_status g4_taps_index(g4_exec *exec, const g4_tap *taps, int n_taps, int n_layers, g4_taps *index);

/* The first tap of a site, or -1; follow `next` for the rest. Without taps it costs one compare. */
static inline int g4_taps_first(const g4_taps *index, g4_site site, int layer)
{
    return index->n_taps ? index->first[(int)site * index->n_layers + layer] : -1;
}

/* Checks a tap of an existing site. shape: the site's shape for the whole run; number: for messages. */
g4_status g4_tap_check(const g4_tap *tap, int number, const int64_t *shape, int n_dims, g4_error *err);

/* Whether a tap keeps its rows from being pruned. Edits do not: they change only rows that are computed anyway. */
static inline bool g4_tap_needs_rows(const g4_tap *tap)
{
    return tap->kind == G4_TAP_COPY || tap->kind == G4_TAP_CALL;
}

/* The tap's entry for a row of its run (g4_tap.rows); -1: not selected. */
static inline int g4_tap_row(const g4_tap *tap, int row_in_run)
{
    return tap->rows ? tap->rows[row_in_run] : row_in_run;
}

g4_status g4_tap_act(g4_exec *exec, const g4_tap *tap, const g4_part *part);

/* After all taps of a site of scores: G4_EVALUE if they leave a query no key, since a softmax of nothing but -inf is NaN.
 * positions: of the part's rows, for the message; NULL: their numbers. */
g4_status g4_tap_check_keys_left(g4_exec *exec, g4_site site, int layer, const g4_part *part, const int32_t *positions);

#endif
