# SPDX-License-Identifier: Apache-2.0
"""Unquoted values in tool calls: numbers, truth values, null, and words."""

from __future__ import annotations

import math
import re
from typing import Any

QUOTE = '<|"|>'
_NUMBER = (
    r"[+-]?(?:\d{1,3}(?:_\d{3})+|\d{1,400})(?:\.\d{0,400})?(?:[eE][+-]?\d{1,4})?|[+-]?\.\d{1,400}(?:[eE][+-]?\d{1,4})?"
)
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
LITERAL = rf"(?:{_NUMBER}|true|True|false|False|null|None)"
_IS_NUMBER = re.compile(rf"(?:{_NUMBER})\Z")
_IS_INTEGER = re.compile(r"[+-]?\d+\Z")


class Malformed(Exception):
    """The text is not in the expected format; never leaves the package."""


def add_member(out: dict[str, Any], name: str, value: Any) -> None:
    """Put a member into an object. Raises Malformed if it is there with another value: one of them would be lost."""
    if name in out and out[name] != value:
        raise Malformed
    out[name] = value


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON members; raises as `add_member`."""
    out: dict[str, Any] = {}
    for name, value in pairs:
        add_member(out, name, value)
    return out


def literal(word: str) -> Any:
    """The number (also `.5`, `1.`, `+3`, `1_000`), truth value or null (as in JSON or Python); else the word.

    Text that would lose information as a number stays text: 007, and numbers beyond float64.
    """
    if word in _WORDS:
        return _WORDS[word]
    if not _IS_NUMBER.match(word):
        return word
    digits = word.lstrip("+-").replace("_", "")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return word
    plain = word.replace("_", "")
    number = int(plain) if _IS_INTEGER.match(plain) else float(plain)
    return number if isinstance(number, int) or math.isfinite(number) else word
