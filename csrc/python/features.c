/* SPDX-License-Identifier: Apache-2.0 */
/* The types Threads and FeatureEncoder: encoders of dictionaries. Interface: gemma4/_engine.pyi. */
#include "ops/features.h"

#include "base/cpu.h"
#include "python/engine.h"

/* ---- threads ----------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD g4_pool *pool;
} threads_object;

static int threads_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"n", NULL};
    threads_object *self = (threads_object *)object;
    int n = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|i", names, &n))
        return -1;
    if (self->pool || n < 0 || n > 1024) {
        PyErr_Format(PyExc_ValueError, self->pool ? "these threads run already" : "%d threads: expected 1 to 1024", n);
        return -1;
    }
    self->pool = g4_pool_new(n ? n : g4_cpu_count());
    if (!self->pool)
        PyErr_NoMemory();
    return self->pool ? 0 : -1;
}

static void threads_dealloc(PyObject *object)
{
    threads_object *self = (threads_object *)object;
    if (self->pool)
        g4_pool_free(self->pool);
    engine_free(object);
}

static PyObject *get_n(PyObject *object, void *unused)
{
    const threads_object *self = (threads_object *)object;
    (void)unused;
    return PyLong_FromLong(self->pool ? g4_pool_size(self->pool) : 0);
}

static PyGetSetDef threads_getset[] = {
    {"n", get_n, NULL, "How many, the caller included.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot threads_slots[] = {
    {Py_tp_doc, "Worker threads that several objects share; their calls take turns. Threads(n=0), 0 = all cores"},
    {Py_tp_init, threads_init},
    {Py_tp_dealloc, threads_dealloc},
    {Py_tp_getset, threads_getset},
    {0, NULL},
};

PyType_Spec engine_threads_spec = {"gemma4._engine.Threads", sizeof(threads_object), 0, Py_TPFLAGS_DEFAULT,
                                   threads_slots};

/* ---- creation ---------------------------------------------------------------------------------------------------- */

enum { N_VECTORS = 5 };

typedef struct {
    PyObject_HEAD g4_dictionary dictionary;
    const g4_kernels *kernels; /* NULL: not initialised */
    PyObject *threads;
    PyObject *arrays[1 + N_VECTORS]; /* keep their memory valid */
} features_object;

static int read_matrix(features_object *self, const char *dtype_name, PyArrayObject *w, bool inputs_first)
{
    g4_matrix *m = &self->dictionary.w;
    const g4_dtype dtype = g4_dtype_parse(dtype_name);
    if (dtype != G4_F32 && dtype != G4_F16 && dtype != G4_BF16) {
        PyErr_Format(PyExc_ValueError, "weights of type %s: expected F32, F16 or BF16", dtype_name);
        return -1;
    }
    const npy_intp size = (npy_intp)g4_dtype_bytes(dtype, 1);
    if (PyArray_NDIM(w) != 2 || PyArray_ITEMSIZE(w) != size || PyArray_STRIDE(w, 1) != size ||
        PyArray_STRIDE(w, 0) % size || PyArray_STRIDE(w, 0) < size * PyArray_DIM(w, 1)) {
        PyErr_SetString(PyExc_ValueError, "weights: expected a matrix of that type whose rows are contiguous");
        return -1;
    }
    const npy_intp n_features = PyArray_DIM(w, inputs_first), n_inputs = PyArray_DIM(w, !inputs_first);
    if (n_features < 1 || n_features > INT_MAX / 2 || n_inputs < 1 || n_inputs > INT_MAX / 2) {
        PyErr_Format(PyExc_ValueError, "weights: %zd features of %zd inputs: too few or too many", n_features,
                     n_inputs);
        return -1;
    }
    *m = (g4_matrix){.data = PyArray_DATA(w),
                     .dtype = dtype,
                     .n_rows = (size_t)n_features,
                     .n_cols = (size_t)n_inputs,
                     .row_stride = (size_t)(PyArray_STRIDE(w, 0) / size)};
    self->dictionary.inputs_first = inputs_first;
    return 0;
}

static int read_vectors(features_object *self, PyObject *const objects[N_VECTORS])
{
    static const char *const names[N_VECTORS] = {"before", "scale", "after", "gate", "threshold"};
    g4_firing *f = &self->dictionary.firing;
    const float **vectors[N_VECTORS] = {&f->before, &f->scale, &f->after, &f->gate, &f->threshold};
    const npy_intp dims[] = {(npy_intp)self->dictionary.w.n_rows};
    for (int i = 0; i < N_VECTORS; i++) {
        if (objects[i] == Py_None)
            continue;
        PyArrayObject *array = engine_check_array(objects[i], NPY_FLOAT32, 1, dims, names[i]);
        if (!array)
            return -1;
        *vectors[i] = PyArray_DATA(array);
        self->arrays[1 + i] = Py_NewRef(objects[i]);
    }
    return 0;
}

static bool is_threads(PyObject *encoder, PyObject *object)
{
    PyObject *module = PyType_GetModule(Py_TYPE(encoder));
    PyObject *type = module ? PyObject_GetAttrString(module, "Threads") : NULL;
    const bool is = type && PyObject_TypeCheck(object, (PyTypeObject *)type) && ((threads_object *)object)->pool;
    Py_XDECREF(type);
    if (!is && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "a feature encoder needs Threads, got %R", (PyObject *)Py_TYPE(object));
    return is;
}

