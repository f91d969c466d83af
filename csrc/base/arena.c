/* SPDX-License-Identifier: Apache-2.0 */
#include "base/arena.h"

#include <stdlib.h>

#include "base/pages.h"

enum { ALIGNMENT = 64, MAX_BLOCKS = 64, MIN_BLOCK = 1 << 20 };

typedef struct {
    char *data;
    size_t size;
} block;

struct g4_arena {
    block blocks[MAX_BLOCKS];
    size_t n_blocks;
    g4_arena_mark at;
};

g4_arena *g4_arena_new(void)
{
    return calloc(1, sizeof(g4_arena));
}

void g4_arena_free(g4_arena *arena)
{
    if (!arena)
        return;
    g4_arena_trim(arena, 0);
    free(arena);
}

static block *add_block(g4_arena *arena, size_t n_bytes)
{
    size_t size = MIN_BLOCK;
    if (arena->n_blocks == MAX_BLOCKS)
        return NULL;
    if (arena->n_blocks)
        size = arena->blocks[arena->n_blocks - 1].size * 2;
    if (size > (size_t)64 << 20)
        size = (size_t)64 << 20;
    if (size < n_bytes)
        size = n_bytes;
    block *fresh = &arena->blocks[arena->n_blocks];
    fresh->data = g4_pages_alloc(size);
    if (!fresh->data)
        return NULL;
    fresh->size = size;
    arena->n_blocks++;
    return fresh;
}

void *g4_arena_alloc(g4_arena *arena, size_t n_bytes)
{
    size_t padded = (n_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (padded < n_bytes)
        return NULL;
    while (arena->at.block < arena->n_blocks && arena->blocks[arena->at.block].size - arena->at.used < padded) {
        arena->at.block++;
        arena->at.used = 0;
    }
    if (arena->at.block == arena->n_blocks && !add_block(arena, padded))
        return NULL;
    void *data = arena->blocks[arena->at.block].data + arena->at.used;
    arena->at.used += padded;
    return data;
}

g4_arena_mark g4_arena_save(const g4_arena *arena)
{
    return arena->at;
}

void g4_arena_restore(g4_arena *arena, g4_arena_mark mark)
{
    arena->at = mark;
}

void g4_arena_trim(g4_arena *arena, size_t keep_bytes)
{
    size_t total = 0, n_kept = 0;
    while (n_kept < arena->n_blocks && total + arena->blocks[n_kept].size <= keep_bytes)
        total += arena->blocks[n_kept++].size;
    for (size_t i = n_kept; i < arena->n_blocks; i++)
        free(arena->blocks[i].data);
    arena->n_blocks = n_kept;
    arena->at = (g4_arena_mark){0, 0};
}
