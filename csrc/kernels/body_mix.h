/* SPDX-License-Identifier: Apache-2.0 */
/* weighted_sum for one type of cached rows: include after that type's widen_, with the same macros and
 *   ROW_BYTES(k)  how many bytes those k values take
 */
static void NAME(weighted_sum_)(const float *p, size_t p_stride, int m, const void *values, size_t v_stride, int n_keys,
                                int d, float *acc, size_t acc_stride)
{
    _Alignas(64) float v[MIX_VALUES];
    const int width = d < MIX_WIDTH ? d : MIX_WIDTH, keys = MIX_VALUES / width;
    for (int c = 0; c < d; c += width)
        for (int j = 0; j < n_keys; j += keys) {
            const int columns = d - c < width ? d - c : width, rows = n_keys - j < keys ? n_keys - j : keys;
            const char *from = (const char *)values + ROW_BYTES((size_t)j * v_stride + (size_t)c);
            const int left = n_keys - j - rows;
            const rows_to_come next = {from + ROW_BYTES((size_t)rows * v_stride), ROW_BYTES((size_t)columns),
                                       ROW_BYTES(v_stride), left < keys ? left : keys};
            for (int r = 0; r < rows; r++)
                NAME(widen_)(v + r * columns, from + ROW_BYTES((size_t)r * v_stride), columns);
            mix_rows(p + j, p_stride, m, v, rows, columns, acc + c, acc_stride, next);
        }
}
