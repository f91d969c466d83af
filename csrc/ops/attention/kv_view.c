/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/kv_view.h"

/* Reading a view's heads. In bytes: a head of k, a head of v, half a head, the first elements of its rotated pairs. */
typedef struct {
    size_t k_head, v_head, half, rotated;
    g4_widen_f32_fn widen;
    g4_mul_fn mul;
} reading;

/* Rotated pairs come from k, the other pairs are gain * v. A key holds the first elements of all pairs, then the
 * second. */
static void join_key(const g4_kv_view *kv, const reading *r, const char *k, const char *v, int half, float *key)
{
    const int rotated = kv->n_rotated, rest = half - rotated;
    r->widen(key, k, rotated);
    r->widen(key + rotated, v + r->rotated, rest);
    r->mul(key + rotated, key + rotated, kv->gain + rotated, rest);
    key += half;
    r->widen(key, k + r->rotated, rotated);
    r->widen(key + rotated, v + r->half + r->rotated, rest);
    r->mul(key + rotated, key + rotated, kv->gain + half + rotated, rest);
}

void g4_kv_read_keys(const g4_kernels *kernels, const g4_kv_view *kv, int kv_head, int head_dim, int first, int n,
                     float *keys)
{
    const size_t h = (size_t)head_dim, n_heads = kv->stride / h, head = (size_t)kv_head;
    const size_t k_width = kv->gain ? 2 * (size_t)kv->n_rotated : h;
    const reading r = {.k_head = g4_dtype_bytes(kv->dtype, k_width),
                       .v_head = g4_dtype_bytes(kv->dtype, h),
                       .half = g4_dtype_bytes(kv->dtype, h / 2),
                       .rotated = g4_dtype_bytes(kv->dtype, (size_t)kv->n_rotated),
                       .widen = g4_widen_for(kernels, kv->dtype),
                       .mul = kernels->mul};
    size_t slot = (size_t)(first % kv->n_slots);
    for (int i = 0; i < n; i++, keys += h) {
        const char *k = (const char *)kv->k + (slot * n_heads + head) * r.k_head;
        const char *v = (const char *)kv->v + (slot * n_heads + head) * r.v_head;
        if (kv->gain)
            join_key(kv, &r, k, v, head_dim / 2, keys);
        else
            r.widen(keys, k, head_dim);
        slot = slot + 1 < (size_t)kv->n_slots ? slot + 1 : 0;
    }
}
