/* SPDX-License-Identifier: Apache-2.0 */
/* One table of kernels per instruction set, and the choice among them. */
#ifndef GEMMA4_KERNELS_KERNELS_H
#define GEMMA4_KERNELS_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/cpu.h"
#include "base/dtype.h"
#include "base/status.h"

/* Rows of x as int8; 32 values share a scale. A row's k inputs are padded with zeros to its stride K. There are two
 * layouts:
 *   Few rows (decode) lie one after the other. In every 8 blocks of 32, block b is paired with block b + 4: both first
 *   halves, then both last halves. Here R = 1, m is the number of rows, and E = K.
 *   More rows (prefill) are interleaved by fours: R = 4, m is rounded up to a multiple of 4, and E = 8 inputs of each
 *   row lie together. A tile reads them sequentially. */
typedef struct {
    int8_t *q;    /* [m / R, K / E, R, E] */
    float *scale; /* [m / R, K / 32, R] */
    float *sum16,
        *sum32;       /* [m / R, K / 16, R], [m / R, K / 32, R] scale times the sum of q, for formats with a minimum */
    int16_t *minus_4; /* [m / 4, K / 32, 4, 2] only if by_fours: -4 times the sum of q, twice, for Q4_0; … */
    int32_t *minus_8; /* [m / 4, K / 32, 4] … and what the two add up to, for VNNI */
    bool by_fours;
} g4_int8_rows;

enum { G4_INT8_FEW = 6 }; /* up to this many rows, packing the weights for the tile costs more than it saves */

/* The decode kernels take 256 inputs at a time. */
static inline size_t g4_int8_stride(size_t k) { return (k + 255) / 256 * 256; }

/* Bytes of q. There is a scale and a sum32 for every 32 bytes, a sum16 for every 16. */
static inline size_t g4_int8_bytes(int m, size_t k)
{
    return (size_t)(m > G4_INT8_FEW ? (m + 3) / 4 * 4 : m) * g4_int8_stride(k);
}

/* Both operands of body_panel16.h: integers of 12 bits; G4_GROUP16 inputs of a row share a scale. */
enum { G4_GROUP16 = 256 };

/* A row's k inputs are padded with zeros to a multiple of 4. */
static inline int g4_stride16(int k) { return (k + 3) / 4 * 4; }
static inline int g4_groups16(int k) { return (k + G4_GROUP16 - 1) / G4_GROUP16; }

/* Rows of x. */
typedef struct {
    int16_t *q;   /* [m, stride] */
    float *scale; /* [m, groups] */
    int stride;
} g4_rows16;

/* 16 rows of weights, over the same inputs. */
typedef struct {
    int16_t *q;   /* [stride / 2, 16, 2] */
    float *scale; /* [groups, 16] */
} g4_panel16;

static inline g4_rows16 g4_rows16_from(const g4_rows16 *rows, int first)
{
    return (g4_rows16){rows->q + (size_t)first * (size_t)rows->stride,
                       rows->scale + (size_t)first * (size_t)g4_groups16(rows->stride), rows->stride};
}

/* The rows from input `at` on, where a group begins. */
static inline g4_rows16 g4_rows16_at(const g4_rows16 *rows, int at)
{
    return (g4_rows16){rows->q + at, rows->scale + at / G4_GROUP16, rows->stride};
}

static inline g4_panel16 g4_panel16_at(const g4_panel16 *w, int at)
{
    return (g4_panel16){w->q + (size_t)at * 16, w->scale + (size_t)(at / G4_GROUP16) * 16};
}

/* Rows of x in bfloat16, in tiles of 16 rows by 32 inputs, padded with zeros (body_bf16.h). */
enum { G4_TILE_ROWS = 16, G4_TILE_INPUTS = 32, G4_TILE = G4_TILE_ROWS * G4_TILE_INPUTS };
enum { G4_PIECES = 3 }; /* bf16 numbers whose sum is any float32 */

typedef struct {
    uint16_t *data; /* [m / 16, tiles, 16 pairs, 16, 2] */
    size_t stride;  /* elements from one 16 rows to the next */
} g4_tiles;

static inline int g4_tiles_of(int k) { return (k + G4_TILE_INPUTS - 1) / G4_TILE_INPUTS; }

/* The tiles from a row on, a multiple of 16. */
static inline g4_tiles g4_tiles_from(const g4_tiles *t, int row)
{
    return (g4_tiles){t->data + (size_t)(row / G4_TILE_ROWS) * t->stride, t->stride};
}

/* Floats for the sums of m rows of x and n weights between two calls of matmul_tiles. */
static inline size_t g4_tile_sums(int m, int n)
{
    enum { SIDE = 2 * G4_TILE_ROWS };
    return (size_t)((m + SIDE - 1) / SIDE) * (size_t)((n + SIDE - 1) / SIDE) * (size_t)(SIDE * SIDE);
}

