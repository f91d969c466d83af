/* SPDX-License-Identifier: Apache-2.0 */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>

g4_status g4_fail(g4_error *err, g4_status status, const char *format, ...)
{
    va_list args;
    err->status = status;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return status;
}

g4_status g4_fail_nomem(g4_error *err, unsigned long long n_bytes)
{
    return g4_fail(err, G4_ENOMEM, "out of memory: %llu bytes asked for", n_bytes);
}
