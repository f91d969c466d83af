/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/pick.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* ---- selection ---------------------------------------------------------------------------------------------------- */

enum { DIGIT = 8, DIGITS = 1 << DIGIT };

/* Unsigned integers in the order of the floats. */
static uint32_t order_of(float x)
{
    const uint32_t bits = g4_f32_bits(x);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

static float float_of(uint32_t order)
{
    return g4_f32_from_bits(order >> 31 ? order & ~(1u << 31) : ~order);
}

/* The k-th largest, 1 <= k <= n, digit by digit from the highest: no input makes this slow. */
static float kth_largest(const float *x, int n, int k)
{
    uint32_t found = 0, mask = 0;
    for (int shift = 32 - DIGIT; shift >= 0; shift -= DIGIT) {
        int counts[DIGITS] = {0}, digit = DIGITS - 1;
        for (int i = 0; i < n; i++) {
            const uint32_t order = order_of(x[i]);
            counts[order >> shift & (DIGITS - 1)] += (order & mask) == found;
        }
        for (; counts[digit] < k; digit--)
            k -= counts[digit];
        found |= (uint32_t)digit << shift;
        mask |= (uint32_t)(DIGITS - 1) << shift;
    }
    return float_of(found);
}

/* ---- the largest logits of a row ------------------------------------------------------------------------------------ */

enum { LARGEST_BLOCK = 512, SMALLEST_BLOCK = 16 };

/* k maxima of blocks are k logits, so the k-th largest maximum is a lower bound for the k-th largest logit. With twice as
 * many blocks it is a good one. */
static int block_of(int n, int k)
{
    int block = LARGEST_BLOCK;
    while (block > SMALLEST_BLOCK && n / block < 2 * k)
        block /= 2;
    return block;
}

static int n_blocks(int n, int block)
{
    return (n + block - 1) / block;
}

/* Appends the logits >= least of the blocks that have one. */
static void list_blocks(const g4_kernels *kernels, const float *x, int n, int block, const float *maxima, float least,
                        g4_pick *pick)
{
    for (int b = 0; b < n_blocks(n, block); b++) {
        if (maxima[b] < least)
            continue;
        const int first = b * block, size = n - first < block ? n - first : block;
        int32_t *ids = pick->ids + pick->n;
        const int found = kernels->list_within(x + first, size, least, INFINITY, ids);
        for (int i = 0; i < found; i++) {
            ids[i] += first;
            pick->values[pick->n++] = x[ids[i]];
        }
    }
}

static void drop_below(g4_pick *pick, float least)
{
    int n = 0;
    for (int i = 0; i < pick->n; i++) {
        const float value = pick->values[i];
        pick->ids[n] = pick->ids[i];
        pick->values[n] = value;
        n += value >= least;
    }
    pick->n = n;
}

static void list_largest(const g4_kernels *kernels, const float *x, int n, int block, const float *maxima,
                         g4_pick *pick)
{
    const int blocks = n_blocks(n, block);
    const float near = pick->within > 0 ? pick->top - pick->within : INFINITY;
    float bound = near;
    if (pick->k)
        bound = fminf(near, pick->k <= blocks ? kth_largest(maxima, blocks, pick->k) : -INFINITY);
    list_blocks(kernels, x, n, block, maxima, fmaxf(bound, -FLT_MAX), pick);
    if (pick->k && pick->n > pick->k)
        drop_below(pick, fminf(near, kth_largest(pick->values, pick->n, pick->k)));
}

int g4_pick_scratch(int n, int k)
{
    return n_blocks(n, block_of(n, k));
}

void g4_pick_row(const g4_kernels *kernels, const float *x, int n, float *maxima, g4_pick *pick)
{
    const int block = block_of(n, pick->k), blocks = n_blocks(n, block);
    int best_block = 0;
    kernels->block_maxima(x, n, block, maxima);
    pick->n = pick->best = 0;
    pick->log_sum = NAN;
    for (int b = 0; b < blocks && !isnan(maxima[best_block]); b++)
        if (isnan(maxima[b]) || maxima[b] > maxima[best_block])
            best_block = b;
    pick->top = maxima[best_block];
    if (isnan(pick->top))
        return;
    for (pick->best = best_block * block; x[pick->best] != pick->top;)
        pick->best++;
    if (pick->k || pick->within > 0)
        list_largest(kernels, x, n, block, maxima, pick);
    if (pick->with_sum && isfinite(pick->top))
        pick->log_sum = (double)pick->top + log(kernels->sum_exp(x, pick->top, n));
}

typedef struct {
    const float *const *rows;
    g4_pick *const *picks;
    float *maxima; /* [rows, stride] */
    size_t stride;
    int n;
} pick_task;

static void pick_some(const g4_exec *exec, void *context, int first, int end)
{
    const pick_task *t = context;
    for (int i = first; i < end; i++)
        g4_pick_row(exec->kernels, t->rows[i], t->n, t->maxima + (size_t)i * t->stride, t->picks[i]);
}

g4_status g4_pick_rows(g4_exec *exec, const float *const *rows, g4_pick *const *picks, int n_rows, int n)
{
    pick_task t = {.rows = rows, .picks = picks, .n = n};
    for (int i = 0; i < n_rows; i++) {
        const size_t blocks = (size_t)g4_pick_scratch(n, picks[i]->k);
        t.stride = blocks > t.stride ? blocks : t.stride;
    }
    G4_ALLOC(exec, t.maxima, (size_t)n_rows * t.stride);
    return g4_exec_rows(exec, n_rows, (size_t)n, pick_some, &t);
}

/* ---- the nucleus ---------------------------------------------------------------------------------------------------- */

static double sum_of(const g4_kernels *kernels, const float *w, int n)
{
    enum { AT_ONCE = 32 };
    double sums[AT_ONCE], total = 0;
    for (int first = 0; first < n; first += AT_ONCE * G4_DRAW_BLOCK) {
        const int size = n - first < AT_ONCE * G4_DRAW_BLOCK ? n - first : AT_ONCE * G4_DRAW_BLOCK;
        kernels->block_sums(w + first, size, G4_DRAW_BLOCK, 0, sums);
        for (int b = 0; b < n_blocks(size, G4_DRAW_BLOCK); b++)
            total += sums[b];
    }
    return total;
}

/* Weights between two, whose bits ascend with them as they are not negative. */
typedef struct {
    uint32_t first, end; /* bits */
    double wanted;       /* the sum that those of the nucleus that lie between them reach */
} bracket;

/* Narrows the bracket to one of at most PARTS parts: the one in which the sum, from the largest weight on, reaches what is
 * wanted. ids [n]: the weights to look at; NULL: the first n. */
static void narrow(bracket *at, const float *w, const int32_t *ids, int n)
{
    /* Weights of one part follow each other often: with several sums of it, an addition need not wait for the last. */
    enum { PARTS = 1 << 9, SUMS = 4 };
    double sums_of[PARTS + 1][SUMS] = {{0}}; /* the last one: outside the bracket */
    const uint32_t size = at->end - at->first;
    int shift = 0, part, last = -1; /* last: the lowest part with a weight so far */
    while (((size - 1) >> shift) >= PARTS)
        shift++;
    for (int i = 0; i < n; i++) {
        const float value = w[ids ? ids[i] : i];
        const uint32_t place = (g4_f32_bits(value) - at->first) >> shift; /* huge below the bracket */
        sums_of[place < PARTS ? place : PARTS][i % SUMS] += (double)value;
    }
    for (part = (int)((size - 1) >> shift); part >= 0; part--) {
        const double *of = sums_of[part], sum = (of[0] + of[1]) + (of[2] + of[3]);
        if (sum <= 0)
            continue;
        last = part;
        if (sum >= at->wanted)
            break;
        at->wanted -= sum;
    }
    if (part < 0) /* rounding leaves the sum short: the smallest weight */
        at->wanted = INFINITY;
    at->first += (uint32_t)(last < 0 ? 0 : last) << shift;
    at->end = at->first + (1u << shift);
}

static int list_bracket(const g4_kernels *kernels, const bracket *at, const float *w, int n, int32_t *ids)
{
    return kernels->list_within(w, n, g4_f32_from_bits(at->first), g4_f32_from_bits(at->end - 1), ids);
}

/* Whether it takes longer to list the weights >= least than to sum them up by parts. */
static bool are_many(const float *w, int n, float least)
{
    enum { SAMPLES = 256, FEW = SAMPLES / 32 };
    int count = 0;
    for (int i = 0; i < SAMPLES; i++)
        count += w[(size_t)i * (size_t)n / SAMPLES] >= least;
    return count > FEW;
}

float g4_nucleus_floor(const g4_kernels *kernels, const float *w, int n, double share, int32_t *ids)
{
    const double total = sum_of(kernels, w, n);
    /* Weights below (1 - share) / n of the sum make less than 1 - share of it together, for they are at most n: the nucleus
     * lies among the others. */
    const float least = fmaxf((float)((1 - share) * total / n), FLT_TRUE_MIN);
    bracket at = {g4_f32_bits(least), g4_f32_bits(1.0f) + 1, share * total};
    if (at.first >= at.end) /* not reached with weights of 0 to 1 */
        return least;
    if (are_many(w, n, least))
        narrow(&at, w, NULL, n);
    const int listed = list_bracket(kernels, &at, w, n, ids);
    while (at.end - at.first > 1)
        narrow(&at, w, ids, listed);
    return g4_f32_from_bits(at.first);
}

/* ---- a draw --------------------------------------------------------------------------------------------------------- */

int g4_draw(const g4_kernels *kernels, const float *w, int n, float least, double unit, double *sums)
{
    const int blocks = g4_draw_scratch(n);
    double total = 0, before = 0, inside = 0;
    int block = -1, at = -1;
    kernels->block_sums(w, n, G4_DRAW_BLOCK, least, sums);
    for (int b = 0; b < blocks; b++)
        total += sums[b];
    for (int b = 0; b < blocks; b++) { /* if rounding leaves all sums short: the last block with a weight above 0 */
        if (sums[b] <= 0)
            continue;
        before += block < 0 ? 0 : sums[block];
        block = b;
        if (before + sums[b] > unit * total)
            break;
    }
    if (block < 0)
        return -1;
    const int end = n - block * G4_DRAW_BLOCK < G4_DRAW_BLOCK ? n : (block + 1) * G4_DRAW_BLOCK;
    for (int i = block * G4_DRAW_BLOCK; i < end && (at < 0 || inside <= unit * total - before); i++)
        if (w[i] > 0 && w[i] >= least) {
            inside += (double)w[i];
            at = i;
        }
    return at;
}
