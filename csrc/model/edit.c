/* SPDX-License-Identifier: Apache-2.0 */
#include "model/edit.h"

#include <math.h>

/* The box of elements that an edit changes, as lines along the last axis. It includes rows that are not selected. */
typedef struct {
    const g4_tap *tap;
    const g4_part *part;
    int row_axis, last;
    int64_t first[G4_MAX_DIMS], count[G4_MAX_DIMS];
} box;

static bool has_values(g4_tap_kind kind)
{
    return kind == G4_TAP_ADD || kind == G4_TAP_SET || kind == G4_TAP_PROJECT_OUT;
}

static bool is_whole(g4_span span)
{
    return !span.first && !span.end;
}

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static g4_status check_spans(const g4_tap *tap, const char *name, const int64_t *shape, int n_dims, g4_error *err)
{
    for (int axis = 0; axis < n_dims; axis++) {
        const g4_span span = tap->edit.span[axis];
        if (is_whole(span))
            continue;
        if (axis == g4_site_row_axis(tap->site))
            return g4_fail(err, G4_EVALUE, "%s: an edit has a span on axis %d, where `rows` choose", name, axis);
        if (span.first < 0 || span.end <= span.first || span.end > shape[axis])
            return g4_fail(err, G4_EVALUE,
                           "%s: an edit of %d to %d on axis %d, which has %lld: expected 0 <= first < end", name,
                           span.first, span.end, axis, (long long)shape[axis]);
    }
    return G4_OK;
}

/* The largest index on an axis for which the edit reads values; -1: no row is selected. */
static int64_t last_index(const g4_tap *tap, const int64_t *shape, int axis)
{
    const g4_span span = tap->edit.span[axis];
    if (axis != g4_site_row_axis(tap->site) || !tap->rows)
        return (is_whole(span) ? shape[axis] : span.end - span.first) - 1;
    int last = -1;
    for (int64_t i = 0; i < shape[axis]; i++)
        last = tap->rows[i] > last ? tap->rows[i] : last;
    return last;
}

/* *n: how many elements of `values` the edit needs, up to its last index; false: overflow. */
static bool extent(const g4_tap *tap, const int64_t *shape, int n_dims, int64_t *n)
{
    *n = 1;
    for (int axis = 0; axis < n_dims; axis++) {
        const int64_t last = last_index(tap, shape, axis);
        int64_t step;
        if (last < 0)
            return *n = 0, true;
        if (__builtin_mul_overflow(last, tap->edit.stride[axis], &step) || __builtin_add_overflow(*n, step, n))
            return false;
    }
    return true;
}

static g4_status check_values(const g4_tap *tap, const char *name, const int64_t *shape, int n_dims, g4_error *err)
{
    const g4_edit *e = &tap->edit;
    int64_t n;
    if (!e->values)
        return g4_fail(err, G4_EVALUE, "%s: an edit has no values", name);
    for (int axis = 0; axis < n_dims; axis++)
        if (e->stride[axis] < 0)
            return g4_fail(err, G4_EVALUE, "%s: an edit's values have the stride %lld", name,
                           (long long)e->stride[axis]);
    if (!extent(tap, shape, n_dims, &n) || (uint64_t)n > e->n_values)
        return g4_fail(err, G4_EVALUE, "%s: an edit's strides lead beyond its %zu values", name, e->n_values);
    for (int64_t i = 0; i < n; i++)
        if (isnan(e->values[i]) || (tap->kind == G4_TAP_PROJECT_OUT && isinf(e->values[i])))
            return g4_fail(err, G4_EVALUE, "%s: value %lld of an edit is %g", name, (long long)i, (double)e->values[i]);
    return G4_OK;
}

g4_status g4_edit_check(const g4_tap *tap, const char *name, const int64_t *shape, int n_dims, g4_error *err)
{
    const g4_edit *e = &tap->edit;
    if (g4_site_row_of(tap->site)->is_int32)
        return g4_fail(err, G4_EVALUE,
                       "%s holds int32 ids: they can be copied or given to a function, not computed with", name);
    G4_TRY(check_spans(tap, name, shape, n_dims, err));
    if (tap->kind != G4_TAP_SET && tap->kind != G4_TAP_CLAMP && !isfinite(e->factor))
        return g4_fail(err, G4_EVALUE, "%s: an edit's factor is %g", name, (double)e->factor);
    if (tap->kind == G4_TAP_CLAMP && !(e->low <= e->high))
        return g4_fail(err, G4_EVALUE, "%s: an edit clamps to %g to %g", name, (double)e->low, (double)e->high);
    return has_values(tap->kind) ? check_values(tap, name, shape, n_dims, err) : G4_OK;
}

