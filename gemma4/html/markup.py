# SPDX-License-Identifier: Apache-2.0
"""HTML from Python: every text is escaped, except what is `Markup` already.

Tokens, prompts and names are untrusted. `visible` shows what a reader could not see or what would rearrange the page:
control and format characters, lone surrogates, spaces at the ends. Its results hold no such character, so a page is
always valid UTF-8.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

# Unicode's categories of control, format, surrogate and private characters, and of separators of lines
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"  # inside words of Persian and Hindi, and inside emoji
_NAMED = {"\n": "\u21b5", "\t": "\u21e5", " ": "\u00b7"}
_LEADING_ZERO = re.compile(r"(e[+-])0+")
_ATTRIBUTE = re.compile(r"[a-z][a-z0-9-]*")
_DOTTED_CIRCLE = "\u25cc"  # carries a combining mark that has no letter before it
_VOID = ("img", "input", "meta")


class Markup(str):
    """HTML that is safe to insert as it is."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"
Attribute: TypeAlias = str | int | float | bool | None


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """One element. class_ is class, data_v is data-v; True is an attribute without a value, None and False none."""
    inner = "".join(_parts(children))
    end = "" if name in _VOID else f"{inner}</{name}>"
    return Markup(f"<{name}{_attributes(attributes)}>{end}")


def join(*children: Child) -> Markup:
    """Siblings."""
    return Markup("".join(_parts(children)))


def _parts(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str | int):
            yield escaped(str(child))
        elif child is not None:
            yield from _parts(child)


def _attributes(attributes: dict[str, Attribute]) -> str:
    parts: list[str] = []
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if not _ATTRIBUTE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an attribute")
        if value is True:
            parts.append(f" {name}")
        elif value is not None and value is not False:
            parts.append(f' {name}="{escaped(str(value))}"')
    return "".join(parts)


def escaped(text: str) -> str:
    """Text for HTML, in an element or in quotes; characters that hide are written as escapes, newlines stay."""
    return escape(_shown(text, "\n"), quote=True)


def visible(token: str) -> str:
    """A token as it can be read: "\\u00b7" for a space, "\\u21b5" for a newline, escapes for what has no shape."""
    text = _shown("".join(_NAMED.get(letter, letter) for letter in token))
    if not text:
        return "\u2205"
    return _DOTTED_CIRCLE + text if unicodedata.category(text[0]).startswith("M") else text


def _shown(text: str, kept: str = "") -> str:
    if text.isascii() and text.isprintable():
        return text
    last = len(text) - 1
    joined = (letter in _JOINERS and 0 < at < last and not text[at - 1].isascii() for at, letter in enumerate(text))
    return "".join(
        letter if inside or letter in kept or unicodedata.category(letter) not in _HIDDEN else ascii(letter)[1:-1]
        for letter, inside in zip(text, joined, strict=True)
    )


def number(value: float) -> str:
    """A number in a few characters: three digits, more before the point where there are."""
    value = float(value)
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else str(value)
    if not 1e-3 <= abs(value) < 1e6:
        return _LEADING_ZERO.sub(r"\1", f"{value:.2e}")  # 1.00e-4, as JavaScript writes it
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{digits}f}"


def numbers_json(values: NDArray[np.floating]) -> str:
    """A JSON list of six digits each; NaN is null, and an infinity a number that JSON readers take for one."""
    return "[" + ",".join("null" if np.isnan(v) else f"{v:.6g}".replace("inf", "1e999") for v in values.tolist()) + "]"


def limit_of(values: NDArray[np.floating]) -> float:
    """The number that gets the full colour: the largest finite magnitude, 1 if there is none above 0."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0)) or 1.0


def colour(value: float, limit: float) -> dict[str, Attribute]:
    """Attributes that give an element the colour of a value: its strength as --v, its sign as a class."""
    value = float(value)
    if np.isnan(value):
        return {"class_": "g4-c g4-nan"}
    share = min(1.0, abs(value) / limit)
    return {"class_": "g4-c g4-neg" if value < 0 else "g4-c", "style": f"--v:{share:.3g}"}
