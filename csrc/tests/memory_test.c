/* SPDX-License-Identifier: Apache-2.0 */
/* Out-of-memory tests: every allocation of every entry point fails once. Each time the entry returns G4_ENOMEM and
 * leaks nothing, and the caller's objects still work. The linker redirects the engine's malloc, calloc etc. here
 * (--wrap). */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/pool.h"
#include "ops/attention/attention.h"
#include "ops/linear.h"
#include "tests/csrc_test.h"

#if !defined G4_WRAP_MALLOC /* CMakeLists.txt says where not */
void test_memory(void)
{
    printf("allocations that fail: skipped\n");
}
#else

/* ---- allocations that fail --------------------------------------------------------------------------------------- */

void *__real_malloc(size_t n_bytes);
void *__real_calloc(size_t n, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t n_bytes);
void __real_free(void *data);
void *__real_g4_arena_alloc(g4_arena *arena, size_t n_bytes);
void __real_g4_arena_restore(g4_arena *arena, g4_arena_mark mark);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

void *__wrap_malloc(size_t n_bytes);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t n_bytes);
void __wrap_free(void *data);
void *__wrap_g4_arena_alloc(g4_arena *arena, size_t n_bytes);
void __wrap_g4_arena_restore(g4_arena *arena, g4_arena_mark mark);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument);

typedef enum { NOTHING, MEMORY, THREAD } failure;

static atomic_long n_live, countdown = -1; /* allocations not yet freed; allocations before the one that fails */
static failure failed;

static bool fails(failure what)
{
    if (atomic_load(&countdown) < 0 || atomic_fetch_sub(&countdown, 1) > 0)
        return false;
    failed = what;
    return true;
}

static void *counted(void *data)
{
    n_live += data != NULL;
    return data;
}

void *__wrap_malloc(size_t n_bytes)
{
    return fails(MEMORY) ? NULL : counted(__real_malloc(n_bytes));
}

void *__wrap_calloc(size_t n, size_t size)
{
    return fails(MEMORY) ? NULL : counted(__real_calloc(n, size));
}

void *__wrap_aligned_alloc(size_t alignment, size_t n_bytes)
{
    return fails(MEMORY) ? NULL : counted(__real_aligned_alloc(alignment, n_bytes));
}

void __wrap_free(void *data)
{
    n_live -= data != NULL;
    __real_free(data);
}

/* Puts scratch between fences and never reuses it, to detect writes past its end. To sanitizers an arena is one
 * block. */
enum { FENCE = 1 << 16, MAX_FENCES = 4096 };

static bool watching;
static unsigned char *fences[MAX_FENCES];
static int n_fences;

static void *watched(g4_arena *arena, size_t n_bytes)
{
    char *data = __real_g4_arena_alloc(arena, n_bytes + FENCE);
    if (data && n_fences < MAX_FENCES) {
        fences[n_fences++] = (unsigned char *)data + n_bytes;
        memset(data + n_bytes, FENCE % 251, FENCE);
    }
    return data;
}

static int n_broken_fences(void)
{
    int n = 0;
    for (int i = 0; i < n_fences; i++)
        for (int j = 0; j < FENCE; j++)
            if (fences[i][j] != FENCE % 251) {
                n++;
                break;
            }
    return n;
}

/* Most of these need no memory from the system; each fails as if it did. */
void *__wrap_g4_arena_alloc(g4_arena *arena, size_t n_bytes)
{
    if (fails(MEMORY))
        return NULL;
    return watching ? watched(arena, n_bytes) : __real_g4_arena_alloc(arena, n_bytes);
}

void __wrap_g4_arena_restore(g4_arena *arena, g4_arena_mark mark)
{
    if (!watching)
        __real_g4_arena_restore(arena, mark);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    return fails(THREAD) ? 1 : __real_pthread_create(thread, attributes, start, argument);
}

/* ---- each allocation in turn ------------------------------------------------------------------------------------- */

enum { N_TOKENS = 37, N_BEFORE = 20, MAX_TAPS = 1024 };

