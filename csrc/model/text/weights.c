/* SPDX-License-Identifier: Apache-2.0 */
#include "model/text/weights.h"

#include <stdio.h>
#include <string.h>

#include "model/bind.h"
#include "model/config.h"

#define MATRIX G4_BIND_MATRIX
#define VECTOR G4_BIND_VECTOR
#define GAIN G4_BIND_GAIN

typedef enum {
    ALWAYS,
    UNTIED,
    POST_NORMS,
    SCALAR,
    Q_NORM,
    OWN_KV,
    OWN_V,
    K_NORM, /* layers that compute keys */
    PLE,
    MOE,
    MOE_GATE_UP /* one tensor or two (bind_experts) */
} condition;

#define MODEL(member) offsetof(g4_weights, member)
#define LAYER(member) offsetof(g4_layer_weights, member)

/* The list of the text model's tensors. Python reads it through g4_text_tensors. */
/* clang-format off */
static const g4_bind_row model_rows[] = {
    {"embed_tokens.weight",               MODEL(embed),            MATRIX, "V D",   ALWAYS, G4_OP_EMBED},
    {"norm.weight",                       MODEL(final_norm),       GAIN,   "D",     ALWAYS, G4_OP_OTHER},
    {"lm_head.weight",                    MODEL(head),             MATRIX, "V D",   UNTIED, G4_OP_HEAD},
    {"embed_tokens_per_layer.weight",     MODEL(ple_table),        MATRIX, "W LP",  PLE,    G4_OP_PLE_TABLE},
    {"per_layer_model_projection.weight", MODEL(ple_context),      MATRIX, "LP D",  PLE,    G4_OP_PLE_CONTEXT},
    {"per_layer_projection_norm.weight",  MODEL(ple_context_norm), GAIN,   "P",     PLE,    G4_OP_OTHER},
};

static const g4_bind_row layer_rows[] = {
    {"layer_scalar",                        LAYER(layer_scalar),     VECTOR, "1",      SCALAR,      G4_OP_OTHER},
    {"input_layernorm.weight",              LAYER(ln1),              GAIN,   "D",      ALWAYS,      G4_OP_OTHER},
    {"post_attention_layernorm.weight",     LAYER(ln1_post),         GAIN,   "D",      POST_NORMS,  G4_OP_OTHER},
    {"pre_feedforward_layernorm.weight",    LAYER(ln2),              GAIN,   "D",      ALWAYS,      G4_OP_OTHER},
    {"post_feedforward_layernorm.weight",   LAYER(ln2_post),         GAIN,   "D",      POST_NORMS,  G4_OP_OTHER},
    {"self_attn.q_proj.weight",             LAYER(q),                MATRIX, "Hh D",   ALWAYS,      G4_OP_Q},
    {"self_attn.q_norm.weight",             LAYER(q_norm),           GAIN,   "h",      Q_NORM,      G4_OP_OTHER},
    {"self_attn.o_proj.weight",             LAYER(o),                MATRIX, "D Hh",   ALWAYS,      G4_OP_O},
    {"self_attn.k_proj.weight",             LAYER(k),                MATRIX, "Kh D",   OWN_KV,      G4_OP_KV},
    {"self_attn.k_norm.weight",             LAYER(k_norm),           GAIN,   "h",      K_NORM,      G4_OP_OTHER},
    {"self_attn.v_proj.weight",             LAYER(v),                MATRIX, "Kh D",   OWN_V,       G4_OP_KV},
    {"mlp.gate_proj.weight",                LAYER(gate),             MATRIX, "F D",    ALWAYS,      G4_OP_GATE_UP},
    {"mlp.up_proj.weight",                  LAYER(up),               MATRIX, "F D",    ALWAYS,      G4_OP_GATE_UP},
    {"mlp.down_proj.weight",                LAYER(down),             MATRIX, "D F",    ALWAYS,      G4_OP_DOWN},
    {"per_layer_input_gate.weight",         LAYER(ple_gate),         MATRIX, "P D",    PLE,         G4_OP_PLE_GATE},
    {"per_layer_projection.weight",         LAYER(ple_projection),   MATRIX, "D P",    PLE,         G4_OP_PLE_PROJECTION},
    {"post_per_layer_input_norm.weight",    LAYER(ple_norm),         GAIN,   "D",      PLE,         G4_OP_OTHER},
    {"router.proj.weight",                  LAYER(router),           MATRIX, "E D",    MOE,         G4_OP_ROUTER},
    {"router.scale",                        LAYER(router_scale),     VECTOR, "D",      MOE,         G4_OP_OTHER},
    {"router.per_expert_scale",             LAYER(per_expert_scale), VECTOR, "E",      MOE,         G4_OP_OTHER},
    {"experts.gate_up_proj",                LAYER(experts_gate),     MATRIX, "E 2M D", MOE_GATE_UP, G4_OP_EXPERTS_GATE_UP},
    {"experts.down_proj",                   LAYER(experts_down),     MATRIX, "E D M",  MOE,         G4_OP_EXPERTS_DOWN},
    {"pre_feedforward_layernorm_2.weight",  LAYER(moe_in_norm),      GAIN,   "D",      MOE,         G4_OP_OTHER},
    {"post_feedforward_layernorm_1.weight", LAYER(mlp_out_norm),     GAIN,   "D",      MOE,         G4_OP_OTHER},
    {"post_feedforward_layernorm_2.weight", LAYER(moe_out_norm),     GAIN,   "D",      MOE,         G4_OP_OTHER},
};

