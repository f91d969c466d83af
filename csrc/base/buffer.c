/* SPDX-License-Identifier: Apache-2.0 */
#include "base/buffer.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "base/pages.h"

struct g4_buffer {
    atomic_size_t n_refs;
    size_t n_bytes;
    void *data;
};

g4_buffer *g4_buffer_new(size_t n_bytes)
{
    g4_buffer *buffer = malloc(sizeof *buffer);
    if (!buffer)
        return NULL;
    buffer->data = g4_pages_alloc(n_bytes);
    if (!buffer->data) {
        free(buffer);
        return NULL;
    }
    atomic_init(&buffer->n_refs, 1);
    buffer->n_bytes = n_bytes;
    return buffer;
}

g4_buffer *g4_buffer_ref(g4_buffer *buffer)
{
    if (buffer)
        atomic_fetch_add_explicit(&buffer->n_refs, 1, memory_order_relaxed);
    return buffer;
}

void g4_buffer_unref(g4_buffer *buffer)
{
    if (buffer && atomic_fetch_sub_explicit(&buffer->n_refs, 1, memory_order_acq_rel) == 1) {
        free(buffer->data);
        free(buffer);
    }
}

bool g4_buffer_is_unique(const g4_buffer *buffer)
{
    return atomic_load_explicit(&buffer->n_refs, memory_order_acquire) == 1;
}

void *g4_buffer_data(const g4_buffer *buffer)
{
    return buffer->data;
}

size_t g4_buffer_size(const g4_buffer *buffer)
{
    return buffer->n_bytes;
}
