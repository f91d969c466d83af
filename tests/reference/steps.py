# SPDX-License-Identifier: Apache-2.0
"""Engine steps with everything captured and any chunk size: what the public API does not expose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import gemma4
    from gemma4.interp.sites import Site

Ids = NDArray[np.int32]


class Account(NamedTuple):
    """All that one run of a step gave: logits float32 [T, V] and every site."""

    logits: NDArray[np.float32]
    sites: dict[str, NDArray[Any]]


def run(
    model: gemma4.Model, runs: list[tuple[Any, Ids]], *, max_chunk: int = 0, ends: list[Ids] | None = None
) -> list[Account]:
    """One engine step over (engine sequence, ids) pairs, all logits and all sites of each. ends: of each run, how far
    its positions see."""
    accounts = [_empty(model, sequence, ids) for sequence, ids in runs]
    engine_runs = [
        (sequence, ids, None, np.arange(len(ids), dtype=np.int32), account.logits, None if ends is None else ends[i])
        for i, ((sequence, ids), account) in enumerate(zip(runs, accounts, strict=True))
    ]
    taps = [
        (site.id, site.layer or 0, index, account.sites[name], None)
        for index, account in enumerate(accounts)
        for name, site in model.sites.items()
    ]
    model.engine.step(engine_runs, taps, max_chunk=max_chunk)
    return accounts


def _empty(model: gemma4.Model, sequence: Any, ids: Ids) -> Account:
    keys = sequence.length + len(ids)
    sites = {name: np.zeros(site.shape(len(ids), keys), site.dtype) for name, site in model.sites.items()}
    return Account(np.zeros((len(ids), model.d_vocab), np.float32), sites)


def whole(model: gemma4.Model, ids: Ids, *, kv_dtype: str = "f32", max_chunk: int = 0) -> Account:
    """A prompt from its start, as one run."""
    return run(model, [(model.engine.new_sequence(kv_dtype=kv_dtype), ids)], max_chunk=max_chunk)[0]


def rows(model: gemma4.Model, account: Account, first: int, last: int) -> dict[str, NDArray[Any]]:
    """What a run of positions first..last-1 alone would have captured; keys attended are cut to those it knows."""
    return {name: _rows(model.sites[name], array, first, last) for name, array in account.sites.items()}


def _rows(site: Site, array: NDArray[Any], first: int, last: int) -> NDArray[Any]:
    index = tuple({"T": slice(first, last), "S": slice(0, last)}.get(dim, slice(None)) for dim in map(str, site.dims))
    return array[index]


def in_window(model: gemma4.Model, name: str, array: NDArray[Any], first: int) -> NDArray[Any]:
    """Of keys attended ("SKh"): those that some position from `first` on can see. Any other array unchanged."""
    site = model.sites[name]
    if site.dims[0] != "S":
        return array
    window = model.engine_config["layers"][site.layer or 0]["window"]
    return array[max(0, first - window + 1) :] if window else array


def digests(accounts: Iterable[Account]) -> dict[str, str]:
    """SHA-256 of each site's bytes over all accounts, and of the logits."""
    hashes: dict[str, Any] = {}
    for account in accounts:
        for name, array in {**account.sites, "logits": account.logits}.items():
            hashes.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(array).tobytes())
    return {name: found.hexdigest() for name, found in hashes.items()}
