/* SPDX-License-Identifier: Apache-2.0 */
#define G4_IMPORTS_NUMPY
#include "base/cpu.h"
#include "kernels/kernels.h"
#include "ops/blas.h"
#include "ops/limits.h"
#include "python/engine.h"

static PyObject *available_isas(void)
{
    PyObject *list = PyList_New(0);
    for (int isa = 0; list && isa < G4_N_ISAS; isa++) {
        if (!g4_kernels_for((g4_isa)isa))
            continue;
        PyObject *name = PyUnicode_FromString(g4_isa_name((g4_isa)isa));
        if (!name || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *cpu_info(PyObject *self, PyObject *unused)
{
    const g4_kernels *kernels;
    g4_error err;
    (void)self, (void)unused;
    if (g4_kernels_select(&kernels, &err) != G4_OK)
        return engine_raise(&err);
    PyObject *available = available_isas();
    if (!available)
        return NULL;
    return Py_BuildValue("{s:s,s:N,s:i,s:s}", "isa", g4_isa_name(kernels->isa), "available", available, "threads",
                         g4_cpu_count(), "blas", g4_blas_config());
}

/* Widens the tensor's rows to float32 with the kernels of this CPU. */
static PyObject *widen_tensor(const g4_named_tensor *t)
{
    const g4_kernels *kernels;
    g4_error err;
    npy_intp dims[G4_MAX_DIMS];
    for (int i = 0; i < t->n_dims; i++)
        dims[i] = (npy_intp)t->shape[i];
    const npy_intp n_cols = t->n_dims ? dims[t->n_dims - 1] : 1;
    if (n_cols % (npy_intp)g4_block_size(t->dtype)) {
        g4_fail(&err, G4_EFORMAT, "rows of %zd values are no whole number of %s blocks of %zu", n_cols,
                g4_dtype_name(t->dtype), g4_block_size(t->dtype));
        return engine_raise(&err);
    }
    if (n_cols > INT_MAX) {
        g4_fail(&err, G4_EFORMAT, "rows of %zd values are too long: expected at most %d", n_cols, INT_MAX);
        return engine_raise(&err);
    }
    if (g4_kernels_select(&kernels, &err) != G4_OK)
        return engine_raise(&err);
    PyObject *out = PyArray_SimpleNew(t->n_dims, dims, NPY_FLOAT32);
    if (!out)
        return NULL;
    float *to = PyArray_DATA((PyArrayObject *)out);
    const npy_intp n_rows = n_cols ? PyArray_SIZE((PyArrayObject *)out) / n_cols : 0;
    const size_t row_bytes = g4_dtype_bytes(t->dtype, (size_t)n_cols);
    Py_BEGIN_ALLOW_THREADS;
    for (npy_intp row = 0; row < n_rows; row++)
        g4_widen_for(kernels, t->dtype)(to + row * n_cols, (const char *)t->data + (size_t)row * row_bytes,
                                        (int)n_cols);
    Py_END_ALLOW_THREADS;
    return out;
}

static PyObject *dequantize(PyObject *self, PyObject *args)
{
    g4_named_tensor tensor;
    Py_buffer view;
    (void)self;
    if (engine_read_tensor("dequantize()", args, &tensor, &view))
        return NULL;
    PyObject *out = widen_tensor(&tensor);
    PyBuffer_Release(&view);
    return out;
}

static int add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    int failed = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;
    Py_XDECREF(type);
    return failed;
}

static int module_exec(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    if (add_type(module, &engine_model_spec) || add_type(module, &engine_sequence_spec) ||
        add_type(module, &engine_encoder_spec) || add_type(module, &engine_map_spec) ||
        add_type(module, &engine_threads_spec) || add_type(module, &engine_features_spec))
        return -1;
    PyObject *testing = engine_testing_module();
    int failed = testing ? PyModule_AddObjectRef(module, "testing", testing) : -1;
    Py_XDECREF(testing);
    return failed;
}

/* profile_ops() -> names of the rows of a profile */
static PyObject *profile_ops(PyObject *self, PyObject *unused)
{
    static const char *const names[] = {
#define G4_OP_NAME(id, name) name,
        G4_EACH_OP(G4_OP_NAME)
#undef G4_OP_NAME
    };
    (void)self, (void)unused;
    PyObject *tuple = PyTuple_New(G4_N_OPS);
    for (int op = 0; tuple && op < G4_N_OPS; op++) {
        PyObject *name = PyUnicode_FromString(names[op]);
        if (!name)
            Py_CLEAR(tuple);
        else
            PyTuple_SetItem(tuple, op, name);
    }
    return tuple;
}

enum { N_SPINS = 4 };
static const char *const spin_names[N_SPINS] = {
    [G4_SPIN_F32] = "f32", [G4_SPIN_INT8] = "int8", [G4_SPIN_INT16] = "int16", [G4_SPIN_BF16] = "bf16"};

/* arithmetic_rate(kind, threads) -> operations per second */
static PyObject *arithmetic_rate(PyObject *self, PyObject *args)
{
    const char *kind;
    int n_threads;
    double rate;
    g4_error err;
    g4_status status;
    (void)self;
    if (!PyArg_ParseTuple(args, "si", &kind, &n_threads))
        return NULL;
    int spin = 0;
    while (spin < N_SPINS && strcmp(kind, spin_names[spin]) != 0)
        spin++;
    if (spin == N_SPINS)
        return PyErr_Format(PyExc_ValueError, "\"%s\": expected \"f32\", \"int8\", \"int16\" or \"bf16\"", kind);
    Py_BEGIN_ALLOW_THREADS;
    status = g4_arithmetic_rate((g4_spin)spin, n_threads, &rate, &err);
    Py_END_ALLOW_THREADS;
    return status == G4_OK ? PyFloat_FromDouble(rate) : engine_raise(&err);
}

/* read_rate(array, threads) -> bytes per second, sum */
static PyObject *read_rate(PyObject *self, PyObject *args)
{
    PyArrayObject *x;
    int n_threads;
    double rate, sum;
    g4_error err;
    g4_status status;
    (void)self;
    if (!PyArg_ParseTuple(args, "O!i", &PyArray_Type, &x, &n_threads))
        return NULL;
    if (PyArray_TYPE(x) != NPY_FLOAT32 || !PyArray_ISCARRAY_RO(x))
        return PyErr_Format(PyExc_ValueError, "expected a C-contiguous float32 array");
    Py_BEGIN_ALLOW_THREADS;
    status = g4_read_rate(PyArray_DATA(x), (size_t)PyArray_SIZE(x), n_threads, &rate, &sum, &err);
    Py_END_ALLOW_THREADS;
    return status == G4_OK ? Py_BuildValue("(dd)", rate, sum) : engine_raise(&err);
}

static PyMethodDef module_methods[] = {
    {"cpu_info", cpu_info, METH_NOARGS, "What this processor can run and what is in use."},
    {"profile_ops", profile_ops, METH_NOARGS, "Names of the operations, in the order of a profile's rows."},
    {"arithmetic_rate", arithmetic_rate, METH_VARARGS, "arithmetic_rate(kind, threads) -> operations per second"},
    {"read_rate", read_rate, METH_VARARGS, "read_rate(float32 array, threads) -> (bytes per second, sum)"},
    {"text_tensors", engine_text_tensors, METH_O, "text_tensors(config) -> [(name, shape)] that it calls for"},
    {"encoder_tensors", engine_encoder_tensors, METH_O, "The same of an encoder's config."},
    {"dequantize", dequantize, METH_VARARGS, "dequantize(dtype, shape, buffer, offset) -> float32 array"},
    {"top_logits", engine_top_logits, METH_VARARGS, "top_logits(logits, picks): the largest logits of a row."},
    {"nucleus_floor", engine_nucleus_floor, METH_VARARGS, "nucleus_floor(weights, share) -> the nucleus's least."},
    {"draw", engine_draw, METH_VARARGS, "draw(weights, least, unit) -> the first index beyond unit of their sum."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                        "gemma4._engine",
                                        "The C engine. See gemma4/_engine.pyi.",
                                        0,
                                        module_methods,
                                        module_slots,
                                        NULL,
                                        NULL,
                                        NULL};

PyMODINIT_FUNC PyInit__engine(void)
{
    return PyModuleDef_Init(&definition);
}
