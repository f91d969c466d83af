/* SPDX-License-Identifier: Apache-2.0 */
/* Cached keys that follow from values (ops/attention/kv_view.h): which they are, and the way from whole keys to what the cache keeps
 * of them and back. */
#ifndef GEMMA4_MODEL_TEXT_KV_KEYS_H
#define GEMMA4_MODEL_TEXT_KV_KEYS_H

#include "model/text/kv_cache.h"

/* The pairs that RoPE turns where the others need not be stored, else 0: in layers whose values are the normed projection
 * of the keys, and whose heads can be cut there (quantised ones between blocks). */
int g4_kv_turned_pairs(const g4_model *model, g4_dtype dtype, int layer);

/* Whether float32 keys [K, h] are gain * v to the bit wherever RoPE turned nothing. */
bool g4_kv_follows(const g4_sequence *seq, int layer, const float *k, const float *v);

/* Turned pairs [K, 2 n_turned] of whole keys [K, h], both in the sequence's type. */
void g4_kv_take_turned(const g4_sequence *seq, int layer, const char *whole, char *turned);

/* One position's keys [K, h] in the sequence's type. */
void g4_kv_whole_keys(const g4_sequence *seq, int layer, int position, char *whole);

/* *same: whether what the layer keeps of positions [first, first + n) gives back the keys k [n, K, h], to the bit. */
g4_status g4_kv_gives_back(const g4_sequence *seq, int layer, int first, int n, const char *k, bool *same,
                           g4_error *err);

#endif
