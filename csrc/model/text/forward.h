/* SPDX-License-Identifier: Apache-2.0 */
/* State of one forward pass over one chunk: the rows of several runs, one below the other, never padded. */
#ifndef GEMMA4_MODEL_TEXT_FORWARD_H
#define GEMMA4_MODEL_TEXT_FORWARD_H

#include "gemma4.h"
#include "model/model.h"
#include "model/tap.h"
#include "model/text/kv_cache.h"
#include "ops/attention/run.h"
#include "ops/exec.h"
#include "ops/linear.h"

/* One run's rows in the chunk. */
typedef struct {
    int run; /* index in the step */
    g4_sequence *seq;
    int first_row, n_rows;            /* in the chunk's arrays; fewer after pruning */
    int first_position, end_position; /* of the part of the run in this chunk, before pruning */
} g4_segment;

typedef struct {
    g4_exec exec;
    const g4_model *model;
    const g4_config *config;
    const g4_run *runs;
    const int *run_start; /* [runs] length of each run's sequence before the step */
    g4_taps taps;

    g4_segment *segments;
    int n_segments;
    int *segment_of_run; /* [runs] or -1 */

    int n_rows; /* T: every array below has so many rows */
    int32_t *positions, *row_in_run, *logits_slot /* row of the run's logits, or -1 */;
    int32_t *ends;     /* in layers that look ahead row i sees positions before it; NULL: none sees beyond its own */
    bool *wanted;      /* some output needs this row above the last layer that computes keys */
    bool pruned;       /* only those rows are left */
    int n_with_logits; /* after pruning: rows with logits; 0 before */
    float *resid;      /* [T, D] the residual stream */
    float *ple;        /* [T, L, P] */
    float *cosine[G4_MAX_ROPES], *sine[G4_MAX_ROPES]; /* [T, h/2] */
} g4_forward;

/* ---- forward.c ---- */
bool g4_tapped(const g4_forward *f, g4_site site, int layer);
/* Announces a site whose first axis is T: data [T, ...]. Costs one compare when nobody listens. */
g4_status g4_tap_rows(g4_forward *f, g4_site site, int layer, void *data);
/* Announces one segment's part of a site with key positions: [H, T of the segment, n_keys] or [n_keys, K, h]. */
g4_status g4_tap_keys(g4_forward *f, g4_site site, int layer, const g4_segment *segment, const g4_attention *run,
                      float *data);
/* Fills f->wanted. */
void g4_taps_mark_wanted(g4_forward *f);
/* Whether a tap listens to keys or values used in `layer` or above: then the layers run even without rows. */
bool g4_taps_want_keys(const g4_forward *f, int layer);

/* Drops the rows that no output wants, from f's arrays and from `also` [T, D]. */
void g4_forward_prune(g4_forward *f, float *also);

/* RMSNorm with its two inner sites; either may be G4_N_SITES where a norm has none. */
typedef struct {
    g4_site scale, normalized;
} g4_norm_sites;
g4_status g4_norm(g4_forward *f, int layer, g4_norm_sites sites, const float *gain, const float *x, float *out);

/* ---- text.c: the text decoder ---- */
g4_status g4_text_embed(g4_forward *f, const int32_t *tokens, const float *const *embeddings);
g4_status g4_text_layers(g4_forward *f, int n_layers);
g4_status g4_text_logits(g4_forward *f);

/* ---- linear.c: g4_linear_jobs over all rows of the chunk; looking changes no bit ---- */
/* Whether rows with logits are computed apart from rows that are kept for captures and hooks only. */
bool g4_rows_are_split(const g4_forward *f);
/* rows [T]: those with logits first, both parts in order; all in order where they are not split. */
void g4_order_rows(const g4_forward *f, int *rows);
g4_status g4_text_linear_jobs(g4_forward *f, const g4_linear_job *jobs, int n_jobs);
g4_status g4_text_linear(g4_forward *f, const float *x, const g4_matrix *w, float *out); /* dense arrays */

/* ---- attention.c, moe.c ---- */
/* attn_out [T, D] of the residual stream; prunes in the last layer that computes keys. */
g4_status g4_text_attention(g4_forward *f, int layer, float *attn_out);
/* Experts' part: moe_out [T, D], already normed. */
g4_status g4_text_moe(g4_forward *f, int layer, float *moe_out);

#endif
