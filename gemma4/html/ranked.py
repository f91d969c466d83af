# SPDX-License-Identifier: Apache-2.0
"""Signed numbers as horizontal bars: the logit attribution of components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from gemma4.html.markup import Markup, number, tag
from gemma4.html.picture import Picture, note


def bars(labels: Sequence[str], values: ArrayLike, *, title: str = "", small_print: str | None = None) -> Picture:
    """A bar for each number, to the left of zero for negative ones, with a button that sorts them by size.

        html.bars(stack.labels, cache.logit_attrs(stack, " Mary")[:, -1])

    labels  a name each
    values  float [n]

    Raises ValueError if there are not as many of both.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(labels),):
        raise ValueError(f"values are {list(array.shape)}, but there are {len(labels)} labels")
    finite = array[np.isfinite(array)]
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    span = (high - low) or 1.0

    def row(at: int, label: str, value: float) -> Markup:
        drawn = min(max(value, low), high) if not np.isnan(value) else 0.0
        left, width = (min(drawn, 0.0) - low) / span, abs(drawn) / span
        look = f"--x:{left:.2%};--w:{width:.2%}"
        bar = tag("i", class_="g4-c g4-neg" if drawn < 0 else "g4-c", style=look)
        zero = tag("b", style=f"--x:{-low / span:.2%}")
        return tag(
            "tr",
            tag("th", label, scope="row", title=label),
            tag("td", bar, zero, class_="g4-track", aria_hidden="true"),
            tag("td", number(value), class_="g4-num", title=f"{label}\n{value:.6g}", tabindex=-1),
            data_i=at,
            data_v="0" if np.isnan(value) else f"{value:.6g}",
        )

    body = [row(at, label, value) for at, (label, value) in enumerate(zip(labels, array.tolist(), strict=True))]
    table = tag("table", tag("tbody", body), class_="g4-bars")
    frame = tag("div", table, class_="g4-scroll g4-cells", tabindex=0, role="group", aria_label=title or "bars")
    button = tag("button", "sort by size", type="button", class_="g4-sort", aria_pressed="false")
    return Picture(title, tag("div", note(small_print), button, frame, class_="g4-ranked"))
