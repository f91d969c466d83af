# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  word lists read better as one string
"""Short English stories from a small grammar of our own.

A story is an opening, a plot (a list of beats) and an ending. `[a|b]` picks one alternative (they nest), `{slot}` is
filled from the cast: H hero, F friend, K the hero's kind, FF the friend with a description; he/him/his and fhe/fhim/
fhis are their pronouns (capitalised: He, His, Fhe).
"""

from __future__ import annotations

import random
import re

from .example import Example
from .lexicon import BOYS, GIRLS, PETS_HE, PETS_SHE
from .plots import ENDINGS, OPENINGS, PLOTS, TRAITS

KINDS = "fox bear rabbit mouse cat dog duck frog owl hedgehog turtle squirrel dragon robot pig lamb".split()
COLOURS = "red blue green yellow white purple orange pink".split()
TOYS = "ball kite hat boat drum scarf book lamp box bell".split()
FOODS = "cake soup bread pie honey cookies berries apples pancakes jam".split()
PLACES = (
    "the park;the forest;the river;the beach;the hill;the garden;the old barn;the lake;the meadow;the big oak tree"
).split(";")
HOMES = (
    "a small house by the sea;a little house near the forest;a quiet village;a big green forest;a cosy house on a hill;"
    "a little town by the river;an old farm;a tall house with a red door;a warm little hole under a tree;a tiny cottage"
).split(";")

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(template: str, slots: dict[str, str], rng: random.Random) -> str:
    """Resolve every `[a|b]` (innermost first), then every `{slot}`."""
    while match := _CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return template.format_map(slots)


def _pronouns(prefix: str, female: bool) -> dict[str, str]:
    words = {"he": "she", "him": "her", "his": "her"} if female else {"he": "he", "him": "him", "his": "his"}
    slots = {prefix + key: value for key, value in words.items()}
    slots.update({(prefix + key).capitalize(): value.capitalize() for key, value in words.items()})
    return slots


def cast(rng: random.Random, kind: str | None = None, name: str | None = None) -> dict[str, str]:
    """Who and what a story is about. `kind` and `name` fix the hero, if given."""
    kind = kind or rng.choice([*KINDS, "girl", "boy", "girl", "boy", "girl", "boy"])
    female, friend_female = rng.random() < 0.5, rng.random() < 0.5
    if kind in ("girl", "boy"):
        female = kind == "girl"
        names = GIRLS if female else BOYS
    else:
        names = PETS_SHE if female else PETS_HE
    if name is None:
        name = rng.choice(names)
    elif name in GIRLS + PETS_SHE or name in BOYS + PETS_HE:
        female = name in GIRLS + PETS_SHE
    friend_kind = rng.choice([k for k in KINDS if k != kind])
    friend = rng.choice([n for n in (PETS_SHE if friend_female else PETS_HE) if n != name])
    toy, colour = rng.choice(TOYS), rng.choice(COLOURS)
    return {
        "H": name,
        "K": kind,
        "F": friend,
        "FF": f"{friend} the {friend_kind}",
        "toy": toy,
        "colour": colour,
        "food": rng.choice(FOODS),
        "place": rng.choice(PLACES),
        "home": rng.choice(HOMES),
        **_pronouns("", female),
        **_pronouns("f", friend_female),
    }


def tell(rng: random.Random, slots: dict[str, str]) -> tuple[str, str]:
    """(opening, rest) of a story about this cast."""
    plot = rng.choice(sorted(PLOTS))
    trait, likes = rng.choice(sorted(TRAITS.items()))
    slots = {**slots, "trait": trait, "likes": likes, "a_trait": ("an " if trait[0] in "aeiou" else "a ") + trait}
    opening = expand(rng.choice(OPENINGS), slots, rng)
    parts = [expand(beat, slots, rng) for beat in PLOTS[plot]]
    parts.append(expand(rng.choice(ENDINGS), slots, rng))
    pause = "\n" if rng.random() < 0.2 else " "
    text = pause + " ".join(part for part in parts if part)
    return opening, text + (" The end." if rng.random() < 0.3 else "")


def story(rng: random.Random) -> Example:
    """A story. Held out by the pair of names, so a test's cast was never seen together."""
    slots = cast(rng)
    opening, rest = tell(rng, slots)
    return Example("story", opening, rest, key=f"{slots['H']}|{slots['FF']}|{slots['K']}", open_ended=True)
