# SPDX-License-Identifier: Apache-2.0
"""A prompt with media: token ids, and the medium and row of each soft token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma4._moved import moved
from gemma4.media.audio import MS_PER_TOKEN
from gemma4.media.keys import content_key
from gemma4.media.medium import KINDS, PLACEHOLDER, Kind, Medium

if TYPE_CHECKING:
    from gemma4.text.tokenizer import Tokenizer

__getattr__ = moved(
    __name__,
    {
        "EncoderCache": "gemma4.interp.cache",
        "SOFT_ID": "gemma4.encoders.soft_tokens",
        "SoftRows": "gemma4.encoders.soft_tokens",
        "run_start": "gemma4.media.keys",
    },
)

_ANY = re.compile("|".join(map(re.escape, PLACEHOLDER.values())))


@dataclass(frozen=True, slots=True, eq=False)
class SoftRun:
    """Positions start to stop (exclusive) hold soft tokens: rows first, first + 1, … of the encoded `medium`."""

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
        """float32 [stop - start, 2]: beginning and end of each soft token of sound; the time of a video's frame."""
        n = self.stop - self.start
        if self.medium.kind == "video":
            second = self.medium.content.seconds[self.first // n]
            return np.full((n, 2), second, np.float32)
        return (np.stack([np.arange(n), np.arange(n) + 1], axis=1) * (MS_PER_TOKEN / 1000)).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedPrompt:
    """ids: int32 [T], a placeholder's id at every soft token · runs: the soft tokens' places, in order.

    Accepted wherever token ids are: forward, run_with_cache, generate, stream.
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
            keys[run.start : run.stop] = content_key(run.medium.digest) + rows
        return keys


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
    """Places of each medium's runs. Raises ValueError if the tokenizer lacks a soft token's piece."""
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
