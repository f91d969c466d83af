/* SPDX-License-Identifier: Apache-2.0 */
/* The engine without Python: a small random model of every branch, and the invariances that must hold bit for bit. Run
 * plain, under sanitizers and under valgrind (CONTRIBUTING.md). Exit status 0: all passed. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/buffer.h"
#include "base/pages.h"
#include "gemma4.h"
#include "ops/moe.h"
#include "tests/csrc_test.h"

atomic_int n_checks, n_failed;

g4_sequence *new_sequence_of(const g4_model *model)
{
    g4_sequence *seq = NULL;
    g4_error err = {0};
    CHECK(g4_sequence_new(model, G4_F32, 0, &seq, &err) == G4_OK);
    return seq;
}

/* ---- steps ------------------------------------------------------------------------------------------------------- */

enum { N_TOKENS = 37 };

static int32_t tokens[N_TOKENS], all_rows[N_TOKENS];

static g4_status forward(g4_model *model, g4_sequence *seq, int first, int n, float *logits, int max_chunk,
                         g4_error *err)
{
    g4_run run = {
        .seq = seq, .n_rows = n, .tokens = tokens + first, .logits_rows = all_rows, .n_logits = n, .logits = logits};
    g4_step_options options = {.stop_at_layer = -1, .max_chunk = max_chunk};
    return g4_step(model, &run, 1, NULL, 0, &options, err);
}

static void whole_prompt(g4_model *model, int max_chunk, float *logits)
{
    g4_error err = {0};
    g4_sequence *seq = new_sequence_of(model);
    CHECK(forward(model, seq, 0, N_TOKENS, logits, max_chunk, &err) == G4_OK);
    CHECK(g4_sequence_length(seq) == N_TOKENS);
    g4_sequence_free(seq);
}

static bool same(const float *a, const float *b, int n_rows)
{
    return memcmp(a, b, (size_t)n_rows * VOCAB * sizeof *a) == 0;
}

static void test_chunks_and_threads(fixture *f, const float *expected)
{
    static float logits[N_TOKENS * VOCAB];
    const int threads[] = {1, 2, 3, 7}, chunks[] = {1, 2, 5, 16, 0};
    for (int t = 0; t < 4; t++) {
        g4_model *model = new_model(f, threads[t]);
        for (int c = 0; c < 5; c++) {
            whole_prompt(model, chunks[c], logits);
            CHECK(same(logits, expected, N_TOKENS));
        }
        g4_model_free(model);
    }
}

/* `fast`, `high`: with and without OpenBLAS, AMX. */
static void test_other_precision(fixture *f, g4_precision precision, const float *expected)
{
    static float logits[N_TOKENS * VOCAB];
    float furthest = 0, largest = 0;
    bool finite = true;
    g4_model *model = new_model_with(f, (g4_model_options){.n_threads = 2, .precision = precision});
    CHECK(g4_model_precision(model) == precision);
    whole_prompt(model, 0, logits);
    for (int i = 0; i < N_TOKENS * VOCAB; i++) {
        furthest = fmaxf(furthest, fabsf(logits[i] - expected[i]));
        largest = fmaxf(largest, fabsf(expected[i]));
        finite = finite && isfinite(logits[i]);
    }
    CHECK(finite && furthest <= 1e-4f * largest);
    g4_model_free(model);
}

static void test_token_by_token_fork_and_truncate(fixture *f, const float *expected)
{
    static float logits[VOCAB];
    g4_error err = {0};
    g4_model *model = new_model(f, 2);
    g4_sequence *seq = new_sequence_of(model), *fork = NULL;
    for (int i = 0; i < N_TOKENS; i++) {
        CHECK(forward(model, seq, i, 1, logits, 0, &err) == G4_OK);
        CHECK(same(logits, expected + i * VOCAB, 1));
        if (i == 20)
            CHECK(g4_sequence_fork(seq, &fork, &err) == G4_OK);
    }
    CHECK(forward(model, fork, 21, 1, logits, 0, &err) == G4_OK);
    CHECK(same(logits, expected + 21 * VOCAB, 1));
    CHECK(g4_sequence_truncate(seq, N_TOKENS - 3, &err) == G4_OK);
    CHECK(forward(model, seq, N_TOKENS - 3, 1, logits, 0, &err) == G4_OK);
    CHECK(same(logits, expected + (N_TOKENS - 3) * VOCAB, 1));
    CHECK(g4_sequence_truncate(seq, N_TOKENS + 1, &err) == G4_EVALUE);
    g4_sequence_free(fork);
    g4_sequence_free(seq);
    g4_model_free(model);
}

