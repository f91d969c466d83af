# SPDX-License-Identifier: Apache-2.0
"""Plain-text skills: copying, indirect objects, facts, sequences, greater-than, brackets, translation."""

from __future__ import annotations

import random

from .example import Example
from .lexicon import (
    ANIMALS,
    COLOURS_OF,
    COUNTRIES,
    DAYS,
    LANGUAGES,
    LETTERS,
    MONTHS,
    NAMES,
    OBJECTS,
    OPPOSITE_PAIRS,
    PLACES,
    WORDS,
)

# --- in-context copying -------------------------------------------------------------------------------------------


def induction(rng: random.Random, pieces: range, longest: int = 60) -> Example:
    """Random tokens, then the same again: `<bos> r1 … rp r1 … rp`. The prompt ends one token into the second copy."""
    period = rng.randint(5, longest)
    block = rng.sample(pieces, period)
    ids = tuple(block * 2)
    return Example("induction", "", "", key=str(block), ids=ids, prompt_len=period + 1)


def word_copy(rng: random.Random) -> Example:
    """The same with words, as a person would type it."""
    words = rng.sample([w[0] for w in WORDS] + NAMES + OBJECTS, rng.randint(3, 12))
    line = " ".join(words)
    return Example("word_copy", f"Repeat: {line}. Again:", f" {line}.", key=line)


# --- indirect object identification (Wang et al. 2022, arXiv 2211.00593, is the task's origin) ---------------------

_IOI = (
    "When {a} and {b} went to the {place}, {s} gave {thing} to",
    "Then, {a} and {b} went to the {place}. {s} gave {thing} to",
    "{a} and {b} were at the {place}, and {s} decided to give {thing} to",
    "After {a} and {b} left the {place}, {s} handed {thing} to",
    "While {a} and {b} were in the {place}, {s} showed {thing} to",
    "{a} met {b} at the {place}. {s} had {thing} and gave it to",
)


def ioi(rng: random.Random) -> Example:
    """Indirect object identification, both name orders. Held out by the ordered pair of names."""
    a, b = rng.sample(NAMES, 2)
    subject = rng.choice((a, b))
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    thing = ("an " if thing == "apple" else "a ") + thing
    text = rng.choice(_IOI).format(a=a, b=b, s=subject, place=place, thing=thing)
    return Example("ioi", text, f" {b if subject == a else a}.", key=f"{a}|{b}")


# --- facts --------------------------------------------------------------------------------------------------------

# No wording starts with what is asked about: without the space before it, a word is another token.
_CAPITAL = (
    ("The capital of {0} is", " {1}."),
    ("The city {1} is the capital of", " {0}."),
    ("In {0}, the capital is", " {1}."),
    ("The city of {1} is in", " {0}."),
    ("Q: What is the capital of {0}?\nA:", " {1}"),
)
_LANGUAGE = (
    ("In {0}, people speak", " {2}."),
    ("The language of {0} is", " {2}."),
    ("Q: What do people speak in {0}?\nA:", " {2}"),
)
_CONTINENT = (
    ("The country {0} is in", " {3}."),
    ("On a map, find {0} in", " {3}."),
    ("Q: Where is {0}?\nA:", " {3}"),
)
_SOUND = (("Every {0}", " {1}."), ("The {0} always", " {1}."), ("What the {0} does: it", " {1}."))
_BABY = (("A baby {0} is called a", " {2}."), ("A young {0} is a", " {2}."), ("The baby of a {0} is a", " {2}."))
_OPPOSITE = (
    ("The opposite of {0} is", " {1}."),
    ("The opposite of {1} is", " {0}."),
    ("Not {0} but", " {1}."),
    ("Not {1} but", " {0}."),
    ("Q: What is the opposite of {0}?\nA:", " {1}"),
    ("Q: What is the opposite of {1}?\nA:", " {0}"),
)
_COLOUR = (
    ("The colour of {0} is", " {1}."),
    ("Q: What colour is {0}?\nA:", " {1}"),
    ("We all know that {0} is", " {1}."),
)

Row = tuple[str, ...]
_RELATIONS: tuple[tuple[tuple[Row, ...], tuple[tuple[str, str], ...], int], ...] = (
    (COUNTRIES, _CAPITAL, 4),
    (COUNTRIES, _LANGUAGE, 3),
    (COUNTRIES, _CONTINENT, 2),
    (ANIMALS, _SOUND, 1),
    (ANIMALS, _BABY, 1),
    (OPPOSITE_PAIRS, _OPPOSITE, 2),
    (COLOURS_OF, _COLOUR, 1),
)