typedef struct {
    fixture *f;
    g4_model *model;
    g4_sequence *seq;
    int32_t tokens[N_TOKENS], rows[N_TOKENS];
    float logits[N_TOKENS * VOCAB], expected[N_TOKENS * VOCAB];
    g4_tap taps[MAX_TAPS];
    int n_taps;
    float *dest; /* destination of all taps */
    const g4_encoder_config *encoder_config;
    g4_encoder *encoder;
    g4_medium medium;
    g4_dtype dtype;
    bool fast;
} scene;

typedef g4_status (*attempt_fn)(scene *s, g4_error *err);

/* Repeats the attempt, with the next allocation failing each time, until an attempt needs no more allocations. A thread
 * that does not start is no error. */
static void each_allocation(const char *name, scene *s, attempt_fn attempt, bool (*intact)(scene *s))
{
    for (long n = 0;; n++) {
        g4_error err = {0};
        failed = NOTHING;
        atomic_store(&countdown, n);
        const g4_status status = attempt(s, &err);
        atomic_store(&countdown, -1);
        const bool good = failed == MEMORY ? status == G4_ENOMEM && err.message[0] : status == G4_OK;
        if (!good)
            printf("%s, allocation %ld: status %d, %s\n", name, n, (int)status, err.message);
        CHECK(good && (!intact || intact(s)));
        if (failed == NOTHING || !good)
            return;
    }
}

static g4_status forward(scene *s, g4_sequence *seq, int first, int n, int max_chunk, g4_error *err)
{
    g4_run run = {.seq = seq,
                  .n_rows = n,
                  .tokens = s->tokens + first,
                  .logits_rows = s->rows,
                  .n_logits = n,
                  .logits = s->logits};
    g4_step_options options = {.stop_at_layer = -1, .max_chunk = max_chunk};
    return g4_step(s->model, &run, 1, s->taps, s->n_taps, &options, err);
}

static bool same_logits(const scene *s, int first, int n)
{
    return s->fast || memcmp(s->logits, s->expected + first * VOCAB, (size_t)n * VOCAB * sizeof *s->logits) == 0;
}

/* A sequence of n tokens. */
static g4_sequence *filled_sequence(scene *s, int n)
{
    g4_sequence *seq = new_sequence_of(s->model);
    g4_error err = {0};
    CHECK(forward(s, seq, 0, n, 0, &err) == G4_OK);
    return seq;
}

/* ---- models, sequences and steps --------------------------------------------------------------------------------- */

static g4_status live(scene *s, g4_error *err)
{
    g4_model *model = NULL;
    g4_sequence *seq = NULL;
    const g4_model_options options = {.n_threads = 3, .precision = s->fast ? G4_FAST : G4_HIGH};
    G4_TRY(g4_model_new(&s->f->config, s->f->tensors, s->f->n_tensors, &options, &model, err));
    g4_model *const usual = s->model;
    s->model = model;
    g4_status status = g4_sequence_new(model, G4_F32, 0, &seq, err);
    if (status == G4_OK)
        status = forward(s, seq, 0, N_TOKENS, 9, err);
    s->model = usual;
    CHECK(status != G4_OK || same_logits(s, 0, N_TOKENS));
    g4_sequence_free(seq);
    g4_model_free(model);
    return status;
}

static g4_status prefill(scene *s, g4_error *err)
{
    const int before = g4_sequence_length(s->seq);
    if (before)
        G4_TRY(g4_sequence_truncate(s->seq, 0, err));
    G4_TRY(forward(s, s->seq, 0, N_TOKENS, 0, err));
    CHECK(same_logits(s, 0, N_TOKENS));
    return G4_OK;
}

/* Finished chunks stay, complete ones only. The rest continues as if nothing had failed. */
static g4_status go_on(scene *s, g4_error *err)
{
    const int done = g4_sequence_length(s->seq) % N_TOKENS;
    if (!done)
        G4_TRY(g4_sequence_truncate(s->seq, 0, err));
    G4_TRY(forward(s, s->seq, done, N_TOKENS - done, 1, err));
    CHECK(same_logits(s, done, N_TOKENS - done));
    return G4_OK;
}

