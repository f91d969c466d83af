# SPDX-License-Identifier: Apache-2.0
"""The features of a harvest as a source of cards: histograms and heat from every stored value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.examples import Examples, Histogram, Stored, check_count
from gemma4.dictionaries.features import F32, check_feature
from gemma4.errors import FormatError
from gemma4.harvest.dataset import Dataset

I64: TypeAlias = NDArray[np.int64]
_ENTRIES = 1 << 20  # counted at a time


class HarvestedFeatures(Examples):
    """A `FeatureSource` of a harvest's dictionary. Each feature's strongest rows are the dataset's examples; histograms
    and the values around those rows are of all that is stored.

    dictionary: its number in the harvest. Raises IndexError (there is no such one), FormatError.
    """

    def __init__(self, dataset: Dataset, dictionary: int = 0) -> None:
        self._dataset, self._dictionary = dataset, dictionary
        tokens, bounds = dataset["tokens"], dataset.bounds

        def tokens_of(sequence: int) -> NDArray[np.integer]:
            with dataset.reading(self._place(sequence)[0]):
                return np.array(tokens[int(bounds[sequence]) : int(bounds[sequence + 1])])

        super().__init__(dataset.examples(dictionary), tokens_of, dataset.n_sequences, str(dataset.path))
        self._histograms: dict[int, I64] = {}  # bins -> int64 [d_sae, bins]

    def histogram(self, feature: int, bins: int = 40) -> Histogram:
        """Counts of all stored values. The first call reads all of them once, for all features. Raises IndexError,
        ValueError, FormatError."""
        bins = check_count("bins", bins)
        feature = check_feature(feature, self.d_sae)
        if bins not in self._histograms:
            self._histograms[bins] = self._counted(bins)
        largest = float(self._read("activations", feature)[0]) or 1.0
        return Histogram(self._histograms[bins][feature], np.linspace(0, largest, bins + 1))

    def _counted(self, bins: int) -> I64:
        counts = np.zeros((self.d_sae, bins), np.int64)
        largest: F32 = self._read("activations", slice(None))[:, 0]
        for shard in range(self._dataset.n_shards):
            features = self._dataset.features(shard, self._dictionary)
            for first in range(0, len(features.ids), _ENTRIES):
                part = slice(first, first + _ENTRIES)
                ids, values = features.ids[part], features.values[part]
                if not (ids.min() >= 0 and ids.max() < self.d_sae and (values > 0).all()):
                    self._refuse(shard)
                shares = values / largest[ids]
                if not (shares <= 1).all():
                    self._refuse(shard)
                np.add.at(counts, (ids, np.minimum((shares * bins).astype(np.int64), bins - 1)), 1)
            self._dataset.check(shard)
        return counts

    def _refuse(self, shard: int) -> None:
        self._dataset.check(shard)  # a file that shrank shows zeros
        raise FormatError(f"{self._where}: the features of shard {shard} are damaged; run the same harvest again")

    def _heat(self, feature: int, stored: Stored, sequence: int, start: int, stop: int) -> F32:
        shard, first = self._place(sequence)
        with self._dataset.reading(shard):
            return self._dataset.features(shard, self._dictionary)[first + start : first + stop].feature(feature)

    def _place(self, sequence: int) -> tuple[int, int]:
        """The shard of a sequence, and its first row there."""
        row = int(self._dataset.bounds[sequence])
        shard = int(np.searchsorted(self._dataset.first_rows, row, side="right")) - 1
        return shard, row - int(self._dataset.first_rows[shard])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        yield
        self._dataset.check_summaries()

    def close(self) -> None:
        """Close the dataset."""
        self._dataset.close()
