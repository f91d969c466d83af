/* SPDX-License-Identifier: Apache-2.0 */
#define G4_IMPORTS_NUMPY
#include "base/cpu.h"
#include "kernels/kernels.h"
#include "ops/blas.h"
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
    if (add_type(module, &engine_model_spec) || add_type(module, &engine_sequence_spec))
        return -1;
    PyObject *testing = engine_testing_module();
    int failed = testing ? PyModule_AddObjectRef(module, "testing", testing) : -1;
    Py_XDECREF(testing);
    return failed;
}

static PyMethodDef module_methods[] = {
    {"cpu_info", cpu_info, METH_NOARGS, "What this processor can run and what is in use."},
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
