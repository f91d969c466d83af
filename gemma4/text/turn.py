# SPDX-License-Identifier: Apache-2.0
"""A model's turn, decoded with its control tokens, into thinking, content and tool calls.

    <|channel>thought
    …<channel|>answer<turn|>
    <|tool_call>call:NAME{city:<|"|>Rome<|"|>,days:3}<tool_call|><|tool_response>

Models leave tokens out, so the reader never fails: thoughts may be empty, several, unclosed or interrupted by a call;
closers may come without openers; calls may follow each other or be cut off at the end. Time is linear in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

_MARK = re.compile(
    r"<\|channel>|<channel\|>|<\|tool_call>|<tool_call\|>|<\|tool_response>|<tool_response\|>|<\|turn>|<turn\|>"
    r"|<bos>|<eos>|<pad>"
)
_ENDS = ("<turn|>", "<eos>", "<|tool_response>")
_CALL = re.compile(r"\s*call:\s*([^\s{}<>:]{1,256})\s*\{")
_QUOTE = '<|"|>'
_BARE = re.compile(r"[^,{}\[\]]*")
_NUMBER = re.compile(r"-?\d{1,400}(?:\.\d{1,400})?(?:[eE][+-]?\d{1,4})?\Z")
_KEY = re.compile(r'\s*(?:<\|"\|>(?P<q>(?:(?!<\|"\|>).)*)<\|"\|>|"(?P<j>[^"]*)"|(?P<b>[^:,{}\[\]"<]+?))\s*:', re.S)
_SPACE = re.compile(r"\s*")
_JSON = json.JSONDecoder(strict=False)
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelTurn:
    """content and thinking are stripped of surrounding whitespace; thoughts are joined by newlines.

    malformed: the text of calls that could not be read (cut off, or not `call:NAME{…}`).
    """

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: tuple[str, ...] = ()


def parse_turn(text: str, *, thinking: bool = False, tools: Collection[str] = ()) -> ModelTurn:
    """The parts of `text`, which was decoded with control tokens kept; it may be the beginning of a turn.

    thinking: the prompt already opened the thought, so the text starts inside it.
    tools: names of the tools offered. Only for these is a call accepted that lacks its opening token: a stranger's text
    must not be able to write one.
    """
    text = re.sub(r"\A\s*<\|turn>model\n?", "", text)
    reader = _Reader(text, frozenset(tools), in_thought=thinking)
    reader.run()
    thoughts = [t.strip() for t in reader.thoughts]
    thought = "\n".join(t for t in thoughts if t)
    return ModelTurn("".join(reader.content).strip(), thought, tuple(reader.calls), tuple(reader.malformed))


class _Reader:
    def __init__(self, text: str, tools: frozenset[str], in_thought: bool) -> None:
        self.text, self.tools, self.in_thought = text, tools, in_thought
        self.content: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[ToolCall] = []
        self.malformed: list[str] = []

    def run(self) -> None:
        at, end = 0, len(self.text)
        while at < end:
            mark = _MARK.search(self.text, at)
            stop = mark.start() if mark else end
            self._text(self.text[at:stop], closer=mark[0] if mark else "")
            if mark is None or mark[0] in _ENDS:
                return
            at = mark.end()
            if mark[0] == "<|tool_call>":
                self.in_thought = False  # a call ends a thought that was left open
                at = self._call(at)
            elif mark[0] in ("<|channel>", "<channel|>"):
                self.in_thought = mark[0] == "<|channel>"
                if self.in_thought and self.text.startswith("thought", at):
                    at += len("thought")

    def _text(self, text: str, closer: str) -> None:
        if self.in_thought:
            self.thoughts.append(text)
            return
        if closer == "<tool_call|>":  # a closer without opener: a call if it reads as one of the offered tools
            start = _CALL.match(text)
            if start and start[1] in self.tools and self._parse(text, start) == len(text.rstrip()):
                return
        self.content.append(text)

    def _call(self, at: int) -> int:
        """Read the call that starts at `at`; returns where to go on."""
        start = _CALL.match(self.text, at)
        after = self._parse(self.text, start) if start else None
        if after is not None:
            return after
        mark = _MARK.search(self.text, at)
        stop = mark.start() if mark else len(self.text)
        self.malformed.append(self.text[at:stop])
        return stop

    def _parse(self, text: str, start: re.Match[str]) -> int | None:
        try:
            arguments, after = _object(text, start.end(), 1)
        except _Malformed:
            return None
        self.calls.append(ToolCall(start[1], arguments))
        return after


class _Malformed(Exception):
    pass


def parse_arguments(text: str) -> dict[str, Any]:
    """The mapping in `{key:value,…}` as the model writes it. Raises ValueError if it is not one."""
    try:
        if not text.startswith("{"):
            raise _Malformed
        arguments, at = _object(text, 1, 1)
        if text[at:].strip():
            raise _Malformed
        return arguments
    except _Malformed:
        raise ValueError(f"not a tool call's arguments: {text!r:.200}") from None


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    out: dict[str, Any] = {}
    at = _skip(text, at)
    while not text.startswith("}", at):
        key = _KEY.match(text, at)
        if key is None:
            raise _Malformed
        name = next(part for part in (key["q"], key["j"], key["b"]) if part is not None)
        out[name], at = _value(text, key.end(), depth)
        at = _comma(text, at, "}")
    return out, at + 1


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    out: list[Any] = []
    at = _skip(text, at)
    while not text.startswith("]", at):
        item, at = _value(text, at, depth)
        out.append(item)
        at = _comma(text, at, "]")
    return out, at + 1


def _comma(text: str, at: int, closer: str) -> int:
    at = _skip(text, at)
    if text.startswith(",", at):
        return _skip(text, at + 1)
    if not text.startswith(closer, at):
        raise _Malformed
    return at


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    at = _skip(text, at)
    if depth > _MAX_DEPTH:
        raise _Malformed
    if text.startswith(_QUOTE, at):
        end = text.find(_QUOTE, at + len(_QUOTE))
        if end < 0:
            raise _Malformed
        return text[at + len(_QUOTE) : end], end + len(_QUOTE)
    if text.startswith("{", at):
        return _object(text, at + 1, depth + 1)
    if text.startswith("[", at):
        return _list(text, at + 1, depth + 1)
    if text.startswith('"', at):
        return _json_string(text, at)
    return _bare(text, at)


def _json_string(text: str, at: int) -> tuple[str, int]:
    """Models fall back to JSON's quotes now and then."""
    try:
        value, end = _JSON.raw_decode(text, at)
        return value, end
    except ValueError:
        raise _Malformed from None


def _bare(text: str, at: int) -> tuple[Any, int]:
    """A number, true, false, null, or unquoted words."""
    found = _BARE.match(text, at)
    end = found.end() if found else at
    word = text[at:end].strip()
    if not word or "<" in word or end >= len(text):
        raise _Malformed
    if word in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[word], end
    return (json.loads(word) if _NUMBER.match(word) and _json_number(word) else word), end


def _json_number(word: str) -> bool:
    digits = word.lstrip("-")
    return not (len(digits) > 1 and digits[0] == "0" and digits[1].isdigit())  # 007 is not JSON: keep it as text


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
