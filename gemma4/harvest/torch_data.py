# SPDX-License-Identifier: Apache-2.0
"""A harvest as a torch.utils.data.IterableDataset. Only `Dataset.torch` imports this: the package needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info


class Rows(Protocol):
    """The part of a `Dataset` that is used here."""

    @property
    def n_shards(self) -> int: ...

    def batches(
        self, size: int, names: Iterable[str], *, shuffle: int | None, shards: Iterable[int]
    ) -> Iterator[dict[str, NDArray[Any]]]: ...


class TorchRows(IterableDataset[dict[str, torch.Tensor]]):
    """Batches of rows as tensors: see `Dataset.torch`."""

    def __init__(self, dataset: Rows, names: list[str], batch: int, shuffle: int | None) -> None:
        self._dataset, self._names, self._batch, self._shuffle = dataset, names, batch, shuffle
        self._passes = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        number, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # A worker may have a new copy of this at each pass; what the loader draws for the pass is the same for all
        drawn = 0 if worker is None else worker.seed - worker.id
        seed = None if self._shuffle is None else self._shuffle + (self._passes << 32) + (drawn << 64)
        self._passes += 1
        shards = range(number, self._dataset.n_shards, of)
        for rows in self._dataset.batches(self._batch, self._names, shuffle=seed, shards=shards):
            yield {name: _tensor(array) for name, array in rows.items()}


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor with memory of its own."""
    if array.dtype.name != "bfloat16":
        return torch.tensor(array)
    return torch.tensor(array.view(np.int16)).view(torch.bfloat16)
