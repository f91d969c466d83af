/* SPDX-License-Identifier: Apache-2.0 */
#include "python/engine.h"

static PyObject *get_item(PyObject *dict, const char *key)
{
    PyObject *value = PyDict_Check(dict) ? PyDict_GetItemString(dict, key) : NULL;
    if (!value)
        PyErr_Format(PyExc_ValueError, "config: no \"%s\"", key);
    return value; /* borrowed */
}

int engine_read_int(PyObject *dict, const char *key, int *out)
{
    PyObject *value = get_item(dict, key);
    if (!value)
        return -1;
    long number = PyLong_AsLong(value);
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number < -(1L << 30) || number > 1L << 30) {
        PyErr_Format(PyExc_ValueError, "config: %s is %ld", key, number);
        return -1;
    }
    *out = (int)number;
    return 0;
}

int engine_read_float(PyObject *dict, const char *key, float *out)
{
    PyObject *value = get_item(dict, key);
    if (!value)
        return -1;
    double number = PyFloat_AsDouble(value);
    *out = (float)number;
    return number == -1 && PyErr_Occurred() ? -1 : 0;
}

int engine_read_bool(PyObject *dict, const char *key, bool *out)
{
    PyObject *value = get_item(dict, key);
    int truth = value ? PyObject_IsTrue(value) : -1;
    *out = truth > 0;
    return truth < 0 ? -1 : 0;
}

static int read_layer(PyObject *dict, g4_layer_config *layer)
{
    return engine_read_int(dict, "window", &layer->window) || engine_read_int(dict, "ahead", &layer->ahead) ||
           engine_read_int(dict, "head_dim", &layer->head_dim) ||
           engine_read_int(dict, "n_kv_heads", &layer->n_kv_heads) || engine_read_int(dict, "d_mlp", &layer->d_mlp) ||
           engine_read_int(dict, "kv_source", &layer->kv_source) || engine_read_int(dict, "rope", &layer->rope) ||
           engine_read_bool(dict, "k_eq_v", &layer->k_eq_v) || engine_read_bool(dict, "moe", &layer->moe);
}

static int read_layers(PyObject *dict, config_holder *holder)
{
    PyObject *list = get_item(dict, "layers");
    if (!list || !PyList_Check(list)) {
        if (list)
            PyErr_SetString(PyExc_ValueError, "config: layers is not a list");
        return -1;
    }
    Py_ssize_t n = PyList_Size(list);
    if (n < 1 || n > 1 << 12) {
        PyErr_Format(PyExc_ValueError, "config: %zd layers, expected 1 to 4096", n);
        return -1;
    }
    holder->layers = PyMem_Calloc((size_t)n, sizeof *holder->layers);
    if (!holder->layers) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_layer(PyList_GetItem(list, i), &holder->layers[i]))
            return -1;
    holder->config.n_layers = (int)n;
    holder->config.layers = holder->layers;
    return 0;
}

static int read_ropes(PyObject *dict, config_holder *holder)
{
    PyObject *list = get_item(dict, "rope_inv_freq");
    if (!list || !PyList_Check(list) || PyList_Size(list) > G4_MAX_ROPES) {
        if (list)
            PyErr_Format(PyExc_ValueError, "config: rope_inv_freq is not a list of at most %d arrays", G4_MAX_ROPES);
        return -1;
    }
    for (Py_ssize_t r = 0; r < PyList_Size(list); r++) {
        PyObject *array = PyArray_FROM_OTF(PyList_GetItem(list, r), NPY_FLOAT32, NPY_ARRAY_CARRAY_RO);
        if (!array)
            return -1;
        holder->inv_freq[r] = (PyArrayObject *)array;
        holder->config.rope_inv_freq[r] = PyArray_DATA(holder->inv_freq[r]);
        if (PyArray_NDIM(holder->inv_freq[r]) != 1 || PyArray_SIZE(holder->inv_freq[r]) > 1 << 14) {
            PyErr_SetString(PyExc_ValueError, "config: rope_inv_freq: expected one-dimensional arrays");
            return -1;
        }
        holder->config.rope_half[r] = (int)PyArray_SIZE(holder->inv_freq[r]);
        holder->config.n_ropes = (int)r + 1;
    }
    return 0;
}

