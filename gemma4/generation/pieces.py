# SPDX-License-Identifier: Apache-2.0
"""From sampled ids to pieces of text: whole characters, and for chat turns which channel they belong to."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma4.text.turn import ModelTurn, parse_turn

if TYPE_CHECKING:
    from gemma4.model import Model
    from gemma4.text.tokenizer import Tokenizer

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

    def __init__(self, model: Model) -> None:
        # a checkpoint without a tokenizer still generates ids
        self._stream = model.tokenizer.decode_stream() if model.checkpoint.tokenizer_path else None

    def push(self, token: int) -> list[Piece]:
        return _pieces(self._stream.push(token)) if self._stream else []

    def flush(self) -> list[Piece]:
        return _pieces(self._stream.flush()) if self._stream else []


class TurnText:
    """A model turn: the answer as pieces of text, thinking only if it is to be shown, tool calls never.

    Channels are told apart by the ids of their markers, so text that merely looks like one stays text. prompt: int32
    [pos]; some templates end inside an open thinking channel, and what follows belongs to it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: NDArray[np.int32], show_thinking: bool = False, tools: Collection[str] = ()
    ) -> None:
        self._tokenizer, self._tools, self._show_thinking = tokenizer, tools, show_thinking
        self._opens = {_id(tokenizer, _THINK[0]): "thinking", _id(tokenizer, _CALL[0]): "tool_call"}
        self._closes = {_id(tokenizer, _THINK[1]), _id(tokenizer, _CALL[1])}
        self._ids: list[int] = []
        self._began_thinking = _is_open(prompt, _id(tokenizer, _THINK[0]), _id(tokenizer, _THINK[1]))
        self._channel = "thinking" if self._began_thinking else "text"
        self._label: str | None = None  # a channel's name line ("thought\n") as far as it has come
        self._stream = tokenizer.decode_stream(skip_special=True)

    def push(self, token: int) -> list[Piece]:
        self._ids.append(token)
        if token not in self._opens and token not in self._closes:
            return self._visible(self._stream.push(token))
        held = self.flush()
        self._channel = self._opens.get(token, "text")
        self._label = "" if self._channel == "thinking" else None
        return held

    def flush(self) -> list[Piece]:
        return self._visible(self._stream.flush())

    def parsed(self) -> ModelTurn:
        """Answer, thinking and tool calls of the turn so far."""
        return parse_turn(self._tokenizer.decode(self._ids), thinking=self._began_thinking, tools=self._tools)

    def _visible(self, text: str) -> list[Piece]:
        if self._channel == "tool_call" or (self._channel == "thinking" and not self._show_thinking):
            return []
        if self._label is not None:
            self._label += text
            _, newline, text = self._label.partition("\n")
            if not newline:
                return []
            self._label = None
        return _pieces(text, self._channel)


def _id(tokenizer: Tokenizer, piece: str) -> int:
    try:
        return tokenizer.piece_to_id(piece)
    except KeyError:  # a vocabulary without this marker: no sampled id equals it
        return -1


def _is_open(prompt: NDArray[np.int32], opening: int, closing: int) -> bool:
    opened = np.flatnonzero(prompt == opening)
    return len(opened) > 0 and not (prompt[opened[-1] :] == closing).any()


def _pieces(text: str, channel: str = "text") -> list[Piece]:
    return [Piece(text, channel)] if text else []
