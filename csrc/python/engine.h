/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's Python bindings: argument conversion, array results, error mapping. Interface: gemma4/_engine.pyi. Only
 * the stable ABI of Python 3.11 is used (Py_LIMITED_API), so one wheel serves every later version. */
#ifndef GEMMA4_PYTHON_ENGINE_H
#define GEMMA4_PYTHON_ENGINE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define PY_ARRAY_UNIQUE_SYMBOL gemma4_engine_array_api
#ifndef G4_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "gemma4.h"

typedef struct {
    PyObject_HEAD g4_model *model;
    Py_buffer *buffers; /* keep the weights' memory valid */
    size_t n_buffers;
} model_object;

typedef struct {
    PyObject_HEAD model_object *owner;
    g4_sequence *seq; /* NULL: closed */
} sequence_object;

/* Frees the object; every tp_dealloc ends with this call. */
static inline void engine_free(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

/* errors.c: sets the exception for err->status, unless an exception is set already; returns NULL. */
PyObject *engine_raise(const g4_error *err);

/* callbacks.c. The thread state that a call released; callbacks reacquire it while they run. */
typedef struct {
    PyThreadState *state;
} engine_gil;

typedef struct {
    engine_gil *gil;
    PyObject *callable;
    g4_site site;
    int layer;
} engine_edit;

int engine_poll_signals(void *gil);
g4_status engine_run_edit(void *edit, void *data, const int64_t *shape, int n_dims, g4_error *err);
int engine_site_type(g4_site site); /* NPY_FLOAT32 or NPY_INT32 */

/* Checks that `object` is a C-contiguous array of this type and shape (-1: any size); else NULL and an exception. */
PyArrayObject *engine_check_array(PyObject *object, int type, int n_dims, const npy_intp *dims, const char *what);

/* sites.c. The model or encoder whose sites are listed. shape: sizes for 0 rows; returns the number of axes. */
typedef struct {
    void *context;
    int n_layers;
    bool (*exists)(void *context, g4_site site, int layer);
    int (*shape)(void *context, g4_site site, int layer, int64_t shape[G4_MAX_DIMS]);
} engine_site_owner;
PyObject *engine_list_sites(const engine_site_owner *owner);

/* taps.c. The valid targets of taps: runs of a step, or media of an encoder's pass. */
typedef struct {
    void *context;
    engine_gil *gil;
    const char *run_name; /* for messages: "run", "medium" */
    int n_runs;
    bool (*exists)(void *context, g4_site site, int layer);
    int (*shape)(void *context, const g4_tap *tap, int64_t shape[G4_MAX_DIMS]); /* returns the number of axes */
} engine_tap_owner;

typedef struct {
    PyObject *tuple; /* owns every array in use */
    g4_tap *taps;
    engine_edit *edits;
    int n;
} engine_taps;

/* Reads tuples (site, layer, run, array, callable or edit[, rows]); an edit is a tuple of its own (read_edit). Call engine_release_taps also after a failure. */
int engine_read_taps(PyObject *object, const engine_tap_owner *owner, engine_taps *taps);
void engine_release_taps(engine_taps *taps);

/* Copies a one-dimensional int32 array; free it with PyMem_Free. None: *copy NULL and *n -1. */
int engine_copy_ints(PyObject *object, const char *what, int32_t **copy, int *n);

/* pick.c. Reads None or a tuple (k, within, with_sum, ids int32 [n, V], values float32 [n, V] (None if nothing is listed), found float64 [n,
 * ENGINE_FOUND]); release also after a failure. engine_return_picks writes best, top, length and log_sum of each row to
 * `found`. */
enum { ENGINE_FOUND = 4 };
typedef struct {
    g4_pick *rows; /* [n]; NULL: None was given */
    double *found;
    int n;
} engine_picks;
int engine_read_picks(PyObject *object, int n, int n_vocab, engine_picks *picks);
void engine_return_picks(const engine_picks *picks);
void engine_release_picks(engine_picks *picks);
PyObject *engine_top_logits(PyObject *self, PyObject *args);
PyObject *engine_nucleus_floor(PyObject *self, PyObject *args);
PyObject *engine_draw(PyObject *self, PyObject *args);

/* model.c, sequence.c, step.c, encoder.c, map.c, testing.c */
extern PyType_Spec engine_model_spec, engine_sequence_spec, engine_encoder_spec, engine_map_spec;
extern PyType_Spec engine_threads_spec, engine_features_spec;          /* features.c */
g4_sequence *engine_open_sequence(PyObject *object);                   /* NULL: closed, and an exception is set */
bool engine_lock(g4_sequence *seq);                                    /* false: in use, and an exception is set */
PyObject *engine_sequence_wrap(model_object *owner, g4_sequence *seq); /* takes ownership of seq, also on failure */
PyTypeObject *engine_sequence_type(PyObject *model);                   /* borrowed */
g4_dtype engine_kv_dtype(const char *name);                            /* G4_N_DTYPES: unknown name */
int engine_read_profile(PyObject *object, g4_profile **profile); /* an array or None; else nonzero and an exception */
PyObject *engine_model_step(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *engine_testing_module(void);

/* model.c. Reads `items`, a list of (name, tensor) pairs: n tensors, n views of their buffers; NULL: an exception. */
g4_named_tensor *engine_read_tensors(PyObject *items, Py_buffer **views, size_t *n);
void engine_release_buffers(Py_buffer *views, size_t n);
bool engine_ready(const model_object *model); /* false: an exception is set */

/* Reads (dtype, shape, buffer, byte offset): fills `tensor` and takes a view of the buffer. */
int engine_read_tensor(const char *name, PyObject *value, g4_named_tensor *tensor, Py_buffer *view);

/* config.c: read a value of a dict; nonzero and an exception if it is missing, no number or out of range. */
int engine_read_int(PyObject *dict, const char *key, int *out);
int engine_read_float(PyObject *dict, const char *key, float *out);
int engine_read_bool(PyObject *dict, const char *key, bool *out);

/* config.c: reads a dict of type Config (_engine.pyi); release with engine_config_release. */
typedef struct {
    g4_config config;
    g4_layer_config *layers;
    PyArrayObject *inv_freq[G4_MAX_ROPES];
} config_holder;
int engine_config_read(PyObject *dict, config_holder *holder);
void engine_config_release(config_holder *holder);

/* engine_append_tensor is a g4_tensor_fn whose context is a list: it appends (name, shape) unless an exception is set.
 * engine_listed then gives the result: the list, or NULL and an exception. */
void engine_append_tensor(void *list, const char *name, const int64_t *shape, int n_dims);
PyObject *engine_listed(PyObject *list, g4_status status, const g4_error *err);

PyObject *engine_text_tensors(PyObject *self, PyObject *config);    /* config.c */
PyObject *engine_encoder_tensors(PyObject *self, PyObject *config); /* encoder.c */

#endif
