/* SPDX-License-Identifier: Apache-2.0 */
/* Every kernel of one plain type; see the headers for the macros it wants. */
#define WEIGHTS_IN(k) (k)
#include "kernels/body_plain.h"

#include "kernels/body_matmul.h"
#include "kernels/body_mix.h"

#undef WEIGHTS_IN
#undef WEIGHT
#undef weight
#undef WEIGHT_TO_F32
