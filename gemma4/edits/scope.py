# SPDX-License-Identifier: Apache-2.0
"""The scope of an edit: positions, steps and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import index
from typing import NamedTuple, SupportsIndex, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Bools: TypeAlias = NDArray[np.bool_]
Where: TypeAlias = int | slice | Iterable[int] | None
Checked: TypeAlias = int | slice | tuple[int, ...] | None  # a `Where` after `checked_where`
Span: TypeAlias = tuple[int, int]
_Slice: TypeAlias = "slice[SupportsIndex | None, SupportsIndex | None, SupportsIndex | None]"
_FAR = 1 << 40  # beyond every position, layer, head and step; sums with it fit int64


class Place(NamedTuple):
    """The part of a sequence that one run of a step computes.

    first, n    its positions: first ... first + n - 1
    n_prompt    length of the prompt, from whose end negative positions count
    step        of a generation; 0: the prompt
    prompt      index in the batch
    """

    first: int
    n: int
    n_prompt: int
    step: int = 0
    prompt: int = 0


class Extent(NamedTuple):
    """All that a call computes of one prompt: positions first ... end - 1 in n_steps steps."""

    first: int
    end: int
    n_prompt: int
    n_steps: int = 1
    prompt: int = 0
    n_prompts: int | None = None  # None: not known, the batch is open

    def steps(self) -> NDArray[np.int64]:
        """int64 [end - first]: the step that computes each position."""
        return np.maximum(np.arange(self.first, self.end) - self.n_prompt + 1, 0)


def checked_where(where: object, what: str) -> Checked:
    if where is None:
        return None
    if isinstance(where, slice):
        return _checked_slice(cast("_Slice", where), what)
    many = isinstance(where, Iterable) and not isinstance(where, str | bytes)
    numbers = np.asarray(list(cast("Iterable[int]", where)) if many else where)
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise TypeError(f"{what} must be whole numbers, a slice or None, got {where!r}")
    if many and not numbers.size:
        raise ValueError(f"{what} is empty: the edit would never act; None means all")
    if numbers.ndim > 1:
        raise TypeError(f"{what} must be a flat list of whole numbers, got shape {numbers.shape}")
    if numbers.size and not -_FAR <= int(numbers.min()) <= int(numbers.max()) <= _FAR:
        raise ValueError(f"{what} is beyond every model: whole numbers are at most {_FAR}, got {where!r:.60}")
    return tuple(int(number) for number in numbers) if many else int(numbers)


def _checked_slice(ends: _Slice, what: str) -> slice:
    """A slice of Python's own integers; ends that are far beyond every sequence come nearer, and mean the same."""
    try:
        start, stop, step = (
            None if end is None else max(min(index(end), _FAR), -_FAR) for end in (ends.start, ends.stop, ends.step)
        )
    except TypeError:
        raise TypeError(f"{what}: the ends of a slice must be whole numbers or None, got {ends!r:.80}") from None
    if step is not None and step < 1:
        raise ValueError(f"{what} must be a slice with a step of at least 1, got {ends}")
    return slice(start, stop, step)


def listed(where: object) -> tuple[int, ...] | None:
    """The positions that were named one by one, in their order; None for a slice or for all."""
    if isinstance(where, int):
        return (where,)
    return cast("tuple[int, ...]", where) if isinstance(where, tuple) else None


def mask_of(where: Checked, positions: NDArray[np.int64], n_prompt: int) -> Bools:
    if where is None:
        return np.ones(len(positions), np.bool_)
    named = listed(where)
    if named is not None:
        return np.isin(positions, absolute(named, n_prompt))
    assert isinstance(where, slice)
    start, stop = (None if end is None else int(absolute((end,), n_prompt)[0]) for end in (where.start, where.stop))
    start = max(start or 0, 0)
    inside = (positions >= start) & ((positions - start) % (where.step or 1) == 0)
    return inside if stop is None else inside & (positions < stop)


def absolute(named: tuple[int, ...], n_prompt: int) -> NDArray[np.int64]:
    numbers = np.array(named, np.int64)
    return np.where(numbers < 0, numbers + n_prompt, numbers)


def stretches(mask: Bools) -> Iterator[Span]:
    """The runs of True, each as (first, end)."""
    bounds = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    yield from ((int(a), int(b)) for a, b in bounds.reshape(-1, 2))


def as_set(numbers: object) -> frozenset[int] | None:
    return None if numbers is None else frozenset(listed(numbers) or ())
