# SPDX-License-Identifier: Apache-2.0
"""The largest logits of a row: what most sampling needs of it, found by the engine where the logits are."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine

F32: TypeAlias = NDArray[np.float32]
F64: TypeAlias = NDArray[np.float64]
I32: TypeAlias = NDArray[np.int32]


class TopLogits(NamedTuple):
    """The largest logits of a row.

    best     id of the largest logit, the lowest among equals; 0 if some logit is NaN
    top      the largest logit; NaN if some logit is
    log_sum  log of the sum of e^logit; NaN if it was not requested or `top` is not finite
    ids      int32 [n], ascending: those that the picker lists, but no -inf
    values   float32 [n], their logits
    n_vocab  how many logits the row has
    """

    best: int
    top: float
    log_sum: float
    ids: I32
    values: F32
    n_vocab: int


class Picker:
    """Finds `TopLogits` in rows of logits, inside a step or afterwards, and owns the memory for it.

    Its arrays have room for whole rows, but the engine writes only what it finds: the system gives memory to the rest
    only if logits tie by the thousand.
    """

    def __init__(
        self, n_vocab: int, k: int = 0, *, within: float = 0.0, log_sum: bool = False, rows: bool = False
    ) -> None:
        """k: list the k largest logits and all equal to the last of them. within: list also those at most this much
        below the largest; 0: none. rows: whether a step also copies whole rows of logits, to `buffer`."""
        self.k, self.within, self.log_sum, self.needs_rows = min(k, n_vocab), within, log_sum, rows
        self._n_vocab = n_vocab
        self._reserve(1)

    def _reserve(self, n: int) -> None:
        listed = (n, self._n_vocab) if self.k or self.within else (n, 0)
        self._ids, self._values = np.empty(listed, np.int32), np.empty(listed, np.float32)
        self._found = np.zeros((n, 4))
        self._rows = np.empty((n, self._n_vocab), np.float32) if self.needs_rows else None

    def buffer(self, n: int) -> F32 | None:
        """float32 [n, vocab], where a step puts the rows themselves; the next step overwrites it. None: not needed."""
        if n > len(self._found):
            self._reserve(n)
        return None if self._rows is None else self._rows[:n]

    def arguments(self, n: int) -> _engine.Picks:
        """The engine's arguments for n rows, at most as many as `buffer` was called for."""
        return self.k, self.within, self.log_sum, self._ids[:n], self._values[:n], self._found[:n]

    def found(self, row: int) -> TopLogits:
        """The engine's results of a row."""
        best, top, n, log_sum = self._found[row].tolist()
        ids, values = self._ids[row, : int(n)], self._values[row, : int(n)]
        return TopLogits(int(best), top, log_sum, ids.copy(), values.copy(), self._n_vocab)

    def of(self, logits: F32) -> TopLogits:
        """The same from a row [vocab] that is not a step's."""
        _engine.top_logits(logits, self.arguments(1))
        return self.found(0)
