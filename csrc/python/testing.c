/* SPDX-License-Identifier: Apache-2.0 */
/* _engine.testing: single kernels of every instruction set, for the sweeps in tests/. Rows may be strided and
 * misaligned, which the sweeps cover; the last axis must be contiguous. */
#include "kernels/kernels.h"
#include "python/engine.h"

static const g4_kernels *table_of(const char *isa_name)
{
    g4_isa isa = g4_isa_parse(isa_name);
    const g4_kernels *kernels = isa < G4_N_ISAS ? g4_kernels_for(isa) : NULL;
    if (!kernels)
        PyErr_Format(PyExc_ValueError, "no instruction set \"%s\" here", isa_name);
    return kernels;
}

static int type_of(g4_dtype dtype)
{
    return dtype == G4_F32 ? NPY_FLOAT32 : g4_is_quantised(dtype) ? NPY_UINT8 : NPY_UINT16;
}

static bool is_rows(PyArrayObject *array, int type, int n_dims)
{
    bool good = PyArray_TYPE(array) == type && PyArray_NDIM(array) == n_dims && PyArray_ISALIGNED(array) &&
                (PyArray_DIM(array, n_dims - 1) < 2 || PyArray_STRIDE(array, n_dims - 1) == PyArray_ITEMSIZE(array));
    if (!good)
        PyErr_SetString(PyExc_ValueError, "expected an array of that dtype whose last axis is contiguous");
    return good;
}

static size_t stride_of(PyArrayObject *array)
{
    return (size_t)(PyArray_STRIDE(array, 0) / PyArray_ITEMSIZE(array));
}

/* Whether w has rows of k values: elements, or bytes of blocks. */
static bool has_inputs(PyArrayObject *w, g4_dtype dtype, npy_intp k)
{
    const npy_intp block = (npy_intp)g4_block_size(dtype), bytes = (npy_intp)g4_block_bytes(dtype);
    bool good = k % block == 0 && PyArray_DIM(w, 1) * PyArray_ITEMSIZE(w) == k / block * bytes &&
                PyArray_STRIDE(w, 0) % bytes == 0;
    if (!good)
        PyErr_SetString(PyExc_ValueError, "inner sizes differ, or no whole number of blocks");
    return good;
}

static size_t weight_stride(PyArrayObject *w, g4_dtype dtype)
{
    return (size_t)PyArray_STRIDE(w, 0) / g4_block_bytes(dtype) * g4_block_size(dtype);
}

/* The arguments of matmul and matmul_packed: isa, dtype, x [m, k], w [n, k]. */
typedef struct {
    const g4_kernels *kernels;
    g4_dtype dtype;
    PyArrayObject *x, *w;
} matmul_args;

static bool parse_matmul(PyObject *args, matmul_args *a)
{
    const char *isa, *dtype_name;
    if (!PyArg_ParseTuple(args, "ssO!O!", &isa, &dtype_name, &PyArray_Type, &a->x, &PyArray_Type, &a->w))
        return false;
    a->kernels = table_of(isa);
    a->dtype = g4_dtype_parse(dtype_name);
    if (a->dtype == G4_N_DTYPES) {
        PyErr_Format(PyExc_ValueError, "unknown dtype");
        return false;
    }
    return a->kernels && is_rows(a->x, NPY_FLOAT32, 2) && is_rows(a->w, type_of(a->dtype), 2) &&
           has_inputs(a->w, a->dtype, PyArray_DIM(a->x, 1));
}

/* matmul(isa, dtype, x [m, k], w [n, k]) -> [m, n] */
static PyObject *test_matmul(PyObject *self, PyObject *args)
{
    static _Alignas(64) float scratch[G4_MATMUL_SCRATCH];
    matmul_args a;
    (void)self;
    if (!parse_matmul(args, &a))
        return NULL;
    npy_intp dims[] = {PyArray_DIM(a.x, 0), PyArray_DIM(a.w, 0)};
    PyObject *out = PyArray_SimpleNew(2, dims, NPY_FLOAT32);
    if (out)
        g4_matmul_for(a.kernels, a.dtype)(PyArray_DATA(a.x), stride_of(a.x), (int)dims[0], PyArray_DATA(a.w),
                                          weight_stride(a.w, a.dtype), (int)dims[1], (int)PyArray_DIM(a.x, 1),
                                          PyArray_DATA((PyArrayObject *)out), (size_t)dims[1], scratch);
    return out;
}

