/* SPDX-License-Identifier: Apache-2.0 */
/* Image and audio encoders: their weights, and the state of one pass over several media, whose rows are concatenated
 * without padding. */
#ifndef GEMMA4_MODEL_ENCODERS_ENCODER_H
#define GEMMA4_MODEL_ENCODERS_ENCODER_H

#include "base/guard.h"
#include "gemma4.h"
#include "model/bind.h"
#include "model/tap.h"
#include "ops/exec.h"

typedef struct {
    const float *ln1, *ln1_post, *ln2, *ln2_post; /* [D] input_, post_attention_, pre_ and post_feedforward_layernorm */
    g4_clipped q, k, v, o;                        /* [H*h, D] [K*h, D] [K*h, D] [D, H*h] */
    const float *q_norm, *k_norm;                 /* [h] */
    g4_clipped gate, up, down;                    /* [F, D] [F, D] [D, F] */
} g4_vision_layer;

typedef struct {
    g4_matrix patch, positions;        /* [D, d_in] [2 * n_positions, D]: rows for x, then rows for y */
    const float *std_bias, *std_scale; /* [D] */
    g4_vision_layer *layers;           /* [L] */
} g4_vision_weights;

typedef struct {
    const float *pre, *post; /* [D] */
    g4_clipped up, down;     /* [F, D] [D, F] */
} g4_audio_mlp;

typedef struct {
    g4_audio_mlp mlp1, mlp2;
    const float *ln1, *ln1_post, *out_norm; /* [D] norm_pre_attn, norm_post_attn, norm_out */
    g4_clipped q, k, v, post;               /* [H*h, D] … [D, H*h] */
    g4_matrix relative_k;                   /* [H*h, D] */
    const float *per_dim_scale;             /* [h] as stored; after finish: factors of q */
    const float *conv_pre, *conv_norm;      /* [D] */
    g4_clipped conv_start, conv_end;        /* [2D, D] [D, D] */
    const float *depthwise;                 /* [D, 1, size] as stored; after finish: [size, D] */
} g4_audio_layer;

typedef struct {
    const float *conv[2], *conv_norm[2]; /* [C, I, 3, 3] as stored, [C] */
    g4_matrix conv_matrices[2];          /* [C, 3 * 3 * I] made from conv */
    g4_matrix input, output;             /* [D, b*c] [I, D] */
    const float *output_bias;            /* [I] */
    float *distances;                    /* [n_distances, D] sinusoids */
    int n_distances;
    g4_audio_layer *layers; /* [L] */
} g4_audio_weights;

/* The unified model's image embedder. */
typedef struct {
    const float *ln1, *ln1_bias;           /* [X] */
    g4_matrix dense;                       /* [D, X] */
    const float *dense_bias;               /* [D] */
    const float *ln2, *ln2_bias;           /* [D] */
    g4_matrix positions;                   /* [n_positions * 2, D]: row 2 p for x = p, row 2 p + 1 for y = p */
    const float *pos_norm, *pos_norm_bias; /* [D] */
} g4_embedder_weights;

/* The end of every encoder: norm without gain, then the projection. Ref: Gemma4MultimodalEmbedder. */
typedef struct {
    g4_matrix projection; /* [O, I] */
} g4_soft_weights;

struct g4_encoder {
    g4_model *model;
    g4_encoder_config config;
    g4_arena *vectors; /* owns the float32 and integer copies and the layer structs */
    g4_guard_set guards;
    size_t n_bytes, n_copied;
    g4_soft_weights soft;
    union { /* by config.kind */
        g4_vision_weights vision;
        g4_embedder_weights embedder;
        g4_audio_weights audio;
    };
};

/* One pass over media [first_medium, first_medium + n_media). */
typedef struct {
    g4_exec exec;
    const g4_encoder *encoder;
    const g4_encoder_config *config;
    const g4_medium *media;
    int first_medium, n_media;
    g4_taps taps;       /* taps of all media */
    int n_rows, n_soft; /* input rows and soft tokens of the pass */
} g4_encode_pass;

/* One kind of encoder: a row of encoder.c's table, defined in the kind's file. */
typedef struct {
    bool positions;                                                /* input rows have x and y positions */
    g4_status (*check)(const g4_encoder_config *c, g4_error *err); /* checks kind-specific sizes; NULL: no check */
    int64_t (*axis)(const g4_encoder_config *c, char letter,
                    int n_rows); /* axis length for a letter of sites or tensors */
    int (*soft_tokens)(const g4_encoder_config *c, int n_rows);
    g4_status (*bind)(g4_encoder *encoder, g4_binder *b); /* binds all tensors except the projection; NULL: no others */
    g4_status (*finish)(g4_encoder *encoder, g4_binder *b); /* computes data derived from tensors; NULL: none */
    g4_status (*encode)(g4_encode_pass *p);
} g4_kind_row;

extern const g4_kind_row g4_vision_tower, g4_vision_embedder, g4_audio_tower, g4_audio_embedder;
const g4_kind_row *g4_kind_of(const g4_encoder_config *config);

/* ---- new.c: checks common to kinds ---- */
g4_status g4_encoder_check_range(const char *name, long value, long low, long high, g4_error *err);
g4_status g4_encoder_check_layers(const g4_encoder_config *c, g4_error *err);

/* ---- parts.c ---- */
/* Letters common to all kinds; T and S are input rows unless the kind overrides them. */
int64_t g4_encoder_axis(const g4_encoder_config *c, char letter, int n_rows);

/* Announces a site: the concatenated arrays of all media of the pass. Costs one compare if the pass has no taps. */
g4_status g4_encoder_tap(g4_encode_pass *p, g4_site site, int layer, void *data);
/* Announces one medium's part of a site: scores and patterns exist per medium only. medium: index in the pass; visible:
 * the keys that each row sees, NULL: all. */
g4_status g4_encoder_tap_one(g4_encode_pass *p, g4_site site, int layer, int medium, const g4_visible *visible,
                             void *data);
bool g4_encoder_tapped(const g4_encode_pass *p, g4_site site, int layer);

/* outs[i] = clip(W_i clip(x)) for n linear layers that share x [m, n_cols], in one parallel region. */
g4_status g4_clipped_jobs(g4_exec *exec, const float *x, int m, const g4_clipped *const *linears, float *const *outs,
                          int n);

/* g4_encoder_project normalizes soft [N, I] in place and projects it into each medium's `soft`. */
typedef struct {
    g4_site soft, normed, projected;
} g4_soft_sites;
extern const g4_soft_sites g4_vision_soft_sites, g4_audio_soft_sites;
g4_status g4_encoder_project(g4_encode_pass *p, const g4_soft_sites *sites, float *soft);

/* Table rows of all patches of the pass along one axis: factor * position + offset. */
void g4_encoder_positions(const g4_encode_pass *p, int axis, int factor, int offset, int32_t *out);

/* Binds every row of a table. Tensor names are prefix + the row's name. */
g4_status g4_bind_table(g4_binder *b, const g4_bind_row *rows, int n_rows, const char *prefix, int layer, void *owner);

#endif
