/* SPDX-License-Identifier: Apache-2.0 */
#include "model/bind.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int compare_names(const void *a, const void *b)
{
    return strcmp((*(const g4_named_tensor *const *)a)->name, (*(const g4_named_tensor *const *)b)->name);
}

g4_status g4_binder_open(g4_binder *b, const g4_named_tensor *tensors, size_t n_tensors)
{
    b->n_tensors = n_tensors;
    b->sorted = malloc((n_tensors + 1) * sizeof *b->sorted);
    if (!b->sorted)
        return g4_fail_nomem(b->err, n_tensors * sizeof *b->sorted);
    for (size_t i = 0; i < n_tensors; i++)
        b->sorted[i] = &tensors[i];
    qsort(b->sorted, n_tensors, sizeof *b->sorted, compare_names);
    return G4_OK;
}

void g4_binder_close(g4_binder *b)
{
    free(b->sorted);
    b->sorted = NULL;
}

const g4_named_tensor *g4_binder_find(const g4_binder *b, const char *name)
{
    const g4_named_tensor key = {.name = name}, *pointer = &key;
    if (!b->n_tensors) /* a binder that lists; bsearch must not get NULL */
        return NULL;
    const g4_named_tensor **found = bsearch(&pointer, b->sorted, b->n_tensors, sizeof *b->sorted, compare_names);
    return found ? *found : NULL;
}

static int expected_shape(const g4_binder *b, const char *axes, int layer, int64_t shape[G4_MAX_DIMS])
{
    int n = 0;
    shape[0] = 1;
    for (; *axes; axes++) {
        if (*axes == ' ')
            shape[++n] = 1;
        else if (*axes >= '0' && *axes <= '9')
            shape[n] *= *axes - '0';
        else
            shape[n] *= b->letter(b->config, layer, *axes);
    }
    return n + 1;
}

static void print_shape(char *text, size_t size, const int64_t *shape, int n_dims)
{
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < n_dims && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "", (long long)shape[i]);
}

static g4_status check_shape(const g4_binder *b, const g4_named_tensor *t, const int64_t *expected, int n_dims)
{
    bool same = t->n_dims == n_dims;
    for (int i = 0; same && i < n_dims; i++)
        same = t->shape[i] == expected[i];
    if (same)
        return G4_OK;
    char got_text[96], expected_text[96];
    print_shape(got_text, sizeof got_text, t->shape, t->n_dims);
    print_shape(expected_text, sizeof expected_text, expected, n_dims);
    return g4_fail(b->err, G4_EFORMAT, "tensor %s has shape [%s], the config calls for [%s]", t->name, got_text,
                   expected_text);
}

static g4_status check_blocks(const g4_binder *b, const g4_named_tensor *t, bool is_vector, size_t n_cols)
{
    if (is_vector && g4_is_quantised(t->dtype))
        return g4_fail(b->err, G4_EFORMAT, "tensor %s has dtype %s, expected F32, F16 or BF16", t->name,
                       g4_dtype_name(t->dtype));
    if (n_cols % g4_block_size(t->dtype))
        return g4_fail(b->err, G4_EFORMAT,
                       "tensor %s has rows of %zu values, which is no multiple of the %zu of a %s block", t->name,
                       n_cols, g4_block_size(t->dtype), g4_dtype_name(t->dtype));
    return G4_OK;
}

static float *copy_vector(g4_binder *b, const g4_named_tensor *t, size_t n)
{
    float *values = g4_arena_alloc(b->arena, n * sizeof *values);
    if (!values) {
        g4_fail_nomem(b->err, n * sizeof *values);
        return NULL;
    }
    for (size_t i = 0; i < n; i++) {
        const char *at = (const char *)t->data + i * g4_block_bytes(t->dtype);
        uint16_t half;
        if (t->dtype == G4_F32) {
            memcpy(&values[i], at, 4);
            continue;
        }
        memcpy(&half, at, 2);
        values[i] = t->dtype == G4_F16 ? g4_f16_to_f32(half) : g4_bf16_to_f32(half);
    }
    return values;
}

static g4_status find_checked(g4_binder *b, const char *name, const int64_t *shape, int n_dims, bool is_vector,
                              const g4_named_tensor **found)
{
    const g4_named_tensor *t = g4_binder_find(b, name);
    if (!t)
        return g4_fail(b->err, G4_EFORMAT, "the checkpoint has no tensor %s, which its config calls for", name);
    G4_TRY(check_shape(b, t, shape, n_dims));
    G4_TRY(check_blocks(b, t, is_vector, n_dims ? (size_t)shape[n_dims - 1] : 1));
    size_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    b->n_bytes += g4_dtype_bytes(t->dtype, n);
    *found = t;
    return G4_OK;
}

