/* SPDX-License-Identifier: Apache-2.0 */
/* The type Encoder: an image or audio encoder of a model. Interface: gemma4/_engine.pyi. */
#include "python/engine.h"

typedef struct {
    PyObject_HEAD model_object *owner;
    g4_encoder *encoder;
    Py_buffer *buffers; /* keep the weights' memory valid */
    size_t n_buffers;
} encoder_object;

/* ---- configuration ----------------------------------------------------------------------------------------------- */

static const char *const kind_names[] = {"vision_tower", "vision_embedder", "audio_tower", "audio_embedder"};

static int read_kind(PyObject *dict, g4_encoder_kind *kind)
{
    PyObject *value = PyDict_Check(dict) ? PyDict_GetItemString(dict, "kind") : NULL;
    const char *name = value && PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, NULL) : NULL;
    for (int i = 0; name && i <= G4_AUDIO_EMBEDDER; i++)
        if (strcmp(name, kind_names[i]) == 0) {
            *kind = (g4_encoder_kind)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "encoder config: unknown kind %R", value ? value : Py_None);
    return -1;
}

static int read_common(PyObject *dict, g4_encoder_config *c)
{
    return read_kind(dict, &c->kind) || engine_read_int(dict, "d_in", &c->d_in) ||
           engine_read_int(dict, "d_soft", &c->d_soft) || engine_read_int(dict, "d_out", &c->d_out) ||
           engine_read_float(dict, "rms_norm_eps", &c->rms_norm_eps) || engine_read_bool(dict, "on_disk", &c->on_disk);
}

static int read_tower(PyObject *dict, g4_encoder_config *c)
{
    return engine_read_int(dict, "d_model", &c->d_model) || engine_read_int(dict, "n_layers", &c->n_layers) ||
           engine_read_int(dict, "n_heads", &c->n_heads) || engine_read_int(dict, "n_kv_heads", &c->n_kv_heads) ||
           engine_read_int(dict, "head_dim", &c->head_dim) || engine_read_int(dict, "d_mlp", &c->d_mlp) ||
           engine_read_bool(dict, "clipped", &c->clipped);
}

static int read_vision(PyObject *dict, g4_encoder_config *c, PyArrayObject **inv_freq)
{
    if (engine_read_int(dict, "n_positions", &c->n_positions) || engine_read_int(dict, "pool", &c->pool) ||
        engine_read_bool(dict, "standardize", &c->standardize))
        return -1;
    const npy_intp quarter[] = {c->head_dim / 4};
    PyObject *array = PyDict_GetItemString(dict, "rope_inv_freq");
    *inv_freq = engine_check_array(array ? array : Py_None, NPY_FLOAT32, 1, quarter, "encoder config: rope_inv_freq");
    if (!*inv_freq)
        return -1;
    c->rope_inv_freq = PyArray_DATA(*inv_freq);
    return 0;
}

static int read_audio(PyObject *dict, g4_encoder_config *c)
{
    PyObject *channels = PyDict_GetItemString(dict, "conv_channels");
    if (!channels || !PyTuple_Check(channels) ||
        !PyArg_ParseTuple(channels, "ii", &c->conv_channels[0], &c->conv_channels[1])) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "encoder config: conv_channels is no pair of integers");
        return -1;
    }
    return engine_read_int(dict, "conv_kernel", &c->conv_kernel) || engine_read_int(dict, "chunk", &c->chunk) ||
           engine_read_int(dict, "context_left", &c->context_left) ||
           engine_read_int(dict, "context_right", &c->context_right) ||
           engine_read_float(dict, "logit_cap", &c->logit_cap) ||
           engine_read_float(dict, "residual_weight", &c->residual_weight) ||
           engine_read_float(dict, "gradient_clipping", &c->gradient_clipping);
}

static int read_config(PyObject *dict, g4_encoder_config *c)
{
    PyArrayObject *inv_freq = NULL; /* borrowed from the dict */
    memset(c, 0, sizeof *c);
    if (read_common(dict, c))
        return -1;
    switch (c->kind) {
    case G4_VISION_TOWER: return read_tower(dict, c) || read_vision(dict, c, &inv_freq);
    case G4_VISION_EMBEDDER:
        return engine_read_int(dict, "d_model", &c->d_model) || engine_read_int(dict, "n_positions", &c->n_positions);
    case G4_AUDIO_TOWER: return read_tower(dict, c) || read_audio(dict, c);
    default: return 0;
    }
}

/* encoder_tensors(config) -> [(name, shape)] */
PyObject *engine_encoder_tensors(PyObject *self, PyObject *config)
{
    g4_encoder_config c;
    g4_error err;
    (void)self;
    if (read_config(config, &c))
        return NULL;
    PyObject *list = PyList_New(0);
    return engine_listed(list, list ? g4_encoder_tensors(&c, engine_append_tensor, list, &err) : G4_OK, &err);
}

/* ---- creation -------------------------------------------------------------------------------------------------- */

