# SPDX-License-Identifier: Apache-2.0
"""Edits of single features: x += (new - old) * W_dec[feature]. The part that the dictionary misses stays as it is.

A feature is read in Python, so these edits act as hooks do. They have the scope of every edit, see gemma4.edits. They
can be saved: the file names the dictionary by its path (a shipped one by its name) and its fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.features import F32, check_feature
from gemma4.dictionaries.sae import SAE, Dictionary, Transcoder, as_rows
from gemma4.dictionaries.shipped import locate, shipped_name
from gemma4.dictionaries.splice import bound_sites
from gemma4.edits.arithmetic import finite
from gemma4.edits.base import Edit, SiteEdit, Work
from gemma4.edits.files import Reference, register
from gemma4.edits.scope import Place, mask_of
from gemma4.interp.sites import Site, SiteTable

Act = Callable[[F32, Place], None]


@dataclass(frozen=True, slots=True, eq=False)
class _FunctionEdit(SiteEdit):
    """An edit that a Python function makes, in place."""

    act: Act = field(kw_only=True)

    def taps(self, place: Place) -> list[tuple[Work, NDArray[np.int32] | None]]:
        if not self.edit.acts(place.step, place.prompt):
            return []

        def work(array: F32) -> F32:
            self.act(array, place)
            return array

        return [(work, None)]


@dataclass(frozen=True, eq=False)
class FeatureEdit(Edit):
    """The base of all edits of a feature.

    dictionary  `SAE` or `Transcoder`; a transcoder's feature is read at `site` and changed at `site_out`
    feature     0 to d_sae - 1

    With pos=None, the positions on which the dictionary was not trained (`skip_positions`) stay as they are.
    """

    dictionary: Dictionary
    feature: int

    def __post_init__(self) -> None:
        super().__post_init__()
        given = cast(object, self.dictionary)
        if not isinstance(given, Dictionary):
            raise TypeError(f"{type(self).__name__} needs a dictionary, got {given!r:.60}")
        self._set("feature", check_feature(self.feature, self.dictionary.d_sae))

    def new(self, old: F32) -> F32:
        """The feature's values, from those that it has, float32 [pos]."""
        raise NotImplementedError

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        sites = bound_sites(self.dictionary, table)
        reads, writes = (table.select(site.name, stop_at_layer=stop_at_layer)[0] for site in sites)
        amounts: dict[int, F32] = {}  # to add in the current pass, by prompt

        def read(array: F32, place: Place) -> None:
            amounts[place.prompt] = self._amounts(array, place)

        def write(array: F32, place: Place) -> None:
            self.dictionary.add_feature(array, self.feature, amounts.pop(place.prompt))

        return [self._part(reads, read), self._part(writes, write)]

    def _part(self, site: Site, act: Act) -> SiteEdit:
        return _FunctionEdit(self, site, "add", act=act)

    def _amounts(self, array: F32, place: Place) -> F32:
        """new - old, 0 outside the scope."""
        old = self.dictionary.values_of(self.feature, as_rows(array, self.dictionary.d_in, f"{self} reads"))
        positions = np.arange(place.first, place.first + place.n)
        chosen = mask_of(self.where, positions, place.n_prompt)
        if self.where is None:
            chosen &= positions >= self.dictionary.skip_positions
        return np.where(chosen, self.new(old) - old, np.float32(0))

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.feature})"


@dataclass(frozen=True, eq=False)
class ClampFeature(FeatureEdit):
    """The feature has this value, also where it did not fire."""

    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("value", finite(self.value, "ClampFeature: value"))

    def new(self, old: F32) -> F32:
        return np.full_like(old, self.value)


@dataclass(frozen=True, eq=False)
class ScaleFeature(FeatureEdit):
    """The feature is multiplied by a factor."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("factor", finite(self.factor, "ScaleFeature: factor"))

    def new(self, old: F32) -> F32:
        return old * np.float32(self.factor)


@dataclass(frozen=True, eq=False)
class AblateFeature(FeatureEdit):
    """The feature is taken away."""

    def new(self, old: F32) -> F32:
        return np.zeros_like(old)


# -- in files ----------------------------------------------------------------------------------------------------------

_LOADERS: dict[str, Callable[..., Dictionary]] = {"SAE": SAE.load, "Transcoder": Transcoder.load}
_NAMED_BY = ("kind", "path", "beside", "fingerprint")


def _saved(dictionary: Dictionary, folder: Path) -> dict[str, Any]:
    if type(dictionary) not in (SAE, Transcoder):
        raise TypeError(f"only edits with an SAE or a Transcoder can be saved, got {type(dictionary).__name__}")
    path = dictionary.path.absolute()
    places = (name,) * 2 if (name := shipped_name(path)) else (str(path), os.path.relpath(path, folder.absolute()))
    values = (type(dictionary).__name__, *places, dictionary.fingerprint)
    entry = {**dict(zip(_NAMED_BY, values, strict=True)), "site": dictionary.site}
    return entry | ({"site_out": dictionary.site_out} if isinstance(dictionary, Transcoder) else {})


def _opened(entry: dict[str, Any], folder: Path, places: Mapping[str, str | os.PathLike[str]]) -> Dictionary:
    strings = {name: value for name, value in entry.items() if isinstance(value, str)}
    sites = {name: strings.get(name) for name in entry if name in ("site", "site_out")}
    if set(entry) != {*_NAMED_BY, *sites} or not set(_NAMED_BY) <= set(strings) or strings["kind"] not in _LOADERS:
        wanted = f"{', '.join(_NAMED_BY)}, all strings, of the kind {' or '.join(_LOADERS)}"
        raise ValueError(f"a dictionary is named by {wanted}, got {str(entry)[:200]}")
    saved = strings["path"]
    remedy = f"give the place where it is now: load_edits(path, dictionaries={{{saved!r}: place}})"
    path = places.get(saved) or next((one for one in (locate(saved), folder / strings["beside"]) if one.exists()), None)
    if path is None:
        raise FileNotFoundError(f"its dictionary {saved} is not there; {remedy}")
    dictionary = _LOADERS[strings["kind"]](path, **sites)
    if dictionary.fingerprint != strings["fingerprint"]:
        dictionary.close()
        raise ValueError(
            f"{path} is another dictionary than the saved one (fingerprint {dictionary.fingerprint[:12]}, expected "
            f"{strings['fingerprint']:.12}); {remedy}, or make the edits again"
        )
    return dictionary


register((AblateFeature, ClampFeature, ScaleFeature), "dictionary", Reference(Dictionary, _saved, _opened))
