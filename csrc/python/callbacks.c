/* SPDX-License-Identifier: Apache-2.0 */
/* Callbacks from the engine, which runs without the GIL, and checks of NumPy arguments. */
#include "python/engine.h"

int engine_poll_signals(void *context)
{
    engine_gil *g = context;
    PyEval_RestoreThread(g->state);
    int failed = PyErr_CheckSignals();
    g->state = PyEval_SaveThread();
    return failed;
}

/* The properties of its array that a hook must not change; it may change only the values. */
typedef struct {
    void *data;
    PyArray_Descr *type;
    int n_dims;
    npy_intp dims[G4_MAX_DIMS], strides[G4_MAX_DIMS];
} array_face;

static array_face face_of(PyArrayObject *array)
{
    array_face face = {.data = PyArray_DATA(array), .type = PyArray_DESCR(array), .n_dims = PyArray_NDIM(array)};
    Py_INCREF((PyObject *)face.type);
    for (int i = 0; i < face.n_dims; i++) {
        face.dims[i] = PyArray_DIM(array, i);
        face.strides[i] = PyArray_STRIDE(array, i);
    }
    return face;
}

/* The name of a property that changed, or NULL. */
static const char *what_changed(PyArrayObject *array, const array_face *face)
{
    if (PyArray_NDIM(array) != face->n_dims || !PyArray_CompareLists(PyArray_DIMS(array), face->dims, face->n_dims))
        return "shape";
    if (!PyArray_EquivTypes(PyArray_DESCR(array), face->type))
        return "dtype";
    if (!PyArray_CompareLists(PyArray_STRIDES(array), face->strides, face->n_dims))
        return "strides";
    if (PyArray_DATA(array) != face->data)
        return "memory";
    return PyArray_ISWRITEABLE(array) ? NULL : "writeable flag";
}

static int check_face(const engine_edit *edit, PyArrayObject *given, const array_face *face)
{
    char name[G4_SITE_NAME];
    const char *changed = what_changed(given, face);
    if (!changed)
        return 0;
    g4_site_name(edit->site, edit->layer, name);
    PyErr_Format(PyExc_ValueError,
                 "the hook on %s changed the %s of the array it was given; change the numbers in it, or return another "
                 "array of the same shape",
                 name, changed);
    return -1;
}

static void raise_shape(const engine_edit *edit, PyArrayObject *array, const array_face *face)
{
    char name[G4_SITE_NAME];
    PyObject *got = PyObject_GetAttrString((PyObject *)array, "shape"), *expected = PyTuple_New(face->n_dims);
    for (int i = 0; expected && i < face->n_dims; i++)
        PyTuple_SetItem(expected, i, PyLong_FromSsize_t(face->dims[i]));
    g4_site_name(edit->site, edit->layer, name);
    if (got && expected && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "the hook on %s returned an array of shape %R, the site has %R", name, got,
                     expected);
    Py_XDECREF(got);
    Py_XDECREF(expected);
}

/* Converting `result` may run Python code that changes the hook's array again, so only `face` is trusted. */
static int copy_result(PyObject *result, const engine_edit *edit, const array_face *face, void *data, size_t n_bytes)
{
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_OTF(result, engine_site_type(edit->site),
                                                             NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    if (!array)
        return -1;
    const bool fits =
        PyArray_NDIM(array) == face->n_dims && PyArray_CompareLists(PyArray_DIMS(array), face->dims, face->n_dims);
    if (fits)
        memcpy(data, PyArray_DATA(array), n_bytes);
    else
        raise_shape(edit, array, face);
    Py_DECREF(array);
    return fits ? 0 : -1;
}

/* The callable gets a new array, which it may keep. Scratch memory is never exposed. */
static int call_edit(const engine_edit *edit, void *data, const int64_t *shape, int n_dims)
{
    npy_intp dims[G4_MAX_DIMS];
    for (int i = 0; i < n_dims; i++)
        dims[i] = (npy_intp)shape[i];
    PyArrayObject *array = (PyArrayObject *)PyArray_SimpleNew(n_dims, dims, engine_site_type(edit->site));
    if (!array)
        return -1;
    const size_t n_bytes = (size_t)PyArray_NBYTES(array);
    const array_face face = face_of(array);
    memcpy(face.data, data, n_bytes);
    PyObject *result = PyObject_CallFunctionObjArgs(edit->callable, (PyObject *)array, NULL);
    int failed = result ? check_face(edit, array, &face) : -1;
    if (!failed && result == Py_None)
        memcpy(data, face.data, n_bytes);
    else if (!failed)
        failed = copy_result(result, edit, &face, data, n_bytes);
    Py_XDECREF(result);
    Py_DECREF((PyObject *)face.type);
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