/* Floats of scratch that a caller passes to matmul_* (accumulators, 144 rows of x, 64 of weights) and to matmul_int8_*.
 * A kernel's own frame is small, because the caller's thread may have 128 KiB of stack. */
enum { G4_MATMUL_SCRATCH = 144 * 64 * 16 + (144 + 64) * 512, G4_INT8_SCRATCH = 14336 };

/* matmul reads x in place up to this number of rows and of inputs: 16 KB, half of the first-level cache. */
enum { G4_GROUP_ROWS = 8, G4_GROUP_K = 512 };

/* The size of x from pack_rows. Units of rows hold whole tiles on every level. */
enum { G4_PACK_UNIT = 6 };
static inline size_t g4_packed_rows(size_t m) { return (m + G4_PACK_UNIT - 1) / G4_PACK_UNIT * G4_PACK_UNIT; }
static inline size_t g4_packed_inputs(size_t k) { return (k + 15) / 16 * 16; }

/* When the features of a dictionary fire: one number of each array for every feature, all finite but thresholds, which
 * may be infinite. NULL: no such step. */
typedef struct {
    const float *before, *scale, *after; /* value = (x + before) * scale + after */
    const float *gate;                   /* x + gate > 0 is needed besides */
    const float *threshold;              /* >= 0: value > threshold; NULL: 0 */
} g4_firing;

#define G4_KERNEL(result, name, args) typedef result(*g4_##name##_fn) args;
#include "kernels/kernels.inc"
#undef G4_KERNEL

typedef struct {
    g4_isa isa;
#define G4_KERNEL(result, name, args) g4_##name##_fn name;
#include "kernels/kernels.inc"
#undef G4_KERNEL
} g4_kernels;

/* The table of the instruction set, or NULL if this build or this processor lacks it. */
const g4_kernels *g4_kernels_for(g4_isa isa);

/* Selects the best table, unless the environment's GEMMA4_ISA names a lower level. */
g4_status g4_kernels_select(const g4_kernels **kernels, g4_error *err);

static inline g4_matmul_f32_fn g4_matmul_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
    case G4_F16: return kernels->matmul_f16;
    case G4_BF16: return kernels->matmul_bf16;
#define X(type, suffix, block, bytes) \
    case G4_##type: return kernels->matmul_##suffix;
        G4_EACH_QUANTISED(X)
#undef X
    default: return kernels->matmul_f32;
    }
}

static inline g4_matmul_packed_f32_fn g4_matmul_packed_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
    case G4_F16: return kernels->matmul_packed_f16;
    case G4_BF16: return kernels->matmul_packed_bf16;
#define X(type, suffix, block, bytes) \
    case G4_##type: return kernels->matmul_packed_##suffix;
        G4_EACH_QUANTISED(X)
#undef X
    default: return kernels->matmul_packed_f32;
    }
}

static inline g4_widen_f32_fn g4_widen_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
    case G4_F16: return kernels->widen_f16;
    case G4_BF16: return kernels->widen_bf16;
#define X(type, suffix, block, bytes) \
    case G4_##type: return kernels->widen_##suffix;
        G4_EACH_QUANTISED(X)
#undef X
    default: return kernels->widen_f32;
    }
}

/* NULL for the plain types. */
static inline g4_matmul_int8_q8_0_fn g4_matmul_int8_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
#define X(type, suffix, block, bytes) \
    case G4_##type: return kernels->matmul_int8_##suffix;
        G4_EACH_QUANTISED(X)
#undef X
    default: return NULL;
    }
}

/* NULL for types that are never converted to bf16, and without bf16 instructions. */
static inline g4_bf16_row_bf16_fn g4_bf16_row_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
    case G4_BF16: return kernels->bf16_row_bf16;
#define X(type, suffix, block, bytes) \
    case G4_##type: return kernels->bf16_row_##suffix;
        G4_EACH_QUANTISED(X)
#undef X
    default: return NULL;
    }
}

/* NULL for types that cached keys and values cannot have. */
static inline g4_weighted_sum_f32_fn g4_weighted_sum_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
    case G4_F32: return kernels->weighted_sum_f32;
    case G4_F16: return kernels->weighted_sum_f16;
    case G4_BF16: return kernels->weighted_sum_bf16;
    case G4_Q8_0: return kernels->weighted_sum_q8_0;
    default: return NULL;
    }
}

static inline g4_narrow_f32_fn g4_narrow_for(const g4_kernels *kernels, g4_dtype dtype)
{
    switch (dtype) {
    case G4_F32: return kernels->narrow_f32;
    case G4_F16: return kernels->narrow_f16;
    case G4_BF16: return kernels->narrow_bf16;
    case G4_Q8_0: return kernels->narrow_q8_0;
    default: return NULL;
    }
}

#endif
