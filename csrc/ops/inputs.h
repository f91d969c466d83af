/* SPDX-License-Identifier: Apache-2.0 */
/* Jobs with the same x (q, k and v; gate and up; not those of experts): what is made of an x is made once. */
#ifndef GEMMA4_OPS_INPUTS_H
#define GEMMA4_OPS_INPUTS_H

#include "ops/linear.h"

typedef struct {
    const g4_linear_job **jobs; /* [n] the first of each x */
    int *of_job;                /* [n_jobs] which x a job has; -1: it was not wanted */
    int *first;                 /* [n + 1] its first row, or unit of some rows, among those of all */
    int n;
} g4_inputs;

/* In scratch memory. unit: rows that are worked on together, the last of an x may be fewer. */
g4_status g4_inputs_new(g4_exec *exec, const g4_linear_job *jobs, int n_jobs, int unit,
                        bool (*wanted)(const g4_exec *, const g4_linear_job *), g4_inputs *inputs);

/* Of units [first, end) of all those of the first x: its index, and the end of its share in *stop. */
static inline int g4_inputs_at(const g4_inputs *inputs, int first, int end, int *stop)
{
    int i = 0;
    while (first >= inputs->first[i + 1])
        i++;
    *stop = end < inputs->first[i + 1] ? end : inputs->first[i + 1];
    return i;
}

#endif
