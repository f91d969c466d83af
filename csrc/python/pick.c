/* SPDX-License-Identifier: Apache-2.0 */
/* Sampling from rows of logits and of weights: what a step finds in its own logits, and functions of one row. */
#include <math.h>

#include "kernels/kernels.h"
#include "ops/pick.h"
#include "python/engine.h"

/* ---- of a step ---------------------------------------------------------------------------------------------------- */

#define PICKS "picks are a tuple (k, within, with_sum, ids, values, found)"

static void *writable(PyObject *object, int type, npy_intp n, npy_intp width, const char *what)
{
    const npy_intp dims[] = {n, width};
    PyArrayObject *array = engine_check_array(object, type, 2, dims, what);
    return array && !PyArray_FailUnlessWriteable(array, what) ? PyArray_DATA(array) : NULL;
}

int engine_read_picks(PyObject *object, int n, int n_vocab, engine_picks *picks)
{
    PyObject *ids, *values, *found;
    int32_t *all_ids = NULL;
    float *all_values = NULL;
    float within;
    int k, with_sum;
    if (object == Py_None)
        return 0;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, PICKS);
        return -1;
    }
    if (!PyArg_ParseTuple(object, "ifpOOO;" PICKS, &k, &within, &with_sum, &ids, &values, &found))
        return -1;
    if (k < 0 || !(within >= 0) || isinf(within)) {
        PyErr_SetString(PyExc_ValueError, "picks: k and within are 0 (none) or more, and finite");
        return -1;
    }
    const bool lists = k || within > 0;
    picks->found = writable(found, NPY_FLOAT64, n, ENGINE_FOUND, "found");
    if (!picks->found)
        return -1;
    if (lists && (!(all_ids = writable(ids, NPY_INT32, n, n_vocab, "ids")) ||
                  !(all_values = writable(values, NPY_FLOAT32, n, n_vocab, "values"))))
        return -1;
    picks->rows = PyMem_Calloc((size_t)n + 1, sizeof *picks->rows);
    if (!picks->rows) {
        PyErr_NoMemory();
        return -1;
    }
    picks->n = n;
    for (int i = 0; i < n; i++) {
        const size_t at = (size_t)i * (size_t)n_vocab;
        picks->rows[i] = (g4_pick){.k = k < n_vocab ? k : n_vocab, .within = within, .with_sum = with_sum};
        if (lists)
            picks->rows[i].ids = all_ids + at, picks->rows[i].values = all_values + at;
    }
    return 0;
}

static void write_found(const g4_pick *pick, double *found)
{
    found[0] = pick->best, found[1] = (double)pick->top, found[2] = pick->n, found[3] = pick->log_sum;
}

void engine_return_picks(const engine_picks *picks)
{
    for (int i = 0; i < picks->n; i++)
        write_found(&picks->rows[i], picks->found + (size_t)i * ENGINE_FOUND);
}

void engine_release_picks(engine_picks *picks)
{
    PyMem_Free(picks->rows);
}

/* ---- of one row --------------------------------------------------------------------------------------------------- */

/* Chosen once, since every choice gives the same bits: asking a virtual machine's processor takes 0.1 ms. The caller holds
 * the GIL. */
static const g4_kernels *kernels_here(void)
{
    static const g4_kernels *chosen;
    g4_error err;
    if (!chosen && g4_kernels_select(&chosen, &err) != G4_OK)
        engine_raise(&err);
    return chosen;
}

/* A row of float32 with 1 to 2^30 values. */
static PyArrayObject *row_of(PyObject *object, const char *what)
{
    const npy_intp any[] = {-1};
    PyArrayObject *row = engine_check_array(object, NPY_FLOAT32, 1, any, what);
    if (!row || (PyArray_SIZE(row) > 0 && PyArray_SIZE(row) <= 1 << 30))
        return row;
    PyErr_Format(PyExc_ValueError, "%s: a row of %zd values, expected 1 to 2^30", what, (Py_ssize_t)PyArray_SIZE(row));
    return NULL;
}

/* top_logits(logits [V], picks): the same of one row that is not a step's */
PyObject *engine_top_logits(PyObject *self, PyObject *args)
{
    PyObject *given, *object;
    engine_picks picks = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "OO", &given, &object))
        return NULL;
    PyArrayObject *row = row_of(given, "logits");
    const g4_kernels *kernels = row ? kernels_here() : NULL;
    if (!kernels || engine_read_picks(object, 1, (int)PyArray_SIZE(row), &picks))
        return NULL;
    if (!picks.rows)
        return PyErr_Format(PyExc_TypeError, PICKS);
    const int n = (int)PyArray_SIZE(row);
    float *maxima = PyMem_Malloc((size_t)g4_pick_scratch(n, picks.rows->k) * sizeof *maxima);
    if (maxima) {
        Py_BEGIN_ALLOW_THREADS;
        g4_pick_row(kernels, PyArray_DATA(row), n, maxima, picks.rows);
        Py_END_ALLOW_THREADS;
        engine_return_picks(&picks);
    }
    PyMem_Free(maxima);
    engine_release_picks(&picks);
    return maxima ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

/* nucleus_floor(weights, share) -> weight */
PyObject *engine_nucleus_floor(PyObject *self, PyObject *args)
{
    PyObject *given;
    double share;
    float least;
    (void)self;
    if (!PyArg_ParseTuple(args, "Od", &given, &share))
        return NULL;
    PyArrayObject *row = row_of(given, "weights");
    const g4_kernels *kernels = row ? kernels_here() : NULL;
    if (!kernels)
        return NULL;
    const int n = (int)PyArray_SIZE(row);
    int32_t *ids = PyMem_Malloc((size_t)n * sizeof *ids);
    if (!ids)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS;
    least = g4_nucleus_floor(kernels, PyArray_DATA(row), n, share, ids);
    Py_END_ALLOW_THREADS;
    PyMem_Free(ids);
    return PyFloat_FromDouble((double)least);
}

/* draw(weights, least, unit) -> index */
PyObject *engine_draw(PyObject *self, PyObject *args)
{
    PyObject *given;
    float least;
    double unit;
    int at;
    (void)self;
    if (!PyArg_ParseTuple(args, "Ofd", &given, &least, &unit))
        return NULL;
    PyArrayObject *row = row_of(given, "weights");
    const g4_kernels *kernels = row ? kernels_here() : NULL;
    if (!kernels)
        return NULL;
    const int n = (int)PyArray_SIZE(row);
    double *sums = PyMem_Malloc((size_t)g4_draw_scratch(n) * sizeof *sums);
    if (!sums)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS;
    at = g4_draw(kernels, PyArray_DATA(row), n, least, unit, sums);
    Py_END_ALLOW_THREADS;
    PyMem_Free(sums);
    if (at < 0)
        return PyErr_Format(PyExc_ValueError, "no weight is above 0 and at least the given one: nothing to draw");
    return PyLong_FromLong(at);
}
