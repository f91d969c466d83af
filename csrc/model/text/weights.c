/* SPDX-License-Identifier: Apache-2.0 */
#include "model/text/weights.h"

#include <stdio.h>
#include <string.h>

#include "model/bind.h"
#include "model/config.h"

#define MATRIX G4_BIND_MATRIX
#define VECTOR G4_BIND_VECTOR

typedef enum { ALWAYS, OWN_KV, OWN_V, IF_PLE, IF_MOE } condition;

#define MODEL(member) offsetof(g4_weights, member)
#define LAYER(member) offsetof(g4_layer_weights, member)

/* clang-format off */
static const g4_bind_row model_rows[] = {
    {"embed_tokens.weight",               MODEL(embed),            MATRIX, "V D",   ALWAYS, G4_OP_EMBED},
    {"norm.weight",                       MODEL(final_norm),       VECTOR, "D",     ALWAYS, G4_OP_OTHER},
    {"embed_tokens_per_layer.weight",     MODEL(ple_table),        MATRIX, "W LP",  IF_PLE, G4_OP_PLE_TABLE},
    {"per_layer_model_projection.weight", MODEL(ple_context),      MATRIX, "LP D",  IF_PLE, G4_OP_PLE_CONTEXT},
    {"per_layer_projection_norm.weight",  MODEL(ple_context_norm), VECTOR, "P",     IF_PLE, G4_OP_OTHER},
};

static const g4_bind_row layer_rows[] = {
    {"input_layernorm.weight",              LAYER(ln1),              VECTOR, "D",     ALWAYS, G4_OP_OTHER},
    {"post_attention_layernorm.weight",     LAYER(ln1_post),         VECTOR, "D",     ALWAYS, G4_OP_OTHER},
    {"pre_feedforward_layernorm.weight",    LAYER(ln2),              VECTOR, "D",     ALWAYS, G4_OP_OTHER},
    {"post_feedforward_layernorm.weight",   LAYER(ln2_post),         VECTOR, "D",     ALWAYS, G4_OP_OTHER},
    {"self_attn.q_proj.weight",             LAYER(q),                MATRIX, "Hh D",  ALWAYS, G4_OP_Q},
    {"self_attn.k_proj.weight",             LAYER(k),                MATRIX, "Kh D",  OWN_KV, G4_OP_KV},
    {"self_attn.v_proj.weight",             LAYER(v),                MATRIX, "Kh D",  OWN_V,  G4_OP_KV},
    {"self_attn.o_proj.weight",             LAYER(o),                MATRIX, "D Hh",  ALWAYS, G4_OP_O},
    {"self_attn.q_norm.weight",             LAYER(q_norm),           VECTOR, "h",     ALWAYS, G4_OP_OTHER},
    {"self_attn.k_norm.weight",             LAYER(k_norm),           VECTOR, "h",     OWN_KV, G4_OP_OTHER},
    {"mlp.gate_proj.weight",                LAYER(gate),             MATRIX, "F D",   ALWAYS, G4_OP_GATE_UP},
    {"mlp.up_proj.weight",                  LAYER(up),               MATRIX, "F D",   ALWAYS, G4_OP_GATE_UP},
    {"mlp.down_proj.weight",                LAYER(down),             MATRIX, "D F",   ALWAYS, G4_OP_DOWN},
    {"layer_scalar",                        LAYER(layer_scalar),     VECTOR, "1",     ALWAYS, G4_OP_OTHER},
    {"per_layer_input_gate.weight",         LAYER(ple_gate),         MATRIX, "P D",   IF_PLE, G4_OP_PLE_GATE},
    {"per_layer_projection.weight",         LAYER(ple_projection),   MATRIX, "D P",   IF_PLE, G4_OP_PLE_PROJECTION},
    {"post_per_layer_input_norm.weight",    LAYER(ple_norm),         VECTOR, "D",     IF_PLE, G4_OP_OTHER},
    {"router.proj.weight",                  LAYER(router),           MATRIX, "E D",   IF_MOE, G4_OP_ROUTER},
    {"router.scale",                        LAYER(router_scale),     VECTOR, "D",     IF_MOE, G4_OP_OTHER},
    {"router.per_expert_scale",             LAYER(per_expert_scale), VECTOR, "E",     IF_MOE, G4_OP_OTHER},
    {"experts.down_proj",                   LAYER(experts_down),     MATRIX, "E D M", IF_MOE, G4_OP_EXPERTS_DOWN},
    {"pre_feedforward_layernorm_2.weight",  LAYER(moe_in_norm),      VECTOR, "D",     IF_MOE, G4_OP_OTHER},
    {"post_feedforward_layernorm_1.weight", LAYER(mlp_out_norm),     VECTOR, "D",     IF_MOE, G4_OP_OTHER},
    {"post_feedforward_layernorm_2.weight", LAYER(moe_out_norm),     VECTOR, "D",     IF_MOE, G4_OP_OTHER},
};
/* clang-format on */

