/* SPDX-License-Identifier: Apache-2.0 */
#include "model/text/kv_cache.h"

#include <stdlib.h>
#include <string.h>

#include "model/config.h"
#include "model/text/kv_keys.h"
#include "model/model.h"

enum { MIN_SLOTS = 64 };

static size_t slot_elements(const g4_config *config, int layer)
{
    return (size_t)config->layers[layer].n_kv_heads * (size_t)config->layers[layer].head_dim;
}

/* Bytes of a slot's values, and of its keys if they are whole. */
static size_t slot_bytes(const g4_sequence *seq, int layer)
{
    return g4_dtype_bytes(seq->dtype, slot_elements(&seq->model->config, layer));
}

static size_t key_bytes(const g4_sequence *seq, int layer)
{
    const size_t n_heads = (size_t)seq->model->config.layers[layer].n_kv_heads;
    const int rotated = seq->layers[layer].n_rotated;
    return rotated ? g4_dtype_bytes(seq->dtype, n_heads * 2 * (size_t)rotated) : slot_bytes(seq, layer);
}

/* Slots a layer needs before n_rows more rows are written. A sliding layer also keeps one window of slack: a sequence
 * can be truncated by that much and continue. */
static int slots_needed(const g4_sequence *seq, int layer, int n_rows)
{
    int window = seq->model->config.layers[layer].window;
    int all = seq->length + n_rows;
    if (!window)
        return all;
    int64_t with_slack = (int64_t)window - 1 + (n_rows > window ? n_rows : window);
    return all <= with_slack ? all : (int)with_slack;
}

static int grown_slots(const g4_sequence *seq, int layer, int current, int needed)
{
    int window = seq->model->config.layers[layer].window;
    int64_t slots = current > MIN_SLOTS / 2 ? 2 * (int64_t)current : MIN_SLOTS;
    int64_t most = seq->capacity;
    if (window && 2 * (int64_t)window < most)
        most = 2 * (int64_t)window;
    if (slots > most)
        slots = most;
    return slots < needed ? needed : (int)slots;
}

static void copy_slot(g4_buffer *to, int to_slot, const g4_buffer *from, int from_slot, size_t n_bytes)
{
    memcpy((char *)g4_buffer_data(to) + (size_t)to_slot * n_bytes,
           (const char *)g4_buffer_data(from) + (size_t)from_slot * n_bytes, n_bytes);
}

static void copy_slots(const g4_sequence *seq, const g4_kv_layer *from, g4_kv_layer *to, int layer)
{
    to->first = from->first;
    for (int p = to->first; p < seq->length; p++) {
        copy_slot(to->k, p % to->n_slots, from->k, p % from->n_slots, key_bytes(seq, layer));
        copy_slot(to->v, p % to->n_slots, from->v, p % from->n_slots, slot_bytes(seq, layer));
    }
}

static void release_layer(g4_kv_layer *kv)
{
    g4_buffer_unref(kv->k);
    g4_buffer_unref(kv->v);
    *kv = (g4_kv_layer){.n_rotated = kv->n_rotated};
}

static g4_status new_slots(g4_buffer **buffer, int n_slots, size_t slot_bytes, g4_error *err)
{
    size_t n_bytes;
    if (__builtin_mul_overflow((size_t)n_slots, slot_bytes, &n_bytes))
        return g4_fail_nomem(err, ~0ull);
    *buffer = g4_buffer_new(n_bytes);
    return *buffer ? G4_OK : g4_fail_nomem(err, n_bytes);
}

static g4_status replace_layer(g4_sequence *seq, int layer, int n_slots, g4_error *err)
{
    g4_kv_layer *kv = &seq->layers[layer], fresh = {.n_slots = n_slots, .n_rotated = kv->n_rotated};
    g4_status status = new_slots(&fresh.k, n_slots, key_bytes(seq, layer), err);
    if (status == G4_OK)
        status = new_slots(&fresh.v, n_slots, slot_bytes(seq, layer), err);
    if (status != G4_OK) {
        release_layer(&fresh);
        return status;
    }
    if (kv->k)
        copy_slots(seq, kv, &fresh, layer);
    release_layer(kv);
    *kv = fresh;
    return G4_OK;
}

