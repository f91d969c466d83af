/* SPDX-License-Identifier: Apache-2.0 */
/* Mixture of experts: the experts of each row, and the rows of each expert. */
#ifndef GEMMA4_OPS_MOE_H
#define GEMMA4_OPS_MOE_H

#include "ops/exec.h"

/* The k largest of probs [T, E] per row, descending (ties: the lower expert first): ids, weights [T, k], the weights
 * renormalised to sum 1 and then scaled per expert. Ref: Gemma4TextRouter.forward. */
void g4_moe_route(const float *probs, int n_rows, int n_experts, int k, const float *per_expert_scale, int32_t *ids,
                  float *weights);

/* Sorts the (row, slot) pairs of the n_rows rows by expert: order[i] = row * k + slot, expert e owns
 * order[first[e]..first[e+1]). first: [n_experts + 1]. Stable: each expert sees its rows in the order given. */
void g4_moe_group(const int32_t *ids, const int *rows, int n_rows, int k, int n_experts, int32_t *order,
                  int32_t *first);

#endif
