# SPDX-License-Identifier: Apache-2.0
"""Sparse activations of a dictionary's features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from gemma4.html import Picture, heat
from gemma4.html.picture import FEW, left_out
from gemma4.narrow import is_integer

F32: TypeAlias = NDArray[np.float32]


class Fired(NamedTuple):
    """The features that fired at one position, in ascending order."""

    ids: NDArray[np.int32]  # [n]
    values: F32  # [n], > 0


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Which features fired at each position, and how strongly. `features[pos]` is a `Fired`, a slice a `Features`.

    offsets  int64 [pos + 1]: position p has entries offsets[p] to offsets[p + 1] - 1
    ids      int32 [n], ascending within a position
    values   float32 [n]
    d_sae    features of the dictionary
    """

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    values: F32
    d_sae: int

    def __len__(self) -> int:
        """Positions."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, pos: int) -> Fired: ...
    @overload
    def __getitem__(self, pos: slice) -> Features: ...
    def __getitem__(self, pos: int | slice) -> Fired | Features:
        """Raises IndexError (no such position), ValueError (a slice with a step other than 1)."""
        if isinstance(pos, slice):
            first, stop, step = pos.indices(len(self))
            if step != 1:
                raise ValueError(f"positions of features are sliced with step 1, got {step}")
            offsets = self.offsets[first : max(first, stop) + 1]
            part = slice(int(offsets[0]), int(offsets[-1]))
            return Features(offsets - offsets[0], self.ids[part], self.values[part], self.d_sae)
        if not is_integer(pos):
            raise TypeError(f"a position is an integer or a slice, got {pos!r:.60}")
        if not -len(self) <= pos < len(self):
            raise IndexError(f"position {pos} of features of {len(self)} positions")
        part = slice(int(self.offsets[pos % len(self)]), int(self.offsets[pos % len(self) + 1]))
        return Fired(self.ids[part], self.values[part])

    def __iter__(self) -> Iterator[Fired]:
        return (self[pos] for pos in range(len(self)))

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.ids.nbytes + self.values.nbytes

    @property
    def counts(self) -> NDArray[np.int64]:
        """Features that fired, int64 [pos]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The position of each entry, int64 [n]."""
        return np.repeat(np.arange(len(self)), self.counts)

    def dense(self) -> F32:
        """float32 [pos, d_sae], 0 where a feature did not fire."""
        array = np.zeros((len(self), self.d_sae), np.float32)
        array[self.rows, self.ids] = self.values
        return array

    def feature(self, feature: int) -> F32:
        """One feature at every position, float32 [pos]. Raises IndexError."""
        check_feature(feature, self.d_sae)
        array = np.zeros(len(self), np.float32)
        at = self.ids == feature
        array[self.rows[at]] = self.values[at]
        return array

    def take(self, rows: NDArray[np.integer | np.bool_]) -> Features:
        """These rows, in that order: `rows` are indices, or a mask of all."""
        chosen: NDArray[np.int64] = np.arange(len(self))[rows]
        counts = self.counts[chosen]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        entries = np.arange(int(offsets[-1])) + np.repeat(self.offsets[chosen] - offsets[:-1], counts)
        return Features(offsets, self.ids[entries], self.values[entries], self.d_sae)

    def top(self, k: int) -> Features:
        """The k strongest features of each position; of equal ones the first."""
        if not is_integer(k) or k < 1:
            raise ValueError(f"top: k must be an integer from 1 on, got {k!r:.60}")
        return strongest(self.rows, self.ids, self.values, len(self), self.d_sae, int(k))

    def to_html(self, last: int | None = None, k: int = 8) -> Picture:
        """A table of the k strongest features of each position: number and value, the value as colour.

        last: only that number of positions at the end. Raises ValueError (k or last below 1).
        """
        if last is not None and (not is_integer(last) or last < 1):
            raise ValueError(f"last must be an integer from 1 on, got {last!r:.60}")
        first = 0 if last is None else max(0, len(self) - int(last))
        best = [_by_value(one) for one in self[first:].top(k)]
        values = np.zeros((len(best), k), np.float32)
        for row, one in zip(values, best, strict=True):
            row[: len(one.ids)] = one.values
        return heat(
            values,
            [f"{at} ({count} fired)" for at, count in enumerate(self.counts[first:], first)],
            [f"#{rank + 1}" for rank in range(k)],
            words=[[*(str(i) for i in one.ids), *["-"] * (k - len(one.ids))] for one in best],
            title=repr(self),
            corner="position",
            small_print=left_out(len(best), len(self), "positions"),
        )

    def _repr_html_(self) -> str:
        return self.to_html(FEW).fragment()

    def __repr__(self) -> str:
        return f"Features: {len(self)} positions, {len(self.ids)} entries of {self.d_sae} features"


def sparse(dense: F32) -> Features:
    """The features of float32 [pos, d_sae] that are not 0."""
    rows, ids = np.nonzero(dense)
    return collect(rows, ids.astype(np.int32), dense[rows, ids], len(dense), dense.shape[1])


def _by_value(fired: Fired) -> Fired:
    order = np.argsort(-fired.values, kind="stable")
    return Fired(fired.ids[order], fired.values[order])


def check_feature(feature: object, d_sae: int) -> int:
    if not is_integer(feature):
        raise TypeError(f"a feature is an integer, got {feature!r:.60}")
    if not 0 <= feature < d_sae:
        raise IndexError(f"there is no feature {feature}, the dictionary has 0 to {d_sae - 1}")
    return int(feature)


def collect(rows: NDArray[np.intp], ids: NDArray[np.int32], values: F32, n_rows: int, d_sae: int) -> Features:
    """Features of entries whose ids ascend within each row; the rows may be mixed."""
    order = np.argsort(rows, kind="stable")
    offsets = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=offsets[1:])
    return Features(offsets, ids[order], values[order], d_sae)


def strongest(rows: NDArray[np.intp], ids: NDArray[np.int32], values: F32, n_rows: int, d_sae: int, k: int) -> Features:
    """The k entries of each row with the highest values; of equal ones those with the lowest ids."""
    order = np.lexsort((ids, -values, rows))
    starts = np.searchsorted(rows[order], np.arange(n_rows))
    kept = order[np.arange(len(order)) - starts[rows[order]] < k]
    kept = kept[np.argsort(ids[kept], kind="stable")]
    return collect(rows[kept], ids[kept], values[kept], n_rows, d_sae)


def join(parts: Iterable[Features], d_sae: int) -> Features:
    """Consecutive stretches of positions as one."""
    parts = list(parts)
    counts = [part.counts for part in parts]
    offsets = np.concatenate([np.zeros(1, np.int64), *counts])
    ids = np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)])
    values = np.concatenate([np.empty(0, np.float32), *(part.values for part in parts)])
    return Features(np.cumsum(offsets), ids, values, d_sae)
