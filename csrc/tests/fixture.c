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

/* A g4_tensor_fn: adds a random tensor. Vectors lie around 1, matrices around 0. */
static void add_tensor(void *context, const char *name, const int64_t *shape, int n_dims)
{
    fixture *f = context;
    g4_named_tensor *t = &f->tensors[f->n_tensors];
    size_t n = 1;
    *t = (g4_named_tensor){.name = f->names[f->n_tensors++], .dtype = G4_F32, .n_dims = n_dims};
    snprintf((char *)t->name, sizeof f->names[0], "%s", name);
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)(t->shape[i] = shape[i]);
    float *data = malloc(n * sizeof *data);
    for (size_t i = 0; i < n; i++)
        data[i] = n_dims == 1 ? 1 + 0.2f * random_float(f) : 0.4f * random_float(f);
    t->data = data;
}

static void exit_unless(g4_status status, const g4_error *err)
{
    if (status == G4_OK)
        return;
    printf("%s\n", err->message);
    exit(1);
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
    g4_error err = {0};
    exit_unless(g4_text_tensors(&f->config, add_tensor, f, &err), &err);
}

void fixture_init_encoder(fixture *f, const g4_encoder_config *config)
{
    g4_error err = {0};
    memset(f, 0, sizeof *f);
    f->seed = 1;
    exit_unless(g4_encoder_tensors(config, add_tensor, f, &err), &err);
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
    exit_unless(g4_model_new(&f->config, f->tensors, f->n_tensors, &options, &model, &err), &err);
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

g4_encoder_config encoder_config_of(g4_encoder_kind kind)
{
    g4_encoder_config config = encoder_configs[kind];
    config.kind = kind, config.d_out = D, config.rms_norm_eps = 1e-6f;
    return config;
}

g4_encoder *new_encoder_of(g4_model *model, g4_encoder_kind kind)
{
    static fixture f; /* the encoder keeps using its tensors */
    const g4_encoder_config config = encoder_config_of(kind);
    g4_encoder *encoder = NULL;
    g4_error err = {0};
    fixture_free(&f);
    fixture_init_encoder(&f, &config);
    exit_unless(g4_encoder_new(model, &config, f.tensors, f.n_tensors, NULL, NULL, &encoder, &err), &err);
    return encoder;
}