def fact(rng: random.Random) -> Example:
    """One fact in one wording. Held out by (fact, wording): each fact is trained, but not in every wording."""
    rows, wordings, _ = rng.choices(_RELATIONS, [weight for _, _, weight in _RELATIONS])[0]
    row, (prompt, answer) = rng.choice(rows), rng.choice(wordings)
    return Example("facts", prompt.format(*row), answer.format(*row), key=f"{prompt}|{answer}|{row}")


# --- numbers and orders -------------------------------------------------------------------------------------------


def sequence(rng: random.Random) -> Example:
    """Go on with numbers at an even step, days, months or letters: three more."""
    kind = rng.choice(("up", "up", "up", "down", "days", "months", "letters"))
    shown, asked = rng.randint(3, 6), 3
    step = rng.choice((1, 2, 3, 4, 5, 10))
    if kind in ("up", "down"):
        start = rng.randint(0, 99 - step * (shown + asked - 1)) if step < 10 else rng.randint(0, 19)
        items = [str(start + step * i) for i in range(shown + asked)]
        items = items[::-1] if kind == "down" else items
    else:
        ring = {"days": DAYS, "months": MONTHS, "letters": LETTERS}[kind]
        start = rng.randrange(len(ring))
        items = [ring[(start + i) % len(ring)] for i in range(shown + asked)]
    key = f"{kind}|{items[0]}|{step if kind in ('up', 'down') else ''}|{shown}"
    return Example("sequences", ", ".join(items[:shown]) + ",", " " + ", ".join(items[shown:]) + ",", key=key)


_SPANS = ["war", "reign", "voyage", "project", "drought", "strike", "festival", "journey", "school", "empire"]


def greater_than(rng: random.Random) -> Example:
    """`The war lasted from the year 1732 to the year 17` → a later year (Hanna et al. 2023, arXiv 2305.00586)."""
    noun, century, start = rng.choice(_SPANS), rng.randint(11, 19), rng.randint(2, 96)
    end = rng.randint(start + 1, 99)
    prompt = f"The {noun} lasted from the year {century}{start:02d} to the year {century}"
    return Example("greater_than", prompt, f"{end:02d}.", key=f"{noun}|{century}{start:02d}", open_ended=True)


# --- brackets -----------------------------------------------------------------------------------------------------

_PAIRS = {"(": ")", "[": "]", "{": "}"}


def brackets(rng: random.Random) -> Example:
    """An unfinished bracket string and what closes it: `([{}( => )])`."""
    stack: list[str] = []
    text = ""
    for _ in range(rng.randint(3, 20)):
        if stack and (len(stack) >= 6 or rng.random() < 0.42):
            text += _PAIRS[stack.pop()]
        else:
            stack.append(rng.choice("([{"))
            text += stack[-1]
    if not stack:
        stack.append(rng.choice("([{"))
        text += stack[-1]
    return Example("brackets", f"{text} =>", " " + "".join(_PAIRS[s] for s in reversed(stack)), key=text)


# --- translation --------------------------------------------------------------------------------------------------

_TRANSLATE = (
    ("{src}: {x}\n{dst}:", " {y}"),
    ("The {dst} word for {x} is", " {y}."),
    ("The word {x} in {dst} is", " {y}."),
    ("{src} to {dst}: {x} ->", " {y}"),
    ("How do you say the word {x} in {dst}?", " {y}."),
)


def translation(rng: random.Random) -> Example:
    """One word, six directions. Held out by (word, direction, wording)."""
    src, dst = rng.sample(range(3), 2)
    word = rng.choice(WORDS)
    prompt, answer = rng.choice(_TRANSLATE)
    values = {"src": LANGUAGES[src], "dst": LANGUAGES[dst], "x": word[src], "y": word[dst]}
    key = f"{word[0]}|{src}{dst}|{prompt}"
    return Example("translation", prompt.format(**values), answer.format(**values), key=key)


def word_pairs(rng: random.Random) -> Example:
    """`dog -> Hund, cat -> Katze, sun ->`: which relation is meant shows only in the examples before."""
    relations: list[list[Row]] = [[(w[a], w[b]) for w in WORDS] for a in range(3) for b in range(3) if a != b]
    relations.append([*OPPOSITE_PAIRS, *((b, a) for a, b in OPPOSITE_PAIRS)])
    relations.append([(row[0], row[1]) for row in COUNTRIES])
    pairs = rng.sample(rng.choice(relations), rng.randint(3, 7))
    shown = [f"{a} -> {b}" for a, b in pairs]
    prompt = ", ".join([*shown[:-1], f"{pairs[-1][0]} ->"])
    return Example("word_pairs", prompt, f" {pairs[-1][1]}", key=prompt)
