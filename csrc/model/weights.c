/* SPDX-License-Identifier: Apache-2.0 */
#include "model/weights.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"

typedef enum { MATRIX, VECTOR } kind;
typedef enum { ALWAYS, OWN_KV, OWN_V, IF_PLE, IF_MOE } condition;

typedef struct {
    const char *name;
    size_t offset; /* of the member it fills */
    kind kind;
    const char *axes; /* axes separated by spaces, each a product of the letters of base/tensor.h and digits */
    condition when;
    g4_op op; /* of a matrix */
} row;

#define MODEL(member) offsetof(g4_weights, member)
#define LAYER(member) offsetof(g4_layer_weights, member)

/* clang-format off */
static const row model_rows[] = {
    {"embed_tokens.weight",               MODEL(embed),            MATRIX, "V D",   ALWAYS, G4_OP_EMBED},
    {"norm.weight",                       MODEL(final_norm),       VECTOR, "D",     ALWAYS, G4_OP_OTHER},
    {"embed_tokens_per_layer.weight",     MODEL(ple_table),        MATRIX, "W LP",  IF_PLE, G4_OP_PLE_TABLE},
    {"per_layer_model_projection.weight", MODEL(ple_context),      MATRIX, "LP D",  IF_PLE, G4_OP_PLE_CONTEXT},
    {"per_layer_projection_norm.weight",  MODEL(ple_context_norm), VECTOR, "P",     IF_PLE, G4_OP_OTHER},
};

static const row layer_rows[] = {
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

static const row head_row = {"lm_head.weight", MODEL(head), MATRIX, "V D", ALWAYS, G4_OP_HEAD};

/* Gate rows first within an expert, or each in a tensor of its own (older GGUF). */
static const row gate_up_row = {"experts.gate_up_proj", LAYER(experts_gate), MATRIX, "E 2M D", IF_MOE,
                                G4_OP_EXPERTS_GATE_UP};
static const row gate_row = {"experts.gate_proj", LAYER(experts_gate), MATRIX, "E M D", IF_MOE, G4_OP_EXPERTS_GATE_UP};
static const row up_row = {"experts.up_proj", LAYER(experts_up), MATRIX, "E M D", IF_MOE, G4_OP_EXPERTS_GATE_UP};

enum { N_MODEL_ROWS = sizeof model_rows / sizeof *model_rows, N_LAYER_ROWS = sizeof layer_rows / sizeof *layer_rows };

typedef struct {
    const g4_config *config;
    const g4_named_tensor **sorted;
    size_t n_tensors;
    g4_arena *arena;
    size_t n_bytes;
    g4_error *err;
} binder;

static int64_t letter_size(const g4_config *c, const g4_layer_config *layer, char letter)
{
    switch (letter) {
    case 'D': return c->d_model;
    case 'V': return c->d_vocab;
    case 'W': return c->d_vocab_ple;
    case 'L': return c->n_layers;
    case 'P': return c->d_ple;
    case 'H': return c->n_heads;
    case 'E': return c->n_experts;
    case 'M': return c->d_expert;
    case 'K': return layer->n_kv_heads;
    case 'h': return layer->head_dim;
    case 'F': return layer->d_mlp;
    default: return letter - '0';
    }
}

static int expected_shape(const g4_config *c, const g4_layer_config *layer, const char *axes,
                          int64_t shape[G4_MAX_DIMS])
{
    int n = 0;
    shape[0] = 1;
    for (; *axes; axes++) {
        if (*axes == ' ')
            shape[++n] = 1;
        else
            shape[n] *= letter_size(c, layer, *axes);
    }
    return n + 1;
}

static bool is_wanted(const g4_config *c, int layer, condition when)
{
    switch (when) {
    case OWN_KV: return g4_computes_kv(c, layer);
    case OWN_V: return g4_computes_kv(c, layer) && !c->layers[layer].k_eq_v;
    case IF_PLE: return c->d_ple > 0;
    case IF_MOE: return c->layers[layer].moe;
    default: return true;
    }
}

static int compare_names(const void *a, const void *b)
{
    return strcmp((*(const g4_named_tensor *const *)a)->name, (*(const g4_named_tensor *const *)b)->name);
}

static const g4_named_tensor *find(const binder *b, const char *name)
{
    const g4_named_tensor key = {.name = name}, *pointer = &key;
    const g4_named_tensor **found = bsearch(&pointer, b->sorted, b->n_tensors, sizeof *b->sorted, compare_names);
    return found ? *found : NULL;
}

static void print_shape(char *text, size_t size, const int64_t *shape, int n_dims)
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < n_dims && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
}

static g4_status check_shape(const binder *b, const g4_named_tensor *t, const int64_t *expected, int n_dims)
{
    bool same = t->n_dims == n_dims;
    for (int i = 0; same && i < n_dims; i++)
        same = t->shape[i] == expected[i];
    if (same)
        return G4_OK;
    char got_text[96], expected_text[96];
    print_shape(got_text, sizeof got_text, t->shape, t->n_dims);
    print_shape(expected_text, sizeof expected_text, expected, n_dims);
    return g4_fail(b->err, G4_EFORMAT, "tensor %s has shape [%s], the config calls for [%s]", t->name, got_text,
                   expected_text);
}

