/* SPDX-License-Identifier: Apache-2.0 */
/* Reads taps from Python tuples, for steps of the text model and for encoder passes. Integer arrays are copied, so no
 * other thread can change them while the engine runs without the GIL. Float arrays are used in place. */
#include "python/engine.h"

int engine_copy_ints(PyObject *object, const char *what, int32_t **copy, int *n)
{
    const npy_intp any[] = {-1};
    *copy = NULL, *n = -1;
    if (object == Py_None)
        return 0;
    PyArrayObject *array = engine_check_array(object, NPY_INT32, 1, any, what);
    if (!array)
        return -1;
    if (PyArray_SIZE(array) > 1 << 30) {
        PyErr_Format(PyExc_ValueError, "%s: too long", what);
        return -1;
    }
    *n = (int)PyArray_SIZE(array);
    *copy = PyMem_Malloc(((size_t)*n + 1) * sizeof **copy);
    if (!*copy) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(*copy, PyArray_DATA(array), (size_t)*n * sizeof **copy);
    return 0;
}

int engine_site_type(g4_site site)
{
    return g4_site_row_of(site)->is_int32 ? NPY_INT32 : NPY_FLOAT32;
}

/* Checks that the destination has the site's shape; with `rows`, any number of rows. */
static int read_destination(const engine_tap_owner *owner, g4_tap *tap, PyObject *object)
{
    int64_t shape[G4_MAX_DIMS];
    npy_intp dims[G4_MAX_DIMS];
    char name[G4_SITE_NAME];
    const int n_dims = owner->shape(owner->context, tap, shape), row_axis = g4_site_row_axis(tap->site);
    for (int i = 0; i < n_dims; i++)
        dims[i] = i == row_axis && tap->rows ? -1 : (npy_intp)shape[i];
    g4_site_name(tap->site, tap->layer, name);
    PyArrayObject *array = engine_check_array(object, engine_site_type(tap->site), n_dims, dims, name);
    if (!array || PyArray_FailUnlessWriteable(array, "a capture"))
        return -1;
    tap->dest = PyArray_DATA(array);
    tap->n_dest_rows = row_axis >= 0 ? (int)PyArray_DIM(array, row_axis) : 0;
    return 0;
}

static int read_rows(const engine_tap_owner *owner, g4_tap *tap, PyObject *rows)
{
    int64_t shape[G4_MAX_DIMS];
    int32_t *ints;
    int n;
    const int row_axis = g4_site_row_axis(tap->site);
    if (row_axis < 0) /* cached keys and values have no row axis: copy all */
        rows = Py_None;
    if (engine_copy_ints(rows, "a tap's rows", &ints, &n))
        return -1;
    tap->rows = ints;
    owner->shape(owner->context, tap, shape);
    if (ints && n != shape[row_axis]) {
        PyErr_Format(PyExc_ValueError, "a tap's rows: %d given for a %s of %d positions", n, owner->run_name,
                     (int)shape[row_axis]);
        return -1;
    }
    return 0;
}

/* ---- edits ------------------------------------------------------------------------------------------------------- */

static const char *const edit_names[G4_N_TAP_KINDS] = {[G4_TAP_ADD] = "add",
                                                       [G4_TAP_SCALE] = "scale",
                                                       [G4_TAP_SET] = "set",
                                                       [G4_TAP_PROJECT_OUT] = "project_out",
                                                       [G4_TAP_CLAMP] = "clamp"};

static g4_tap_kind edit_kind(const char *name)
{
    int kind = G4_TAP_ADD;
    while (kind < G4_N_TAP_KINDS && strcmp(edit_names[kind], name) != 0)
        kind++;
    return (g4_tap_kind)kind;
}

/* A view of float32 values with any strides >= 0: broadcast axes have a stride of 0. The engine checks the extent. */
static int read_values(g4_edit *edit, PyObject *object, const char *name, int n_dims)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (object == Py_None)
        return 0;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != NPY_FLOAT32 || PyArray_NDIM(array) != n_dims ||
        !PyArray_ISALIGNED(array) || !PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s: an edit's values must be a float32 array of %d dimensions", name, n_dims);
        return -1;
    }
    edit->values = PyArray_DATA(array);
    edit->n_values = PyArray_SIZE(array) > 0;
    for (int i = 0; i < n_dims; i++) {
        const npy_intp stride = PyArray_STRIDE(array, i);
        if (stride < 0 || stride % (npy_intp)sizeof(float)) {
            PyErr_Format(PyExc_ValueError, "%s: an edit's values have a stride of %zd bytes on axis %d", name,
                         (Py_ssize_t)stride, i);
            return -1;
        }
        edit->stride[i] = stride / (npy_intp)sizeof(float);
        if (edit->n_values)
            edit->n_values += (size_t)((PyArray_DIM(array, i) - 1) * edit->stride[i]);
    }
    return 0;
}

