# SPDX-License-Identifier: Apache-2.0
"""From sampled ids to pieces of text: whole characters, and in chat turns their channel."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core
from gemma4.text.turn import (
    ModelTurn,
    as_plain_text,
    as_written,
    is_bare_call,
    marker_ids,
    may_be_bare_call,
    parse_turn,
)

if TYPE_CHECKING:
    from gemma4.text.tokenizer import DecodeStream, Tokenizer

_THINK, _CALL = ("<|channel>", "<channel|>"), ("<|tool_call>", "<tool_call|>")


class Piece(str):
    """A piece of generated text. channel: "text" or "thinking"."""

    channel: str

    def __new__(cls, text: str, channel: str = "text") -> Piece:
        piece = super().__new__(cls, text)
        piece.channel = channel
        return piece


class ContinuationText:
    """Everything the model writes, special tokens visible."""

    def __init__(self, model: Core) -> None:
        # a checkpoint without a tokenizer still generates ids
        self._stream = model.tokenizer.decode_stream() if model.checkpoint.tokenizer_path else None

    def push(self, token: int) -> list[Piece]:
        return _pieces(_decoded(self._stream, token)) if self._stream else []

    def end(self, token: int) -> list[Piece]:
        """The remaining text when generation stops at `token`, which is not shown."""
        return self.flush()

    def flush(self) -> list[Piece]:
        return _pieces(self._stream.flush()) if self._stream else []


class TurnText:
    """A model turn: the answer as pieces of text, thinking only if requested, tool calls never.

    Channels are distinguished by the ids of their markers, whatever the vocabulary calls them, so text that only looks
    like a marker stays text. Text that
    may be a call without its opening marker is held back until that is certain. prompt: int32 [pos]; some
    templates end inside an open thinking channel, to which the following text belongs.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: NDArray[np.int32], show_thinking: bool = False, tools: Collection[str] = ()
    ) -> None:
        self._tools, self._show_thinking = frozenset(tools), show_thinking
        ids = marker_ids(tokenizer)
        self._names = {token: marker for marker, token in ids.items()}
        self._special = tokenizer.special_ids | set(self._names)
        # -1: a vocabulary without this marker; no sampled id equals it
        thinks, self._call_end = ids.get(_THINK[0], -1), ids.get(_CALL[1], -1)
        self._opens = {thinks: "thinking", ids.get(_CALL[0], -1): "tool_call"}
        self._closes = {ids.get(_THINK[1], -1), self._call_end}
        self._began_thinking = _is_open(prompt, thinks, ids.get(_THINK[1], -1))
        self._channel = "thinking" if self._began_thinking else "text"
        self._label: str | None = None  # start of a channel's name line ("thought\n"), as far as received
        self._held: str | None = ""  # text since the last marker while it may be a call; None once it cannot be
        self._stream = tokenizer.decode_stream(skip_special=True)
        self._markers = list(ids)
        self._whole = tokenizer.decode_stream()
        self._turn: list[tuple[bool, str]] = []  # (is a control token, text) for `parsed`

    def push(self, token: int) -> list[Piece]:
        self._keep(token)
        if token not in self._opens and token not in self._closes:
            return self._visible(_decoded(self._stream, token))
        if token == self._call_end and self._held:
            self._held += self._stream.flush()
            if is_bare_call(as_plain_text(self._held, self._markers), self._tools):
                self._held = ""
        pieces = self.flush()
        self._channel = self._opens.get(token, "text")
        self._label = "" if self._channel == "thinking" else None
        self._held = ""
        return pieces

    def end(self, token: int) -> list[Piece]:
        """The remaining text when generation stops at `token`, which is not shown; a marker may complete a call."""
        if token in self._special:
            self._keep(token)
        return self.flush()

    def _keep(self, token: int) -> None:
        """Append a token to the turn, a marker under its name in Gemma 4."""
        name = self._names.get(token)
        text = _decoded(self._whole, token) if name is None else self._whole.flush() + name
        self._turn.append((token in self._special, text))

    def flush(self) -> list[Piece]:
        pieces = self._visible(self._stream.flush())
        label, self._label = self._label, None
        if label and label != "thought" and self._show_thinking:  # a thought without a name line
            pieces += _pieces(label, self._channel)
        held, self._held = self._held, None
        return pieces + _pieces(held or "")

    def parsed(self) -> ModelTurn:
        """Answer, thinking and tool calls of the turn so far."""
        runs = itertools.groupby(self._turn, key=lambda piece: piece[0])
        texts = [(special, "".join(text for _, text in run)) for special, run in runs]
        text = "".join(text if special else as_plain_text(text, self._markers) for special, text in texts)
        return as_written(parse_turn(text, thinking=self._began_thinking, tools=self._tools))

    def _visible(self, text: str) -> list[Piece]:
        if self._channel == "tool_call" or (self._channel == "thinking" and not self._show_thinking):
            return []
        if self._channel == "text":
            return self._certain(text)
        if self._label is not None:
            self._label += text
            _, newline, text = self._label.partition("\n")
            if not newline:
                return []
            self._label = None
        return _pieces(text, self._channel)

    def _certain(self, text: str) -> list[Piece]:
        if self._held is not None:
            self._held += text
            if may_be_bare_call(self._held, self._tools):
                return []
            text, self._held = self._held, None
        return _pieces(text)


def _decoded(stream: DecodeStream, token: int) -> str:
    """A model's table may be larger than its tokenizer: an id without a piece is shown as U+FFFD."""
    try:
        return stream.push(token)
    except ValueError:
        return stream.flush() + "\ufffd"


def _is_open(prompt: NDArray[np.int32], opening: int, closing: int) -> bool:
    opened = np.flatnonzero(prompt == opening)
    return len(opened) > 0 and not (prompt[opened[-1] :] == closing).any()


def _pieces(text: str, channel: str = "text") -> list[Piece]:
    return [Piece(text, channel)] if text else []
