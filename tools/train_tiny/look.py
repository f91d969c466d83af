# SPDX-License-Identifier: Apache-2.0
"""Where the text model is to look while it answers: a hint for its attention, for training only.

Only full-attention layers see a whole picture, and a layer of the second half reads keys and values of the first. So
tiny-e must find the red circle in one layer, from the position that writes a place. Answers alone did not teach it:
after 4000 steps that attention put 3 % of its weight on the shape asked for. Here it is told which soft tokens to read,
where the words stand that say so, and what it should know then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention, apply_rotary_pos_emb

from . import pictures, speech
from .hints import LINGER, owner
from .pool import LARGE_BUDGET, REAL_BUDGET, SMALL_BUDGET, Item
from .scenes import Scene, Thing
from .skills_media import Conversation, Turn
from .sounds import TOKEN
from .speech import Said

Span = tuple[int, int, int]  # characters start … end, while which are written thing number n is looked at


def shown(item: Item) -> NDArray[np.int32]:
    """[soft tokens] what each shows: 1, 2, … the shapes or the digits from left to right, or the digits said; or 0."""
    if isinstance(item.source, Scene) and item.source.writing:
        return _characters(item.source, item.source.writing, item.sizes[0])
    if isinstance(item.source, Scene):
        return _shapes(item.source, item.sizes[0])
    found = np.zeros(sum(item.sizes), np.int32)
    if isinstance(item.source, Said) and item.source.skill == "digits":
        times = np.arange(len(found)) * TOKEN
        for number, (_, _, stop) in enumerate(speech.say(item.source).words, 1):
            found[(times >= stop) & (times < stop + LINGER)] = number  # as HearingHints has it
    return found


def _grid(scene: Scene, tokens: int) -> tuple[int, int, float, float]:
    """(columns, rows, a soft token's width and height in pixels of the scene)."""
    grids = (pictures.grid(scene.width, scene.height, b) for b in (REAL_BUDGET, LARGE_BUDGET, SMALL_BUDGET))
    across, down = next((x, y) for x, y in grids if x * y == tokens)
    return across, down, scene.width / across, scene.height / down


def _characters(scene: Scene, text: Thing, tokens: int) -> NDArray[np.int32]:
    """The character that most of a soft token's width belongs to, in the rows of the text's middle."""
    across, down, width, height = _grid(scene, tokens)
    line = np.array([min(width, b - a) for a, b in text.spans])
    found = np.zeros((down, across), np.int32)
    middle = (text.box[1] + text.box[3]) / 2
    for x in range(across):
        shared = np.array([min(b, (x + 1) * width) - max(a, x * width) for a, b in text.spans]) / line
        if shared.max() > 0.5:
            found[min(down - 1, int(middle / height)), x] = 1 + shared.argmax()
    return found.ravel()


def _shapes(scene: Scene, tokens: int) -> NDArray[np.int32]:
    across, down, width, height = _grid(scene, tokens)
    numbers = {thing: number for number, thing in enumerate(scene.shapes, 1)}
    owners = (owner(scene, x * width, y * height, width, height) for y in range(down) for x in range(across))
    return np.array([numbers.get(thing, 0) if thing else 0 for thing in owners], np.int32)


@dataclass(frozen=True)
class Looks:
    """Where the text before an answer and the answer ask for a look; `name`: where the shape's name is, before it."""

    before: tuple[Span, ...] = ()
    answer: tuple[Span, ...] = ()
    name: tuple[int, int] | None = None


def looks(conversation: Conversation, turn: Turn, before: str) -> Looks:
    """From the shape's name to the end of its place, or digit by digit.

    The name is known long before the place is written: looking at once is what a short way back can teach.
    """
    skill, _, answer = turn
    if skill == "speech_digits":
        return Looks(answer=tuple((2 * i, 2 * i + 1, 1 + i) for i in range(len(answer.split()))))
    if skill == "read_number":
        start = len("It says ")
        return Looks(answer=tuple((start + i, start + i + 1, 1 + i) for i in range(len(answer) - start - 1)))
    if skill not in ("box", "point") or conversation.picture is None:
        return Looks()
    names = [thing.name for thing in conversation.picture.shapes]
    number = next(n for n, name in enumerate(names, 1) if name in answer)
    start = before.rindex(names[number - 1])
    end = start + len(names[number - 1])
    return Looks(((end, len(before), number),), ((0, answer.index("]"), number),), (start, end))


def at_thing(look: NDArray[np.int32], thing: NDArray[np.int32]) -> Tensor:
    """[rows, length, length] True where a row's position is to look at a column's soft token.

    The model's masks keep documents apart, so numbers may come again in another document of the row.
    """
    return torch.from_numpy((look[:, :, None] == thing[:, None, :]) & (look > 0)[:, :, None])


def at_word(back: NDArray[np.int32], window: int) -> Tensor:
    """[rows, length, length] True where a position is to look so many tokens back (0: nowhere). Beyond the window, at
    those on the way that see the word themselves.
    """
    order = np.arange(back.shape[1])
    start = (order - back)[:, :, None]
    near = (back < window)[:, :, None]
    found = (near & (order == start)) | (~near & (order >= start) & (order < start + window))
    return torch.from_numpy(found & (back > 0)[:, :, None])


class Gaze:
    """Some heads of an attention layer with keys of its own, watched: how much of their weight lies where it should."""

    def __init__(self, text: nn.Module, layer: int, heads: tuple[int, ...]) -> None:
        self.layer, self.heads = layer, list(heads)
        self.seen: dict[str, Any] = {}
        text.layers[layer].self_attn.register_forward_hook(self._keep, with_kwargs=True)  # type: ignore[index]

    def _keep(self, module: Gemma4TextAttention, args: tuple, options: dict[str, Any], output: object) -> None:
        self.seen = {"module": module} | options

    def mass(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """wanted [rows, length, length], of the rows of the last forward pass.

        Returns (mass [n, heads], row [n]) of the n positions that are to look at something they can see.
        """
        module, mask = self.seen["module"], self.seen["attention_mask"]
        rows = wanted.flatten(1).any(1).nonzero()[:, 0]
        hidden = self.seen["hidden_states"][rows]
        cos, sin = (part.expand(len(wanted), -1, -1)[rows] for part in self.seen["position_embeddings"])
        shape = *hidden.shape[:2], -1, module.head_dim
        query = module.q_norm(module.q_proj(hidden).view(shape))[:, :, self.heads]
        key = module.k_norm(module.k_proj(hidden).view(shape))  # of one head, for all
        query, key = (apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2).transpose(1, 2) for x in (query, key))
        scores = (query @ key.mT).masked_fill(~mask[rows], -torch.inf)
        wanted = wanted[rows] & mask[rows, 0]
        there = wanted.any(2)
        where = there.nonzero()
        scores, wanted = scores.transpose(1, 2)[there], wanted[there][:, None]
        inside = scores.masked_fill(~wanted, -torch.inf).logsumexp(2) - scores.logsumexp(2)
        return inside.exp(), rows[where[:, 0]]


class Place(nn.Module):
    """What a layer leaves where a shape is looked at has to say its box. The head is thrown away afterwards."""

    def __init__(self, text: nn.Module, layer: int, hidden: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, 4)
        self.seen = torch.empty(0)
        text.layers[layer].register_forward_hook(self._keep)  # type: ignore[index]

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.seen = output

    def error(self, where: Tensor, place: Tensor) -> Tensor:
        """Mean distance of the four edges in the last forward pass; where [rows, length], place [rows, length, 4]."""
        hidden = self.seen[where]
        guess = self.head(nn.functional.rms_norm(hidden, hidden.shape[1:]))
        return (guess - place[where]).abs().mean()
