/* SPDX-License-Identifier: Apache-2.0 */
/* Cached keys and values of a sequence.
 *
 * Only layers that compute keys have storage; layers that share read their source's. A global layer grows with the
 * sequence. A sliding layer is a ring that holds the window of the oldest query still to come plus the rows of one step,
 * so a step may write all its rows before it attends. Position p of either lies in slot p % n_slots. Where values are
 * the normed projection of the keys, only the rotated pairs of the keys are stored (5/8 of the memory in 26B and 31B).
 *
 * Invariants: every position in [first, length) is stored, and in a sliding layer first <= length - (window - 1) or 0;
 * a buffer shared with a fork is never written (copy-on-write).
 */
#ifndef GEMMA4_MODEL_TEXT_KV_CACHE_H
#define GEMMA4_MODEL_TEXT_KV_CACHE_H

#include <stdatomic.h>

#include "base/buffer.h"
#include "gemma4.h"
#include "kernels/kernels.h"
#include "ops/attention/kv_view.h"

typedef struct {
    g4_buffer *k, *v; /* [n_slots, K, h], k maybe less (n_rotated); NULL while empty, and in layers that share */
    int n_slots;
    int first;     /* positions before it were overwritten, be it by steps that were cut back or cancelled since */
    int n_rotated; /* k holds so many pairs of each head, [n_slots, K, 2 n_rotated]; see kv_view.h. 0: keys are whole */
} g4_kv_layer;

struct g4_sequence {
    const g4_model *model;
    g4_dtype dtype; /* F32, F16, BF16 or Q8_0 */
    int length, capacity;
    atomic_flag busy;
    g4_kv_layer *layers; /* [L] */
};

/* Room for n_rows more positions in every layer, in buffers that are our own. Fails with G4_ECAPACITY or G4_ENOMEM and
 * leaves the sequence as it was. */
g4_status g4_kv_reserve(g4_sequence *seq, int n_rows, g4_error *err);

/* Stores keys and values, float32 [n_rows, K * h] each, of positions from `position` on. A layer whose keys derive
 * from its values switches to whole keys at the first one that does not: a hook edited it. */
g4_status g4_kv_store(g4_sequence *seq, int layer, int position, int n_rows, const float *k, const float *v,
                      g4_error *err);

/* What attention in `layer` (or in one that shares with it) reads. */
g4_kv_view g4_kv_view_of(const g4_sequence *seq, int layer);

#endif
