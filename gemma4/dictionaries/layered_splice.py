# SPDX-License-Identifier: Apache-2.0
"""A dictionary of several layers inside the forward pass: read at each of its sites, written at each of its others.

Layer l's output is written when the pass gets there, from the features of the layers that were read before. So a
feature may write to no site that comes earlier in the pass than the one where it is read. Weakly causal crosscoders and
cross-layer transcoders have zeros there; of a dictionary that has not, one pass cannot compute the reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import NoReturn, Self

import numpy as np

from gemma4.dictionaries.cross import LayeredDictionary
from gemma4.dictionaries.features import F32, Features
from gemma4.dictionaries.inside import InnerSites, Pass, Record, bound_site
from gemma4.dictionaries.sae import as_rows, without_rows
from gemma4.interp.hooks import HookFn, HookPoint, NamedFn, Nested
from gemma4.interp.sites import Site, SiteTable

_LOOKED_AT = 16  # decoder rows of each layer, when a dictionary is attached


class LayeredRecord:
    """The features that fired while a dictionary of several layers was attached. layers: a `Record` of each."""

    def __init__(self, dictionary: LayeredDictionary) -> None:
        layers = range(dictionary.n_layers)
        self.dictionary = dictionary
        self.layers = tuple(Record(dictionary, dictionary.d_sae, layer) for layer in layers)

    def features(self, sequence: int = 0) -> list[Features]:
        """Those of one sequence of the batch, of each layer, in the order in which they were computed."""
        return [one.features(sequence) for one in self.layers]

    def clear(self) -> None:
        for one in self.layers:
            one.clear()

    def __repr__(self) -> str:
        return f"LayeredRecord: {len(self.layers[0].passes)} passes of {self.dictionary!r}"


@dataclass(frozen=True)
class Places:
    """Where a dictionary of several layers acts in a model: the sites that each layer reads and writes."""

    dictionary: LayeredDictionary
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    order: Mapping[str, int]  # of the model's sites in the forward pass

    @classmethod
    def of(cls, dictionary: LayeredDictionary, table: SiteTable) -> Places:
        """Raises SiteError (there is no such site), ValueError (none named, one twice, or another width)."""
        ends = {"sites": (dictionary.sites, dictionary.d_in), "sites_out": (dictionary.sites_out, dictionary.d_out)}
        found: list[tuple[Site, ...]] = []
        for which, (names, width) in ends.items():
            given = names or (None,)
            sites = tuple(bound_site(dictionary, dictionary.path, which, name, width, table) for name in given)
            twice = [site.name for i, site in enumerate(sites) if site in sites[:i]]
            if twice:
                raise ValueError(f"{dictionary!r} has {twice[0]} twice in its {which}: each layer needs its own")
            found.append(sites)
        return cls(dictionary, found[0], found[1], {name: i for i, name in enumerate(table)})

    def comes_in_time(self, layer: int, to: int) -> bool:
        """Whether a layer's features are known when another layer's output is written."""
        return self.order[self.reads[layer].name] <= self.order[self.writes[to].name]

    def late(self, layer: int) -> list[int]:
        """The layers whose outputs are written before the features of this one are known."""
        return [to for to in range(self.dictionary.n_layers) if not self.comes_in_time(layer, to)]

    def refuse(self, layer: int, to: int, what: str) -> NoReturn:
        raise ValueError(
            f"{self.dictionary!r} is not causal: {what} of layer {layer} reads {self.reads[layer].name} and writes to "
            f"{self.writes[to].name}, which the forward pass computes before it. One pass cannot have both; encode and "
            "decode a cache instead"
        )

    def check(self) -> None:
        """Raise ValueError if skip connections, or some decoder rows of each layer, write to sites that come before
        the one that is read. `written_by` sees all rows that fire."""
        for layer in range(self.dictionary.n_layers):
            late = self.late(layer)
            if layer in late and self.dictionary.has_skip(layer):
                self.refuse(layer, layer, "the skip connection")
            if not late:
                continue
            for feature in range(0, self.dictionary.d_sae, max(1, self.dictionary.d_sae // _LOOKED_AT)):
                self.direction(layer, feature)

    def direction(self, layer: int, feature: int) -> F32:
        """A feature writes this to each layer, float32 [n_layers, d_out]. Raises ValueError for one that writes to a
        site that comes before the one where it is read, IndexError."""
        direction = self.dictionary.direction(layer, feature)
        for to in self.late(layer):
            if direction[to].any():
                self.refuse(layer, to, f"feature {feature}")
        return direction

    def written_by(self, layer: int, features: Features) -> F32:
        """Sums that a layer writes to each, float32 [pos, n_layers, d_out]. Raises ValueError as `direction`."""
        written = self.dictionary.written_by(layer, features)
        for to in self.late(layer):
            if written[:, to].any():
                self.refuse(layer, to, "a feature")
        return written


@dataclass(eq=False)
class _Run:
    """The forward pass of one sequence, as far as it came.

    edited, clean   layer -> what the features that were read so far write there, float32 [pos, d_out]: after the
                    functions that stand at the sites inside, and without them; one object as long as they are equal
    inputs          layer -> its input with those functions and without, where it is still needed
    """

    edited: dict[int, F32] = field(default_factory=dict[int, F32])
    clean: dict[int, F32] = field(default_factory=dict[int, F32])
    inputs: dict[int, tuple[F32, F32]] = field(default_factory=dict[int, tuple[F32, F32]])

    def __post_init__(self) -> None:
        self.clean = self.edited

    def add(self, layers: Sequence[int], edited: F32, clean: F32) -> None:
        """Both float32 [pos, n_layers, d_out]; only these layers are written later on."""
        if clean is not edited and self.clean is self.edited:
            self.clean = dict(self.edited)  # arrays are replaced, not changed
        for sums, parts in [(self.edited, edited), (self.clean, clean)][: 1 if self.clean is self.edited else 2]:
            for layer in layers:
                sums[layer] = parts[:, layer] + sums[layer] if layer in sums else parts[:, layer].copy()

    def take(self, layer: int) -> tuple[F32 | None, F32 | None]:
        """The rows written to a layer, edited and clean; None: nothing is."""
        edited = self.edited.pop(layer, None)
        return edited, edited if self.clean is self.edited else self.clean.pop(layer, None)


class LayeredSplice(Nested):
    """As `Splice`, of several layers.

    Layer i's sites have SAELens's names, after that of the site which it reads. hook_sae_recons and hook_sae_error of
    layer i are what it writes. The error is what the unedited features of this pass miss.
    """

    def __init__(self, table: SiteTable, dictionary: LayeredDictionary, *, error: bool) -> None:
        self.dictionary, self.error = dictionary, error
        self.record, self._records = LayeredRecord(dictionary), True
        self._places = Places.of(dictionary, table)
        self._places.check()
        self._inside = InnerSites()
        self._of = {(part, i): self._site(part, i) for part in self._parts() for i in range(dictionary.n_layers)}
        pre = [replace(self._site("acts_pre", i), writable=False) for i in range(dictionary.n_layers)]
        self._of |= {("acts_pre", i): site for i, site in enumerate(pre)}
        steps = [self._of[part, i] for at_output, i in self._steps() for part in self._parts(at_output)]
        self.sites = {site.name: site for site in steps}
        self.asked = {site.name: site for site in pre}

    def _parts(self, at_output: bool | None = None) -> list[str]:
        at = {False: ["input", "acts_post"], True: ["recons", *(["error"] if self.error else [])]}
        return [*at[False], *at[True]] if at_output is None else at[at_output]

    def _site(self, part: str, layer: int) -> Site:
        reads, writes = self._places.reads[layer], self._places.writes[layer]
        widths = {"input": self.dictionary.d_in, "recons": self.dictionary.d_out, "error": self.dictionary.d_out}
        like = writes if part in ("recons", "error") else reads
        return self._inside.site(reads, like, part, widths.get(part, self.dictionary.d_sae))

    def _steps(self) -> list[tuple[bool, int]]:
        """(whether it is written, layer) in the order of the pass; where one site is read and written, it is read
        first."""
        sites = {False: self._places.reads, True: self._places.writes}
        steps = [(at_output, i) for at_output in sites for i in range(self.dictionary.n_layers)]
        return sorted(steps, key=lambda step: (self._places.order[sites[step[0]][step[1]].name], step[0]))

    def unrecorded(self) -> Self:
        other = copy(self)
        other._records = False
        return other

    def pairs(self, inner: Mapping[str, Sequence[HookFn]]) -> list[NamedFn]:
        """A run that ends early (stop_at_layer) leaves out the sites that it does not reach, but for the first."""
        runs: dict[int, _Run] = {}  # by sequence
        first = self._steps()[0]
        return [
            self._pair(at_output, layer, (at_output, layer) == first, runs, inner) for at_output, layer in self._steps()
        ]

    def _pair(
        self, at_output: bool, layer: int, begins: bool, runs: dict[int, _Run], inner: Mapping[str, Sequence[HookFn]]
    ) -> NamedFn:
        step = self._write if at_output else self._read

        def act(array: F32, point: HookPoint) -> None:
            if begins:
                runs[point.sequence] = _Run()
            step(layer, array, runs[point.sequence], point, inner)

        name = (self._places.writes if at_output else self._places.reads)[layer].name
        return (name if begins else _only(name)), act

    def _read(self, layer: int, array: F32, run: _Run, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]) -> None:
        dictionary, inside, of = self.dictionary, self._inside, self._of
        early = point.positions < dictionary.skip_positions
        x = as_rows(array, dictionary.d_in, f"layer {layer} of {dictionary!r} reads").copy()
        clean = without_rows(dictionary.encode_layer(layer, x), early)
        edited = inside.array(of["input", layer], x, point, inner)
        inside.pre(of["acts_pre", layer], lambda: dictionary.pre_activations(layer, edited), point, inner)
        found = clean if edited is x else without_rows(dictionary.encode_layer(layer, edited), early)
        features = inside.features(of["acts_post", layer], found, point, inner)
        if self._records:
            self.record.layers[layer].passes.append(Pass(point.sequence, point.positions, features))
        written = self._places.written_by(layer, features)
        same = features is clean or not self.error
        unedited = written if same else self._places.written_by(layer, clean)
        run.add([to for to in range(dictionary.n_layers) if self._places.comes_in_time(layer, to)], written, unedited)
        if dictionary.has_skip(layer):
            run.inputs[layer] = edited, x

    def _write(
        self, layer: int, array: F32, run: _Run, point: HookPoint, inner: Mapping[str, Sequence[HookFn]]
    ) -> None:
        inside, of = self._inside, self._of
        rows = array.reshape(len(array), -1)
        written, unedited = run.take(layer)
        edited, x = run.inputs.pop(layer, (None, None))
        out = self._recons(layer, len(rows), written, edited)
        missed = None
        if self.error:
            same = unedited is written and x is edited
            missed = rows - (out if same else self._recons(layer, len(rows), unedited, x))
            missed = inside.array(of["error", layer], missed, point, inner)
        out = inside.array(of["recons", layer], out, point, inner)
        known = point.positions >= self.dictionary.skip_positions
        rows[known] = (out if missed is None else out + missed)[known]

    def _recons(self, layer: int, n: int, written: F32 | None, x: F32 | None) -> F32:
        """float32 [n, d_out]. written: by features; x: the input of a skip connection."""
        out = np.tile(self.dictionary.bias(layer), (n, 1))
        for part in (written, None if x is None else self.dictionary.skipped(layer, x)):
            out += 0 if part is None else part
        return out


def _only(name: str) -> Callable[[str], bool]:
    """Chooses one site, where a run reaches it."""
    return lambda other: other == name