static g4_status bind_matrix(g4_binder *b, const char *name, const int64_t *shape, int n_dims, g4_op op, void *member)
{
    const g4_named_tensor *t;
    const size_t n_cols = (size_t)shape[n_dims - 1];
    size_t n_rows = 1;
    for (int i = 0; i + 1 < n_dims; i++)
        n_rows *= (size_t)shape[i];
    G4_TRY(find_checked(b, name, shape, n_dims, false, &t));
    g4_matrix w = {t->data, t->dtype, n_rows, n_cols, n_cols, op};
    memcpy(member, &w, sizeof w);
    return G4_OK;
}

static g4_status bind_vector(g4_binder *b, const char *name, const int64_t *shape, int n_dims, float offset,
                             void *member)
{
    const g4_named_tensor *t = NULL;
    size_t n = 1;
    for (int i = 0; i < n_dims; i++)
        n *= (size_t)shape[i];
    G4_TRY(find_checked(b, name, shape, n_dims, true, &t));
    float *values = copy_vector(b, t, n);
    for (size_t i = 0; values && offset != 0 && i < n; i++)
        values[i] += offset;
    memcpy(member, &values, sizeof values);
    return values ? G4_OK : G4_ENOMEM;
}

static const char *const bounds[] = {"input_min", "input_max", "output_min", "output_max"};

/* A scalar, stored with shape [] or [1]. */
static g4_status bind_scalar(g4_binder *b, const char *stem, const char *part, float *value)
{
    char name[160];
    snprintf(name, sizeof name, "%s.%s", stem, part);
    const g4_named_tensor *t = g4_binder_find(b, name);
    const float *copy;
    int64_t shape[] = {1};
    G4_TRY(bind_vector(b, name, shape, t && t->n_dims == 0 ? 0 : 1, 0, &copy));
    *value = *copy;
    return G4_OK;
}

static g4_status bind_clipped(g4_binder *b, const char *stem, const int64_t *shape, int n_dims, g4_op op,
                              g4_clipped *member)
{
    char name[160];
    snprintf(name, sizeof name, "%s.linear.weight", stem);
    *member =
        (g4_clipped){.input_min = -INFINITY, .input_max = INFINITY, .output_min = -INFINITY, .output_max = INFINITY};
    G4_TRY(bind_matrix(b, name, shape, n_dims, op, &member->w));
    if (!b->clipped)
        return G4_OK;
    float *const values[] = {&member->input_min, &member->input_max, &member->output_min, &member->output_max};
    for (int i = 0; i < 4; i++)
        G4_TRY(bind_scalar(b, stem, bounds[i], values[i]));
    return G4_OK;
}

static void list_clipped(const g4_binder *b, const char *stem, const int64_t *shape, int n_dims)
{
    const int64_t one[] = {1};
    char name[160];
    snprintf(name, sizeof name, "%s.linear.weight", stem);
    b->list(b->list_context, name, shape, n_dims);
    for (int i = 0; b->clipped && i < 4; i++) {
        snprintf(name, sizeof name, "%s.%s", stem, bounds[i]);
        b->list(b->list_context, name, one, 1);
    }
}

g4_status g4_bind(g4_binder *b, const g4_bind_row *row, const char *name, int layer, void *owner)
{
    int64_t shape[G4_MAX_DIMS];
    int n_dims = expected_shape(b, row->axes, layer, shape);
    if (b->list) {
        if (row->kind == G4_BIND_CLIPPED)
            list_clipped(b, name, shape, n_dims);
        else
            b->list(b->list_context, name, shape, n_dims);
        return G4_OK;
    }
    void *member = (char *)owner + row->offset;
    switch (row->kind) {
    case G4_BIND_VECTOR: return bind_vector(b, name, shape, n_dims, 0, member);
    case G4_BIND_GAIN: return bind_vector(b, name, shape, n_dims, b->unit_gains ? 1 : 0, member);
    case G4_BIND_CLIPPED: return bind_clipped(b, name, shape, n_dims, row->op, member);
    default: return bind_matrix(b, name, shape, n_dims, row->op, member);
    }
}
