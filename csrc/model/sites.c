/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
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
    VISION,
    VISION_LAYER,
    EMBEDDER,
    SOFT,
    AUDIO,
    AUDIO_LAYER,
    AUDIO_SOFT,
    N_PRESENCES
} presence;

#define KIND(name) (1u << G4_##name)

/* The encoder kinds that have the sites of each presence; 0: a site of the text model. */
static const unsigned encoder_kinds[N_PRESENCES] = {
    [VISION] = KIND(VISION_TOWER),
    [VISION_LAYER] = KIND(VISION_TOWER),
    [EMBEDDER] = KIND(VISION_EMBEDDER),
    [SOFT] = KIND(VISION_TOWER) | KIND(VISION_EMBEDDER),
    [AUDIO] = KIND(AUDIO_TOWER),
    [AUDIO_LAYER] = KIND(AUDIO_TOWER),
    [AUDIO_SOFT] = KIND(AUDIO_TOWER) | KIND(AUDIO_EMBEDDER),
};

static const presence whens[G4_N_SITES] = {
#define G4_SITE(id, name, dims, when, rows, keys, type, access) [G4_SITE_##id] = when,
#include "model/sites.inc"
#undef G4_SITE
};

enum {
    ROWS_BEFORE = false,
    ROWS_AFTER = true,
    TYPE_F32 = false,
    TYPE_I32 = true,
    ACCESS_READ = false,
    ACCESS_EDIT = true
};

static const g4_site_row sites[G4_N_SITES] = {
#define G4_SITE(id, name, dims, when, rows, keys, type, access) \
    [G4_SITE_##id] = {name, dims, ROWS_##rows, TYPE_##type, ACCESS_##access, G4_KEYS_##keys},
#include "model/sites.inc"
#undef G4_SITE
};

const g4_site_row *g4_site_row_of(g4_site site)
{
    return &sites[site];
}

static const char *layer_in_name(g4_site site)
{
    return strstr(sites[site].name, "{}");
}

bool g4_site_is_per_layer(g4_site site)
{
    return layer_in_name(site) != NULL;
}

void g4_site_name(g4_site site, int layer, char name[G4_SITE_NAME])
{
    const char *full = sites[site].name, *hole = layer_in_name(site);
    if (hole)
        snprintf(name, G4_SITE_NAME, "%.*s%d%s", (int)(hole - full), full, layer, hole + 2);
    else
        snprintf(name, G4_SITE_NAME, "%s", full);
}

int g4_site_row_axis(g4_site site)
{
    const size_t axis = strcspn(sites[site].dims, "TNU");
    return sites[site].dims[axis] ? (int)axis : -1;
}

bool g4_site_exists(const g4_config *config, g4_site site, int layer)
{
    if (encoder_kinds[whens[site]] || layer < 0 || layer >= (g4_site_is_per_layer(site) ? config->n_layers : 1))
        return false;
    switch (whens[site]) {
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

bool g4_encoder_site_exists(const g4_encoder_config *config, g4_site site, int layer)
{
    return layer >= 0 && layer < (g4_site_is_per_layer(site) ? config->n_layers : 1) &&
           (encoder_kinds[whens[site]] >> config->kind & 1);
}

int g4_site_shape(const g4_config *config, g4_site site, int layer, int n_rows, int n_keys, int64_t shape[G4_MAX_DIMS])
{
    const char *dims = sites[site].dims;
    int n_dims = (int)strlen(dims);
    for (int i = 0; i < n_dims; i++)
        shape[i] = dims[i] == 'T' ? n_rows : dims[i] == 'S' ? n_keys : g4_config_size(config, layer, dims[i]);
    return n_dims;
}
