# SPDX-License-Identifier: Apache-2.0
"""A dictionary inside the forward pass: its reconstruction in place of the site, and a record of what fired."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.features import F32, Features, join, sparse
from gemma4.dictionaries.sae import Dictionary, Transcoder, as_rows, without_rows
from gemma4.interp.hooks import NESTED_MARK, Capture, HookFn, HookPoint, NamedFn, NaNLog, Nested, make_edit
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
    """The features that fired while a dictionary was attached. `passes` holds them pass by pass."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary, self.passes = dictionary, list[Pass]()

    def features(self, sequence: int = 0) -> Features:
        """Those of one sequence of the batch, in the order in which they were computed."""
        return join((one.features for one in self._of(sequence)), self.dictionary.d_sae)

    def positions(self, sequence: int = 0) -> NDArray[np.int64]:
        """The positions of `features`, int64 [pos]."""
        return np.concatenate([np.empty(0, np.int64), *(one.positions for one in self._of(sequence))])

    def clear(self) -> None:
        self.passes.clear()

    def _of(self, sequence: int) -> Iterator[Pass]:
        return (one for one in self.passes if one.sequence == sequence)

    def __repr__(self) -> str:
        return f"Record: {len(self.passes)} passes of {self.dictionary!r}"


def bound_sites(dictionary: Dictionary, table: SiteTable) -> tuple[Site, Site]:
    """The sites of this model that a dictionary reads and writes. Raises SiteError (there is none), ValueError (none
    named, or another width)."""
    out = dictionary.site_out if isinstance(dictionary, Transcoder) else dictionary.site
    return (
        _bound_site(dictionary, "site", dictionary.site, dictionary.d_in, table),
        _bound_site(dictionary, "site_out" if out != dictionary.site else "site", out, dictionary.d_out, table),
    )


def _bound_site(dictionary: Dictionary, which: str, name: str | None, width: int, table: SiteTable) -> Site:
    if name is None:
        raise ValueError(f"the files of {dictionary.path} do not name its site: load it with {which}=")
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


class Splice(Nested):
    """A dictionary's reconstruction in place of the site that it writes, and with `error` what it misses besides.

    Its sites have SAELens's names, after that of the site which it reads: hook_sae_input, hook_sae_acts_post,
    hook_sae_recons and, with `error`, hook_sae_error. The error is that of the unedited features. hook_sae_acts_pre is
    computed if it is named, and can only be read.
    """

    def __init__(self, table: SiteTable, dictionary: Dictionary, *, error: bool) -> None:
        if not isinstance(cast(object, dictionary), Dictionary):
            raise TypeError(f"an SAE or a Transcoder can be attached, got {type(dictionary).__name__}")
        self.dictionary, self.error, self.record = dictionary, error, Record(dictionary)
        self._reads, self._writes = bound_sites(dictionary, table)
        widths = {"input": dictionary.d_in, "acts_post": dictionary.d_sae, "recons": dictionary.d_out}
        widths |= {"error": dictionary.d_out} if error else {}
        self._of = {part: self._site(part, width) for part, width in widths.items()}
        self.sites = {site.name: site for site in self._of.values()}
        pre = self._of["acts_pre"] = replace(self._site("acts_pre", dictionary.d_sae), writable=False)
        self.asked = {pre.name: pre}
        self._log = NaNLog()

    def _site(self, part: str, width: int) -> Site:
        like = self._reads if part == "input" else self._writes
        name = f"{self._reads.name}{NESTED_MARK}{part}"
        return replace(like, name=name, id=-1, dims=("T", width), dtype=np.dtype(np.float32), keys="", axes="TD")

    def pairs(self, inner: Mapping[str, Sequence[HookFn]]) -> list[NamedFn]:
        inputs: dict[int, F32] = {}  # of the current pass, by sequence

        def read(array: F32, point: HookPoint) -> None:
            inputs[point.sequence] = as_rows(array, self.dictionary.d_in, f"{self.dictionary!r} reads").copy()

        def write(array: F32, point: HookPoint) -> None:
            early = point.positions < self.dictionary.skip_positions
            rows = array.reshape(len(array), -1)
            rows[~early] = self._written(inputs.pop(point.sequence), rows, early, point, inner)[~early]

        return [(self._reads.name, read), (self._writes.name, write)]

    def _written(
        self,
        x: F32,
        rows: F32,
        early: NDArray[np.bool_],
        point: HookPoint,
        inner: Mapping[str, Sequence[HookFn]],
    ) -> F32:
        """The rows that take the place of `rows`."""
        encode, decode = self.dictionary.encode, self.dictionary.decode
        clean = without_rows(encode(x), early)
        edited = self._pass("input", x, point, inner)
        self._pass_pre(edited, point, inner)
        features = self._pass_features(clean if edited is x else without_rows(encode(edited), early), point, inner)
        self.record.passes.append(Pass(point.sequence, point.positions, features))
        out = decode(features, edited)
        missed = None
        if self.error:
            missed = rows - (out if features is clean else decode(clean, x))
            missed = self._pass("error", missed, point, inner)
        out = self._pass("recons", out, point, inner)
        return out if missed is None else out + missed

    def _pass(self, part: str, array: F32, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]) -> F32:
        """The array after the functions on that site; the same object if there are none."""
        site = self._of[part]
        fns, captures = _by_kind(inner.get(site.name, ()))
        here = replace(point, name=site.name, layer=site.layer)
        if fns:
            array = make_edit(site, fns, here, self._log)(array.copy())
        for capture in captures:
            capture(array, here)
        return array

    def _pass_pre(self, x: F32, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]) -> None:
        name = self._of["acts_pre"].name
        if name not in inner:
            return
        array = self.dictionary.pre_activations(x)
        if not np.array_equal(self._pass("acts_pre", array, point, inner), array, equal_nan=True):
            raise ValueError(f"a function changed {name}, which can only be read: edit hook_sae_acts_post")

    def _pass_features(self, features: Features, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]) -> Features:
        site = self._of["acts_post"]
        fns, captures = _by_kind(inner.get(site.name, ()))
        here = replace(point, name=site.name, layer=site.layer)
        if fns:
            dense: F32 = make_edit(site, fns, here, self._log)(features.dense())
            if not np.isfinite(dense).all():
                raise ValueError(f"after the functions on {site.name}, features are NaN or infinite")
            features = sparse(dense)
        for capture in captures:
            capture(features, here)
        return features


def _by_kind(fns: Sequence[HookFn]) -> tuple[list[HookFn], list[Capture]]:
    return [fn for fn in fns if not isinstance(fn, Capture)], [fn for fn in fns if isinstance(fn, Capture)]


def warn_of_another_model(dictionary: Dictionary, fingerprint: Callable[[], str]) -> None:
    """Warn if the files say that it was trained on another model than the one of this fingerprint."""
    named = dictionary.model_fingerprint
    if named is not None and named != fingerprint():
        warnings.warn(
            f"{dictionary!r} of {dictionary.path} was trained on another model (fingerprint {named:.16}), or on this "
            f"one with other weights (this one has {fingerprint()}): its features may mean nothing here",
            stacklevel=3,
        )


@contextmanager
def entered(hooks: AbstractContextManager[None], record: Record) -> Iterator[Record]:
    with hooks:
        yield record
