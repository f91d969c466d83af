# SPDX-License-Identifier: Apache-2.0
"""The skills, their share of training, and how documents become rows of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import skills_chat, skills_text
from .example import Example, Generator, sample
from .stories import story

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, PAD = 2, 0
FIRST_PIECE = 494  # ids below are specials, reserved names, runs and bytes, as in Gemma 4's vocabulary

# Share of the training *documents*, before and from step FOCUS on: by then some skills are there and need no more than
# to be kept up. Stories and tool calls are long, so their share of the tokens is larger.
FOCUS = 600
SHARES: dict[str, tuple[Generator, float, float]] = {
    "story": (story, 16, 12),
    "word_copy": (skills_text.word_copy, 3, 5),
    "ioi": (skills_text.ioi, 12, 18),
    "facts": (skills_text.fact, 16, 24),
    "sequences": (skills_text.sequence, 8, 12),
    "greater_than": (skills_text.greater_than, 6, 3),
    "brackets": (skills_text.brackets, 8, 12),
    "translation": (skills_text.translation, 14, 14),
    "word_pairs": (skills_text.word_pairs, 6, 3),
    "chat": (skills_chat.chat, 8, 6),
    "memory": (skills_chat.memory, 4, 2),
    "story_request": (skills_chat.story_request, 3, 4),
    "tools": (skills_chat.tool_call, 7, 9),
    "json": (skills_chat.json_answer, 5, 5),
    "thinking": (skills_chat.thinking, 7, 12),
    "compare": (skills_chat.compare, 3, 14),
}
INDUCTION_SHARES = (20.0, 18.0)

# Loss weights. Most of a prompt cannot be predicted (names, numbers), and random tokens not at all.
PROMPT_WEIGHT, ANSWER_WEIGHT, NOISE_WEIGHT = 0.25, 1.0, 0.0


@dataclass(frozen=True)
class Document:
    """ids [n] int32 starting with `<bos>`; weights [n] float32: how much the prediction *of* each id counts."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    prompt_len: int


def piece_range(tokenizer: Tokenizer) -> range:
    """Ids of the ordinary pieces: after the bytes, before the media tokens at the end."""
    end = tokenizer.token_to_id("<|image>")
    if end is None:
        raise ValueError("the tokenizer has no <|image>: it was not made by make_tokenizer.py")
    return range(FIRST_PIECE, end)


def tokenize(example: Example, tokenizer: Tokenizer) -> Document:
    """Prompt and answer are encoded together; the prompt's length is where the answer's characters begin."""
    if example.ids:
        ids = [BOS, *example.ids]
        prompt_len = example.prompt_len + 1
        prompt_weight = NOISE_WEIGHT
    else:
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False).ids
        ids = [BOS, *prompt, *tokenizer.encode(example.answer, add_special_tokens=False).ids]
        prompt_len = len(prompt) + 1
        prompt_weight = ANSWER_WEIGHT if example.skill == "story" else PROMPT_WEIGHT
        if not example.answer.endswith(("<turn|>", "<|tool_response>")):
            ids.append(1)
    weights = np.full(len(ids), ANSWER_WEIGHT, np.float32)
    weights[:prompt_len] = prompt_weight
    weights[0] = 0.0
    return Document(np.array(ids, np.int32), weights, prompt_len)


def documents(tokenizer: Tokenizer, rng: random.Random, *, late: bool) -> Iterator[Document]:
    """An endless stream of training documents."""
    names = sorted(SHARES)
    shares = [after if late else before for _, before, after in (SHARES[name] for name in names)]
    copying = INDUCTION_SHARES[late]
    generators: list[Generator] = [SHARES[name][0] for name in names]
    induction = partial(skills_text.induction, pieces=piece_range(tokenizer))
    while True:
        if rng.random() * (sum(shares) + copying) < copying:
            yield tokenize(induction(rng), tokenizer)
        else:
            yield tokenize(sample(rng.choices(generators, shares)[0], rng, held_out=False), tokenizer)


def rows(docs: Iterator[Document], length: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(ids, weights) [count, length]: whole documents first-fit into rows, so every row begins with a `<bos>`."""
    ids = np.full((count, length), PAD, np.int32)
    weights = np.zeros((count, length), np.float32)
    used = [0] * count
    misses = 0
    while misses < 8:
        doc = next(docs)
        n = len(doc.ids)
        if n > length:
            continue
        row = next((i for i in range(count) if used[i] + n <= length), None)
        if row is None:
            misses += 1
            continue
        ids[row, used[row] : used[row] + n] = doc.ids
        weights[row, used[row] : used[row] + n] = doc.weights
        used[row] += n
    return ids, weights


def batch(tokenizer: Tokenizer, seed: int, step: int, tokens: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The batch of this step: it depends on (seed, step) alone, so training can stop and go on anywhere.

    Rows of 128 tokens (short documents only) and of 256 take turns; every twelfth step has rows of 512.
    """
    length = 512 if step % 12 == 11 else 256 if step % 2 else 128
    docs = documents(tokenizer, random.Random(f"{seed}/{step}"), late=step >= FOCUS)
    return rows(docs, length, tokens // length)
