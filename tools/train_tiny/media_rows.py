# SPDX-License-Identifier: Apache-2.0
"""Conversations with pictures, videos and recordings as rows of token ids, beside what the towers are to encode."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import mixture, pictures, scenes, skills_media, sounds, speech
from .mixture import ANSWER_WEIGHT, BOS, PAD, Document
from .pictures import Patches
from .skills_media import Conversation

# Soft tokens of a picture: Gemma 4's smallest budget, its next (one picture in ten), one that trains in a third.
REAL_BUDGET, LARGE_BUDGET, SMALL_BUDGET = 70, 140, 25
QUESTION_WEIGHT = 0.02


@dataclass(frozen=True)
class MediaDocument(Document):
    """A document whose placeholders are expanded: one id for each soft token, in the order of what is encoded."""

    pictures: tuple[Patches, ...] = ()
    recording: NDArray[np.float32] | None = None  # mel [frames, 128]


@dataclass
class Rows:
    """ids, weights [rows, length]; pictures and recordings in the order in which the rows use them."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    pictures: list[Patches] = field(default_factory=list)
    recordings: list[NDArray[np.float32]] = field(default_factory=list)


def expand(conversation: Conversation, cut: tuple[Patches, ...], heard: int) -> str:
    """What stands in the prompt for the placeholder, as Gemma 4's processor writes it."""
    if conversation.picture:
        return f"<|image>{'<|image|>' * cut[0].tokens}<image|>"
    if conversation.clip:
        frames = zip(conversation.clip.seconds, cut, strict=True)
        return " ".join(f"{t // 60:02d}:{t % 60:02d} <|image>{'<|video|>' * p.tokens}<image|>" for t, p in frames)
    return f"<|audio>{'<|audio|>' * heard}<audio|>"


def tokenize(conversation: Conversation, tokenizer: Tokenizer, budget: int = REAL_BUDGET) -> MediaDocument:
    """All turns; answers count in full, questions hardly, soft tokens not at all. `prompt_len`: the first answer."""
    cut = tuple(pictures.patches(image, budget) for image in conversation.images)
    recording = sounds.mel(speech.say(conversation.said).samples) if conversation.said else None
    heard = 0 if recording is None else sounds.tokens(len(recording))
    marks = ("<|image|>", "<|video|>", "<|audio|>")
    soft = {tokenizer.token_to_id(mark) for mark in marks}
    ids, weights, prompt_len = [BOS], [0.0], 0
    for i, (before, answer) in enumerate(conversation.segments()):
        if i == 0:
            mark = next(mark for mark in marks if mark in before)
            before = before.replace(mark, expand(conversation, cut, heard), 1)
        question = tokenizer.encode(before, add_special_tokens=False).ids
        reply = tokenizer.encode(answer, add_special_tokens=False).ids
        prompt_len = prompt_len or len(ids) + len(question)
        ids += question + reply
        weights += [0.0 if token in soft else QUESTION_WEIGHT for token in question] + [ANSWER_WEIGHT] * len(reply)
    return MediaDocument(np.array(ids, np.int32), np.array(weights, np.float32), prompt_len, cut, recording)


def pack(docs: Iterator[MediaDocument], length: int, count: int) -> Rows:
    """Whole documents first-fit into `count` rows of `length`, as mixture.rows does for text."""
    rows = Rows(np.full((count, length), PAD, np.int32), np.zeros((count, length), np.float32))
    held: list[list[MediaDocument]] = [[] for _ in range(count)]
    used = [0] * count
    misses = 0
    while misses < 4:
        doc = next(docs)
        n = len(doc.ids)
        row = next((i for i in range(count) if used[i] + n <= length), None)
        if row is None:
            misses += 1
            continue
        rows.ids[row, used[row] : used[row] + n] = doc.ids
        rows.weights[row, used[row] : used[row] + n] = doc.weights
        used[row] += n
        held[row].append(doc)
    for doc in (doc for row in held for doc in row):
        rows.pictures += doc.pictures
        if doc.recording is not None:
            rows.recordings.append(doc.recording)
    return rows


def pictures_stream(tokenizer: Tokenizer, rng: random.Random, *, real: float) -> Iterator[MediaDocument]:
    """Pictures with two to five questions; a share `real` of them at Gemma 4's smallest budget."""
    while True:
        generator = scenes.text_scene if rng.random() < 0.3 else scenes.shape_scene
        scene = scenes.sample(generator, rng, held_out=False)
        if not scene.things:
            continue
        conversation = skills_media.picture_conversation(rng, scene, turns=rng.choice((2, 3, 4)))
        small = rng.random() >= real and not scene.writing  # letters need their pixels
        large = rng.random() < 0.1 * real
        yield tokenize(conversation, tokenizer, SMALL_BUDGET if small else LARGE_BUDGET if large else REAL_BUDGET)


def videos_stream(tokenizer: Tokenizer, rng: random.Random, *, real: float) -> Iterator[MediaDocument]:
    while True:
        budget = REAL_BUDGET if rng.random() < real else SMALL_BUDGET
        yield tokenize(skills_media.video_conversation(rng, held_out=False), tokenizer, budget)


def speech_stream(tokenizer: Tokenizer, rng: random.Random) -> Iterator[MediaDocument]:
    while True:
        said = speech.sample(rng, held_out=False)
        yield tokenize(skills_media.speech_conversation(rng, said, translate=rng.random() < 0.6), tokenizer)


LENGTH = 256
SHARE = {"pictures": 4, "videos": 1, "speech": 1, "text": 2}  # rows of a step


def batch(tokenizer: Tokenizer, seed: int, step: int, *, real: float, kinds: tuple[str, ...] = tuple(SHARE)) -> Rows:
    """The rows of this step, which depend on (seed, step) alone: pictures, videos, recordings, then plain text."""
    rng = random.Random(f"media/{seed}/{step}")
    parts = []
    for kind in kinds:
        if kind == "text":
            docs = mixture.documents(tokenizer, rng, late=True)
            parts.append(Rows(*mixture.rows(docs, LENGTH, SHARE[kind])))
        elif kind == "speech":
            parts.append(pack(speech_stream(tokenizer, rng), LENGTH, SHARE[kind]))
        else:
            stream = pictures_stream if kind == "pictures" else videos_stream
            parts.append(pack(stream(tokenizer, rng, real=real), LENGTH, SHARE[kind]))
    return Rows(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.weights for part in parts]),
        [picture for part in parts for picture in part.pictures],
        [recording for part in parts for recording in part.recordings],
    )
