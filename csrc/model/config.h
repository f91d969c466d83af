/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GEMMA4_MODEL_CONFIG_H
#define GEMMA4_MODEL_CONFIG_H

#include "gemma4.h"

/* Every number in range and consistent with the others: afterwards no product of sizes can overflow. */
g4_status g4_config_check(const g4_config *config, g4_error *err);

/* A copy that owns its arrays. */
g4_status g4_config_copy(const g4_config *from, g4_config *to, g4_error *err);
void g4_config_release(g4_config *config);

static inline bool g4_computes_kv(const g4_config *config, int layer)
{
    return config->layers[layer].kv_source == layer;
}

/* How long an axis is that a letter stands for (base/tensor.h): one list for shapes of tensors and of sites. Of a letter
 * that names no size of the model, 1. */
int64_t g4_config_size(const g4_config *config, int layer, char letter);

/* The last layer that computes keys and values: above it, only positions that somebody wants need be computed. */
int g4_last_kv_layer(const g4_config *config);

#endif
