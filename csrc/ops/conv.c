/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/conv.h"

#include <string.h>

#include "ops/linear_f32.h"
#include "ops/profile.h"

enum { PATCH_FLOATS = 4 << 20 }; /* im2col patches held at once: 16 MB; all of 30 s would take 110 MB */

typedef struct {
    const float *x;
    float *patches;
    int height, width, channels;
    int first; /* output row of the first patch */
} patch_task;

/* im2col: copies the patches of output rows [first, end) of the slice, one row [3 * 3 * channels] for each output. */
static void copy_patches(const g4_exec *exec, void *context, int first, int end)
{
    const patch_task *t = context;
    const int out_width = (t->width + 1) / 2;
    const size_t channels = (size_t)t->channels;
    (void)exec;
    for (int row = first; row < end; row++)
        for (int column = 0; column < out_width; column++) {
            float *to = t->patches + ((size_t)row * (size_t)out_width + (size_t)column) * 9 * channels;
            for (int i = 0; i < 9; i++, to += channels) {
                const int y = 2 * (t->first + row) - 1 + i / 3, x = 2 * column - 1 + i % 3;
                if (y < 0 || y >= t->height || x < 0 || x >= t->width)
                    memset(to, 0, channels * sizeof *to);
                else
                    memcpy(to, t->x + ((size_t)y * (size_t)t->width + (size_t)x) * channels, channels * sizeof *to);
            }
        }
}

g4_status g4_conv_3x3(g4_exec *exec, const float *x, int height, int width, int channels, const g4_matrix *w,
                      float *out)
{
    const int out_height = (height + 1) / 2, out_width = (width + 1) / 2;
    const size_t row_floats = (size_t)out_width * 9 * (size_t)channels;
    int slice = (int)(PATCH_FLOATS / row_floats) > 0 ? (int)(PATCH_FLOATS / row_floats) : 1;
    slice = slice > out_height ? out_height : slice;
    g4_arena_mark mark = g4_arena_save(exec->arena);
    patch_task t = {.x = x, .height = height, .width = width, .channels = channels};
    G4_ALLOC(exec, t.patches, (size_t)slice * row_floats);
    for (t.first = 0; t.first < out_height; t.first += slice) {
        const int n = out_height - t.first < slice ? out_height - t.first : slice;
        G4_TRY(g4_exec_rows(exec, n, row_floats / 8, copy_patches, &t));
        G4_TRY(
            g4_panel_linear(exec, t.patches, n * out_width, w, out + (size_t)t.first * (size_t)out_width * w->n_rows));
    }
    g4_arena_restore(exec->arena, mark);
    return G4_OK;
}

typedef struct {
    const float *x, *w;
    float *out;
    int size, n;
} depthwise_task;

static void depthwise_rows(const g4_exec *exec, void *context, int first, int end)
{
    const depthwise_task *t = context;
    const size_t n = (size_t)t->n;
    for (int row = first; row < end; row++) {
        float *out = t->out + (size_t)row * n;
        memset(out, 0, n * sizeof *out);
        for (int i = 0; i < t->size; i++) {
            const int source = row - t->size + 1 + i;
            if (source >= 0)
                exec->kernels->mul_add(out, t->w + (size_t)i * n, t->x + (size_t)source * n, t->n);
        }
    }
}

g4_status g4_conv_depthwise(g4_exec *exec, const float *x, const float *w, int size, int n_rows, int n, float *out)
{
    depthwise_task t = {x, w, out, size, n};
    const double start = g4_profile_start(exec), n_values = (double)n_rows * (double)n;
    G4_TRY(g4_exec_rows(exec, n_rows, (size_t)n * (size_t)size / 8 + 1, depthwise_rows, &t));
    g4_profile_end(exec, G4_OP_CONV, start, 2 * n_values * size, 2 * n_values * (double)sizeof(float));
    return G4_OK;
}