static g4_status reserve_layer(g4_sequence *seq, int layer, int n_rows, g4_error *err)
{
    g4_kv_layer *kv = &seq->layers[layer];
    int needed = slots_needed(seq, layer, n_rows);
    if (kv->k && kv->n_slots >= needed && g4_buffer_is_unique(kv->k) && g4_buffer_is_unique(kv->v))
        return G4_OK;
    int n_slots = kv->n_slots >= needed ? kv->n_slots : grown_slots(seq, layer, kv->n_slots, needed);
    return replace_layer(seq, layer, n_slots, err);
}

g4_status g4_kv_reserve(g4_sequence *seq, int n_rows, g4_error *err)
{
    const g4_config *config = &seq->model->config;
    if (n_rows > seq->capacity - seq->length)
        return g4_fail(err, G4_ECAPACITY,
                       "%d positions are cached and %d more were given, but the sequence's capacity is %d (the model's "
                       "context is %d): shorten the input or truncate the sequence",
                       seq->length, n_rows, seq->capacity, config->context_length);
    for (int layer = 0; layer < config->n_layers; layer++)
        if (g4_computes_kv(config, layer))
            G4_TRY(reserve_layer(seq, layer, n_rows, err));
    return G4_OK;
}

g4_kv_view g4_kv_view_of(const g4_sequence *seq, int layer)
{
    const int source = seq->model->config.layers[layer].kv_source;
    const g4_kv_layer *kv = &seq->layers[source];
    return (g4_kv_view){.k = g4_buffer_data(kv->k),
                        .v = g4_buffer_data(kv->v),
                        .dtype = seq->dtype,
                        .stride = slot_elements(&seq->model->config, layer),
                        .n_slots = kv->n_slots,
                        .first = kv->first,
                        .gain = kv->n_rotated ? seq->model->weights.layers[source].k_norm : NULL,
                        .n_rotated = kv->n_rotated};
}

/* Switches the layer to whole keys. */
static g4_status keep_whole_keys(g4_sequence *seq, int layer, g4_error *err)
{
    g4_kv_layer *kv = &seq->layers[layer];
    const size_t n_bytes = slot_bytes(seq, layer);
    g4_buffer *k = NULL;
    G4_TRY(new_slots(&k, kv->n_slots, n_bytes, err));
    for (int p = kv->first; p < seq->length; p++)
        g4_kv_whole_keys(seq, layer, p, (char *)g4_buffer_data(k) + (size_t)(p % kv->n_slots) * n_bytes);
    g4_buffer_unref(kv->k);
    kv->k = k;
    kv->n_rotated = 0;
    return G4_OK;
}

static void store_keys(const g4_sequence *seq, int layer, const float *k, char *slot)
{
    const g4_layer_config *lc = &seq->model->config.layers[layer];
    const int rotated = seq->layers[layer].n_rotated, half = lc->head_dim / 2;
    const g4_narrow_f32_fn narrow = g4_narrow_for(seq->model->kernels, seq->dtype);
    if (!rotated) {
        narrow(slot, k, (int)slot_elements(&seq->model->config, layer));
        return;
    }
    for (int i = 0; i < 2 * lc->n_kv_heads; i++)
        narrow(slot + g4_dtype_bytes(seq->dtype, (size_t)(i * rotated)), k + (size_t)i * (size_t)half, rotated);
}

g4_status g4_kv_store(g4_sequence *seq, int layer, int position, int n_rows, const float *k, const float *v,
                      g4_error *err)
{
    g4_kv_layer *kv = &seq->layers[layer];
    const size_t n = slot_elements(&seq->model->config, layer);
    for (int i = 0; kv->n_rotated && i < n_rows; i++)
        if (!g4_kv_derives_from_values(seq, layer, k + (size_t)i * n, v + (size_t)i * n))
            G4_TRY(keep_whole_keys(seq, layer, err));
    if (kv->first < position + n_rows - kv->n_slots)
        kv->first = position + n_rows - kv->n_slots;
    for (int i = 0; i < n_rows; i++) {
        const size_t slot = (size_t)((position + i) % kv->n_slots);
        store_keys(seq, layer, k + (size_t)i * n, (char *)g4_buffer_data(kv->k) + slot * key_bytes(seq, layer));
        g4_narrow_for(seq->model->kernels, seq->dtype)((char *)g4_buffer_data(kv->v) + slot * slot_bytes(seq, layer),
                                                       v + (size_t)i * n, (int)n);
    }
    return G4_OK;
}

/* ---- sequences -------------------------------------------------------------------------------------------------- */

