# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures, videos and recordings as rows of token ids, with their soft tokens in place.

A picture's soft tokens stand in a row once, many questions after them: each is a branch that sees the picture and
itself, at the positions it would have alone (`masks`). So a step asks five times as many questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import look, mixture, pictures, skills_media, sounds, speech
from .mixture import ANSWER_WEIGHT, BOS, PAD, Document
from .pictures import Patches
from .pool import REAL_BUDGET, Item
from .scenes import Scene
from .skills_media import Conversation
from .speech import Said

MARKS = ("<|image|>", "<|video|>", "<|audio|>")
LENGTH = 320
OTHERS = ("numbers", "digits", "writing", "numbers", "digits", "speech", "clips", "speech")
DIGIT_WEIGHT = 3.0  # places and numbers are what is hard; the rest of such an answer is the same every time
SHARE = {"shapes": 4, "others": 2, "text": 3}  # rows of a step; others: OTHERS, shuffled


@dataclass(frozen=True)
class MediaDocument(Document):
    """A document whose placeholders are expanded: one id for each soft token, in the order of what is encoded.

    branch     [n] 0 up to the end of the picture, then the number of the question
    position   [n] as if each branch were alone
    look       [n] the number of the thing to look at here (look.py), 0 for none
    thing      [n] the number of the thing that this soft token shows
    name       [n] how many tokens back its name ended, where something is to be looked at by name, or 0
    colour     [n] how many tokens back the name's first token is, the colour, or 0
    place      [n, 4] the box of what is to be looked at by name, in 0…1
    """

    branch: NDArray[np.int32]
    position: NDArray[np.int32]
    look: NDArray[np.int32]
    thing: NDArray[np.int32]
    name: NDArray[np.int32]
    colour: NDArray[np.int32]
    place: NDArray[np.float32]
    pictures: tuple[Patches, ...] = ()
    recording: NDArray[np.float32] | None = None  # mel [frames, 128]
    soft: NDArray[np.float16] | None = None  # [soft tokens, hidden], where they are encoded already


@dataclass
class Rows:
    """All [rows, length] but soft [rows, length, hidden]: zeros but where a soft token stands (`media`)."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    document: NDArray[np.int32]
    branch: NDArray[np.int32]
    position: NDArray[np.int32]
    look: NDArray[np.int32]
    thing: NDArray[np.int32]
    name: NDArray[np.int32]
    colour: NDArray[np.int32]
    place: NDArray[np.float32]
    soft: NDArray[np.float32]


def expand(conversation: Conversation, sizes: Sequence[int]) -> str:
    """What stands in the prompt for the placeholder, as Gemma 4's processor writes it; `sizes` in soft tokens."""
    if conversation.picture:
        return f"<|image>{'<|image|>' * sizes[0]}<image|>"
    if conversation.clip:
        frames = zip(conversation.clip.seconds, sizes, strict=True)
        return " ".join(f"{t // 60:02d}:{t % 60:02d} <|image>{'<|video|>' * n}<image|>" for t, n in frames)
    return f"<|audio>{'<|audio|>' * sizes[0]}<audio|>"


def tree(conversations: Sequence[Conversation], tokenizer: Tokenizer, sizes: Sequence[int]) -> MediaDocument:
    """Conversations about one thing: what they share once, then each as a branch. Only answers count.

    `prompt_len` is where the first answer begins.
    """
    ids, weights, branch, position, written, prompt_len, trunk = [BOS], [0.0], [0], [0], [0], 0, 1
    names: list[tuple[int, int]] = []  # (first, last) token

    def add(
        text: str, weight: float, number: int, spans: Sequence[look.Span] = (), name: tuple[int, int] | None = None
    ) -> None:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        start = trunk if branch[-1] != number and number else position[-1] + 1
        n = len(encoded.ids)
        if name:
            inside = [i for i, (a, b) in enumerate(encoded.offsets) if a < name[1] and b > name[0]]
            names.append((len(ids) + inside[0], len(ids) + inside[-1]))
        ids.extend(encoded.ids)
        weights.extend(weight * (DIGIT_WEIGHT if text[a:b].isdigit() else 1.0) for a, b in encoded.offsets)
        branch.extend([number] * n)
        position.extend(range(start, start + n))
        written.extend(next((t for a, b, t in spans if a <= c < b), 0) for c, _ in encoded.offsets)

    for number, conversation in enumerate(conversations, 1):
        for turn, (before, answer) in enumerate(conversation.segments()):
            if turn == 0:
                mark = next(mark for mark in MARKS if mark in before)
                first, before = before.split(mark)
                if number == 1:
                    add(first + expand(conversation, sizes), 0.0, 0)
                    trunk = len(ids)
            looks = look.looks(conversation, conversation.turns[turn], before)
            add(before, 0.0, number, looks.before, looks.name)
            prompt_len = prompt_len or len(ids)
            add(answer, ANSWER_WEIGHT, number, looks.answer)
    looking = [*written[1:], 0]  # who writes a token is the position before it
    back = [_back(names, looking, which) for which in (1, 0)]
    first, *others = (np.array(x, np.int32) for x in (ids, branch, position, looking, [0] * len(ids), *back))
    place = np.zeros((len(ids), 4), np.float32)
    shown = conversations[0].picture
    if shown and names:
        boxes = np.array([np.zeros(4), *(shown.box_2d(thing) for thing in shown.shapes)])
        place[:] = boxes[looking] / 1000
    return MediaDocument(first, np.array(weights, np.float32), prompt_len, *others, place)


def _back(names: Sequence[tuple[int, int]], looking: Sequence[int], which: int) -> list[int]:
    """How many tokens back the first (0) or last (1) token of the last name is, where something is looked at."""
    found = [0] * len(looking)
    for number, name in enumerate(names):
        end = names[number + 1][0] if number + 1 < len(names) else len(looking)
        for i in range(name[1], end):
            found[i] = (i - name[which]) if looking[i] else 0
    return found


