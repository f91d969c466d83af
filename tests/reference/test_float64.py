# SPDX-License-Identifier: Apache-2.0
"""Our float32 is as near to float64 as transformers' float32, at every site: no damped weights, no fixed tolerance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import gemma4

from . import oracle, variants
from .conftest import Reference

TIMES = 3  # as far from float64 as transformers' float32 is
HALF_ULP = 2.0**-24  # of the largest magnitude: transformers may hit the truth by chance
N = 41


def distance(site: np.ndarray, exact: np.ndarray) -> float:
    """The root mean square error (one unlucky element says nothing), in units of the largest magnitude."""
    finite = np.isfinite(exact)
    assert np.array_equal(np.isneginf(site), ~finite)
    error = site[finite].astype(np.float64) - exact[finite]
    return float(np.sqrt(np.mean(error**2)) / (np.abs(exact[finite]).max(initial=0) or 1))


@pytest.mark.parametrize("name", list(variants.BY_NAME))
def test_no_further_from_float64(
    name: str, reference: Callable[[str, int], Reference], loaded: Callable[[str], gemma4.Model]
) -> None:
    theirs = reference(name, N)
    exact = oracle.sites_in_float64(theirs.checkpoint.model, theirs.ids)
    logits, cache = loaded(name).run_with_cache(theirs.ids.numpy(), names="*")
    assert np.array_equal(logits, cache["hook_logits"])
    too_far = {}
    for site, array in exact.items():
        if array.dtype == np.int32:
            assert np.array_equal(cache[site], array), site
            continue
        ours, other = distance(cache[site], array), distance(theirs.sites[site], array)
        if ours > TIMES * max(other, HALF_ULP):
            too_far[site] = f"{ours:.1e}, transformers {other:.1e}"
    assert too_far == {}
