# SPDX-License-Identifier: Apache-2.0
"""precision="fast" with plain weights: long prompts go by panels (AVX2), OpenBLAS (elsewhere) or in bfloat16 (bf16
weights where there are instructions for it).

The first two add in other orders than `exact`, and nothing more. ops/linear.c has the numbers of rows where they begin.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gemma4

from . import variants
from .compare import difference, same_bits
from .conftest import Checkpoint

NAMES = ["e2b", "e2b-bf16", "e2b-f16", "odd-e", "odd-moe-f16", "dense31b"]
FIRST_IN_BF16 = {"avx512_bf16": 32, "amx": 5}.get(gemma4.cpu_info()["isa"])  # rows


@pytest.mark.parametrize("name", NAMES)
def test_prompts_differ_by_rounding(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    directory, variant = checkpoint(name).directory, variants.BY_NAME[name]
    in_bf16 = FIRST_IN_BF16 is not None and name.endswith("bf16")
    first = FIRST_IN_BF16 if FIRST_IN_BF16 is not None and in_bf16 else 48
    exact = gemma4.load(directory, precision="exact", threads=1)
    fast = [gemma4.load(directory, precision="fast", kv_dtype="f32", threads=threads) for threads in (1, 3)]
    for n in (4, 5, 31, 47, 48, 55, 97):
        ids = variants.token_ids(variant, n).numpy().astype(np.int32)
        expected = exact.forward(ids)
        ours = [model.forward(ids) for model in fast]
        assert same_bits(*ours)
        assert same_bits(ours[0], expected) == (n < first)
        if in_bf16:  # x with 8 bits instead of 24
            assert np.abs(ours[0] - expected).max() <= 2e-2 * np.abs(expected).max()
        else:
            assert difference(ours[0], expected) is None
