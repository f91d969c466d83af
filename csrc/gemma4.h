/* SPDX-License-Identifier: Apache-2.0 */
/* gemma4: the public C interface of the engine.
 *
 * A model is immutable; several threads may use it at once. A sequence holds the KV cache of one series of positions;
 * one call at a time may use it. A step advances any number of sequences by runs of any length: decode and prefill are
 * the same call. The engine opens no files: it reads weights through pointers that the caller keeps valid.
 */
#ifndef GEMMA4_H
#define GEMMA4_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "base/pick.h"
#include "base/profile.h"
#include "base/status.h"

/* ---- configuration -------------------------------------------------------------------------------------------- */

typedef struct {
    int window;     /* keys that a query sees, up to and including its own position; 0: all (global layer) */
    int ahead;      /* keys after its own position that a query sees, limited by g4_run.ends; 0: none (causal) */
    int head_dim;   /* h */
    int n_kv_heads; /* K */
    int d_mlp;      /* F */
    int kv_source;  /* layer whose keys and values this layer reads: itself or an earlier one */
    bool k_eq_v;    /* values are the normalized output of k_proj */
    bool moe;       /* has experts in parallel with the dense MLP */
    int rope;       /* index of its rotary table */
} g4_layer_config;

enum {
    G4_MAX_ROPES = 4,
    G4_MAX_DIMS = 4,
    G4_MAX_HEAD_DIM = 1 << 14,
    G4_WHOLE_STRETCH = 1 << 30 /* value of `ahead`: limited by `ends` only */
};

typedef struct {
    int d_model, n_layers, n_heads, d_vocab; /* D, L, H, V */
    int d_ple, d_vocab_ple;                  /* P (0: no per-layer embeddings), rows of the PLE table */
    int n_experts, top_k_experts, d_expert;  /* E, k, M */
    float rms_norm_eps, logit_softcap;       /* softcap 0: none */
    float embed_scale, ple_scale;            /* factors for rows of the two embedding tables */
    float attention_scale;                   /* factor for q . k */
    float attention_softcap;                 /* softcap of the scores, before the mask; 0: none */
    int context_length;
    bool q_norm, k_norm, v_norm; /* per-head RMSNorm of queries, keys, values (values: without gain) */
    bool post_norms;   /* attention and MLP outputs are normalized before they are added to the residual stream */
    bool layer_scalar; /* each layer ends by scaling the residual stream */
    bool unit_gains;   /* norms store w and multiply by 1 + w; the 1 is added when tensors are bound */
    bool tied;         /* the LM head is the embedding table: no lm_head.weight */
    int pad_token;     /* positions without a token read its row of the PLE table */
    bool ple_on_disk;  /* the PLE table is a file mapping: release its pages after rows were read */
    int n_ropes;
    int rope_half[G4_MAX_ROPES];              /* h / 2 */
    const float *rope_inv_freq[G4_MAX_ROPES]; /* [h / 2], copied by g4_model_new */
    const g4_layer_config *layers;            /* [n_layers], copied by g4_model_new */
} g4_config;

/* A named tensor of the checkpoint. `data` must stay valid as long as the model. */
typedef struct {
    const char *name; /* without the checkpoint's name prefix: "layers.0.self_attn.q_proj.weight" */
    g4_dtype dtype;
    int n_dims;
    int64_t shape[G4_MAX_DIMS];
    const void *data;
} g4_named_tensor;

/* ---- models and sequences --------------------------------------------------------------------------------------- */

typedef struct g4_model g4_model;
typedef struct g4_sequence g4_sequence;

typedef enum {
    G4_EXACT, /* the same bits on every machine */
    G4_HIGH,  /* float32's accuracy in another order of additions, the same for any batch; as G4_EXACT without AMX */
    G4_FAST   /* other orders of additions, x in fewer bits */
} g4_precision;

typedef struct {
    int n_threads; /* 0: g4_cpu_count of base/cpu.h */
    g4_precision precision;
} g4_model_options;

