/* SPDX-License-Identifier: Apache-2.0 */
#include "base/pages.h"

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CACHE_LINE = 64, HUGE_PAGE = 2 << 20 };

void *g4_pages_alloc(size_t n_bytes)
{
    const size_t page = n_bytes < HUGE_PAGE ? CACHE_LINE : HUGE_PAGE;
    if (n_bytes > SIZE_MAX - page)
        return NULL;
    const size_t padded = n_bytes ? (n_bytes + page - 1) / page * page : page;
    void *data = aligned_alloc(page, padded);
#ifdef MADV_HUGEPAGE
    if (data && page == HUGE_PAGE) /* a failure costs time, not correctness */
        (void)madvise(data, padded, MADV_HUGEPAGE);
#endif
    return data;
}

void g4_pages_release(const void *data, size_t n_bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)data + page - 1) / page * page, end = ((uintptr_t)data + n_bytes) / page * page;
    if (end > first) /* a failure costs memory, not correctness */
        (void)madvise((void *)first, end - first, MADV_DONTNEED);
}
