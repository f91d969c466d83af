/* SPDX-License-Identifier: Apache-2.0 */
/* A step: checks its arguments, splits long runs into chunks, and runs each chunk through the model. */
#include <stdlib.h>
#include <string.h>

#include "model/config.h"
#include "model/text/forward.h"
#include "ops/profile.h"

/* Maximum rows per chunk: enough that matmuls are compute-bound, few enough that the MLP's activations stay small
 * (2 x 25 MB at 12,288 x 512). */
enum { DEFAULT_CHUNK = 512 };

typedef struct {
    g4_model *model;
    const g4_run *runs;
    int n_runs;
    const g4_tap *taps;
    int n_taps;
    const g4_step_options *options;
    g4_arena *arena;
    g4_error *err;
    int *start;       /* [n_runs] sequence lengths before the step */
    int *done;        /* [n_runs] rows computed so far */
    bool *whole;      /* [n_runs] not chunked: a G4_TAP_CALL gets all rows of the run at once */
    bool looks_ahead; /* some run has `ends` and some layer has ahead > 0 */
} step;

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static bool is_soft(const g4_run *run, int row)
{
    return !run->tokens || run->tokens[row] < 0;
}

/* The token whose table rows a position reads. A position given as an embedding reads the pad token's PLE row. */
static int token_at(const g4_config *c, const g4_run *run, int row)
{
    return !is_soft(run, row) ? run->tokens[row] : c->d_ple ? c->pad_token : 0;
}

static g4_status check_tokens(const g4_model *model, const g4_run *run, int r, g4_error *err)
{
    if (!run->tokens && !run->embeddings)
        return g4_fail(err, G4_EVALUE, "run %d has neither tokens nor embeddings", r);
    const g4_config *c = &model->config;
    const int n = c->d_ple && c->d_vocab_ple < c->d_vocab ? c->d_vocab_ple : c->d_vocab;
    for (int i = 0; i < run->n_rows; i++) {
        const int token = run->embeddings ? token_at(c, run, i) : run->tokens[i];
        if (token < 0 || token >= n)
            return g4_fail(err, G4_EVALUE, "%s %d at position %d of run %d: expected 0 to %d",
                           is_soft(run, i) && run->embeddings ? "an embedding, which reads the rows of pad_token_id"
                                                              : "token id",
                           token, i, r, n - 1);
    }
    return G4_OK;
}

static g4_status check_resid(const step *s, int r)
{
    if (!s->runs[r].resid == !s->runs[0].resid && (s->runs[r].resid || s->options->start_at_layer == 0))
        return G4_OK;
    return g4_fail(s->err, G4_EVALUE, "run %d has %s residual stream to start layer %d with", r,
                   s->runs[r].resid ? "alone a" : "no", s->options->start_at_layer);
}

static g4_status check_ends(const g4_run *run, int r, g4_error *err)
{
    for (int i = 0; run->ends && i < run->n_rows; i++)
        if (run->ends[i] <= i || run->ends[i] > run->n_rows || (i && run->ends[i] < run->ends[i - 1]))
            return g4_fail(err, G4_EVALUE, "run %d: row %d sees rows before %d: expected ascending ends, here %d to %d",
                           r, i, run->ends[i], i + 1, run->n_rows);
    return G4_OK;
}

static g4_status check_run(const step *s, int r)
{
    const g4_run *run = &s->runs[r];
    if (run->n_rows < 1)
        return g4_fail(s->err, G4_EVALUE, "run %d is empty: give at least one token (a prompt begins with BOS)", r);
    if (run->seq->model != s->model)
        return g4_fail(s->err, G4_EVALUE, "the sequence of run %d belongs to another model", r);
    G4_TRY(check_tokens(s->model, run, r, s->err));
    G4_TRY(check_ends(run, r, s->err));
    G4_TRY(check_resid(s, r));
    if (run->n_logits && s->options->stop_at_layer >= 0)
        return g4_fail(s->err, G4_EVALUE, "run %d wants logits, but the step stops at layer %d", r,
                       s->options->stop_at_layer);
    for (int i = 0; i < run->n_logits; i++)
        if (run->logits_rows[i] < 0 || run->logits_rows[i] >= run->n_rows ||
            (i && run->logits_rows[i] <= run->logits_rows[i - 1]))
            return g4_fail(s->err, G4_EVALUE, "run %d: logits wanted at row %d: expected ascending rows, 0 to %d", r,
                           run->logits_rows[i], run->n_rows - 1);
    return G4_OK;
}