/* Older GGUF: replace experts.gate_up_proj, whose rows are an expert's gate, then its up. */
static const g4_bind_row gate_row =
    {"experts.gate_proj",                   LAYER(experts_gate),     MATRIX, "E M D",  MOE,         G4_OP_EXPERTS_GATE_UP};
static const g4_bind_row up_row =
    {"experts.up_proj",                     LAYER(experts_up),       MATRIX, "E M D",  MOE,         G4_OP_EXPERTS_GATE_UP};
/* clang-format on */

enum { N_MODEL_ROWS = sizeof model_rows / sizeof *model_rows, N_LAYER_ROWS = sizeof layer_rows / sizeof *layer_rows };

static int64_t letter_size(const void *config, int layer, char letter)
{
    return g4_config_size(config, layer, letter);
}

static bool is_wanted(const g4_config *c, int layer, int when)
{
    switch (when) {
    case UNTIED: return !c->tied;
    case POST_NORMS: return c->post_norms;
    case SCALAR: return c->layer_scalar;
    case Q_NORM: return c->q_norm;
    case OWN_KV: return g4_computes_kv(c, layer);
    case OWN_V: return g4_computes_kv(c, layer) && !c->layers[layer].k_eq_v;
    case K_NORM: return g4_computes_kv(c, layer) && c->k_norm;
    case PLE: return c->d_ple > 0;
    case MOE:
    case MOE_GATE_UP: return c->layers[layer].moe;
    default: return true;
    }
}

enum { MAX_NAME = 128 };

static const char *layer_name(char name[MAX_NAME], int layer, const g4_bind_row *row)
{
    snprintf(name, MAX_NAME, "layers.%d.%s", layer, row->name);
    return name;
}

static const g4_config *config_of(const g4_binder *b)
{
    return b->config;
}

static g4_status bind_experts(g4_binder *b, const g4_bind_row *both, int layer, g4_layer_weights *weights)
{
    const size_t m = (size_t)config_of(b)->d_expert;
    char name[MAX_NAME];
    if (g4_binder_find(b, layer_name(name, layer, &gate_row))) {
        weights->gate_rows = m;
        G4_TRY(g4_bind(b, &gate_row, name, layer, weights));
        return g4_bind(b, &up_row, layer_name(name, layer, &up_row), layer, weights);
    }
    weights->gate_rows = 2 * m;
    G4_TRY(g4_bind(b, both, layer_name(name, layer, both), layer, weights));
    if (!b->list)
        weights->experts_up = g4_matrix_rows(&weights->experts_gate, m, weights->experts_gate.n_rows - m);
    return G4_OK;
}

static g4_status bind_layer(g4_binder *b, int layer, g4_layer_weights *weights)
{
    char name[MAX_NAME];
    for (int i = 0; i < N_LAYER_ROWS; i++) {
        const g4_bind_row *row = &layer_rows[i];
        if (!is_wanted(config_of(b), layer, row->when))
            continue;
        if (row->when == MOE_GATE_UP)
            G4_TRY(bind_experts(b, row, layer, weights));
        else
            G4_TRY(g4_bind(b, row, layer_name(name, layer, row), layer, weights));
    }
    return G4_OK;
}

static g4_status bind_all(g4_binder *b, g4_weights *weights)
{
    const g4_config *c = config_of(b);
    for (int i = 0; i < N_MODEL_ROWS; i++)
        if (is_wanted(c, 0, model_rows[i].when))
            G4_TRY(g4_bind(b, &model_rows[i], model_rows[i].name, 0, weights));
    if (c->tied) {
        weights->head = weights->embed;
        weights->head.op = G4_OP_HEAD;
    }
    weights->layers = g4_arena_alloc(b->arena, (size_t)c->n_layers * sizeof *weights->layers);
    if (!weights->layers)
        return g4_fail_nomem(b->err, (size_t)c->n_layers * sizeof *weights->layers);
    memset(weights->layers, 0, (size_t)c->n_layers * sizeof *weights->layers);
    for (int layer = 0; layer < c->n_layers; layer++)
        G4_TRY(bind_layer(b, layer, &weights->layers[layer]));
    return G4_OK;
}

g4_status g4_weights_bind(g4_weights *weights, const g4_config *config, const g4_named_tensor *tensors,
                          size_t n_tensors, g4_arena *arena, g4_error *err)
{
    g4_binder b = {
        .config = config, .letter = letter_size, .unit_gains = config->unit_gains, .arena = arena, .err = err};
    G4_TRY(g4_binder_open(&b, tensors, n_tensors));
    g4_status status = bind_all(&b, weights);
    weights->n_bytes = b.n_bytes;
    g4_binder_close(&b);
    return status;
}

g4_status g4_text_tensors(const g4_config *config, g4_tensor_fn each, void *context, g4_error *err)
{
    g4_weights weights;
    G4_TRY(g4_config_check(config, err));
    g4_arena *arena = g4_arena_new();
    if (!arena)
        return g4_fail_nomem(err, sizeof(void *));
    g4_binder b = {
        .config = config, .letter = letter_size, .arena = arena, .err = err, .list = each, .list_context = context};
    g4_status status = bind_all(&b, &weights);
    g4_arena_free(arena);
    return status;
}
