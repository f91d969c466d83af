# SPDX-License-Identifier: Apache-2.0
"""A few frames of one shape that moves left, right, up or down."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .scenes import COLOURS, KINDS, Scene, Thing, ground

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIDE = (96, 160)  # of the square picture, in pixels
FRAMES = 3


@dataclass(frozen=True)
class Clip:
    """`frames` one second apart; `seconds` are their times."""

    frames: tuple[Scene, ...]
    direction: str

    @property
    def seconds(self) -> list[int]:
        return list(range(len(self.frames)))

    @property
    def shape(self) -> Thing:
        return self.frames[0].things[0]

    @property
    def key(self) -> str:
        return f"{self.shape.name} {self.direction}"


def clip(rng: random.Random) -> Clip:
    """One shape that goes at least a third of the way across, at an even pace, a little off the straight line."""
    side = rng.randint(*SIDE)
    size = side * rng.uniform(0.2, 0.36)
    direction = rng.choice(list(DIRECTIONS))
    room = side - size
    travel = room * rng.uniform(0.45, 0.9)
    start = rng.uniform(0, room - travel)
    across = rng.uniform(0.1 * room, 0.9 * room)
    drift = rng.uniform(-0.08, 0.08) * room
    dx, dy = DIRECTIONS[direction]
    if dx + dy < 0:
        start = room - start
    kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
    backdrop, seed = ground(rng), rng.getrandbits(30)
    frames = []
    for i in range(FRAMES):
        share = i / (FRAMES - 1)
        along, off = start + (dx + dy) * travel * share, across + drift * share
        x, y = (along, off) if dx else (off, along)
        frames.append(Scene(side, side, backdrop, (Thing(kind, colour, (x, y, x + size, y + size)),), seed))
    return Clip(tuple(frames), direction)
