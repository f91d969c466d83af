# SPDX-License-Identifier: Apache-2.0
"""Cards of a dictionary's features: how often and how strongly, where most, what they write, and with which others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma4.html.cells import plain
from gemma4.html.markup import Markup, limit_of, number, tag, visible
from gemma4.html.picture import Picture, note
from gemma4.html.shaded import spans

F64 = NDArray[np.float64]
_WIDTH, _HEIGHT, _BAR = 300, 72, 56


@dataclass(frozen=True)
class Example:
    """A stretch of text in which the feature fires. texts: of n tokens; values: float [n], the feature at each."""

    texts: Sequence[str]
    values: F64


@dataclass(frozen=True)
class Card:
    """The parts of a card of one feature; empty ones are left out.

    feature     its number in the dictionary
    title       what the card is called
    facts       (name, number as text), for example density and largest value
    histogram   counts [n], and edges [n + 1] of the values, under the heading histogram_title
    up, down    (token, logit) that its direction raises and lowers most
    near        (other feature, how strongly they go together), under the heading near_title
    examples    with the strongest first
    """

    feature: int
    title: str
    facts: Sequence[tuple[str, str]] = ()
    histogram: tuple[NDArray[np.int64], F64] | None = None
    up: Sequence[tuple[str, float]] = ()
    down: Sequence[tuple[str, float]] = ()
    near: Sequence[tuple[int, float]] = ()
    near_title: str = "fires together with"
    examples: Sequence[Example] = field(default_factory=tuple)
    histogram_title: str = "values"


def cards(shown: Sequence[Card], *, title: str = "", small_print: str | None = None) -> Picture:
    """Cards one after the other, with a field that searches their texts."""
    search = tag(
        "p",
        tag("label", "search: ", tag("input", type="search", class_="g4-search", placeholder="token or number")),
        " ",
        tag("output", f"{len(shown)} of {len(shown)}", aria_live="polite"),
    )
    here = {one.feature for one in shown}
    return Picture(title, note(small_print), search if len(shown) > 1 else None, [card(one, here) for one in shown])


def card(shown: Card, here: set[int] | frozenset[int] = frozenset()) -> Markup:
    """One card. here: features that the picture has cards of, which become links inside it.

    It has no id: a notebook may show cards of the same features again, or of another dictionary.
    """
    lists = (
        _histogram(shown.histogram_title, *shown.histogram) if shown.histogram is not None else None,
        _logits("raises", shown.up),
        _logits("lowers", shown.down),
        _near(shown, here),
    )
    facts = ", ".join(f"{name} {text}" for name, text in shown.facts)
    limit = limit_of(np.concatenate([np.zeros(0), *(one.values for one in shown.examples)]))
    examples = [_example(one, limit) for one in shown.examples]
    return tag(
        "article",
        tag("h3", shown.title),
        note(facts),
        tag("div", lists, class_="g4-columns"),
        tag("h4", "where it is strongest") if examples else None,
        examples,
        class_="g4-card",
        data_feature=shown.feature,
        tabindex=-1,
    )


def _example(one: Example, limit: float) -> Markup:
    strongest = tag("span", number(one.values.max(initial=0)), class_="g4-num")
    return tag("div", strongest, spans(one.texts, one.values, limit, "value"), class_="g4-example")


def _logits(name: str, pairs: Sequence[tuple[str, float]]) -> Markup | None:
    if not pairs:
        return None
    table = plain(("token", "logit"), [(visible(token), number(value)) for token, value in pairs], numeric=(1,))
    return tag("div", tag("h4", name), table)


def _near(shown: Card, here: set[int] | frozenset[int]) -> Markup | None:
    if not shown.near:
        return None

    def link(other: int) -> Markup | str:
        button = tag("button", str(other), type="button", class_="g4-link", data_to=other)
        return button if other in here else str(other)

    rows = [tag("tr", tag("td", link(other)), tag("td", number(how), class_="g4-num")) for other, how in shown.near]
    table = tag("table", tag("tbody", rows), class_="g4-plain")
    return tag("div", tag("h4", shown.near_title), tag("div", table, class_="g4-scroll"))


def _histogram(title: str, counts: NDArray[np.int64], edges: F64) -> Markup:
    """Bars of the logarithm of the counts, since most values are small."""
    heights = np.log1p(counts) / max(1e-9, np.log1p(counts).max(initial=0))
    width = _WIDTH / max(1, len(counts))
    rects = [
        tag(
            "rect",
            tag("title", f"{number(edges[i])} to {number(edges[i + 1])}: {int(counts[i])} times"),
            x=f"{i * width:.2f}",
            y=f"{_BAR * (1 - height):.2f}",
            width=f"{max(width - 1, 0.5):.2f}",
            height=f"{_BAR * height:.2f}",
        )
        for i, height in enumerate(heights.tolist())
    ]
    ends = (
        tag("text", number(edges[0]), x=0, y=_HEIGHT - 4),
        tag("text", number(edges[-1]), x=_WIDTH, y=_HEIGHT - 4, text_anchor="end"),
    )
    picture = tag(
        "svg",
        rects,
        ends,
        class_="g4-histogram",
        width=_WIDTH,
        height=_HEIGHT,
        viewbox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"histogram of {int(counts.sum())} values",
    )
    return tag("div", tag("h4", f"{title} (counts on a log scale)"), picture)
