/* SPDX-License-Identifier: Apache-2.0 */
/* Scratch memory of a step: allocate forward, rewind to a mark. Blocks are kept, so a second step allocates nothing. */
#ifndef GEMMA4_BASE_ARENA_H
#define GEMMA4_BASE_ARENA_H

#include <stddef.h>

typedef struct g4_arena g4_arena;

typedef struct {
    size_t block, used;
} g4_arena_mark;

g4_arena *g4_arena_new(void); /* NULL: out of memory */
void g4_arena_free(g4_arena *arena);
void *g4_arena_alloc(g4_arena *arena, size_t n_bytes); /* 64-byte aligned, not zeroed; NULL: out of memory */
g4_arena_mark g4_arena_save(const g4_arena *arena);
void g4_arena_restore(g4_arena *arena, g4_arena_mark mark);
void g4_arena_trim(g4_arena *arena, size_t keep_bytes); /* rewinds, and frees blocks beyond keep_bytes */

#endif
