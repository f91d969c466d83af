# SPDX-License-Identifier: Apache-2.0
"""The form of our docstrings, as Markdown: an extension of Griffe (mkdocs.yml).

A docstring describes fields and parameters in paragraphs of lines `name: text` or `name  text`; lines that go on are
indented. Markdown would run them together, so each becomes an item of a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

NAME = r"\*{0,2}[a-z_]\w*(?:\(\))?"
FIELD = re.compile(rf"( *)((?:{NAME})(?:, {NAME})*)(?:: +|  +)(\S.*)")


def as_markdown(docstring: str) -> str:
    return "\n\n".join(_paragraph(text) for text in re.split(r"\n[ ]*\n", docstring))


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if not lines or not FIELD.fullmatch(lines[0]):
        return text
    return "\n".join(_items(lines))


def _items(lines: list[str]) -> Iterator[str]:
    """Fields as items; a line that is neither a field nor indented under one ends the list."""
    indent, inside = len(lines[0]) - len(lines[0].lstrip()), False
    for line in lines:
        field = FIELD.fullmatch(line)
        if field and len(field[1]) == indent:
            names = ", ".join(f"`{name}`" for name in field[2].split(", "))
            yield f"- {names} – {field[3]}"
            inside = True
        elif len(line) - len(line.lstrip()) > indent:
            yield f"  {line.strip()}"
        else:
            yield ("\n" if inside else "") + line.strip()
            inside = False


class Fields(griffe.Extension):
    """Rewrites every docstring of the package."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
