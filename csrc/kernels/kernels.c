/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/kernels.h"

#include <stdlib.h>

extern const g4_kernels g4_kernels_scalar;
#if defined(__x86_64__)
extern const g4_kernels g4_kernels_avx2, g4_kernels_avx512;
#ifdef G4_VNNI /* the compiler supports it */
extern const g4_kernels g4_kernels_avx_vnni, g4_kernels_avx512_vnni;
#endif
#ifdef G4_TILES
extern const g4_kernels g4_kernels_avx512_bf16, g4_kernels_amx;
#endif
#elif defined(__aarch64__)
extern const g4_kernels g4_kernels_neon, g4_kernels_neon_dotprod, g4_kernels_neon_i8mm;
#endif

static const g4_kernels *const tables[G4_N_ISAS] = {
    [G4_ISA_SCALAR] = &g4_kernels_scalar,
#if defined(__x86_64__)
    [G4_ISA_AVX2] = &g4_kernels_avx2,
    [G4_ISA_AVX512] = &g4_kernels_avx512,
#ifdef G4_VNNI
    [G4_ISA_AVX_VNNI] = &g4_kernels_avx_vnni,
    [G4_ISA_AVX512_VNNI] = &g4_kernels_avx512_vnni,
#endif
#ifdef G4_TILES
    [G4_ISA_AVX512_BF16] = &g4_kernels_avx512_bf16,
    [G4_ISA_AMX] = &g4_kernels_amx,
#endif
#elif defined(__aarch64__)
    [G4_ISA_NEON] = &g4_kernels_neon,
    [G4_ISA_NEON_DOTPROD] = &g4_kernels_neon_dotprod,
    [G4_ISA_NEON_I8MM] = &g4_kernels_neon_i8mm,
#endif
};

const g4_kernels *g4_kernels_for(g4_isa isa) { return g4_cpu_has(isa) ? tables[isa] : NULL; }

static g4_isa best_isa(void)
{
    int isa = G4_N_ISAS - 1;
    while (isa > G4_ISA_SCALAR && !g4_kernels_for((g4_isa)isa))
        isa--;
    return (g4_isa)isa;
}

g4_status g4_kernels_select(const g4_kernels **kernels, g4_error *err)
{
    const char *mask = getenv("GEMMA4_ISA");
    g4_isa isa = best_isa();
    if (mask && *mask) {
        g4_isa wanted = g4_isa_parse(mask);
        if (wanted == G4_N_ISAS)
            return g4_fail(err, G4_EVALUE,
                           "GEMMA4_ISA=%s: expected scalar, avx2, avx_vnni, avx512, avx512_vnni, "
                           "avx512_bf16, amx, neon, neon_dotprod or neon_i8mm",
                           mask);
        if (!g4_kernels_for(wanted))
            return g4_fail(err, G4_EUNSUPPORTED,
                           "GEMMA4_ISA=%s: this processor, or this build, has no such instructions; its best are %s",
                           mask, g4_isa_name(isa));
        isa = wanted;
    }
    *kernels = tables[isa];
    return G4_OK;
}