g4_status g4_sequence_new(const g4_model *model, g4_dtype kv_dtype, int capacity, g4_sequence **result, g4_error *err)
{
    int context = model->config.context_length;
    for (int layer = 0; layer < model->config.n_layers; layer++)
        if ((size_t)model->config.layers[layer].head_dim % g4_block_size(kv_dtype))
            return g4_fail(err, G4_EVALUE,
                           "keys and values of type %s come in blocks of %zu, but layer %d has heads of %d: expected "
                           "f32, f16 or bf16",
                           g4_dtype_name(kv_dtype), g4_block_size(kv_dtype), layer,
                           model->config.layers[layer].head_dim);
    if (capacity < 0 || capacity > context)
        return g4_fail(err, G4_EVALUE, "capacity %d: expected 1 to %d, the model's context (0 = all of it)", capacity,
                       context);
    g4_sequence *seq = calloc(1, sizeof *seq);
    g4_kv_layer *layers = calloc((size_t)model->config.n_layers, sizeof *layers);
    if (!seq || !layers) {
        free(seq);
        free(layers);
        return g4_fail_nomem(err, sizeof *seq);
    }
    *seq =
        (g4_sequence){.model = model, .dtype = kv_dtype, .capacity = capacity ? capacity : context, .layers = layers};
    for (int layer = 0; layer < model->config.n_layers; layer++)
        layers[layer].n_rotated = g4_kv_rotated_pairs(model, kv_dtype, layer);
    atomic_flag_clear(&seq->busy);
    *result = seq;
    return G4_OK;
}

void g4_sequence_free(g4_sequence *seq)
{
    if (!seq)
        return;
    for (int layer = 0; layer < seq->model->config.n_layers; layer++)
        release_layer(&seq->layers[layer]);
    free(seq->layers);
    free(seq);
}

int g4_sequence_length(const g4_sequence *seq)
{
    return seq->length;
}

int g4_sequence_capacity(const g4_sequence *seq)
{
    return seq->capacity;
}

g4_dtype g4_sequence_dtype(const g4_sequence *seq)
{
    return seq->dtype;
}

g4_status g4_sequence_acquire(g4_sequence *seq, g4_error *err)
{
    if (atomic_flag_test_and_set_explicit(&seq->busy, memory_order_acquire))
        return g4_fail(err, G4_ESTATE,
                       "this sequence is in use by another call, or given twice in one step: a sequence serves one "
                       "call at a time; fork it for another");
    return G4_OK;
}

void g4_sequence_release(g4_sequence *seq)
{
    atomic_flag_clear_explicit(&seq->busy, memory_order_release);
}

size_t g4_sequence_bytes(const g4_sequence *seq)
{
    size_t n_bytes = 0;
    for (int layer = 0; layer < seq->model->config.n_layers; layer++)
        if (seq->layers[layer].k)
            n_bytes += g4_buffer_size(seq->layers[layer].k) + g4_buffer_size(seq->layers[layer].v);
    return n_bytes;
}

/* Length n is possible if the next query's window is stored: positions [n - window + 1, n). */
int g4_sequence_min_truncate(const g4_sequence *seq)
{
    const g4_config *config = &seq->model->config;
    int least = 0;
    for (int layer = 0; layer < config->n_layers; layer++) {
        const g4_kv_layer *kv = &seq->layers[layer];
        if (kv->first == 0)
            continue;
        int length = kv->first + config->layers[layer].window - 1;
        least = length > least ? length : least;
    }
    return least;
}

/* Empties the layer. A layer that switched to whole keys stores rotated pairs again. */
static void forget(g4_sequence *seq, int layer)
{
    g4_kv_layer *kv = &seq->layers[layer];
    const int rotated = g4_kv_rotated_pairs(seq->model, seq->dtype, layer);
    kv->first = 0;
    if (kv->n_rotated == rotated)
        return;
    release_layer(kv);
    kv->n_rotated = rotated;
}

static g4_status truncate(g4_sequence *seq, int length, g4_error *err)
{
    if (length < 0 || length > seq->length)
        return g4_fail(err, G4_EVALUE, "truncate to %d: expected 0 to %d, the sequence's length", length, seq->length);
    if (length > 0 && length < g4_sequence_min_truncate(seq))
        return g4_fail(err, G4_ESTATE,
                       "truncate to %d: the sliding layers have forgotten too much to go on from there; possible are 0 "
                       "and %d to %d. Fork the sequence before the point to come back to",
                       length, g4_sequence_min_truncate(seq), seq->length);
    if (length == 0)
        g4_sequence_clear(seq);
    seq->length = length;
    return G4_OK;
}

