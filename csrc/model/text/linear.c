/* SPDX-License-Identifier: Apache-2.0 */
/* Linear layers of the text decoder. Reading through taps changes no bit of the logits.
 *
 * In `fast` the number of rows chooses the method (ops/linear.c). Pruning leaves only rows with logits, unless captures
 * or hooks keep more. Those rows become separate jobs. So rows with logits get the same method, and the same bits, as
 * without captures and hooks.
 */
#include <string.h>

#include "model/text/forward.h"

enum { GROUPS = 2 }; /* rows with logits, then rows kept for captures and hooks */

bool g4_rows_are_split(const g4_forward *f)
{
    return f->exec.fast && f->n_with_logits > 0 && f->n_with_logits < f->n_rows;
}

void g4_order_rows(const g4_forward *f, int *rows)
{
    const bool split = g4_rows_are_split(f);
    int place[GROUPS] = {0, f->n_with_logits};
    for (int row = 0; row < f->n_rows; row++)
        rows[place[split && f->logits_slot[row] < 0]++] = row;
}

static g4_status gather(g4_forward *f, const int *rows, const g4_linear_job *job, const float **gathered)
{
    const size_t k = job->w.n_cols;
    float *x;
    G4_ALLOC(&f->exec, x, (size_t)f->n_rows * k);
    for (int i = 0; i < f->n_rows; i++)
        memcpy(x + (size_t)i * k, job->x + (size_t)rows[i] * job->x_stride, k * sizeof *x);
    *gathered = x;
    return G4_OK;
}

static g4_status split_jobs(g4_forward *f, const g4_linear_job *jobs, int n_jobs)
{
    const int first[GROUPS] = {0, f->n_with_logits}, n[GROUPS] = {f->n_with_logits, f->n_rows - f->n_with_logits};
    int *rows;
    const float **x;
    g4_linear_job *split;
    G4_ALLOC(&f->exec, rows, (size_t)f->n_rows);
    G4_ALLOC(&f->exec, x, (size_t)n_jobs);
    G4_ALLOC(&f->exec, split, (size_t)(GROUPS * n_jobs));
    g4_order_rows(f, rows);
    for (int j = 0; j < n_jobs; j++) {
        const size_t width = jobs[j].w.n_rows;
        float *out;
        x[j] = NULL;
        for (int i = 0; i < j && !x[j]; i++) /* jobs that share x still share it: it is rounded once */
            x[j] = jobs[i].x == jobs[j].x ? x[i] : NULL;
        if (!x[j])
            G4_TRY(gather(f, rows, &jobs[j], &x[j]));
        G4_ALLOC(&f->exec, out, (size_t)f->n_rows * width);
        for (int g = 0; g < GROUPS; g++)
            split[g * n_jobs + j] = (g4_linear_job){.x = x[j] + (size_t)first[g] * jobs[j].w.n_cols,
                                                    .x_stride = jobs[j].w.n_cols,
                                                    .m = n[g],
                                                    .w = jobs[j].w,
                                                    .out = out + (size_t)first[g] * width,
                                                    .out_stride = width};
    }
    G4_TRY(g4_linear_jobs(&f->exec, split, GROUPS * n_jobs));
    for (int j = 0; j < n_jobs; j++)
        for (int i = 0; i < f->n_rows; i++)
            memcpy(jobs[j].out + (size_t)rows[i] * jobs[j].out_stride, split[j].out + (size_t)i * split[j].out_stride,
                   split[j].out_stride * sizeof *split[j].out);
    return G4_OK;
}

g4_status g4_text_linear_jobs(g4_forward *f, const g4_linear_job *jobs, int n_jobs)
{
    if (!g4_rows_are_split(f))
        return g4_linear_jobs(&f->exec, jobs, n_jobs);
    g4_arena_mark mark = g4_arena_save(f->exec.arena);
    G4_TRY(split_jobs(f, jobs, n_jobs));
    g4_arena_restore(f->exec.arena, mark);
    return G4_OK;
}

g4_status g4_text_linear(g4_forward *f, const float *x, const g4_matrix *w, float *out)
{
    g4_linear_job job = {x, w->n_cols, f->n_rows, *w, out, w->n_rows};
    return g4_text_linear_jobs(f, &job, 1);
}
