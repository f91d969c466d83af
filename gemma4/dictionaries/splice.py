# SPDX-License-Identifier: Apache-2.0
"""A dictionary inside the forward pass: its reconstruction in place of the site, and a record of what fired."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries.features import F32, Features, join
from gemma4.dictionaries.sae import Dictionary, Transcoder, as_rows, without_rows
from gemma4.interp.hooks import Hook, HookPoint
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


def splice(table: SiteTable, dictionary: Dictionary, *, error: bool) -> tuple[list[Hook], Record]:
    """Hooks that replace the written site by the reconstruction, and with `error` add what it misses."""
    record = Record(dictionary)
    reads, writes = bound_sites(dictionary, table)
    inputs: dict[int, F32] = {}  # of the current pass, by sequence

    def read(array: F32, point: HookPoint) -> None:
        inputs[point.sequence] = as_rows(array, dictionary.d_in, f"{dictionary!r} reads").copy()

    def write(array: F32, point: HookPoint) -> None:
        x = inputs.pop(point.sequence)
        early = point.positions < dictionary.skip_positions
        features = without_rows(dictionary.encode(x), early)
        record.passes.append(Pass(point.sequence, point.positions, features))
        rows = array.reshape(len(array), -1)
        out = dictionary.decode(features, x)
        rows[~early] = (out + (rows - out) if error else out)[~early]

    return [(reads.name, read), (writes.name, write)], record


@contextmanager
def entered(hooks: AbstractContextManager[None], record: Record) -> Iterator[Record]:
    with hooks:
        yield record