/* ---- arithmetic -------------------------------------------------------------------------------------------------- */

static void project_out(float *x, const float *v, int64_t stride, int64_t n, float factor)
{
    double dot = 0, norm = 0;
    for (int64_t i = 0; i < n; i++) {
        dot += (double)x[i] * (double)v[i * stride];
        norm += (double)v[i * stride] * (double)v[i * stride];
    }
    if (norm == 0)
        return;
    const float share = (float)((double)factor * dot / norm);
    for (int64_t i = 0; i < n; i++)
        x[i] -= share * v[i * stride];
}

/* Edits n elements of a line; v: their values, `stride` apart. */
static void edit_line(const g4_tap *tap, float *x, const float *v, int64_t stride, int64_t n)
{
    const float factor = tap->edit.factor, low = tap->edit.low, high = tap->edit.high;
    switch (tap->kind) {
    case G4_TAP_ADD:
        for (int64_t i = 0; i < n; i++)
            x[i] += factor * v[i * stride];
        break;
    case G4_TAP_SCALE:
        for (int64_t i = 0; i < n; i++)
            x[i] *= factor;
        break;
    case G4_TAP_SET:
        for (int64_t i = 0; i < n; i++)
            x[i] = v[i * stride];
        break;
    case G4_TAP_PROJECT_OUT: project_out(x, v, stride, n, factor); break;
    default: /* clamp; NaN stays NaN */
        for (int64_t i = 0; i < n; i++)
            x[i] = x[i] < low ? low : x[i] > high ? high : x[i];
    }
}

/* Line `number`: its offset in the part and in `values`, and its row of the part; false: the row is not selected. */
static bool find_line(const box *b, int number, int64_t *at, int64_t *value, int *row)
{
    int64_t step = b->part->shape[b->last], left = number;
    *at = *value = 0, *row = 0;
    for (int axis = b->last - 1; axis >= 0; axis--) {
        int64_t index = left % b->count[axis];
        left /= b->count[axis];
        *at += (b->first[axis] + index) * step;
        step *= b->part->shape[axis];
        if (axis == b->row_axis) {
            *row = (int)index;
            index = g4_tap_row(b->tap, b->part->row_in_run ? b->part->row_in_run[index] : *row);
            if (index < 0)
                return false;
        }
        *value += index * b->tap->edit.stride[axis];
    }
    return true;
}

static void edit_lines(const g4_exec *exec, void *context, int first_line, int end_line)
{
    const box *b = context;
    const g4_edit *e = &b->tap->edit;
    (void)exec;
    for (int line = first_line; line < end_line; line++) {
        int64_t at, value;
        int row, first = (int)b->first[b->last], end = first + (int)b->count[b->last];
        if (!find_line(b, line, &at, &value, &row))
            continue;
        if (b->part->visible) {
            int first_seen, end_seen;
            b->part->visible->range(b->part->visible->context, row, &first_seen, &end_seen);
            first = first_seen > first ? first_seen : first;
            end = end_seen < end ? end_seen : end;
        }
        const int64_t stride = e->stride[b->last];
        if (first < end)
            edit_line(b->tap, (float *)b->part->data + at + first,
                      has_values(b->tap->kind) ? e->values + value + (first - b->first[b->last]) * stride : NULL,
                      stride, end - first);
    }
}

g4_status g4_edit_part(g4_exec *exec, const g4_tap *tap, const g4_part *part)
{
    box b = {.tap = tap, .part = part, .row_axis = g4_site_row_axis(tap->site), .last = part->n_dims - 1};
    int64_t n_lines = 1;
    for (int axis = 0; axis < part->n_dims; axis++) {
        const g4_span span = tap->edit.span[axis];
        /* a span of keys may end beyond this chunk's keys */
        const int64_t end = is_whole(span) || span.end > part->shape[axis] ? part->shape[axis] : span.end;
        b.first[axis] = span.first;
        b.count[axis] = end > span.first ? end - span.first : 0;
        n_lines *= axis < b.last ? b.count[axis] : 1;
    }
    if (!n_lines || b.count[b.last] <= 0)
        return G4_OK;
    return g4_exec_rows(exec, (int)n_lines, (size_t)b.count[b.last], edit_lines, &b);
}