static int build(encoder_object *self, PyObject *config, PyObject *items)
{
    g4_encoder_config c;
    g4_error err;
    g4_status status;
    if (read_config(config, &c))
        return -1;
    g4_named_tensor *tensors = engine_read_tensors(items, &self->buffers, &self->n_buffers);
    if (!tensors)
        return -1;
    engine_gil gil = {PyEval_SaveThread()};
    status = g4_encoder_new(self->owner->model, &c, tensors, self->n_buffers, engine_poll_signals, &gil, &self->encoder,
                            &err);
    PyEval_RestoreThread(gil.state);
    PyMem_Free(tensors);
    if (status != G4_OK)
        engine_raise(&err);
    return status == G4_OK ? 0 : -1;
}

static bool is_model(PyObject *encoder, PyObject *object)
{
    PyObject *module = PyType_GetModule(Py_TYPE(encoder));
    PyObject *type = module ? PyObject_GetAttrString(module, "Model") : NULL;
    bool is = type && PyObject_TypeCheck(object, (PyTypeObject *)type);
    Py_XDECREF(type);
    if (!is && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "an encoder needs a Model, got %R", (PyObject *)Py_TYPE(object));
    return is;
}

static int encoder_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"model", "config", "tensors", NULL};
    encoder_object *self = (encoder_object *)object;
    PyObject *model, *config, *mapping;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO", names, &model, &config, &mapping))
        return -1;
    if (self->owner) {
        PyErr_SetString(PyExc_RuntimeError, "this encoder is initialised already");
        return -1;
    }
    if (!is_model(object, model) || !engine_ready((model_object *)model))
        return -1;
    PyObject *items = PyMapping_Items(mapping);
    if (!items)
        return -1;
    self->owner = (model_object *)Py_NewRef(model);
    int failed = build(self, config, items);
    Py_DECREF(items);
    return failed;
}

static void encoder_dealloc(PyObject *object)
{
    encoder_object *self = (encoder_object *)object;
    g4_encoder_free(self->encoder);
    engine_release_buffers(self->buffers, self->n_buffers);
    Py_XDECREF((PyObject *)self->owner);
    engine_free(object);
}

static bool encoder_ready(const encoder_object *self)
{
    if (!self->encoder)
        PyErr_SetString(PyExc_RuntimeError, "this encoder was never initialised");
    return self->encoder != NULL;
}

/* ---- encode ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const encoder_object *self;
    PyObject *medium_tuple; /* owns every array in use */
    g4_medium *media;
    int n_media;
    engine_taps taps;
    engine_gil gil;
} encode_args;

static int read_positions(PyObject *object, g4_medium *medium)
{
    const npy_intp dims[] = {medium->n_rows, 2};
    PyArrayObject *array = engine_check_array(object, NPY_INT32, 2, dims, "positions");
    if (!array)
        return -1;
    /* copied, so that no other thread can change them while the engine runs */
    const size_t n_bytes = (size_t)medium->n_rows * 2 * sizeof(int32_t);
    int32_t *copy = PyMem_Malloc(n_bytes + 1);
    if (!copy) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(copy, PyArray_DATA(array), n_bytes);
    medium->positions = copy;
    return 0;
}

static int read_medium(const encode_args *a, PyObject *tuple, g4_medium *medium)
{
    const g4_encoder_config *c = g4_encoder_config_of(a->self->encoder);
    PyObject *rows, *positions, *soft;
    if (!PyTuple_Check(tuple) ||
        !PyArg_ParseTuple(tuple, "OOO;a medium is (rows, positions, soft)", &rows, &positions, &soft)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a medium is a tuple (rows, positions, soft)");
        return -1;
    }
    const npy_intp row_dims[] = {-1, c->d_in};
    PyArrayObject *array = engine_check_array(rows, NPY_FLOAT32, 2, row_dims, "rows of a medium");
    if (!array)
        return -1;
    if (PyArray_DIM(array, 0) > 1 << 20) {
        PyErr_Format(PyExc_ValueError, "a medium of %zd rows: at most 1048576", PyArray_DIM(array, 0));
        return -1;
    }
    medium->n_rows = (int)PyArray_DIM(array, 0);
    medium->rows = PyArray_DATA(array);
    if (g4_encoder_has_positions(c) && read_positions(positions, medium))
        return -1;
    const npy_intp soft_dims[] = {g4_encoder_soft_tokens(c, medium->n_rows), c->d_out};
    array = engine_check_array(soft, NPY_FLOAT32, 2, soft_dims, "soft tokens");
    if (!array || PyArray_FailUnlessWriteable(array, "soft tokens"))
        return -1;
    medium->soft = PyArray_DATA(array);
    return 0;
}

static bool site_exists(void *context, g4_site site, int layer)
{
    const encode_args *a = context;
    return g4_encoder_site_exists(g4_encoder_config_of(a->self->encoder), site, layer);
}

static int site_shape(void *context, const g4_tap *tap, int64_t shape[G4_MAX_DIMS])
{
    const encode_args *a = context;
    return g4_encoder_site_shape(g4_encoder_config_of(a->self->encoder), tap->site, a->media[tap->run].n_rows, shape);
}

