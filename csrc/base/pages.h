/* SPDX-License-Identifier: Apache-2.0 */
#ifndef GEMMA4_BASE_PAGES_H
#define GEMMA4_BASE_PAGES_H

#include <stddef.h>

/* Memory for arrays that are read from end to end, aligned to a cache line at least, freed by free(). From 2 MB on in
 * huge pages where the system has them. NULL: out of memory. */
void *g4_pages_alloc(size_t n_bytes);

/* Lets go of a file mapping's pages: they leave this process's resident set, stay in the system's page cache, and come
 * back when they are read. For mappings of files only (anonymous memory would be lost). */
void g4_pages_release(const void *data, size_t n_bytes);

#endif
