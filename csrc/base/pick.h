/* SPDX-License-Identifier: Apache-2.0 */
/* The largest logits of a row: what most sampling needs of it (ops/pick.h). */
#ifndef GEMMA4_BASE_PICK_H
#define GEMMA4_BASE_PICK_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    int k;          /* list the k largest logits and all equal to the last of them, but no -inf; 0: none */
    float within;   /* list also all that are at most this much below the largest, but no -inf; 0: none */
    bool with_sum;  /* compute log_sum */
    int32_t *ids;   /* [V] room for the list, by ascending id; not used if none is to be listed */
    float *values;  /* [V] their logits */
    int n;          /* result: length of the list */
    int best;       /* result: the largest logit's id, the lowest among equals */
    float top;      /* result: the largest logit. If it is NaN (some logit is), best and n are 0 */
    double log_sum; /* result, with_sum: log of the sum of e^logit; NaN if top is not finite */
} g4_pick;

#endif
