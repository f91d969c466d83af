/* SPDX-License-Identifier: Apache-2.0 */
/* Maps of files that may shrink. A file that gets shorter takes the pages beyond its new end away from every map of it,
 * and reading one raises SIGBUS. Reads of a guarded range find zeros there instead, and the range is torn from then on:
 * whoever has read it asks g4_guards_check before anything is made of the numbers.
 *
 * The signal's handler is the process's: faults elsewhere, and signals that somebody sends, go to the handler that was
 * there before. Guards may be made, checked and freed by any thread.
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

/* Puts the handler in place again if another was installed over it. One system call; call it before reading. */
void g4_guard_arm(void);

/* The guards of what a model was made of. */
typedef struct {
    const g4_guard **items;
    size_t n;
} g4_guard_set;

/* Adds the guard of the range that holds `data`, if there is one and it is not in the set yet. */
g4_status g4_guards_add(g4_guard_set *set, const void *data, g4_error *err);
g4_status g4_guards_check(const g4_guard_set *set, g4_error *err); /* G4_EFORMAT if one is torn */
void g4_guards_release(g4_guard_set *set);

#endif
