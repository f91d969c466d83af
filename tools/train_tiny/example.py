# SPDX-License-Identifier: Apache-2.0
"""One training or test example, and the rule that keeps the two apart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 10  # one combination in ten is never trained on


@dataclass(frozen=True)
class Example:
    """`prompt` + `answer` is one document; `answer` is what a test scores.

    key        what makes this combination: two examples with one key are the same problem
    open_ended the answer is not determined by the prompt (a story, the end of a year range), so it is not matched
    ids        the document is random token ids instead of text (induction); `prompt_len` of them are the prompt
    """

    skill: str
    prompt: str
    answer: str
    key: str
    open_ended: bool = False
    ids: tuple[int, ...] = ()
    prompt_len: int = 0


Generator = Callable[[random.Random], Example]


def is_held_out(skill: str, key: str) -> bool:
    """True for the tenth of all combinations that training never sees. Depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{skill}\x00{key}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % HELD_OUT_SHARE == 0


def sample(generator: Generator, rng: random.Random, *, held_out: bool) -> Example:
    """An example from the wanted side of the split. RuntimeError if the generator has no such combination."""
    for _ in range(10_000):
        example = generator(rng)
        if is_held_out(example.skill, example.key) == held_out:
            return example
    raise RuntimeError(f"{generator}: no {'held-out' if held_out else 'training'} example in 10000 draws")
