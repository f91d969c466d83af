/* SPDX-License-Identifier: Apache-2.0 */
/* Model.step: reads runs from Python tuples. Arrays are handled as in taps.c. */
#include "python/engine.h"

typedef struct {
    model_object *model;
    PyObject *run_tuple; /* owns every array in use */
    g4_run *runs;
    engine_picks *picks;  /* [n_runs] */
    int n_runs, n_locked; /* the sequences of the first n_locked runs are locked */
    engine_taps taps;
    engine_gil gil;
} step_args;

/* ---- arguments --------------------------------------------------------------------------------------------------- */

#define RUN "a run is a tuple (sequence, tokens, embeddings, logits_rows, logits, ends, resid, picks)"

/* The arrays for `n` rows of logits: the logits themselves, what to find in them, or both. */
static int read_outputs(const g4_config *config, int n, PyObject *logits, PyObject *given, g4_run *run,
                        engine_picks *picks)
{
    if (engine_read_picks(given, n, config->d_vocab, picks))
        return -1;
    run->picks = picks->rows;
    if (logits == Py_None && picks->rows)
        return 0;
    const npy_intp dims[] = {n, config->d_vocab};
    PyArrayObject *array = engine_check_array(logits, NPY_FLOAT32, 2, dims, "logits");
    if (!array || PyArray_FailUnlessWriteable(array, "logits"))
        return -1;
    run->logits = PyArray_DATA(array);
    return 0;
}

static int read_run(step_args *s, PyObject *tuple, g4_run *run, engine_picks *picks)
{
    PyObject *sequence, *tokens, *embeddings, *rows, *logits, *ends = Py_None, *resid = Py_None, *given = Py_None;
    const g4_config *config = g4_model_config(s->model->model);
    int n_tokens, n_logits, n_ends;
    int32_t *ints;
    if (!PyTuple_Check(tuple)) {
        PyErr_SetString(PyExc_TypeError, RUN);
        return -1;
    }
    if (!PyArg_ParseTuple(tuple, "O!OOOO|OOO;" RUN, engine_sequence_type((PyObject *)s->model), &sequence, &tokens,
                          &embeddings, &rows, &logits, &ends, &resid, &given))
        return -1;
    run->seq = engine_open_sequence(sequence);
    if (!run->seq || !engine_lock(run->seq)) /* before anything that could run Python code and close it */
        return -1;
    s->n_locked++;
    if (engine_copy_ints(tokens, "tokens", &ints, &n_tokens))
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
    if (engine_copy_ints(ends, "ends", &ints, &n_ends))
        return -1;
    run->ends = ints;
    if (ints && n_ends != run->n_rows) {
        PyErr_Format(PyExc_ValueError, "ends: %d of them for %d rows", n_ends, run->n_rows);
        return -1;
    }
    if (resid != Py_None) {
        const npy_intp dims[] = {run->n_rows, config->d_model};
        PyArrayObject *array = engine_check_array(resid, NPY_FLOAT32, 2, dims, "resid");
        if (!array)
            return -1;
        run->resid = PyArray_DATA(array);
    }
    if (engine_copy_ints(rows, "logits_rows", &ints, &n_logits))
        return -1;
    run->logits_rows = ints;
    run->n_logits = n_logits > 0 ? n_logits : 0;
    return run->n_logits ? read_outputs(config, n_logits, logits, given, run, picks) : 0;
}

static bool site_exists(void *context, g4_site site, int layer)
{
    const step_args *s = context;
    return g4_site_exists(g4_model_config(s->model->model), site, layer);
}

static int site_shape(void *context, const g4_tap *tap, int64_t shape[G4_MAX_DIMS])
{
    const step_args *s = context;
    const g4_run *run = &s->runs[tap->run];
    const int n_keys = g4_sequence_length(run->seq) + run->n_rows;
    return g4_site_shape(g4_model_config(s->model->model), tap->site, tap->layer, run->n_rows, n_keys, shape);
}

static int read_args(step_args *s, PyObject *runs, PyObject *taps)
{
    s->run_tuple = PySequence_Tuple(runs);
    if (!s->run_tuple)
        return -1;
    const size_t n_runs = (size_t)PyTuple_Size(s->run_tuple);
    s->runs = PyMem_Calloc(n_runs + 1, sizeof *s->runs);
    s->picks = PyMem_Calloc(n_runs + 1, sizeof *s->picks);
    if (!s->runs || !s->picks || n_runs > 1 << 20) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < n_runs; i++) {
        s->n_runs = (int)i + 1;
        if (read_run(s, PyTuple_GetItem(s->run_tuple, (Py_ssize_t)i), &s->runs[i], &s->picks[i]))
            return -1;
    }
    const engine_tap_owner owner = {s, &s->gil, "run", s->n_runs, site_exists, site_shape};
    return engine_read_taps(taps, &owner, &s->taps);
}

static void release_args(step_args *s)
{
    engine_release_taps(&s->taps);
    for (int i = 0; i < s->n_locked; i++)
        g4_sequence_release(s->runs[i].seq);
    for (int i = 0; i < s->n_runs; i++) {
        PyMem_Free((void *)s->runs[i].tokens);
        PyMem_Free((void *)s->runs[i].logits_rows);
        PyMem_Free((void *)s->runs[i].ends);
        engine_release_picks(&s->picks[i]);
    }
    PyMem_Free(s->picks);
    PyMem_Free(s->runs);
    Py_XDECREF(s->run_tuple);
}

/* Reads a float64 array [operations, members of g4_op_total]; the caller's argument tuple keeps it alive. */
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
    static char *names[] = {"runs",      "taps",     "stop_at_layer", "start_at_layer",
                            "max_chunk", "in_order", "profile",       NULL};
    step_args s = {.model = (model_object *)self};
    g4_step_options options = {
        .stop_at_layer = -1, .locked = true, .poll = engine_poll_signals, .poll_context = &s.gil};
    PyObject *runs, *taps = NULL, *profile = Py_None;
    g4_error err = {0};
    int in_order = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$iiipO", names, &runs, &taps, &options.stop_at_layer,
                                     &options.start_at_layer, &options.max_chunk, &in_order, &profile) ||
        engine_read_profile(profile, &options.profile))
        return NULL;
    if (!s.model->model)
        return PyErr_Format(PyExc_RuntimeError, "this model was never initialised");
    g4_status status = G4_EVALUE;
    options.in_order = in_order;
    if (read_args(&s, runs, taps) == 0) {
        s.gil.state = PyEval_SaveThread();
        status = g4_step(s.model->model, s.runs, s.n_runs, s.taps.taps, s.taps.n, &options, &err);
        PyEval_RestoreThread(s.gil.state);
        if (status != G4_OK)
            engine_raise(&err);
        for (int i = 0; status == G4_OK && i < s.n_runs; i++)
            engine_return_picks(&s.picks[i]);
    }
    release_args(&s);
    if (status != G4_OK)
        return NULL;
    Py_RETURN_NONE;
}
