/* SPDX-License-Identifier: Apache-2.0 */
/* Hostile input for the engine's entry points: configurations, shapes, dtypes, runs and taps, mostly valid, derived
 * from a string of bytes. Nothing may crash, read out of bounds or leave a sequence unusable; a refusal must have a
 * message.
 *
 * With libFuzzer (cmake -DGEMMA4_FUZZ=ON, clang) `LLVMFuzzerTestOneInput` is the target. Without it, main() runs random
 * strings for a number of seconds: csrc_fuzz [seconds] [seed]. The caller's duties in the C interface (tensors' bytes
 * exist, arrays have the stated sizes) are met here, too.
 */
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gemma4.h"

enum { MAX_LAYERS = 4, MAX_TENSORS = 128, MAX_RUNS = 3, MAX_ROWS = 40, MAX_TAPS = 6, MAX_BYTES = 1 << 20 };

static long n_models, n_steps; /* models made and steps run: inputs that are all refused would test little */

typedef struct {
    const uint8_t *at;
    size_t left;
} reader;

static int next(reader *r)
{
    return r->left ? (r->left--, *r->at++) : 0;
}

static int below(reader *r, int n)
{
    return next(r) % n;
}

/* Returns `value` nearly always, otherwise an invalid number. */
static int mostly(reader *r, int value)
{
    static const int odd[] = {0, -1, 1, 2, 3, 7, 33, 255, 1 << 14, 1 << 20, 1 << 30, INT_MAX, INT_MIN, -255, 31, 64};
    int byte = next(r);
    return byte < 250 ? value : odd[next(r) % 16];
}

/* ---- a model ----------------------------------------------------------------------------------------------------- */

typedef struct {
    g4_config config;
    g4_layer_config layers[MAX_LAYERS];
    float inv_freq[32];
    g4_named_tensor tensors[MAX_TENSORS];
    char names[MAX_TENSORS][80];
    int n_tensors;
} fixture;

static void make_config(reader *r, fixture *f)
{
    g4_config *c = &f->config;
    const int n_heads = 1 << below(r, 3), half = 8 << below(r, 2);
    *c = (g4_config){.d_model = mostly(r, 32 * (1 + below(r, 2))),
                     .n_layers = 1 + below(r, MAX_LAYERS),
                     .n_heads = mostly(r, n_heads),
                     .d_vocab = mostly(r, 40 + below(r, 40)),
                     .d_ple = below(r, 2) ? mostly(r, 32) : 0,
                     .d_vocab_ple = mostly(r, 40),
                     .n_experts = below(r, 2) ? mostly(r, 4) : 0,
                     .top_k_experts = mostly(r, 2),
                     .d_expert = mostly(r, 32),
                     .rms_norm_eps = 1e-6f,
                     .logit_softcap = below(r, 2) ? 30.0f : 0,
                     .embed_scale = (float)mostly(r, 4),
                     .ple_scale = 2,
                     .attention_scale = (float)mostly(r, 1),
                     .attention_softcap = below(r, 2) ? (float)mostly(r, 5) : 0,
                     .q_norm = below(r, 4) > 0,
                     .k_norm = below(r, 4) > 0,
                     .v_norm = below(r, 4) > 0,
                     .post_norms = below(r, 4) > 0,
                     .layer_scalar = below(r, 4) > 0,
                     .unit_gains = below(r, 2),
                     .tied = below(r, 4) > 0,
                     .context_length = mostly(r, 64),
                     .n_ropes = mostly(r, 1),
                     .rope_half = {half, half, half, half},
                     .layers = f->layers};
    for (int i = 0; i < 32; i++)
        f->inv_freq[i] = 1.0f / (float)(1 + i);
    for (int i = 0; i < G4_MAX_ROPES; i++)
        c->rope_inv_freq[i] = f->inv_freq;
    for (int i = 0; i < c->n_layers; i++)
        f->layers[i] = (g4_layer_config){.window = mostly(r, below(r, 2) ? 5 : 0),
                                         .ahead = mostly(r, below(r, 2) ? G4_WHOLE_STRETCH : below(r, 4)),
                                         .head_dim = mostly(r, 2 * half),
                                         .n_kv_heads = mostly(r, 1),
                                         .d_mlp = mostly(r, 64),
                                         .kv_source = mostly(r, i),
                                         .k_eq_v = below(r, 4) == 0,
                                         .moe = c->n_experts > 0,
                                         .rope = mostly(r, 0)};
    if (c->n_layers > 1 && below(r, 2)) { /* the last layer reads the keys of the first */
        f->layers[c->n_layers - 1] = f->layers[0];
        f->layers[c->n_layers - 1].kv_source = 0;
    }
}