static g4_status check_tap(const step *s, const g4_tap *tap)
{
    if (tap->site < 0 || tap->site >= G4_N_SITES || !g4_site_exists(&s->model->config, tap->site, tap->layer))
        return g4_fail(s->err, G4_EVALUE, "no site %d in layer %d", (int)tap->site, tap->layer);
    if (tap->run < 0 || tap->run >= s->n_runs)
        return g4_fail(s->err, G4_EVALUE, "a tap names run %d of %d", tap->run, s->n_runs);
    const g4_run *run = &s->runs[tap->run];
    const int room = INT32_MAX - run->seq->length,
              n_keys = run->seq->length + (run->n_rows < room ? run->n_rows : room);
    int64_t shape[G4_MAX_DIMS];
    const int n_dims = g4_site_shape(&s->model->config, tap->site, tap->layer, run->n_rows, n_keys, shape);
    return g4_tap_check(tap, (int)(tap - s->taps), shape, n_dims, s->err);
}

static int end_layer(const step *s)
{
    return s->options->stop_at_layer < 0 ? s->model->config.n_layers : s->options->stop_at_layer;
}

/* The layers that run find the keys and values of their own new rows. */
static g4_status check_start(const step *s)
{
    const g4_config *c = &s->model->config;
    const int start = s->options->start_at_layer, end = end_layer(s);
    if (start < 0 || start >= c->n_layers || start > end)
        return g4_fail(s->err, G4_EVALUE, "start_at_layer %d: expected 0 to %d", start,
                       end < c->n_layers ? end : c->n_layers - 1);
    int needing = start;
    for (int layer = start; layer < end; layer++)
        if (c->layers[layer].kv_source < c->layers[needing].kv_source)
            needing = layer;
    if (start < end && c->layers[needing].kv_source < start)
        return g4_fail(s->err, G4_EVALUE,
                       "layer %d attends to the keys and values of layer %d, which do not exist when layer %d is "
                       "the first to run; start at layer %d",
                       needing, c->layers[needing].kv_source, start, c->layers[needing].kv_source);
    return G4_OK;
}

static g4_status check(const step *s)
{
    if (s->options->stop_at_layer > s->model->config.n_layers)
        return g4_fail(s->err, G4_EVALUE, "stop_at_layer %d: expected 0 to %d", s->options->stop_at_layer,
                       s->model->config.n_layers);
    G4_TRY(check_start(s));
    for (int r = 0; r < s->n_runs; r++)
        G4_TRY(check_run(s, r));
    for (int t = 0; t < s->n_taps; t++)
        G4_TRY(check_tap(s, &s->taps[t]));
    return G4_OK;
}

/* ---- chunks ------------------------------------------------------------------------------------------------------ */

/* Whether an earlier row of the run sees `row`: a chunk may not begin there. */
static bool is_inside_stretch(const step *s, int r, int row)
{
    const int32_t *ends = s->runs[r].ends;
    return s->looks_ahead && ends && row > 0 && ends[row - 1] > row;
}

/* How many of the next n rows to take so that no stretch is split. If the first stretch does not fit, an empty chunk
 * takes all of it, another chunk none. */
static int whole_stretches(const step *s, int r, int n, bool is_first)
{
    const int done = s->done[r];
    int fewer = n, more = n;
    while (fewer > 0 && is_inside_stretch(s, r, done + fewer))
        fewer--;
    while (is_inside_stretch(s, r, done + more))
        more++;
    return fewer > 0 || !is_first ? fewer : more;
}

/* Splits the remaining rows evenly. So no chunk of a long prompt is so short that `fast` chooses another method for it
 * than for an unchunked prompt. */
static int chunk_rows(const step *s)
{
    const int most = s->options->max_chunk > 0 ? s->options->max_chunk : DEFAULT_CHUNK;
    int left = 0;
    for (int r = 0; r < s->n_runs; r++)
        left += s->runs[r].n_rows - s->done[r];
    const int n_chunks = left / most + (left % most > 0); /* no sum: `most` may be INT_MAX */
    return n_chunks ? (left + n_chunks - 1) / n_chunks : most;
}

