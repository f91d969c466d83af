# SPDX-License-Identifier: Apache-2.0
"""An attached dictionary in the forward pass: the sites inside it, and the record of what fired."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.features import F32, Features, join, sparse
from gemma4.interp.hooks import NESTED_MARK, Capture, HookFn, HookPoint, NaNLog, make_edit
from gemma4.interp.sites import Site, SiteTable


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The features of one forward pass of one sequence.

    sequence   index in the batch
    positions  int64 [pos]
    """

    sequence: int
    positions: NDArray[np.int64]
    features: Features


class Record:
    """The features that fired while a dictionary was attached. `passes` holds them pass by pass.

    dictionary  which one; of several layers, `layer` is the layer whose features these are, else None

    The variants that experiments run (patching grids, ablations, path patching) are not recorded.
    """

    def __init__(self, dictionary: object, d_sae: int, layer: int | None = None) -> None:
        self.dictionary, self.layer, self.passes, self._d_sae = dictionary, layer, list[Pass](), d_sae

    def features(self, sequence: int = 0) -> Features:
        """Those of one sequence of the batch, in the order in which they were computed."""
        return join((one.features for one in self._of(sequence)), self._d_sae)

    def positions(self, sequence: int = 0) -> NDArray[np.int64]:
        """The positions of `features`, int64 [pos]."""
        return np.concatenate([np.empty(0, np.int64), *(one.positions for one in self._of(sequence))])

    def clear(self) -> None:
        self.passes.clear()

    def _of(self, sequence: int) -> Iterator[Pass]:
        return (one for one in self.passes if one.sequence == sequence)

    def __repr__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer} of "
        return f"Record: {len(self.passes)} passes of {layer}{self.dictionary!r}"


class InnerSites:
    """The sites inside a dictionary. Each method passes a value by the functions that stand there.

    inner: name -> functions; point: that of the model's site where it happens.
    """

    def __init__(self) -> None:
        self._log = NaNLog()

    @staticmethod
    def site(reads: Site, like: Site, part: str, width: int) -> Site:
        """ "input" and so on, of the dictionary that reads `reads`; it happens at `like`."""
        name = f"{reads.name}{NESTED_MARK}{part}"
        return replace(like, name=name, id=-1, dims=("T", width), dtype=np.dtype(np.float32), keys="", axes="TD")

    def array(self, site: Site, array: F32, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]) -> F32:
        """The array after the functions; the same object if there are none."""
        fns, captures, here = _at(site, point, inner)
        if fns:
            array = make_edit(site, fns, here, self._log)(array.copy())
        for capture in captures:
            capture(array, here)
        return array

    def pre(
        self, site: Site, compute: Callable[[], F32], point: HookPoint, inner: Mapping[str, Sequence[HookFn]]
    ) -> None:
        """Pre-activations, computed if a function asks for them. Raises ValueError for one that changes them."""
        if site.name not in inner:
            return
        array = compute()
        if not np.array_equal(self.array(site, array, point, inner), array, equal_nan=True):
            raise ValueError(f"a function changed {site.name}, which can only be read: edit hook_sae_acts_post")

    def features(
        self, site: Site, features: Features, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]
    ) -> Features:
        """As `array`; functions see them dense. Raises ValueError (not finite afterwards)."""
        fns, captures, here = _at(site, point, inner)
        if fns:
            dense: F32 = make_edit(site, fns, here, self._log)(features.dense())
            if not np.isfinite(dense).all():
                raise ValueError(f"after the functions on {site.name}, features are NaN or infinite")
            features = sparse(dense)
        for capture in captures:
            capture(features, here)
        return features


def _at(
    site: Site, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]
) -> tuple[list[HookFn], list[Capture], HookPoint]:
    """The functions at a site inside, and the place for them."""
    fns = inner.get(site.name, ())
    here = replace(point, name=site.name, layer=site.layer)
    return [fn for fn in fns if not isinstance(fn, Capture)], [fn for fn in fns if isinstance(fn, Capture)], here


def bound_site(dictionary: object, files: object, which: str, name: str | None, width: int, table: SiteTable) -> Site:
    """The site of a model that a dictionary reads or writes, where it has that width.

    files: its path; which: the argument of `load` that names it. Raises SiteError (no such site), ValueError (none
    named, an ambiguous name, or another width).
    """
    if name is None:
        raise ValueError(f"the files of {files} do not name its site: load it with {which}=")
    if name.endswith("hook_mlp_in"):
        raise ValueError(
            f"{name} means different tensors in different tools: load it with {which}= mlp.hook_in (after the norm's "
            "gain), ln2.hook_normalized (before it) or hook_resid_mid (before the norm) of that block"
        )
    site = table[name]
    found = [dim for dim in site.dims if dim != "T"]
    if "S" in found or int(np.prod([int(dim) for dim in found])) != width:
        axes = ", ".join(map(str, site.dims))
        raise ValueError(f"{dictionary!r} has width {width}, but {site.name} of this model is [{axes}]")
    return site