/* After pruning, the rows with logits lie far apart: together they attend to all positions, even in sliding layers. */
static void test_far_apart_rows(fixture *f)
{
    enum { N = 300, STEP = 11, N_ROWS = (N + STEP - 1) / STEP };
    static int32_t ids[N], rows[N], some[N_ROWS];
    static float all[N * VOCAB], logits[N_ROWS * VOCAB];
    const g4_step_options options = {.stop_at_layer = -1};
    g4_error err = {0};
    for (int i = 0; i < N; i++) {
        ids[i] = (i * 13 + 5) % VOCAB;
        rows[i] = i;
        if (i % STEP == 0)
            some[i / STEP] = i;
    }
    for (int n_threads = 1; n_threads <= 3; n_threads++) {
        g4_model *model = new_model(f, n_threads);
        g4_run run = {.seq = new_sequence_of(model),
                      .n_rows = N,
                      .tokens = ids,
                      .logits_rows = rows,
                      .n_logits = N,
                      .logits = all};
        CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
        CHECK(g4_sequence_truncate(run.seq, 0, &err) == G4_OK);
        run.logits_rows = some, run.n_logits = N_ROWS, run.logits = logits;
        CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
        for (int i = 0; i < N_ROWS; i++)
            CHECK(same(logits + i * VOCAB, all + some[i] * VOCAB, 1));
        g4_sequence_free(run.seq);
        g4_model_free(model);
    }
}

static g4_status refuse(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    (void)context, (void)data, (void)shape, (void)n_dims;
    return g4_fail(err, G4_EVALUE, "refused");
}

/* Steps with stop_at_layer, one that ends and one that fails after some chunks. The sequence must not change. */
static void stop_early(g4_model *model, g4_sequence *seq, const int32_t *ids)
{
    const int before = g4_sequence_length(seq);
    const g4_step_options options = {.stop_at_layer = 2, .max_chunk = 10};
    const g4_tap tap = {.kind = G4_TAP_CALL, .site = G4_SITE_RESID_PRE, .layer = 1, .run = 1, .call = refuse};
    const g4_run runs[] = {{.seq = seq, .n_rows = 100, .tokens = ids},
                           {.seq = new_sequence_of(model), .n_rows = 3, .tokens = ids}};
    g4_error err = {0};
    CHECK(g4_step(model, runs, 1, NULL, 0, &options, &err) == G4_OK && g4_sequence_length(seq) == before);
    CHECK(g4_step(model, runs, 2, &tap, 1, &options, &err) == G4_EVALUE && strstr(err.message, "refused"));
    CHECK(g4_sequence_length(seq) == before && g4_sequence_length(runs[1].seq) == 0);
    g4_sequence_free(runs[1].seq);
}

/* A chunk longer than a sliding layer's ring, after the ring has wrapped: the same bits as in one step. */
static void test_steps_beyond_rings(fixture *f)
{
    enum { N = 300, N_PIECES = 4 };
    static const int ends[N_PIECES] = {70, 75, 180, N};
    static int32_t ids[N], rows[N];
    static float all[N * VOCAB], logits[N * VOCAB];
    const g4_step_options options = {.stop_at_layer = -1};
    g4_error err = {0};
    for (int i = 0; i < N; i++)
        ids[i] = (i * 13 + 5) % VOCAB, rows[i] = i;
    g4_model *model = new_model(f, 2);
    g4_run run = {
        .seq = new_sequence_of(model), .n_rows = N, .tokens = ids, .logits_rows = rows, .n_logits = N, .logits = all};
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
    g4_sequence_free(run.seq);
    run.seq = new_sequence_of(model);
    run.logits = logits;
    for (int i = 0, at = 0; i < N_PIECES; at = ends[i++]) {
        stop_early(model, run.seq, ids + 50);
        run.tokens = ids + at;
        run.n_rows = run.n_logits = ends[i] - at;
        CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
        CHECK(same(logits, all + at * VOCAB, run.n_rows));
    }
    g4_sequence_free(run.seq);
    g4_model_free(model);
}

