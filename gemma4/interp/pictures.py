# SPDX-License-Identifier: Apache-2.0
"""How captured activations show themselves as HTML: a table of the sites, and attention patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.html import Picture, attention
from gemma4.html.cells import plain
from gemma4.html.picture import FEW, note
from gemma4.interp.sites import Site
from gemma4.units import size

F32: TypeAlias = NDArray[np.float32]
_MOST_HEADS = 16  # that a picture of a cache shows; each can be enlarged


def summary(arrays: Mapping[Site, F32], media: Iterable[str]) -> Picture:
    """A row for each site inside a block and each of the model: layers, shapes, dtype, bytes. media: further lines."""
    groups: dict[str, list[Site]] = {}
    for site in arrays:
        groups.setdefault(site.stem, []).append(site)
    rows = [_row(stem, [(site, arrays[site]) for site in sites]) for stem, sites in groups.items()]
    table = plain(("site", "layers", "shape", "axes", "dtype", "bytes"), rows, numeric=(5,))
    n_bytes = size(sum(array.nbytes for array in arrays.values()))
    return Picture(f"ActivationCache: {len(arrays)} arrays, {n_bytes}", table, [note(line) for line in media])


def _row(stem: str, found: Sequence[tuple[Site, F32]]) -> tuple[str, ...]:
    layers = [site.layer for site, _ in found if site.layer is not None]
    shapes = sorted({array.shape for _, array in found})
    dtypes = sorted({array.dtype.name for _, array in found})
    n_bytes = sum(array.nbytes for _, array in found)
    shape = ", ".join(str(list(one)) for one in shapes)
    return stem, ranges(layers), shape, ", ".join(found[0][0].axes), ", ".join(dtypes), size(n_bytes)


def ranges(numbers: Sequence[int]) -> str:
    """Integers in short: "0-3, 7"."""
    parts: list[list[int]] = []
    for one in sorted(numbers):
        if parts and one == parts[-1][-1] + 1:
            parts[-1].append(one)
        else:
            parts.append([one])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def patterns(arrays: Mapping[Site, F32], texts: Sequence[str], positions: NDArray[np.int64]) -> Picture | None:
    """The first captured attention patterns, at the last positions; None if there are none."""
    heads = [
        (f"{site.layer}.{head}", pattern)
        for site, array in arrays.items()
        if site.keys == "pattern"
        for head, pattern in enumerate(array)
    ]
    n_keys = {pattern.shape[1] for _, pattern in heads}
    if not heads or not len(texts) or len(n_keys) > 1:
        return None
    keys = _texts_of_keys(n_keys.pop(), texts, positions)
    shown, kept = heads[:_MOST_HEADS], range(max(0, len(keys) - FEW), len(keys))
    queries = [row for row, position in enumerate(positions.tolist()) if position in kept]
    if not queries:
        return None
    return attention(
        np.stack([pattern[queries, kept.start :] for _, pattern in shown]),
        [texts[row] for row in queries],
        keys=[keys[at] for at in kept],
        at=[int(positions[row]) - kept.start for row in queries],
        names=[name for name, _ in shown],
        title="Attention, by layer.head",
        small_print=_left_out(len(shown), len(heads), len(kept), len(keys)),
    )


def _left_out(n_shown: int, n_heads: int, n_kept: int, n_keys: int) -> str:
    heads = [f"{n_shown} of {n_heads} heads"] if n_shown < n_heads else []
    positions = [f"the last {n_kept} of {n_keys} positions"] if n_kept < n_keys else []
    parts = ", ".join(heads + positions)
    return parts and f"{parts}; gemma4.html.attention(cache[name], tokens) shows any."


def _texts_of_keys(n: int, texts: Sequence[str], positions: NDArray[np.int64]) -> list[str]:
    """Texts of the keys, which are the sequence's positions; of those that were not kept the number."""
    known = dict(zip(positions.tolist(), texts, strict=True))
    return [known.get(position, str(position)) for position in range(n)]


def cache_picture(
    arrays: Mapping[Site, F32], texts: Sequence[str], positions: NDArray[np.int64], media: Iterable[str]
) -> Picture:
    """All of it."""
    table, pattern = summary(arrays, media), patterns(arrays, texts, positions)
    return Picture(table.title, table.body, pattern and pattern.section())
