/* SPDX-License-Identifier: Apache-2.0 */
/* Jobs that share one x (q, k and v; gate and up; not experts): x is converted once for all of them. */
#ifndef GEMMA4_OPS_INPUTS_H
#define GEMMA4_OPS_INPUTS_H

#include "ops/linear.h"

typedef struct {
    const g4_linear_job **jobs; /* [n] the first job of each distinct x */
    int *of_job;                /* [n_jobs] index of a job's x; -1: `wanted` excluded the job */
    int *first;                 /* [n + 1] first unit of each x, counted over all x */
    int n;
} g4_inputs;

/* Allocates in scratch memory. unit: rows that are converted together; the last unit of an x may have fewer rows. */
g4_status g4_inputs_new(g4_exec *exec, const g4_linear_job *jobs, int n_jobs, int unit,
                        bool (*wanted)(const g4_exec *, const g4_linear_job *), g4_inputs *inputs);

/* Index of the x that holds unit `first`. *stop: end of the part of units [first, end) that belongs to this x. */
static inline int g4_inputs_at(const g4_inputs *inputs, int first, int end, int *stop)
{
    int i = 0;
    while (first >= inputs->first[i + 1])
        i++;
    *stop = end < inputs->first[i + 1] ? end : inputs->first[i + 1];
    return i;
}

#endif