/* A sliding layer continues from window - 1 keys, and from no fewer. */
static void test_import_of_too_few(fixture *f)
{
    enum { WINDOW = 5, LENGTH = 20 };
    static float keys[LENGTH * D];
    g4_error err = {0};
    g4_model *model = new_model(f, 1);
    g4_sequence *seq = new_sequence_of(model);
    CHECK(f->layers[0].window == WINDOW && f->layers[2].window == 0);
    CHECK(g4_sequence_import(seq, 0, LENGTH - (WINDOW - 1), LENGTH, keys, keys, &err) == G4_OK);
    CHECK(g4_sequence_import(seq, 0, LENGTH - (WINDOW - 2), LENGTH, keys, keys, &err) == G4_EVALUE);
    CHECK(g4_sequence_import(seq, 2, 1, LENGTH, keys, keys, &err) == G4_EVALUE);
    CHECK(g4_sequence_import(seq, 2, 0, LENGTH, keys, keys, &err) == G4_OK);
    g4_sequence_free(seq);
    g4_model_free(model);
}

static g4_status zero_out(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    size_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    memset(data, 0, n * sizeof(float));
    ++*(int *)context;
    (void)err;
    return G4_OK;
}

static void test_captures(fixture *f, const float *expected)
{
    static float logits[N_TOKENS * VOCAB], resid[N_TOKENS * D], pattern[HEADS * N_TOKENS * N_TOKENS];
    g4_error err = {0};
    int n_edits = 0;
    g4_model *model = new_model(f, 2);
    g4_sequence *seq = new_sequence_of(model);
    g4_run run = {.seq = seq,
                  .n_rows = N_TOKENS,
                  .tokens = tokens,
                  .logits_rows = all_rows,
                  .n_logits = N_TOKENS,
                  .logits = logits};
    g4_tap taps[] = {{.site = G4_SITE_RESID_POST, .layer = 5, .dest = resid, .n_dest_rows = N_TOKENS},
                     {.site = G4_SITE_PATTERN, .layer = 4, .dest = pattern, .n_dest_rows = N_TOKENS}};
    g4_step_options options = {.stop_at_layer = -1, .max_chunk = 9};
    CHECK(g4_step(model, &run, 1, taps, 2, &options, &err) == G4_OK);
    CHECK(same(logits, expected, N_TOKENS));
    for (int row = 0; row < HEADS * N_TOKENS; row++) {
        float sum = 0;
        for (int j = 0; j < N_TOKENS; j++)
            sum += pattern[row * N_TOKENS + j];
        CHECK(sum > 0.999f && sum < 1.001f);
    }
    g4_sequence_free(seq);
    run.seq = seq = new_sequence_of(model);
    taps[0] = (g4_tap){.kind = G4_TAP_CALL, .site = G4_SITE_MLP_OUT, .layer = 0, .call = zero_out, .context = &n_edits};
    CHECK(g4_step(model, &run, 1, taps, 1, &options, &err) == G4_OK);
    CHECK(n_edits == 1 && !same(logits, expected, N_TOKENS));
    g4_sequence_free(seq);
    g4_model_free(model);
}

