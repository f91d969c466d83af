/* SPDX-License-Identifier: Apache-2.0 */
#include "python/engine.h"

g4_sequence *engine_open_sequence(PyObject *object)
{
    sequence_object *self = (sequence_object *)object;
    if (!self->seq) {
        g4_error err;
        g4_fail(&err, G4_ESTATE, "this sequence is closed: make a new one with new_sequence()");
        engine_raise(&err);
    }
    return self->seq;
}

bool engine_lock(g4_sequence *seq)
{
    g4_error err;
    if (g4_sequence_acquire(seq, &err) == G4_OK)
        return true;
    engine_raise(&err);
    return false;
}

PyTypeObject *engine_sequence_type(PyObject *model)
{
    PyObject *module = PyType_GetModule(Py_TYPE(model));
    PyObject *type = module ? PyObject_GetAttrString(module, "Sequence") : NULL;
    Py_XDECREF(type); /* the module holds a reference */
    return (PyTypeObject *)type;
}

PyObject *engine_sequence_wrap(model_object *owner, g4_sequence *seq)
{
    PyTypeObject *type = engine_sequence_type((PyObject *)owner);
    sequence_object *self = type ? (sequence_object *)PyType_GenericAlloc(type, 0) : NULL;
    if (!self) {
        g4_sequence_free(seq);
        return NULL;
    }
    self->owner = (model_object *)Py_NewRef((PyObject *)owner);
    self->seq = seq;
    return (PyObject *)self;
}

static void sequence_dealloc(PyObject *object)
{
    sequence_object *self = (sequence_object *)object;
    g4_sequence_free(self->seq);
    Py_XDECREF((PyObject *)self->owner);
    engine_free(object);
}