/* Clamps to a range in which sizes can be multiplied. Anything outside is refused before the engine looks at a
 * tensor. */
static int64_t fit(int size)
{
    return size < 0 ? 1 : size > 4096 ? 4096 : size;
}

typedef struct {
    reader *r;
    fixture *f;
} tensor_maker;

/* A g4_tensor_fn. Some tensors are missing, some have another shape. */
static void add_tensor(void *context, const char *name, const int64_t *shape, int n_dims)
{
    static const g4_dtype types[] = {G4_F32, G4_F32, G4_BF16, G4_F16, G4_Q8_0, G4_Q4_0, G4_Q5_1, G4_MXFP4};
    reader *r = ((tensor_maker *)context)->r;
    fixture *f = ((tensor_maker *)context)->f;
    if (f->n_tensors == MAX_TENSORS || next(r) == 255)
        return;
    g4_named_tensor *t = &f->tensors[f->n_tensors];
    *t = (g4_named_tensor){.dtype = n_dims > 1 ? types[next(r) % 8] : types[next(r) % 4], .n_dims = n_dims};
    size_t n = 1;
    for (int i = 0; i < n_dims; i++) {
        t->shape[i] = fit(mostly(r, (int)shape[i]));
        n *= (size_t)t->shape[i];
    }
    if (n > MAX_BYTES / 4)
        return;
    const size_t n_bytes = n / g4_block_size(t->dtype) * g4_block_bytes(t->dtype);
    uint8_t *data = malloc(n_bytes + 1);
    const uint8_t salt = (uint8_t)next(r);
    for (size_t i = 0; i < n_bytes; i++) /* small numbers in every type: every other byte has a low exponent */
        data[i] = (uint8_t)(i % 2 ? 0x2c + (salt + i / 2) % 5 : salt * 7 + i * 13);
    t->data = data;
    t->name = f->names[f->n_tensors];
    snprintf(f->names[f->n_tensors++], sizeof f->names[0], "%s", name);
}

/* ---- a step ------------------------------------------------------------------------------------------------------ */

typedef struct {
    g4_run runs[MAX_RUNS];
    int32_t tokens[MAX_RUNS][MAX_ROWS], rows[MAX_RUNS][MAX_ROWS], ends[MAX_RUNS][MAX_ROWS], chosen[MAX_RUNS][MAX_ROWS];
    int n_runs;
    g4_tap taps[MAX_TAPS];
    int n_taps;
} step;

static void make_run(reader *r, const g4_model *model, g4_sequence *seq, step *s)
{
    const g4_config *c = g4_model_config(model);
    const int i = s->n_runs++, n = below(r, MAX_ROWS);
    for (int j = 0; j < n; j++)
        s->tokens[i][j] = mostly(r, next(r) % (c->d_vocab < 40 ? c->d_vocab : 40));
    int n_logits = 0;
    for (int j = below(r, 4); j < n && n_logits < 4; j += 1 + below(r, 8))
        s->rows[i][n_logits++] = mostly(r, j);
    s->runs[i] = (g4_run){.seq = seq,
                          .n_rows = n,
                          .tokens = next(r) == 255 ? NULL : s->tokens[i],
                          .logits_rows = s->rows[i],
                          .n_logits = n_logits,
                          .logits = malloc(((size_t)n_logits * (size_t)c->d_vocab + 1) * sizeof(float)),
                          .ends = below(r, 2) ? s->ends[i] : NULL};
    for (int j = n - 1, end = n; s->runs[i].ends && j >= 0; j--) { /* spans of rows that attend to each other */
        end = below(r, 3) ? end : j + 1;
        s->ends[i][j] = mostly(r, end);
    }
}

