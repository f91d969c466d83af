/* SPDX-License-Identifier: Apache-2.0 */
/* gemma4: the public C interface of the engine.
 *
 * A model is immutable and may serve several threads. A sequence is one timeline of positions with its cached keys and
 * values; it serves one call at a time. A step advances any number of sequences by runs of any length: decoding one token
 * is the same call as prefilling a thousand. The engine opens no file: it computes on views that the caller keeps alive.
 */
#ifndef GEMMA4_H
#define GEMMA4_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/profile.h"
#include "base/status.h"

/* ---- configuration -------------------------------------------------------------------------------------------- */

typedef struct {
    int window;     /* keys up to its own that a query may see, itself included; 0: all (a global layer) */
    int ahead;      /* keys after its own that it may see, as far as its run's `ends` go; 0: none (causal) */
    int head_dim;   /* h */
    int n_kv_heads; /* K */
    int d_mlp;      /* F */
    int kv_source;  /* the layer whose keys and values this one reads: itself, or an earlier one */
    bool k_eq_v;    /* values are the normed output of k_proj */
    bool moe;       /* experts beside the dense MLP */
    int rope;       /* which of the rotary tables */
} g4_layer_config;

enum { G4_MAX_ROPES = 4, G4_MAX_DIMS = 4, G4_MAX_HEAD_DIM = 1 << 14, G4_WHOLE_STRETCH = 1 << 30 /* of `ahead` */ };

typedef struct {
    int d_model, n_layers, n_heads, d_vocab; /* D, L, H, V */
    int d_ple, d_vocab_ple;                  /* P (0: no per-layer embeddings), rows of their table */
    int n_experts, top_k_experts, d_expert;  /* E, k, M */
    float rms_norm_eps, logit_softcap;       /* softcap 0: none */
    float embed_scale, ple_scale;            /* factors of the two tables' rows */
    float attention_scale;                   /* factor of the products of queries and keys */
    float attention_softcap;                 /* of those scores, before the mask; 0: none */
    int context_length;
    bool q_norm, k_norm, v_norm; /* RMSNorm of each head's query, key, value (which has no gain) */
    bool post_norms;             /* what attention and MLP add to the residual stream is normed before */
    bool layer_scalar;           /* a layer multiplies the stream at its end */
    bool unit_gains;             /* norms store w and multiply by 1 + w; folded when tensors are bound */
    bool tied;                   /* the head is the embedding table: there is no lm_head.weight */
    int pad_token;               /* its row of the per-layer table is what positions without a token read */
    bool ple_on_disk; /* the per-layer table lies in a file mapping: let go of its pages once rows were read */
    int n_ropes;
    int rope_half[G4_MAX_ROPES];              /* h / 2 */
    const float *rope_inv_freq[G4_MAX_ROPES]; /* [h / 2], copied by g4_model_new */
    const g4_layer_config *layers;            /* [n_layers], copied by g4_model_new */
} g4_config;

/* A named tensor of the checkpoint, where it lies. The bytes must outlive the model. */
typedef struct {
    const char *name; /* without the checkpoint's prefix: "layers.0.self_attn.q_proj.weight" */
    g4_dtype dtype;
    int n_dims;
    int64_t shape[G4_MAX_DIMS];
    const void *data;
} g4_named_tensor;

/* ---- models and sequences --------------------------------------------------------------------------------------- */

typedef struct g4_model g4_model;
typedef struct g4_sequence g4_sequence;

typedef struct {
    int n_threads; /* 0: g4_cpu_count of base/cpu.h */
    bool fast; /* precision "fast": other orders of addition, x in fewer bits; else the same bits on every machine */
} g4_model_options;

/* Every tensor that a config calls for, in the order of its table (model/text/weights.c, model/encoders/). Experts' gate
 * and up may also come apart (`experts.gate_proj`, `experts.up_proj`). */
typedef void (*g4_tensor_fn)(void *context, const char *name, const int64_t *shape, int n_dims);
g4_status g4_text_tensors(const g4_config *config, g4_tensor_fn each, void *context, g4_error *err);

g4_status g4_model_new(const g4_config *config, const g4_named_tensor *tensors, size_t n_tensors,
                       const g4_model_options *options, g4_model **model, g4_error *err);
void g4_model_free(g4_model *model); /* sequences first */
const g4_config *g4_model_config(const g4_model *model);
const char *g4_model_isa(const g4_model *model);
int g4_model_threads(const g4_model *model);
bool g4_model_is_fast(const g4_model *model);
size_t g4_model_weight_bytes(const g4_model *model);