/* matmul_packed: the same, x packed in slices as by several workers */
static PyObject *test_matmul_packed(PyObject *self, PyObject *args)
{
    static _Alignas(64) float scratch[G4_MATMUL_SCRATCH];
    enum { SLICE = 2 * G4_PACK_UNIT };
    matmul_args a;
    (void)self;
    if (!parse_matmul(args, &a))
        return NULL;
    npy_intp dims[] = {PyArray_DIM(a.x, 0), PyArray_DIM(a.w, 0)};
    const int m = (int)dims[0], n = (int)dims[1], k = (int)PyArray_DIM(a.x, 1);
    float *packed = PyMem_Malloc(g4_packed_rows((size_t)m) * g4_packed_inputs((size_t)k) * sizeof *packed);
    PyObject *out = packed ? PyArray_SimpleNew(2, dims, NPY_FLOAT32) : PyErr_NoMemory();
    if (out) {
        for (int first = 0; first < m; first += SLICE)
            a.kernels->pack_rows(PyArray_DATA(a.x), stride_of(a.x), m, k, first, first + SLICE < m ? first + SLICE : m,
                                 packed);
        g4_matmul_packed_for(a.kernels, a.dtype)(packed, m, PyArray_DATA(a.w), weight_stride(a.w, a.dtype), n, k,
                                                 PyArray_DATA((PyArrayObject *)out), (size_t)n, scratch);
    }
    PyMem_Free(packed);
    return out;
}

/* Arrays for g4_int8_rows: (q int8, scale, sum16, sum32, minus_4 int16, minus_8 int32), one row per row of x, m padded as
 * g4_int8_bytes says; the padding is 0. */
static PyObject *int8_arrays(npy_intp m, npy_intp k)
{
    const npy_intp stride = (npy_intp)g4_int8_stride((size_t)k),
                   rows = (npy_intp)g4_int8_bytes((int)m, (size_t)k) / stride;
    return Py_BuildValue("(NNNNNN)", PyArray_ZEROS(2, ((npy_intp[]){rows, stride}), NPY_INT8, 0),
                         PyArray_ZEROS(2, ((npy_intp[]){rows, stride / 32}), NPY_FLOAT32, 0),
                         PyArray_ZEROS(2, ((npy_intp[]){rows, stride / 16}), NPY_FLOAT32, 0),
                         PyArray_ZEROS(2, ((npy_intp[]){rows, stride / 32}), NPY_FLOAT32, 0),
                         PyArray_ZEROS(2, ((npy_intp[]){rows, stride / 16}), NPY_INT16, 0),
                         PyArray_ZEROS(2, ((npy_intp[]){rows, stride / 32}), NPY_INT32, 0));
}

/* ValueError unless `arrays` match int8_arrays(m, k). */
static bool int8_rows_of(PyObject *arrays, npy_intp m, npy_intp k, g4_int8_rows *rows)
{
    enum { N = 6 };
    static const int types[N] = {NPY_INT8, NPY_FLOAT32, NPY_FLOAT32, NPY_FLOAT32, NPY_INT16, NPY_INT32};
    const npy_intp n = (npy_intp)g4_int8_bytes((int)m, (size_t)k),
                   sizes[N] = {n, n / 32, n / 16, n / 32, n / 16, n / 32};
    void *data[N];
    for (int i = 0; i < N; i++) {
        PyObject *one = PyTuple_Check(arrays) && PyTuple_Size(arrays) == N ? PyTuple_GetItem(arrays, i) : NULL;
        if (!one || !PyArray_Check(one) || PyArray_TYPE((PyArrayObject *)one) != types[i] ||
            PyArray_SIZE((PyArrayObject *)one) != sizes[i] || !PyArray_IS_C_CONTIGUOUS((PyArrayObject *)one)) {
            PyErr_Format(PyExc_ValueError, "expected what quantize_rows returns for x [%zd, %zd]", m, k);
            return false;
        }
        data[i] = PyArray_DATA((PyArrayObject *)one);
    }
    *rows = (g4_int8_rows){data[0], data[1], data[2], data[3], data[4], data[5], m > G4_INT8_FEW};
    return true;
}

/* quantize_rows(isa, x [m, k]) -> q int8 [m, K], scale [m, K / 32], sum16 [m, K / 16], sum32 [m, K / 32], minus_4, minus_8 */
static PyObject *test_quantize_rows(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    g4_int8_rows rows;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!", &isa, &PyArray_Type, &x))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 2))
        return NULL;
    const npy_intp m = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    if (k % 32)
        return PyErr_Format(PyExc_ValueError, "rows of %zd values, expected a multiple of 32", k);
    PyObject *arrays = int8_arrays(m, k);
    if (!arrays || !int8_rows_of(arrays, m, k, &rows)) {
        Py_XDECREF(arrays);
        return NULL;
    }
    kernels->quantize_rows(PyArray_DATA(x), stride_of(x), 0, (int)m, (int)k, &rows);
    return arrays;
}

