# SPDX-License-Identifier: Apache-2.0
"""A model's turn, decoded with its control tokens, into thinking, content and tool calls.

    <|channel>thought
    …<channel|>answer<turn|>
    <|tool_call>call:NAME{city:<|"|>Rome<|"|>,days:3}<tool_call|><|tool_response>

Models omit tokens, so the parser never fails: thoughts may be empty, several, unclosed or interrupted by a call;
closers may come without openers; calls may follow each other or be truncated at the end. Calls written in
another way are repaired if unambiguous (gemma4/text/repair.py). Time is linear in the text.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gemma4.narrow import is_dict, is_list_or_tuple
from gemma4.text.literals import QUOTE, Malformed, add_member, literal
from gemma4.text.repair import offered, repair_calls
from gemma4.text.tokenizer import Tokenizer

_MARKS = (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|turn>",
    "<turn|>", "<bos>", "<eos>", "<pad>",
)  # fmt: skip
MARKERS = (*_MARKS, QUOTE)  # texts with a meaning in a turn
# Their names in vocabularies of Gemma 3: FunctionGemma's calls, MedGemma's thoughts
_EARLIER = {
    "<|channel>": "<unused94>",
    "<channel|>": "<unused95>",
    "<|tool_call>": "<start_function_call>",
    "<tool_call|>": "<end_function_call>",
    "<|tool_response>": "<start_function_response>",
    "<tool_response|>": "<end_function_response>",
    "<|turn>": "<start_of_turn>",
    "<turn|>": "<end_of_turn>",
    QUOTE: "<escape>",
}
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_SEAM = "\ufdd0"  # a noncharacter: inserted into text that only looks like a marker
_ENDS = ("<turn|>", "<eos>", "<|tool_response>")
_CALL_ENDS = ("<tool_call|>", "<|tool_response>")  # with these the model itself marks a call as complete
_CALL = re.compile(r"\s*call:\s*([^\s{}<>()\[\]\"',=|]{1,256})\s*\{")
_NAME = re.compile(r"""\s*["']?([^\s{}<>()\[\]"',=|]{1,256})["'\s{(]""")
_BARE_CALL = re.compile(r"\s*call\s*:")
_CLOSERS = re.compile(r"[\s})\]]*\Z")
_BETWEEN = re.compile(r"[\s})\].,;]*")  # text after a call without a meaning of its own: spare closers, separators
_BARE = re.compile(r"[^,{}\[\]]*")
_KEY = re.compile(
    r'\s*(?:<\|"\|>(?P<q>(?:(?!<\|"\|>).)*)<\|"\|>|"(?P<j>[^"]*)"|(?P<b>[^:=,{}\[\]"\'`“”‘’«»„<\n]+?))\s*:', re.S
)
_SPACE = re.compile(r"\s*")
_JSON = json.JSONDecoder(strict=False)
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class ModelTurn:
    """content and thinking are stripped of surrounding whitespace; thoughts are joined by newlines.

    malformed: the text of calls that could not be parsed (truncated, or without a single meaning).
    """

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: tuple[str, ...] = ()


def parse_turn(text: str, *, thinking: bool = False, tools: Collection[str] = ()) -> ModelTurn:
    """The parts of `text`, which was decoded with control tokens kept; it may be the beginning of a turn.

    thinking: the prompt already opened the thought, so the text starts inside it.
    tools: names of the tools offered. Only for these is a call repaired, or accepted without its opening token:
    untrusted text must not be able to write a call.
    """
    text = re.sub(r"\A\s*<\|turn>model\n?", "", text)
    reader = _Reader(text, frozenset(tools), in_thought=thinking)
    reader.run()
    thoughts = [t.strip() for t in reader.thoughts]
    thought = "\n".join(t for t in thoughts if t)
    return ModelTurn("".join(reader.content).strip(), thought, tuple(reader.calls), tuple(reader.malformed))


def marker_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each of MARKERS that the vocabulary has, under the name of Gemma 4 or that of an earlier model."""
    out: dict[str, int] = {}
    for marker in MARKERS:
        for name in (marker, _EARLIER.get(marker)):
            if name is not None and marker not in out:
                with contextlib.suppress(KeyError):
                    out[marker] = tokenizer.piece_to_id(name)
    return out


def as_plain_text(text: str, markers: Collection[str]) -> str:
    """`text` for `parse_turn`, with text that only looks like a marker masked; see `as_written`.

    A model that quotes untrusted text spells markers with ordinary tokens; this must not create a call.
    """
    return re.sub("|".join(map(re.escape, markers)) or "(?!)", lambda mark: mark[0][0] + _SEAM + mark[0][1:], text)


def as_written(turn: ModelTurn) -> ModelTurn:
    """The turn parsed from the output of `as_plain_text`, with its masking undone."""
    calls = tuple(ToolCall(call.name, _as_written(call.arguments)) for call in turn.tool_calls)
    return ModelTurn(_as_written(turn.content), _as_written(turn.thinking), calls, tuple(_as_written(turn.malformed)))


def _as_written(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_SEAM, "")
    if is_dict(value):
        return {_as_written(key): _as_written(item) for key, item in value.items()}
    return [_as_written(item) for item in value] if is_list_or_tuple(value) else value


def may_be_bare_call(text: str, tools: Collection[str]) -> bool:
    """Whether `text` may begin a call without its opening token: "call:", a prefix of it, or more."""
    if not tools:
        return False
    start = _BARE_CALL.match(text)
    if start is None:
        return "call:".startswith(text.strip())
    name = _NAME.match(text, start.end())
    return name is None or offered(name[1].rstrip(":"), tools) is not None


def is_bare_call(text: str, tools: Collection[str]) -> bool:
    """Whether `text`, which a closing token follows, is a call of one of the tools."""
    return _Reader("", frozenset(tools), in_thought=False).bare_call(text)


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
                self.in_thought = False  # a call ends an open thought
                at = self._call(at)
            elif mark[0] in ("<|channel>", "<channel|>"):
                self.in_thought = mark[0] == "<|channel>"
                if self.in_thought and self.text.startswith("thought", at):
                    at += len("thought")

    def _text(self, text: str, closer: str) -> None:
        if self.in_thought:
            self.thoughts.append(text)
        elif closer != "<tool_call|>" or not self.bare_call(text):
            self.content.append(text)

    def bare_call(self, text: str) -> bool:
        """Text before a closer without opener: a call if it parses as one of the offered tools."""
        if not _BARE_CALL.match(text):
            return False
        read = self._canonical(text, 0)
        if read and read[0].name in self.tools and not text[read[1] :].strip():
            self.calls.append(read[0])
            return True
        return self._repaired(text, ended=True)

    def _call(self, at: int) -> int:
        """Parse the calls up to the next marker, most often one; returns where to continue."""
        n_before = len(self.calls)
        while read := self._canonical(self.text, at):
            self.calls.append(read[0])
            between = _BETWEEN.match(self.text, read[1])
            at = between.end() if between else read[1]
        mark = _MARK.search(self.text, at)
        stop = mark.start() if mark else len(self.text)
        body, follows = self.text[at:stop], len(self.calls) > n_before
        if follows and not body:
            return stop
        known = not follows or _BARE_CALL.match(body)
        ended = mark is not None and mark[0] in _CALL_ENDS
        if not known or (not self._repaired(body, ended) and not self._in_words(body)):
            self.malformed.append(body)
        return stop

    def _canonical(self, text: str, at: int) -> tuple[ToolCall, int] | None:
        """A call in the exact format, whose strings may hold anything, and where it ends."""
        start = _CALL.match(text, at)
        name = self._name(start[1]) if start else None
        if start is None or name is None:
            return None
        try:
            arguments, after = _object(text, start.end(), 1, _Rules(words=False))
        except Malformed:
            return None
        return ToolCall(name, arguments), after

    def _name(self, written: str) -> str | None:
        """The offered tool that is meant, else the name as written, unless it has a namespace that was not offered."""
        return offered(written, self.tools) or (None if ":" in written else written)

    def _repaired(self, body: str, ended: bool) -> bool:
        found = repair_calls(body, ended, self.tools) if self.tools else None
        self.calls += [ToolCall(name, arguments) for name, arguments in found or ()]
        return found is not None

    def _in_words(self, body: str) -> bool:
        """The format with unquoted strings, and nothing after it: a call of any tool."""
        start = _CALL.match(body)
        name = self._name(start[1]) if start else None
        if start is None or name is None or name in self.tools:  # for a known tool, repair_calls decides
            return False
        try:
            arguments, after = _object(body, start.end(), 1, _Rules(words=True))
        except Malformed:
            return False
        if not _CLOSERS.match(body[after:]):
            return False
        self.calls.append(ToolCall(name, arguments))
        return True


def parse_arguments(text: str) -> dict[str, Any]:
    """The mapping in `{key:value,…}` as the model writes it. Raises ValueError if it is not one."""
    try:
        if not text.startswith("{"):
            raise Malformed
        arguments, at = _object(text, 1, 1, _Rules(words=True, repeats=True))
        if text[at:].strip():
            raise Malformed
        return arguments
    except Malformed:
        raise ValueError(f"not a tool call's arguments: {text!r:.200}") from None


class _Rules(NamedTuple):
    words: bool  # text without quotes is a string
    repeats: bool = False  # a key may be repeated; the last value counts


def _object(text: str, at: int, depth: int, rules: _Rules) -> tuple[dict[str, Any], int]:
    out: dict[str, Any] = {}
    at = _skip(text, at)
    while not text.startswith("}", at):
        key = _KEY.match(text, at)
        if key is None:
            raise Malformed
        name = next(part for part in (key["q"], key["j"], key["b"]) if part is not None)
        value, at = _value(text, key.end(), depth, rules)
        if rules.repeats:
            out.pop(name, None)
        add_member(out, name, value)
        at = _comma(text, at, "}")
    return out, at + 1


def _list(text: str, at: int, depth: int, rules: _Rules) -> tuple[list[Any], int]:
    out: list[Any] = []
    at = _skip(text, at)
    while not text.startswith("]", at):
        item, at = _value(text, at, depth, rules)
        out.append(item)
        at = _comma(text, at, "]")
    return out, at + 1


def _comma(text: str, at: int, closer: str) -> int:
    at = _skip(text, at)
    if text.startswith(",", at):
        return _skip(text, at + 1)
    if not text.startswith(closer, at):
        raise Malformed
    return at


def _value(text: str, at: int, depth: int, rules: _Rules) -> tuple[Any, int]:
    at = _skip(text, at)
    if depth > _MAX_DEPTH:
        raise Malformed
    if text.startswith(QUOTE, at):
        end = text.find(QUOTE, at + len(QUOTE))
        if end < 0:
            raise Malformed
        return text[at + len(QUOTE) : end], end + len(QUOTE)
    if text.startswith("{", at):
        return _object(text, at + 1, depth + 1, rules)
    if text.startswith("[", at):
        return _list(text, at + 1, depth + 1, rules)
    if text.startswith('"', at):
        return _json_string(text, at)
    return _bare(text, at, rules)


def _json_string(text: str, at: int) -> tuple[str, int]:
    """A JSON string: models sometimes fall back to JSON's quotes."""
    try:
        value, end = _JSON.raw_decode(text, at)
        return value, end
    except ValueError:
        raise Malformed from None


def _bare(text: str, at: int, rules: _Rules) -> tuple[Any, int]:
    """A number, true, false, null, or (if the rules have words) text without quotes."""
    found = _BARE.match(text, at)
    end = found.end() if found else at
    word = text[at:end].strip()
    if not word or "<" in word or end >= len(text):
        raise Malformed
    value = literal(word)
    if isinstance(value, str) and not rules.words:
        raise Malformed
    return value, end


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
