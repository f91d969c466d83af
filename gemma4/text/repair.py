# SPDX-License-Identifier: Apache-2.0
"""Tool calls in wrong formats that models write: other quotes, parentheses, JSON, missing commas and closers.

A repair must be unambiguous. If a text has several readings or a remainder, or the name is not an offered tool, there
is no call: the caller keeps the text. Time is linear in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

from gemma4.narrow import is_dict, is_list
from gemma4.text.literals import LITERAL, QUOTE, Malformed, add_member, literal, unique_members

_Q = re.escape(QUOTE)
_HEAD = re.compile(
    rf"(?:call\s*:)?\s*(?P<quote>{_Q}|[\"']?)(?P<name>[^\s{{}}()<>\[\]\"',=|]{{1,256}})(?P=quote)\s*:?\s*(?=[{{(]|\Z)"
)
_JSON_CALL = re.compile(r"(?:call\s*:)?\s*(?=[{\[])")
_FENCE = re.compile(r"```\w*\n(.*?)\n?```\Z", re.S)
# A key and its separator. "http://" and "a == b" are text.
_KEYISH = (
    rf"""(?:{_Q}[^<]{{0,256}}{_Q}|"[^"\n]{{0,256}}"|'[^'\n]{{0,256}}'|“[^”\n]{{0,256}}”|[^\W\d][\w.$-]{{0,127}})"""
    r"\s*(?::(?!//)|=(?!=))"
)
_KEY = re.compile(
    rf"""(?:{_Q}(?P<q>(?:(?!{_Q}).)*){_Q}|"(?P<j>[^"]*)"|'(?P<s>[^']*)'|[“‘«„`](?P<t>[^”’»“`]*)[”’»“`]|"""
    r"""(?P<b>[^:={},\[\]()"'<]{1,256}?))\s*[:=]""",
    re.S,
)
# Text that may follow a value: the end, a comma before a key or a closer, closers with valid text after them, or a key
# whose comma is missing.
_CLOSERS = rf"[}}\])][\s}}\])]*(?:\Z|,|{_KEYISH})"
_AFTER_MEMBER = rf"\s*(?:\Z|,\s*(?:\Z|[}}\])]|{_KEYISH})|{_CLOSERS}|{_KEYISH})"
_AFTER_ITEM = rf"\s*(?:\Z|,|{_CLOSERS}|[\"'{{\[]|{_Q})"
_AFTER = {"}": re.compile(_AFTER_MEMBER), ")": re.compile(_AFTER_MEMBER), "]": re.compile(_AFTER_ITEM)}
_COMMA = re.compile(rf",\s*(?:\Z|[,}}\])]|{_KEYISH})")
_LATER_CLOSER = re.compile(rf"\s*{_CLOSERS}")
_LITERAL_THEN_KEY = re.compile(rf"({LITERAL})\s+(?={_KEYISH})")
_MORE_KEYS = re.compile(rf"[,;\n]\s*{_KEYISH}")
_TYPOGRAPHIC = {"“": "”", "‘": "’", "«": "»", "„": "“", "`": "`"}  # opening quote -> closing quote
_QUOTES = (QUOTE, '"""', "'''", '"', "'", *_TYPOGRAPHIC)
_PAIRS = {"{": "}", "(": ")", "[": "]"}
_JSON = json.JSONDecoder(strict=False, object_pairs_hook=unique_members)
_MAX_DEPTH, _MAX_NAME = 64, 256
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_UNUSED = {"type", "id", "index", "call_id"}  # keys of a JSON call that are no part of its meaning
_SEPARATOR = re.compile(r"[.:/]")


def offered(name: str, tools: Collection[str]) -> str | None:
    """The tool that a model means by `name`: one of that name, or of what follows its namespaces ("mcp:files:read").

    Of tools that differ from it in separators alone ("files.read"), it means the only one.
    """
    if name in tools or len(name) > _MAX_NAME:
        return name if name in tools else None
    alike: dict[str, list[str]] = {}
    for tool in tools:
        alike.setdefault(_SEPARATOR.sub(".", tool), []).append(tool)
    for start in (0, *(separator.end() for separator in _SEPARATOR.finditer(name))):
        rest = name[start:]
        same = [rest] if rest in tools else alike.get(_SEPARATOR.sub(".", rest), ())
        if len(same) == 1:
            return same[0]
    return None