/* matmul_int8(isa, dtype, quantize_rows(isa, x), m, w [n, bytes of k]) -> [m, n] */
static PyObject *test_matmul_int8(PyObject *self, PyObject *args)
{
    static _Alignas(64) float scratch[G4_INT8_SCRATCH];
    const char *isa, *dtype_name;
    PyObject *arrays;
    Py_ssize_t m;
    PyArrayObject *w;
    g4_int8_rows rows;
    (void)self;
    if (!PyArg_ParseTuple(args, "ssOnO!", &isa, &dtype_name, &arrays, &m, &PyArray_Type, &w))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    const g4_dtype dtype = g4_dtype_parse(dtype_name);
    if (!kernels || !is_rows(w, NPY_UINT8, 2))
        return NULL;
    if (dtype == G4_N_DTYPES || !g4_is_quantised(dtype))
        return PyErr_Format(PyExc_ValueError, "%s is no quantised dtype", dtype_name);
    const npy_intp n = PyArray_DIM(w, 0);
    const npy_intp k = PyArray_DIM(w, 1) / (npy_intp)g4_block_bytes(dtype) * (npy_intp)g4_block_size(dtype);
    if (!has_inputs(w, dtype, k) || !int8_rows_of(arrays, m, k, &rows))
        return NULL;
    PyObject *out = PyArray_SimpleNew(2, ((npy_intp[]){m, n}), NPY_FLOAT32);
    if (out)
        g4_matmul_int8_for(kernels, dtype)(&rows, (int)m, PyArray_DATA(w), weight_stride(w, dtype), (int)n, (int)k,
                                           PyArray_DATA((PyArrayObject *)out), (size_t)n, scratch);
    return out;
}

/* weighted_sum(isa, dtype, p [m, n], v [n, d], acc [m, d]) -> acc + p v */
static PyObject *test_weighted_sum(PyObject *self, PyObject *args)
{
    const char *isa, *dtype_name;
    PyArrayObject *p, *v, *acc;
    (void)self;
    if (!PyArg_ParseTuple(args, "ssO!O!O!", &isa, &dtype_name, &PyArray_Type, &p, &PyArray_Type, &v, &PyArray_Type,
                          &acc))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    g4_dtype dtype = g4_dtype_parse(dtype_name);
    if (!kernels || !is_rows(p, NPY_FLOAT32, 2) || !is_rows(v, type_of(dtype), 2) || !is_rows(acc, NPY_FLOAT32, 2))
        return NULL;
    if (!g4_weighted_sum_for(kernels, dtype) || PyArray_DIM(p, 1) != PyArray_DIM(v, 0) ||
        PyArray_DIM(acc, 0) != PyArray_DIM(p, 0) || !has_inputs(v, dtype, PyArray_DIM(acc, 1)))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no cache's type, or sizes differ");
    PyArrayObject *out = (PyArrayObject *)PyArray_NewCopy(acc, NPY_CORDER);
    if (out)
        g4_weighted_sum_for(kernels, dtype)(PyArray_DATA(p), stride_of(p), (int)PyArray_DIM(p, 0), PyArray_DATA(v),
                                            weight_stride(v, dtype), (int)PyArray_DIM(p, 1), (int)PyArray_DIM(acc, 1),
                                            PyArray_DATA(out), (size_t)PyArray_DIM(acc, 1));
    return (PyObject *)out;
}

/* matmul_panel(isa, x [m, k], w [k, 16], n, out [m, n] or None) -> [m, n], added to `out` if given */
static PyObject *test_matmul_panel(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x, *w;
    PyObject *start;
    int n;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!O!iO", &isa, &PyArray_Type, &x, &PyArray_Type, &w, &n, &start))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 2) || !is_rows(w, NPY_FLOAT32, 2))
        return NULL;
    npy_intp dims[] = {PyArray_DIM(x, 0), n};
    if (n < 1 || n > 16 || !PyArray_IS_C_CONTIGUOUS(w) || PyArray_DIM(w, 0) != PyArray_DIM(x, 1) ||
        PyArray_DIM(w, 1) != 16)
        return PyErr_Format(PyExc_ValueError, "expected a dense panel [k, 16] and 1 to 16 columns");
    PyObject *out =
        start == Py_None ? PyArray_SimpleNew(2, dims, NPY_FLOAT32) : PyArray_FROM_OF(start, NPY_ARRAY_ENSURECOPY);
    if (out && PyArray_SIZE((PyArrayObject *)out) == dims[0] * n)
        kernels->matmul_panel(PyArray_DATA(x), stride_of(x), (int)dims[0], PyArray_DATA(w), (int)PyArray_DIM(x, 1),
                              PyArray_DATA((PyArrayObject *)out), (size_t)n, n, start != Py_None);
    return out;
}

/* fire(isa, x [n], before, scale, after, gate, threshold: [first + n] each or None, first, least) -> x [n], ids or None
 */
static PyObject *test_fire(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    PyObject *given[5];
    const float *vectors[5];
    int first;
    float least;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!OOOOOif", &isa, &PyArray_Type, &x, &given[0], &given[1], &given[2], &given[3],
                          &given[4], &first, &least))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    const npy_intp n = PyArray_DIM(x, 0);
    for (int i = 0; i < 5; i++) {
        PyArrayObject *vector = (PyArrayObject *)given[i];
        if (given[i] != Py_None &&
            (!PyArray_Check(given[i]) || !is_rows(vector, NPY_FLOAT32, 1) || PyArray_DIM(vector, 0) != first + n))
            return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "expected vectors of %zd", first + n);
        vectors[i] = given[i] == Py_None ? NULL : PyArray_DATA(vector);
    }
    const g4_firing firing = {vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]};
    PyObject *values = PyArray_NewCopy(x, NPY_CORDER), *ids = PyArray_SimpleNew(1, &n, NPY_INT32), *found = NULL;
    if (values && ids) {
        const int n_ids = kernels->fire(PyArray_DATA((PyArrayObject *)values), &firing, first, (int)n, least,
                                        PyArray_DATA((PyArrayObject *)ids));
        found = n_ids < 0 ? Py_NewRef(Py_None) : PySequence_GetSlice(ids, 0, n_ids);
    }
    Py_XDECREF(ids);
    return found ? Py_BuildValue("NN", values, found) : NULL;
}

