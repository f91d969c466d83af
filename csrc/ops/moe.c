/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/moe.h"

#include <string.h>

static void route_row(const float *probs, int n_experts, int k, const float *per_expert_scale, int32_t *ids,
                      float *weights)
{
    float sum = 0;
    for (int slot = 0; slot < k; slot++) {
        int best = -1;
        for (int e = 0; e < n_experts; e++) {
            bool taken = false;
            for (int s = 0; s < slot; s++)
                taken |= ids[s] == e;
            if (!taken && (best < 0 || probs[e] > probs[best]))
                best = e;
        }
        ids[slot] = best;
        weights[slot] = probs[best];
        sum += probs[best];
    }
    for (int slot = 0; slot < k; slot++)
        weights[slot] = weights[slot] / sum * per_expert_scale[ids[slot]];
}

void g4_moe_route(const float *probs, int n_rows, int n_experts, int k, const float *per_expert_scale, int32_t *ids,
                  float *weights)
{
    for (int i = 0; i < n_rows; i++)
        route_row(probs + (size_t)i * (size_t)n_experts, n_experts, k, per_expert_scale, ids + (size_t)i * (size_t)k,
                  weights + (size_t)i * (size_t)k);
}

void g4_moe_group(const int32_t *ids, const int *rows, int n_rows, int k, int n_experts, int32_t *order, int32_t *first)
{
    memset(first, 0, ((size_t)n_experts + 1) * sizeof *first);
    for (int i = 0; i < n_rows * k; i++)
        first[ids[i] + 1]++;
    for (int e = 0; e < n_experts; e++)
        first[e + 1] += first[e];
    for (int i = 0; i < n_rows; i++)
        for (int pair = rows[i] * k; pair < (rows[i] + 1) * k; pair++)
            order[first[ids[pair]]++] = pair;
    /* first[e] is now the end of expert e, which is the start of expert e + 1 */
    for (int e = n_experts; e > 0; e--)
        first[e] = first[e - 1];
    first[0] = 0;
}
