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

/* Rows of one group, ascending. Rows that follow each other are computed where they lie; others are gathered. */
typedef struct row_group {
    const int *rows;
    int n;
    bool in_place;
} row_group;

static void group_rows(const g4_forward *f, int *rows, row_group groups[GROUPS])
{
    const int first[GROUPS] = {0, f->n_with_logits}, n[GROUPS] = {f->n_with_logits, f->n_rows - f->n_with_logits};
    g4_order_rows(f, rows);
    for (int g = 0; g < GROUPS; g++) {
        const int *of = rows + first[g];
        groups[g] = (row_group){of, n[g], of[n[g] - 1] - of[0] == n[g] - 1};
    }
}

static g4_linear_job job_in_place(const g4_linear_job *job, const row_group *group)
{
    g4_linear_job part = *job;
    part.x += (size_t)group->rows[0] * job->x_stride;
    part.out += (size_t)group->rows[0] * job->out_stride;
    part.m = group->n;
    return part;
}

/* Jobs with the same x share the gathered rows: they are rounded once. */
static g4_status gather(g4_forward *f, const g4_linear_job *jobs, int j, const row_group *group, g4_linear_job *parts)
{
    const size_t k = jobs[j].w.n_cols, width = jobs[j].w.n_rows;
    const float *shared = NULL;
    float *out;
    for (int i = 0; i < j && !shared; i++)
        shared = jobs[i].x == jobs[j].x ? parts[i].x : NULL;
    if (!shared) {
        float *x;
        G4_ALLOC(&f->exec, x, (size_t)group->n * k);
        for (int i = 0; i < group->n; i++)
            memcpy(x + (size_t)i * k, jobs[j].x + (size_t)group->rows[i] * jobs[j].x_stride, k * sizeof *x);
        shared = x;
    }
    G4_ALLOC(&f->exec, out, (size_t)group->n * width);
    parts[j] = (g4_linear_job){shared, k, group->n, jobs[j].w, out, width};
    return G4_OK;
}

static void scatter(const g4_linear_job *job, const row_group *group, const g4_linear_job *part)
{
    for (int i = 0; i < group->n; i++)
        memcpy(job->out + (size_t)group->rows[i] * job->out_stride, part->out + (size_t)i * part->out_stride,
               part->out_stride * sizeof *part->out);
}

static g4_status split_jobs(g4_forward *f, const g4_linear_job *jobs, int n_jobs)
{
    int *rows;
    g4_linear_job *parts;
    row_group groups[GROUPS];
    G4_ALLOC(&f->exec, rows, (size_t)f->n_rows);
    G4_ALLOC(&f->exec, parts, (size_t)(GROUPS * n_jobs));
    group_rows(f, rows, groups);
    for (int g = 0; g < GROUPS; g++)
        for (int j = 0; j < n_jobs; j++) {
            if (groups[g].in_place)
                parts[g * n_jobs + j] = job_in_place(&jobs[j], &groups[g]);
            else
                G4_TRY(gather(f, jobs, j, &groups[g], parts + g * n_jobs));
        }
    G4_TRY(g4_linear_jobs(&f->exec, parts, GROUPS * n_jobs));
    for (int g = 0; g < GROUPS; g++)
        for (int j = 0; !groups[g].in_place && j < n_jobs; j++)
            scatter(&jobs[j], &groups[g], &parts[g * n_jobs + j]);
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