/* (isa, rows [n, k] float32) -> the kernels of that instruction set, or NULL with an exception set */
static const g4_kernels *rows_arguments(PyObject *args, PyArrayObject **rows)
{
    const char *isa;
    if (!PyArg_ParseTuple(args, "sO!", &isa, &PyArray_Type, rows))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    return kernels && is_rows(*rows, NPY_FLOAT32, 2) ? kernels : NULL;
}

/* rows_arguments, for rows that fit a panel: n <= 16. */
static const g4_kernels *panel_arguments(PyObject *args, PyArrayObject **w)
{
    const g4_kernels *kernels = rows_arguments(args, w);
    if (!kernels)
        return NULL;
    if (PyArray_DIM(*w, 0) < 1 || PyArray_DIM(*w, 0) > 16) {
        PyErr_Format(PyExc_ValueError, "expected 1 to 16 rows, found %zd", (Py_ssize_t)PyArray_DIM(*w, 0));
        return NULL;
    }
    return kernels;
}

/* pack_panel(isa, w [n <= 16, k]) -> [k, 16] */
static PyObject *test_pack_panel(PyObject *self, PyObject *args)
{
    PyArrayObject *w;
    (void)self;
    const g4_kernels *kernels = panel_arguments(args, &w);
    if (!kernels)
        return NULL;
    npy_intp dims[] = {PyArray_DIM(w, 1), 16};
    PyObject *out = PyArray_SimpleNew(2, dims, NPY_FLOAT32);
    if (out)
        kernels->pack_panel(PyArray_DATA(w), stride_of(w), (int)PyArray_DIM(w, 0), (int)dims[0],
                            PyArray_DATA((PyArrayObject *)out));
    return out;
}

/* Allocates x's 16-bit integer rows: q [m, stride] and scale [m, groups]. */
static bool rows16_new(PyArrayObject *x, PyObject **q, PyObject **scale, g4_rows16 *rows)
{
    const npy_intp m = PyArray_DIM(x, 0);
    const int k = (int)PyArray_DIM(x, 1);
    *q = PyArray_SimpleNew(2, ((npy_intp[]){m, g4_stride16(k)}), NPY_INT16);
    *scale = PyArray_SimpleNew(2, ((npy_intp[]){m, g4_groups16(k)}), NPY_FLOAT32);
    if (!*q || !*scale)
        return false;
    *rows = (g4_rows16){PyArray_DATA((PyArrayObject *)*q), PyArray_DATA((PyArrayObject *)*scale), g4_stride16(k)};
    return true;
}

static void fill_tiles(const g4_kernels *kernels, PyArrayObject *x, const g4_tiles *tiles)
{
    const int m = (int)PyArray_DIM(x, 0), k = (int)PyArray_DIM(x, 1);
    for (int i = 0; i < m; i += G4_TILE_ROWS)
        kernels->tiles_of_x((const float *)PyArray_DATA(x) + (size_t)i * stride_of(x), stride_of(x),
                            m - i < G4_TILE_ROWS ? m - i : G4_TILE_ROWS, k, g4_tiles_from(tiles, i).data);
}

static void fill_rows(const g4_kernels *kernels, PyArrayObject *w, uint16_t *narrow, uint16_t *rows, size_t stride)
{
    const int n = (int)PyArray_DIM(w, 0), k = (int)PyArray_DIM(w, 1);
    for (int j = 0; j < n; j++) {
        kernels->narrow_bf16(narrow, (const float *)PyArray_DATA(w) + (size_t)j * stride_of(w), k);
        kernels->bf16_row_bf16(narrow, k, 0, rows + (size_t)j * stride);
    }
}

