/* SPDX-License-Identifier: Apache-2.0 */
/* What this processor can run, and what the user lets us use of it. */
#ifndef GEMMA4_BASE_CPU_H
#define GEMMA4_BASE_CPU_H

typedef enum { G4_ISA_SCALAR, G4_ISA_AVX2, G4_ISA_AVX512, G4_N_ISAS } g4_isa;

const char *g4_isa_name(g4_isa isa);

/* G4_N_ISAS if there is none of that name. */
g4_isa g4_isa_parse(const char *name);

/* Highest level that both the processor and the operating system support (cpuid and xgetbv). */
g4_isa g4_cpu_best_isa(void);

/* The CPUs this process may run on (its affinity mask), at least 1. */
int g4_cpu_count(void);

#endif
