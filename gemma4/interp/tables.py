# SPDX-License-Identifier: Apache-2.0
"""Norms, cosines and per-head results of captured arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.interp.sites import Site
from gemma4.memory import ready_blas

F32: TypeAlias = NDArray[np.float32]
NormsBy: TypeAlias = Literal["pos", "head", "site"]
CosinesBy: TypeAlias = Literal["layer", "pos"]
Captured: TypeAlias = Mapping[Site, F32]


class Table(NamedTuple):
    """Numbers of several sites, with the name of each site."""

    values: F32
    labels: list[str]


def _check_numbers(sites: Captured) -> None:
    for site in sites:
        if site.dtype != np.float32 or site.keys == "scores":
            held = "ids" if site.dtype != np.float32 else "-inf where keys are masked"
            raise ValueError(f"{site.name} holds {held}, which have no norm and no angle")


def _axis(site: Site, letters: str) -> int:
    """The first axis with one of these letters. Raises ValueError if there is none."""
    for axis, letter in enumerate(site.axes):
        if letter in letters:
            return axis
    raise ValueError(f"{site.name} has no heads")


def _rows_first(site: Site, array: F32) -> F32:
    """The array with its axis of positions (of keys, if it has no other) in front."""
    return np.moveaxis(array, _axis(site, "T" if "T" in site.axes else "S"), 0)


def _same_shape(arrays: list[F32], what: str) -> F32:
    if len({array.shape for array in arrays}) > 1:
        shapes = sorted({array.shape for array in arrays})
        raise ValueError(f"{what} has a different shape in different layers: {shapes}")
    return np.stack(arrays)


def norms(sites: Captured, by: NormsBy) -> F32:
    """[n], [n, pos] or [n, pos, head]: see `ActivationCache.norms`."""
    checks.choice("by", by, ("pos", "head", "site"))
    _check_numbers(sites)
    return _same_shape([_norms(site, array, by) for site, array in sites.items()], "the table of norms")


def _norms(site: Site, array: F32, by: NormsBy) -> F32:
    rows = _axis(site, "T" if "T" in site.axes else "S")
    kept = {"pos": [rows], "head": [rows, _axis(site, "HK")] if by == "head" else [], "site": []}[by]
    summed = tuple(axis for axis in range(array.ndim) if axis not in kept)
    squares = np.sum(np.square(array, dtype=np.float64), axis=summed)
    lengths = np.sqrt(squares).astype(np.float32)
    return lengths.T if kept != sorted(kept) else lengths


def _units(array: F32) -> F32:
    """Vectors along the last axis, divided by their lengths; zero vectors stay zero."""
    lengths = np.sqrt(np.sum(np.square(array, dtype=np.float64), axis=-1, keepdims=True))
    return (array / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def cosine(sites: Captured) -> F32:
    """float32 [pos] or [pos, head] of two sites, or of one with itself: see `ActivationCache.cosine`."""
    _check_numbers(sites)
    first, *second = [_rows_first(site, array) for site, array in sites.items()]
    other = second[0] if second else first
    if first.shape != other.shape:
        names = " and ".join(site.name for site in sites)
        raise ValueError(f"{names} have different shapes, {first.shape} and {other.shape}: their vectors have no angle")
    return np.clip(np.einsum("...d,...d->...", _units(first), _units(other)), -1, 1)


def cosine_matrix(sites: Captured, by: CosinesBy) -> F32:
    """[pos, ..., n, n] or [n, ..., pos, pos]: see `ActivationCache.cosine_matrix`."""
    checks.choice("by", by, ("layer", "pos"))
    _check_numbers(sites)
    stacked = _same_shape([_rows_first(site, array) for site, array in sites.items()], next(iter(sites)).stem)
    units = np.ascontiguousarray(np.moveaxis(_units(stacked), 0 if by == "layer" else 1, -2))
    ready_blas()
    return np.clip(units @ np.swapaxes(units, -1, -2), -1, 1)


def head_results(z: F32, weight: F32) -> F32:
    """float32 [pos, head, d_model]: each head's z [pos, head, d_head] through its columns of weight [d_model, H*h]."""
    n_heads, d_head = z.shape[1:]
    ready_blas()
    by_head = cast(F32, weight.reshape(len(weight), n_heads, d_head)).transpose(1, 2, 0)
    return np.ascontiguousarray(np.matmul(z.transpose(1, 0, 2), by_head).transpose(1, 0, 2))