/* matmul_tiles(isa, x [m, k], w [n, k]) -> [m, n], x and w rounded to bf16 */
static PyObject *test_matmul_tiles(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x, *w;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!O!", &isa, &PyArray_Type, &x, &PyArray_Type, &w))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 2) || !is_rows(w, NPY_FLOAT32, 2) ||
        !has_inputs(w, G4_F32, PyArray_DIM(x, 1)))
        return NULL;
    if (!kernels->matmul_tiles)
        return PyErr_Format(PyExc_NotImplementedError, "%s has no products of bf16", isa);
    npy_intp dims[] = {PyArray_DIM(x, 0), PyArray_DIM(w, 0)};
    const int m = (int)dims[0], n = (int)dims[1], k = (int)PyArray_DIM(x, 1);
    const size_t w_stride = (size_t)(g4_tiles_of(k) * G4_TILE_INPUTS), n_tiles = (size_t)g4_tiles_of(k) * G4_TILE;
    const size_t m_groups = (size_t)(m + 15) / G4_TILE_ROWS, n_groups = (size_t)(n + 15) / G4_TILE_ROWS;
    const g4_tiles xs = {PyMem_Calloc(m_groups, n_tiles * sizeof(uint16_t)), n_tiles};
    uint16_t *ws = PyMem_Calloc(n_groups, n_tiles * sizeof *ws), *narrow = PyMem_Calloc((size_t)k + 1, sizeof *narrow);
    float *sums = PyMem_Malloc(g4_tile_sums(m, n) * sizeof *sums);
    PyObject *out = PyArray_SimpleNew(2, dims, NPY_FLOAT32);
    if (!xs.data || !ws || !narrow || !sums) {
        Py_CLEAR(out);
        PyErr_NoMemory();
    } else if (out) {
        fill_tiles(kernels, x, &xs);
        fill_rows(kernels, w, narrow, ws, w_stride);
        kernels->matmul_tiles(&xs, m, ws, w_stride, n, g4_tiles_of(k), sums, false, PyArray_DATA((PyArrayObject *)out),
                              (size_t)n);
    }
    PyMem_Free(xs.data);
    PyMem_Free(ws);
    PyMem_Free(narrow);
    PyMem_Free(sums);
    return out;
}

/* quantize_rows16(isa, x [m, k], low, high) -> q int16 [m, stride], scale [m, groups] */
static PyObject *test_quantize_rows16(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    PyObject *q, *scale;
    g4_rows16 rows;
    float low, high;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!ff", &isa, &PyArray_Type, &x, &low, &high))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 2))
        return NULL;
    if (rows16_new(x, &q, &scale, &rows))
        kernels->quantize_rows16(PyArray_DATA(x), stride_of(x), (int)PyArray_DIM(x, 0), (int)PyArray_DIM(x, 1), low,
                                 high, &rows);
    return Py_BuildValue("(NN)", q, scale);
}

/* softmax_rows16(isa, x [m, n]) -> q int16 [m, stride], scale [m, groups]; x is overwritten */
static PyObject *test_softmax_rows16(PyObject *self, PyObject *args)
{
    PyArrayObject *x;
    PyObject *q, *scale;
    g4_rows16 rows;
    (void)self;
    const g4_kernels *kernels = rows_arguments(args, &x);
    if (!kernels)
        return NULL;
    if (rows16_new(x, &q, &scale, &rows))
        kernels->softmax_rows16(PyArray_DATA(x), stride_of(x), (int)PyArray_DIM(x, 0), (int)PyArray_DIM(x, 1), &rows);
    return Py_BuildValue("(NN)", q, scale);
}

/* pack_panel16(isa, w [n <= 16, k]) -> q int16 [stride / 2, 16, 2], scale [groups, 16] */
static PyObject *test_pack_panel16(PyObject *self, PyObject *args)
{
    PyArrayObject *w;
    (void)self;
    const g4_kernels *kernels = panel_arguments(args, &w);
    if (!kernels)
        return NULL;
    const int k = (int)PyArray_DIM(w, 1);
    PyObject *q = PyArray_SimpleNew(3, ((npy_intp[]){g4_stride16(k) / 2, 16, 2}), NPY_INT16);
    PyObject *scale = PyArray_SimpleNew(2, ((npy_intp[]){g4_groups16(k), 16}), NPY_FLOAT32);
    if (q && scale) {
        g4_panel16 panel = {PyArray_DATA((PyArrayObject *)q), PyArray_DATA((PyArrayObject *)scale)};
        kernels->pack_panel16(PyArray_DATA(w), stride_of(w), (int)PyArray_DIM(w, 0), k, &panel);
    }
    return Py_BuildValue("(NN)", q, scale);
}

static bool is_dense(PyArrayObject *array, int type, npy_intp size)
{
    bool good = PyArray_TYPE(array) == type && PyArray_IS_C_CONTIGUOUS(array) && PyArray_SIZE(array) == size;
    if (!good)
        PyErr_SetString(PyExc_ValueError, "expected what quantize_rows16 and pack_panel16 return, of one k");
    return good;
}

