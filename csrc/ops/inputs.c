/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/inputs.h"

static bool same_x(const g4_linear_job *a, const g4_linear_job *b)
{
    return a->x == b->x && a->m == b->m && a->x_stride == b->x_stride && a->w.n_cols == b->w.n_cols;
}

g4_status g4_inputs_new(g4_exec *exec, const g4_linear_job *jobs, int n_jobs, int unit,
                        bool (*wanted)(const g4_exec *, const g4_linear_job *), g4_inputs *inputs)
{
    inputs->n = 0;
    G4_ALLOC(exec, inputs->jobs, (size_t)n_jobs);
    G4_ALLOC(exec, inputs->of_job, (size_t)n_jobs);
    G4_ALLOC(exec, inputs->first, (size_t)n_jobs + 1);
    inputs->first[0] = 0;
    for (int j = 0; j < n_jobs; j++) {
        inputs->of_job[j] = -1;
        if (!wanted(exec, &jobs[j]))
            continue;
        int i = 0;
        while (i < inputs->n && !same_x(inputs->jobs[i], &jobs[j]))
            i++;
        inputs->of_job[j] = i;
        if (i == inputs->n) {
            inputs->jobs[i] = &jobs[j];
            inputs->first[i + 1] = inputs->first[i] + (jobs[j].m + unit - 1) / unit;
            inputs->n++;
        }
    }
    return G4_OK;
}
