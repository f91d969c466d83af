# SPDX-License-Identifier: Apache-2.0
"""Comparing two accounts of one forward pass, site by site, in forward order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 2e-5  # of the largest magnitude at the site

Arrays = Mapping[str, NDArray[Any]]


def difference(ours: NDArray[Any], theirs: NDArray[Any]) -> str | None:
    """What is wrong with `ours`, None if nothing: -inf in the same places, the rest within TOLERANCE of the largest."""
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, expected {theirs.shape}"
    if theirs.dtype.kind == "i":
        wrong = np.argwhere(ours != theirs)
        return f"{len(wrong)} ids differ, first at {wrong[0].tolist()}" if len(wrong) else None
    finite = np.isfinite(theirs)
    wrong = np.argwhere(np.isneginf(ours) != ~finite)
    if len(wrong):
        return f"-inf in {len(wrong)} wrong places, first at {wrong[0].tolist()}"
    error = np.abs(np.where(finite, ours, 0) - np.where(finite, theirs, 0))
    largest = float(np.abs(theirs[finite]).max(initial=0))
    if error.max(initial=0) <= TOLERANCE * largest:  # false for NaN
        return None
    at = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
    where = [int(i) for i in at]
    return f"{ours[at]} at {where}, expected {theirs[at]}: {error[at] / largest:.1e} of the largest, {largest:.3g}"


def first_failures(ours: Arrays, theirs: Arrays, limit: int = 4) -> list[str]:
    """The first sites in forward order (the order of `theirs`) that differ: the earliest is where to look."""
    failures = []
    for name, expected in theirs.items():
        wrong = difference(ours[name], expected) if name in ours else "missing"
        if wrong:
            failures.append(f"{name}: {wrong}")
    more = [f"... and {len(failures) - limit} of {len(theirs)} more"] if len(failures) > limit else []
    return failures[:limit] + more


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal to the bit: -0.0 is not 0.0, a NaN is itself."""
    bits = f"u{a.dtype.itemsize}"
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.view(bits), b.view(bits))


def first_bit_differences(ours: Arrays, expected: Arrays, limit: int = 4) -> list[str]:
    """Sites, in the order of `expected`, that are not the same to the bit."""
    assert ours.keys() == expected.keys()
    return [name for name, array in expected.items() if not same_bits(ours[name], array)][:limit]