/* matmul_panel16(isa, quantize_rows16(…), pack_panel16(…), n, groups at once) -> [m, n] */
static PyObject *test_matmul_panel16(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *q, *scale, *w, *w_scale;
    int n, at_once;
    (void)self;
    if (!PyArg_ParseTuple(args, "s(O!O!)(O!O!)ii", &isa, &PyArray_Type, &q, &PyArray_Type, &scale, &PyArray_Type, &w,
                          &PyArray_Type, &w_scale, &n, &at_once))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(q, NPY_INT16, 2))
        return NULL;
    const npy_intp m = PyArray_DIM(q, 0), stride = PyArray_DIM(q, 1), groups = g4_groups16((int)stride);
    if (n < 1 || n > 16 || stride % 4 || at_once < 1 || at_once > 1 << 20)
        return PyErr_Format(PyExc_ValueError, "expected 1 to 16 columns, inputs by fours and 1 group or more");
    if (!is_dense(q, NPY_INT16, m * stride) || !is_dense(scale, NPY_FLOAT32, m * groups) ||
        !is_dense(w, NPY_INT16, stride * 16) || !is_dense(w_scale, NPY_FLOAT32, groups * 16))
        return NULL;
    PyObject *out = PyArray_SimpleNew(2, ((npy_intp[]){m, n}), NPY_FLOAT32);
    const g4_rows16 rows = {PyArray_DATA(q), PyArray_DATA(scale), (int)stride};
    const g4_panel16 panel = {PyArray_DATA(w), PyArray_DATA(w_scale)};
    for (int at = 0; out && at < (int)stride; at += at_once * G4_GROUP16) {
        const g4_rows16 rows_at = g4_rows16_at(&rows, at);
        const g4_panel16 panel_at = g4_panel16_at(&panel, at);
        const int k = (int)stride - at < at_once * G4_GROUP16 ? (int)stride - at : at_once * G4_GROUP16;
        kernels->matmul_panel16(&rows_at, (int)m, &panel_at, k, PyArray_DATA((PyArrayObject *)out), (size_t)n, n,
                                at > 0);
    }
    return out;
}

/* Applies the row kernel `name` to out in place; y may be NULL. Returns false for an unknown name. */
static bool apply_row(const g4_kernels *k, const char *name, float *out, const float *y, float s, int n)
{
    if (strcmp(name, "scale_mul") == 0)
        k->scale_mul(out, out, s, y, n);
    else if (strcmp(name, "add") == 0 && y)
        k->add(out, out, y, n);
    else if (strcmp(name, "mul") == 0 && y)
        k->mul(out, out, y, n);
    else if (strcmp(name, "axpy") == 0 && y)
        k->axpy(out, s, y, n);
    else if (strcmp(name, "gelu") == 0)
        k->gelu(out, out, n);
    else if (strcmp(name, "glu") == 0 && y)
        k->glu(out, out, y, n);
    else if (strcmp(name, "clamp") == 0)
        k->clamp(out, out, -s, 0.5f * s, n);
    else if (strcmp(name, "mul_add") == 0 && y) /* x + y * y */
        k->mul_add(out, y, y, n);
    else if (strcmp(name, "layer_norm") == 0 && y) /* gain y; s > 0: bias y, too, and eps s */
        k->layer_norm(out, out, y, s > 0 ? y : NULL, s > 0 ? s : 1e-6f, n);
    else if (strcmp(name, "softmax") == 0)
        k->softmax(out, n);
    else if (strcmp(name, "softcap") == 0)
        k->softcap(out, s, n);
    else if (strcmp(name, "rope") == 0 && y) /* y: n/2 cosines, then n/2 sines */
        k->rope(out, y, y + n / 2, n / 2);
    else
        return false;
    return true;
}

/* row(isa, name, x [n], y [n] or None, s) -> [n]; name: scale_mul, add, mul, axpy, gelu, glu, clamp (to -s, s/2),
 * mul_add, layer_norm, softmax, softcap, rope. The output has the same misalignment as x. */
static PyObject *test_row(PyObject *self, PyObject *args)
{
    const char *isa, *name;
    PyArrayObject *x;
    PyObject *y_object = Py_None;
    float s = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "ssO!|Of", &isa, &name, &PyArray_Type, &x, &y_object, &s))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    const float *y = NULL;
    if (y_object != Py_None) {
        if (!PyArray_Check(y_object) || !is_rows((PyArrayObject *)y_object, NPY_FLOAT32, 1))
            return NULL;
        if (PyArray_SIZE((PyArrayObject *)y_object) != PyArray_SIZE(x))
            return PyErr_Format(PyExc_ValueError, "x and y differ in size");
        y = PyArray_DATA((PyArrayObject *)y_object);
    }
    npy_intp n = PyArray_SIZE(x), padded = n + 16;
    PyArrayObject *base = (PyArrayObject *)PyArray_SimpleNew(1, &padded, NPY_FLOAT32);
    if (!base)
        return NULL;
    float *out = (float *)PyArray_DATA(base) + (uintptr_t)PyArray_DATA(x) / sizeof(float) % 16;
    memcpy(out, PyArray_DATA(x), (size_t)n * sizeof *out);
    if (!apply_row(kernels, name, out, y, s, (int)n)) {
        Py_DECREF(base);
        return PyErr_Format(PyExc_ValueError, "no row kernel \"%s\"", name);
    }
    PyObject *view = PyArray_SimpleNewFromData(1, &n, NPY_FLOAT32, out);
    if (!view || PyArray_SetBaseObject((PyArrayObject *)view, (PyObject *)base) < 0) {
        Py_XDECREF(view);
        return NULL;
    }
    return view;
}

