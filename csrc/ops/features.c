/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/features.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ops/linear_f32.h"

enum {
    COLUMNS = G4_PANEL_COLUMNS,
    FEW_ROWS = 8, /* up to this many rows of x, memory is the limit: weights [inputs, features] are read in place, */
    FEW_COLUMNS = 1024, /* whole pages of them at a time */
    LEAST_CAPACITY = 1024,
    ROWS_AHEAD = 8,
    CACHE_LINE = 64
};

typedef struct {
    int32_t row, id;
    float value;
} entry;

/* The entries of one worker. */
typedef struct {
    entry *entries;     /* in the order of its tasks; or with k, heaps [m, k], the entry to replace next first */
    size_t n, capacity; /* not used with k */
    int *counts;        /* with k: entries of each heap */
    bool full;          /* out of memory */
    int bad;            /* the first feature of the first task with a number that is not finite; INT_MAX: none */
} finds;

/* Where the entries of a task are. */
typedef struct {
    int worker;
    size_t first, n;
} piece;

typedef struct {
    const g4_exec *exec;
    const g4_dictionary *dictionary;
    g4_linear_job job;
    int first, n; /* features */
    finds *found; /* [workers] */
    piece *pieces;
    int columns;    /* features of a task */
    float *scratch; /* [workers, scratch_floats]: the values [m, columns], then G4_PANEL_SCRATCH */
    size_t scratch_floats;
} encode_task;

/* ---- weights ----------------------------------------------------------------------------------------------------- */

/* Panels of a matrix [inputs, features]. Lines of the following rows are fetched early: they lie far apart. */
static void pack_columns(const g4_kernels *kernels, const g4_matrix *w, int first, int n, int at, int k, float *panels,
                         float *row)
{
    const size_t size = g4_dtype_bytes(w->dtype, 1), stride = w->row_stride * size;
    const char *source = (const char *)w->data + (size_t)at * stride + (size_t)first * size;
    _Alignas(CACHE_LINE) char raw[COLUMNS * sizeof(float)];
    memset(row, 0, COLUMNS * sizeof *row);
    for (int l = 0; l < k; l++, source += stride) {
        if (l + ROWS_AHEAD < k)
            for (size_t line = 0; line < (size_t)n * size; line += CACHE_LINE)
                __builtin_prefetch(source + ROWS_AHEAD * stride + line);
        if (w->dtype == G4_F32) {
            memcpy(row, source, (size_t)n * size);
        } else {
            memcpy(raw, source, (size_t)n * size);
            g4_widen_for(kernels, w->dtype)(row, raw, n);
        }
        for (int j = 0; j < n; j += G4_PANEL)
            memcpy(panels + (size_t)j * G4_PANEL_INPUTS + (size_t)l * G4_PANEL, row + j, G4_PANEL * sizeof *row);
    }
}

static bool is_aligned(const g4_matrix *w)
{
    return (uintptr_t)w->data % g4_dtype_bytes(w->dtype, 1) == 0;
}

/* Panels of a matrix [features, inputs] at any address. */
static void pack_features(const g4_kernels *kernels, const g4_matrix *w, int first, int n, int at, int k, float *panels,
                          float *widened)
{
    const size_t size = g4_dtype_bytes(w->dtype, 1);
    if (is_aligned(w)) {
        g4_pack_rows(kernels, w, first, n, at, k, panels, widened);
        return;
    }
    _Alignas(CACHE_LINE) char raw[G4_PANEL_INPUTS * sizeof(float)];
    for (int j = 0; j < n; j += G4_PANEL) {
        const int rows = n - j < G4_PANEL ? n - j : G4_PANEL;
        for (int r = 0; r < rows; r++) {
            memcpy(raw, (const char *)g4_matrix_row(w, (size_t)(first + j + r)) + (size_t)at * size, (size_t)k * size);
            g4_widen_for(kernels, w->dtype)(widened + (size_t)r * G4_PANEL_INPUTS, raw, k);
        }
        kernels->pack_panel(widened, G4_PANEL_INPUTS, rows, k, panels + (size_t)j * G4_PANEL_INPUTS);
    }
}

static bool reads_in_place(const g4_dictionary *d, int m)
{
    return m <= FEW_ROWS && d->inputs_first && is_aligned(&d->w);
}

/* values [m, columns] of the features [at, at + n). Both ways add the inputs in order, one fma each: the same bits. */
static void multiply(const encode_task *t, int at, int n, float *values)
{
    const g4_dictionary *d = t->dictionary;
    const g4_kernels *kernels = t->exec->kernels;
    const size_t columns = (size_t)t->columns;
    if (!reads_in_place(d, t->job.m)) {
        g4_panel_columns(kernels, &t->job, d->inputs_first ? pack_columns : pack_features, 0, t->job.m, at, n, values,
                         columns, values + (size_t)t->job.m * columns);
        return;
    }
    memset(values, 0, (size_t)t->job.m * columns * sizeof *values);
    g4_weighted_sum_for(kernels, d->w.dtype)(t->job.x, t->job.x_stride, t->job.m,
                                             (const char *)d->w.data + g4_dtype_bytes(d->w.dtype, (size_t)at),
                                             d->w.row_stride, (int)d->w.n_cols, n, values, columns);
}

