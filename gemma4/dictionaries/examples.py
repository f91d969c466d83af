# SPDX-License-Identifier: Apache-2.0
"""Where each feature of a dictionary fires most: `examples.safetensors` of Gemma Scope 2, a dashboard without a model.

    examples = Examples.load("gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium")
    for example in examples.top(1721, 5):
        example.tokens, example.values           # around the strongest position of a sequence
    examples.density(1721), examples.histogram(1721), examples.logits(1721)

Whatever has the four methods of `FeatureSource` can be shown as cards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.features import F32, check_feature
from gemma4.errors import FormatError
from gemma4.load.safetensors import SafetensorsFile
from gemma4.narrow import is_integer

I32: TypeAlias = NDArray[np.int32]
_NAME = "examples.safetensors"
_NEEDED = ("activations", "seq_ids", "positions", "feature_frequencies")
_BLOCK = 1024  # features whose activations are read at once
_RANKED = ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")


class Example(NamedTuple):
    """A stretch of one sequence in which a feature fires.

    tokens    int32 [n]
    values    float32 [n], the feature at each token; 0 where it is not among the stored activations
    sequence  its number
    start     the position of tokens[0] in it
    """

    tokens: I32
    values: F32
    sequence: int
    start: int


class Ranked(NamedTuple):
    """The tokens whose logits a feature changes most, the strongest first. tokens: int32 [k]; logits: float32 [k]."""

    tokens: I32
    logits: F32


class Histogram(NamedTuple):
    """How often a feature has which value. counts: int64 [bins]; edges: float64 [bins + 1]."""

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]


class Stored(NamedTuple):
    """Stored activations of a feature, which are not 0. values: float32 [n]; sequences, positions: int64 [n]."""

    values: F32
    sequences: NDArray[np.int64]
    positions: NDArray[np.int64]


class FeatureSource(Protocol):
    """The parts of a feature's card. Each method raises IndexError for a feature that does not exist.

    d_sae      features of the dictionary
    density    the share of tokens at which it fires
    histogram  of its values, where it fires
    top        up to n examples, the strongest first, each of another sequence: the strongest position with `context`
               tokens on either side; None = the whole sequence
    logits     the tokens that it raises and lowers most; both empty if that is not known
    """

    @property
    def d_sae(self) -> int: ...
    def density(self, feature: int) -> float: ...
    def histogram(self, feature: int, bins: int = 40) -> Histogram: ...
    def top(self, feature: int, n: int = 10, *, context: int | None = 24) -> list[Example]: ...
    def logits(self, feature: int) -> tuple[Ranked, Ranked]: ...


class Examples:
    """A `FeatureSource` of stored activations.

    tensors      activations, seq_ids and positions [d_sae, n_examples]: the strongest of each feature in any order, 0
                 where there are no more; feature_frequencies [d_sae]; optional top_tokens, top_logits, bottom_tokens
                 and bottom_logits [d_sae, k]. They may be mapped: only rows of features that are asked for are read
    tokens_of    the ids of a sequence, [n_tokens], from its number
    n_sequences  how many there are
    where        the name of the source, for messages
    """

    def __init__(
        self,
        tensors: Mapping[str, NDArray[np.generic]],
        tokens_of: Callable[[int], NDArray[np.integer]],
        n_sequences: int,
        where: str = "examples",
    ) -> None:
        self.path: Path | None = None
        self._tensors, self._tokens_of, self._n_sequences, self._where = tensors, tokens_of, n_sequences, where
        self._file: SafetensorsFile | None = None
        self._check_shapes()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Open an examples.safetensors, or the folder of a dictionary that has one. It is mapped, not read.

        Raises FileNotFoundError, OSError, FormatError (damaged, or another file).
        """
        given = Path(path)
        given = given / _NAME if given.is_dir() else given
        if not given.exists():
            raise FileNotFoundError(f"there is no {given}; give an {_NAME} of Gemma Scope 2, or its folder")
        file = SafetensorsFile(given)
        try:
            if "tokens" not in file.tensors or len(file.tensors["tokens"].shape) != 2:
                raise FormatError(f"{given} has no tensor tokens [sequences, length]; is it an {_NAME}?")
            tensors = {name: file.array(name) for name in file.tensors}
            for name in (*_NEEDED[:3], "tokens"):
                if name in tensors and tensors[name].size:
                    file.advise_random(name)
            tokens = tensors["tokens"]
            if tokens.dtype.kind not in "iu":
                raise FormatError(f"{given}: tokens is {tokens.dtype}, expected integers")
            found = cls(tensors, lambda sequence: tokens[sequence], len(tokens), str(given))
        except BaseException:
            file.close()
            raise
        found.path, found._file = given, file
        return found

    def _fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self._where}: {what}")

    def _check_shapes(self) -> None:
        missing = [name for name in _NEEDED if name not in self._tensors]
        some = [name for name in _RANKED if name in self._tensors]
        if some and len(some) < len(_RANKED):
            missing += [name for name in _RANKED if name not in some]
        if missing:
            self._fail(f"there is no tensor {missing[0]}; it has {', '.join(list(self._tensors)[:12])}")
        shape = self._tensors["activations"].shape
        ranked = self._tensors[_RANKED[0]].shape if some else ()
        wanted = dict.fromkeys(_NEEDED[:3], shape) | {"feature_frequencies": shape[:1]} | dict.fromkeys(some, ranked)
        for name, size in wanted.items():
            array = self._tensors[name]
            rank = 1 if name == "feature_frequencies" else 2
            integers = name in ("seq_ids", "positions") or name.endswith("tokens")
            if array.ndim != rank or array.shape != size or array.shape[0] != shape[0]:
                self._fail(f"{name} has shape {list(array.shape)}, expected that of {shape[0]} features, {list(size)}")
            if (array.dtype.kind in "iu") != integers or (array.dtype.kind not in "iuf" and not _is_bf16(array)):
                self._fail(f"{name} is {array.dtype}, expected {'integers' if integers else 'floats'}")

    # -- a feature -----------------------------------------------------------------------------------------------------

    @property
    def d_sae(self) -> int:
        return self._tensors["activations"].shape[0]

    @property
    def densities(self) -> F32:
        """The share of tokens at which each feature fires, float32 [d_sae]. Raises FormatError, StateError."""
        return self._shares(slice(None))

    def density(self, feature: int) -> float:
        """The share of tokens at which the feature fires. Raises IndexError, FormatError, StateError (closed)."""
        feature = check_feature(feature, self.d_sae)
        return float(self._shares(slice(feature, feature + 1))[0])

    def _shares(self, features: slice) -> F32:
        shares = self._read("feature_frequencies", features).astype(np.float32)
        if not np.isfinite(shares).all():
            bad = int(np.argmin(np.isfinite(shares)))
            self._fail(f"feature_frequencies[{(features.start or 0) + bad}] is {shares[bad]}, expected a finite number")
        return shares

    def histogram(self, feature: int, bins: int = 40) -> Histogram:
        """Counts of the stored, strongest activations. Raises IndexError, ValueError, FormatError, StateError."""
        bins = check_count("bins", bins)
        values = self._stored(feature).values
        high = float(values.max(initial=0)) or 1.0
        counts, edges = np.histogram(values, bins, (0.0, high))
        return Histogram(counts.astype(np.int64), edges)

    def top(self, feature: int, n: int = 10, *, context: int | None = 24) -> list[Example]:
        """Up to n examples, as `FeatureSource` says. Raises IndexError, ValueError, FormatError (a damaged file),
        StateError."""
        check_count("n", n)
        if context is not None and (not is_integer(context) or context < 0):
            raise ValueError(f"context must be a whole number from 0 on, or None, got {context!r:.60}")
        around = None if context is None else int(context)
        stored = self._stored(feature)
        values, sequences, positions = stored
        order = np.lexsort((positions, sequences, -values))
        found: dict[int, int] = {}  # the strongest entry of each sequence
        for entry in order:
            found.setdefault(int(sequences[entry]), int(positions[entry]))
            if len(found) == n:
                break
        return [self._example(feature, stored, sequence, position, around) for sequence, position in found.items()]

    def _example(self, feature: int, stored: Stored, sequence: int, position: int, context: int | None) -> Example:
        with self._reading():
            tokens = np.array(self._tokens_of(sequence), np.int32)
        last = int(stored.positions[stored.sequences == sequence].max())
        if last >= len(tokens):
            self._fail(f"position {last} of sequence {sequence}, which has {len(tokens)} tokens")
        start, stop = 0, len(tokens)
        if context is not None:
            start, stop = max(0, position - context), min(stop, position + context + 1)
        return Example(tokens[start:stop], self._heat(feature, stored, sequence, start, stop), sequence, start)

    def _heat(self, feature: int, stored: Stored, sequence: int, start: int, stop: int) -> F32:
        """The feature at positions [start, stop) of a sequence, float32 [stop - start], as far as it is known."""
        values = np.zeros(stop - start, np.float32)
        here = (stored.sequences == sequence) & (stored.positions >= start) & (stored.positions < stop)
        values[stored.positions[here] - start] = stored.values[here]
        return values

    def peaks(self) -> tuple[F32, I32]:
        """Each feature's largest stored activation and the token there: float32, int32 [d_sae]; 0 and -1 without one.

        Reads all activations once. Raises FormatError, StateError.
        """
        values, tokens = np.zeros(self.d_sae, np.float32), np.full(self.d_sae, -1, np.int32)
        for rows, stored in self._blocks():
            at = stored.argmax(axis=1)[:, None]
            values[rows] = np.take_along_axis(stored, at, 1)[:, 0]
            places = [np.take_along_axis(self._read(name, rows), at, 1)[:, 0] for name in _NEEDED[1:3]]
            with self._reading():
                for i in np.flatnonzero(values[rows] > 0):
                    feature, sequence, position = rows.start + int(i), int(places[0][i]), int(places[1][i])
                    self._check_place(feature, sequence, position)
                    tokens[feature] = self._tokens_of(sequence)[position]
        return values, tokens

    def together(self, features: Sequence[int], n: int = 10) -> list[list[tuple[int, float]]]:
        """Other features that are strong at the same tokens: (feature, share) for each of `features`, up to n, the
        largest share first. share: the part of this feature's stored activations at which the other has one, too.

        Reads all activations once. Raises IndexError, ValueError, FormatError, StateError.
        """
        check_count("n", n)
        own = [np.unique(_places(*self._stored(feature)[1:])) for feature in features]
        best: list[list[tuple[int, float]]] = [[] for _ in own]  # so far
        for rows, stored in self._blocks():
            keys = _places(*(self._read(name, rows).astype(np.int64) for name in _NEEDED[1:3]))
            keys[stored <= 0] = -1
            for row, (feature, places) in enumerate(zip(features, own, strict=True)):
                counts = np.isin(keys, places).sum(axis=1)
                others = [rows.start + int(i) for i in np.flatnonzero(counts)]
                found = [(i, float(counts[i - rows.start] / len(places))) for i in others if i != feature]
                best[row] = sorted(best[row] + found, key=lambda one: -one[1])[:n]
        return best

    def _blocks(self) -> Iterator[tuple[slice, F32]]:
        """(features, float32 [features, n_examples]) of all stored activations."""
        for first in range(0, self.d_sae, _BLOCK):
            rows = slice(first, min(first + _BLOCK, self.d_sae))
            yield rows, self._read("activations", rows).astype(np.float32)

    def _check_place(self, feature: int, sequence: int, position: int) -> None:
        if not 0 <= sequence < self._n_sequences:
            self._fail(f"seq_ids of feature {feature} hold {sequence}, expected 0 to {self._n_sequences - 1}")
        n = len(self._tokens_of(sequence))
        if not 0 <= position < n:
            self._fail(f"position {position} of sequence {sequence}, which has {n} tokens")

    def logits(self, feature: int) -> tuple[Ranked, Ranked]:
        """The tokens that it raises and lowers most. Raises IndexError, FormatError (NaN), StateError."""
        check_feature(feature, self.d_sae)
        if _RANKED[0] not in self._tensors:
            nothing = Ranked(np.empty(0, np.int32), np.empty(0, np.float32))
            return nothing, nothing
        up, down = (self._ranked(side, feature) for side in ("top", "bottom"))
        return up, down

    def _ranked(self, side: str, feature: int) -> Ranked:
        logits = np.array(self._row(f"{side}_logits", feature), np.float32)
        tokens = np.array(self._row(f"{side}_tokens", feature), np.int32)
        if not np.isfinite(logits).all():
            self._fail(f"{side}_logits of feature {feature} hold NaN or infinities")
        order = np.argsort(-logits if side == "top" else logits, kind="stable")
        return Ranked(tokens[order], logits[order])

    def _stored(self, feature: int) -> Stored:
        """Stored activations that are not 0."""
        values = np.array(self._row("activations", feature), np.float32)
        if not np.isfinite(values).all():
            self._fail(f"activations of feature {feature} hold NaN or infinities")
        at = values > 0
        sequences, positions = (np.array(self._row(name, feature), np.int64)[at] for name in ("seq_ids", "positions"))
        for name, numbers, most in (("seq_ids", sequences, self._n_sequences), ("positions", positions, 1 << 31)):
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < most:
                self._fail(
                    f"{name} of feature {feature} are {numbers.min()} to {numbers.max()}, expected 0 to {most - 1}"
                )
        return Stored(values[at], sequences, positions)

    def _row(self, name: str, feature: int) -> Any:
        return self._read(name, check_feature(feature, self.d_sae))

    def _read(self, name: str, features: int | slice) -> Any:
        """A copy."""
        with self._reading():
            return np.array(self._tensors[name][features])

    # -- life ----------------------------------------------------------------------------------------------------------

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self._file is None else self._file.reading()

    def close(self) -> None:
        """Release the file. Using the examples afterwards raises StateError."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.d_sae

    def __repr__(self) -> str:
        n = self._tensors["activations"].shape[1]
        return f"Examples: up to {n} of each of {self.d_sae} features, from {self._n_sequences} sequences"


def _places(sequences: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number for each token of each sequence."""
    return (sequences << 32) | positions


def _is_bf16(array: NDArray[Any]) -> bool:
    return array.dtype.name == "bfloat16"


def check_count(what: str, given: object) -> int:
    if not is_integer(given) or not 1 <= given <= 1 << 20:
        raise ValueError(f"{what} must be a whole number from 1 to {1 << 20}, got {given!r:.60}")
    return int(given)