/* A pair (first, end) for each axis; (0, 0): all of it. */
static int read_spans(g4_edit *edit, PyObject *spans, const char *name, int n_dims)
{
    if (!PyTuple_Check(spans) || PyTuple_Size(spans) != n_dims) {
        PyErr_Format(PyExc_ValueError, "%s: an edit has %d spans (first, end), one for each axis", name, n_dims);
        return -1;
    }
    for (int i = 0; i < n_dims; i++) {
        PyObject *span = PyTuple_GetItem(spans, i);
        if (!PyTuple_Check(span) || !PyArg_ParseTuple(span, "ii", &edit->span[i].first, &edit->span[i].end)) {
            PyErr_Format(PyExc_TypeError, "%s: the span of axis %d is no pair (first, end) of integers", name, i);
            return -1;
        }
    }
    return 0;
}

/* (kind, factor, low, high, values or None, spans) */
static int read_edit(const engine_tap_owner *owner, g4_tap *tap, PyObject *tuple)
{
    const char *kind;
    PyObject *values, *spans;
    int64_t shape[G4_MAX_DIMS];
    char name[G4_SITE_NAME];
    if (!PyArg_ParseTuple(tuple, "sfffOO", &kind, &tap->edit.factor, &tap->edit.low, &tap->edit.high, &values, &spans))
        return -1;
    tap->kind = edit_kind(kind);
    if (tap->kind == G4_N_TAP_KINDS) {
        PyErr_Format(PyExc_ValueError, "an edit is \"add\", \"scale\", \"set\", \"project_out\" or \"clamp\", not %s",
                     kind);
        return -1;
    }
    g4_site_name(tap->site, tap->layer, name);
    const int n_dims = owner->shape(owner->context, tap, shape);
    return read_values(&tap->edit, values, name, n_dims) || read_spans(&tap->edit, spans, name, n_dims) ? -1 : 0;
}

static int read_tap(const engine_tap_owner *owner, PyObject *tuple, g4_tap *tap, engine_edit *edit)
{
    PyObject *target, *rows = Py_None;
    int site;
    if (!PyTuple_Check(tuple) || !PyArg_ParseTuple(tuple, "iiiO|O", &site, &tap->layer, &tap->run, &target, &rows)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "a tap is a tuple (site, layer, %s, array, callable or edit, rows or None)",
                     owner->run_name);
        return -1;
    }
    if (site < 0 || site >= G4_N_SITES || !owner->exists(owner->context, (g4_site)site, tap->layer)) {
        PyErr_Format(PyExc_ValueError, "no site %d in layer %d", site, tap->layer);
        return -1;
    }
    if (tap->run < 0 || tap->run >= owner->n_runs) {
        PyErr_Format(PyExc_ValueError, "a tap names %s %d of %d", owner->run_name, tap->run, owner->n_runs);
        return -1;
    }
    tap->site = (g4_site)site;
    if (PyCallable_Check(target)) {
        *edit = (engine_edit){owner->gil, target, tap->site, tap->layer};
        tap->kind = G4_TAP_CALL;
        tap->call = engine_run_edit;
        tap->context = edit;
        return 0;
    }
    if (read_rows(owner, tap, rows))
        return -1;
    return PyTuple_Check(target) ? read_edit(owner, tap, target) : read_destination(owner, tap, target);
}

int engine_read_taps(PyObject *object, const engine_tap_owner *owner, engine_taps *taps)
{
    taps->tuple = object ? PySequence_Tuple(object) : PyTuple_New(0);
    if (!taps->tuple)
        return -1;
    const size_t n = (size_t)PyTuple_Size(taps->tuple);
    taps->taps = PyMem_Calloc(n + 1, sizeof *taps->taps);
    taps->edits = PyMem_Calloc(n + 1, sizeof *taps->edits);
    if (!taps->taps || !taps->edits || n > 1 << 24) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        taps->n = (int)i + 1;
        if (read_tap(owner, PyTuple_GetItem(taps->tuple, (Py_ssize_t)i), &taps->taps[i], &taps->edits[i]))
            return -1;
    }
    return 0;
}

void engine_release_taps(engine_taps *taps)
{
    for (int i = 0; i < taps->n; i++)
        PyMem_Free((void *)taps->taps[i].rows);
    PyMem_Free(taps->taps);
    PyMem_Free(taps->edits);
    Py_XDECREF(taps->tuple);
}
