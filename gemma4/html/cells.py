# SPDX-License-Identifier: Apache-2.0
"""Tables of coloured cells: a logit lens, patching grids, norms; and plain tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from gemma4.html.markup import Markup, colour, limit_of, number, tag, visible
from gemma4.html.picture import Picture, note


def key(low: float, high: float) -> Markup:
    """The scale of the colours: from `low` (below 0: the other hue) to `high`."""
    bar = tag("i", class_="g4-two" if low < 0 else "g4-one", aria_hidden="true")
    ends = (tag("span", number(end), class_=name) for end, name in ((low, "g4-low"), (high, "g4-high")))
    return tag("div", next(ends), bar, next(ends), class_="g4-key")


def key_of(values: np.ndarray[tuple[int, ...], np.dtype[np.floating]], limit: float) -> Markup:
    return key(-limit if (values < 0).any() else 0.0, limit)


def heat(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    words: Sequence[Sequence[str]] | None = None,
    tips: Sequence[Sequence[str]] | None = None,
    title: str = "",
    corner: str = "",
    limit: float | None = None,
    small_print: str | None = None,
) -> Picture:
    """A table with a coloured cell for each number; negative ones have another hue, NaN is hatched.

    values  float [rows, columns]
    rows, columns  their names; columns are tokens, with spaces made visible
    words   what is written in each cell [the number]
    tips    what is said when a cell is pointed at or reached by arrow keys [row, column and number]
    corner  what rows and columns are
    limit   the magnitude that gets the full colour, above 0 [the largest finite one]

    Raises ValueError if names, words or tips do not fit the values, or for a limit that is not above 0.
    """
    array = np.asarray(values, dtype=np.float64)
    _check(array, rows, columns)
    for what, texts in (("words", words), ("tips", tips)):
        if texts is not None and [len(row) for row in texts] != [len(columns)] * len(rows):
            raise ValueError(f"{what} must be [{len(rows)}, {len(columns)}], as the values")
    top = limit_of(array) if limit is None else float(limit)
    if not 0 < top < np.inf:
        raise ValueError(f"limit must be a finite number above 0, got {limit!r:.80}")
    heads = [visible(column) for column in columns]

    def cell(i: int, j: int) -> Markup:
        text = number(array[i, j])
        tip = f"{rows[i]}, {heads[j]} ({j})\n{text}" if tips is None else tips[i][j]
        shown = text if words is None else visible(words[i][j])
        return tag("td", shown, title=tip, tabindex=-1, **colour(array[i, j], top))

    head = tag("tr", tag("th", corner, scope="col"), [tag("th", name, scope="col", title=name) for name in heads])
    body = [
        tag("tr", tag("th", name, scope="row"), [cell(i, j) for j in range(len(columns))])
        for i, name in enumerate(rows)
    ]
    table = tag("table", tag("thead", head), tag("tbody", body), class_="g4-heat")
    said = f"{title or 'table'}: {len(rows)} rows, {len(columns)} columns; arrow keys move"
    frame = tag("div", table, class_="g4-scroll g4-cells", tabindex=0, role="group", aria_label=said)
    return Picture(title, note(small_print), key_of(array, top), frame)


def _check(
    array: np.ndarray[tuple[int, ...], np.dtype[np.float64]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    if array.ndim != 2 or array.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values are {list(array.shape)}, but there are names of {len(rows)} rows and {len(columns)} columns"
        )


def plain(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> Markup:
    """A table of texts; the columns `numeric` are set to the right."""

    def cell(name: str, text: str, at: int, scope: str | None = None) -> Markup:
        return tag(name, text, class_="g4-num" if at in numeric else None, scope=scope)

    head = tag("tr", [cell("th", name, at, "col") for at, name in enumerate(columns)])
    body = [tag("tr", [cell("td", text, at) for at, text in enumerate(row)]) for row in rows]
    table = tag("table", tag("thead", head), tag("tbody", body), class_="g4-plain")
    return tag("div", table, class_="g4-scroll", tabindex=0)
