/* SPDX-License-Identifier: Apache-2.0 */
/* State of one forward pass over one chunk: the rows of several runs, concatenated without padding. */
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
    int first_row, n_rows;            /* rows in the chunk's arrays; fewer after pruning */
    int first_position, end_position; /* positions of the run in this chunk, before pruning */
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

    int n_rows; /* T: rows of every array below */
    int32_t *positions, *row_in_run, *logits_slot /* row of the run's logits, or -1 */;
    int32_t *ends;     /* with layers' `ahead`, row i sees positions before ends[i]; NULL: causal */
    bool *wanted;      /* an output needs this row above the last layer that computes keys */
    bool pruned;       /* only wanted rows are left */
    int n_with_logits; /* rows with logits after pruning; 0 before */
    float *resid;      /* [T, D] the residual stream */
    float *ple;        /* [T, L, P] */
    float *cosine[G4_MAX_ROPES], *sine[G4_MAX_ROPES]; /* [T, h/2] */
} g4_forward;

/* ---- forward.c ---- */
bool g4_tapped(const g4_forward *f, g4_site site, int layer);
/* Announces a site whose first axis is T: data [T, ...]. Costs one compare if the step has no taps. */
g4_status g4_tap_rows(g4_forward *f, g4_site site, int layer, void *data);
/* Announces one segment's part of a site with key positions: [H, T of the segment, n_keys] or [n_keys, K, h]. */
g4_status g4_tap_keys(g4_forward *f, g4_site site, int layer, const g4_segment *segment, const g4_attention *run,
                      float *data);
/* Fills f->wanted: rows with logits, and rows that a tap above pruning needs. */
void g4_taps_mark_wanted(g4_forward *f);
/* Whether cached keys or values of `layer` or above are copied or hooked: then layers run even without rows. */
bool g4_taps_want_keys(const g4_forward *f, int layer);

/* Removes rows that no output needs from f's arrays and from `also` [T, D]. */
void g4_forward_prune(g4_forward *f, float *also);

/* RMSNorm with its two inner sites; G4_N_SITES in both: the norm has no sites. */
typedef struct {
    g4_site scale, normalized;
} g4_norm_sites;
g4_status g4_norm(g4_forward *f, int layer, g4_norm_sites sites, const float *gain, const float *x, float *out);

/* ---- text.c: the text decoder ---- */
g4_status g4_text_embed(g4_forward *f, const int32_t *tokens, const float *const *embeddings);
void g4_text_enter(g4_forward *f); /* f->resid = the runs' `resid`, where they have one */
g4_status g4_text_layers(g4_forward *f, int first, int end);
g4_status g4_text_logits(g4_forward *f);

/* ---- linear.c: g4_linear_jobs over all rows of the chunk; reading through taps changes no bit ---- */
/* Whether rows with logits and rows kept only for captures and hooks are computed as separate jobs. */
bool g4_rows_are_split(const g4_forward *f);
/* rows [T]: rows with logits first, both parts in order; if rows are not split, all in order. */
void g4_order_rows(const g4_forward *f, int *rows);
g4_status g4_text_linear_jobs(g4_forward *f, const g4_linear_job *jobs, int n_jobs);
g4_status g4_text_linear(g4_forward *f, const float *x, const g4_matrix *w, float *out); /* dense arrays */

/* ---- attention.c, moe.c ---- */
/* Attention of f->resid to attn_out [T, D]; prunes rows in the last layer that computes keys. */
g4_status g4_text_attention(g4_forward *f, int layer, float *attn_out);
/* The experts' output moe_out [T, D], normalized. */
g4_status g4_text_moe(g4_forward *f, int layer, float *moe_out);

#endif