/* Calls `each` for every tensor that a config needs, in table order (model/text/weights.c, model/encoders/). A
 * checkpoint may also store the experts' gate and up separately (`experts.gate_proj`, `experts.up_proj`). */
typedef void (*g4_tensor_fn)(void *context, const char *name, const int64_t *shape, int n_dims);
g4_status g4_text_tensors(const g4_config *config, g4_tensor_fn each, void *context, g4_error *err);

g4_status g4_model_new(const g4_config *config, const g4_named_tensor *tensors, size_t n_tensors,
                       const g4_model_options *options, g4_model **model, g4_error *err);
void g4_model_free(g4_model *model); /* free its sequences first */
const g4_config *g4_model_config(const g4_model *model);
const char *g4_model_isa(const g4_model *model);
int g4_model_threads(const g4_model *model);
g4_precision g4_model_precision(const g4_model *model);
size_t g4_model_weight_bytes(const g4_model *model);

g4_status g4_sequence_new(const g4_model *model, g4_dtype kv_dtype, int capacity, g4_sequence **seq, g4_error *err);
void g4_sequence_free(g4_sequence *seq); /* may be NULL */
int g4_sequence_length(const g4_sequence *seq);
int g4_sequence_capacity(const g4_sequence *seq);
g4_dtype g4_sequence_dtype(const g4_sequence *seq);
size_t g4_sequence_bytes(const g4_sequence *seq);
int g4_sequence_min_truncate(const g4_sequence *seq);
g4_status g4_sequence_truncate(g4_sequence *seq, int length, g4_error *err);
g4_status g4_sequence_fork(g4_sequence *seq, g4_sequence **fork, g4_error *err); /* copy-on-write per layer */

/* Locks seq for one call. G4_ESTATE: another call holds the lock. Functions above that change seq lock it themselves, and
 * so does a step unless g4_step_options.locked. */
g4_status g4_sequence_acquire(g4_sequence *seq, g4_error *err);
void g4_sequence_release(g4_sequence *seq);

/* Cache of a layer that computes keys: positions [first, length) as dense [n, K, h] in the sequence's dtype. */
int g4_sequence_first_cached(const g4_sequence *seq, int layer);
void g4_sequence_export(const g4_sequence *seq, int layer, void *k, void *v);
g4_status g4_sequence_import(g4_sequence *seq, int layer, int first, int length, const void *k, const void *v,
                             g4_error *err);
void g4_sequence_set_length(g4_sequence *seq, int length); /* call after all layers are imported */
void g4_sequence_clear(g4_sequence *seq);                  /* call if a layer could not be imported */

/* ---- sites ------------------------------------------------------------------------------------------------------- */

typedef enum {
#define G4_SITE(id, name, dims, when, rows, keys, type, access) G4_SITE_##id,
#include "model/sites.inc"
#undef G4_SITE
    G4_N_SITES
} g4_site;

/* Meaning of a site's axis S. */
typedef enum {
    G4_KEYS_NONE,
    G4_KEYS_CACHED, /* cached keys or values, by position */
    G4_KEYS_SCORES, /* scores of each row of T; -inf at masked keys */
    G4_KEYS_PATTERN /* scores after softmax; 0 at masked keys */
} g4_site_keys;

/* A row of sites.inc. */
typedef struct {
    const char *name;   /* "{}" stands for the layer */
    const char *dims;   /* one letter per axis */
    bool after_pruning; /* from the last layer that computes keys on, it holds only rows that an output needs */
    bool is_int32;      /* else float32 */
    bool writable;
    g4_site_keys keys;
} g4_site_row;

enum { G4_SITE_NAME = 80 };

const g4_site_row *g4_site_row_of(g4_site site);
bool g4_site_is_per_layer(g4_site site);
void g4_site_name(g4_site site, int layer, char name[G4_SITE_NAME]); /* "{}" replaced by the layer */
/* Axis of the run's rows (positions, soft tokens, frames); -1: none (cached keys and values). */
int g4_site_row_axis(g4_site site);
bool g4_site_exists(const g4_config *config, g4_site site, int layer);
/* Fills `shape` for a run of n_rows rows and n_keys key positions; returns the number of axes. */
int g4_site_shape(const g4_config *config, g4_site site, int layer, int n_rows, int n_keys, int64_t shape[G4_MAX_DIMS]);