def tokenize(conversation: Conversation, tokenizer: Tokenizer, budget: int = REAL_BUDGET) -> MediaDocument:
    """One conversation, with what the towers are to encode."""
    cut = tuple(pictures.patches(image, budget) for image in conversation.images)
    recording = sounds.mel(speech.say(conversation.said).samples) if conversation.said else None
    sizes = [p.tokens for p in cut] if recording is None else [sounds.tokens(len(recording))]
    doc = tree([conversation], tokenizer, sizes)
    return replace(doc, pictures=cut, recording=recording)


def about(item: Item, conversations: Sequence[Conversation], tokenizer: Tokenizer) -> MediaDocument:
    """Conversations about something encoded, and where to look for the answers."""
    doc = tree(conversations, tokenizer, item.sizes)
    if doc.look.any():
        doc.thing[np.isin(doc.ids, [tokenizer.token_to_id(mark) for mark in MARKS])] = look.shown(item)
    return replace(doc, soft=np.concatenate(item.soft))


def ask(item: Item, rng: random.Random, questions: int = 6) -> list[Conversation]:
    """Training questions: about a picture up to so many, one of them followed by a second; else one."""
    if isinstance(item.source, Scene):
        turns = skills_media.picture_conversation(rng, item.source, turns=questions).turns
        pairs = len(turns) > 3 and rng.random() < 0.3
        groups = [turns[:2], *((turn,) for turn in turns[2:])] if pairs else [(turn,) for turn in turns]
        return [Conversation(tuple(group), picture=item.source) for group in groups]
    if isinstance(item.source, Said):
        return [skills_media.speech_conversation(rng, item.source, translate=rng.random() < 0.6)]
    return [skills_media.clip_conversation(item.source)]


def pack(docs: Iterator[MediaDocument], tokenizer: Tokenizer, length: int, count: int, width: int) -> Rows:
    """Whole documents first-fit into `count` rows of `length`, as mixture.rows does for text."""
    rows = Rows(
        np.full((count, length), PAD, np.int32),
        np.zeros((count, length), np.float32),
        *(np.zeros((count, length), np.int32) for _ in range(7)),
        np.zeros((count, length, 4), np.float32),
        np.zeros((count, length, width), np.float32),
    )
    marks = [tokenizer.token_to_id(mark) for mark in MARKS]
    used, held = [0] * count, [0] * count
    misses = 0
    while misses < 8:
        doc = next(docs, None)
        if doc is None:
            break
        n = len(doc.ids)
        row = next((i for i in range(count) if used[i] + n <= length), None)
        if row is None:
            misses += 1
            continue
        held[row] += 1
        at = slice(used[row], used[row] + n)
        rows.ids[row, at], rows.weights[row, at], rows.document[row, at] = doc.ids, doc.weights, held[row]
        rows.branch[row, at], rows.position[row, at] = doc.branch, doc.position
        rows.look[row, at], rows.thing[row, at] = doc.look, doc.thing
        rows.name[row, at], rows.colour[row, at], rows.place[row, at] = doc.name, doc.colour, doc.place
        rows.soft[row, at][np.isin(doc.ids, marks)] = doc.soft
        used[row] += n
    return rows


def text_rows(tokenizer: Tokenizer, rng: random.Random, length: int, count: int, width: int) -> Rows:
    """Plain text, each document alone in its row's attention."""
    ids, weights = mixture.rows(mixture.documents(tokenizer, rng, late=True), length, count)
    document = np.cumsum(ids == BOS, axis=1).astype(np.int32) * (ids != PAD)
    position = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    none = (np.zeros_like(ids) for _ in range(5))
    soft = np.zeros((count, length, width), np.float32)
    branch, *nowhere = none
    return Rows(ids, weights, document, branch, position, *nowhere, np.zeros((count, length, 4), np.float32), soft)


def masks(rows: Rows, window: int) -> dict[str, NDArray[np.bool_]]:
    """[rows, 1, length, length] for both kinds of layers: True where the row's token may look at the column's."""
    order = np.arange(rows.ids.shape[1])
    same = rows.document[:, :, None] == rows.document[:, None, :]
    line = (rows.branch[:, None, :] == 0) | (rows.branch[:, :, None] == rows.branch[:, None, :])
    full = same & line & (order[:, None] >= order)
    near = rows.position[:, :, None] - rows.position[:, None, :] < window
    return {"full_attention": full[:, None], "sliding_attention": (full & near)[:, None]}


def join(parts: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Rows)))


def batch(tokenizer: Tokenizer, items: dict[str, list[Item]], seed: int, step: int, *, few: float = 0.0) -> Rows:
    """The rows of this step, which depend on the arguments alone: SHARE's kinds in order, then plain text.

    few   chance that a picture of many shapes gives way to one of up to three
    """
    rng = random.Random(f"media/{seed}/{step}")
    width = next(iter(items.values()))[0].soft[0].shape[1]

    def stream(kind: str) -> Iterator[MediaDocument]:
        for one in cycle(rng.sample(OTHERS, len(OTHERS)) if kind == "others" else (kind,)):
            item = rng.choice(items[one])
            while one == "shapes" and rng.random() < few and len(item.source.shapes) > 3:
                item = rng.choice(items[one])
            yield about(item, ask(item, rng, rng.choice((4, 6, 8))), tokenizer)

    parts = []
    for kind, count in SHARE.items():
        if kind == "text":
            parts.append(text_rows(tokenizer, rng, LENGTH, count, width))
        else:
            parts.append(pack(stream(kind), tokenizer, LENGTH, count, width))
    return join(parts)