g4_status g4_sequence_truncate(g4_sequence *seq, int length, g4_error *err)
{
    G4_TRY(g4_sequence_acquire(seq, err));
    g4_status status = truncate(seq, length, err);
    g4_sequence_release(seq);
    return status;
}

g4_status g4_sequence_fork(g4_sequence *seq, g4_sequence **fork, g4_error *err)
{
    G4_TRY(g4_sequence_acquire(seq, err));
    g4_status status = g4_sequence_new(seq->model, seq->dtype, seq->capacity, fork, err);
    if (status == G4_OK) {
        (*fork)->length = seq->length;
        for (int layer = 0; layer < seq->model->config.n_layers; layer++) {
            const g4_kv_layer *kv = &seq->layers[layer];
            (*fork)->layers[layer] =
                (g4_kv_layer){g4_buffer_ref(kv->k), g4_buffer_ref(kv->v), kv->n_slots, kv->first, kv->n_rotated};
        }
    }
    g4_sequence_release(seq);
    return status;
}

int g4_sequence_first_cached(const g4_sequence *seq, int layer)
{
    return seq->layers[layer].first;
}

void g4_sequence_export(const g4_sequence *seq, int layer, void *k, void *v)
{
    const g4_kv_layer *kv = &seq->layers[layer];
    const size_t n_bytes = slot_bytes(seq, layer);
    for (int p = kv->first; p < seq->length; p++) {
        const size_t source = (size_t)(p % kv->n_slots) * n_bytes, target = (size_t)(p - kv->first) * n_bytes;
        memcpy((char *)v + target, (const char *)g4_buffer_data(kv->v) + source, n_bytes);
        if (kv->n_rotated)
            g4_kv_whole_keys(seq, layer, p, (char *)k + target);
        else
            memcpy((char *)k + target, (const char *)g4_buffer_data(kv->k) + source, n_bytes);
    }
}

/* Stores positions [first, first + n) in the layer's slots, keys in the layer's layout. */
static void import_slots(g4_sequence *seq, int layer, int first, int n, const char *k, const char *v)
{
    const g4_kv_layer *kv = &seq->layers[layer];
    const size_t n_bytes = slot_bytes(seq, layer), n_key_bytes = key_bytes(seq, layer);
    for (int i = 0; i < n; i++, k += n_bytes, v += n_bytes) {
        const size_t slot = (size_t)((first + i) % kv->n_slots);
        char *keys = (char *)g4_buffer_data(kv->k) + slot * n_key_bytes;
        memcpy((char *)g4_buffer_data(kv->v) + slot * n_bytes, v, n_bytes);
        if (kv->n_rotated)
            g4_kv_pack_rotated(seq, layer, k, keys);
        else
            memcpy(keys, k, n_bytes);
    }
}

g4_status g4_sequence_import(g4_sequence *seq, int layer, int first, int length, const void *k, const void *v,
                             g4_error *err)
{
    int window = seq->model->config.layers[layer].window;
    if (length < 0 || length > seq->capacity || first < 0 || first > length)
        return g4_fail(err, G4_EVALUE, "layer %d: positions %d to %d do not fit a sequence of capacity %d", layer,
                       first, length, seq->capacity);
    if (first > 0 && (!window || length - first < window - 1))
        return g4_fail(err, G4_EVALUE, "layer %d: positions before %d are missing", layer, first);
    if (length == 0)
        return G4_OK;
    const int n = length - first, n_slots = n < MIN_SLOTS ? MIN_SLOTS : n;
    bool same = true;
    forget(seq, layer);
    G4_TRY(replace_layer(seq, layer, n_slots, err));
    seq->layers[layer].first = first;
    import_slots(seq, layer, first, n, k, v);
    if (seq->layers[layer].n_rotated)
        G4_TRY(g4_kv_reproduces(seq, layer, first, n, k, &same, err));
    if (same)
        return G4_OK;
    G4_TRY(keep_whole_keys(seq, layer, err));
    import_slots(seq, layer, first, n, k, v);
    return G4_OK;
}

void g4_sequence_clear(g4_sequence *seq)
{
    seq->length = 0;
    for (int layer = 0; layer < seq->model->config.n_layers; layer++)
        forget(seq, layer);
}

void g4_sequence_set_length(g4_sequence *seq, int length)
{
    seq->length = length;
}
