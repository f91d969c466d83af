/* SPDX-License-Identifier: Apache-2.0 */
/* Model.step: runs and taps out of Python tuples. Integer arrays are copied, so that no other thread can change them
 * while the engine computes without the GIL; float arrays are used where they lie and kept alive. */
#include "python/engine.h"

typedef struct {
    model_object *model;
    PyObject *run_tuple, *tap_tuple; /* own every array in use */
    g4_run *runs;
    g4_tap *taps;
    engine_edit *edits;
    int n_runs, n_taps;
    engine_gil gil;
} step_args;

/* ---- arguments ------------------------------------------------------------------------------------------------------ */

/* A copy of a one-dimensional int32 array; None gives NULL and -1. */
static int copy_ints(PyObject *object, const char *what, int32_t **copy, int *n)
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

static int read_run(step_args *s, PyObject *tuple, g4_run *run)
{
    PyObject *sequence, *tokens, *embeddings, *rows, *logits;
    const g4_config *config = g4_model_config(s->model->model);
    int n_tokens, n_logits;
    int32_t *ints;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, "a run is a tuple (sequence, tokens, embeddings, logits_rows, logits)");
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "O!OOOO;a run is (sequence, tokens, embeddings, logits_rows, logits)",
                          engine_sequence_type((PyObject *)s->model), &sequence, &tokens, &embeddings, &rows, &logits))
        return -1;
    run->seq = ((sequence_object *)sequence)->seq;
    if (!run->seq) {
        g4_error err;
        g4_fail(&err, G4_ESTATE, "this sequence is closed: make a new one with new_sequence()");
        engine_raise(&err);
        return -1;
    }
    if (copy_ints(tokens, "tokens", &ints, &n_tokens))
        return -1;
    run->tokens = ints;
    run->n_rows = n_tokens;
    if (embeddings != Py_None) {
        const npy_intp dims[] = {n_tokens, config->d_model};
        PyArrayObject *array = engine_check_array(embeddings, NPY_FLOAT32, 2, dims, "embeddings");
        if (!array)
            return -1;
        run->embeddings = PyArray_DATA(array);
        run->n_rows = (int)PyArray_DIM(array, 0);
    }
    if (copy_ints(rows, "logits_rows", &ints, &n_logits))
        return -1;
    run->logits_rows = ints;
    run->n_logits = n_logits > 0 ? n_logits : 0;
    if (run->n_logits) {
        const npy_intp dims[] = {n_logits, config->d_vocab};
        PyArrayObject *array = engine_check_array(logits, NPY_FLOAT32, 2, dims, "logits");
        if (!array || PyArray_FailUnlessWriteable(array, "logits"))
            return -1;
        run->logits = PyArray_DATA(array);
    }
    return 0;
}

/* Whether dest has the site's shape, with any number of rows where the site has positions. */
static int read_destination(step_args *s, g4_tap *tap, PyObject *object)
{
    const g4_config *config = g4_model_config(s->model->model);
    const g4_run *run = &s->runs[tap->run];
    int64_t shape[G4_MAX_DIMS];
    npy_intp dims[G4_MAX_DIMS];
    int n_keys = g4_sequence_length(run->seq) + run->n_rows;
    int n_dims = g4_site_shape(config, tap->site, tap->layer, run->n_rows, n_keys, shape);
    const char *letters = g4_site_dims(tap->site);
    int row_axis = -1;
    for (int i = 0; i < n_dims; i++) {
        dims[i] = (npy_intp)shape[i];
        if (letters[i] == 'T')
            row_axis = i;
    }
    if (row_axis >= 0 && tap->rows)
        dims[row_axis] = -1;
    PyArrayObject *array = engine_check_array(object, g4_site_is_int32(tap->site) ? NPY_INT32 : NPY_FLOAT32, n_dims,
                                              dims, g4_site_name(tap->site));
    if (!array || PyArray_FailUnlessWriteable(array, "a capture"))
        return -1;
    tap->dest = PyArray_DATA(array);
    tap->n_dest_rows = row_axis >= 0 ? (int)PyArray_DIM(array, row_axis) : 0;
    return 0;
}

