/* SPDX-License-Identifier: Apache-2.0 */
/* Lists the sites of a model or an encoder, with all columns of sites.inc. */
#include "python/engine.h"

/* Sizes that depend on the run are given as letters. */
static PyObject *site_dims(const char *letters, const int64_t *shape, int n_dims)
{
    PyObject *dims = PyTuple_New(n_dims);
    for (int i = 0; dims && i < n_dims; i++) {
        PyObject *size =
            strchr("TSNU", letters[i]) ? PyUnicode_FromStringAndSize(&letters[i], 1) : PyLong_FromLongLong(shape[i]);
        if (!size) {
            Py_CLEAR(dims);
            break;
        }
        PyTuple_SetItem(dims, i, size);
    }
    return dims;
}

static int append_site(PyObject *list, const engine_site_owner *owner, g4_site site, int layer)
{
    static const char *const keys[] = {
        [G4_KEYS_NONE] = "", [G4_KEYS_CACHED] = "cached", [G4_KEYS_SCORES] = "scores", [G4_KEYS_PATTERN] = "pattern"};
    const g4_site_row *row = g4_site_row_of(site);
    char name[G4_SITE_NAME];
    int64_t shape[G4_MAX_DIMS];
    g4_site_name(site, layer, name);
    PyObject *dims = site_dims(row->dims, shape, owner->shape(owner->context, site, layer, shape));
    PyObject *tuple =
        dims ? Py_BuildValue("(siiNssOOs)", name, (int)site, layer, dims, row->is_int32 ? "int32" : "float32",
                             keys[row->keys], row->after_pruning ? Py_True : Py_False,
                             row->writable ? Py_True : Py_False, row->dims)
             : NULL;
    int failed = tuple ? PyList_Append(list, tuple) : -1;
    Py_XDECREF(tuple);
    return failed;
}

/* In the order of sites.inc; consecutive per-layer sites are listed layer by layer. */
PyObject *engine_list_sites(const engine_site_owner *owner)
{
    PyObject *list = PyList_New(0);
    int failed = list ? 0 : -1;
    for (int first = 0, end; first < G4_N_SITES && !failed; first = end) {
        const bool per_layer = g4_site_is_per_layer((g4_site)first);
        for (end = first + 1; per_layer && end < G4_N_SITES && g4_site_is_per_layer((g4_site)end); end++)
            ;
        for (int layer = 0; layer < (per_layer ? owner->n_layers : 1); layer++)
            for (int s = first; s < end && !failed; s++)
                if (owner->exists(owner->context, (g4_site)s, layer))
                    failed = append_site(list, owner, (g4_site)s, layer);
    }
    if (failed)
        Py_CLEAR(list);
    return list;
}
