/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GEMMA4_MODEL_CONFIG_H
#define GEMMA4_MODEL_CONFIG_H

#include "gemma4.h"

/* Checks ranges and consistency. In a config that passes, no product of sizes overflows. */
g4_status g4_config_check(const g4_config *config, g4_error *err);

/* Makes a copy that owns its arrays. */
g4_status g4_config_copy(const g4_config *from, g4_config *to, g4_error *err);
void g4_config_release(g4_config *config);

static inline bool g4_computes_kv(const g4_config *config, int layer)
{
    return config->layers[layer].kv_source == layer;
}

/* Length of the axis that a letter stands for (base/tensor.h), in shapes of tensors and of sites. 1 for letters that
 * name no size of the model. */
int64_t g4_config_size(const g4_config *config, int layer, char letter);

/* The last layer that computes keys and values. Above it only rows that an output needs are computed. */
int g4_last_kv_layer(const g4_config *config);

#endif
