/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GEMMA4_BASE_PAGES_H
#define GEMMA4_BASE_PAGES_H

#include <stddef.h>

/* Memory for arrays that are read from end to end, aligned to at least a cache line. From 2 MB on it uses huge pages
 * where the system has them. free() frees it. NULL: out of memory. */
void *g4_pages_alloc(size_t n_bytes);

/* Drops a file mapping's pages from this process's resident set. They stay in the system's page cache and come back
 * when they are read. For mappings of files only (anonymous memory would be lost). */
void g4_pages_release(const void *data, size_t n_bytes);

#endif