static int features_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"threads",   "dtype", "weights", "inputs_first", "before", "scale", "after", "gate",
                            "threshold", "k",     NULL};
    features_object *self = (features_object *)object;
    const char *dtype;
    PyObject *threads, *w, *vectors[N_VECTORS] = {Py_None, Py_None, Py_None, Py_None, Py_None};
    int inputs_first, k = 0;
    g4_error err;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OsO!p|$OOOOOi", names, &threads, &dtype, &PyArray_Type, &w,
                                     &inputs_first, &vectors[0], &vectors[1], &vectors[2], &vectors[3], &vectors[4],
                                     &k))
        return -1;
    if (self->kernels || self->threads) {
        PyErr_SetString(PyExc_RuntimeError, "this feature encoder is initialised already");
        return -1;
    }
    if (!is_threads(object, threads))
        return -1;
    self->threads = Py_NewRef(threads);
    self->arrays[0] = Py_NewRef(w);
    if (read_matrix(self, dtype, (PyArrayObject *)w, inputs_first) || read_vectors(self, vectors))
        return -1;
    if (k < 0 || (size_t)k > self->dictionary.w.n_rows) {
        PyErr_Format(PyExc_ValueError, "k is %d: expected 0 to %zu", k, self->dictionary.w.n_rows);
        return -1;
    }
    self->dictionary.k = k;
    const g4_kernels *kernels;
    if (g4_kernels_select(&kernels, &err) != G4_OK) {
        engine_raise(&err);
        return -1;
    }
    self->kernels = kernels;
    return 0;
}

static void features_dealloc(PyObject *object)
{
    features_object *self = (features_object *)object;
    for (int i = 0; i < 1 + N_VECTORS; i++)
        Py_XDECREF(self->arrays[i]);
    Py_XDECREF(self->threads);
    engine_free(object);
}

/* ---- encode ------------------------------------------------------------------------------------------------------ */

static PyObject *copied(int type, size_t n, const void *data, size_t size)
{
    PyObject *array = PyArray_SimpleNew(1, ((npy_intp[]){(npy_intp)n}), type);
    if (array)
        memcpy(PyArray_DATA((PyArrayObject *)array), data, n * size);
    return array;
}

static PyObject *arrays_of(const g4_features *features, size_t m)
{
    const size_t n = (size_t)features->offsets[m];
    PyObject *offsets = copied(NPY_INT64, m + 1, features->offsets, sizeof *features->offsets);
    PyObject *ids = copied(NPY_INT32, n, features->ids, sizeof *features->ids);
    PyObject *values = copied(NPY_FLOAT32, n, features->values, sizeof *features->values);
    PyObject *tuple = offsets && ids && values ? PyTuple_Pack(3, offsets, ids, values) : NULL;
    Py_XDECREF(offsets);
    Py_XDECREF(ids);
    Py_XDECREF(values);
    return tuple;
}

static g4_status encode(const features_object *self, const float *x, int m, int first, int n, engine_gil *gil,
                        g4_features *out, g4_error *err)
{
    g4_arena *arena = g4_arena_new();
    if (!arena)
        return g4_fail_nomem(err, 0);
    g4_exec exec = {.kernels = self->kernels,
                    .pool = ((threads_object *)self->threads)->pool,
                    .arena = arena,
                    .poll = engine_poll_signals,
                    .poll_context = gil,
                    .err = err};
    const g4_status status = g4_encode_features(&exec, &self->dictionary, x, m, first, n, out);
    g4_arena_free(arena);
    return status;
}

static PyObject *features_encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"x", "first", "n", NULL};
    const features_object *self = (features_object *)object;
    PyObject *given;
    int first = 0, n = -1;
    g4_features out;
    g4_error err = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|ii", names, &given, &first, &n))
        return NULL;
    if (!self->kernels)
        return PyErr_Format(PyExc_RuntimeError, "this feature encoder was never initialised");
    const npy_intp dims[] = {-1, (npy_intp)self->dictionary.w.n_cols};
    PyArrayObject *x = engine_check_array(given, NPY_FLOAT32, 2, dims, "x");
    if (!x)
        return NULL;
    const npy_intp m = PyArray_DIM(x, 0), n_features = (npy_intp)self->dictionary.w.n_rows;
    n = n == -1 && first >= 0 && first <= n_features ? (int)n_features - first : n;
    if (first < 0 || n < 0 || n > n_features - first || m > 1 << 20)
        return PyErr_Format(PyExc_ValueError,
                            "%d features from %d on, %zd rows: there are %zd, and at most 1048576 rows", n, first, m,
                            n_features);
    engine_gil gil = {PyEval_SaveThread()};
    const g4_status status = encode(self, PyArray_DATA(x), (int)m, first, n, &gil, &out, &err);
    PyEval_RestoreThread(gil.state);
    if (status != G4_OK)
        return engine_raise(&err);
    PyObject *arrays = arrays_of(&out, (size_t)m);
    g4_features_free(&out);
    return arrays;
}

static PyMethodDef features_methods[] = {
    {"encode", (PyCFunction)(void (*)(void))features_encode, METH_VARARGS | METH_KEYWORDS,
     "Rows of activations to the features that fire: (offsets, ids, values)."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot features_slots[] = {
    {Py_tp_doc, "The encoder of a dictionary. FeatureEncoder(threads, dtype, weights, inputs_first, ...)"},
    {Py_tp_init, features_init},
    {Py_tp_dealloc, features_dealloc},
    {Py_tp_methods, features_methods},
    {0, NULL},
};

PyType_Spec engine_features_spec = {"gemma4._engine.FeatureEncoder", sizeof(features_object), 0, Py_TPFLAGS_DEFAULT,
                                    features_slots};