/* sum_squares(isa, x [n]) -> float */
static PyObject *test_sum_squares(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!", &isa, &PyArray_Type, &x))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    return PyFloat_FromDouble((double)kernels->sum_squares(PyArray_DATA(x), (int)PyArray_SIZE(x)));
}

/* block_maxima(isa, x [n], block) -> float32 [blocks] */
static PyObject *test_block_maxima(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    int block;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!i", &isa, &PyArray_Type, &x, &block))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    const npy_intp blocks = (PyArray_SIZE(x) + block - 1) / block;
    PyObject *out = PyArray_SimpleNew(1, &blocks, NPY_FLOAT32);
    if (out)
        kernels->block_maxima(PyArray_DATA(x), (int)PyArray_SIZE(x), block, PyArray_DATA((PyArrayObject *)out));
    return out;
}

/* list_within(isa, x [n], least, most) -> int32 [found] */
static PyObject *test_list_within(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    float least, most;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!ff", &isa, &PyArray_Type, &x, &least, &most))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    const npy_intp n = PyArray_SIZE(x);
    PyObject *ids = PyArray_SimpleNew(1, &n, NPY_INT32), *found = NULL;
    if (ids)
        found = PySequence_GetSlice(
            ids, 0, kernels->list_within(PyArray_DATA(x), (int)n, least, most, PyArray_DATA((PyArrayObject *)ids)));
    Py_XDECREF(ids);
    return found;
}

/* block_sums(isa, x [n], block, least) -> float64 [blocks] */
static PyObject *test_block_sums(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    int block;
    float least;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!if", &isa, &PyArray_Type, &x, &block, &least))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    const npy_intp blocks = (PyArray_SIZE(x) + block - 1) / block;
    PyObject *out = PyArray_SimpleNew(1, &blocks, NPY_FLOAT64);
    if (out)
        kernels->block_sums(PyArray_DATA(x), (int)PyArray_SIZE(x), block, least, PyArray_DATA((PyArrayObject *)out));
    return out;
}

/* sum_exp(isa, x [n], max) -> float */
static PyObject *test_sum_exp(PyObject *self, PyObject *args)
{
    const char *isa;
    PyArrayObject *x;
    float max;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!f", &isa, &PyArray_Type, &x, &max))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    return PyFloat_FromDouble(kernels->sum_exp(PyArray_DATA(x), max, (int)PyArray_SIZE(x)));
}

/* widen(isa, dtype, x [n]) -> float32 [n] */
static PyObject *test_widen(PyObject *self, PyObject *args)
{
    const char *isa, *dtype_name;
    PyArrayObject *x;
    (void)self;
    if (!PyArg_ParseTuple(args, "ssO!", &isa, &dtype_name, &PyArray_Type, &x))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    g4_dtype dtype = g4_dtype_parse(dtype_name);
    if (!kernels || dtype == G4_N_DTYPES || !is_rows(x, type_of(dtype), 1))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "unknown dtype");
    npy_intp n_bytes = PyArray_NBYTES(x), block_bytes = (npy_intp)g4_block_bytes(dtype);
    if (n_bytes % block_bytes)
        return PyErr_Format(PyExc_ValueError, "%zd bytes are no whole number of blocks", n_bytes);
    npy_intp n = n_bytes / block_bytes * (npy_intp)g4_block_size(dtype);
    PyObject *out = PyArray_SimpleNew(1, &n, NPY_FLOAT32);
    if (out)
        g4_widen_for(kernels, dtype)(PyArray_DATA((PyArrayObject *)out), PyArray_DATA(x), (int)n);
    return out;
}

/* narrow(isa, dtype, x float32 [n]) -> uint8 [bytes of n values] */
static PyObject *test_narrow(PyObject *self, PyObject *args)
{
    const char *isa, *dtype_name;
    PyArrayObject *x;
    (void)self;
    if (!PyArg_ParseTuple(args, "ssO!", &isa, &dtype_name, &PyArray_Type, &x))
        return NULL;
    const g4_kernels *kernels = table_of(isa);
    const g4_dtype dtype = g4_dtype_parse(dtype_name);
    if (!kernels || !is_rows(x, NPY_FLOAT32, 1))
        return NULL;
    if (!g4_narrow_for(kernels, dtype) || (size_t)PyArray_SIZE(x) % g4_block_size(dtype))
        return PyErr_Format(PyExc_ValueError, "%s is no cache's type, or not a whole number of its blocks", dtype_name);
    npy_intp n_bytes = (npy_intp)g4_dtype_bytes(dtype, (size_t)PyArray_SIZE(x));
    PyObject *out = PyArray_SimpleNew(1, &n_bytes, NPY_UINT8);
    if (out)
        g4_narrow_for(kernels, dtype)(PyArray_DATA((PyArrayObject *)out), PyArray_DATA(x), (int)PyArray_SIZE(x));
    return out;
}

