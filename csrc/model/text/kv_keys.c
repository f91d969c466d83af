/* SPDX-License-Identifier: Apache-2.0 */
#include "model/text/kv_keys.h"

#include <stdlib.h>
#include <string.h>

#include "model/model.h"

int g4_kv_rotated_pairs(const g4_model *model, g4_dtype dtype, int layer)
{
    const g4_config *config = &model->config;
    const g4_layer_config *lc = &config->layers[layer];
    const int half = config->rope_half[lc->rope], block = (int)g4_block_size(dtype);
    const float *freq = config->rope_inv_freq[lc->rope];
    int rotated = 0;
    if (!lc->k_eq_v || lc->kv_source != layer || !config->k_norm || !config->v_norm)
        return 0;
    for (int i = 0; i < half; i++)
        if (freq[i] != 0)
            rotated = i + 1;
    return rotated < half && rotated % block == 0 && half % block == 0 ? rotated : 0;
}

bool g4_kv_derives_from_values(const g4_sequence *seq, int layer, const float *k, const float *v)
{
    const int half = seq->model->config.layers[layer].head_dim / 2, rotated = seq->layers[layer].n_rotated;
    const float *gain = seq->model->weights.layers[layer].k_norm;
    for (int head = 0; head < seq->model->config.layers[layer].n_kv_heads; head++, k += 2 * half, v += 2 * half)
        for (int i = rotated; i < half; i++)
            if (k[i] != v[i] * gain[i] || k[half + i] != v[half + i] * gain[half + i])
                return false;
    return true;
}

void g4_kv_pack_rotated(const g4_sequence *seq, int layer, const char *whole, char *rotated)
{
    const g4_layer_config *lc = &seq->model->config.layers[layer];
    const size_t half = g4_dtype_bytes(seq->dtype, (size_t)lc->head_dim / 2);
    const size_t n = g4_dtype_bytes(seq->dtype, (size_t)seq->layers[layer].n_rotated);
    for (int i = 0; i < 2 * lc->n_kv_heads; i++)
        memcpy(rotated + (size_t)i * n, whole + (size_t)i * half, n);
}

/* n unrotated key elements in the cache's dtype: gain * v, PIECE at a time. */
static void make_keys(const g4_sequence *seq, const char *v, const float *gain, int n, char *keys)
{
    enum { PIECE = 1024 }; /* a multiple of every block size */
    const g4_kernels *kernels = seq->model->kernels;
    float piece[PIECE];
    for (int i = 0; i < n; i += PIECE) {
        const int length = n - i < PIECE ? n - i : PIECE;
        const size_t at = g4_dtype_bytes(seq->dtype, (size_t)i);
        g4_widen_for(kernels, seq->dtype)(piece, v + at, length);
        kernels->mul(piece, piece, gain + i, length);
        g4_narrow_for(kernels, seq->dtype)(keys + at, piece, length);
    }
}

void g4_kv_whole_keys(const g4_sequence *seq, int layer, int position, char *whole)
{
    const g4_layer_config *lc = &seq->model->config.layers[layer];
    const g4_kv_view kv = g4_kv_view_of(seq, layer);
    const int half = lc->head_dim / 2, rest = half - kv.n_rotated;
    const size_t n_half = g4_dtype_bytes(seq->dtype, (size_t)half);
    const size_t n = g4_dtype_bytes(seq->dtype, (size_t)kv.n_rotated);
    const size_t first_half = (size_t)(position % kv.n_slots) * (size_t)lc->n_kv_heads * 2;
    const char *rotated = (const char *)kv.k + first_half * n, *v = (const char *)kv.v + first_half * n_half;
    for (int i = 0; i < 2 * lc->n_kv_heads; i++, rotated += n, v += n_half, whole += n_half) {
        memcpy(whole, rotated, n);
        make_keys(seq, v + n, kv.gain + i % 2 * half + kv.n_rotated, rest, whole + n);
    }
}

g4_status g4_kv_reproduces(const g4_sequence *seq, int layer, int first, int n, const char *k, bool *same,
                           g4_error *err)
{
    const g4_layer_config *lc = &seq->model->config.layers[layer];
    const size_t n_bytes = g4_dtype_bytes(seq->dtype, (size_t)lc->n_kv_heads * (size_t)lc->head_dim);
    char *whole = malloc(n_bytes);
    if (!whole)
        return g4_fail_nomem(err, n_bytes);
    *same = true;
    for (int i = 0; i < n && *same; i++) {
        g4_kv_whole_keys(seq, layer, first + i, whole);
        *same = memcmp(whole, k + (size_t)i * n_bytes, n_bytes) == 0;
    }
    free(whole);
    return G4_OK;
}
