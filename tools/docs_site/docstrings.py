# SPDX-License-Identifier: Apache-2.0
"""The form of our docstrings, as Markdown: an extension of Griffe (mkdocs.yml).

A docstring describes fields and parameters in paragraphs of lines `name: text` or `name  text`. Lines that go on are
indented, or stand below in prose that goes on with `other: text` and "Raises …". Markdown would run them together, so
each becomes an item of a list. Indented code becomes Python, and paths of documents become links.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

NAME = r"\*{0,2}[a-z_]\w*(?:\(\))?"
NAMES = rf"{NAME}(?:, {NAME})*"
FIELD = re.compile(rf"( *)({NAMES})(?:: +|  +)(\S.*)")
INLINE = re.compile(rf"(?<=[.;])\s+(?={NAMES}: \S)")  # another field in the middle of a line
ERRORS = re.compile(r"(?:(?<=[.;])\s+|\n\s*)(?=Raises [A-Z`]|Raises what )")
DOCUMENT = re.compile(r"(?<![\w/\[])(?<!\]\()docs/(\w[\w-]*)\.md\b")
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.M | re.S)
TITLES = {
    "guide": "the guide",
    "install": "the first look",
    "media": "images, sound, video",
    "sites": "the table of sites",
}


def as_markdown(docstring: str) -> str:
    paragraphs = re.split(r"\n[ ]*\n", docstring)
    parts = CODE.split("\n\n".join(_with_code(paragraphs)))
    parts[::2] = [DOCUMENT.sub(_link, _plain(part)) for part in parts[::2]]
    return "".join(parts)


def _plain(text: str) -> str:
    """<bos> is no tag, and T*heads*d_model no emphasis."""
    return text.replace("<", "&lt;").replace("*", r"\*")


def _link(match: re.Match[str]) -> str:
    """Every entry stands on a page of reference/."""
    return f"[{TITLES.get(match[1], match[1])}](../{match[1]}.md)"


def _with_code(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs as Markdown; those of code, which blank lines may interrupt, in one fence."""
    code: list[str] = []
    for text in [*paragraphs, ""]:
        if _is_code(text):
            code.append("\n".join(line[4:] for line in text.splitlines()))
            continue
        if code:
            yield "```python\n" + "\n\n".join(code) + "\n```"
            code = []
        if text:
            yield _paragraph(text)


def _is_code(text: str) -> bool:
    lines = text.splitlines()
    return bool(lines) and all(line.startswith("    ") for line in lines) and not FIELD.fullmatch(lines[0])


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if not lines or not FIELD.fullmatch(lines[0]):
        return text
    fields, rest = _fields(lines)
    items = [f"- {names} – {about}" for names, about in fields]
    return "\n".join(items) + (f"\n\n{rest}" if rest else "")


def _fields(lines: list[str]) -> tuple[list[tuple[str, str]], str]:
    """(names, text) of each field, and what is said of errors."""
    indent = len(lines[0]) - len(lines[0].lstrip())
    fields: list[tuple[str, list[str]]] = []
    for line in lines:
        field = FIELD.fullmatch(line)
        if field and len(field[1]) == indent:
            fields.append((field[2], [field[3]]))
        else:
            fields[-1][1].append(line.strip())
    found, errors = [], ""
    for names, texts in fields:
        text, *raised = ERRORS.split("\n  ".join(texts), maxsplit=1)
        errors = " ".join([errors, *raised]).strip()
        first, *others = (part.rstrip(" \n;") for part in INLINE.split(text))
        found.append((_code(names), first))
        found += [(_code(name), about) for name, about in (other.split(": ", 1) for other in others)]
    return found, re.sub(r"\n +", "\n", errors)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


class Fields(griffe.Extension):
    """Rewrites every docstring of the package."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
