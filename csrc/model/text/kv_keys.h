/* SPDX-License-Identifier: Apache-2.0 */
/* Cached keys that derive from values (ops/attention/kv_view.h): which pairs are stored, and conversion from and to
 * whole keys. */
#ifndef GEMMA4_MODEL_TEXT_KV_KEYS_H
#define GEMMA4_MODEL_TEXT_KV_KEYS_H

#include "model/text/kv_cache.h"

/* The number of pairs that RoPE rotates, if only those need to be stored; else 0. They do where keys and values are the
 * same projection, normed, and a head can be cut there (quantised heads between blocks). */
int g4_kv_rotated_pairs(const g4_model *model, g4_dtype dtype, int layer);

/* Whether float32 keys [K, h] equal gain * v to the bit in every pair that RoPE does not rotate. */
bool g4_kv_derives_from_values(const g4_sequence *seq, int layer, const float *k, const float *v);

/* Rotated pairs [K, 2 n_rotated] out of whole keys [K, h], both in the sequence's type. */
void g4_kv_pack_rotated(const g4_sequence *seq, int layer, const char *whole, char *rotated);

/* One position's keys [K, h] in the sequence's type. */
void g4_kv_whole_keys(const g4_sequence *seq, int layer, int position, char *whole);

/* *same: whether the stored pairs and values of positions [first, first + n) reproduce keys k [n, K, h] to the bit. */
g4_status g4_kv_reproduces(const g4_sequence *seq, int layer, int first, int n, const char *k, bool *same,
                           g4_error *err);

#endif
