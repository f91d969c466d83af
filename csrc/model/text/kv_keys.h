/* SPDX-License-Identifier: Apache-2.0 */
/* Cached keys that derive from values (ops/attention/kv_view.h): which pairs are stored, and conversion from and to
 * whole keys. */
#ifndef GEMMA4_MODEL_TEXT_KV_KEYS_H
#define GEMMA4_MODEL_TEXT_KV_KEYS_H

#include "model/text/kv_cache.h"

/* The number of pairs that RoPE rotates, if only rotated pairs need to be stored; else 0. Requires k_eq_v, both norms,
 * and for quantised dtypes halves and rotated parts that are multiples of the block size. */
int g4_kv_rotated_pairs(const g4_model *model, g4_dtype dtype, int layer);

/* Whether float32 keys [K, h] are bit-identical to gain * v in every pair that RoPE does not rotate. */
bool g4_kv_derives_from_values(const g4_sequence *seq, int layer, const float *k, const float *v);

/* Extracts rotated pairs [K, 2 n_rotated] from whole keys [K, h], both in the sequence's dtype. */
void g4_kv_pack_rotated(const g4_sequence *seq, int layer, const char *whole, char *rotated);

/* Reconstructs the whole keys [K, h] of one position, in the sequence's dtype. */
void g4_kv_whole_keys(const g4_sequence *seq, int layer, int position, char *whole);

/* *same: whether stored pairs and values of positions [first, first + n) reproduce keys k [n, K, h] bit for bit. */
g4_status g4_kv_reproduces(const g4_sequence *seq, int layer, int first, int n, const char *k, bool *same,
                           g4_error *err);

#endif
