# SPDX-License-Identifier: Apache-2.0
"""Attention patterns: a small picture of each head, which a click enlarges."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.html.markup import Markup, limit_of, tag, visible
from gemma4.html.picture import Picture, note
from gemma4.html.png import bits, packed, png_url

MOST_NUMBERS = 1 << 23  # in one picture: about 30 MB of HTML


def attention(
    patterns: ArrayLike,
    tokens: Sequence[str],
    *,
    keys: Sequence[str] | None = None,
    at: Sequence[int] | NDArray[np.integer] | None = None,
    names: Sequence[str] | None = None,
    title: str = "",
    small_print: str | None = None,
) -> Picture:
    """Attention by head: rows are queries, columns keys. Pointing says the number, a click or Enter enlarges a head.

        html.attention(cache["attn.hook_pattern", 3], model.to_str_tokens(ids))

    patterns  float [heads, queries, keys], from 0 on; one head may be [queries, keys]. NaN and
              infinite ones are said as nan
    tokens    texts of the queries
    keys      texts of the keys [those of the queries]
    at        which key each query is, an integer from 0 on for each query [the last ones, in order]
    names     of the heads ["head 0", ...]

    Raises ValueError (names or `at` that do not fit, more queries than keys without `at`, negative numbers, more than 8
    million numbers).
    """
    array = np.asarray(patterns, dtype=np.float32)
    array = np.where(np.isfinite(array) | (array < 0), array, np.nan)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ValueError(f"patterns are [heads, queries, keys], got {list(array.shape)}")
    heads = [f"head {i}" for i in range(len(array))] if names is None else list(names)
    said = list(tokens if keys is None else keys)
    if array.shape != (len(heads), len(tokens), len(said)):
        raise ValueError(
            f"patterns are {list(array.shape)}, but there are {len(heads)} names, {len(tokens)} queries and "
            f"{len(said)} keys"
        )
    if array.size > MOST_NUMBERS:
        raise ValueError(
            f"a picture of {array.size:,} numbers would be too large to open: choose heads, or fewer than "
            f"{int((MOST_NUMBERS / len(heads)) ** 0.5):,} positions"
        )
    if (array < 0).any():
        raise ValueError("patterns hold negative numbers: take attn.hook_pattern, or gemma4.html.heat for signed ones")
    root = tag(
        "div",
        note(small_print),
        tag("div", [_head(name, one) for name, one in zip(heads, array, strict=True)], class_="g4-heads"),
        tag("div", class_="g4-stage", hidden=True),
        class_="g4-attention",
        data_queries=_texts(tokens),
        data_keys=_texts(said),
        data_at=json.dumps(_keys_of_queries(at, len(tokens), len(said))),
    )
    return Picture(title, root)


def _keys_of_queries(at: Sequence[int] | NDArray[np.integer] | None, n_queries: int, n_keys: int) -> list[int]:
    if at is None:
        if n_queries > n_keys:
            raise ValueError(f"{n_queries} queries are more than {n_keys} keys: say with at= which key each query is")
        return list(range(n_keys - n_queries, n_keys))
    array = np.asarray(at)
    whole = array.shape == (n_queries,) and (array.dtype.kind in "iu" or not array.size)
    if not whole or ((array < 0) | (array >= n_keys)).any():
        raise ValueError(f"at must be {n_queries} integers in 0..{n_keys - 1}, a key for each query, got {at!r:.80}")
    return array.tolist()


def _head(name: str, pattern: NDArray[np.float32]) -> Markup:
    top = limit_of(pattern)
    none = np.isnan(pattern)
    image = tag("img", src=png_url(pattern / top), alt="")
    return tag(
        "button",
        image,
        tag("span", name),
        type="button",
        class_="g4-head",
        aria_expanded="false",
        aria_label=f"{name}: attention pattern, enlarge",
        data_name=name,
        data_top=f"{top:.6g}",
        data_v=packed(pattern / top),
        data_nan=bits(none) if none.any() else None,
    )


def _texts(tokens: Sequence[str]) -> str:
    return json.dumps([visible(token) for token in tokens], ensure_ascii=False)
