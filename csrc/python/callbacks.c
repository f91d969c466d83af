/* SPDX-License-Identifier: Apache-2.0 */
/* What the engine calls back while it computes without the GIL, and the check of arrays that it is given. */
#include "python/engine.h"

int engine_poll_signals(void *context)
{
    engine_gil *g = context;
    PyEval_RestoreThread(g->state);
    int failed = PyErr_CheckSignals();
    g->state = PyEval_SaveThread();
    return failed;
}

static int copy_back(PyObject *result, PyArrayObject *given, const engine_edit *edit, void *data, size_t n_bytes)
{
    if (result == Py_None) {
        memcpy(data, PyArray_DATA(given), n_bytes);
        return 0;
    }
    PyArrayObject *array =
        (PyArrayObject *)PyArray_FROM_OTF(result, edit->type, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    if (!array)
        return -1;
    int failed = PyArray_NDIM(array) != PyArray_NDIM(given) ||
                 !PyArray_CompareLists(PyArray_DIMS(array), PyArray_DIMS(given), PyArray_NDIM(given));
    if (failed) {
        PyObject *got = PyObject_GetAttrString((PyObject *)array, "shape");
        PyObject *expected = PyObject_GetAttrString((PyObject *)given, "shape");
        if (got && expected)
            PyErr_Format(PyExc_ValueError, "an edit returned an array of shape %R, the site has %R", got, expected);
        Py_XDECREF(got);
        Py_XDECREF(expected);
    } else {
        memcpy(data, PyArray_DATA(array), n_bytes);
    }
    Py_DECREF(array);
    return failed ? -1 : 0;
}

/* The callable gets an array of its own, so it may keep it: scratch memory is never shown. */
static int call_edit(const engine_edit *edit, void *data, const int64_t *shape, int n_dims)
{
    npy_intp dims[G4_MAX_DIMS];
    for (int i = 0; i < n_dims; i++)
        dims[i] = (npy_intp)shape[i];
    PyArrayObject *array = (PyArrayObject *)PyArray_SimpleNew(n_dims, dims, edit->type);
    if (!array)
        return -1;
    size_t n_bytes = (size_t)PyArray_NBYTES(array);
    memcpy(PyArray_DATA(array), data, n_bytes);
    PyObject *result = PyObject_CallFunctionObjArgs(edit->callable, (PyObject *)array, NULL);
    int failed = result ? copy_back(result, array, edit, data, n_bytes) : -1;
    Py_XDECREF(result);
    Py_DECREF(array);
    return failed;
}

g4_status engine_run_edit(void *context, void *data, const int64_t *shape, int n_dims, g4_error *err)
{
    engine_edit *edit = context;
    PyEval_RestoreThread(edit->gil->state);
    int failed = call_edit(edit, data, shape, n_dims);
    edit->gil->state = PyEval_SaveThread();
    return failed ? g4_fail(err, G4_ECANCELLED, "an edit raised") : G4_OK;
}

PyArrayObject *engine_check_array(PyObject *object, int type, int n_dims, const npy_intp *dims, const char *what)
{
    PyArrayObject *array = (PyArrayObject *)object;
    bool good = PyArray_Check(object) && PyArray_TYPE(array) == type && PyArray_IS_C_CONTIGUOUS(array) &&
                PyArray_ISALIGNED(array) && PyArray_ISNOTSWAPPED(array) && PyArray_NDIM(array) == n_dims;
    for (int i = 0; good && i < n_dims; i++)
        good = dims[i] < 0 || PyArray_DIM(array, i) == dims[i];
    if (good)
        return array;
    PyErr_Format(PyExc_ValueError, "%s: expected a C-contiguous %s array of %d axes, got %R%s", what,
                 type == NPY_FLOAT32   ? "float32"
                 : type == NPY_FLOAT64 ? "float64"
                                       : "int32",
                 n_dims, (PyObject *)Py_TYPE(object), PyArray_Check(object) ? " of another dtype or shape" : "");
    return NULL;
}