/* names() -> every kernel of kernels.inc */
static PyObject *test_names(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    static const char *const names[] = {
#define G4_KERNEL(result, name, args) #name,
#include "kernels/kernels.inc"
#undef G4_KERNEL
    };
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < sizeof names / sizeof *names; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyList_Append(list, name))
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

/* cpu_cores(root, cpus) -> int, cpu_quota(root) -> int: base/cpu.h with another root directory */
static PyObject *test_cpu_cores(PyObject *self, PyObject *args)
{
    const char *root;
    PyArrayObject *cpus;
    (void)self;
    if (!PyArg_ParseTuple(args, "sO!", &root, &PyArray_Type, &cpus) || !is_rows(cpus, NPY_INT32, 1))
        return NULL;
    return PyLong_FromLong(g4_cpu_cores(root, PyArray_DATA(cpus), (int)PyArray_DIM(cpus, 0)));
}

static PyObject *test_cpu_quota(PyObject *self, PyObject *args)
{
    const char *root;
    (void)self;
    return PyArg_ParseTuple(args, "s", &root) ? PyLong_FromLong(g4_cpu_quota(root)) : NULL;
}

static PyMethodDef testing_methods[] = {
    {"names", test_names, METH_NOARGS, "Names of all kernels."},
    {"matmul", test_matmul, METH_VARARGS,
     "matmul(isa, dtype, x [m, k], w [n, k]) -> [m, n]; quantised w as uint8 [n, bytes]"},
    {"matmul_packed", test_matmul_packed, METH_VARARGS, "The same, x packed first."},
    {"quantize_rows", test_quantize_rows, METH_VARARGS,
     "quantize_rows(isa, x [m, k]) -> q, scale, sum16, sum32, minus_4, minus_8"},
    {"matmul_int8", test_matmul_int8, METH_VARARGS, "matmul_int8(isa, dtype, quantize_rows(…), m, w) -> [m, n]"},
    {"weighted_sum", test_weighted_sum, METH_VARARGS,
     "weighted_sum(isa, dtype, p [m, n], v [n, d], acc [m, d]) -> [m, d]"},
    {"fire", test_fire, METH_VARARGS,
     "fire(isa, x, before, scale, after, gate, threshold, first, least) -> x, ids or None"},
    {"matmul_panel", test_matmul_panel, METH_VARARGS,
     "matmul_panel(isa, x [m, k], w [k, 16], n, out or None) -> [m, n]"},
    {"matmul_tiles", test_matmul_tiles, METH_VARARGS, "matmul_tiles(isa, x [m, k], w [n, k]) -> [m, n]"},
    {"pack_panel", test_pack_panel, METH_VARARGS, "pack_panel(isa, w [n, k]) -> [k, 16]"},
    {"quantize_rows16", test_quantize_rows16, METH_VARARGS, "quantize_rows16(isa, x [m, k], low, high) -> q, scale"},
    {"softmax_rows16", test_softmax_rows16, METH_VARARGS,
     "softmax_rows16(isa, x [m, n]) -> q, scale; x is overwritten"},
    {"pack_panel16", test_pack_panel16, METH_VARARGS, "pack_panel16(isa, w [n, k]) -> q, scale"},
    {"matmul_panel16", test_matmul_panel16, METH_VARARGS,
     "matmul_panel16(isa, quantize_rows16(…), pack_panel16(…), n, groups at once) -> [m, n]"},
    {"row", test_row, METH_VARARGS, "row(isa, name, x [n], y [n] or None, s) -> [n]"},
    {"sum_squares", test_sum_squares, METH_VARARGS, "sum_squares(isa, x [n]) -> float"},
    {"block_maxima", test_block_maxima, METH_VARARGS, "block_maxima(isa, x [n], block) -> [blocks]"},
    {"list_within", test_list_within, METH_VARARGS, "list_within(isa, x [n], least, most) -> int32 [found]"},
    {"block_sums", test_block_sums, METH_VARARGS, "block_sums(isa, x [n], block, least) -> float64 [blocks]"},
    {"sum_exp", test_sum_exp, METH_VARARGS, "sum_exp(isa, x [n], max) -> float"},
    {"widen", test_widen, METH_VARARGS, "widen(isa, dtype, x [n] or uint8 [bytes]) -> float32 [n]"},
    {"narrow", test_narrow, METH_VARARGS, "narrow(isa, dtype, x [n]) -> uint8 [bytes]"},
    {"cpu_cores", test_cpu_cores, METH_VARARGS, "cpu_cores(root, cpus int32 [n]) -> cores among them"},
    {"cpu_quota", test_cpu_quota, METH_VARARGS, "cpu_quota(root) -> CPUs of the cgroups' quota, 0: no limit"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef testing_definition = {PyModuleDef_HEAD_INIT,
                                                "gemma4._engine.testing",
                                                "Kernels, one by one.",
                                                0,
                                                testing_methods,
                                                NULL,
                                                NULL,
                                                NULL,
                                                NULL};

PyObject *engine_testing_module(void)
{
    return PyModule_Create(&testing_definition);
}