static g4_status decode(scene *s, g4_error *err)
{
    const int length = g4_sequence_length(s->seq);
    G4_TRY(forward(s, s->seq, length, 1, 0, err));
    CHECK(same_logits(s, length, 1));
    return G4_OK;
}

static g4_status two_sequences(scene *s, g4_error *err)
{
    g4_sequence *a = NULL, *b = NULL;
    const g4_step_options options = {.stop_at_layer = -1, .max_chunk = 8};
    g4_status status = g4_sequence_new(s->model, G4_F32, 0, &a, err);
    if (status == G4_OK)
        status = g4_sequence_new(s->model, G4_BF16, 0, &b, err);
    if (status == G4_OK) {
        const g4_run runs[] = {{.seq = a,
                                .n_rows = N_TOKENS,
                                .tokens = s->tokens,
                                .logits_rows = s->rows,
                                .n_logits = N_TOKENS,
                                .logits = s->logits},
                               {.seq = b, .n_rows = 3, .tokens = s->tokens}};
        status = g4_step(s->model, runs, 2, NULL, 0, &options, err);
        CHECK(status != G4_OK || same_logits(s, 0, N_TOKENS));
    }
    g4_sequence_free(a);
    g4_sequence_free(b);
    return status;
}

/* The fork writes where both read; its origin does not change. */
static g4_status fork_and_write(scene *s, g4_error *err)
{
    g4_sequence *fork = NULL;
    G4_TRY(g4_sequence_fork(s->seq, &fork, err));
    g4_status status = forward(s, fork, N_BEFORE, 2, 0, err);
    CHECK(status != G4_OK || same_logits(s, N_BEFORE, 2));
    g4_sequence_free(fork);
    return status;
}

static bool length_is_unchanged(scene *s)
{
    return g4_sequence_length(s->seq) == N_BEFORE;
}

/* ---- sites ------------------------------------------------------------------------------------------------------- */

static g4_status touch(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    (void)context, (void)data, (void)shape, (void)n_dims, (void)err;
    return G4_OK;
}

/* Keys no longer derive from their values, so complete keys must be kept. */
static g4_status change_first(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    const int last_pair = (int)shape[n_dims - 1] / 2 - 1; /* which RoPE does not rotate */
    ((float *)data)[last_pair] += 1;
    return touch(context, data, shape, n_dims, err);
}

static int64_t volume(const int64_t *shape, int n_dims)
{
    int64_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= shape[i];
    return n;
}

/* A tap on every site. All copy to one place, or change nothing. */
static void tap_all(scene *s, bool edits)
{
    int64_t most = 0, shape[G4_MAX_DIMS];
    s->n_taps = 0;
    for (int site = 0; site < G4_N_SITES; site++)
        for (int layer = 0; layer < LAYERS; layer++) {
            const bool exists = s->encoder ? g4_encoder_site_exists(s->encoder_config, (g4_site)site, layer)
                                           : g4_site_exists(&s->f->config, (g4_site)site, layer);
            if (!exists)
                continue;
            const int n_dims = s->encoder
                                   ? g4_encoder_site_shape(s->encoder_config, (g4_site)site, s->medium.n_rows, shape)
                                   : g4_site_shape(&s->f->config, (g4_site)site, layer, N_TOKENS, N_TOKENS, shape);
            most = volume(shape, n_dims) > most ? volume(shape, n_dims) : most;
            const int axis = g4_site_row_axis((g4_site)site);
            s->taps[s->n_taps++] = (g4_tap){
                .site = (g4_site)site, .layer = layer, .n_dest_rows = axis < 0 ? 0 : (int)shape[axis], .call = touch};
        }
    free(s->dest);
    s->dest = malloc((size_t)most * sizeof *s->dest);
    for (int t = 0; t < s->n_taps; t++)
        if (edits)
            s->taps[t].kind = G4_TAP_CALL;
        else
            s->taps[t].dest = s->dest;
}

