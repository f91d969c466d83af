/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "model/config.h"

typedef enum {
    MODEL,
    LAYER,
    KV,
    VPROJ,
    PLE_MODEL,
    PLE,
    MOE,
    SOFTCAP,
    VISION, /* from here on those of encoders */
    VISION_LAYER,
    EMBEDDER,
    SOFT,
    AUDIO,
    AUDIO_LAYER,
    AUDIO_SOFT
} presence;

typedef struct {
    const char *name, *dims;
    presence when;
} site_row;

static const site_row sites[G4_N_SITES] = {
#define G4_SITE(id, name, dims, when) [G4_SITE_##id] = {name, dims, when},
#include "model/sites.inc"
#undef G4_SITE
};

const char *g4_site_name(g4_site site)
{
    return sites[site].name;
}

const char *g4_site_dims(g4_site site)
{
    return sites[site].dims;
}

bool g4_site_is_per_layer(g4_site site)
{
    switch (sites[site].when) {
    case LAYER:
    case KV:
    case VPROJ:
    case PLE:
    case MOE:
    case VISION_LAYER:
    case AUDIO_LAYER: return true;
    default: return false;
    }
}

bool g4_site_is_int32(g4_site site)
{
    return site == G4_SITE_EXPERT_IDS;
}

bool g4_site_exists(const g4_config *config, g4_site site, int layer)
{
    if (sites[site].when >= VISION || layer < 0 || layer >= (g4_site_is_per_layer(site) ? config->n_layers : 1))
        return false;
    switch (sites[site].when) {
    case KV: return g4_computes_kv(config, layer);
    case VPROJ: return g4_computes_kv(config, layer) && !config->layers[layer].k_eq_v;
    case PLE_MODEL:
    case PLE: return config->d_ple > 0;
    case MOE: return config->layers[layer].moe;
    case SOFTCAP: return config->logit_softcap > 0;
    default: return true;
    }
}

static int64_t axis_size(const g4_config *c, const g4_layer_config *layer, char letter, int n_rows, int n_keys)
{
    switch (letter) {
    case 'T': return n_rows;
    case 'S': return n_keys;
    case 'D': return c->d_model;
    case 'V': return c->d_vocab;
    case 'L': return c->n_layers;
    case 'P': return c->d_ple;
    case 'H': return c->n_heads;
    case 'K': return layer->n_kv_heads;
    case 'h': return layer->head_dim;
    case 'F': return layer->d_mlp;
    case 'E': return c->n_experts;
    case 'k': return c->top_k_experts;
    case 'M': return c->d_expert;
    default: return 1;
    }
}

int g4_site_shape(const g4_config *config, g4_site site, int layer, int n_rows, int n_keys, int64_t shape[G4_MAX_DIMS])
{
    const char *dims = sites[site].dims;
    int n_dims = (int)strlen(dims);
    for (int i = 0; i < n_dims; i++)
        shape[i] = axis_size(config, &config->layers[layer], dims[i], n_rows, n_keys);
    return n_dims;
}

/* ---- encoders ------------------------------------------------------------------------------------------------------ */

bool g4_encoder_site_exists(const g4_encoder_config *config, g4_site site, int layer)
{
    if (layer < 0 || layer >= (g4_site_is_per_layer(site) ? config->n_layers : 1))
        return false;
    switch (sites[site].when) {
    case VISION:
    case VISION_LAYER: return config->kind == G4_VISION_TOWER;
    case EMBEDDER: return config->kind == G4_VISION_EMBEDDER;
    case SOFT: return config->kind == G4_VISION_TOWER || config->kind == G4_VISION_EMBEDDER;
    case AUDIO:
    case AUDIO_LAYER: return config->kind == G4_AUDIO_TOWER;
    case AUDIO_SOFT: return config->kind == G4_AUDIO_TOWER || config->kind == G4_AUDIO_EMBEDDER;
    default: return false;
    }
}