/* take [n_runs]: rows of each run in the next chunk. Returns their sum. */
static int plan_chunk(const step *s, int *take)
{
    const int most = chunk_rows(s);
    int n_rows = 0;
    bool waits = false;
    for (int r = 0; r < s->n_runs; r++) {
        int left = s->runs[r].n_rows - s->done[r], room = most - n_rows;
        take[r] = 0;
        if (left == 0 || room <= 0 || waits)
            continue;
        if (s->whole[r])
            take[r] = n_rows == 0 || left <= room ? left : 0;
        else
            take[r] = whole_stretches(s, r, left < room ? left : room, n_rows == 0);
        n_rows += take[r];
        waits = s->options->in_order && take[r] < left;
    }
    return n_rows;
}

/* The run's row of logits for `row`, or -1. */
static int find_logits_slot(const g4_run *run, int row)
{
    int low = 0, high = run->n_logits;
    while (low < high) {
        int middle = (low + high) / 2;
        if (run->logits_rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return low < run->n_logits && run->logits_rows[low] == row ? low : -1;
}

static g4_status alloc_rows(g4_forward *f, const step *s, int32_t **tokens, const float ***embeddings)
{
    size_t n = (size_t)f->n_rows;
    G4_ALLOC(&f->exec, f->segments, (size_t)s->n_runs);
    G4_ALLOC(&f->exec, f->segment_of_run, (size_t)s->n_runs);
    G4_ALLOC(&f->exec, f->positions, n);
    if (s->looks_ahead)
        G4_ALLOC(&f->exec, f->ends, n);
    G4_ALLOC(&f->exec, f->row_in_run, n);
    G4_ALLOC(&f->exec, f->logits_slot, n);
    G4_ALLOC(&f->exec, f->wanted, n);
    G4_ALLOC(&f->exec, *tokens, n);
    G4_ALLOC(&f->exec, *embeddings, n);
    return G4_OK;
}

static void fill_segment(g4_forward *f, const step *s, int r, int first_row, int n, int32_t *tokens,
                         const float **embeddings)
{
    const g4_run *run = &s->runs[r];
    const int position = s->start[r] + s->done[r];
    f->segment_of_run[r] = f->n_segments;
    f->segments[f->n_segments++] = (g4_segment){r, run->seq, first_row, n, position, position + n};
    for (int i = 0; i < n; i++) {
        const int row = first_row + i, in_run = s->done[r] + i;
        f->positions[row] = position + i;
        f->row_in_run[row] = in_run;
        f->logits_slot[row] = find_logits_slot(run, in_run);
        tokens[row] = token_at(f->config, run, in_run);
        embeddings[row] = is_soft(run, in_run) ? run->embeddings + (size_t)in_run * (size_t)f->config->d_model : NULL;
        if (f->ends)
            f->ends[row] = s->start[r] + (run->ends ? run->ends[in_run] : in_run + 1);
    }
}

static g4_status run_chunk(step *s, const int *take, int n_rows)
{
    const g4_config *config = &s->model->config;
    g4_forward f = {.exec = {.kernels = s->model->kernels,
                             .pool = s->model->pool,
                             .arena = s->arena,
                             .fast = s->model->precision == G4_FAST,
                             .high = s->model->precision == G4_HIGH,
                             .poll = s->options->poll,
                             .poll_context = s->options->poll_context,
                             .profile = s->options->profile,
                             .err = s->err},
                    .model = s->model,
                    .config = config,
                    .runs = s->runs,
                    .run_start = s->start,
                    .n_rows = n_rows};
    int32_t *tokens;
    const float **embeddings;
    G4_TRY(alloc_rows(&f, s, &tokens, &embeddings));
    int row = 0;
    for (int r = 0; r < s->n_runs; r++) {
        f.segment_of_run[r] = -1;
        if (!take[r])
            continue;
        G4_TRY(g4_kv_reserve(s->runs[r].seq, take[r], s->err));
        fill_segment(&f, s, r, row, take[r], tokens, embeddings);
        row += take[r];
    }
    G4_TRY(g4_taps_index(&f.exec, s->taps, s->n_taps, config->n_layers, &f.taps));
    g4_taps_mark_wanted(&f);
    G4_TRY(g4_text_embed(&f, tokens, embeddings));
    g4_text_enter(&f);
    G4_TRY(g4_text_layers(&f, s->options->start_at_layer, end_layer(s)));
    return s->options->stop_at_layer < 0 ? g4_text_logits(&f) : G4_OK;
}

static g4_status run_chunks(step *s)
{
    int *take;
    g4_exec exec = {.arena = s->arena, .err = s->err};
    G4_ALLOC(&exec, take, (size_t)s->n_runs);
    g4_arena_mark mark = g4_arena_save(s->arena);
    for (int n_rows; (n_rows = plan_chunk(s, take)) > 0;) {
        G4_TRY(run_chunk(s, take, n_rows));
        G4_TRY(g4_guards_check(&s->model->guards, s->err)); /* before the sequences' lengths include the chunk */
        for (int r = 0; r < s->n_runs; r++) {
            s->done[r] += take[r];
            s->runs[r].seq->length = s->start[r] + s->done[r];
        }
        g4_arena_restore(s->arena, mark);
    }
    return G4_OK;
}

/* ---- the step ---------------------------------------------------------------------------------------------------- */

static bool looks_ahead(const step *s)
{
    bool has_ends = false, goes_by_them = false;
    for (int r = 0; r < s->n_runs; r++)
        has_ends |= s->runs[r].ends != NULL;
    for (int layer = 0; layer < s->model->config.n_layers; layer++)
        goes_by_them |= s->model->config.layers[layer].ahead > 0;
    return has_ends && goes_by_them;
}

/* Layers that do not run cache nothing, so the sequences cannot grow. */
static bool is_partial(const step *s)
{
    return s->options->stop_at_layer >= 0 || (s->n_runs && s->runs[0].resid);
}

static g4_status prepare(step *s)
{
    g4_exec exec = {.arena = s->arena, .err = s->err};
    G4_ALLOC(&exec, s->start, (size_t)s->n_runs + 1);
    G4_ALLOC(&exec, s->done, (size_t)s->n_runs + 1);
    G4_ALLOC(&exec, s->whole, (size_t)s->n_runs + 1);
    for (int r = 0; r < s->n_runs; r++) {
        const g4_run *run = &s->runs[r];
        s->start[r] = run->seq->length;
        s->done[r] = 0;
        s->whole[r] = false;
        /* Rows beyond the capacity fail here, before anything is computed. After a partial step the lengths are
         * restored: no ring may overwrite cached positions. */
        if (is_partial(s) || run->n_rows > run->seq->capacity - run->seq->length)
            G4_TRY(g4_kv_reserve(run->seq, run->n_rows, s->err));
    }
    for (int t = 0; t < s->n_taps; t++)
        s->whole[s->taps[t].run] |= s->taps[t].kind == G4_TAP_CALL;
    s->looks_ahead = looks_ahead(s);
    return G4_OK;
}

static g4_status run_profiled(step *s)
{
    g4_exec exec = {.profile = s->options->profile};
    const double before = g4_profile_seconds(&exec), start = g4_profile_start(&exec);
    g4_status status = run_chunks(s);
    g4_profile_end_step(&exec, start, before);
    return status;
}

static g4_status run_step(step *s)
{
    G4_TRY(check(s));
    G4_TRY(prepare(s));
    g4_status status = run_profiled(s);
    if (is_partial(s))
        for (int r = 0; r < s->n_runs; r++)
            s->runs[r].seq->length = s->start[r];
    return status;
}

static g4_status lock_and_run(step *s)
{
    g4_status status = G4_OK;
    int n_locked = 0;
    for (; n_locked < s->n_runs; n_locked++)
        if ((status = g4_sequence_acquire(s->runs[n_locked].seq, s->err)) != G4_OK)
            break;
    if (status == G4_OK)
        status = run_step(s);
    while (n_locked-- > 0)
        g4_sequence_release(s->runs[n_locked].seq);
    return status;
}

g4_status g4_step(g4_model *model, const g4_run *runs, int n_runs, const g4_tap *taps, int n_taps,
                  const g4_step_options *options, g4_error *err)
{
    step s = {
        .model = model, .runs = runs, .n_runs = n_runs, .taps = taps, .n_taps = n_taps, .options = options, .err = err};
    s.arena = g4_model_take_scratch(model);
    if (!s.arena)
        return g4_fail_nomem(err, sizeof(void *));
    g4_status status = options->locked ? run_step(&s) : lock_and_run(&s);
    g4_model_give_scratch(model, s.arena);
    return status;
}