static void test_sites(scene *s)
{
    for (int edits = 0; edits < 2; edits++) {
        tap_all(s, edits);
        each_allocation(edits ? "hooks" : "captures", s, prefill, NULL);
    }
    s->n_taps = 0;
}

static g4_status edit_keys(scene *s, g4_error *err)
{
    G4_TRY(g4_sequence_truncate(s->seq, 0, err));
    return forward(s, s->seq, 0, N_TOKENS, 16, err);
}

/* ---- saving and restoring ---------------------------------------------------------------------------------------- */

typedef struct {
    float *k, *v;
    int first;
} saved_layer;

static saved_layer saved[LAYERS];

static void save_layers(const scene *s, const g4_sequence *seq)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        const g4_layer_config *lc = &s->f->layers[layer];
        if (lc->kv_source != layer)
            continue;
        saved[layer].first = g4_sequence_first_cached(seq, layer);
        const size_t n =
            (size_t)(g4_sequence_length(seq) - saved[layer].first) * (size_t)(lc->n_kv_heads * lc->head_dim);
        saved[layer].k = malloc(n * sizeof *saved[layer].k);
        saved[layer].v = malloc(n * sizeof *saved[layer].v);
        g4_sequence_export(seq, layer, saved[layer].k, saved[layer].v);
    }
}

static void free_layers(void)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        free(saved[layer].k), free(saved[layer].v);
        saved[layer] = (saved_layer){0};
    }
}

static g4_status restore(scene *s, g4_error *err)
{
    g4_sequence *seq = NULL;
    g4_status status = g4_sequence_new(s->model, G4_F32, 0, &seq, err);
    for (int layer = 0; layer < LAYERS && status == G4_OK; layer++)
        if (saved[layer].k)
            status = g4_sequence_import(seq, layer, saved[layer].first, N_BEFORE, saved[layer].k, saved[layer].v, err);
    if (status == G4_OK) {
        g4_sequence_set_length(seq, N_BEFORE);
        status = forward(s, seq, N_BEFORE, 1, 0, err);
    }
    g4_sequence_free(seq);
    return status;
}

static void test_saving(scene *s)
{
    s->seq = filled_sequence(s, N_BEFORE);
    save_layers(s, s->seq);
    each_allocation("restore", s, restore, NULL);
    free_layers();
    g4_sequence_free(s->seq);
    const int global = 2; /* in the fixture; its values are its keys */
    s->taps[0] = (g4_tap){.kind = G4_TAP_CALL, .site = G4_SITE_ROT_K, .layer = global, .call = change_first};
    s->n_taps = 1;
    s->seq = new_sequence_of(s->model);
    each_allocation("edited keys", s, edit_keys, NULL);
    g4_sequence_free(s->seq);
    s->seq = filled_sequence(s, N_BEFORE);
    s->n_taps = 0;
    save_layers(s, s->seq);
    each_allocation("restore of edited keys", s, restore, NULL);
    free_layers();
    g4_sequence_free(s->seq);
}

static void test_steps(scene *s)
{
    g4_error err = {0};
    each_allocation("model and step", s, live, NULL);
    each_allocation("two sequences", s, two_sequences, NULL);
    s->seq = new_sequence_of(s->model);
    each_allocation("prefill", s, prefill, NULL);
    CHECK(g4_sequence_truncate(s->seq, 0, &err) == G4_OK);
    each_allocation("token by token", s, go_on, NULL);
    CHECK(g4_sequence_truncate(s->seq, 0, &err) == G4_OK);
    test_sites(s);
    g4_sequence_free(s->seq);
    s->seq = filled_sequence(s, N_BEFORE);
    each_allocation("fork", s, fork_and_write, length_is_unchanged);
    each_allocation("decode", s, decode, NULL);
    g4_sequence_free(s->seq);
    test_saving(s);
}

/* ---- operations on types that the fixture lacks ------------------------------------------------------------------ */