g4_status g4_sequence_new(const g4_model *model, g4_dtype kv_dtype, int capacity, g4_sequence **seq, g4_error *err);
void g4_sequence_free(g4_sequence *seq); /* NULL is fine */
int g4_sequence_length(const g4_sequence *seq);
int g4_sequence_capacity(const g4_sequence *seq);
g4_dtype g4_sequence_dtype(const g4_sequence *seq);
size_t g4_sequence_bytes(const g4_sequence *seq);
int g4_sequence_min_truncate(const g4_sequence *seq);
g4_status g4_sequence_truncate(g4_sequence *seq, int length, g4_error *err);
g4_status g4_sequence_fork(g4_sequence *seq, g4_sequence **fork, g4_error *err); /* copy-on-write, per layer */

/* One call at a time: false if another one is in progress. Every function above that changes seq does this itself. */
bool g4_sequence_acquire(g4_sequence *seq);
void g4_sequence_release(g4_sequence *seq);

/* The cache of a layer that computes keys: positions [first, length), dense [n, K, h] of the sequence's dtype. */
int g4_sequence_first_cached(const g4_sequence *seq, int layer);
void g4_sequence_export(const g4_sequence *seq, int layer, void *k, void *v);
g4_status g4_sequence_import(g4_sequence *seq, int layer, int first, int length, const void *k, const void *v,
                             g4_error *err);
void g4_sequence_set_length(g4_sequence *seq, int length); /* after every layer was imported */

/* ---- sites -------------------------------------------------------------------------------------------------------- */

typedef enum {
#define G4_SITE(id, name, dims, when, rows, keys, type, access) G4_SITE_##id,
#include "model/sites.inc"
#undef G4_SITE
    G4_N_SITES
} g4_site;

/* What the axis S of a site means. */
typedef enum {
    G4_KEYS_NONE,
    G4_KEYS_CACHED, /* rows of keys or values, by position */
    G4_KEYS_SCORES, /* of each row of T; -inf for keys that it does not see */
    G4_KEYS_PATTERN /* the same after softmax; 0 */
} g4_site_keys;

/* A row of sites.inc. */
typedef struct {
    const char *name;   /* with "{}" for the layer */
    const char *dims;   /* one letter for each axis */
    bool after_pruning; /* from the last layer that computes keys on, only rows that an output needs pass it */
    bool is_int32;      /* else float32 */
    bool writable;
    g4_site_keys keys;
} g4_site_row;

enum { G4_SITE_NAME = 80 };

const g4_site_row *g4_site_row_of(g4_site site);
bool g4_site_is_per_layer(g4_site site);
void g4_site_name(g4_site site, int layer, char name[G4_SITE_NAME]); /* with the layer's number */
/* Which axis rows of a run (positions, soft tokens, frames) lie along; -1: keys and values in use have none. */
int g4_site_row_axis(g4_site site);
bool g4_site_exists(const g4_config *config, g4_site site, int layer);
/* Sizes of the site's axes for a run of n_rows rows and n_keys key positions; returns how many axes. */
int g4_site_shape(const g4_config *config, g4_site site, int layer, int n_rows, int n_keys, int64_t shape[G4_MAX_DIMS]);

/* ---- taps: what is done with the value of a site ----------------------------------------------------------------------- */

/* Taps of one site and run act in the order in which they are given. */
typedef enum {
    G4_TAP_COPY,        /* to `dest` */
    G4_TAP_CALL,        /* `call` may change it; it gets all rows of the run at once, so no row is pruned or cut off */
    G4_TAP_ADD,         /* x += factor * value */
    G4_TAP_SCALE,       /* x *= factor */
    G4_TAP_SET,         /* x = value */
    G4_TAP_PROJECT_OUT, /* x -= factor * (x . v) / (v . v) * v, of each vector along the last axis; v = 0 changes nothing */
    G4_TAP_CLAMP,       /* x = min(max(x, low), high) */
    G4_N_TAP_KINDS
} g4_tap_kind;

/* Changes `data` (the site's shape, float32 or int32) in place. */
typedef g4_status (*g4_call_fn)(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err);

typedef struct {
    int first, end; /* {0, 0}: the whole axis */
} g4_span;

/* Arithmetic on the rows that the tap chooses, as far as they are computed: it makes no row needed. Scores and patterns
 * change for keys that a row sees only. */
typedef struct {
    g4_span span[G4_MAX_DIMS]; /* of each axis of the site but that of rows: heads, keys by position, channels … */
    /* The value of an element is values[sum of stride[axis] * index], index counted from the span's first, and that of the
     * row axis from g4_tap.rows. A stride of 0 repeats a value along its axis, so `values` may be a number, a vector of the
     * last axes, or an array that a copy filled. */
    const float *values;
    size_t n_values;
    int64_t stride[G4_MAX_DIMS];
    float factor, low, high;
} g4_edit;

typedef struct {
    g4_tap_kind kind;
    g4_site site;
    int layer, run; /* layer 0 for sites of the whole model; run: of the step, or an encoder's medium */
    /* For each row of the run: of a copy, its row of `dest`; of an edit, its index in `values`; -1: not this one. NULL: row i
     * to i. Sites without rows have none. */
    const int32_t *rows;
    void *dest; /* of a copy: the site's shape with T = n_dest_rows, S = the sequence's length after the step */
    int n_dest_rows;
    g4_call_fn call;
    void *context;
    g4_edit edit; /* of the other kinds */
} g4_tap;

