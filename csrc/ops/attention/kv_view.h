/* SPDX-License-Identifier: Apache-2.0 */
/* Cached keys and values as attention reads them.
 *
 * Where values are the normed projection of the keys (attention_k_eq_v), a key is RoPE(gain * v). RoPE rotates few of
 * its pairs (64 of 256 in the released models). The other pairs equal gain * v to the bit and are not stored a second
 * time.
 */
#ifndef GEMMA4_OPS_ATTENTION_KV_VIEW_H
#define GEMMA4_OPS_ATTENTION_KV_VIEW_H

#include "kernels/kernels.h"

/* Keys and values of positions from `first` on: position p lies in slot p % n_slots, K heads of h values each. */
typedef struct {
    const void *k, *v;
    g4_dtype dtype;
    size_t stride; /* K * h: elements from slot to slot of v, and of k if keys are stored whole */
    int n_slots, first;
    const float *gain; /* [h] key = gain * v where not rotated; NULL: keys are stored whole */
    int n_rotated;     /* with a gain, k holds 2 n_rotated values of each head: pairs (i, i + h / 2), i < n_rotated */
} g4_kv_view;

/* The keys of one head at positions [first, first + n), float32 [n, h]. */
void g4_kv_read_keys(const g4_kernels *kernels, const g4_kv_view *kv, int kv_head, int head_dim, int first, int n,
                     float *keys);

#endif