static const g4_bind_row head_row = {"lm_head.weight", MODEL(head), MATRIX, "V D", ALWAYS, G4_OP_HEAD};

/* Gate rows first within an expert, or each in a tensor of its own (older GGUF). */
static const g4_bind_row gate_up_row = {"experts.gate_up_proj", LAYER(experts_gate), MATRIX, "E 2M D", IF_MOE,
                                        G4_OP_EXPERTS_GATE_UP};
static const g4_bind_row gate_row = {"experts.gate_proj",  LAYER(experts_gate), MATRIX, "E M D", IF_MOE,
                                     G4_OP_EXPERTS_GATE_UP};
static const g4_bind_row up_row = {"experts.up_proj",    LAYER(experts_up), MATRIX, "E M D", IF_MOE,
                                   G4_OP_EXPERTS_GATE_UP};

enum { N_MODEL_ROWS = sizeof model_rows / sizeof *model_rows, N_LAYER_ROWS = sizeof layer_rows / sizeof *layer_rows };

static int64_t letter_size(const void *config, int layer, char letter)
{
    const g4_config *c = config;
    switch (letter) {
    case 'D': return c->d_model;
    case 'V': return c->d_vocab;
    case 'W': return c->d_vocab_ple;
    case 'L': return c->n_layers;
    case 'P': return c->d_ple;
    case 'H': return c->n_heads;
    case 'E': return c->n_experts;
    case 'M': return c->d_expert;
    case 'K': return c->layers[layer].n_kv_heads;
    case 'h': return c->layers[layer].head_dim;
    default: return c->layers[layer].d_mlp; /* F */
    }
}

static bool is_wanted(const g4_config *c, int layer, int when)
{
    switch (when) {
    case OWN_KV: return g4_computes_kv(c, layer);
    case OWN_V: return g4_computes_kv(c, layer) && !c->layers[layer].k_eq_v;
    case IF_PLE: return c->d_ple > 0;
    case IF_MOE: return c->layers[layer].moe;
    default: return true;
    }
}

static const g4_config *config_of(const g4_binder *b)
{
    return b->config;
}

static g4_status bind_experts(g4_binder *b, int layer, g4_layer_weights *weights)
{
    const size_t m = (size_t)config_of(b)->d_expert;
    char name[128];
    snprintf(name, sizeof name, "layers.%d.%s", layer, gate_row.name);
    if (g4_binder_find(b, name)) {
        weights->gate_rows = m;
        G4_TRY(g4_bind(b, &gate_row, name, layer, weights));
        snprintf(name, sizeof name, "layers.%d.%s", layer, up_row.name);
        return g4_bind(b, &up_row, name, layer, weights);
    }
    weights->gate_rows = 2 * m;
    snprintf(name, sizeof name, "layers.%d.%s", layer, gate_up_row.name);
    G4_TRY(g4_bind(b, &gate_up_row, name, layer, weights));
    weights->experts_up = g4_matrix_rows(&weights->experts_gate, m, weights->experts_gate.n_rows - m);
    return G4_OK;
}

static g4_status bind_layer(g4_binder *b, int layer, g4_layer_weights *weights)
{
    char name[128];
    for (int i = 0; i < N_LAYER_ROWS; i++) {
        if (!is_wanted(config_of(b), layer, layer_rows[i].when))
            continue;
        snprintf(name, sizeof name, "layers.%d.%s", layer, layer_rows[i].name);
        G4_TRY(g4_bind(b, &layer_rows[i], name, layer, weights));
    }
    return is_wanted(config_of(b), layer, IF_MOE) ? bind_experts(b, layer, weights) : G4_OK;
}

static g4_status bind_head(g4_binder *b, g4_weights *weights)
{
    weights->head = weights->embed;
    weights->head.op = G4_OP_HEAD;
    return g4_binder_find(b, head_row.name) ? g4_bind(b, &head_row, head_row.name, 0, weights) : G4_OK;
}

static g4_status bind_all(g4_binder *b, g4_weights *weights)
{
    const g4_config *c = config_of(b);
    for (int i = 0; i < N_MODEL_ROWS; i++)
        if (is_wanted(c, 0, model_rows[i].when))
            G4_TRY(g4_bind(b, &model_rows[i], model_rows[i].name, 0, weights));
    G4_TRY(bind_head(b, weights));
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
    g4_binder b = {.config = config, .letter = letter_size, .arena = arena, .err = err};
    G4_TRY(g4_binder_open(&b, tensors, n_tensors));
    g4_status status = bind_all(&b, weights);
    weights->n_bytes = b.n_bytes;
    g4_binder_close(&b);
    return status;
}
