/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>

#include "python/engine.h"

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

static int read_shape(PyObject *shape, const char *name, g4_named_tensor *tensor, size_t *n_elements)
{
    *n_elements = 1;
    if (!PyTuple_Check(shape) || PyTuple_Size(shape) > G4_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "tensor %s: expected a shape of at most %d axes", name, G4_MAX_DIMS);
        return -1;
    }
    tensor->n_dims = (int)PyTuple_Size(shape);
    for (int i = 0; i < tensor->n_dims; i++) {
        long long size = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        if (size < 0 || __builtin_mul_overflow(*n_elements, (size_t)size, n_elements)) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_ValueError, "tensor %s: impossible shape", name);
            return -1;
        }
        tensor->shape[i] = size;
    }
    return 0;
}

int engine_read_tensor(const char *name, PyObject *value, g4_named_tensor *tensor, Py_buffer *view)
{
    const char *dtype_name;
    PyObject *shape, *buffer;
    Py_ssize_t offset;
    size_t n_elements, n_bytes;
    tensor->name = name;
    if (name && !PyTuple_Check(value))
        PyErr_Format(PyExc_TypeError, "tensor %s: expected (dtype, shape, buffer, byte offset), got %R", name, value);
    if (PyErr_Occurred() || !PyArg_ParseTuple(value, "sOOn", &dtype_name, &shape, &buffer, &offset) ||
        read_shape(shape, tensor->name, tensor, &n_elements))
        return -1;
    tensor->dtype = g4_dtype_parse(dtype_name);
    if (tensor->dtype == G4_N_DTYPES) {
        g4_error err;
        g4_fail(&err, G4_EFORMAT, "tensor %s has dtype %s, which this engine does not know", tensor->name, dtype_name);
        engine_raise(&err);
        return -1;
    }
    if (PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE))
        return -1;
    bool fits =
        offset >= 0 && offset <= view->len &&
        !__builtin_mul_overflow(n_elements / g4_block_size(tensor->dtype), g4_block_bytes(tensor->dtype), &n_bytes) &&
        n_bytes <= (size_t)(view->len - offset);
    if (fits)
        tensor->data = (const char *)view->buf + offset;
    if (!fits || (uintptr_t)tensor->data % g4_dtype_alignment(tensor->dtype)) {
        g4_error err;
        g4_fail(&err, G4_EFORMAT, "tensor %s at byte %zd does not lie (aligned) within its file of %zd bytes",
                tensor->name, offset, view->len);
        engine_raise(&err);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

void engine_release_buffers(Py_buffer *views, size_t n)
{
    for (size_t i = 0; i < n; i++)
        PyBuffer_Release(&views[i]);
    PyMem_Free(views);
}

/* Reads a pair (name, tensor). */
static int read_item(PyObject *item, g4_named_tensor *tensor, Py_buffer *view)
{
    PyObject *name, *value;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "UO", &name, &value)) {
        PyErr_Format(PyExc_TypeError, "tensors: expected pairs (name, tensor), got %R", item);
        return -1;
    }
    return engine_read_tensor(PyUnicode_AsUTF8AndSize(name, NULL), value, tensor, view);
}

g4_named_tensor *engine_read_tensors(PyObject *items, Py_buffer **views, size_t *n)
{
    const size_t n_items = (size_t)PyList_Size(items);
    g4_named_tensor *tensors = PyMem_Calloc(n_items + 1, sizeof *tensors);
    *views = PyMem_Calloc(n_items + 1, sizeof **views);
    *n = 0;
    if (!tensors || !*views) {
        PyMem_Free(tensors);
        PyErr_NoMemory();
        return NULL;
    }
    for (; *n < n_items; ++*n) {
        if (read_item(PyList_GetItem(items, (Py_ssize_t)*n), &tensors[*n], &(*views)[*n])) {
            PyMem_Free(tensors);
            return NULL;
        }
    }
    return tensors;
}

/* ---- the type ---------------------------------------------------------------------------------------------------- */

static int build(model_object *self, PyObject *config, PyObject *items, const g4_model_options *options)
{
    config_holder holder;
    g4_error err;
    g4_named_tensor *tensors = engine_read_tensors(items, &self->buffers, &self->n_buffers);
    if (!tensors || engine_config_read(config, &holder)) {
        PyMem_Free(tensors);
        return -1;
    }
    g4_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = g4_model_new(&holder.config, tensors, self->n_buffers, options, &self->model, &err);
    Py_END_ALLOW_THREADS;
    engine_config_release(&holder);
    PyMem_Free(tensors);
    if (status != G4_OK)
        engine_raise(&err);
    return status == G4_OK ? 0 : -1;
}

static const char *const precisions[] = {[G4_EXACT] = "exact", [G4_HIGH] = "high", [G4_FAST] = "fast"};

static bool parse_precision(const char *name, g4_precision *precision)
{
    for (int p = G4_EXACT; p <= G4_FAST; p++)
        if (strcmp(name, precisions[p]) == 0) {
            *precision = (g4_precision)p;
            return true;
        }
    PyErr_Format(PyExc_ValueError, "precision=\"%s\": expected \"exact\", \"high\" or \"fast\"", name);
    return false;
}

