# SPDX-License-Identifier: Apache-2.0
"""Prompts of every kind, checked and converted to token ids and soft tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core
from gemma4.encoders.hooks import EncoderTaps
from gemma4.errors import CapacityError, StateError
from gemma4.media.medium import read_media
from gemma4.media.prompt import TokenizedPrompt, expander, locate
from gemma4.narrow import is_array, is_sequence
from gemma4.sequence import Sequence, new_sequence
from gemma4.step import Prompt
from gemma4.text.chat import check_messages, encode_chat
from gemma4.text.parts import canonical

TextOrIds: TypeAlias = str | NDArray[np.integer] | Seq[int] | Seq[np.integer]
Single: TypeAlias = TextOrIds | TokenizedPrompt
TokensLike: TypeAlias = Single | Seq[Single]
Messages: TypeAlias = Seq[Mapping[str, object]]
PromptLike: TypeAlias = Single | Messages


def is_batch(ids: object) -> TypeGuard[Seq[Single]]:
    """True for a list of prompts, False for one prompt (text, ids, a 1-D array)."""
    if isinstance(ids, str | TokenizedPrompt):
        return False
    if isinstance(ids, np.ndarray):
        return ids.ndim > 1
    return is_sequence(ids) and len(ids) > 0 and not all(_is_id(item) for item in ids)


def _is_id(item: object) -> bool:
    return isinstance(item, (int, np.integer)) or (isinstance(item, np.ndarray) and item.ndim == 0)


def as_tokenized(model: Core, prompt: Single, *, bos: bool = True) -> TokenizedPrompt:
    """One prompt that is text, ids, or tokenized already. Raises as `as_ids`."""
    if isinstance(prompt, TokenizedPrompt):
        as_ids(model, prompt.ids)
        return prompt
    return TokenizedPrompt(as_ids(model, prompt, bos=bos))


def as_ids(model: Core, prompt: TextOrIds, *, bos: bool = True) -> NDArray[np.int32]:
    """One prompt as int32 [T]. Raises ValueError (empty, id out of range), TypeError (not integers)."""
    if not (is_sequence(prompt) or is_array(prompt)) or isinstance(prompt, bytes):
        raise TypeError(f"a prompt must be text, token ids, or a list of those, got {prompt!r:.80}")
    ids = model.to_tokens(prompt, bos=bos) if isinstance(prompt, str) else np.asarray(prompt)
    if ids.ndim != 1:
        raise ValueError(f"token ids must be one row [pos], got shape {ids.shape}")
    if not len(ids):
        raise ValueError("empty prompt: there must be at least one token (text gets a BOS token unless bos=False)")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids must be whole numbers, got {ids.dtype}")
    wrong = np.flatnonzero((ids < 0) | (ids >= model.n_token_ids))
    if len(wrong):
        raise ValueError(
            f"token id {ids[wrong[0]]} at position {wrong[0]} is out of range: "
            f"the vocabulary has {model.n_token_ids} tokens (0 to {model.n_token_ids - 1})"
        )
    return np.ascontiguousarray(ids, dtype=np.int32)


@contextmanager
def opened_prompts(
    model: Core, ids: TokensLike, sequence: Sequence | Seq[Sequence] | None, taps: EncoderTaps
) -> Iterator[list[Prompt]]:
    """The prompts of one step; media are encoded with taps. Where no sequences are given, fresh ones of just the
    needed size are used and closed at the end.
    """
    many = is_batch(ids)
    prompts = list(ids) if is_batch(ids) else [cast("Single", ids)]
    given = _given_sequences(model, sequence, len(prompts), many)
    begins = [s.length == 0 for s in given or ()] or [True] * len(prompts)
    rows = [
        taps.apart(model, as_tokenized(model, prompt, bos=bos)) for prompt, bos in zip(prompts, begins, strict=True)
    ]
    if given is None:
        check_fits(max(len(row) for row in rows), model.context_length)
    taps.check(rows)
    soft = [taps.soft_rows(model, row, sequence=i) for i, row in enumerate(rows)]
    sequences = given or [new_sequence(model, capacity=len(row)) for row in rows]
    try:
        yield list(map(Prompt, sequences, (row.ids for row in rows), range(len(rows)), soft))
    finally:
        for one in sequences if given is None else ():
            one.close()


def _given_sequences(
    model: Core, given: Sequence | Seq[Sequence] | None, n_prompts: int, many: bool
) -> list[Sequence] | None:
    if given is None:
        return None
    sequences: list[Sequence] = [given] if isinstance(given, Sequence) else list(given) if _is_list(given) else []
    if (not sequences and not _is_list(given)) or not all(map(_is_sequence, sequences)):
        raise TypeError(f"sequence must be a Sequence, or one for each prompt, got {given!r:.80}")
    if len(sequences) != n_prompts or isinstance(given, Sequence) == many:
        raise ValueError(f"{n_prompts} prompts need {n_prompts} sequences (a list for a list), got {len(sequences)}")
    if len({id(s) for s in sequences}) != n_prompts:
        raise ValueError("the same sequence appears twice in one batch; fork() it")
    for s in sequences:
        s.check_usable_by(model)
    return sequences


def _is_list(value: object) -> bool:
    return isinstance(value, Seq)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence)


def check_fits(n_tokens: int, capacity: int, of: str = "the model's context") -> None:
    """Raise CapacityError before anything is computed if a prompt is longer than that."""
    if n_tokens > capacity:
        raise CapacityError(f"the prompt has {n_tokens} tokens; {of} is {capacity}. Shorten the prompt.")


def tokenize_prompt(
    model: Core,
    prompt: PromptLike,
    *,
    tools: Seq[Mapping[str, object]] | None = None,
    think: bool | None = None,
    image_tokens: int | None = None,
) -> TokenizedPrompt:
    """A prompt of any kind: text, ids, or chat messages, whose images, sounds and videos are read here.

    Raises ValueError for an empty one, StateError for messages without a chat template, NotImplementedError for media
    that the model has no encoder for, FormatError for damaged media.
    """
    if not is_messages(prompt):
        if isinstance(prompt, str) and not prompt:
            raise ValueError("empty prompt: there must be at least one token")
        return as_tokenized(model, cast("Single", prompt))
    if model.chat_template is None:
        raise StateError(f"{model.checkpoint.path} has no chat template: pass text or token ids instead of messages")
    messages = canonical(prompt)
    check_messages(messages)
    budget = model.image_tokens if image_tokens is None else image_tokens
    media = read_media(messages, image_tokens=budget, modalities=model.modalities)
    ids = encode_chat(
        model.tokenizer,
        model.chat_template,
        messages,
        expand=expander(media) if media else None,
        tools=tools,
        enable_thinking=think,
    )
    return locate(as_ids(model, ids), media, model.tokenizer)


def is_messages(prompt: object) -> TypeGuard[Messages]:
    return is_sequence(prompt) and not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_prompt_list(prompt: object) -> TypeGuard[Seq[PromptLike]]:
    return not is_messages(prompt) and is_batch(prompt)
