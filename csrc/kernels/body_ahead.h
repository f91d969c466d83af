/* SPDX-License-Identifier: Apache-2.0 */
/* Software prefetch of the next rows. */

/* Decode reads its weights once, in long sequential runs. The hardware prefetcher stops at every 4 KB page and at the
 * end of each detected stream. With this prefetch, two Zen 3 cores read Q4_0 rows at 30 GB/s instead of 22. Processors
 * with AVX-512 are mostly servers with higher memory latency. On two cores of a Sapphire Rapids, 2 KB instead of 1
 * brought Q4_0 from 17.5 to 19.7 GB/s, Q4_K from 17.6 to 21.2, Q6_K from 19.0 to 21.9, bf16 from 22.8 to 23.9 and left
 * Q8_0 at 23.5 (medians of 11 rounds). 4 KB did as well, 8 KB less. */
enum { AHEAD_BYTES = VEC_LANES == 16 ? 2048 : 1024 };

static INLINE void prefetch_ahead(const void *p, size_t n_bytes, size_t ahead)
{
    for (size_t byte = 0; byte < n_bytes; byte += 64)
        __builtin_prefetch((const char *)p + ahead + byte);
}

/* The prefetch distance. Contiguous rows continue where they end. Keys and values of one head lie a whole position
 * apart (4 KB in 26B-A4B), with other heads between them: there the distance is ROWS_AHEAD rows of the same head. */
static INLINE size_t bytes_ahead(size_t row_bytes, size_t stride_bytes)
{
    return stride_bytes <= row_bytes ? AHEAD_BYTES : ROWS_AHEAD * stride_bytes;
}

/* Rows to prefetch; the first `at` bytes of the first row are already prefetched. */
typedef struct {
    const char *row;
    size_t row_bytes, stride_bytes, at;
    int n_rows;
} prefetch_rows;

static INLINE size_t count_lines(const prefetch_rows *next)
{
    return (size_t)next->n_rows * ((next->row_bytes + 63) / 64);
}

/* Prefetches the next n cache lines. All lines at once would exceed the processor's in-flight limit (24 lines on Zen
 * 3). */
static INLINE void prefetch_lines(prefetch_rows *next, size_t n)
{
    while (n > 0 && next->n_rows > 0) {
        const size_t left = (next->row_bytes - next->at + 63) / 64, now = n < left ? n : left;
        prefetch_ahead(next->row, now * 64, next->at);
        n -= now;
        next->at += now * 64;
        if (now == left) {
            next->at = 0;
            next->row += next->stride_bytes;
            next->n_rows--;
        }
    }
}

/* Rows of which `bytes` are needed soon, to prefetch one by one while there is other work: into the second-level cache.
 * In the first, they would wait for its few slots for lines in flight, and so would the work (8 rows of Q4_0 on one Zen
 * 4 core: 50 ms instead of 57). */
typedef struct {
    const char *row;
    size_t stride, bytes;
    int n;
} next_rows;

static INLINE void prefetch_row(const next_rows *next, int row)
{
    if (row < next->n)
        for (size_t byte = 0; byte < next->bytes; byte += 64)
            __builtin_prefetch(next->row + (size_t)row * next->stride + byte, 0, 2);
}

/* Rows [first, first + n), those that exist. */
static INLINE next_rows next_part(const next_rows *next, int first, int n)
{
    const int left = next->n - first;
    return (next_rows){next->row + (size_t)first * next->stride, next->stride, next->bytes, left < n ? left : n};
}
