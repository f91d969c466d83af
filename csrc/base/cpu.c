/* SPDX-License-Identifier: Apache-2.0 */
#include "base/cpu.h"

#include <string.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const char *const names[G4_N_ISAS] = {
    [G4_ISA_SCALAR] = "scalar",
    [G4_ISA_AVX2] = "avx2",
    [G4_ISA_AVX_VNNI] = "avx_vnni",
    [G4_ISA_AVX512] = "avx512",
    [G4_ISA_AVX512_VNNI] = "avx512_vnni",
    [G4_ISA_AVX512_BF16] = "avx512_bf16",
    [G4_ISA_AMX] = "amx",
    [G4_ISA_NEON] = "neon",
    [G4_ISA_NEON_DOTPROD] = "neon_dotprod",
    [G4_ISA_NEON_I8MM] = "neon_i8mm",
};

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

/* XCR0: the register files that the operating system saves on a context switch. */
static unsigned long long enabled_state(void)
{
    unsigned eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return ((unsigned long long)edx << 32) | eax;
}

/* AMX tiles add 8 KB to a thread's saved state. Linux (5.16 and later) requires a process to request them. */
static bool tiles_permitted(void)
{
#if defined(__linux__)
    enum { ARCH_REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

bool g4_cpu_has(g4_isa isa)
{
    enum {
        YMM_STATE = 0x06,
        ZMM_STATE = 0xe6,
        TILE_STATE = 0x60000,
        ECX_AVX512_VNNI = 1 << 11,
        EAX_AVX_VNNI = 1 << 4,
        EAX_AVX512_BF16 = 1 << 5,
        EDX_AMX = 1 << 22 | 1 << 24, /* BF16, TILE */
    };
    const unsigned avx2_needs = bit_FMA | bit_AVX | bit_F16C | bit_OSXSAVE;
    const unsigned avx512_needs = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    unsigned eax, ebx, ecx, edx, more_eax, unused;
    if (isa == G4_ISA_SCALAR)
        return true;
#ifdef G4_EMULATED_AVX512 /* tests only: these levels are compiled to AVX2 instructions (GEMMA4_SIMDE) */
    if (isa > G4_ISA_AVX2 && isa <= G4_ISA_AMX)
        return g4_cpu_has(G4_ISA_AVX2);
#endif
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & avx2_needs) != avx2_needs ||
        (enabled_state() & YMM_STATE) != YMM_STATE)
        return false;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_AVX2))
        return false;
    const bool avx512 = (ebx & avx512_needs) == avx512_needs && (enabled_state() & ZMM_STATE) == ZMM_STATE;
    const bool vnni = avx512 && (ecx & ECX_AVX512_VNNI);
    if (eax < 1 || !__get_cpuid_count(7, 1, &more_eax, &unused, &unused, &unused))
        more_eax = 0;
    const bool bf16 = vnni && (more_eax & EAX_AVX512_BF16);
    switch (isa) {
    case G4_ISA_AVX2: return true;
    case G4_ISA_AVX_VNNI: return more_eax & EAX_AVX_VNNI;
    case G4_ISA_AVX512: return avx512;
    case G4_ISA_AVX512_VNNI: return vnni;
    case G4_ISA_AVX512_BF16: return bf16;
    case G4_ISA_AMX:
        return bf16 && (edx & EDX_AMX) == EDX_AMX && (enabled_state() & TILE_STATE) == TILE_STATE && tiles_permitted();
    default: return false;
    }
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

bool g4_cpu_has(g4_isa isa)
{
    enum { HWCAP_OF_DOTPROD = 1 << 20, HWCAP2_OF_I8MM = 1 << 13 };
    const bool dotprod = getauxval(AT_HWCAP) & HWCAP_OF_DOTPROD;
    switch (isa) {
    case G4_ISA_SCALAR:
    case G4_ISA_NEON: return true;
    case G4_ISA_NEON_DOTPROD: return dotprod;
    case G4_ISA_NEON_I8MM: return dotprod && (getauxval(AT_HWCAP2) & HWCAP2_OF_I8MM);
    default: return false;
    }
}
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

static bool has_feature(const char *name)
{
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value;
}

bool g4_cpu_has(g4_isa isa)
{
    switch (isa) {
    case G4_ISA_SCALAR:
    case G4_ISA_NEON: return true;
    case G4_ISA_NEON_DOTPROD: return has_feature("hw.optional.arm.FEAT_DotProd");
    case G4_ISA_NEON_I8MM: return has_feature("hw.optional.arm.FEAT_I8MM");
    default: return false;
    }
}
#else
bool g4_cpu_has(g4_isa isa)
{
    return isa == G4_ISA_SCALAR;
}
#endif
