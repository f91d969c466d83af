/* SPDX-License-Identifier: Apache-2.0 */
#include "model/config.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static g4_status check_range(const char *name, long value, long low, long high, g4_error *err)
{
    if (value < low || value > high)
        return g4_fail(err, G4_EVALUE, "config: %s is %ld, expected %ld to %ld", name, value, low, high);
    return G4_OK;
}

static g4_status check_layer(const g4_config *c, int i, g4_error *err)
{
    const g4_layer_config *layer = &c->layers[i];
    G4_TRY(check_range("layer head_dim", layer->head_dim, 2, G4_MAX_HEAD_DIM, err));
    G4_TRY(check_range("layer n_kv_heads", layer->n_kv_heads, 1, c->n_heads, err));
    G4_TRY(check_range("layer d_mlp", layer->d_mlp, 1, 1 << 20, err));
    G4_TRY(check_range("layer window", layer->window, 0, 1 << 30, err));
    G4_TRY(check_range("layer ahead", layer->ahead, 0, G4_WHOLE_STRETCH, err));
    G4_TRY(check_range("layer kv_source", layer->kv_source, 0, i, err));
    G4_TRY(check_range("layer rope", layer->rope, 0, c->n_ropes - 1, err));
    if (c->n_heads % layer->n_kv_heads)
        return g4_fail(err, G4_EVALUE, "config: layer %d has %d key/value heads, which do not divide %d heads", i,
                       layer->n_kv_heads, c->n_heads);
    if (c->rope_half[layer->rope] * 2 != layer->head_dim)
        return g4_fail(err, G4_EVALUE, "config: layer %d has head size %d but rotary frequencies for %d", i,
                       layer->head_dim, c->rope_half[layer->rope] * 2);
    const g4_layer_config *source = &c->layers[layer->kv_source];
    if (source->kv_source != layer->kv_source || source->head_dim != layer->head_dim ||
        source->n_kv_heads != layer->n_kv_heads || source->window != layer->window)
        return g4_fail(err, G4_EVALUE, "config: layer %d reads keys of layer %d, which has none of the same kind", i,
                       layer->kv_source);
    if (layer->moe)
        G4_TRY(check_range("n_experts", c->n_experts, 1, 1 << 14, err));
    return G4_OK;
}

g4_status g4_config_check(const g4_config *c, g4_error *err)
{
    G4_TRY(check_range("d_model", c->d_model, 1, 1 << 17, err));
    G4_TRY(check_range("n_layers", c->n_layers, 1, 1 << 12, err));
    G4_TRY(check_range("n_heads", c->n_heads, 1, 1 << 10, err));
    G4_TRY(check_range("d_vocab", c->d_vocab, 1, 1 << 24, err));
    G4_TRY(check_range("d_ple", c->d_ple, 0, 1 << 14, err));
    G4_TRY(check_range("context_length", c->context_length, 1, 1 << 30, err));
    G4_TRY(check_range("number of rotary tables", c->n_ropes, 1, G4_MAX_ROPES, err));
    if (c->d_ple)
        G4_TRY(check_range("d_vocab_ple", c->d_vocab_ple, 1, 1 << 24, err));
    if (c->n_experts) {
        G4_TRY(check_range("top_k_experts", c->top_k_experts, 1, c->n_experts, err));
        G4_TRY(check_range("d_expert", c->d_expert, 1, 1 << 18, err));
    }
    if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps < 1) || !(c->logit_softcap >= 0) || !(c->embed_scale > 0))
        return g4_fail(err, G4_EVALUE, "config: rms_norm_eps %g, logit_softcap %g or embed_scale %g out of range",
                       (double)c->rms_norm_eps, (double)c->logit_softcap, (double)c->embed_scale);
    if (!(c->attention_scale > 0 && c->attention_scale < INFINITY) ||
        !(c->attention_softcap >= 0 && c->attention_softcap < INFINITY))
        return g4_fail(err, G4_EVALUE, "config: attention_scale %g or attention_softcap %g out of range",
                       (double)c->attention_scale, (double)c->attention_softcap);
    for (int i = 0; i < c->n_layers; i++)
        G4_TRY(check_layer(c, i, err));
    return G4_OK;
}

int64_t g4_config_size(const g4_config *c, int layer, char letter)
{
    switch (letter) {
    case 'D': return c->d_model;
    case 'V': return c->d_vocab;
    case 'W': return c->d_vocab_ple;
    case 'L': return c->n_layers;
    case 'P': return c->d_ple;
    case 'H': return c->n_heads;
    case 'K': return c->layers[layer].n_kv_heads;
    case 'h': return c->layers[layer].head_dim;
    case 'F': return c->layers[layer].d_mlp;
    case 'E': return c->n_experts;
    case 'k': return c->top_k_experts;
    case 'M': return c->d_expert;
    default: return 1;
    }
}

static void *copy_bytes(const void *from, size_t n_bytes)
{
    void *to = malloc(n_bytes);
    if (to)
        memcpy(to, from, n_bytes);
    return to;
}

g4_status g4_config_copy(const g4_config *from, g4_config *to, g4_error *err)
{
    *to = *from;
    memset(to->rope_inv_freq, 0, sizeof to->rope_inv_freq);
    size_t layers_bytes = (size_t)from->n_layers * sizeof *from->layers;
    to->layers = copy_bytes(from->layers, layers_bytes);
    bool complete = to->layers != NULL;
    for (int r = 0; r < from->n_ropes; r++) {
        to->rope_inv_freq[r] = copy_bytes(from->rope_inv_freq[r], (size_t)from->rope_half[r] * sizeof(float));
        complete &= to->rope_inv_freq[r] != NULL;
    }
    if (!complete) {
        g4_config_release(to);
        return g4_fail_nomem(err, layers_bytes);
    }
    return G4_OK;
}

void g4_config_release(g4_config *config)
{
    free((void *)config->layers);
    for (int r = 0; r < G4_MAX_ROPES; r++)
        free((void *)config->rope_inv_freq[r]);
    memset(config, 0, sizeof *config);
}

int g4_last_kv_layer(const g4_config *config)
{
    int layer = config->n_layers - 1;
    while (!g4_computes_kv(config, layer))
        layer--; /* stops at layer 0 at the latest: kv_source <= layer */
    return layer;
}
