/* SPDX-License-Identifier: Apache-2.0 */
/* Instruction sets of this processor, and the default number of threads. */
#ifndef GEMMA4_BASE_CPU_H
#define GEMMA4_BASE_CPU_H

#include <stdbool.h>

/* Within one architecture, later entries are better. */
typedef enum {
    G4_ISA_SCALAR,
    G4_ISA_AVX2, /* with FMA and F16C */
    G4_ISA_AVX_VNNI,
    G4_ISA_AVX512, /* F, BW, DQ, VL */
    G4_ISA_AVX512_VNNI,
    G4_ISA_AVX512_BF16, /* includes VNNI */
    G4_ISA_AMX,         /* bf16 tiles; includes AVX-512 BF16 */
    G4_ISA_NEON,
    G4_ISA_NEON_DOTPROD,
    G4_ISA_NEON_I8MM, /* includes dot products */
    G4_N_ISAS
} g4_isa;

const char *g4_isa_name(g4_isa isa);

/* G4_N_ISAS if no instruction set has that name. */
g4_isa g4_isa_parse(const char *name);

/* Whether both the processor and the operating system support it. */
bool g4_cpu_has(g4_isa isa);

/* Default number of threads: the cores of the affinity mask, at most the CPU quota, at least 1. */
int g4_cpu_count(void);

/* The two parts of g4_cpu_count, for a system whose /proc and /sys lie under `root` ("": this system).
 * Cores: hyper-threads of one core count once, because they share its multipliers and its memory requests.
 * Quota: CPU time granted by this process's cgroups (version 1 or 2, nested), in CPUs, rounded up; 0: no limit. */
int g4_cpu_cores(const char *root, const int *cpus, int n);
int g4_cpu_quota(const char *root);

#endif
