/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GEMMA4_MODEL_MODEL_H
#define GEMMA4_MODEL_MODEL_H

#include <stdatomic.h>

#include "base/arena.h"
#include "base/guard.h"
#include "base/pool.h"
#include "gemma4.h"
#include "kernels/kernels.h"
#include "model/text/weights.h"

struct g4_model {
    g4_config config;
    g4_weights weights;
    g4_arena *vectors;   /* owns the weights' float32 copies */
    g4_guard_set guards; /* guards of the weight files' mappings */
    const g4_kernels *kernels;
    g4_pool *pool;
    g4_precision precision;
    _Atomic(g4_arena *) spare; /* scratch of the last step, reused by the next */
};

/* Scratch for one step; concurrent steps get separate arenas. NULL: out of memory. */
g4_arena *g4_model_take_scratch(g4_model *model);
void g4_model_give_scratch(g4_model *model, g4_arena *scratch);

#endif
