/* SPDX-License-Identifier: Apache-2.0 */
/* Shared by the parts of csrc_test: check counting, and a small random model of every branch. */
#ifndef GEMMA4_TESTS_CSRC_TEST_H
#define GEMMA4_TESTS_CSRC_TEST_H

#include <stdatomic.h>
#include <stdio.h>

#include "gemma4.h"

extern atomic_int n_checks, n_failed;

#define CHECK(condition)                                                   \
    do {                                                                   \
        n_checks++;                                                        \
        if (!(condition)) {                                                \
            n_failed++;                                                    \
            printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                  \
    } while (0)

enum { D = 40, HEADS = 4, VOCAB = 61, LAYERS = 6, PLE = 8, EXPERTS = 5, MAX_TENSORS = 256 };

typedef struct {
    g4_layer_config layers[LAYERS];
    float inv_freq[2][16];
    g4_config config;
    g4_named_tensor tensors[MAX_TENSORS];
    char names[MAX_TENSORS][80];
    size_t n_tensors;
    unsigned seed;
} fixture;

/* Sliding and global layers, shared keys, K = V, experts and per-layer embeddings in one model. */
void fixture_init(fixture *f);
void fixture_free(fixture *f);

/* The tensors of an encoder of this config. */
void fixture_init_encoder(fixture *f, const g4_encoder_config *config);

/* These, like the functions above, exit the program if the engine refuses. */
g4_model *new_model_with(fixture *f, g4_model_options options);
g4_model *new_model(fixture *f, int n_threads);

/* A small encoder of each kind, without clipping. */
g4_encoder_config encoder_config_of(g4_encoder_kind kind);

/* A small random encoder. Its tensors live until the next one is made. */
g4_encoder *new_encoder_of(g4_model *model, g4_encoder_kind kind);

g4_sequence *new_sequence_of(const g4_model *model);

void test_pool(void);
void test_guards(void);
void test_memory(void);
void test_taps(void);
void test_encoders(void);

#endif