static int read_args(encode_args *a, PyObject *media, PyObject *taps)
{
    a->medium_tuple = PySequence_Tuple(media);
    if (!a->medium_tuple)
        return -1;
    const size_t n_media = (size_t)PyTuple_Size(a->medium_tuple);
    a->media = PyMem_Calloc(n_media + 1, sizeof *a->media);
    if (!a->media || n_media > 1 << 16) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < n_media; i++) {
        a->n_media = (int)i + 1;
        if (read_medium(a, PyTuple_GetItem(a->medium_tuple, (Py_ssize_t)i), &a->media[i]))
            return -1;
    }
    const engine_tap_owner owner = {a, &a->gil, "medium", a->n_media, site_exists, site_shape};
    return engine_read_taps(taps, &owner, &a->taps);
}

static void release_args(encode_args *a)
{
    engine_release_taps(&a->taps);
    for (int i = 0; i < a->n_media; i++)
        PyMem_Free((void *)a->media[i].positions);
    PyMem_Free(a->media);
    Py_XDECREF(a->medium_tuple);
}

static PyObject *encoder_encode(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"media", "taps", "profile", NULL};
    encode_args a = {.self = (encoder_object *)object};
    PyObject *media, *taps = NULL, *profile_array = Py_None;
    g4_profile *profile = NULL;
    g4_error err = {0};
    if (!encoder_ready(a.self) ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$O", names, &media, &taps, &profile_array) ||
        engine_read_profile(profile_array, &profile))
        return NULL;
    g4_status status = G4_EVALUE;
    if (read_args(&a, media, taps) == 0) {
        a.gil.state = PyEval_SaveThread();
        status = g4_encode(a.self->encoder, a.media, a.n_media, a.taps.taps, a.taps.n, engine_poll_signals, &a.gil,
                           profile, &err);
        PyEval_RestoreThread(a.gil.state);
        if (status != G4_OK)
            engine_raise(&err);
    }
    release_args(&a);
    if (status != G4_OK)
        return NULL;
    Py_RETURN_NONE;
}

/* ---- attributes -------------------------------------------------------------------------------------------------- */

static bool has_site(void *config, g4_site site, int layer)
{
    return g4_encoder_site_exists(config, site, layer);
}

static int shape_of_no_rows(void *config, g4_site site, int layer, int64_t shape[G4_MAX_DIMS])
{
    (void)layer;
    return g4_encoder_site_shape(config, site, 0, shape);
}

static PyObject *encoder_sites(PyObject *object, PyObject *unused)
{
    encoder_object *self = (encoder_object *)object;
    (void)unused;
    if (!encoder_ready(self))
        return NULL;
    const g4_encoder_config *c = g4_encoder_config_of(self->encoder);
    return engine_list_sites(&(engine_site_owner){(void *)c, c->n_layers, has_site, shape_of_no_rows});
}

static PyObject *encoder_soft_tokens(PyObject *object, PyObject *n_rows)
{
    encoder_object *self = (encoder_object *)object;
    if (!encoder_ready(self))
        return NULL;
    long n = PyLong_AsLong(n_rows);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    if (n < 0 || n > 1 << 20)
        return PyErr_Format(PyExc_ValueError, "%ld rows: expected 0 to 1048576", n);
    return PyLong_FromLong(g4_encoder_soft_tokens(g4_encoder_config_of(self->encoder), (int)n));
}

static PyObject *get_weight_bytes(PyObject *object, void *unused)
{
    encoder_object *self = (encoder_object *)object;
    (void)unused;
    return encoder_ready(self) ? PyLong_FromSize_t(g4_encoder_weight_bytes(self->encoder)) : NULL;
}

static PyObject *get_copied_bytes(PyObject *object, void *unused)
{
    encoder_object *self = (encoder_object *)object;
    (void)unused;
    return encoder_ready(self) ? PyLong_FromSize_t(g4_encoder_copied_bytes(self->encoder)) : NULL;
}

static PyGetSetDef encoder_getset[] = {
    {"copied_bytes", get_copied_bytes, NULL, "Bytes of its own copy of weights, besides those.", NULL},
    {"weight_bytes", get_weight_bytes, NULL, "Bytes of all tensors in use.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef encoder_methods[] = {
    {"encode", (PyCFunction)(void (*)(void))encoder_encode, METH_VARARGS | METH_KEYWORDS,
     "Media to soft tokens, all in one ragged pass."},
    {"sites", encoder_sites, METH_NOARGS, "Every site of this encoder: (name, site id, layer, dims, facts …)."},
    {"soft_tokens", encoder_soft_tokens, METH_O, "Soft tokens of a medium of so many rows."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot encoder_slots[] = {
    {Py_tp_doc, "An image or audio encoder. Encoder(model, config, tensors)"},
    {Py_tp_init, encoder_init},
    {Py_tp_dealloc, encoder_dealloc},
    {Py_tp_methods, encoder_methods},
    {Py_tp_getset, encoder_getset},
    {0, NULL},
};

PyType_Spec engine_encoder_spec = {"gemma4._engine.Encoder", sizeof(encoder_object), 0, Py_TPFLAGS_DEFAULT,
                                   encoder_slots};
