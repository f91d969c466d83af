# SPDX-License-Identifier: Apache-2.0
"""Text with a colour for each token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.html.cells import key_of
from gemma4.html.markup import Markup, colour, limit_of, number, numbers_json, tag, visible
from gemma4.html.picture import Picture, note

F64 = NDArray[np.float64]


def tokens(
    texts: Sequence[str],
    values: ArrayLike | Mapping[str, ArrayLike],
    *,
    title: str = "",
    small_print: str | None = None,
) -> Picture:
    """Tokens coloured by a number each; pointing says it. Several series of numbers get a choice above the text.

        html.tokens(model.to_str_tokens(ids), {"loss": losses, "entropy": entropies})

    texts   of the tokens
    values  float [pos], or names of such series

    Raises ValueError if their number is not that of the tokens, or without a series.
    """
    named = values if isinstance(values, Mapping) else {"": values}
    series = {name: _checked(name, array, len(texts)) for name, array in named.items()}
    if not series:
        raise ValueError("tokens need at least one series of values")
    name, array = next(iter(series.items()))
    limit = limit_of(array)
    several = len(series) > 1
    root = tag(
        "div",
        note(small_print),
        _choice(list(series)) if several else None,
        key_of(array, limit),
        spans(texts, array, limit, name),
        class_="g4-shaded",
        data_series=_json(series) if several else None,
    )
    return Picture(title, root)


def spans(texts: Sequence[str], values: F64, limit: float, name: str = "") -> Markup:
    """The tokens alone, with the colours of `values`; `limit` gets the full colour."""
    label = f"{name}: " if name else ""

    def span(at: int, text: str, value: float) -> Markup:
        look = colour(value, limit)
        tip = f"{text} ({at})\n{label}{number(value)}"
        return tag("span", text, title=tip, tabindex=-1, **look | {"class_": f"{look['class_']} g4-t"})

    all_spans = [span(at, visible(text), value) for at, (text, value) in enumerate(zip(texts, values, strict=True))]
    said = f"{len(texts)} tokens{f', coloured by {name}' if name else ''}; arrow keys move"
    return tag("div", all_spans, class_="g4-cells g4-tokens", tabindex=0, role="group", aria_label=said)


def _checked(name: str, values: ArrayLike, n: int) -> F64:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n,):
        raise ValueError(f"the values {name!r:.60} are {list(array.shape)}, but there are {n} tokens")
    return array


def _choice(names: Sequence[str]) -> Markup:
    options = (tag("option", name) for name in names)
    return tag("label", "colour: ", tag("select", options, class_="g4-series", autocomplete="off"))


def _json(series: Mapping[str, F64]) -> str:
    one = (
        f'{{"name":{json.dumps(name)},"limit":{limit_of(values):.6g},"values":{numbers_json(values)}}}'
        for name, values in series.items()
    )
    return f"[{','.join(one)}]"