static g4_status leave_it(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    (void)context, (void)data, (void)shape, (void)n_dims, (void)err;
    return G4_OK;
}

/* Mostly one value for the whole site of a tap, with sizes that a caller might get wrong. */
static void make_edit(reader *r, const int64_t *shape, int n_dims, g4_edit *edit)
{
    static const float numbers[] = {0, 1, -2, 0.5f, INFINITY, NAN, 1e30f, 3};
    static float some[64];
    *edit = (g4_edit){.values = next(r) == 255 ? NULL : some, .n_values = 64, .factor = numbers[below(r, 8)]};
    edit->low = numbers[below(r, 4)], edit->high = numbers[below(r, 8)];
    some[below(r, 64)] = numbers[next(r) == 255 ? 5 : below(r, 4)];
    for (int axis = 0; axis < n_dims; axis++) {
        edit->stride[axis] = mostly(r, below(r, 3) == 0);
        if (below(r, 3) == 0)
            edit->span[axis] = (g4_span){mostly(r, below(r, 4)), mostly(r, (int)shape[axis])};
    }
}

/* A tap of a site that may not exist. Its array is as large as the site says. */
static void make_tap(reader *r, const g4_model *model, step *s)
{
    const g4_config *c = g4_model_config(model);
    g4_tap *tap = &s->taps[s->n_taps++];
    *tap = (g4_tap){.kind = (g4_tap_kind)mostly(r, below(r, G4_N_TAP_KINDS)),
                    .site = (g4_site)(next(r) % (G4_N_SITES + 2)),
                    .layer = mostly(r, below(r, c->n_layers)),
                    .call = next(r) < 250 ? leave_it : NULL};
    tap->run = mostly(r, s->n_runs ? below(r, s->n_runs) : 0);
    const bool real = tap->run >= 0 && tap->run < s->n_runs && tap->site < G4_N_SITES && tap->layer >= 0 &&
                      tap->layer < c->n_layers && g4_site_exists(c, tap->site, tap->layer);
    if (!real)
        return;
    int64_t shape[G4_MAX_DIMS];
    const g4_run *run = &s->runs[tap->run];
    const int n_keys = g4_sequence_length(run->seq) + run->n_rows;
    const int n_dims = g4_site_shape(c, tap->site, tap->layer, run->n_rows, n_keys, shape);
    size_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    make_edit(r, shape, n_dims, &tap->edit);
    if (below(r, 3) == 0 && g4_site_row_axis(tap->site) >= 0) {
        for (int i = 0; i < MAX_ROWS; i++)
            s->chosen[tap->run][i] = mostly(r, below(r, 3) ? -1 : below(r, run->n_rows + 1));
        tap->rows = s->chosen[tap->run];
    }
    if (tap->kind == G4_TAP_COPY) {
        tap->dest = calloc(n + 1, sizeof(float));
        tap->n_dest_rows = run->n_rows;
    }
}

/* Runs of a partial step have residual streams; a caller might forget some. */
static void make_streams(reader *r, const g4_model *model, step *s)
{
    const size_t d = (size_t)g4_model_config(model)->d_model;
    for (int i = 0; i < s->n_runs; i++)
        if (mostly(r, 1) == 1)
            s->runs[i].resid = calloc((size_t)s->runs[i].n_rows * d + 1, sizeof(float));
}

