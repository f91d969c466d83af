/* SPDX-License-Identifier: Apache-2.0 */
/* weighted_sum for one type of cached rows. Include after that type's widen_, with the same macros and
 *   ROW_BYTES(k)  how many bytes k values take
 *   PLAIN_ROWS    defined if body_mix_rows.h has been included for the type
 */
#ifndef MIX_BYTES
#define MIX_BYTES 16384    /* bytes of keys at a time: half of the first-level cache; the rest is for prefetching */
#define MIX_WIDTH 256      /* columns widened at a time; sums are loaded and stored once per 16 keys */
#define MIX_ROWS 8         /* up to this many rows of p use mix_few_ */
#define MIX_STRIDED_KEYS 8 /* keys at a time where rows may lie 4 KB apart and share one set of the 8-way cache */
#endif

static INLINE prefetch_rows NAME(prefetch_keys_)(const char *first, size_t stride, int columns, int left, int most)
{
    return (prefetch_rows){.row = first,
                           .row_bytes = ROW_BYTES((size_t)columns),
                           .stride_bytes = ROW_BYTES(stride),
                           .n_rows = left < most ? left : most};
}

#ifdef PLAIN_ROWS
/* Few rows of p, as when the heads of one decoded token share keys: v is read in place. f16 from memory on one Zen 3
 * core, widened copies (below) -> in place: 8 rows of 512 5.6 -> 7.4 GB/s, of 256 6.6 -> 7.8, 4 rows 7.6 -> 12.4; 2
 * rows, keys of 8 heads side by side, 10.2 -> 12.7. */
static void NAME(mix_few_)(const float *p, size_t p_stride, int m, const weight *v, size_t v_stride, int n_keys, int d,
                           float *acc, size_t acc_stride)
{
    const int fit = MIX_BYTES / (int)ROW_BYTES((size_t)d), most = v_stride > (size_t)d ? MIX_STRIDED_KEYS
                                                                  : fit                ? fit
                                                                                       : 1;
    for (int j = 0, rows; j < n_keys; j += rows) {
        rows = n_keys - j < most ? n_keys - j : most;
        const weight *from = v + (size_t)j * v_stride;
        NAME(mix_rows_)
        (p + j, p_stride, m, from, v_stride, rows, d, acc, acc_stride,
         NAME(prefetch_keys_)((const char *)(from + (size_t)rows * v_stride), v_stride, d, n_keys - j - rows, most));
    }
}
#endif

/* With more rows of p, a few keys at a time are widened for all of them. */
static void NAME(weighted_sum_)(const float *p, size_t p_stride, int m, const void *values, size_t v_stride, int n_keys,
                                int d, float *acc, size_t acc_stride)
{
#ifdef PLAIN_ROWS
    if (m <= MIX_ROWS) {
        NAME(mix_few_)(p, p_stride, m, values, v_stride, n_keys, d, acc, acc_stride);
        return;
    }
#endif
    _Alignas(64) float v[MIX_BYTES / sizeof(float)];
    const int width = d < MIX_WIDTH ? d : MIX_WIDTH, keys = (int)(sizeof v / sizeof *v) / width;
    for (int c = 0; c < d; c += width)
        for (int j = 0; j < n_keys; j += keys) {
            const int columns = d - c < width ? d - c : width, rows = n_keys - j < keys ? n_keys - j : keys;
            const char *from = (const char *)values + ROW_BYTES((size_t)j * v_stride + (size_t)c);
            const char *following = from + ROW_BYTES((size_t)rows * v_stride);
            for (int r = 0; r < rows; r++)
                NAME(widen_)(v + r * columns, from + ROW_BYTES((size_t)r * v_stride), columns);
            mix_rows_f32(p + j, p_stride, m, v, (size_t)columns, rows, columns, acc + c, acc_stride,
                         NAME(prefetch_keys_)(following, v_stride, columns, n_keys - j - rows, keys));
        }
}
