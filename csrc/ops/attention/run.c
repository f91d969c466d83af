/* SPDX-License-Identifier: Apache-2.0 */
#include "ops/attention/run.h"

void g4_occupied(const float *row, int n, float blank, int *first, int *end)
{
    *first = 0, *end = n;
    while (*first < n && row[*first] == blank)
        ++*first;
    if (*first == n) {
        *first = 0;
        return;
    }
    while (row[*end - 1] == blank)
        --*end;
}