def repair_calls(body: str, ended: bool, tools: Collection[str]) -> list[tuple[str, dict[str, Any]]] | None:
    """(name, arguments) of the calls that `body` means, None unless it is calls of offered tools and nothing else.

    ended: the model itself ended the call. Otherwise missing text at the end may be part of a value.
    """
    body = body.strip()
    fenced = _FENCE.match(body)
    body = fenced[1].strip() if fenced else body
    reader = _Lenient(body)
    try:
        json_call, head = _JSON_CALL.match(body), _HEAD.match(body)
        if json_call:
            found = list(_calls_of(reader.json(json_call.end()), tools))
        else:
            name = offered(head["name"].rstrip(":"), tools) if head else None
            found = [(name, reader.arguments(head.end()))] if head and name else None
    except Malformed:
        return None
    return found if found and (ended or not reader.missing) else None


def _calls_of(value: Any, tools: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """{"name", "arguments"}, also inside {"function": …}, or a list of those. Raises Malformed for anything else."""
    for entry in value if is_list(value) else [value]:
        call = entry.get("function", entry) if is_dict(entry) else None
        if not is_dict(call) or not isinstance(call.get("name"), str):
            raise Malformed
        name, given = offered(call["name"], tools), [key for key in _ARGUMENTS if key in call]
        beside = {*call, *(entry if call is not entry else ())} - {"name", *given, *_UNUSED}
        if name is None or len(given) > 1 or beside - {"function"}:
            raise Malformed
        arguments: Any = call[given[0]] if given else dict[str, Any]()
        if isinstance(arguments, str):  # as in OpenAI's API
            arguments = _decoded(arguments)
        if not isinstance(arguments, dict):
            raise Malformed
        yield name, arguments


def _decoded(text: str) -> Any:
    try:
        return _JSON.decode(text or "{}")
    except (ValueError, RecursionError):
        raise Malformed from None


class _Lenient:
    """Parses one body. `missing` is set where an end was inferred from the end of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tail = len(text.rstrip("})] \t\r\n"))  # only closers follow from here on
        self.closers: list[str] = []  # closers of the open containers, innermost last
        self.missing = False

    def arguments(self, at: int) -> dict[str, Any]:
        if at == len(self.text):  # a name alone
            self.missing = True
            return {}
        inner = self._skip(at + 1)
        if self.text[at] == "(" and self.text.startswith("{", inner):
            value, at = self._container(inner)
        else:
            value, at = self._container(at)
        return self._whole(value, at)

    def json(self, at: int) -> Any:
        value, at = self._container(at)
        return self._whole(value, at)

    def _whole(self, value: Any, at: int) -> Any:
        if at < self.tail:
            raise Malformed
        return value

    def _container(self, at: int) -> tuple[Any, int]:
        closer = _PAIRS[self.text[at]]
        if len(self.closers) >= _MAX_DEPTH:
            raise Malformed
        self.closers.append(closer)
        value, at = (self._list if closer == "]" else self._object)(at + 1)
        self.closers.pop()
        return value, at

    def _closed(self, at: int) -> int | None:
        """After the closer of the innermost container, or of an outer one in its place; None if it continues."""
        char = self.text[at : at + 1]
        if char == self.closers[-1]:
            return at + 1
        if not char or char in self.closers[:-1]:
            self.missing = True
            return at
        return None

    def _object(self, at: int) -> tuple[dict[str, Any], int]:
        out: dict[str, Any] = {}
        while (end := self._closed(at := self._skip(at))) is None:
            key = _KEY.match(self.text, at)
            if key is None:
                raise Malformed
            name = next(part for part in key.groups() if part is not None).strip()
            value, at = self._value(key.end())
            add_member(out, name, value)
            at = self._comma(at)
        return out, end

    def _list(self, at: int) -> tuple[list[Any], int]:
        out: list[Any] = []
        while (end := self._closed(at := self._skip(at))) is None:
            if self.text[at] == ",":
                raise Malformed
            item, at = self._value(at)
            out.append(item)
            at = self._comma(at)
        return out, end

    def _comma(self, at: int) -> int:
        at = self._skip(at)
        return at + self.text.startswith(",", at)

    def _value(self, at: int) -> tuple[Any, int]:
        at = self._skip(at)
        quote = next((quote for quote in _QUOTES if self.text.startswith(quote, at)), None)
        if quote:
            return self._string(quote, at)
        if self.text.startswith(("{", "["), at):
            return self._container(at)
        return self._bare(at)

    def _ends_here(self, at: int) -> bool:
        return _AFTER[self.closers[-1]].match(self.text, at) is not None

    def _string(self, quote: str, at: int) -> tuple[str, int]:
        start = at + len(quote)
        if quote == QUOTE:  # it has no escapes: the next one closes, or the text has several readings
            end = self.text.find(quote, start)
            if end >= 0 and not self._ends_here(end + len(quote)):
                raise Malformed
            return self._unterminated(start, quote) if end < 0 else (self.text[start:end], end + len(quote))
        if quote == '"':
            try:
                value, end = _JSON.raw_decode(self.text, at)
                if self._ends_here(end):
                    return value, end
            except ValueError:
                pass
        closing = _TYPOGRAPHIC.get(quote, quote)
        for found in re.finditer(rf"(?<!\\){closing}", self.text[start:]):
            if self._ends_here(start + found.end()):
                return _unescaped(self.text[start : start + found.start()], quote), start + found.end()
        return self._unterminated(start, quote)

    def _unterminated(self, start: int, quote: str) -> tuple[str, int]:
        """The last value, without its closing quote or with another one: everything up to the closers at the end."""
        end = len(self.text)
        for closer in self.closers:  # the outermost one is last
            end = len(self.text[:end].rstrip())
            end -= end > start and self.text[end - 1] == closer
        text = self.text[start:end]
        other = next((mark for mark in ('"', "'", QUOTE) if text.endswith(mark) and text.count(mark) % 2), "")
        text = text.removesuffix(other)
        # An apostrophe may be a quote, and text that looks like further members may be members.
        if (
            quote in ("'", *_TYPOGRAPHIC)
            or QUOTE in text
            or text.count("{") > text.count("}")
            or _MORE_KEYS.search(text)
        ):
            raise Malformed
        self.missing = True
        return text, end

    def _bare(self, at: int) -> tuple[Any, int]:
        """A literal, or words without quotes, up to a comma before a key or the container's own closer."""
        number = _LITERAL_THEN_KEY.match(self.text, at)
        end = number.end(1) if number else self._end_of_words(at)
        word = self.text[at:end].strip()
        if "<|" in word or "|>" in word or _MORE_KEYS.search(word):
            raise Malformed
        return literal(word), end

    def _end_of_words(self, at: int) -> int:
        closer = self.closers[-1]
        opener = next(left for left, right in _PAIRS.items() if right == closer)
        depth, passed = 0, False
        for found in re.finditer(rf"[,\{opener}\{closer}]", self.text[at:]):
            char, here = found[0], at + found.start()
            if char == opener:
                depth += 1
            elif depth and char == closer:
                depth -= 1
            elif not depth and self._is_end(char, here):
                return here
            elif not depth:
                passed = passed or char == closer
        outer = [self.text.find(other, max(at, self.tail)) for other in self.closers[:-1]]
        if depth or passed:  # it was the end, and something follows, or there is none
            raise Malformed
        self.missing = True
        return min((here for here in outer if here >= 0), default=len(self.text))

    def _is_end(self, char: str, at: int) -> bool:
        if char == ",":
            return self.closers[-1] == "]" or _COMMA.match(self.text, at) is not None
        return at >= self.tail or (len(self.closers) > 1 and _LATER_CLOSER.match(self.text, at) is not None)

    def _skip(self, at: int) -> int:
        while at < len(self.text) and self.text[at].isspace():
            at += 1
        return at


def _unescaped(text: str, quote: str) -> str:
    """A string written with escapes, decoded; unchanged if they are not escapes (a Windows path, for example)."""
    if quote == "'":
        text = text.replace("\\'", "'")
    if "\\" not in text or quote in _TYPOGRAPHIC:
        return text
    try:
        return json.loads('"' + re.sub(r'(?<!\\)"', r"\"", text) + '"', strict=False)
    except ValueError:
        return text
