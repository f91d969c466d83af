# SPDX-License-Identifier: Apache-2.0
"""Encoding by dictionaries while harvesting: sparse features of every row, and each feature's strongest rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.dictionaries import SAE, Dictionary, Features, Transcoder, formats
from gemma4.dictionaries.sae import without_rows
from gemma4.dictionaries.shipped import locate
from gemma4.errors import FormatError
from gemma4.files import StrPath
from gemma4.harvest.hashing import update
from gemma4.interp.sites import SiteTable
from gemma4.narrow import is_iterable, is_list_or_tuple, is_mapping

F32: TypeAlias = NDArray[np.float32]
I64: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Coding:
    """One dictionary of a plan. top_k: the strongest features of each row to keep, None = all that fire."""

    path: str
    site: str
    top_k: int | None
    facts: dict[str, Any]

    def open(self) -> Dictionary:
        """Raises FormatError if the files are not those of the plan, and as `SAE.load`."""
        dictionary = open_dictionary(self.path)
        if fingerprint(self.path) != self.facts["fingerprint"]:
            dictionary.close()
            raise FormatError(f"{self.path} changed since the harvest began")
        return dictionary


def make_coding(path: StrPath, site: str | None, top_k: int | None, examples: int, sites: SiteTable) -> Coding:
    """Raises ValueError (it names no site, or one of another width), SiteError, and as `SAE.load`."""
    if top_k is not None:
        checks.integer("top_k", top_k, 1, 1 << 31)
    if site is not None:
        checks.text("the site of a dictionary", site)
    name = os.path.abspath(locate(os.path.expanduser(checks.path("sae", path))))
    with open_dictionary(name, site) as dictionary:
        if dictionary.site is None:
            raise ValueError(
                f"the files of {name} do not name the site that they read: sae={{path: site}}, --sae PATH=SITE"
            )
        found = sites[dictionary.site]
        width = int(np.prod([dim for dim in found.dims if isinstance(dim, int)]))
        if width != dictionary.d_in or found.keys:
            raise ValueError(f"{dictionary!r} does not fit this model: a row of {found.name} has {width} numbers")
        facts = {
            "name": Path(name).name,
            "fingerprint": fingerprint(name),
            "site": found.name,
            "d_sae": int(dictionary.d_sae),
            "top_k": top_k,
            "examples": examples,
        }
    return Coding(name, found.name, top_k, facts)


def open_dictionary(path: StrPath, site: str | None = None) -> Dictionary:
    """An autoencoder, or a transcoder. Raises as their `load`."""
    try:
        return SAE.load(path, site=site)
    except FormatError:
        raise
    except ValueError:  # a transcoder
        return Transcoder.load(path, site=site)


def encode(dictionary: Dictionary, coding: Coding, rows: F32, positions: NDArray[np.int32]) -> Features:
    """Features of rows [n, ...]; none at the positions of a sequence that the dictionary was not trained on."""
    features = without_rows(dictionary.encode(rows), positions < dictionary.skip_positions)
    return features if coding.top_k is None else features.top(coding.top_k)


def fingerprint(path: StrPath) -> str:
    """64 hex digits of all that a dictionary is read from: every byte of its weights, and its configuration.

    path: its folder, its file or a shipped name. Raises FormatError (it changed meanwhile), and as `SAE.load`.
    """
    opened = formats.open_dictionary(Path(locate(path)))
    try:
        digest = hashlib.sha256(json.dumps([opened.format, opened.metadata], sort_keys=True).encode())
        update(digest, memoryview(opened.file.view))
        opened.file.check()
        return digest.hexdigest()
    finally:
        opened.file.close()


class Examples:
    """The strongest rows of each feature; of equal ones the first.

    activations: float32 [d_sae, n], descending, 0 where there are no more · rows: int64 [d_sae, n], in the dataset, -1
    where there are no more · counts: int64 [d_sae], rows at which the feature fired
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.activations = np.zeros((d_sae, n), np.float32)
        self.rows = np.full((d_sae, n), -1, np.int64)
        self.counts = np.zeros(d_sae, np.int64)

    def add(self, features: Features, first_row: int) -> None:
        """Features of rows from `first_row` on; parts are added in the order of their rows."""
        self.counts += np.bincount(features.ids, minlength=len(self.counts))
        n = self.activations.shape[1]
        beats = features.values > self.activations[features.ids, -1]  # the others would change nothing
        ids, values, rows = features.ids[beats], features.values[beats], features.rows[beats] + first_row
        touched = np.unique(ids)
        slots = np.repeat(touched, n).astype(np.int32)
        ids = np.concatenate([slots, ids])
        values = np.concatenate([self.activations[touched].reshape(-1), values])
        rows = np.concatenate([self.rows[touched].reshape(-1), rows])
        order = np.lexsort((rows, -values, ids))  # empty places have the value 0, and so come last
        ids, values, rows = ids[order], values[order], rows[order]
        rank = np.arange(len(ids)) - np.searchsorted(ids, ids)
        kept = rank < n
        self.activations[ids[kept], rank[kept]] = values[kept]
        self.rows[ids[kept], rank[kept]] = rows[kept]


def paths_of(given: object) -> Iterator[tuple[StrPath, str | None]]:
    """(path, site or None) of each dictionary: one path, several, pairs, or a mapping of paths to sites."""
    if isinstance(given, str | os.PathLike):
        yield checks.path("sae", given), None
    elif is_mapping(given):
        yield from given.items()
    elif is_iterable(given):
        yield from map(_pair, given)
    else:
        checks.fail("sae", given, "a path, several, or a mapping of paths to sites")


def _pair(given: Any) -> tuple[StrPath, str | None]:
    if is_list_or_tuple(given) and len(given) == 2:
        return given[0], given[1]
    return checks.path("sae", given), None
