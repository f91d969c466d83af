/* SPDX-License-Identifier: Apache-2.0 */
#include <string.h>

#include "model/config.h"

typedef enum {
    MODEL,
    LAYER,
    KV,
    VPROJ,
    QNORM,
    KNORM,
    VNORM,
    POST,
    SCALAR,
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
    case QNORM:
    case KNORM:
    case VNORM:
    case POST:
    case SCALAR:
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
    case QNORM: return config->q_norm;
    case KNORM: return config->k_norm && g4_computes_kv(config, layer);
    case VNORM: return config->v_norm && g4_computes_kv(config, layer);
    case POST: return config->post_norms;
    case SCALAR: return config->layer_scalar;
    case PLE_MODEL:
    case PLE: return config->d_ple > 0;
    case MOE: return config->layers[layer].moe;
    case SOFTCAP: return config->logit_softcap > 0;
    default: return true;
    }
}

int g4_site_shape(const g4_config *config, g4_site site, int layer, int n_rows, int n_keys, int64_t shape[G4_MAX_DIMS])
{
    const char *dims = sites[site].dims;
    int n_dims = (int)strlen(dims);
    for (int i = 0; i < n_dims; i++)
        shape[i] = dims[i] == 'T' ? n_rows : dims[i] == 'S' ? n_keys : g4_config_size(config, layer, dims[i]);
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
