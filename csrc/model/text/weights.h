/* SPDX-License-Identifier: Apache-2.0 */
/* The weights of the text model, by role. Matrices are views of the caller's bytes. Vectors are float32 copies; norm
 * gains include the 1 of unit_gains. Members that the config does not use are NULL. */
#ifndef GEMMA4_MODEL_TEXT_WEIGHTS_H
#define GEMMA4_MODEL_TEXT_WEIGHTS_H

#include "base/arena.h"
#include "base/tensor.h"
#include "gemma4.h"

typedef struct {
    const float *ln1, *ln1_post, *ln2, *ln2_post; /* [D] input_, post_attention_, pre_ and post_feedforward_layernorm */
    g4_matrix q, k, v, o;                         /* [H*h, D] [K*h, D] [K*h, D] [D, H*h] */
    const float *q_norm, *k_norm;                 /* [h] */
    g4_matrix gate, up, down;                     /* [F, D] [F, D] [D, F] */
    const float *layer_scalar;                    /* [1] */

    g4_matrix ple_gate, ple_projection; /* [P, D] [D, P] */
    const float *ple_norm;              /* [D] */

    g4_matrix router;                                 /* [E, D] */
    const float *router_scale, *per_expert_scale;     /* [D] [E] */
    g4_matrix experts_gate, experts_up, experts_down; /* [M, D] [M, D] [D, M] of the first expert */
    size_t gate_rows;                                 /* weight rows from one expert's gate (up) to the next expert's */
    const float *moe_in_norm, *mlp_out_norm, *moe_out_norm; /* [D] pre_feedforward_layernorm_2, post_…_1, post_…_2 */
} g4_layer_weights;

typedef struct {
    g4_matrix embed, head;            /* [V, D]; the same table if tied */
    const float *final_norm;          /* [D] */
    g4_matrix ple_table, ple_context; /* [V', L*P] [L*P, D] */
    const float *ple_context_norm;    /* [P] */
    g4_layer_weights *layers;         /* [L] */
    size_t n_bytes;                   /* of all bound tensors */
} g4_weights;

/* Binds every tensor that the config needs; other tensors are ignored. Vectors are allocated in `arena`. */
g4_status g4_weights_bind(g4_weights *weights, const g4_config *config, const g4_named_tensor *tensors,
                          size_t n_tensors, g4_arena *arena, g4_error *err);

#endif