/* ---- entries ----------------------------------------------------------------------------------------------------- */

static void append(finds *f, entry e)
{
    if (f->n == f->capacity) {
        const size_t capacity = f->capacity ? 2 * f->capacity : LEAST_CAPACITY;
        entry *entries = realloc(f->entries, capacity * sizeof *entries);
        f->full = f->full || !entries;
        if (!entries)
            return;
        f->entries = entries;
        f->capacity = capacity;
    }
    f->entries[f->n++] = e;
}

static bool is_weaker(const entry *a, const entry *b)
{
    return a->value < b->value || (a->value == b->value && a->id > b->id);
}

/* Keeps the k strongest entries of a row: a heap whose first entry is the weakest. */
static void keep(finds *f, int k, entry e)
{
    entry *heap = f->entries + (size_t)e.row * (size_t)k;
    size_t at = (size_t)f->counts[e.row];
    if (at < (size_t)k) {
        f->counts[e.row]++;
        for (; at > 0 && is_weaker(&e, &heap[(at - 1) / 2]); at = (at - 1) / 2)
            heap[at] = heap[(at - 1) / 2];
    } else {
        if (is_weaker(&e, &heap[0]))
            return;
        at = 0;
        for (size_t child; (child = 2 * at + 1) < (size_t)k; at = child) {
            if (child + 1 < (size_t)k && is_weaker(&heap[child + 1], &heap[child]))
                child++;
            if (!is_weaker(&heap[child], &e))
                break;
            heap[at] = heap[child];
        }
    }
    heap[at] = e;
}

/* Values up to this one cannot be among the k highest of a row. An equal one of a later task may: its id may be lower,
 * because the pool may start tasks in any order. */
static float least_of(const finds *f, int k, int row)
{
    if (!k || f->counts[row] < k)
        return 0;
    return nextafterf(f->entries[(size_t)row * (size_t)k].value, 0);
}

static void run_task(void *context, int task, int worker)
{
    const encode_task *t = context;
    const g4_dictionary *d = t->dictionary;
    finds *f = &t->found[worker];
    const int at = t->first + task * t->columns, left = t->first + t->n - at, n = left < t->columns ? left : t->columns;
    float *values = t->scratch + (size_t)worker * t->scratch_floats;
    int32_t ids[FEW_COLUMNS];
    t->pieces[task] = (piece){worker, f->n, 0};
    multiply(t, at, n, values);
    for (int row = 0; row < t->job.m && !f->full; row++, values += t->columns) {
        const int n_ids = t->exec->kernels->fire(values, &d->firing, at, n, least_of(f, d->k, row), ids);
        if (n_ids < 0 && at < f->bad)
            f->bad = at;
        for (int i = 0; i < n_ids; i++) {
            const entry e = {row, at + ids[i], values[ids[i]]};
            if (d->k)
                keep(f, d->k, e);
            else
                append(f, e);
        }
    }
    t->pieces[task].n = f->n - t->pieces[task].first;
}

/* ---- the result -------------------------------------------------------------------------------------------------- */

void g4_features_free(g4_features *features)
{
    free(features->offsets);
    free(features->ids);
    free(features->values);
    *features = (g4_features){0};
}

static g4_status allocate(g4_exec *exec, int m, size_t n, g4_features *out)
{
    out->offsets = calloc((size_t)m + 2, sizeof *out->offsets);
    out->ids = malloc((n + 1) * sizeof *out->ids);
    out->values = malloc((n + 1) * sizeof *out->values);
    if (out->offsets && out->ids && out->values)
        return G4_OK;
    g4_features_free(out);
    return g4_fail_nomem(exec->err, n * sizeof(entry));
}

/* Tasks in the order of their features, so ids ascend within each row. */
static g4_status collect(g4_exec *exec, const encode_task *t, int n_tasks, g4_features *out)
{
    const int m = t->job.m;
    size_t n = 0;
    for (int task = 0; task < n_tasks; task++)
        n += t->pieces[task].n;
    G4_TRY(allocate(exec, m, n, out));
    int64_t *next = out->offsets + 1; /* where the next entry of a row goes; at the end, its row's end */
    for (int pass = 0; pass < 2; pass++) {
        for (int task = 0; task < n_tasks; task++) {
            const piece *p = &t->pieces[task];
            const entry *entries = t->found[p->worker].entries;
            for (size_t i = p->first; i < p->first + p->n; i++) {
                const entry e = entries[i];
                if (pass == 0) {
                    next[e.row + 1]++;
                } else {
                    out->ids[next[e.row]] = e.id;
                    out->values[next[e.row]++] = e.value;
                }
            }
        }
        for (int row = 0; pass == 0 && row < m; row++)
            next[row + 1] += next[row];
    }
    return G4_OK;
}