static PyObject *sequence_close(PyObject *object, PyObject *unused)
{
    sequence_object *self = (sequence_object *)object;
    (void)unused;
    if (self->seq) {
        if (!engine_lock(self->seq))
            return NULL;
        g4_sequence_free(self->seq);
        self->seq = NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *sequence_fork(PyObject *object, PyObject *unused)
{
    g4_sequence *seq = engine_open_sequence(object), *fork;
    g4_error err;
    (void)unused;
    if (!seq)
        return NULL;
    if (g4_sequence_fork(seq, &fork, &err) != G4_OK)
        return engine_raise(&err);
    return engine_sequence_wrap(((sequence_object *)object)->owner, fork);
}

static PyObject *sequence_truncate(PyObject *object, PyObject *argument)
{
    g4_sequence *seq = engine_open_sequence(object);
    g4_error err;
    long length = seq ? PyLong_AsLong(argument) : -1;
    if (!seq || (length == -1 && PyErr_Occurred()))
        return NULL;
    int clamped = length > INT_MAX ? INT_MAX : length < -1 ? -1 : (int)length;
    if (g4_sequence_truncate(seq, clamped, &err) != G4_OK)
        return engine_raise(&err);
    Py_RETURN_NONE;
}

/* ---- saving and restoring ---------------------------------------------------------------------------------------- */

/* NumPy types of cache elements; bf16 as uint16, Q8_0 blocks as bytes. */
static const struct {
    const char *name;
    g4_dtype dtype;
    int numpy_type;
    const char *numpy_name;
} kv_dtypes[] = {
    {"f32", G4_F32, NPY_FLOAT32, "float32"},
    {"f16", G4_F16, NPY_FLOAT16, "float16"},
    {"bf16", G4_BF16, NPY_UINT16, "uint16"},
    {"q8_0", G4_Q8_0, NPY_UINT8, "uint8"},
};
enum { N_KV_DTYPES = sizeof kv_dtypes / sizeof *kv_dtypes };

g4_dtype engine_kv_dtype(const char *name)
{
    for (int i = 0; i < N_KV_DTYPES; i++)
        if (strcmp(kv_dtypes[i].name, name) == 0)
            return kv_dtypes[i].dtype;
    return G4_N_DTYPES;
}

static int kv_dtype_index(const g4_sequence *seq)
{
    int i = 0;
    while (kv_dtypes[i].dtype != g4_sequence_dtype(seq))
        i++;
    return i;
}

static int numpy_type(const g4_sequence *seq)
{
    return kv_dtypes[kv_dtype_index(seq)].numpy_type;
}

/* NumPy elements per head. */
static npy_intp head_elements(const g4_sequence *seq, const g4_layer_config *layer)
{
    const g4_dtype dtype = g4_sequence_dtype(seq);
    return g4_is_quantised(dtype) ? (npy_intp)g4_dtype_bytes(dtype, (size_t)layer->head_dim) : layer->head_dim;
}

static PyObject *export_layer(const g4_sequence *seq, const g4_layer_config *layer, int index)
{
    int first = g4_sequence_first_cached(seq, index);
    npy_intp shape[] = {g4_sequence_length(seq) - first, layer->n_kv_heads, head_elements(seq, layer)};
    PyObject *k = PyArray_SimpleNew(3, shape, numpy_type(seq)), *v = PyArray_SimpleNew(3, shape, numpy_type(seq));
    if (!k || !v) {
        Py_XDECREF(k);
        Py_XDECREF(v);
        return NULL;
    }
    g4_sequence_export(seq, index, PyArray_DATA((PyArrayObject *)k), PyArray_DATA((PyArrayObject *)v));
    return Py_BuildValue("(iNN)", first, k, v);
}

static PyObject *export_layers(const sequence_object *self)
{
    const g4_config *config = g4_model_config(self->owner->model);
    PyObject *layers = PyDict_New();
    for (int i = 0; layers && i < config->n_layers; i++) {
        if (config->layers[i].kv_source != i)
            continue;
        PyObject *key = PyLong_FromLong(i), *value = export_layer(self->seq, &config->layers[i], i);
        if (!key || !value || PyDict_SetItem(layers, key, value))
            Py_CLEAR(layers);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return layers;
}

static PyObject *sequence_state(PyObject *object, PyObject *unused)
{
    sequence_object *self = (sequence_object *)object;
    (void)unused;
    if (!engine_open_sequence(object) || !engine_lock(self->seq))
        return NULL;
    PyObject *layers = export_layers(self);
    const char *dtype = kv_dtypes[kv_dtype_index(self->seq)].name;
    PyObject *state = layers ? Py_BuildValue("{s:i,s:s,s:N}", "length", g4_sequence_length(self->seq), "kv_dtype",
                                             dtype, "layers", layers)
                             : NULL;
    g4_sequence_release(self->seq);
    return state;
}

static PyArrayObject *state_array(const g4_sequence *seq, PyObject *object, const g4_layer_config *layer, int n,
                                  int index)
{
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || PyArray_TYPE(array) != numpy_type(seq) || !PyArray_ISCARRAY_RO(array) ||
        PyArray_NDIM(array) != 3 || PyArray_DIM(array, 0) != n || PyArray_DIM(array, 1) != layer->n_kv_heads ||
        PyArray_DIM(array, 2) != head_elements(seq, layer)) {
        PyErr_Format(PyExc_ValueError,
                     "state of layer %d: expected C-contiguous %s arrays in this machine's byte order [%d, %d, %d]",
                     index, kv_dtypes[kv_dtype_index(seq)].numpy_name, n, layer->n_kv_heads,
                     (int)head_elements(seq, layer));
        return NULL;
    }
    return array;
}

static int import_layer(g4_sequence *seq, const g4_layer_config *layer, int index, PyObject *layers, int length)
{
    PyObject *key = PyLong_FromLong(index), *value = key ? PyObject_GetItem(layers, key) : NULL;
    PyObject *k, *v;
    int first, failed = -1;
    g4_error err;
    Py_XDECREF(key);
    if (value && !PyTuple_Check(value))
        PyErr_Format(PyExc_TypeError, "state of layer %d: expected (first position, k, v), got %R", index, value);
    else if (value && PyArg_ParseTuple(value, "iOO", &first, &k, &v)) {
        if (first < 0 || first > length)
            PyErr_Format(PyExc_ValueError, "state of layer %d: first position %d of %d", index, first, length);
        PyArrayObject *k_array = PyErr_Occurred() ? NULL : state_array(seq, k, layer, length - first, index);
        PyArrayObject *v_array = k_array ? state_array(seq, v, layer, length - first, index) : NULL;
        if (v_array) {
            failed = g4_sequence_import(seq, index, first, length, PyArray_DATA(k_array), PyArray_DATA(v_array),
                                        &err) != G4_OK;
            if (failed)
                engine_raise(&err);
        }
    }
    Py_XDECREF(value);
    return failed ? -1 : 0;
}

static int import_state(const sequence_object *self, PyObject *state)
{
    const g4_config *config = g4_model_config(self->owner->model);
    PyObject *length_object = PyMapping_GetItemString(state, "length");
    long length = length_object ? PyLong_AsLong(length_object) : -1;
    Py_XDECREF(length_object);
    if (PyErr_Occurred())
        return -1;
    if (length < 0 || length > g4_sequence_capacity(self->seq)) {
        PyErr_Format(PyExc_ValueError, "state of length %ld: this sequence's capacity is %d", length,
                     g4_sequence_capacity(self->seq));
        return -1;
    }
    PyObject *layers = PyMapping_GetItemString(state, "layers");
    int failed = layers ? 0 : -1;
    for (int i = 0; i < config->n_layers && !failed; i++)
        if (config->layers[i].kv_source == i)
            failed = import_layer(self->seq, &config->layers[i], i, layers, (int)length);
    Py_XDECREF(layers);
    if (!failed)
        g4_sequence_set_length(self->seq, (int)length);
    return failed;
}

static PyObject *sequence_load_state(PyObject *object, PyObject *state)
{
    sequence_object *self = (sequence_object *)object;
    if (!engine_open_sequence(object) || !engine_lock(self->seq))
        return NULL;
    int failed = -1;
    if (g4_sequence_length(self->seq) != 0)
        PyErr_SetString(PyExc_ValueError, "load_state: the sequence is not empty");
    else if ((failed = import_state(self, state)))
        g4_sequence_clear(self->seq); /* of layers that were imported before the failure */
    g4_sequence_release(self->seq);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- attributes -------------------------------------------------------------------------------------------------- */

static PyObject *get_length(PyObject *self, void *unused)
{
    (void)unused;
    g4_sequence *seq = engine_open_sequence(self);
    return seq ? PyLong_FromLong(g4_sequence_length(seq)) : NULL;
}

static PyObject *get_capacity(PyObject *self, void *unused)
{
    (void)unused;
    g4_sequence *seq = engine_open_sequence(self);
    return seq ? PyLong_FromLong(g4_sequence_capacity(seq)) : NULL;
}

static PyObject *get_kv_dtype(PyObject *self, void *unused)
{
    (void)unused;
    g4_sequence *seq = engine_open_sequence(self);
    return seq ? PyUnicode_FromString(kv_dtypes[kv_dtype_index(seq)].name) : NULL;
}

static PyObject *get_min_truncate(PyObject *self, void *unused)
{
    (void)unused;
    g4_sequence *seq = engine_open_sequence(self);
    return seq ? PyLong_FromLong(g4_sequence_min_truncate(seq)) : NULL;
}

static PyObject *get_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    g4_sequence *seq = engine_open_sequence(self);
    return seq ? PyLong_FromSize_t(g4_sequence_bytes(seq)) : NULL;
}

static PyObject *get_closed(PyObject *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((sequence_object *)self)->seq == NULL);
}

static PyGetSetDef sequence_getset[] = {
    {"length", get_length, NULL, "Positions in the cache.", NULL},
    {"capacity", get_capacity, NULL, "Most positions it may hold.", NULL},
    {"kv_dtype", get_kv_dtype, NULL, "\"f32\", \"f16\", \"bf16\" or \"q8_0\".", NULL},
    {"closed", get_closed, NULL, "Whether close() was called.", NULL},
    {"min_truncate", get_min_truncate, NULL, "Smallest length > 0 that truncate() can go back to.", NULL},
    {"nbytes", get_nbytes, NULL, "Bytes of the cache.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef sequence_methods[] = {
    {"fork", sequence_fork, METH_NOARGS, "An independent copy (copy-on-write, per layer)."},
    {"truncate", sequence_truncate, METH_O, "Forget positions >= length."},
    {"close", sequence_close, METH_NOARGS, "Free the cache."},
    {"state", sequence_state, METH_NOARGS, "A copy of everything in the cache."},
    {"load_state", sequence_load_state, METH_O, "Fill an empty sequence from state()."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot sequence_slots[] = {
    {Py_tp_doc, "One timeline of positions with its cached keys and values. Made by Model.new_sequence()."},
    {Py_tp_dealloc, sequence_dealloc},
    {Py_tp_methods, sequence_methods},
    {Py_tp_getset, sequence_getset},
    {0, NULL},
};

PyType_Spec engine_sequence_spec = {"gemma4._engine.Sequence", sizeof(sequence_object), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, sequence_slots};