static void run_step(reader *r, g4_model *model, g4_sequence **seqs)
{
    step s = {0};
    g4_error err = {0};
    const int n_layers = g4_model_config(model)->n_layers;
    const bool in_order = below(r, 4) == 0;
    const g4_step_options options = {.in_order = in_order,
                                     .stop_at_layer = below(r, 6) ? -1 : mostly(r, below(r, n_layers + 1)),
                                     .start_at_layer = below(r, 4) ? 0 : mostly(r, below(r, n_layers)),
                                     .max_chunk = mostly(r, below(r, 20))};
    for (int i = 1 + below(r, MAX_RUNS); i > 0; i--)
        make_run(r, model, seqs[next(r) == 255 ? 0 : s.n_runs], &s);
    if (options.start_at_layer || below(r, 8) == 0)
        make_streams(r, model, &s);
    for (int i = below(r, MAX_TAPS + 1); i > 0; i--)
        make_tap(r, model, &s);
    g4_status status = g4_step(model, s.runs, s.n_runs, s.taps, s.n_taps, &options, &err);
    if (status != G4_OK && !err.message[0])
        abort();
    n_steps += status == G4_OK;
    for (int i = 0; i < s.n_runs; i++) {
        free(s.runs[i].logits);
        free((void *)s.runs[i].resid);
    }
    for (int i = 0; i < s.n_taps; i++)
        free(s.taps[i].dest);
}

static void use_model(reader *r, g4_model *model)
{
    g4_sequence *seqs[MAX_RUNS] = {0};
    g4_error err = {0};
    bool made = true;
    for (int i = 0; i < MAX_RUNS; i++)
        made &= g4_sequence_new(model, below(r, 2) ? G4_F32 : G4_BF16, mostly(r, 0), &seqs[i], &err) == G4_OK;
    for (int i = 1 + below(r, 3); made && i > 0; i--) {
        run_step(r, model, seqs);
        if (below(r, 3) == 0)
            (void)g4_sequence_truncate(seqs[0], mostly(r, below(r, 20)), &err);
        g4_sequence *fork = NULL;
        if (below(r, 3) == 0 && g4_sequence_fork(seqs[0], &fork, &err) == G4_OK) {
            g4_sequence_free(seqs[1]);
            seqs[1] = fork;
        }
    }
    for (int i = 0; i < MAX_RUNS; i++)
        g4_sequence_free(seqs[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    reader r = {data, size};
    fixture *f = calloc(1, sizeof *f);
    g4_error err = {0};
    g4_model *model = NULL;
    make_config(&r, f);
    (void)g4_text_tensors(&f->config, add_tensor, &(tensor_maker){&r, f}, &err); /* an invalid config has none */
    err = (g4_error){0};
    const g4_model_options options = {.n_threads = mostly(&r, 1), .precision = (g4_precision)below(&r, 3)};
    g4_status status = g4_model_new(&f->config, f->tensors, (size_t)f->n_tensors, &options, &model, &err);
    if (status != G4_OK && !err.message[0])
        abort();
    n_models += status == G4_OK;
    if (status == G4_OK)
        use_model(&r, model);
    g4_model_free(model);
    for (int i = 0; i < f->n_tensors; i++)
        free((void *)f->tensors[i].data);
    free(f);
    return 0;
}

#ifndef G4_LIBFUZZER
int main(int argc, char **argv)
{
    enum { SIZE = 1 << 12 };
    static uint8_t bytes[SIZE];
    const double seconds = argc > 1 ? atof(argv[1]) : 10;
    uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    const time_t start = time(NULL);
    long n = 0;
    for (; difftime(time(NULL), start) < seconds; n++) {
        for (int i = 0; i < SIZE; i++) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            bytes[i] = (uint8_t)(state >> 56);
        }
        /* most inputs get few invalid numbers, so that models are made and steps run; steps keep theirs */
        for (int i = 0; n % 4 && i < SIZE / (int)(1 + n % 3); i++)
            bytes[i] = bytes[i] >= 250 ? (uint8_t)(bytes[i] - 100) : bytes[i];
        (void)LLVMFuzzerTestOneInput(bytes, SIZE);
    }
    printf("%ld inputs, %ld models, %ld steps, no crash\n", n, n_models, n_steps);
    return n > 100 && (!n_models || !n_steps);
}
#endif