static g4_exec exec_of(const scene *s, const g4_kernels *kernels, g4_error *err)
{
    return (g4_exec){.kernels = kernels, .fast = s->fast, .pool = g4_pool_new(2), .arena = g4_arena_new(), .err = err};
}

static void exec_free(g4_exec *exec)
{
    g4_pool_free(exec->pool);
    g4_arena_free(exec->arena);
}

static g4_status linear(scene *s, g4_error *err)
{
    enum { K = 256, N = 64, M = 70 };
    static float x[M * K], out[M * N];
    static char w[N * K * 4];
    const g4_matrix matrix = {w, s->dtype, N, K, K, G4_OP_OTHER};
    const g4_kernels *kernels;
    G4_TRY(g4_kernels_select(&kernels, err));
    g4_exec exec = exec_of(s, kernels, err);
    g4_status status = exec.pool && exec.arena ? G4_OK : g4_fail_nomem(err, 1);
    for (int m = 2; m <= M && status == G4_OK; m += m < 8 ? 5 : M - 7)
        status = g4_linear(&exec, x, m, &matrix, out);
    exec_free(&exec);
    return status;
}

static g4_status attend(scene *s, g4_error *err)
{
    enum { T = 40, H = 2, WIDTH = H * 32 };
    static float q[T * WIDTH], z[T * WIDTH], scores[H * T * T];
    static uint16_t k[T * 32], v[T * 32];
    int32_t positions[T];
    const g4_kernels *kernels;
    for (int i = 0; i < T; i++)
        positions[i] = i;
    const g4_attention run = {.q = q,
                              .z = z,
                              .positions = positions,
                              .n_rows = T,
                              .n_heads = H,
                              .n_kv_heads = 1,
                              .head_dim = 32,
                              .n_keys = T,
                              .bf16 = true,
                              .kv = {.k = k, .v = v, .dtype = G4_BF16, .stride = 32, .n_slots = T}};
    G4_TRY(g4_kernels_select(&kernels, err));
    g4_exec exec = exec_of(s, kernels, err);
    g4_status status = exec.pool && exec.arena ? g4_attend(&exec, &run, 1) : g4_fail_nomem(err, 1);
    if (status == G4_OK)
        status = g4_attention_scores(&exec, &run, scores);
    if (status == G4_OK)
        status = g4_attention_pattern(&exec, &run, scores);
    if (status == G4_OK)
        status = g4_attention_mix(&exec, &run, scores);
    exec_free(&exec);
    return status;
}

static void test_operations(scene *s)
{
    static const g4_dtype dtypes[] = {G4_F32, G4_BF16, G4_Q8_0, G4_Q4_K};
    for (int fast = 0; fast < 2; fast++) {
        s->fast = fast;
        for (int d = 0; d < 4; d++) {
            s->dtype = dtypes[d];
            each_allocation(g4_dtype_name(dtypes[d]), s, linear, NULL);
        }
        each_allocation("attention", s, attend, NULL);
    }
}

/* ---- encoders ---------------------------------------------------------------------------------------------------- */

static g4_status new_encoder(scene *s, g4_error *err)
{
    g4_encoder *encoder = NULL;
    G4_TRY(g4_encoder_new(s->model, s->encoder_config, s->f->tensors, s->f->n_tensors, NULL, NULL, &encoder, err));
    g4_encoder_free(encoder);
    return G4_OK;
}

static g4_status encode(scene *s, g4_error *err)
{
    return g4_encode(s->encoder, &s->medium, 1, s->taps, s->n_taps, NULL, NULL, NULL, err);
}

