# SPDX-License-Identifier: Apache-2.0
"""Boxes and points out of answers as models give them, and onto pictures."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from media_files import picture

from gemma4.media.boxes import Found, draw_boxes, parse_boxes

CAR = Found("car", box=(0.171, 0.075, 0.245, 0.308))
DOG = Found("a dog's tail", box=(0.5, 0.25, 0.75, 1.0))
NOSE = Found("nose", point=(0.1, 0.9))
ONE = '{"box_2d": [171, 75, 245, 308], "label": "car"}'
TWO = '{"label": "a dog\'s tail", "box_2d": [500, 250, 750, 1000]}'
SPOT = '{"point": [100, 900], "label": "nose"}'

ANSWERS = {
    "list": (f"[{ONE}, {TWO}]", [CAR, DOG]),
    "fence": (f"```json\n[{ONE},\n {TWO}]\n```", [CAR, DOG]),
    "prose around": (f"Here's what I found: [{ONE}]. That's the car's place, isn't it?", [CAR]),
    "several fences": (f"First\n```json\n[{ONE}]\n```\nthen\n```json\n[{TWO}]\n```\nand {SPOT}", [CAR, DOG, NOSE]),
    "said twice": (f"{ONE} as I said: {ONE}", [CAR]),
    "no closers": (f"```json\n[{ONE}, {TWO[:-1]}", [CAR, DOG]),
    "no bracket": ('[{"box_2d": [171, 75, 245, 308, "label": "car"}, ' + TWO, [CAR, DOG]),
    "cut in the label": ('{"box_2d": [171, 75, 245, 308], "label": "ca', [Found("", box=CAR.box)]),
    "cut in the numbers": (f'[{ONE}, {{"box_2d": [171, 75, 2', [CAR]),
    "no brace between": ('{"box_2d": [171, 75, 245, 308], "label": "car" {"point": [100, 900], "label": "nose"',
                         [CAR, NOSE]),
    "single quotes": ("[{'box_2d': [171, 75, 245, 308], 'label': 'car'}]", [CAR]),
    "no spaces": ('[{"box_2d":[171,75,245,308],"label":"car"}]', [CAR]),
    "one line each": (f"{ONE}\n{TWO}\n{SPOT}\n", [CAR, DOG, NOSE]),
    "under one label": ('{"box_2d": [[171, 75, 245, 308], [0, 0, 1000, 1000]], "label": "car"}',
                        [CAR, Found("car", box=(0, 0, 1, 1))]),
    "points": ('{"points": [[100, 900], [200, 300]], "label": "nose"}', [NOSE, Found("nose", point=(0.2, 0.3))]),
    "box and point": ('{"box_2d": [171, 75, 245, 308], "point": [100, 900], "label": "x"}',
                      [Found("x", box=CAR.box), Found("x", point=(0.1, 0.9))]),
    "other keys": ('{"id": 3, "score": [0.5, 2], "box_2d": [171, 75, 245, 308], "mask": [1], "label": "car"}', [CAR]),
    "fractions and signs": ('{"box_2d": [171.0, 7.5e1, 245, 308], "label": "car"}', [CAR]),
    "out of range": ('{"box_2d": [-5, 0, 2000, 1e4], "label": "all"}', [Found("all", box=(0, 0, 1, 1))]),
    "corners swapped": ('{"box_2d": [245, 308, 171, 75], "label": "car"}', [CAR]),
    "escapes": ('{"box_2d": [171, 75, 245, 308], "label": "\\u00e9t\\u00e9 \\"x\\" {1}"}',
                [Found('été "x" {1}', CAR.box)]),
    "nested in an answer": (f'{{"answer": {{"objects": [{ONE}]}}}}', [CAR]),
    "none": ("There is no car in this picture.", []),
    "numbers alone": ("It is at [171, 75, 245, 308].", []),
    "empty": ("", []),
    "braces": ("{}{}{{{", []),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name):
    text, expected = ANSWERS[name]
    assert parse_boxes(text) == expected


@pytest.mark.parametrize("name", ["list", "fence", "several fences", "prose around"])
def test_every_beginning_of_an_answer(name):
    """Whatever is cut off, what is there is a part of what was said, and nothing raises."""
    text, expected = ANSWERS[name]
    boxes = {one.box for one in expected} | {one.point for one in expected}
    longest = 0
    for end in range(len(text) + 1):
        found = parse_boxes(text[:end])
        # the number that is being written may still grow
        assert all((one.box or one.point) in boxes for one in found[:-1]), end
        assert len(found) >= longest
        longest = len(found)


def test_any_text_is_read_in_linear_time():
    rng = random.Random(0)
    pieces = ['"', "'", "{", "}", "[", "]", ":", ",", "\\", "12", '"box_2d"', '"label"', " ", "\n", "a"]
    for _ in range(300):
        parse_boxes("".join(rng.choices(pieces, k=rng.randrange(400))))
    for piece in ('"\\', '{"', "{'", '{"box_2d": [1, 2, 3, 4]', "'\"", "[", '{"box_2d": [' + "1, " * 50):
        start = time.perf_counter()
        parse_boxes(piece * (200_000 // len(piece)))
        assert time.perf_counter() - start < 3, piece


def test_round_trip_of_many():
    rng = np.random.default_rng(0)
    boxes = rng.integers(0, 1001, (50, 4))
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
    objects = [{"box_2d": box.tolist(), "label": f"thing {i}"} for i, box in enumerate(boxes)]
    found = parse_boxes("Sure!\n```json\n" + json.dumps(objects, indent=2) + "\n```")
    assert [one.label for one in found] == [one["label"] for one in objects]
    assert np.allclose([one.box for one in found], boxes / 1000)


def test_pixels():
    assert CAR.pixels(1000, 2000) == pytest.approx((171, 150, 245, 616))
    assert NOSE.pixels(500, 100) == pytest.approx((50, 90))


def test_drawing():
    pytest.importorskip("PIL.Image")
    pixels = np.zeros((200, 300, 3), np.uint8)
    found = [Found("car", box=(0.25, 0.1, 0.75, 0.5)), Found("nose", point=(0.5, 0.8)), Found("", box=(0, 0, 1, 1))]
    drawn = np.asarray(draw_boxes(pixels, found))
    assert drawn.shape == pixels.shape and (pixels == 0).all()
    assert (drawn[120:140, 30] == [213, 94, 0]).all() and (drawn[149, 60:120] == [213, 94, 0]).all()
    assert (drawn[100, 240] == [0, 114, 178]).all()
    assert (drawn[100, 70:130] == 0).all()  # boxes are outlines
    assert drawn[0, 10:].any(axis=-1).all() and drawn[-1].any(axis=-1).all()
    assert drawn[30:50, 30:60].any(), "the label stands above its box"


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (40, 40)])
def test_drawing_on_any_size(size):
    pytest.importorskip("PIL.Image")
    found = [Found("x" * 200, box=(0, 0, 1, 1)), Found("y", point=(1, 1)), Found("z", box=(0.5, 0.5, 0.5, 0.5))]
    assert draw_boxes(picture(*size), found).size == size[::-1]
