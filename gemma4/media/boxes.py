# SPDX-License-Identifier: Apache-2.0
"""Boxes and points parsed from a model's answer, and drawn on the picture.

Gemma answers `[{"box_2d": [top, left, bottom, right], "label": "…"}]`, points `{"point": [y, x], …}`, in thousandths of
the picture's height and width. Around the JSON there may be prose and fences, several lists, and its end may be
missing. So the parser looks for objects, not lists, and reads each separately.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma4.media.source import require

if TYPE_CHECKING:
    from PIL import Image

SCALE = 1000
# A string ends on its line and within 300 characters, so that the apostrophe in a "Here's" does not swallow the rest.
_STRING = r'"(?:[^"\\\n]|\\.){0,300}"|' + r"'(?:[^'\\\n]|\\.){0,300}'"
_NUMBER = r"-?\d{1,30}(?:\.\d{0,30})?(?:[eE][+-]?\d{1,4})?"
_TOKEN = re.compile(rf"(?P<string>{_STRING})|(?P<number>{_NUMBER})|(?P<mark>[\]\[{{}}:])")
_BOX_KEYS, _POINT_KEYS = ("box_2d", "boxes_2d", "bbox_2d", "box"), ("point", "points", "point_2d")
_LABEL_KEYS = ("label", "name")
_MAX_FOUND = 10_000

# distinguishable also with red-green colour blindness (Okabe and Ito 2008)
_COLOURS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))


@dataclass(frozen=True, slots=True)
class Found:
    """box: top, left, bottom, right · point: y, x; both in 0..1 of the picture's height and width. One is None."""

    label: str
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None

    def pixels(self, height: int, width: int) -> tuple[float, ...]:
        """The same numbers in pixels of a picture of that size."""
        values = self.box or self.point or ()
        return tuple(value * size for value, size in zip(values, (height, width) * 2, strict=False))


def parse_boxes(text: str) -> list[Found]:
    """Every box and point of an answer, in its order, each once; [] if there is none. Time is linear in the text.

    Values are cut to 0..1000 and the corners put in order; a list with fewer than four numbers (two for a point), as
    an answer that was cut off leaves, is passed over.
    """
    found: dict[Found, None] = {}
    for key, value, label in _objects(text):
        size = 4 if key in _BOX_KEYS else 2
        numbers = [min(max(number, 0.0), SCALE) / SCALE for number in value]
        for at in range(0, len(numbers) - size + 1, size):  # also [[…], […]]: several under one label
            found[_found(label, numbers[at : at + size])] = None
            if len(found) == _MAX_FOUND:
                return list(found)
    return list(found)


def _found(label: str, n: list[float]) -> Found:
    if len(n) == 2:
        return Found(label, point=(n[0], n[1]))
    return Found(label, box=(min(n[0], n[2]), min(n[1], n[3]), max(n[0], n[2]), max(n[1], n[3])))


def _objects(text: str) -> Iterator[tuple[str, list[float], str]]:
    """(key, numbers, label) of every place in each object. An object ends at its brace, or where another
    begins."""
    at = text.find("{")
    while at >= 0:
        reader = _Object()
        after = len(text)
        for token in _TOKEN.finditer(text, at + 1):
            if token["mark"] in ("{", "}"):
                after = token.start()
                break
            reader.take(token)
        yield from ((key, numbers, reader.label) for key, numbers in reader.places)
        at = text.find("{", after)


class _Object:
    """State of one object while its tokens are read."""

    def __init__(self) -> None:
        self.label = ""
        self.places: list[tuple[str, list[float]]] = []
        self._key = self._last = ""  # the key whose value is read; the last string, which may be a key
        self._depth = 0

    def take(self, token: re.Match[str]) -> None:
        if token["string"] is not None:
            self._last = _unquoted(token["string"])
            if self._key in _LABEL_KEYS:
                self.label, self._key = self._last, ""
        elif token["number"] is not None:
            if self.places and self._key == self.places[-1][0]:
                self.places[-1][1].append(float(token["number"]))
        elif token["mark"] == ":":
            self._key, self._last = self._last, ""
            if self._key in (*_BOX_KEYS, *_POINT_KEYS):
                self.places.append((self._key, []))
        else:
            self._depth = max(0, self._depth + (1 if token["mark"] == "[" else -1))
            self._key = self._key if self._depth else ""


def _unquoted(string: str) -> str:
    if string[0] == "'":
        return re.sub(r"\\(.)", r"\1", string[1:-1], flags=re.S)
    try:
        return json.loads(string, strict=False)
    except ValueError:  # an escape that JSON does not have
        return string[1:-1]


def draw_boxes(pixels: NDArray[np.uint8], found: Sequence[Found]) -> Image.Image:
    """A PIL image: the picture uint8 [height, width, 3] with every box and point, one colour per label."""
    image = require("PIL.Image").fromarray(pixels)
    pen = require("PIL.ImageDraw").Draw(image)
    line = max(2, round(max(image.size) / 300))
    font = require("PIL.ImageFont").load_default(max(10, 5 * line))
    labels = list(dict.fromkeys(one.label for one in found))
    for one in found:
        colour = _COLOURS[labels.index(one.label) % len(_COLOURS)]
        values = one.pixels(image.height, image.width)
        if one.box:
            top, left, bottom, right = values
            pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        else:
            top, left = values
            pen.ellipse(
                (left - 2 * line, top - 2 * line, left + 2 * line, top + 2 * line), fill=colour, outline="white"
            )
        if one.label:
            _write_label(pen, font, one.label, (left, top), colour, image.width)
    return image


def _write_label(
    pen: Any, font: Any, label: str, at: tuple[float, float], colour: tuple[int, int, int], image_width: int
) -> None:
    left, top = at
    text = label if len(label) <= 60 else label[:59] + "…"
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    width, height = x1 - x0 + 6, y1 - y0 + 6
    left = max(0, min(left, image_width - width))
    top = top - height if top >= height else top
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    pen.text((left + 3 - x0, top + 3 - y0), text, fill="white", font=font)
