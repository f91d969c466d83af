/* SPDX-License-Identifier: Apache-2.0 */
/* The type GuardedMap: a mapped file that may shrink while it is read. Interface: gemma4/_engine.pyi. */
#include "base/guard.h"
#include "python/engine.h"

typedef struct {
    PyObject_HEAD Py_buffer view; /* keeps the file from being unmapped */
    g4_guard *guard;
} map_object;

static int map_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"map", NULL};
    map_object *self = (map_object *)object;
    PyObject *map;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &map))
        return -1;
    if (self->guard) {
        PyErr_SetString(PyExc_RuntimeError, "this map is guarded already");
        return -1;
    }
    if (PyObject_GetBuffer(map, &self->view, PyBUF_SIMPLE))
        return -1;
    self->guard = g4_guard_new(self->view.buf, (size_t)self->view.len);
    if (!self->guard) {
        PyBuffer_Release(&self->view);
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void map_dealloc(PyObject *object)
{
    map_object *self = (map_object *)object;
    if (self->guard) {
        g4_guard_free(self->guard); /* before the release: once unmapped, the range may be reused */
        PyBuffer_Release(&self->view);
    }
    engine_free(object);
}

static int map_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    map_object *self = (map_object *)object;
    if (!self->guard) {
        PyErr_SetString(PyExc_BufferError, "this map was never initialised");
        return -1;
    }
    return PyBuffer_FillInfo(view, object, self->view.buf, self->view.len, 1, flags);
}

static PyObject *map_is_torn(PyObject *object, PyObject *unused)
{
    const map_object *self = (map_object *)object;
    (void)unused;
    g4_guard_arm();
    return PyBool_FromLong(self->guard && g4_guard_is_torn(self->guard));
}

static PyMethodDef map_methods[] = {
    {"is_torn", map_is_torn, METH_NOARGS, "Whether a page was gone when it was read; also arms the guard again."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot map_slots[] = {
    {Py_tp_doc, "A read-only view of a mapped file whose lost pages read as zeros. GuardedMap(mmap)"},
    {Py_tp_init, map_init},
    {Py_tp_dealloc, map_dealloc},
    {Py_tp_methods, map_methods},
    {Py_bf_getbuffer, map_getbuffer},
    {0, NULL},
};

PyType_Spec engine_map_spec = {"gemma4._engine.GuardedMap", sizeof(map_object), 0, Py_TPFLAGS_DEFAULT, map_slots};