/* ---- taps: operations on the value of a site --------------------------------------------------------------------- */

/* Taps of one site and run apply in the order given. A run with a G4_TAP_CALL is not chunked, nor pruned before the
 * site. */
typedef enum {
    G4_TAP_COPY,        /* to `dest` */
    G4_TAP_CALL,        /* `call` gets all rows of the run at once and may change them */
    G4_TAP_ADD,         /* x += factor * value */
    G4_TAP_SCALE,       /* x *= factor */
    G4_TAP_SET,         /* x = value */
    G4_TAP_PROJECT_OUT, /* x -= factor * (x . v) / (v . v) * v for each x along the last axis; v = 0: no change */
    G4_TAP_CLAMP,       /* x = min(max(x, low), high) */
    G4_N_TAP_KINDS
} g4_tap_kind;

/* Changes `data` (the site's shape, float32 or int32) in place. */
typedef g4_status (*g4_call_fn)(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err);

typedef struct {
    int first, end; /* {0, 0}: the full axis */
} g4_span;

/* Arithmetic on those of the tap's rows that are computed: an edit does not keep rows from being pruned. In scores and
 * patterns only keys that the row sees change. */
typedef struct {
    g4_span span[G4_MAX_DIMS]; /* for each axis except the row axis: heads, keys by position, channels … */
    /* Element value: values[sum over axes of stride[axis] * index]. `index` counts from span.first; on the row axis it
     * is taken from g4_tap.rows. A stride of 0 broadcasts along its axis, so `values` may be a scalar, a vector of the
     * last axes, or an array that a copy filled. */
    const float *values;
    size_t n_values;
    int64_t stride[G4_MAX_DIMS];
    float factor, low, high;
} g4_edit;

typedef struct {
    g4_tap_kind kind;
    g4_site site;
    int layer, run; /* layer: 0 for sites of the whole model; run: index of the step's run or the encoder's medium */
    /* For each row of the run: a copy's row of `dest`, or an edit's index in `values`; -1: row not selected. NULL: row
     * i maps to i. NULL for sites without a row axis. */
    const int32_t *rows;
    void *dest; /* for a copy: the site's shape with T = n_dest_rows, S = sequence length after the step */
    int n_dest_rows;
    g4_call_fn call;
    void *context;
    g4_edit edit; /* for the other kinds */
} g4_tap;

/* ---- the step --------------------------------------------------------------------------------------------------- */

typedef struct {
    g4_sequence *seq;
    int n_rows;
    const int32_t *tokens;      /* [n_rows] or NULL; negative: the row comes from `embeddings` */
    const float *embeddings;    /* [n_rows, D] or NULL: already scaled; only rows without a token are read */
    const int32_t *logits_rows; /* [n_logits] rows of the run to compute logits for, ascending */
    int n_logits;
    float *logits;  /* [n_logits, V]; NULL: only picks */
    g4_pick *picks; /* [n_logits] what to find in each row of the logits, or NULL */
    /* [n_rows] ascending, i < ends[i] <= n_rows: row i sees the run's rows before ends[i], at most the layer's `ahead`
     * beyond its own. Consecutive rows that see each other (an image) form a stretch. Chunks never split a stretch.
     * NULL: causal. */
    const int32_t *ends;
    /* [n_rows, D] or NULL: the residual stream that enters layer g4_step_options.start_at_layer, in place of what the
     * layers before it make of the embeddings. All runs of a step have it, or none. */
    const float *resid;
} g4_run;

