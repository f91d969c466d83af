# SPDX-License-Identifier: Apache-2.0
"""A dictionary inside the forward pass: its reconstruction in place of the site, and a record of what fired."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.features import F32
from gemma4.dictionaries.inside import InnerSites, Pass, Record, bound_site
from gemma4.dictionaries.sae import Dictionary, Transcoder, as_rows, without_rows
from gemma4.interp.hooks import HookFn, HookPoint, NamedFn, Nested
from gemma4.interp.sites import Site, SiteTable

R = TypeVar("R")


def bound_sites(dictionary: Dictionary, table: SiteTable) -> tuple[Site, Site]:
    """The sites of this model that a dictionary reads and writes. Raises SiteError (there is none), ValueError (none
    named, another width, or written before it is read)."""
    out = dictionary.site_out if isinstance(dictionary, Transcoder) else dictionary.site
    which = "site_out" if out != dictionary.site else "site"
    reads = bound_site(dictionary, dictionary.path, "site", dictionary.site, dictionary.d_in, table)
    writes = bound_site(dictionary, dictionary.path, which, out, dictionary.d_out, table)
    order = list(table)
    if order.index(writes.name) < order.index(reads.name):
        raise ValueError(
            f"{dictionary!r} of {dictionary.path} would write {writes.name}, which comes before {reads.name}: in a "
            "forward pass it cannot; load it with the right site= and site_out="
        )
    return reads, writes


class Splice(Nested):
    """A dictionary's reconstruction in place of the site that it writes, and with `error` what it misses besides.

    Its sites have SAELens's names, after that of the site which it reads: hook_sae_input, hook_sae_acts_post,
    hook_sae_recons and, with `error`, hook_sae_error. The error is that of the unedited features. hook_sae_acts_pre is
    computed if it is named, and can only be read.
    """

    def __init__(self, table: SiteTable, dictionary: Dictionary, *, error: bool) -> None:
        self.dictionary, self.error = dictionary, error
        self.record, self._records = Record(dictionary, dictionary.d_sae), True
        self._inside = InnerSites()
        self._reads, self._writes = bound_sites(dictionary, table)
        widths = {"input": dictionary.d_in, "acts_post": dictionary.d_sae, "recons": dictionary.d_out}
        widths |= {"error": dictionary.d_out} if error else {}
        self._of = {part: self._site(part, width) for part, width in widths.items()}
        self.sites = {site.name: site for site in self._of.values()}
        pre = self._of["acts_pre"] = replace(self._site("acts_pre", dictionary.d_sae), writable=False)
        self.asked = {pre.name: pre}

    def _site(self, part: str, width: int) -> Site:
        return self._inside.site(self._reads, self._reads if part == "input" else self._writes, part, width)

    def unrecorded(self) -> Self:
        other = copy(self)
        other._records = False
        return other

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
        of, inside = self._of, self._inside
        clean = without_rows(encode(x), early)
        edited = inside.array(of["input"], x, point, inner)
        inside.pre(of["acts_pre"], lambda: self.dictionary.pre_activations(edited), point, inner)
        found = clean if edited is x else without_rows(encode(edited), early)
        features = inside.features(of["acts_post"], found, point, inner)
        if self._records:
            self.record.passes.append(Pass(point.sequence, point.positions, features))
        out = decode(features, edited)
        missed = None
        if self.error:
            missed = rows - (out if features is clean else decode(clean, x))
            missed = inside.array(of["error"], missed, point, inner)
        out = inside.array(of["recons"], out, point, inner)
        return out if missed is None else out + missed


def warn_of_another_model(dictionary: Dictionary, fingerprint: Callable[[], str]) -> None:
    """Warn if the files say that it was trained on another model than the one of this fingerprint."""
    named = dictionary.model_fingerprint
    if named is not None and named != fingerprint():
        warnings.warn(
            f"{dictionary!r} of {dictionary.path} was trained on another model (fingerprint {named:.16}), or on this "
            f"one with other weights (this one has {fingerprint()}): its features may mean nothing here",
            stacklevel=3,
        )


class Entered(AbstractContextManager[R]):
    """An open block of hooks that gives a record."""

    def __init__(self, hooks: AbstractContextManager[None], record: R) -> None:
        self._hooks, self._record = hooks, record

    def __enter__(self) -> R:
        self._hooks.__enter__()
        return self._record

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