int engine_config_read(PyObject *dict, config_holder *holder)
{
    g4_config *c = &holder->config;
    memset(holder, 0, sizeof *holder);
    if (engine_read_int(dict, "d_model", &c->d_model) || engine_read_int(dict, "n_heads", &c->n_heads) ||
        engine_read_int(dict, "d_vocab", &c->d_vocab) || engine_read_int(dict, "d_ple", &c->d_ple) ||
        engine_read_int(dict, "d_vocab_ple", &c->d_vocab_ple) ||
        engine_read_int(dict, "context_length", &c->context_length) ||
        engine_read_int(dict, "n_experts", &c->n_experts) ||
        engine_read_int(dict, "top_k_experts", &c->top_k_experts) || engine_read_int(dict, "d_expert", &c->d_expert) ||
        engine_read_float(dict, "rms_norm_eps", &c->rms_norm_eps) ||
        engine_read_float(dict, "logit_softcap", &c->logit_softcap) ||
        engine_read_float(dict, "embed_scale", &c->embed_scale) ||
        engine_read_float(dict, "ple_scale", &c->ple_scale) || engine_read_int(dict, "pad_token", &c->pad_token) ||
        engine_read_bool(dict, "ple_on_disk", &c->ple_on_disk) ||
        engine_read_float(dict, "attention_scale", &c->attention_scale) ||
        engine_read_float(dict, "attention_softcap", &c->attention_softcap) ||
        engine_read_bool(dict, "q_norm", &c->q_norm) || engine_read_bool(dict, "k_norm", &c->k_norm) ||
        engine_read_bool(dict, "v_norm", &c->v_norm) || engine_read_bool(dict, "post_norms", &c->post_norms) ||
        engine_read_bool(dict, "layer_scalar", &c->layer_scalar) ||
        engine_read_bool(dict, "unit_gains", &c->unit_gains) || engine_read_bool(dict, "tied", &c->tied) ||
        read_layers(dict, holder) || read_ropes(dict, holder)) {
        engine_config_release(holder);
        return -1;
    }
    return 0;
}

void engine_config_release(config_holder *holder)
{
    PyMem_Free(holder->layers);
    for (int r = 0; r < G4_MAX_ROPES; r++)
        Py_XDECREF((PyObject *)holder->inv_freq[r]);
    memset(holder, 0, sizeof *holder);
}

/* ---- the tensors that a config needs ------------------------------------------------------------------------- */

void engine_append_tensor(void *list, const char *name, const int64_t *shape, int n_dims)
{
    if (PyErr_Occurred())
        return;
    PyObject *axes = PyTuple_New(n_dims);
    for (int i = 0; axes && i < n_dims; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (size)
            PyTuple_SetItem(axes, i, size);
        else
            Py_CLEAR(axes);
    }
    PyObject *row = axes ? Py_BuildValue("(sN)", name, axes) : NULL;
    if (row)
        PyList_Append(list, row);
    Py_XDECREF(row);
}

PyObject *engine_listed(PyObject *list, g4_status status, const g4_error *err)
{
    if (status != G4_OK)
        engine_raise(err);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

/* text_tensors(config) -> [(name, shape)] */
PyObject *engine_text_tensors(PyObject *self, PyObject *config)
{
    config_holder holder;
    g4_error err;
    (void)self;
    if (engine_config_read(config, &holder))
        return NULL;
    PyObject *list = PyList_New(0);
    g4_status status = list ? g4_text_tensors(&holder.config, engine_append_tensor, list, &err) : G4_OK;
    engine_config_release(&holder);
    return engine_listed(list, status, &err);
}
