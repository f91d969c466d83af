/* SPDX-License-Identifier: Apache-2.0 */
#include "base/cpu.h"

#include <sched.h>
#include <string.h>
#include <unistd.h>

static const char *const names[G4_N_ISAS] = {
    [G4_ISA_SCALAR] = "scalar", [G4_ISA_AVX2] = "avx2", [G4_ISA_AVX512] = "avx512"};

const char *g4_isa_name(g4_isa isa)
{
    return isa < G4_N_ISAS ? names[isa] : "?";
}

g4_isa g4_isa_parse(const char *name)
{
    int isa = 0;
    while (isa < G4_N_ISAS && strcmp(names[isa], name) != 0)
        isa++;
    return (g4_isa)isa;
}

#if defined(__x86_64__)
#include <cpuid.h>

/* XCR0: which register files the operating system saves on a context switch. */
static unsigned long long enabled_state(void)
{
    unsigned eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return ((unsigned long long)edx << 32) | eax;
}

g4_isa g4_cpu_best_isa(void)
{
    enum { YMM_STATE = 0x06, ZMM_STATE = 0xe6 };
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx))
        return G4_ISA_SCALAR;
    unsigned avx2_needs = bit_FMA | bit_AVX | bit_F16C | bit_OSXSAVE;
    if ((ecx & avx2_needs) != avx2_needs || (enabled_state() & YMM_STATE) != YMM_STATE)
        return G4_ISA_SCALAR;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2))
        return G4_ISA_SCALAR;
    unsigned avx512_needs = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    if ((ebx & avx512_needs) != avx512_needs || (enabled_state() & ZMM_STATE) != ZMM_STATE)
        return G4_ISA_AVX2;
    return G4_ISA_AVX512;
}
#else
g4_isa g4_cpu_best_isa(void)
{
    return G4_ISA_SCALAR;
}
#endif

int g4_cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}
