/* SPDX-License-Identifier: Apache-2.0 */
#include "python/engine.h"

static PyObject *raise_own(const char *class_name, const char *message)
{
    PyObject *module = PyImport_ImportModule("gemma4.errors");
    PyObject *class = module ? PyObject_GetAttrString(module, class_name) : NULL;
    if (class)
        PyErr_SetString(class, message);
    Py_XDECREF(class);
    Py_XDECREF(module);
    return NULL;
}

PyObject *engine_raise(const g4_error *err)
{
    if (PyErr_Occurred())
        return NULL;
    switch (err->status) {
    case G4_ENOMEM: PyErr_SetString(PyExc_MemoryError, err->message); return NULL;
    case G4_EVALUE: PyErr_SetString(PyExc_ValueError, err->message); return NULL;
    case G4_EUNSUPPORTED: PyErr_SetString(PyExc_NotImplementedError, err->message); return NULL;
    case G4_EFORMAT: return raise_own("FormatError", err->message);
    case G4_ESTATE: return raise_own("StateError", err->message);
    case G4_ECAPACITY: return raise_own("CapacityError", err->message);
    case G4_ECANCELLED: PyErr_SetNone(PyExc_KeyboardInterrupt); return NULL;
    default: PyErr_SetString(PyExc_RuntimeError, err->message); return NULL;
    }
}
