/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/csrc_test.h"

static float random_float(fixture *f)
{
    f->seed = f->seed * 1664525u + 1013904223u;
    return (float)(f->seed >> 8) / (float)(1 << 24) - 0.5f;
}

static void add_tensor(fixture *f, const char *name, int n_dims, int64_t a, int64_t b, int64_t c)
{
    size_t n = (size_t)(a * b * c);
    float *data = malloc(n * sizeof *data);
    bool is_vector = n_dims == 1;
    for (size_t i = 0; i < n; i++)
        data[i] = is_vector ? 1 + 0.2f * random_float(f) : 0.4f * random_float(f);
    char *stored_name = f->names[f->n_tensors];
    snprintf(stored_name, sizeof f->names[0], "%s", name);
    f->tensors[f->n_tensors++] = (g4_named_tensor){stored_name, G4_F32, n_dims, {a, b, c, 1}, data};
}

static void add_layer_tensor(fixture *f, int layer, const char *name, int n_dims, int64_t a, int64_t b, int64_t c)
{
    char full[80];
    snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    add_tensor(f, full, n_dims, a, b, c);
}

static void add_layer(fixture *f, int i)
{
    const g4_layer_config *lc = &f->layers[i];
    static const char *const norms[] = {"input_layernorm.weight",
                                        "post_attention_layernorm.weight",
                                        "pre_feedforward_layernorm.weight",
                                        "post_feedforward_layernorm.weight",
                                        "post_per_layer_input_norm.weight",
                                        "pre_feedforward_layernorm_2.weight",
                                        "post_feedforward_layernorm_1.weight",
                                        "post_feedforward_layernorm_2.weight",
                                        "router.scale"};
    for (size_t n = 0; n < sizeof norms / sizeof *norms; n++)
        add_layer_tensor(f, i, norms[n], 1, D, 1, 1);
    add_layer_tensor(f, i, "layer_scalar", 1, 1, 1, 1);
    add_layer_tensor(f, i, "self_attn.q_norm.weight", 1, lc->head_dim, 1, 1);
    add_layer_tensor(f, i, "self_attn.k_norm.weight", 1, lc->head_dim, 1, 1);
    add_layer_tensor(f, i, "self_attn.q_proj.weight", 2, HEADS * lc->head_dim, D, 1);
    add_layer_tensor(f, i, "self_attn.k_proj.weight", 2, lc->n_kv_heads * lc->head_dim, D, 1);
    add_layer_tensor(f, i, "self_attn.v_proj.weight", 2, lc->n_kv_heads * lc->head_dim, D, 1);
    add_layer_tensor(f, i, "self_attn.o_proj.weight", 2, D, HEADS * lc->head_dim, 1);
    add_layer_tensor(f, i, "mlp.gate_proj.weight", 2, lc->d_mlp, D, 1);
    add_layer_tensor(f, i, "mlp.up_proj.weight", 2, lc->d_mlp, D, 1);
    add_layer_tensor(f, i, "mlp.down_proj.weight", 2, D, lc->d_mlp, 1);
    add_layer_tensor(f, i, "per_layer_input_gate.weight", 2, PLE, D, 1);
    add_layer_tensor(f, i, "per_layer_projection.weight", 2, D, PLE, 1);
    add_layer_tensor(f, i, "router.proj.weight", 2, EXPERTS, D, 1);
    add_layer_tensor(f, i, "router.per_expert_scale", 1, EXPERTS, 1, 1);
    add_layer_tensor(f, i, "experts.gate_up_proj", 3, EXPERTS, 2 * 12, D);
    add_layer_tensor(f, i, "experts.down_proj", 3, EXPERTS, D, 12);
}

void fixture_init(fixture *f)
{
    memset(f, 0, sizeof *f);
    f->seed = 1;
    for (int i = 0; i < LAYERS; i++) {
        bool global = i % 3 == 2;
        f->layers[i] = (g4_layer_config){.window = global ? 0 : 5,
                                         .ahead = global ? 0 : G4_WHOLE_STRETCH,
                                         .head_dim = global ? 24 : 12,
                                         .n_kv_heads = global ? 1 : 2,
                                         .d_mlp = i < 4 ? 30 : 60,
                                         .kv_source = i < 4    ? i
                                                      : i == 4 ? 3
                                                               : 2,
                                         .k_eq_v = global,
                                         .moe = i % 2 == 0,
                                         .rope = global};
    }
    for (int r = 0; r < 2; r++)
        for (int j = 0; j < (r ? 12 : 6); j++)
            f->inv_freq[r][j] = r && j > 2 ? 0 : 1.0f / (float)(1 + j * j);
    f->config = (g4_config){.d_model = D,
                            .n_layers = LAYERS,
                            .n_heads = HEADS,
                            .d_vocab = VOCAB,
                            .d_ple = PLE,
                            .d_vocab_ple = VOCAB,
                            .n_experts = EXPERTS,
                            .top_k_experts = 2,
                            .d_expert = 12,
                            .rms_norm_eps = 1e-6f,
                            .logit_softcap = 30,
                            .embed_scale = 6.3f,
                            .ple_scale = 2.8f,
                            .attention_scale = 1,
                            .q_norm = true,
                            .k_norm = true,
                            .v_norm = true,
                            .post_norms = true,
                            .layer_scalar = true,
                            .tied = true,
                            .context_length = 512,
                            .n_ropes = 2,
                            .rope_half = {6, 12},
                            .rope_inv_freq = {f->inv_freq[0], f->inv_freq[1]},
                            .layers = f->layers};
    add_tensor(f, "embed_tokens.weight", 2, VOCAB, D, 1);
    add_tensor(f, "norm.weight", 1, D, 1, 1);
    add_tensor(f, "embed_tokens_per_layer.weight", 2, VOCAB, LAYERS * PLE, 1);
    add_tensor(f, "per_layer_model_projection.weight", 2, LAYERS * PLE, D, 1);
    add_tensor(f, "per_layer_projection_norm.weight", 1, PLE, 1, 1);
    for (int i = 0; i < LAYERS; i++)
        add_layer(f, i);
}

