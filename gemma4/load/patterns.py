# SPDX-License-Identifier: Apache-2.0
"""Untrusted regular expressions, matched in time proportional to text times pattern.

Python's `re` backtracks, so a line of config.json can keep it busy indefinitely. Here all alternatives advance together
(Thompson's construction). Supported is what names of modules need: characters, ".", classes, groups, "|", "*", "+",
"?", "{m,n}", "^" and "$"; anything else is a NotImplementedError.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from gemma4.errors import FormatError

_MAX_STATES = 2000
_ATOM = re.compile(r"\\[dDwWsS]|\\[^\w]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}|*+?^$]", re.DOTALL)
_REPEAT = re.compile(r"(\*|\+|\?|\{(\d{1,4})(,(\d{0,4}))?\})\??")
_START, _END = "^", "$"

# A state: the condition on a character to pass (None: no character is read), and the next states.
_Test: TypeAlias = "Callable[[str], bool] | str | None"
_Part: TypeAlias = "Callable[[int], int]"  # makes states that lead to a given one; returns their first


class Pattern:
    """A compiled pattern. Raises FormatError for an invalid regular expression, NotImplementedError for syntax not
    listed above, a repeated group, or more than 2,000 states."""

    def __init__(self, text: str) -> None:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise FormatError(f"{text[:120]!r} is no pattern: {error}") from None
        self._text, self._at = text, 0
        self._tests: list[_Test] = []
        self._next: list[tuple[int, ...]] = []
        self._match = self._state(None)
        part = self._either()
        if self._at != len(text):
            self._refuse()
        self._first = part(self._match)

    def matches_start(self, text: str) -> bool:
        """Like re.match: whether some prefix of `text` matches the pattern."""
        states = self._reached({self._first}, text, 0)
        for at, character in enumerate(text):
            if self._match in states or not states:
                break
            passed = (state for state in states if _passes(self._tests[state], character))
            states = self._reached({after for state in passed for after in self._next[state]}, text, at + 1)
        return self._match in states

    def _reached(self, states: set[int], text: str, at: int) -> set[int]:
        """Add the states reachable without reading a character."""
        waiting, found = list(states), set(states)
        while waiting:
            state = waiting.pop()
            test = self._tests[state]
            here = test is None or (test == _START and at == 0) or (test == _END and at == len(text))
            for after in self._next[state] if here else ():
                if after not in found:
                    found.add(after)
                    waiting.append(after)
        return found

    def _state(self, test: _Test, *after: int) -> int:
        if len(self._tests) >= _MAX_STATES:
            self._refuse(f"needs more than {_MAX_STATES} states")
        self._tests.append(test)
        self._next.append(after)
        return len(self._tests) - 1

    def _refuse(self, why: str = "") -> NoReturn:
        why = why or f"has {self._text[self._at :][:20]!r} at {self._at}, which patterns of module names do not need"
        raise NotImplementedError(f"the pattern {self._text[:120]!r} {why}")

    def _either(self, depth: int = 0) -> _Part:
        if depth > 20:
            self._refuse("has groups within groups, more than 20 deep")
        choices = [self._sequence(depth)]
        while self._text.startswith("|", self._at):
            self._at += 1
            choices.append(self._sequence(depth))
        if len(choices) == 1:
            return choices[0]
        return lambda then: self._state(None, *(choice(then) for choice in choices))

    def _sequence(self, depth: int) -> _Part:
        parts: list[_Part] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            is_group = self._text[self._at] == "("
            parts.append(self._repeated(self._item(depth), is_group))

        def build(then: int) -> int:
            for part in reversed(parts):
                then = part(then)
            return then

        return build

    def _item(self, depth: int) -> _Part:
        if self._text[self._at] == "(":
            self._at += 3 if self._text.startswith("(?:", self._at) else 1
            inner = self._either(depth + 1)
            self._at += 1  # the end, without which the pattern is invalid
            return inner
        if self._text[self._at] in "^$":
            test: _Test = self._text[self._at]
            self._at += 1
            return lambda then: self._state(test, then)
        return self._character()

    def _character(self) -> _Part:
        atom = _ATOM.match(self._text, self._at)
        if atom is None:
            self._refuse()
        self._at = atom.end()
        test = re.compile(atom[0]).fullmatch
        return lambda then: self._state(lambda character: test(character) is not None, then)

    def _repeated(self, part: _Part, is_group: bool) -> _Part:
        repeat = _REPEAT.match(self._text, self._at)
        if repeat is None:
            return part
        if is_group:
            self._refuse("repeats a group, which patterns of module names do not need")
        self._at = repeat.end()
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(repeat[1], (0, 0))
        if repeat[2] is not None:
            low = int(repeat[2])
            high = low if repeat[3] is None else int(repeat[4]) if repeat[4] else None

        def build(then: int) -> int:
            if high is None:
                loop = self._state(None)
                self._next[loop] = (part(loop), then)
                then = loop
            for _ in range((high or low) - low):
                then = self._state(None, part(then), then)
            for _ in range(low):
                then = part(then)
            return then

        return build


def _passes(test: _Test, character: str) -> bool:
    return callable(test) and test(character)
