/* SPDX-License-Identifier: Apache-2.0 */
/* Reference-counted bytes, 64-byte aligned. Writers first check g4_buffer_is_unique. */
#ifndef GEMMA4_BASE_BUFFER_H
#define GEMMA4_BASE_BUFFER_H

#include <stdbool.h>
#include <stddef.h>

typedef struct g4_buffer g4_buffer;

g4_buffer *g4_buffer_new(size_t n_bytes); /* NULL: out of memory */
g4_buffer *g4_buffer_ref(g4_buffer *buffer);
void g4_buffer_unref(g4_buffer *buffer); /* NULL is fine */
bool g4_buffer_is_unique(const g4_buffer *buffer);
void *g4_buffer_data(const g4_buffer *buffer);
size_t g4_buffer_size(const g4_buffer *buffer);

#endif