/* From a captured residual stream the later layers give the same logits, in chunks and after a cached prefix. */
static void test_starts(fixture *f, const float *expected)
{
    enum { PREFIX = 7, N = N_TOKENS - PREFIX };
    static float logits[N_TOKENS * VOCAB], resid[N_TOKENS * D];
    g4_error err = {0};
    g4_model *model = new_model(f, 2);
    g4_sequence *whole = new_sequence_of(model), *seq = new_sequence_of(model);
    g4_run run = {.seq = whole, .n_rows = N_TOKENS, .tokens = tokens};
    const g4_tap tap = {.site = G4_SITE_RESID_PRE, .layer = 2, .dest = resid, .n_dest_rows = N_TOKENS};
    g4_step_options options = {.stop_at_layer = -1, .max_chunk = 9};
    CHECK(g4_step(model, &run, 1, &tap, 1, &options, &err) == G4_OK);
    run.seq = seq;
    run.n_rows = PREFIX;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
    run = (g4_run){.seq = seq,
                   .n_rows = N,
                   .tokens = tokens + PREFIX,
                   .logits_rows = all_rows,
                   .n_logits = N,
                   .logits = logits,
                   .resid = resid + PREFIX * D};
    options.start_at_layer = 2;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
    CHECK(same(logits, expected + PREFIX * VOCAB, N) && g4_sequence_length(seq) == PREFIX);
    options.start_at_layer = 4; /* reads the keys of layer 3 */
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_EVALUE && strstr(err.message, "start at layer"));
    options.start_at_layer = f->config.n_layers;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_EVALUE && strstr(err.message, "start_at_layer"));
    options.start_at_layer = 2;
    run.resid = NULL;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_EVALUE && strstr(err.message, "residual stream"));
    g4_sequence_free(seq);
    g4_sequence_free(whole);
    g4_model_free(model);
}

static int always(void *context)
{
    (void)context;
    return 1;
}

static void test_errors(fixture *f)
{
    static float logits[N_TOKENS * VOCAB];
    g4_error err = {0};
    g4_model *model = new_model(f, 2), *broken = NULL;
    g4_sequence *seq = new_sequence_of(model);
    g4_run run = {.seq = seq,
                  .n_rows = N_TOKENS,
                  .tokens = tokens,
                  .logits_rows = all_rows,
                  .n_logits = N_TOKENS,
                  .logits = logits};
    g4_run twice[] = {run, run};
    g4_step_options options = {.stop_at_layer = -1, .poll = always};
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_ECANCELLED);
    options.poll = NULL;
    CHECK(g4_step(model, twice, 2, NULL, 0, &options, &err) == G4_ESTATE);
    run.tokens = (const int32_t[]){VOCAB};
    run.n_rows = run.n_logits = 1;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_EVALUE && strstr(err.message, "token id"));
    run.n_rows = 0;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_EVALUE && strstr(err.message, "empty"));
    CHECK(g4_sequence_length(seq) == 0);
    while (g4_sequence_length(seq) + N_TOKENS <= 512)
        CHECK(forward(model, seq, 0, N_TOKENS, logits, 0, &err) == G4_OK);
    CHECK(forward(model, seq, 0, N_TOKENS, logits, 0, &err) == G4_ECAPACITY && strstr(err.message, "512"));
    g4_sequence_free(seq);
    g4_model_free(model);

    g4_model_options model_options = {.n_threads = 1};
    f->tensors[0].shape[0]++;
    CHECK(g4_model_new(&f->config, f->tensors, f->n_tensors, &model_options, &broken, &err) == G4_EFORMAT);
    f->tensors[0].shape[0]--;
    CHECK(g4_model_new(&f->config, f->tensors + 1, f->n_tensors - 1, &model_options, &broken, &err) == G4_EFORMAT);
    f->layers[1].n_kv_heads = 3;
    CHECK(g4_model_new(&f->config, f->tensors, f->n_tensors, &model_options, &broken, &err) == G4_EVALUE);
    f->layers[1].n_kv_heads = 2;
    f->tensors[0].n_dims++; /* [V, D, 1] is no [V, D] */
    f->tensors[0].shape[2] = 1;
    CHECK(g4_model_new(&f->config, f->tensors, f->n_tensors, &model_options, &broken, &err) == G4_EFORMAT);
    f->tensors[0].n_dims--;
    CHECK(f->layers[4].kv_source == 3);
    f->layers[4].window++; /* unlike layer 3, whose keys it reads */
    CHECK(g4_model_new(&f->config, f->tensors, f->n_tensors, &model_options, &broken, &err) == G4_EVALUE &&
          strstr(err.message, "layer 4 reads keys of layer 3"));
    f->layers[4].window--;
}