static int model_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"config", "tensors", "threads", "precision", NULL};
    model_object *self = (model_object *)object;
    PyObject *config, *mapping;
    const char *precision = "exact";
    g4_model_options options = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$is", names, &config, &mapping, &options.n_threads, &precision))
        return -1;
    if (self->model) {
        PyErr_SetString(PyExc_RuntimeError, "this model is initialised already");
        return -1;
    }
    if (!parse_precision(precision, &options.precision))
        return -1;
    PyObject *items = PyMapping_Items(mapping);
    if (!items)
        return -1;
    int failed = build(self, config, items, &options);
    Py_DECREF(items);
    if (failed) {
        engine_release_buffers(self->buffers, self->n_buffers);
        self->buffers = NULL;
        self->n_buffers = 0;
    }
    return failed;
}

static void model_dealloc(PyObject *object)
{
    model_object *self = (model_object *)object;
    if (self->model) {
        Py_BEGIN_ALLOW_THREADS;
        g4_model_free(self->model);
        Py_END_ALLOW_THREADS;
    }
    engine_release_buffers(self->buffers, self->n_buffers);
    engine_free(object);
}

bool engine_ready(const model_object *self)
{
    if (!self->model)
        PyErr_SetString(PyExc_RuntimeError, "this model was never initialised");
    return self->model != NULL;
}

static PyObject *model_new_sequence(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"kv_dtype", "capacity", NULL};
    model_object *self = (model_object *)object;
    const char *dtype_name = "f32";
    int capacity = 0;
    g4_sequence *seq;
    g4_error err;
    if (!engine_ready(self) || !PyArg_ParseTupleAndKeywords(args, kwargs, "|$si", names, &dtype_name, &capacity))
        return NULL;
    const g4_dtype dtype = engine_kv_dtype(dtype_name);
    if (dtype == G4_N_DTYPES)
        return PyErr_Format(PyExc_ValueError, "kv_dtype=\"%s\": expected \"f32\", \"f16\", \"bf16\" or \"q8_0\"",
                            dtype_name);
    if (g4_sequence_new(self->model, dtype, capacity, &seq, &err) != G4_OK)
        return engine_raise(&err);
    return engine_sequence_wrap(self, seq);
}

static bool site_exists(void *config, g4_site site, int layer)
{
    return g4_site_exists(config, site, layer);
}

static int site_shape(void *config, g4_site site, int layer, int64_t shape[G4_MAX_DIMS])
{
    return g4_site_shape(config, site, layer, 0, 0, shape);
}

static PyObject *model_sites(PyObject *object, PyObject *unused)
{
    model_object *self = (model_object *)object;
    (void)unused;
    if (!engine_ready(self))
        return NULL;
    const g4_config *config = g4_model_config(self->model);
    return engine_list_sites(&(engine_site_owner){(void *)config, config->n_layers, site_exists, site_shape});
}

static PyObject *get_threads(PyObject *self, void *unused)
{
    (void)unused;
    return engine_ready((model_object *)self) ? PyLong_FromLong(g4_model_threads(((model_object *)self)->model)) : NULL;
}

static PyObject *get_precision(PyObject *self, void *unused)
{
    (void)unused;
    if (!engine_ready((model_object *)self))
        return NULL;
    return PyUnicode_FromString(precisions[g4_model_precision(((model_object *)self)->model)]);
}

static PyObject *get_isa(PyObject *self, void *unused)
{
    (void)unused;
    return engine_ready((model_object *)self) ? PyUnicode_FromString(g4_model_isa(((model_object *)self)->model))
                                              : NULL;
}

static PyObject *get_weight_bytes(PyObject *self, void *unused)
{
    (void)unused;
    return engine_ready((model_object *)self) ? PyLong_FromSize_t(g4_model_weight_bytes(((model_object *)self)->model))
                                              : NULL;
}

static PyGetSetDef model_getset[] = {
    {"threads", get_threads, NULL, "Threads of the pool, the caller included.", NULL},
    {"precision", get_precision, NULL, "\"exact\", \"high\" or \"fast\".", NULL},
    {"isa", get_isa, NULL, "Instruction set in use.", NULL},
    {"weight_bytes", get_weight_bytes, NULL, "Bytes of all tensors in use.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef model_methods[] = {
    {"new_sequence", (PyCFunction)(void (*)(void))model_new_sequence, METH_VARARGS | METH_KEYWORDS,
     "An empty sequence."},
    {"sites", model_sites, METH_NOARGS, "Every site of this model: (name, site id, layer, dims, facts …)."},
    {"step", (PyCFunction)(void (*)(void))engine_model_step, METH_VARARGS | METH_KEYWORDS, "One ragged forward pass."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot model_slots[] = {
    {Py_tp_doc, "Weights bound to a configuration. Model(config, tensors, *, threads=0, precision=\"exact\")"},
    {Py_tp_init, model_init},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_getset},
    {0, NULL},
};

PyType_Spec engine_model_spec = {"gemma4._engine.Model", sizeof(model_object), 0, Py_TPFLAGS_DEFAULT, model_slots};
