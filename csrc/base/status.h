/* SPDX-License-Identifier: Apache-2.0 */
/* Result of a call: a status and, on failure, a message with what was found and what was expected. */
#ifndef GEMMA4_BASE_STATUS_H
#define GEMMA4_BASE_STATUS_H

typedef enum {
    G4_OK = 0,
    G4_ENOMEM,       /* MemoryError */
    G4_EFORMAT,      /* gemma4.FormatError */
    G4_EVALUE,       /* ValueError */
    G4_EUNSUPPORTED, /* NotImplementedError */
    G4_ESTATE,       /* gemma4.StateError */
    G4_ECAPACITY,    /* gemma4.CapacityError */
    G4_ECANCELLED    /* the pending signal or the exception that a callback raised */
} g4_status;

typedef struct {
    g4_status status;
    char message[480];
} g4_error;

/* Fills *err and returns status, so that a check reads `return g4_fail(err, G4_EVALUE, "...", ...)`. */
g4_status g4_fail(g4_error *err, g4_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* "out of memory", with the number of bytes requested. */
g4_status g4_fail_nomem(g4_error *err, unsigned long long n_bytes);

#define G4_TRY(call)                    \
    do {                                \
        g4_status try_status_ = (call); \
        if (try_status_ != G4_OK)       \
            return try_status_;         \
    } while (0)

#endif
