/* SPDX-License-Identifier: Apache-2.0 */
/* Mappings of files that may shrink. When a file shrinks, every mapping of it loses the pages beyond its new end.
 * Reading such a page raises SIGBUS. In a guarded range the handler maps zeros there instead and marks the range as
 * torn. Readers call g4_guards_check before they use the numbers.
 *
 * The signal handler belongs to the process: faults elsewhere, and signals that are sent, go to the previous handler.
 * Any thread may make, check and free guards.
 */
#ifndef GEMMA4_BASE_GUARD_H
#define GEMMA4_BASE_GUARD_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

typedef struct g4_guard g4_guard;

g4_guard *g4_guard_new(const void *map, size_t n_bytes); /* NULL: out of memory */
void g4_guard_free(g4_guard *guard);                     /* before the range is unmapped; NULL is fine */
bool g4_guard_is_torn(const g4_guard *guard);

/* Reinstalls the handler if another one replaced it. Costs one system call. Call it before reading. */
void g4_guard_arm(void);

/* The guards of a model's tensors. */
typedef struct {
    const g4_guard **items;
    size_t n;
} g4_guard_set;

/* Adds the guard of the range that holds `data`, if there is one and it is not in the set yet. */
g4_status g4_guards_add(g4_guard_set *set, const void *data, g4_error *err);
g4_status g4_guards_check(const g4_guard_set *set, g4_error *err); /* G4_EFORMAT if one is torn */
void g4_guards_release(g4_guard_set *set);

#endif