static void test_encoder(scene *s, const g4_encoder_config *config)
{
    enum { SIDE = 8, N_ROWS = SIDE * SIDE };
    static float rows[N_ROWS * 32], soft[N_ROWS * D];
    static int32_t positions[N_ROWS * 2];
    static fixture tensors;
    fixture *const usual = s->f;
    g4_error err = {0};
    for (int i = 0; i < N_ROWS; i++)
        positions[2 * i] = i % SIDE, positions[2 * i + 1] = i / SIDE;
    fixture_init_encoder(&tensors, config);
    s->f = &tensors;
    s->encoder_config = config;
    s->medium = (g4_medium){N_ROWS, rows, positions, soft};
    each_allocation("a new encoder", s, new_encoder, NULL);
    CHECK(g4_encoder_new(s->model, config, tensors.tensors, tensors.n_tensors, NULL, NULL, &s->encoder, &err) == G4_OK);
    each_allocation("encode", s, encode, NULL);
    for (int edits = 0; edits < 2; edits++) {
        tap_all(s, edits);
        CHECK(s->n_taps > 0);
        each_allocation("encode, sites", s, encode, NULL);
    }
    s->n_taps = 0;
    g4_encoder_free(s->encoder);
    s->encoder = NULL;
    s->f = usual;
    fixture_free(&tensors);
}

static void test_encoder_kinds(scene *s)
{
    for (int kind = G4_VISION_TOWER; kind <= G4_AUDIO_EMBEDDER; kind++) {
        g4_encoder_config config = encoder_config_of((g4_encoder_kind)kind);
        config.clipped = config.standardize = true;
        test_encoder(s, &config);
    }
}

/* Scores need room for all positions that neighbouring rows see together, even in sliding layers: rows with logits lie
 * far apart after pruning, and (ends) the rows of an image all see its last one. */
static void test_room_for_scores(scene *s, bool has_ends)
{
    enum { N = 300, STEP = 11, N_ROWS = (N + STEP - 1) / STEP };
    static int32_t ids[N], ends[N], rows[N_ROWS];
    static float logits[N_ROWS * VOCAB];
    const g4_step_options options = {.stop_at_layer = -1};
    g4_error err = {0};
    g4_model *model = new_model(s->f, 1); /* a fence follows the scratch of the only worker */
    g4_run run = {.seq = new_sequence_of(model), .n_rows = N, .tokens = ids, .logits_rows = rows, .n_logits = N_ROWS};
    run.logits = logits;
    run.ends = has_ends ? ends : NULL;
    for (int i = 0; i < N; i++)
        ends[i] = N;
    for (int i = 0; i < N_ROWS; i++)
        rows[i] = i * STEP;
    watching = true;
    CHECK(g4_step(model, &run, 1, NULL, 0, &options, &err) == G4_OK);
    watching = false;
    CHECK(n_fences > 0 && n_fences < MAX_FENCES && n_broken_fences() == 0);
    n_fences = 0;
    g4_sequence_free(run.seq);
    g4_model_free(model);
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

void test_memory(void)
{
    static scene s;
    static fixture f;
    if (getenv("GEMMA4_ISA")) { /* changes only arithmetic; emulated levels take minutes */
        printf("allocations that fail: skipped\n");
        return;
    }
    fixture_init(&f);
    for (int i = 0; i < N_TOKENS; i++) {
        s.tokens[i] = (i * 29 + 7) % VOCAB;
        s.rows[i] = i;
    }
    for (int fast = 0; fast < 2; fast++) {
        const long before = n_live;
        s.f = &f;
        s.fast = fast;
        s.model = new_model_with(&f, (g4_model_options){.n_threads = 2, .precision = fast ? G4_FAST : G4_HIGH});
        s.seq = filled_sequence(&s, N_TOKENS);
        memcpy(s.expected, s.logits, sizeof s.logits);
        g4_sequence_free(s.seq);
        test_steps(&s);
        test_encoder_kinds(&s);
        test_room_for_scores(&s, false);
        test_room_for_scores(&s, true);
        s.seq = filled_sequence(&s, N_TOKENS); /* the model still works */
        CHECK(same_logits(&s, 0, N_TOKENS));
        g4_sequence_free(s.seq);
        g4_model_free(s.model);
        free(s.dest);
        s.dest = NULL;
        CHECK(n_live == before);
    }
    const long before = n_live;
    test_operations(&s);
    CHECK(n_live == before);
    fixture_free(&f);
}
#endif
