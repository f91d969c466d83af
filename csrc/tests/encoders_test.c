/* SPDX-License-Identifier: Apache-2.0 */
/* Encoders: sizes that do not belong together, patches far from each other, and values that are not finite. */
#include <math.h>
#include <string.h>

#include "tests/csrc_test.h"

/* The engine computes what it projects: its width is no free choice, except that of the audio tower's last layer. */
static void test_widths(g4_model *model)
{
    for (int kind = G4_VISION_TOWER; kind <= G4_AUDIO_EMBEDDER; kind++)
        for (int more = -4; more <= 4; more += 4) {
            static fixture f;
            g4_encoder_config config = encoder_config_of((g4_encoder_kind)kind);
            g4_encoder *encoder = NULL;
            g4_error err = {0};
            config.d_soft += more;
            const bool good = more == 0 || kind == G4_AUDIO_TOWER;
            const g4_status status = g4_encoder_new(model, &config, NULL, 0, NULL, NULL, &encoder, &err);
            CHECK(status == (good ? G4_EFORMAT : G4_EVALUE)); /* good: the tensors are missing */
            CHECK(good || strstr(err.message, "d_soft"));
            if (!good)
                continue;
            fixture_init_encoder(&f, &config);
            CHECK(g4_encoder_new(model, &config, f.tensors, f.n_tensors, NULL, NULL, &encoder, &err) == G4_OK);
            g4_encoder_free(encoder);
            fixture_free(&f);
        }
    g4_encoder_config wide = encoder_config_of(G4_AUDIO_TOWER);
    g4_encoder *encoder = NULL;
    g4_error err = {0};
    wide.d_in = (1 << 12) + 1;
    CHECK(g4_encoder_new(model, &wide, NULL, 0, NULL, NULL, &encoder, &err) == G4_EVALUE);
}

/* Two patches at the ends of long axes: their soft tokens are numbered beyond an int. */
static void test_far_patches(g4_model *model)
{
    enum { SIDE = 1 << 16 };
    static fixture f;
    static const int32_t corners[] = {SIDE - 1, SIDE - 1, 0, SIDE - 1};
    float rows[2 * 12] = {0}, soft[2 * D];
    g4_encoder_config config = encoder_config_of(G4_VISION_TOWER);
    g4_encoder *encoder = NULL;
    g4_error err = {0};
    config.n_positions = SIDE, config.pool = 1, config.d_model = config.d_soft = 4;
    fixture_init_encoder(&f, &config);
    CHECK(g4_encoder_new(model, &config, f.tensors, f.n_tensors, NULL, NULL, &encoder, &err) == G4_OK);
    const g4_medium medium = {2, rows, corners, soft};
    CHECK(g4_encode(encoder, &medium, 1, NULL, 0, NULL, NULL, NULL, &err) == G4_EVALUE &&
          strstr(err.message, "whole grid"));
    g4_encoder_free(encoder);
    fixture_free(&f);
}

/* An infinite value reaches the frames that see it, no others, whether the pattern is read or not. */
static void test_infinite_frame(g4_model *model)
{
    enum { FRAMES = 160, N_SOFT = FRAMES / 4, AT = N_SOFT / 2 };
    static float rows[FRAMES * 16], soft[2][N_SOFT * D], pattern[3 * N_SOFT * N_SOFT];
    const float infinite = INFINITY;
    int32_t chosen[N_SOFT];
    g4_error err = {0};
    g4_encoder *encoder = new_encoder_of(model, G4_AUDIO_TOWER);
    for (int i = 0; i < FRAMES * 16; i++)
        rows[i] = (float)(i * 7919 % 1009) / 1009.0f;
    for (int i = 0; i < N_SOFT; i++)
        chosen[i] = i == AT ? 0 : -1;
    const g4_tap taps[] = {
        {.kind = G4_TAP_SET, .site = G4_SITE_A_V, .rows = chosen, .edit = {.values = &infinite, .n_values = 1}},
        {.kind = G4_TAP_COPY, .site = G4_SITE_A_PATTERN, .dest = pattern, .n_dest_rows = N_SOFT}};
    for (int n_taps = 1; n_taps <= 2; n_taps++) {
        const g4_medium medium = {FRAMES, rows, NULL, soft[n_taps - 1]};
        CHECK(g4_encode(encoder, &medium, 1, taps, n_taps, NULL, NULL, NULL, &err) == G4_OK);
    }
    for (int i = 0; i < N_SOFT * D; i++)
        CHECK(soft[0][i] == soft[1][i] || (isnan(soft[0][i]) && isnan(soft[1][i])));
    CHECK(isfinite(soft[0][0]) && isnan(soft[0][AT * D]));
    g4_encoder_free(encoder);
}

void test_encoders(void)
{
    static fixture f;
    fixture_init(&f);
    g4_model *model = new_model(&f, 2);
    test_widths(model);
    test_far_patches(model);
    test_infinite_frame(model);
    g4_model_free(model);
    fixture_free(&f);
}