void fixture_init_encoder(fixture *f, g4_model *model, const g4_encoder_config *config)
{
    g4_error err = {0};
    g4_encoder *encoder = NULL;
    char name[80];
    while (g4_encoder_new(model, config, f->tensors, f->n_tensors, NULL, NULL, &encoder, &err) == G4_EFORMAT) {
        long long a, b, c, d;
        g4_named_tensor *last = f->n_tensors ? &f->tensors[f->n_tensors - 1] : NULL;
        if (sscanf(err.message, "the checkpoint has no tensor %79[^,],", name) == 1) {
            add_tensor(f, name, 1, 1, 1, 1);
            continue;
        }
        const char *shape = strstr(err.message, "calls for [");
        const int n = shape ? sscanf(shape, "calls for [%lld, %lld, %lld, %lld]", &a, &b, &c, &d) : 0;
        if (n < 1)
            break;
        snprintf(name, sizeof name, "%s", last->name);
        free((void *)last->data);
        f->n_tensors--;
        add_tensor(f, name, n, a, n > 1 ? b : 1, (n > 2 ? c : 1) * (n > 3 ? d : 1));
        f->tensors[f->n_tensors - 1].shape[2] = n > 2 ? c : 1;
        f->tensors[f->n_tensors - 1].shape[3] = n > 3 ? d : 1;
    }
    if (!encoder)
        printf("fixture_init_encoder: %s\n", err.message);
    g4_encoder_free(encoder);
}

void fixture_free(fixture *f)
{
    for (size_t i = 0; i < f->n_tensors; i++)
        free((void *)f->tensors[i].data);
}

g4_model *new_model_with(fixture *f, g4_model_options options)
{
    g4_model *model = NULL;
    g4_error err = {0};
    if (g4_model_new(&f->config, f->tensors, f->n_tensors, &options, &model, &err) != G4_OK) {
        printf("%s\n", err.message);
        exit(1);
    }
    return model;
}

g4_model *new_model(fixture *f, int n_threads)
{
    return new_model_with(f, (g4_model_options){.n_threads = n_threads});
}

/* ---- encoders ---------------------------------------------------------------------------------------------------- */

static const float encoder_inv_freq[] = {1, 0.3f};

static const g4_encoder_config encoder_configs[] = {
    [G4_VISION_TOWER] = {.d_in = 12,
                         .d_model = 24,
                         .d_soft = 24,
                         .n_layers = 2,
                         .n_heads = 3,
                         .n_kv_heads = 1,
                         .head_dim = 8,
                         .d_mlp = 20,
                         .n_positions = 16,
                         .pool = 2,
                         .rope_inv_freq = encoder_inv_freq},
    [G4_VISION_EMBEDDER] = {.d_in = 12, .d_model = 24, .d_soft = 24, .n_positions = 16},
    [G4_AUDIO_TOWER] = {.d_in = 16,
                        .d_model = 24,
                        .d_soft = 20,
                        .n_layers = 2,
                        .n_heads = 3,
                        .n_kv_heads = 3,
                        .head_dim = 8,
                        .d_mlp = 28,
                        .conv_channels = {8, 4},
                        .conv_kernel = 5,
                        .context_left = 5,
                        .chunk = 4,
                        .logit_cap = 2,
                        .residual_weight = 0.5f,
                        .gradient_clipping = 1e10f},
    [G4_AUDIO_EMBEDDER] = {.d_in = 20, .d_soft = 20}};

g4_encoder *new_encoder_of(g4_model *model, g4_encoder_kind kind)
{
    static fixture f; /* the encoder keeps using its tensors */
    g4_encoder_config config = encoder_configs[kind];
    g4_encoder *encoder = NULL;
    g4_error err = {0};
    fixture_free(&f);
    memset(&f, 0, sizeof f);
    config.kind = kind, config.d_out = D, config.rms_norm_eps = 1e-6f;
    fixture_init_encoder(&f, model, &config);
    if (g4_encoder_new(model, &config, f.tensors, f.n_tensors, NULL, NULL, &encoder, &err) != G4_OK) {
        printf("%s\n", err.message);
        exit(1);
    }
    return encoder;
}
