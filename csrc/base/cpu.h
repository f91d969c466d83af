/* SPDX-License-Identifier: Apache-2.0 */
/* What this processor can run, and what the user lets us use of it. */
#ifndef GEMMA4_BASE_CPU_H
#define GEMMA4_BASE_CPU_H

#include <stdbool.h>

/* Of one architecture, a later one is the better. */
typedef enum {
    G4_ISA_SCALAR,
    G4_ISA_AVX2, /* with FMA and F16C */
    G4_ISA_AVX_VNNI,
    G4_ISA_AVX512, /* F, BW, DQ, VL */
    G4_ISA_AVX512_VNNI,
    G4_ISA_AVX512_BF16, /* and VNNI */
    G4_ISA_AMX,         /* tiles of bf16, and AVX-512 BF16 */
    G4_ISA_NEON,
    G4_ISA_NEON_DOTPROD,
    G4_ISA_NEON_I8MM, /* and dot products */
    G4_N_ISAS
} g4_isa;

const char *g4_isa_name(g4_isa isa);

/* G4_N_ISAS if there is none of that name. */
g4_isa g4_isa_parse(const char *name);

/* Whether both the processor and the operating system support it. */
bool g4_cpu_has(g4_isa isa);

/* Threads to start by default: the cores of the affinity mask, but no more than the CPU quota. At least 1. */
int g4_cpu_count(void);

/* Its two parts, of a system whose /proc and /sys lie under `root` ("" is this one).
 * Cores: hyper-threads of one core count once, because they share its multipliers and its memory requests.
 * Quota: the CPUs' worth of time that the cgroups (version 1 or 2, nested) of this process grant, rounded up; 0: no limit. */
int g4_cpu_cores(const char *root, const int *cpus, int n);
int g4_cpu_quota(const char *root);

#endif
