# SPDX-License-Identifier: Apache-2.0
"""precision="high": bf16 weights times x in three bf16 pieces on AMX, as near to float64 as float32 is.

Elsewhere it computes as `exact`. csrc/tests/kernels_test_linear.c checks the products on every machine with bf16
instructions, and on AMX emulated (make simde).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gemma4

from . import oracle, variants
from .compare import same_bits
from .conftest import Checkpoint, Reference
from .test_float64 import HALF_ULP, TIMES, distance

HAS_AMX = gemma4.cpu_info()["isa"] == "amx"
N = 41


def high(checkpoint: Checkpoint, threads: int = 2) -> gemma4.Model:
    return gemma4.load(checkpoint.directory, precision="high", threads=threads)


@pytest.mark.parametrize("name", ["e2b-bf16", "odd-moe-f16", "dense31b"])
def test_no_further_from_float64_than_exact(
    name: str, reference: Callable[[str, int], Reference], loaded: Callable[[str], gemma4.Model]
) -> None:
    theirs = reference(name, N)
    ids = theirs.ids.numpy()
    truth = oracle.sites_in_float64(theirs.checkpoint.model, theirs.ids)
    _, ours = high(theirs.checkpoint).run_with_cache(ids, names="*")
    _, exact = loaded(name).run_with_cache(ids, names="*")
    floats = [site for site, array in truth.items() if array.dtype != np.int32]
    by_tiles = HAS_AMX and name == "e2b-bf16"
    assert all(same_bits(ours[site], exact[site]) for site in floats) == (not by_tiles)
    too_far = {
        site: (found, of_exact)
        for site in floats
        if (found := distance(ours[site], truth[site]))
        > TIMES * max(of_exact := distance(exact[site], truth[site]), HALF_ULP)
    }
    assert too_far == {}


def test_a_row_does_not_depend_on_its_batch(checkpoint: Callable[[str], Checkpoint]) -> None:
    found = checkpoint("e2b-bf16")
    ids = variants.token_ids(found.variant, 37).numpy().astype(np.int32)
    model = high(found)
    whole = model.forward(ids)
    assert same_bits(high(found, threads=1).forward(ids), whole)
    alone = [model.forward(prompt) for prompt in (ids[:5], ids[:23], ids)]
    together = model.forward([ids[:5], ids[:23], ids])
    for one, other in zip(alone, together, strict=True):
        assert same_bits(one, other) and same_bits(one, whole[: len(one)])


def test_it_says_what_it_is(checkpoint: Callable[[str], Checkpoint]) -> None:
    model = high(checkpoint("e2b-bf16"))
    assert (model.engine.precision, model.kv_dtype) == ("high", "f32")
    notes = [note for note in model.info().notes if "high" in note]
    assert notes == (
        []
        if HAS_AMX
        else [f'precision "high" computes as "exact" on {model.engine.isa}; it is for processors with AMX']
    )
    if HAS_AMX:
        [note] = high(checkpoint("dense31b")).info().notes
        assert note == 'precision "high" computes as "exact" with these weights; it is for BF16'
    with pytest.raises(ValueError, match='precision="most": expected "exact", "high" or "fast"'):
        gemma4._engine.Model({}, {}, precision="most")
    with pytest.raises(ValueError, match="one of exact, high, fast"):
        gemma4.load(checkpoint("e2b-bf16").directory, precision="most")  # pyright: ignore[reportArgumentType]
