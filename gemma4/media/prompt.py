# SPDX-License-Identifier: Apache-2.0
"""A prompt with media in it: token ids, and which of the positions are soft tokens of what."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import SiteError
from gemma4.interp.cache import CapturedArrays
from gemma4.media.audio import MS_PER_TOKEN
from gemma4.media.medium import KINDS, PLACEHOLDER, Kind, Medium

if TYPE_CHECKING:
    from gemma4.encoders.hooks import EncoderTaps
    from gemma4.model import Model
    from gemma4.text.tokenizer import Tokenizer

# What stands for a position's token in the engine's run: it takes an embedding, of this kind.
SOFT_ID: dict[Kind, int] = {"audio": -1, "image": -2, "video": -3}
_ANY = re.compile("|".join(map(re.escape, PLACEHOLDER.values())))


class EncoderCache(CapturedArrays):
    """Activations inside an encoder of one picture, frame or recording: site name -> array, in forward order.

    run: which it is, and where in the prompt its soft tokens stand
    """

    def __init__(self, run: SoftRun, arrays: dict[str, NDArray[Any]]) -> None:
        super().__init__(arrays)
        self.run = run

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            kind = self.run.medium.kind
            raise SiteError(f"{name!r} was not captured of this {kind}: ask for it with names= (docs/sites.md)")
        return self._arrays[name]

    def __repr__(self) -> str:
        run = self.run
        return f"EncoderCache: {len(self)} arrays of the {run.medium.kind} at positions {run.start} to {run.stop - 1}"


class SoftRows(NamedTuple):
    """The soft tokens among T positions, as a step takes them."""

    ids: NDArray[np.int32]  # int32 [T]: the token's id, or below 0 where the position is an embedding (SOFT_ID)
    embeddings: NDArray[np.float32]  # float32 [T, d_model]; rows of tokens are not read
    keys: NDArray[np.int64]  # int64 [T]: what the cache tells positions apart by: token ids, or content
    caches: tuple[EncoderCache, ...] = ()  # what was captured inside the encoders


@dataclass(frozen=True, slots=True, eq=False)
class SoftRun:
    """Positions start to stop (exclusive) hold soft tokens: rows first, first + 1, … of what `medium` encodes to."""

    medium: Medium
    start: int
    stop: int
    first: int

    def boxes(self) -> NDArray[np.float32]:
        """float32 [stop - start, 4]: top, left, bottom, right of each soft token's part of the picture, in 0..1."""
        rows, cols = self.medium.grid
        y, x = np.divmod(np.arange(rows * cols), cols)
        return np.stack([y / rows, x / cols, (y + 1) / rows, (x + 1) / cols], axis=1).astype(np.float32)

    def seconds(self) -> NDArray[np.float32]:
        """float32 [stop - start, 2]: beginning and end of each soft token of sound; when a video's frame shows."""
        n = self.stop - self.start
        if self.medium.kind == "video":
            second = self.medium.content.seconds[self.first // n]
            return np.full((n, 2), second, np.float32)
        return (np.stack([np.arange(n), np.arange(n) + 1], axis=1) * (MS_PER_TOKEN / 1000)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    """ids: int32 [T], a placeholder's id at every soft token · runs: where the soft tokens are, in order.

    Goes wherever token ids go: forward, run_with_cache, generate, stream.
    """

    ids: NDArray[np.int32]
    runs: tuple[SoftRun, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self) -> NDArray[np.int64]:
        """int64 [T]: token ids; at soft tokens numbers from the content, so that equal keys mean equal positions."""
        keys = self.ids.astype(np.int64)
        for run in self.runs:
            rows = np.arange(run.first, run.first + run.stop - run.start)
            keys[run.start : run.stop] = _content_key(run.medium) + rows
        return keys

    def soft_rows(self, model: Model, taps: EncoderTaps, start: int = 0, sequence: int = 0) -> SoftRows | None:
        """Of positions start.. ; media there are encoded, or taken from the model's cache. None if all are tokens.

        taps: what to do inside the encoders. sequence: the prompt's index in the batch, for hooks.
        """
        runs = [(i, run) for i, run in enumerate(self.runs) if run.stop > start]
        if not runs:
            return None
        encoded: dict[int, Any] = {}  # by the number of the medium's first run
        caches: list[EncoderCache] = []
        ids = self.ids[start:].copy()
        # calloc: pages of text positions, which nobody reads, are never touched
        embeddings = np.zeros((len(ids), model.engine_config["d_model"]), np.float32)
        for i, run in runs:
            frame = run.first // run.medium.run_length
            if i - frame not in encoded:
                encoded[i - frame] = taps.encode(model, run.medium, sequence=sequence, first=i - frame)
            rows, captured = encoded[i - frame]
            if captured:
                caches.append(EncoderCache(run, captured[frame]))
            begin = max(run.start, start)
            ids[begin - start : run.stop - start] = SOFT_ID[run.medium.kind]
            first = run.first + begin - run.start
            embeddings[begin - start : run.stop - start] = rows[first : first + run.stop - begin]
        return SoftRows(ids, embeddings, self.keys()[start:], tuple(caches))


_SOFT_KEY = 1 << 62  # soft tokens' keys have this bit; below it 42 bits of the digest and 20 for the row


def _content_key(medium: Medium) -> int:
    return _SOFT_KEY | (int.from_bytes(medium.digest[:8], "little") >> 22) << 20


def run_start(keys: Sequence[int] | NDArray[np.int64], position: int) -> int:
    """The first position of the run of soft tokens that goes on at `position`; position itself where none does."""
    while 0 < position < len(keys) and keys[position] & _SOFT_KEY and keys[position - 1] + 1 == keys[position]:
        position -= 1
    return position


def expander(media: Sequence[Medium]) -> Callable[[str], str]:
    """fn(rendered prompt): placeholders replaced by their media's texts. Raises ValueError if they do not pair up."""

    def expand(text: str) -> str:
        for kind in KINDS:
            n_media, n_places = sum(m.kind == kind for m in media), text.count(PLACEHOLDER[kind])
            if n_media != n_places:
                raise ValueError(
                    f"the chat template made {n_places} places ({PLACEHOLDER[kind]}) for {n_media} parts of type "
                    f'"{kind}": it was not written for this kind of content'
                )
        queues = {PLACEHOLDER[kind]: iter([m.expansion() for m in media if m.kind == kind]) for kind in KINDS}
        return _ANY.sub(lambda place: next(queues[place[0]]), text)

    return expand


def locate(ids: NDArray[np.int32], media: Sequence[Medium], tokenizer: Tokenizer) -> TokenizedPrompt:
    """Where each medium's runs lie. Raises ValueError if the tokenizer lacks a soft token's piece."""
    runs: list[SoftRun] = []
    kinds: set[Kind] = {medium.kind for medium in media}
    for kind in kinds:
        try:
            soft_id = tokenizer.piece_to_id(PLACEHOLDER[kind])
        except KeyError:
            raise ValueError(f"the tokenizer has no token {PLACEHOLDER[kind]}: this model takes no {kind}") from None
        starts = _run_starts(ids == soft_id)
        for medium in (m for m in media if m.kind == kind):
            n = medium.run_length
            runs += [SoftRun(medium, at, at + n, i * n) for i, at in enumerate(_take(starts, medium.n_runs))]
    return TokenizedPrompt(ids, tuple(sorted(runs, key=lambda run: run.start)))


def _run_starts(soft: NDArray[np.bool_]) -> list[int]:
    return np.flatnonzero(soft & ~np.concatenate([[False], soft[:-1]])).tolist()


def _take(items: list[int], n: int) -> list[int]:
    taken, items[:] = items[:n], items[n:]
    return taken
