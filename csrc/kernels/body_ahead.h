/* SPDX-License-Identifier: Apache-2.0 */
/* Asking for what is wanted next while there is still work to do. */

/* Decode reads its weights once, in long runs. The processor's own prefetching stops at every page of 4 KB and at
 * the end of what it thinks is a stream: with this, two Zen 3 cores read Q4_0 rows at 30 GB/s instead of 22.
 * Processors with AVX-512 are mostly servers', whose memory takes longer: on two cores of a Sapphire Rapids 2 KB
 * instead of 1 brought Q4_0 from 17.5 to 19.7 GB/s, Q4_K from 17.6 to 21.2, Q6_K from 19.0 to 21.9, bf16 from 22.8
 * to 23.9 and left Q8_0 at 23.5 (medians of 11 turns); 4 KB did as well, 8 less. */
enum { AHEAD_BYTES = VEC_LANES == 16 ? 2048 : 1024 };

static INLINE void prefetch_ahead(const void *p, size_t n_bytes, size_t ahead)
{
    for (size_t byte = 0; byte < n_bytes; byte += 64)
        __builtin_prefetch((const char *)p + ahead + byte);
}

/* Rows side by side go on where they end. Keys and values of one head lie a whole position apart, 4 KB in 26B-A4B, and
 * what follows them there is another head's: of those the rows ahead are asked for. */
static INLINE size_t bytes_ahead(size_t row_bytes, size_t stride_bytes)
{
    return stride_bytes <= row_bytes ? AHEAD_BYTES : ROWS_AHEAD * stride_bytes;
}

/* Rows that are wanted next, `at` bytes of the first of them asked for already. */
typedef struct {
    const char *row;
    size_t row_bytes, stride_bytes, at;
    int n_rows;
} prefetch_rows;

static INLINE size_t count_lines(const prefetch_rows *next)
{
    return (size_t)next->n_rows * ((next->row_bytes + 63) / 64);
}

/* n lines of them. All at once they would be more than the processor has in flight (24 lines on Zen 3). */
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
