/* SPDX-License-Identifier: Apache-2.0 */
/* KV cache of a sequence.
 *
 * Only layers that compute keys have storage; others read their source layer's. A global layer grows with the
 * sequence. A sliding layer is a ring buffer of the next query's window plus the rows of one step, so a step may write
 * all its rows before attention. Position p is in slot p % n_slots in both. With k_eq_v only the rotated pairs of the
 * keys are stored (5/8 of the memory in 26B and 31B).
 *
 * Invariants: every position in [first, length) is stored; in a sliding layer first <= max(0, length - (window - 1)); a
 * buffer shared with a fork is never written (copy-on-write).
 */
#ifndef GEMMA4_MODEL_TEXT_KV_CACHE_H
#define GEMMA4_MODEL_TEXT_KV_CACHE_H

#include <stdatomic.h>

#include "base/buffer.h"
#include "gemma4.h"
#include "kernels/kernels.h"
#include "ops/attention/kv_view.h"

typedef struct {
    g4_buffer *k, *v; /* [n_slots, K, h], k smaller with n_rotated; NULL if empty or if the layer shares */
    int n_slots;
    int first;     /* positions before it were overwritten, also by steps that were truncated or cancelled */
    int n_rotated; /* pairs per head in k, [n_slots, K, 2 n_rotated] (kv_view.h). 0: keys are whole */
} g4_kv_layer;

struct g4_sequence {
    const g4_model *model;
    g4_dtype dtype; /* F32, F16, BF16 or Q8_0 */
    int length, capacity;
    atomic_flag busy;
    g4_kv_layer *layers; /* [L] */
};

/* Makes room for n_rows more positions in every layer, in unshared buffers. G4_ECAPACITY or G4_ENOMEM leave the
 * sequence's contents as they were. */
g4_status g4_kv_reserve(g4_sequence *seq, int n_rows, g4_error *err);

/* Stores keys and values, float32 [n_rows, K * h] each, of positions from `position` on. A layer that stores rotated
 * pairs switches to whole keys at the first key that does not derive from its values (a hook edited it). */
g4_status g4_kv_store(g4_sequence *seq, int layer, int position, int n_rows, const float *k, const float *v,
                      g4_error *err);

/* The cache that attention in `layer` reads: its own or its source layer's. */
g4_kv_view g4_kv_view_of(const g4_sequence *seq, int layer);

#endif