/* ---- several threads, one model ---------------------------------------------------------------------------------- */

typedef struct {
    g4_model *model;
    float logits[N_TOKENS * VOCAB];
} thread_work;

static void *thread_main(void *argument)
{
    thread_work *work = argument;
    for (int i = 0; i < 3; i++)
        whole_prompt(work->model, 4 + i, work->logits);
    return NULL;
}

static void test_concurrent_steps(fixture *f, const float *expected)
{
    static thread_work work[3];
    pthread_t threads[3];
    g4_model *model = new_model(f, 2);
    for (int i = 0; i < 3; i++) {
        work[i].model = model;
        pthread_create(&threads[i], NULL, thread_main, &work[i]);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        CHECK(same(work[i].logits, expected, N_TOKENS));
    }
    g4_model_free(model);
}

static void test_moe_group(void)
{
    const int32_t ids[] = {2, 0, 1, 2, 0, 3};
    const int in_order[] = {0, 1, 2}, last_first[] = {2, 0, 1};
    int32_t order[6], first[5];
    g4_moe_group(ids, in_order, 3, 2, 4, order, first);
    CHECK(first[0] == 0 && first[1] == 2 && first[2] == 3 && first[3] == 5 && first[4] == 6);
    CHECK(order[0] == 1 && order[1] == 4 && order[2] == 2 && order[3] == 0 && order[4] == 3 && order[5] == 5);
    g4_moe_group(ids, last_first, 3, 2, 4, order, first);
    CHECK(first[0] == 0 && first[1] == 2 && first[2] == 3 && first[3] == 5 && first[4] == 6);
    CHECK(order[0] == 4 && order[1] == 1 && order[2] == 2 && order[3] == 0 && order[4] == 3 && order[5] == 5);
}

static void test_buffers(void)
{
    g4_buffer *buffer = g4_buffer_new(100);
    CHECK(g4_buffer_is_unique(buffer) && (uintptr_t)g4_buffer_data(buffer) % 64 == 0);
    g4_buffer *again = g4_buffer_ref(buffer);
    CHECK(!g4_buffer_is_unique(buffer));
    g4_buffer_unref(again);
    CHECK(g4_buffer_is_unique(buffer));
    g4_buffer_unref(buffer);
    g4_buffer_unref(NULL);
}

static void test_pages(void)
{
    const size_t huge = (size_t)2 << 20, sizes[] = {0, 1, 63, 64, 65, huge - 1, huge, huge + 1, 3 * huge + 5};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        char *data = g4_pages_alloc(sizes[i]);
        CHECK(data && (uintptr_t)data % (sizes[i] < huge ? 64 : huge) == 0);
        memset(data, 1, sizes[i]);
        free(data);
    }
    CHECK(!g4_pages_alloc(SIZE_MAX));
}

int main(void)
{
    static fixture f;
    static float expected[N_TOKENS * VOCAB];
    for (int i = 0; i < N_TOKENS; i++) {
        tokens[i] = (i * 17 + i * i) % VOCAB;
        all_rows[i] = i;
    }
    fixture_init(&f);
    g4_model *model = new_model(&f, 1);
    whole_prompt(model, 0, expected);
    g4_model_free(model);
    test_chunks_and_threads(&f, expected);
    test_other_precision(&f, G4_HIGH, expected);
    test_other_precision(&f, G4_FAST, expected);
    test_token_by_token_fork_and_truncate(&f, expected);
    test_far_apart_rows(&f);
    test_steps_beyond_rings(&f);
    test_import_of_too_few(&f);
    test_captures(&f, expected);
    test_starts(&f, expected);
    test_errors(&f);
    test_concurrent_steps(&f, expected);
    test_moe_group();
    test_buffers();
    test_pages();
    test_pool();
    test_guards();
    test_memory();
    test_taps();
    test_encoders();
    fixture_free(&f);
    printf("%d passed, %d failed\n", n_checks - n_failed, n_failed);
    return n_failed != 0;
}