typedef struct {
    int stop_at_layer;  /* -1: all layers; n: layers [0, n) only, and the sequences do not grow */
    int start_at_layer; /* n, with runs' `resid`: no layer before n runs, and the sequences do not grow; else 0 */
    int max_chunk;      /* maximum rows per chunk; 0: 512 */
    /* A run gets rows only once those before it have all theirs, in the same chunk or an earlier one. So an edit of a
     * later run may read `values` that a copy from an earlier one fills. */
    bool in_order;
    bool locked;                /* the caller has locked the runs' sequences */
    int (*poll)(void *context); /* called at most every 20 ms; nonzero cancels the step between parts of a chunk */
    void *poll_context;
    g4_profile *profile; /* the times of this step's operations are added here; may be NULL */
} g4_step_options;

g4_status g4_step(g4_model *model, const g4_run *runs, int n_runs, const g4_tap *taps, int n_taps,
                  const g4_step_options *options, g4_error *err);

/* ---- encoders of images and audio -------------------------------------------------------------------------------- */

typedef enum {
    G4_VISION_TOWER,
    G4_VISION_EMBEDDER, /* no tower: a patch is a soft token */
    G4_AUDIO_TOWER,
    G4_AUDIO_EMBEDDER /* no tower: a frame of samples is a soft token */
} g4_encoder_kind;

/* Sizes that do not apply to a kind are 0. */
typedef struct {
    g4_encoder_kind kind;
    int d_in;            /* values per input row: a patch's pixels, a frame's mel bins or samples */
    int d_model, d_soft; /* width of the tower, and of the projection's input */
    int d_out;           /* d_model of the text model */
    int n_layers, n_heads, n_kv_heads, head_dim, d_mlp;
    int n_positions, pool; /* positions per axis; a soft token averages pool x pool patches */
    bool clipped, standardize;
    bool on_disk; /* layer weights are file mappings: release the pages of weights that were copied */
    float rms_norm_eps;
    const float *rope_inv_freq; /* [head_dim / 4] angular frequencies of either axis; copied by g4_encoder_new */
    int conv_channels[2], conv_kernel;
    int context_left, context_right, chunk; /* audio attention, as in transformers' config */
    float logit_cap, residual_weight, gradient_clipping;
} g4_encoder_config;

typedef struct g4_encoder g4_encoder;

/* One image, video frame or recording. */
typedef struct {
    int n_rows;
    const float *rows;        /* [n_rows, d_in] patches in 0..1, log-mel frames or sample frames */
    const int32_t *positions; /* [n_rows, 2] x and y of each patch; NULL for audio */
    float *soft;              /* [g4_encoder_soft_tokens, d_out] */
} g4_medium;

/* The encoder uses the model's threads; the model must outlive it. With a fast model, layer weights are copied as
 * 16-bit integers. poll can cancel the copying (as in g4_step_options; may be NULL). */
g4_status g4_encoder_new(g4_model *model, const g4_encoder_config *config, const g4_named_tensor *tensors,
                         size_t n_tensors, int (*poll)(void *context), void *poll_context, g4_encoder **encoder,
                         g4_error *err);
g4_status g4_encoder_tensors(const g4_encoder_config *config, g4_tensor_fn each, void *context, g4_error *err);
void g4_encoder_free(g4_encoder *encoder);
const g4_encoder_config *g4_encoder_config_of(const g4_encoder *encoder);
size_t g4_encoder_weight_bytes(const g4_encoder *encoder);
size_t g4_encoder_copied_bytes(const g4_encoder *encoder); /* of the encoder's copies, besides the weights */
int g4_encoder_soft_tokens(const g4_encoder_config *config, int n_rows);
bool g4_encoder_has_positions(const g4_encoder_config *config); /* requires g4_medium.positions */

bool g4_encoder_site_exists(const g4_encoder_config *config, g4_site site, int layer);
int g4_encoder_site_shape(const g4_encoder_config *config, g4_site site, int n_rows, int64_t shape[G4_MAX_DIMS]);

/* Encodes the media as ragged batches, without padding. A tap's `run` is the medium's index. Threads may share an
 * encoder. profile: as in g4_step_options. */
g4_status g4_encode(const g4_encoder *encoder, const g4_medium *media, int n_media, const g4_tap *taps, int n_taps,
                    int (*poll)(void *context), void *poll_context, g4_profile *profile, g4_error *err);

#endif