/* ---- the step --------------------------------------------------------------------------------------------------- */

typedef struct {
    g4_sequence *seq;
    int n_rows;
    const int32_t *tokens;      /* [n_rows] or NULL; below 0: the row is given as an embedding */
    const float *embeddings;    /* [n_rows, D] or NULL: rows without a token, already scaled (others are not read) */
    const int32_t *logits_rows; /* [n_logits] ascending rows of the run that want logits */
    int n_logits;
    float *logits; /* [n_logits, V] */
    /* [n_rows] ascending, i < ends[i] <= n_rows: row i sees the run's rows before ends[i], as far as a layer's `ahead`
     * goes (an image, whose positions see each other). No chunk ends inside such a stretch. NULL: causal. */
    const int32_t *ends;
} g4_run;

typedef struct {
    int stop_at_layer;          /* -1: all; n: layers [0, n) only, and the sequences do not grow */
    int max_chunk;              /* rows at once; 0: 512 */
    int (*poll)(void *context); /* asked about every 20 ms; nonzero stops the step between chunks' parts */
    void *poll_context;
    g4_profile *profile; /* NULL, or where the times of this step's operations are added */
} g4_step_options;

g4_status g4_step(g4_model *model, const g4_run *runs, int n_runs, const g4_tap *taps, int n_taps,
                  const g4_step_options *options, g4_error *err);

/* ---- encoders of images and audio ---------------------------------------------------------------------------------- */

typedef enum {
    G4_VISION_TOWER,
    G4_VISION_EMBEDDER, /* without a tower: a patch is a soft token */
    G4_AUDIO_TOWER,
    G4_AUDIO_EMBEDDER /* without a tower: a frame of samples is a soft token */
} g4_encoder_kind;

/* Sizes that a kind does not have are 0. */
typedef struct {
    g4_encoder_kind kind;
    int d_in;            /* values of an input row: a patch's pixels, a frame's mel bins or samples */
    int d_model, d_soft; /* width of the tower, and of what enters the projection */
    int d_out;           /* d_model of the text model */
    int n_layers, n_heads, n_kv_heads, head_dim, d_mlp;
    int n_positions, pool; /* positions of each axis; patches that a soft token averages along each axis */
    bool clipped, standardize;
    bool on_disk; /* the maps of layers lie in file mappings: let go of the pages of those that were copied */
    float rms_norm_eps;
    const float *rope_inv_freq; /* [head_dim / 4] angular frequencies of either axis; copied by g4_encoder_new */
    int conv_channels[2], conv_kernel;
    int context_left, context_right, chunk; /* audio attention, as in the config of transformers */
    float logit_cap, residual_weight, gradient_clipping;
} g4_encoder_config;

typedef struct g4_encoder g4_encoder;

/* One image, video frame or recording. */
typedef struct {
    int n_rows;
    const float *rows;        /* [n_rows, d_in] patches in 0..1, log-mel frames or frames of samples */
    const int32_t *positions; /* [n_rows, 2] x and y of each patch; NULL for audio */
    float *soft;              /* [g4_encoder_soft_tokens, d_out] */
} g4_medium;

/* The model lends its threads and must outlive the encoder. A fast one copies the layers' weights as whole numbers,
 * which poll (as in g4_step_options; may be NULL) can stop. */
g4_status g4_encoder_new(g4_model *model, const g4_encoder_config *config, const g4_named_tensor *tensors,
                         size_t n_tensors, int (*poll)(void *context), void *poll_context, g4_encoder **encoder,
                         g4_error *err);
g4_status g4_encoder_tensors(const g4_encoder_config *config, g4_tensor_fn each, void *context, g4_error *err);
void g4_encoder_free(g4_encoder *encoder);
const g4_encoder_config *g4_encoder_config_of(const g4_encoder *encoder);
size_t g4_encoder_weight_bytes(const g4_encoder *encoder);
size_t g4_encoder_copied_bytes(const g4_encoder *encoder); /* of its own, besides the weights */
int g4_encoder_soft_tokens(const g4_encoder_config *config, int n_rows);
bool g4_encoder_has_positions(const g4_encoder_config *config); /* its media need g4_medium.positions */

bool g4_encoder_site_exists(const g4_encoder_config *config, g4_site site, int layer);
int g4_encoder_site_shape(const g4_encoder_config *config, g4_site site, int n_rows, int64_t shape[G4_MAX_DIMS]);

/* All media in one ragged pass, without padding. A tap's run is the medium. Threads may share an encoder. profile: as in
 * g4_step_options. */
g4_status g4_encode(const g4_encoder *encoder, const g4_medium *media, int n_media, const g4_tap *taps, int n_taps,
                    int (*poll)(void *context), void *poll_context, g4_profile *profile, g4_error *err);

#endif
