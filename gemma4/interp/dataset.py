# SPDX-License-Identifier: Apache-2.0
"""Captured activations as an xarray.Dataset. Needs xarray: pip install "gemma4[xarray]"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.interp.sites import Site
from gemma4.media.source import require

if TYPE_CHECKING:
    from xarray import Dataset

F32: TypeAlias = NDArray[np.float32]

# letter of an axis (csrc/model/sites.inc) -> name of the dimension, and its meaning
DIMENSIONS = {
    "T": ("pos", "position in the sequence"),
    "S": ("key", "position of a key or value in the sequence"),
    "D": ("d_model", "channel of the residual stream"),
    "H": ("head", "attention head"),
    "K": ("kv_head", "head of keys and values"),
    "h": ("d_head", "channel of a head"),
    "F": ("d_mlp", "neuron of the MLP"),
    "P": ("d_ple", "channel of a per-layer embedding"),
    "L": ("layer", "layer that a per-layer embedding is for"),
    "E": ("expert", "expert"),
    "k": ("choice", "chosen expert, the likeliest first"),
    "M": ("d_expert", "neuron of an expert"),
    "V": ("vocab", "token id"),
    "1": ("one", "a single number"),
}
_KEYS = {
    "cached": "keys or values in use, by position",
    "scores": "scores before the softmax; -inf at masked keys",
    "pattern": "scores after the softmax; 0 at masked keys",
}


def to_dataset(
    arrays: Mapping[Site, F32], tokens: NDArray[np.int32], positions: NDArray[np.int64], attrs: Mapping[str, str]
) -> Dataset:
    """See `ActivationCache.to_dataset`. Raises ImportError without xarray."""
    xarray = require("xarray")
    sizes: dict[str, set[int]] = {}
    for site, array in arrays.items():
        for letter, size in zip(site.axes, array.shape, strict=True):
            sizes.setdefault(letter, set()).add(size)
    several = frozenset(letter for letter, found in sizes.items() if len(found) > 1)
    variables = {
        site.name: (list(_names(site, array, several)), array, _attributes(site)) for site, array in arrays.items()
    }
    coordinates: dict[str, object] = {"pos": positions, "token": ("pos", tokens)}
    coordinates |= {} if len(sizes.get("S", ())) != 1 else {"key": np.arange(next(iter(sizes["S"])))}
    return cast("Dataset", xarray.Dataset(variables, coordinates, dict(attrs)))


def _names(site: Site, array: F32, several: frozenset[str]) -> Iterator[str]:
    for letter, size in zip(site.axes, array.shape, strict=True):
        name = DIMENSIONS[letter][0]
        yield f"{name}_{size}" if letter in several else name


def _attributes(site: Site) -> dict[str, str | int]:
    axes = "; ".join(f"{name}: {meaning}" for name, meaning in (DIMENSIONS[letter] for letter in site.axes))
    facts: dict[str, str | int] = {"site": site.stem, "axes": axes, "writable": int(site.writable)}
    facts |= {} if site.layer is None else {"layer": site.layer}
    return facts | ({"keys": _KEYS[site.keys]} if site.keys else {})
