# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  word lists read better as one string
"""Drawn pictures: coloured shapes, words and numbers on a plain ground, with what a question may ask about them.

Everything is drawn with Pillow; the fonts are those that matplotlib brings along.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .example import is_held_out

KINDS = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 150, 50),
    "blue": (40, 70, 215),
    "yellow": (245, 215, 40),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "pink": (250, 135, 190),
}
INKS = ("red", "green", "blue", "black", "white")
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
# Each is one token of the tokenizer after a space.
WRITTEN = tuple(
    "dog cat house water bread milk apple tree sun moon star book king queen fish bird horse cow mouse red green blue"
    " white black big small day night fire snow rain hand head eye door key city sea love time".split()
)
ASPECTS = ((1, 1), (1, 1), (4, 3), (3, 4), (3, 2), (2, 3))
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MOST = 5  # shapes in a picture
Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in pixels of the drawn picture


@dataclass(frozen=True)
class Thing:
    """A shape, or something written (a "word", a "number", "letters"): `spans` are the x-ranges of its characters."""

    kind: str
    colour: str
    box: Box
    text: str = ""
    font: str = ""
    spans: tuple[tuple[float, float], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """What is on a picture of `width` × `height` pixels; `seed` settles the shades, `ground` is the background."""

    width: int
    height: int
    ground: tuple[int, int, int]
    things: tuple[Thing, ...]
    seed: int

    @property
    def shapes(self) -> list[Thing]:
        """The shapes from left to right."""
        return sorted((t for t in self.things if not t.text), key=lambda t: t.centre[0])

    @property
    def writing(self) -> Thing | None:
        return next((t for t in self.things if t.text), None)

    @property
    def key(self) -> str:
        """What makes this combination: the number; or the word, its font and ink; or the shapes from left to right."""
        text = self.writing
        if text is None:
            return ", ".join(thing.name for thing in self.shapes)
        return text.text if text.kind == "number" else f"{text.text}|{text.font.partition(':')[0]}|{text.colour}"

    def box_2d(self, thing: Thing) -> list[int]:
        """[ymin, xmin, ymax, xmax] in thousandths of the picture's height and width, Gemma's convention."""
        x0, y0, x1, y1 = thing.box
        scaled = (y0 / self.height, x0 / self.width, y1 / self.height, x1 / self.width)
        return [min(1000, max(0, round(1000 * value))) for value in scaled]


# --- choosing what is on it ---------------------------------------------------------------------------------------


def size(rng: random.Random) -> tuple[int, int]:
    """(width, height) in pixels: the longer side 128 to 288, one of several aspect ratios."""
    across, down = rng.choice(ASPECTS)
    longer = rng.randint(128, 288)
    scale = longer / max(across, down)
    return max(64, round(across * scale)), max(64, round(down * scale))


def ground(rng: random.Random) -> tuple[int, int, int]:
    """A dull shade that no shape has: white and black both stand out from it."""
    level = rng.randint(95, 190)
    red, green, blue = (level + rng.randint(-14, 14) for _ in range(3))
    return red, green, blue


def _apart(box: Box, others: list[Box], gap: float) -> bool:
    return all(box[2] + gap < o[0] or o[2] + gap < box[0] or box[3] + gap < o[1] or o[3] + gap < box[1] for o in others)


def place(rng: random.Random, width: int, height: int, across: float, down: float, others: list[Box]) -> Box | None:
    """A free place for a box of this size, or None. Centres keep a distance in x, so that left-to-right is plain."""
    for _ in range(40):
        x, y = rng.uniform(2, max(2, width - across - 2)), rng.uniform(2, max(2, height - down - 2))
        box = (x, y, x + across, y + down)
        apart = all(abs((o[0] + o[2]) / 2 - x - across / 2) > 0.04 * width for o in others)
        if apart and _apart(box, others, 3):
            return box
    return None


def shapes(rng: random.Random, width: int, height: int, count: int, others: list[Box]) -> list[Thing]:
    """Up to `count` different (kind, colour) shapes that do not touch."""
    found: list[Thing] = []
    names: set[tuple[str, str]] = set()
    taken = list(others)
    short = min(width, height)
    largest = 0.5 if count <= 2 else 0.36
    while len(found) < count:
        kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
        side = short * rng.uniform(0.22, largest)
        box = place(rng, width, height, side, side * rng.uniform(0.85, 1.15), taken)
        if box is None:
            break
        if (kind, colour) in names:
            continue
        names.add((kind, colour))
        taken.append(box)
        found.append(Thing(kind, colour, box))
    return found


def writing(rng: random.Random, width: int, height: int, text: str) -> Thing | None:
    """`text` somewhere on the picture, letters of 22 to 42 % of its side where that fits; None where they get small."""
    font, colour = rng.choice(FONTS), rng.choice(INKS)
    side = (width * height) ** 0.5
    fits = 0.9 * width / (load_font(font, 100).getlength(text) / 100)
    points = min(side * rng.uniform(0.22, 0.42), fits, 0.8 * height)
    if points < 0.17 * side:
        return None
    face = load_font(font, round(points))
    left, top, right, bottom = face.getbbox(text)
    box = place(rng, width, height, right - left, bottom - top, [])
    if box is None or box[2] > width or box[3] > height:
        return None
    return _written(text, face, f"{font}:{round(points)}", colour, box[0], box[1])


def _written(text: str, face: ImageFont.FreeTypeFont, font: str, colour: str, x: float, y: float) -> Thing:
    left, top, right, bottom = face.getbbox(text)
    edges = [face.getlength(text[:i]) - left for i in range(len(text) + 1)]
    spans = tuple((x + a, x + b) for a, b in pairwise(edges))
    kind = "number" if text.isdigit() else "word" if text in WRITTEN else "letters"
    return Thing(kind, colour, (x, y, x + right - left, y + bottom - top), text, font, spans)


def shape_scene(rng: random.Random, count: int | None = None) -> Scene:
    """One to five shapes."""
    width, height = size(rng)
    things = shapes(rng, width, height, count or rng.randint(1, MOST), [])
    return Scene(width, height, ground(rng), tuple(things), rng.getrandbits(30))


def text_scene(rng: random.Random, text: str | None = None) -> Scene:
    """A word of the list or a number of one to three digits, sometimes with a shape beside it."""
    while True:
        width, height = size(rng)
        chosen = text or (rng.choice(WRITTEN) if rng.random() < 0.5 else number(rng))
        thing = writing(rng, width, height, chosen)
        if thing is not None:
            break
    beside = shapes(rng, width, height, 1, [thing.box]) if rng.random() < 0.3 else []
    return Scene(width, height, ground(rng), (thing, *beside), rng.getrandbits(30))


def number_scene(rng: random.Random) -> Scene:
    """A number."""
    return text_scene(rng, number(rng))


def page_scene(rng: random.Random) -> Scene:
    """Rows of random characters: for learning the letters, never asked about."""
    width, height = size(rng)
    font, colour = rng.choice(FONTS), rng.choice(INKS)
    points = round((width * height) ** 0.5 * rng.uniform(0.15, 0.3))
    face = load_font(font, points)
    things: list[Thing] = []
    top = rng.uniform(0, 0.3) * points
    while top + points < height:
        left = rng.uniform(0, 0.5) * points
        while True:
            text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(2, 5)))
            thing = _written(text, face, f"{font}:{points}", colour, left, top)
            if thing.box[2] > width or thing.box[3] > height:
                break
            things.append(thing)
            left = thing.box[2] + 0.5 * points
        top += 1.25 * points
    return Scene(width, height, ground(rng), tuple(things), rng.getrandbits(30))


def sample(generator: Callable[[random.Random], Scene], rng: random.Random, *, held_out: bool) -> Scene:
    """A scene from the wanted side of the split (example.py)."""
    while True:
        scene = generator(rng)
        if is_held_out("picture", scene.key) == held_out:
            return scene


def number(rng: random.Random) -> str:
    digits = rng.choice((1, 2, 2, 3))
    return str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))


# --- drawing ------------------------------------------------------------------------------------------------------


@cache
def load_font(name: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), points)


def _outline(kind: str) -> list[tuple[float, float]]:
    """The polygon of a shape in the unit square."""
    if kind == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if kind == "star":
        spikes = [(math.pi * i / 5, 0.5 if i % 2 == 0 else 0.2) for i in range(10)]
        return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for a, r in spikes]
    angles = [2 * math.pi * i / 40 for i in range(40)]  # heart
    points = [
        (16 * math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)))
        for a in angles
    ]
    return [((x + 16) / 32, (y + 12) / 29) for x, y in points]


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, int, int]) -> None:
    x0, y0, x1, y1 = thing.box
    if thing.kind == "circle":
        draw.ellipse(thing.box, fill=fill)
    elif thing.kind == "ring":
        draw.ellipse(thing.box, outline=fill, width=max(2, round(0.2 * (x1 - x0))))
    elif thing.kind == "square":
        draw.rectangle(thing.box, fill=fill)
    else:
        draw.polygon([(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in _outline(thing.kind)], fill=fill)


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB."""
    rng = random.Random(scene.seed)
    image = Image.new("RGB", (scene.width, scene.height), scene.ground)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        red, green, blue = (min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[thing.colour])
        if thing.text:
            name, _, points = thing.font.partition(":")
            face = load_font(name, int(points))
            left, top, _, _ = face.getbbox(thing.text)
            pen.text((thing.box[0] - left, thing.box[1] - top), thing.text, fill=(red, green, blue), font=face)
        else:
            _draw_shape(pen, thing, (red, green, blue))
    return image
