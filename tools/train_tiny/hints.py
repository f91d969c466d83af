# SPDX-License-Identifier: Apache-2.0
"""What a tower is told about its input while it learns: dense targets for small heads that are thrown away afterwards.

A caption says little about a picture; these say for each patch and each soft token what is there. The towers learn
from them in minutes what would take hours through the text model alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .pictures import POOL
from .scenes import CHARACTERS, COLOURS, KINDS, MOST, WRITTEN, Scene, Thing
from .sounds import TOKEN
from .speech import SPOKEN, Sound

BINS = 40  # of a box's coordinate
SLOTS = 3  # digits of a number
# espeak-ng's names, less what marks a variant; 0 is any other sound
_SOUNDS = "n s t I k f r l aI @ d D v z E u m 0 a i oU p o@ eI O i@ w O@ T 3 b g j h V aU S N VR A@ @L dZ tS aI@ e@ U A"
PHONEMES = {name: 1 + i for i, name in enumerate(_SOUNDS.split())}
KIND_CLASSES = (*KINDS, "word", "number")
COLOUR_CLASSES = tuple(COLOURS)
_CLASS = {kind: 1 + i for i, kind in enumerate(KIND_CLASSES)} | {"letters": 1 + KIND_CLASSES.index("word")}
_NOWHERE = -100  # cross_entropy's own "do not count"


@dataclass
class Targets:
    """Class indices, -100 where there is nothing to say. `patch_*`: [patches], the rest [tokens] or [tokens, n].

    Places are boxes (y0, x0, y1, x1 in 0…1, NaN for nothing), told twice: smoothly, and as `box`, 40 bins a side.
    """

    patch_kind: NDArray[np.int64]
    patch_colour: NDArray[np.int64]
    patch_character: NDArray[np.int64]
    patch_place: NDArray[np.float32]
    kind: NDArray[np.int64]
    colour: NDArray[np.int64]
    centre: NDArray[np.int64]
    rank: NDArray[np.int64]
    count: NDArray[np.int64]
    word: NDArray[np.int64]
    box: NDArray[np.int64]
    digits: NDArray[np.int64]
    place: NDArray[np.float32]


def owner(scene: Scene, x: float, y: float, across: float, down: float) -> Thing | None:
    """What fills most of this cell (pixels of the drawn picture), if that is a fifth of it, or has its centre there."""
    best, most = None, 0.2 * across * down
    for thing in scene.things:
        x0, y0, x1, y1 = thing.box
        area = max(0.0, min(x1, x + across) - max(x0, x)) * max(0.0, min(y1, y + down) - max(y0, y))
        if x <= thing.centre[0] < x + across and y <= thing.centre[1] < y + down:
            area += across * down
        if area > most:
            best, most = thing, area
    return best


def _patch_classes(scene: Scene, columns: int, rows: int) -> tuple[list[int], list[int], list[int], list[list[float]]]:
    kinds, colours, characters, places = [], [], [], []
    boxes = {thing: [value / 1000 for value in scene.box_2d(thing)] for thing in scene.things}
    for row in range(rows):
        y = (row + 0.5) * scene.height / rows
        for column in range(columns):
            x = (column + 0.5) * scene.width / columns
            at = next((t for t in scene.things if t.box[0] <= x < t.box[2] and t.box[1] <= y < t.box[3]), None)
            kinds.append(0 if at is None else _CLASS[at.kind])
            places.append([np.nan] * 4 if at is None else boxes[at])
            colours.append(0 if at is None else 1 + COLOUR_CLASSES.index(at.colour))
            spans = at.spans if at is not None else ()
            letter = next((i for i, (a, b) in enumerate(spans) if a <= x < b), None)
            characters.append(_NOWHERE if letter is None or at is None else CHARACTERS.index(at.text[letter]))
    return kinds, colours, characters, places


def _fill_token(scene: Scene, thing: Thing, found: Targets, at: int) -> None:
    found.kind[at] = _CLASS[thing.kind]
    found.colour[at] = 1 + COLOUR_CLASSES.index(thing.colour)
    found.place[at] = [value / 1000 for value in scene.box_2d(thing)]
    found.box[at] = [min(BINS - 1, value * BINS // 1000) for value in scene.box_2d(thing)]
    if thing.kind == "word":
        found.word[at] = WRITTEN.index(thing.text)
    elif thing.kind == "number" and len(thing.text) <= SLOTS:
        found.digits[at] = [int(c) for c in thing.text] + [10] * (SLOTS - len(thing.text))
    elif not thing.text:
        found.rank[at] = scene.shapes.index(thing)


def targets(scene: Scene, columns: int, rows: int) -> Targets:
    """What is where, for a picture cut into `columns` × `rows` patches."""
    across, down = columns // POOL, rows // POOL
    n = across * down
    nothing = np.full(n, _NOWHERE)
    found = Targets(
        *(np.array(x) for x in _patch_classes(scene, columns, rows)),
        place=np.full((n, 4), np.nan),
        kind=np.zeros(n, np.int64),
        colour=np.zeros(n, np.int64),
        centre=np.zeros(n, np.int64),
        rank=nothing.copy(),
        count=np.full(n, len(scene.shapes)),
        word=nothing.copy(),
        box=np.full((n, 4), _NOWHERE),
        digits=np.full((n, SLOTS), _NOWHERE),
    )
    width, height = scene.width / across, scene.height / down
    for at in range(n):
        x, y = at % across * width, at // across * height
        thing = owner(scene, x, y, width, height)
        if thing is not None:
            _fill_token(scene, thing, found, at)
            found.centre[at] = int(x <= thing.centre[0] < x + width and y <= thing.centre[1] < y + height)
    return found


class SightHints(nn.Module):
    """The heads. words, kinds, colours [·, text hidden]: the text model's own embeddings of WRITTEN, KIND_CLASSES and
    COLOUR_CLASSES. A soft token is to resemble those that say what is there: then the text model can read it.
    """

    def __init__(self, tower: int, text: int, words: Tensor, kinds: Tensor, colours: Tensor) -> None:
        super().__init__()
        self.patch = nn.Linear(tower, 1 + len(KIND_CLASSES) + 1 + len(COLOUR_CLASSES) + len(CHARACTERS))
        self.patch_place = nn.Linear(tower, 4)
        self.place = nn.Linear(text, 4)
        sizes = {"centre": 2, "rank": MOST, "count": MOST + 1, "box": 4 * BINS, "digits": SLOTS * 11}
        self.heads = nn.ModuleDict({name: nn.Linear(text, size) for name, size in sizes.items()})
        self.nothing = nn.Linear(text, 2)
        for name, rows in (("words", words), ("kinds", kinds), ("colours", colours)):
            self.register_buffer(name, nn.functional.normalize(rows, dim=1) * 24)

    def forward(self, features: Tensor, soft: Tensor, wanted: list[Targets]) -> dict[str, tuple[Tensor, Tensor]]:
        """(loss, share right) of each hint. features [patches, tower] and soft [tokens, text], pictures end to end."""

        def truth(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(t, name) for t in wanted]))

        kinds, colours = 1 + len(KIND_CLASSES), 1 + len(COLOUR_CLASSES)
        patch = self.patch(features).split([kinds, colours, len(CHARACTERS)], dim=1)
        named = {f"patch_{n}": x for n, x in zip(("kind", "colour", "character"), patch, strict=True)}
        named |= {name: head(soft) for name, head in self.heads.items()}
        named["box"] = named["box"].view(-1, BINS)
        named["digits"] = named["digits"].view(-1, 11)
        unit, nothing = nn.functional.normalize(soft, dim=1), self.nothing(soft)
        named["word"] = unit @ self.words.T
        named["kind"] = torch.cat([nothing[:, :1], unit @ self.kinds.T], dim=1)
        named["colour"] = torch.cat([nothing[:, 1:], unit @ self.colours.T], dim=1)
        result = {}
        for name, logits in named.items():
            goal = truth(name).flatten()
            told = goal != _NOWHERE
            if told.any():
                right = (logits.argmax(1) == goal)[told].float().mean()
                result[name] = cross_entropy(logits, goal, ignore_index=_NOWHERE), right
        for name, guess in (("patch_place", self.patch_place(features)), ("place", self.place(soft))):
            goal = truth(name).to(guess.dtype)
            told = ~goal[:, 0].isnan()
            error = (guess - goal)[told].abs()
            result[name] = 10 * error.mean(), (error < 0.03).float().mean()
        return result


# --- hearing ------------------------------------------------------------------------------------------------------

LINGER = 0.16  # seconds after a word's end for which the soft tokens are to say which word it was
DELAY = 0.04  # the tower sees no future: it is asked which sound there was one token ago


def sound_targets(sound: Sound, tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([tokens] sound, [tokens] word), 0 for none."""
    times = np.arange(tokens) * TOKEN
    heard, word = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
    for name, start, stop in sound.phonemes:
        number = 0 if name.startswith("_") else 1 + PHONEMES.get(name.rstrip("2#-:"), 0)
        heard[(times - DELAY >= start) & (times - DELAY < stop)] = number
    for name, _, stop in sound.words:
        word[(times >= stop) & (times < stop + LINGER)] = 1 + SPOKEN.index(name)
    return heard, word


class HearingHints(nn.Module):
    """The heads. `words` [len(SPOKEN), text hidden]: the text model's own embeddings of what will be written."""

    def __init__(self, tower: int, text: int, words: Tensor) -> None:
        super().__init__()
        self.phoneme = nn.Linear(tower, 2 + len(PHONEMES))
        self.silence = nn.Linear(text, 1)
        self.words = nn.Buffer(nn.functional.normalize(words, dim=1) * 24)

    def forward(self, features: Tensor, soft: Tensor, heard: Tensor, word: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(loss, share right) of each hint. features [tokens, tower], soft [tokens, text], targets [tokens]."""
        said = nn.functional.normalize(soft, dim=1) @ self.words.T
        result = {}
        for name, logits, goal in (
            ("phoneme", self.phoneme(features), heard),
            ("word", torch.cat([self.silence(soft), said], dim=1), word),
        ):
            told = goal > 0
            right = (logits.argmax(1) == goal)[told].float().mean()
            result[name] = cross_entropy(logits, goal), right
        return result