static int by_strength(const void *a, const void *b)
{
    return is_weaker(a, b) ? 1 : is_weaker(b, a) ? -1 : 0;
}

static int by_id(const void *a, const void *b)
{
    const int32_t x = ((const entry *)a)->id, y = ((const entry *)b)->id;
    return (x > y) - (x < y);
}

/* The strongest of what the workers kept of each row. */
static g4_status merge(g4_exec *exec, const encode_task *t, g4_features *out)
{
    const int m = t->job.m, n_workers = g4_pool_size(exec->pool);
    const size_t k = (size_t)t->dictionary->k;
    size_t most = 0;
    entry *all;
    G4_ALLOC(exec, all, (size_t)n_workers * k);
    for (int w = 0; w < n_workers; w++)
        for (int row = 0; row < m; row++)
            most += (size_t)t->found[w].counts[row];
    G4_TRY(allocate(exec, m, most, out));
    int64_t end = 0;
    for (int row = 0; row < m; row++) {
        size_t n = 0;
        for (int w = 0; w < n_workers; w++) {
            const size_t count = (size_t)t->found[w].counts[row];
            memcpy(all + n, t->found[w].entries + (size_t)row * k, count * sizeof *all);
            n += count;
        }
        qsort(all, n, sizeof *all, by_strength);
        n = n < k ? n : k;
        qsort(all, n, sizeof *all, by_id);
        for (size_t i = 0; i < n; i++, end++) {
            out->ids[end] = all[i].id;
            out->values[end] = all[i].value;
        }
        out->offsets[row + 1] = end;
    }
    return G4_OK;
}

static g4_status check(g4_exec *exec, const encode_task *t)
{
    int bad = INT_MAX;
    for (int w = 0; w < g4_pool_size(exec->pool); w++) {
        if (t->found[w].full)
            return g4_fail_nomem(exec->err, 2 * t->found[w].capacity * sizeof(entry));
        bad = t->found[w].bad < bad ? t->found[w].bad : bad;
    }
    if (bad == INT_MAX)
        return G4_OK;
    const int left = t->first + t->n - bad;
    return g4_fail(exec->err, G4_EFORMAT, "the encoder's weights give NaN or infinities for features %d to %d", bad,
                   bad + (left < t->columns ? left : t->columns) - 1);
}

static g4_status prepare(g4_exec *exec, encode_task *t, int n_tasks)
{
    const size_t n_workers = (size_t)g4_pool_size(exec->pool), m = (size_t)t->job.m;
    t->scratch_floats = m * (size_t)t->columns + G4_PANEL_SCRATCH;
    G4_ALLOC(exec, t->found, n_workers);
    memset(t->found, 0, n_workers * sizeof *t->found);
    G4_ALLOC(exec, t->pieces, (size_t)n_tasks);
    G4_ALLOC(exec, t->scratch, n_workers * t->scratch_floats);
    for (size_t w = 0; w < n_workers; w++) {
        t->found[w].bad = INT_MAX;
        if (!t->dictionary->k)
            continue;
        G4_ALLOC(exec, t->found[w].entries, m * (size_t)t->dictionary->k);
        G4_ALLOC(exec, t->found[w].counts, m);
        memset(t->found[w].counts, 0, m * sizeof(int));
    }
    return G4_OK;
}

g4_status g4_encode_features(g4_exec *exec, const g4_dictionary *dictionary, const float *x, int m, int first, int n,
                             g4_features *out)
{
    const size_t k = dictionary->w.n_cols;
    const int columns = reads_in_place(dictionary, m) ? FEW_COLUMNS : COLUMNS;
    const int n_tasks = m ? (n + columns - 1) / columns : 0;
    encode_task t = {.exec = exec,
                     .dictionary = dictionary,
                     .job = {.x = x, .x_stride = k, .m = m, .w = dictionary->w},
                     .first = first,
                     .n = n,
                     .columns = columns};
    *out = (g4_features){0};
    G4_TRY(prepare(exec, &t, n_tasks));
    g4_status status = g4_exec_run(exec, n_tasks, (double)m * (double)n * (double)k, run_task, &t);
    if (status == G4_OK)
        status = check(exec, &t);
    if (status == G4_OK)
        status = dictionary->k ? merge(exec, &t, out) : collect(exec, &t, n_tasks, out);
    for (int w = 0; !dictionary->k && w < g4_pool_size(exec->pool); w++)
        free(t.found[w].entries);
    return status;
}
