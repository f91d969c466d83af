/* SPDX-License-Identifier: Apache-2.0 */
#include "kernels/kernels.h"

#include <stdlib.h>

extern const g4_kernels g4_kernels_scalar;
#if defined(__x86_64__)
extern const g4_kernels g4_kernels_avx2, g4_kernels_avx512;
#endif

static const g4_kernels *const tables[G4_N_ISAS] = {
    [G4_ISA_SCALAR] = &g4_kernels_scalar,
#if defined(__x86_64__)
    [G4_ISA_AVX2] = &g4_kernels_avx2,
    [G4_ISA_AVX512] = &g4_kernels_avx512,
#endif
};

const g4_kernels *g4_kernels_for(g4_isa isa) { return isa <= g4_cpu_best_isa() ? tables[isa] : NULL; }

g4_status g4_kernels_select(const g4_kernels **kernels, g4_error *err)
{
    const char *mask = getenv("GEMMA4_ISA");
    g4_isa isa = g4_cpu_best_isa();
    if (mask && *mask) {
        g4_isa wanted = g4_isa_parse(mask);
        if (wanted == G4_N_ISAS)
            return g4_fail(err, G4_EVALUE, "GEMMA4_ISA=%s: expected scalar, avx2 or avx512", mask);
        if (wanted > isa)
            return g4_fail(err, G4_EUNSUPPORTED, "GEMMA4_ISA=%s: this processor has at most %s", mask,
                           g4_isa_name(isa));
        isa = wanted;
    }
    *kernels = tables[isa];
    return G4_OK;
}