static int read_tap(step_args *s, PyObject *tuple, g4_tap *tap, engine_edit *edit)
{
    PyObject *target, *rows;
    int site, n_rows;
    int32_t *ints;
    if (!PyTuple_Check(tuple) || !PyArg_ParseTuple(tuple, "iiiOO;a tap is (site, layer, run, array or callable, rows)",
                                                   &site, &tap->layer, &tap->run, &target, &rows)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "a tap is a tuple (site, layer, run, array or callable, rows)");
        return -1;
    }
    const g4_config *config = g4_model_config(s->model->model);
    if (site < 0 || site >= G4_N_SITES || !g4_site_exists(config, (g4_site)site, tap->layer)) {
        PyErr_Format(PyExc_ValueError, "no site %d in layer %d", site, tap->layer);
        return -1;
    }
    if (tap->run < 0 || tap->run >= s->n_runs) {
        PyErr_Format(PyExc_ValueError, "a tap names run %d of %d", tap->run, s->n_runs);
        return -1;
    }
    tap->site = (g4_site)site;
    if (PyCallable_Check(target)) {
        *edit = (engine_edit){&s->gil, target, g4_site_is_int32(tap->site) ? NPY_INT32 : NPY_FLOAT32};
        tap->edit = engine_run_edit;
        tap->context = edit;
        return 0;
    }
    if (!strchr(g4_site_dims(tap->site), 'T')) /* keys and values in use: all of them */
        rows = Py_None;
    if (copy_ints(rows, "a tap's rows", &ints, &n_rows))
        return -1;
    tap->rows = ints;
    if (ints && n_rows != s->runs[tap->run].n_rows) {
        PyErr_Format(PyExc_ValueError, "a tap's rows: %d given for a run of %d positions", n_rows,
                     s->runs[tap->run].n_rows);
        return -1;
    }
    return read_destination(s, tap, target);
}

static int read_args(step_args *s, PyObject *runs, PyObject *taps)
{
    s->run_tuple = PySequence_Tuple(runs);
    s->tap_tuple = s->run_tuple ? taps ? PySequence_Tuple(taps) : PyTuple_New(0) : NULL;
    if (!s->tap_tuple)
        return -1;
    size_t n_runs = (size_t)PyTuple_GET_SIZE(s->run_tuple), n_taps = (size_t)PyTuple_GET_SIZE(s->tap_tuple);
    s->runs = PyMem_Calloc(n_runs + 1, sizeof *s->runs);
    s->taps = PyMem_Calloc(n_taps + 1, sizeof *s->taps);
    s->edits = PyMem_Calloc(n_taps + 1, sizeof *s->edits);
    if (!s->runs || !s->taps || !s->edits || n_runs > 1 << 20 || n_taps > 1 << 24) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < n_runs; i++) {
        s->n_runs = (int)i + 1;
        if (read_run(s, PyTuple_GET_ITEM(s->run_tuple, (Py_ssize_t)i), &s->runs[i]))
            return -1;
    }
    for (size_t i = 0; i < n_taps; i++) {
        s->n_taps = (int)i + 1;
        if (read_tap(s, PyTuple_GET_ITEM(s->tap_tuple, (Py_ssize_t)i), &s->taps[i], &s->edits[i]))
            return -1;
    }
    return 0;
}

static void release_args(step_args *s)
{
    for (int i = 0; i < s->n_runs; i++) {
        PyMem_Free((void *)s->runs[i].tokens);
        PyMem_Free((void *)s->runs[i].logits_rows);
    }
    for (int i = 0; i < s->n_taps; i++)
        PyMem_Free((void *)s->taps[i].rows);
    PyMem_Free(s->runs);
    PyMem_Free(s->taps);
    PyMem_Free(s->edits);
    Py_XDECREF(s->run_tuple);
    Py_XDECREF(s->tap_tuple);
}

/* float64 [operations, members of g4_op_total], which the caller's argument tuple keeps alive. */
int engine_read_profile(PyObject *object, g4_profile **profile)
{
    const npy_intp dims[] = {G4_N_OPS, (npy_intp)(sizeof(g4_op_total) / sizeof(double))};
    if (object == Py_None)
        return 0;
    PyArrayObject *array = engine_check_array(object, NPY_FLOAT64, 2, dims, "profile");
    if (!array || PyArray_FailUnlessWriteable(array, "profile"))
        return -1;
    *profile = PyArray_DATA(array);
    return 0;
}

PyObject *engine_model_step(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"runs", "taps", "stop_at_layer", "max_chunk", "profile", NULL};
    step_args s = {.model = (model_object *)self};
    g4_step_options options = {.stop_at_layer = -1, .poll = engine_poll_signals, .poll_context = &s.gil};
    PyObject *runs, *taps = NULL, *profile = Py_None;
    g4_error err = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$iiO", names, &runs, &taps, &options.stop_at_layer,
                                     &options.max_chunk, &profile) ||
        engine_read_profile(profile, &options.profile))
        return NULL;
    if (!s.model->model)
        return PyErr_Format(PyExc_RuntimeError, "this model was never initialised");
    g4_status status = G4_EVALUE;
    if (read_args(&s, runs, taps) == 0) {
        s.gil.state = PyEval_SaveThread();
        status = g4_step(s.model->model, s.runs, s.n_runs, s.taps, s.n_taps, &options, &err);
        PyEval_RestoreThread(s.gil.state);
        if (status != G4_OK)
            engine_raise(&err);
    }
    release_args(&s);
    if (status != G4_OK)
        return NULL;
    Py_RETURN_NONE;
}
