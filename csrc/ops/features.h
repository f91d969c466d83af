/* SPDX-License-Identifier: Apache-2.0 */
/* The encoder of a dictionary (sparse autoencoder, transcoder): rows of activations to the few features that fire. The
 * dense result never exists: 64 features at a time are computed for all rows, and those that fire are kept.
 *
 * A pre-activation is one sum over the inputs in order (matmul_panel, weighted_sum), so results depend neither on other
 * rows, nor on threads, nor on the instruction set. */
#ifndef GEMMA4_OPS_FEATURES_H
#define GEMMA4_OPS_FEATURES_H

#include "ops/exec.h"

typedef struct {
    g4_matrix w;       /* float32, f16 or bf16 [features, inputs], at any address; row_stride: of what lies in rows: */
    bool inputs_first; /* the memory is [inputs, features] */
    g4_firing firing;
    int k; /* the k highest values of a row are kept, of equal ones those of the lowest ids; 0 = all that fire */
} g4_dictionary;

/* Row i has the entries offsets[i] to offsets[i + 1] - 1, by ascending id. Free each array with free(). */
typedef struct {
    int64_t *offsets; /* [m + 1] */
    int32_t *ids;
    float *values;
} g4_features;

/* The features [first, first + n) of x [m, inputs]. Takes scratch for 64 values of every row, and with k for k entries,
 * per thread. Fails with G4_EFORMAT if a value is NaN or infinite; *out is then empty. */
g4_status g4_encode_features(g4_exec *exec, const g4_dictionary *dictionary, const float *x, int m, int first, int n,
                             g4_features *out);
void g4_features_free(g4_features *features);

#endif
