# SPDX-License-Identifier: Apache-2.0
"""Edits of single features: x += (new - old) * W_dec[feature]. The part that the dictionary misses stays as it is.

A feature of a dictionary of several layers does so at each site to which it writes; what those sites compute from the
earlier changes comes on top, as it does for the sites between them.

A feature is read in Python, so these edits act as hooks do. They have the scope of every edit, see gemma4.edits. They
can be saved: the file names the dictionary by its path (a shipped one by its name) and its fingerprint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.cross import Crosscoder, CrossLayerTranscoder, LayeredDictionary
from gemma4.dictionaries.features import F32, check_feature
from gemma4.dictionaries.layered_splice import Places
from gemma4.dictionaries.sae import SAE, Dictionary, Transcoder, as_rows
from gemma4.dictionaries.shipped import locate, shipped_name
from gemma4.dictionaries.splice import bound_sites
from gemma4.edits.arithmetic import finite
from gemma4.edits.base import Edit, SiteEdit, Work
from gemma4.edits.files import Reference, register
from gemma4.edits.scope import Place, mask_of
from gemma4.interp.sites import Site, SiteTable
from gemma4.narrow import is_list

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


class _Bound(NamedTuple):
    """A feature in a model. reads: the site where it is read; values: the feature, float32 [pos], from float32 [pos,
    d_in] there; writes: sites, each with a function that adds amounts of the feature, float32 [pos], to an array."""

    reads: Site
    values: Callable[[F32], F32]
    writes: list[tuple[Site, Callable[[F32, F32], None]]]


@dataclass(frozen=True, eq=False)
class FeatureEdit(Edit):
    """The base of all edits of a feature.

    dictionary  `SAE`, `Transcoder`, `Crosscoder` or `CrossLayerTranscoder`; the feature is read at the dictionary's
                site, and changed where it writes: a transcoder's at `site_out`, in several layers at each `sites_out`
    feature     0 to d_sae - 1; of several layers a pair (layer, feature), the layer as in `LayeredDictionary.direction`

    With pos=None, the positions on which the dictionary was not trained (`skip_positions`) stay as they are.
    Raises ValueError, when it is given to a model, for a feature that writes to a site before the one where it is read.
    """

    dictionary: Dictionary | LayeredDictionary
    feature: int | tuple[int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = cast(object, self.dictionary)
        if isinstance(given, LayeredDictionary):
            self._set("feature", given.check_feature(self.feature))
        elif isinstance(given, Dictionary):
            self._set("feature", check_feature(self.feature, given.d_sae))
        else:
            raise TypeError(f"{type(self).__name__} needs a dictionary, got {given!r:.60}")

    def new(self, old: F32) -> F32:
        """The feature's values, from those that it has, float32 [pos]."""
        raise NotImplementedError

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        feature = self._in_layers(table, stop_at_layer) or self._in_one(table, stop_at_layer)
        amounts: dict[int, F32] = {}  # to add in the current pass, by prompt

        def read(array: F32, place: Place) -> None:
            amounts[place.prompt] = self._amounts(feature.values, array, place)

        def part(site: Site, add: Callable[[F32, F32], None]) -> SiteEdit:
            return self._part(site, lambda array, place: add(array, amounts[place.prompt]))

        return [self._part(feature.reads, read), *(part(site, add) for site, add in feature.writes)]

    def _in_one(self, table: SiteTable, stop_at_layer: int | None) -> _Bound:
        dictionary, feature = cast(Dictionary, self.dictionary), cast(int, self.feature)
        sites = bound_sites(dictionary, table)
        reads, writes = (table.select(site.name, stop_at_layer=stop_at_layer)[0] for site in sites)

        def add(array: F32, amounts: F32) -> None:
            dictionary.add_feature(array, feature, amounts)

        return _Bound(reads, partial(dictionary.values_of, feature), [(writes, add)])

    def _in_layers(self, table: SiteTable, stop_at_layer: int | None) -> _Bound | None:
        """None: the dictionary is of one layer. Sites that a run does not reach are left out, but not all of them."""
        dictionary = self.dictionary
        if not isinstance(dictionary, LayeredDictionary):
            return None
        layer, feature = cast("tuple[int, int]", self.feature)
        places = Places.of(dictionary, table)
        direction = places.direction(layer, feature)
        written = [to for to in range(dictionary.n_layers) if direction[to].any()]
        if not written:
            raise ValueError(f"{self}: this feature of {dictionary!r} writes nothing, so nothing would change")
        names = [places.writes[to].name for to in written]
        reads = table.select(places.reads[layer].name, stop_at_layer=stop_at_layer)[0]
        first = min(names, key=places.order.__getitem__)
        reached = {site.name for site in table.select(lambda name: name in names, stop_at_layer=stop_at_layer)}
        _ = table.select(first, stop_at_layer=stop_at_layer)  # raises for a run that reaches none

        def adds(row: F32) -> Callable[[F32, F32], None]:
            def add(array: F32, amounts: F32) -> None:
                rows, at = array.reshape(len(array), -1), amounts != 0
                rows[at] += amounts[at, None] * row

            return add

        writes = [(places.writes[to], adds(direction[to])) for to in written if places.writes[to].name in reached]
        return _Bound(reads, partial(dictionary.values_of, layer, feature), writes)

    def _part(self, site: Site, act: Act) -> SiteEdit:
        return _FunctionEdit(self, site, "add", act=act)

    def _amounts(self, values: Callable[[F32], F32], array: F32, place: Place) -> F32:
        """new - old, 0 outside the scope."""
        old = values(as_rows(array, self.dictionary.d_in, f"{self} reads"))
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

_Kept: TypeAlias = "Dictionary | LayeredDictionary"
_LOADERS: dict[str, Callable[..., _Kept]] = {
    kind.__name__: kind.load for kind in (SAE, Transcoder, Crosscoder, CrossLayerTranscoder)
}
_NAMED_BY = ("kind", "path", "beside", "fingerprint")
_SITES = ("site", "site_out", "sites", "sites_out")


def _saved(dictionary: _Kept, folder: Path) -> dict[str, Any]:
    kind = type(dictionary).__name__
    if kind not in _LOADERS or type(dictionary) not in (SAE, Transcoder, Crosscoder, CrossLayerTranscoder):
        raise TypeError(f"only edits with one of {', '.join(_LOADERS)} can be saved, got {kind}")
    path = dictionary.path.absolute()
    places = (name,) * 2 if (name := shipped_name(path)) else (str(path), os.path.relpath(path, folder.absolute()))
    entry = dict(zip(_NAMED_BY, (kind, *places, dictionary.fingerprint), strict=True))
    return entry | {name: getattr(dictionary, name) for name in _SITES if hasattr(dictionary, name)}


def _opened(entry: dict[str, Any], folder: Path, places: Mapping[str, str | os.PathLike[str]]) -> _Kept:
    strings = {name: value for name, value in entry.items() if isinstance(value, str)}
    sites = {name: _checked_sites(entry[name]) for name in entry if name in _SITES}
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


def _checked_sites(value: Any) -> str | list[str] | None:
    """A site's name, or of several layers a list of them; anything else counts as not named."""
    if is_list(value) and value and all(isinstance(name, str) for name in value):
        return cast("list[str]", value)
    return value if isinstance(value, str) else None


_EDITS = (AblateFeature, ClampFeature, ScaleFeature)
register(_EDITS, "dictionary", Reference(Dictionary, _saved, _opened))
register(_EDITS, "layered dictionary", Reference(LayeredDictionary, _saved, _opened))