static g4_status check_blocks(const binder *b, const g4_named_tensor *t, const row *r, size_t n_cols)
{
    if (r->kind == VECTOR && g4_is_quantised(t->dtype))
        return g4_fail(b->err, G4_EFORMAT, "tensor %s has dtype %s, expected F32, F16 or BF16", t->name,
                       g4_dtype_name(t->dtype));
    if (n_cols % g4_block_size(t->dtype))
        return g4_fail(b->err, G4_EFORMAT,
                       "tensor %s has rows of %zu values, which is no multiple of the %zu of a %s block", t->name,
                       n_cols, g4_block_size(t->dtype), g4_dtype_name(t->dtype));
    return G4_OK;
}

static float *copy_vector(binder *b, const g4_named_tensor *t, size_t n)
{
    float *values = g4_arena_alloc(b->arena, n * sizeof *values);
    if (!values) {
        g4_fail_nomem(b->err, n * sizeof *values);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        const char *at = (const char *)t->data + i * g4_block_bytes(t->dtype);
        uint16_t half;
        if (t->dtype == G4_F32) {
            memcpy(&values[i], at, 4);
            continue;
        }
        memcpy(&half, at, 2);
        values[i] = t->dtype == G4_F16 ? g4_f16_to_f32(half) : g4_bf16_to_f32(half);
    }
    return values;
}

static g4_status bind_row(binder *b, const row *r, const char *name, const g4_layer_config *layer, void *owner)
{
    int64_t shape[G4_MAX_DIMS];
    int n_dims = expected_shape(b->config, layer, r->axes, shape);
    const g4_named_tensor *t = find(b, name);
    if (!t)
        return g4_fail(b->err, G4_EFORMAT, "the checkpoint has no tensor %s, which its config calls for", name);
    G4_TRY(check_shape(b, t, shape, n_dims));
    size_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    G4_TRY(check_blocks(b, t, r, (size_t)shape[n_dims - 1]));
    b->n_bytes += g4_dtype_bytes(t->dtype, n);
    void *member = (char *)owner + r->offset;
    if (r->kind == VECTOR) {
        float *values = copy_vector(b, t, n);
        memcpy(member, &values, sizeof values);
        return values ? G4_OK : G4_ENOMEM;
    }
    size_t n_cols = (size_t)shape[n_dims - 1];
    g4_matrix w = {t->data, t->dtype, n / n_cols, n_cols, n_cols, r->op};
    memcpy(member, &w, sizeof w);
    return G4_OK;
}

static g4_status bind_experts(binder *b, int layer, g4_layer_weights *weights)
{
    const g4_layer_config *config = &b->config->layers[layer];
    const size_t m = (size_t)b->config->d_expert;
    char name[128];
    snprintf(name, sizeof name, "layers.%d.%s", layer, gate_row.name);
    if (find(b, name)) {
        weights->gate_rows = m;
        G4_TRY(bind_row(b, &gate_row, name, config, weights));
        snprintf(name, sizeof name, "layers.%d.%s", layer, up_row.name);
        return bind_row(b, &up_row, name, config, weights);
    }
    weights->gate_rows = 2 * m;
    snprintf(name, sizeof name, "layers.%d.%s", layer, gate_up_row.name);
    G4_TRY(bind_row(b, &gate_up_row, name, config, weights));
    weights->experts_up = g4_matrix_rows(&weights->experts_gate, m, weights->experts_gate.n_rows - m);
    return G4_OK;
}

static g4_status bind_layer(binder *b, int layer, g4_layer_weights *weights)
{
    char name[128];
    for (int i = 0; i < N_LAYER_ROWS; i++) {
        if (!is_wanted(b->config, layer, layer_rows[i].when))
            continue;
        snprintf(name, sizeof name, "layers.%d.%s", layer, layer_rows[i].name);
        G4_TRY(bind_row(b, &layer_rows[i], name, &b->config->layers[layer], weights));
    }
    return is_wanted(b->config, layer, IF_MOE) ? bind_experts(b, layer, weights) : G4_OK;
}

static g4_status bind_head(binder *b, g4_weights *weights)
{
    weights->head = weights->embed;
    weights->head.op = head_row.op;
    return find(b, head_row.name) ? bind_row(b, &head_row, head_row.name, NULL, weights) : G4_OK;
}

static g4_status bind_all(binder *b, g4_weights *weights)
{
    const g4_config *c = b->config;
    for (int i = 0; i < N_MODEL_ROWS; i++)
        if (is_wanted(c, 0, model_rows[i].when))
            G4_TRY(bind_row(b, &model_rows[i], model_rows[i].name, NULL, weights));
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
    binder b = {.config = config, .n_tensors = n_tensors, .arena = arena, .err = err};
    b.sorted = malloc((n_tensors + 1) * sizeof *b.sorted);
    if (!b.sorted)
        return g4_fail_nomem(err, n_tensors * sizeof *b.sorted);
    for (size_t i = 0; i < n_tensors; i++)
        b.sorted[i] = &tensors[i];
    qsort(b.sorted, n_tensors, sizeof *b.sorted, compare_names);
    g4_status status = bind_all(&b, weights);
    weights->n_bytes = b.n_bytes;
    free(b.sorted);
    return status;
}
