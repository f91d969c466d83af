# SPDX-License-Identifier: Apache-2.0
"""The arithmetic kinds of edits: scale, clamp, add, set, project out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.edits.base import Edit, Kind, SiteEdit
from gemma4.edits.scope import Span, checked_where, listed
from gemma4.interp.sites import Names, Site, SiteTable, names_of, reusable
from gemma4.narrow import is_mapping, is_number

F32: TypeAlias = NDArray[np.float32]
_INSIDE = ".hook_sae_"  # in the names of sites inside an attached dictionary


@dataclass(frozen=True, eq=False)
class OnSites(Edit):
    """An edit of named sites.

    site     a name, glob, list of them, or predicate; also of an encoder ("vision.…", "audio.…"), except by predicate.
             There `pos` are rows inside the encoder, of each picture, frame or recording
    head     of a site with heads: one index or several; None = all
    index    along the last axis (neurons, channels, experts): an int or slice; None = all
    """

    site: Names
    head: int | Iterable[int] | None = field(default=None, kw_only=True)
    index: int | slice | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.site is None:
            raise TypeError(f"{type(self).__name__} needs a site name, glob or predicate")
        self._set("site", checked_sites(self.site, type(self).__name__))
        head = checked_where(self.head, "head")
        if isinstance(head, slice):
            raise TypeError(f"head must be one number or several, got {head}")
        self._set("head", head)
        index = checked_where(self.index, "index")
        if isinstance(index, tuple):
            raise TypeError(f"index must be one number or a slice, got {index!r:.60}; several need an edit each")
        self._set("index", index)

    def __str__(self) -> str:
        shown = self.site if isinstance(self.site, str) else "..." if callable(self.site) else list(self.site or ())
        return f"{type(self).__name__}({shown!r})"

    def _select(self, table: SiteTable, stop_at_layer: int | None) -> list[Site]:
        return table.select(self.site, stop_at_layer=stop_at_layer)

    def within(self, prefix: str) -> Edit | None:
        names = names_within(self.site, prefix)
        return None if names is None else self if names is self.site else replace(self, site=names)

    def _spans(self, site: Site) -> Iterator[tuple[tuple[int, Span], ...]]:
        """One set of spans for each head."""
        index = () if self.index is None else ((len(site.dims) - 1, self._last(site)),)
        heads = listed(cast("int | tuple[int, ...] | None", self.head))
        if heads is None:
            yield index
            return
        axis = head_axis(site)
        if axis is None:
            raise ValueError(f"{self}: {site.name} has no heads")
        for head in heads:
            size = int(site.dims[axis])
            if not -size <= head < size:
                raise ValueError(f"{self}: {site.name} has heads 0 to {size - 1}, got {head}")
            yield (*index, (axis, (head % size, head % size + 1)))

    def _last(self, site: Site) -> Span:
        size = site.dims[-1]
        if isinstance(size, str):
            raise ValueError(f"{self}: the last axis of {site.name} is positions, not to be chosen by index")
        if isinstance(self.index, slice):
            first, end, step = self.index.indices(size)
            if step != 1 or first >= end:
                raise ValueError(f"{self}: index {self.index} is no stretch of 0 to {size - 1} ({site.name})")
            return first, end
        index = cast(int, self.index)
        if not -size <= index < size:
            raise ValueError(f"{self}: {site.name} has 0 to {size - 1} on its last axis, got {index}")
        return index % size, index % size + 1

    def parts_of(self, table: SiteTable, stop_at_layer: int | None, kind: Kind) -> list[SiteEdit]:
        """The edits of each selected site and head, without their numbers."""
        sites = self._select(table, stop_at_layer)
        ids = [site.name for site in sites if site.dtype.kind == "i"]
        if ids:
            raise ValueError(f"{self}: {ids[0]} holds ids, which no arithmetic can edit; ForceExperts chooses experts")
        return [SiteEdit(self, site, kind, spans=spans) for site in sites for spans in self._spans(site)]


def checked_sites(names: Names, what: str) -> Names:
    """The names, safe to iterate more than once. Raises TypeError, ValueError (none)."""
    checked = reusable(names)
    if checked == []:
        raise ValueError(f"{what}: the list of sites is empty: the edit would never act")
    given = [] if checked is None or callable(checked) else [checked] if isinstance(checked, str) else checked
    inside = [name for name in given if _INSIDE in str(name)]
    if inside:
        raise ValueError(
            f"{what}: {inside[0]} is inside a dictionary: edit it by a function (Model.hooks), or its features by "
            "ClampFeature, ScaleFeature and AblateFeature"
        )
    return checked


def names_within(names: Names, prefix: str) -> Names:
    """Those of an edit's names that are an encoder's, or the text model's; None: there is none.

    A predicate chooses among the text model's sites.
    """
    if callable(names):
        return None if prefix else names
    mine = names_of(names, prefix)
    given = [names] if isinstance(names, str) else names
    return names if mine == given else mine or None


def head_axis(site: Site) -> int | None:
    if len(site.dims) != 3 or not site.stem.startswith("attn."):
        return None
    return 0 if site.dims[1] == site.rows else 1


@dataclass(frozen=True, eq=False)
class Scale(OnSites):
    """x *= factor."""

    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("factor", finite(self.factor, f"{type(self).__name__}: factor"))

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        return [replace(part, factor=self.factor) for part in self.parts_of(table, stop_at_layer, "scale")]


@dataclass(frozen=True, eq=False)
class Clamp(OnSites):
    """x = min(max(x, low), high)."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("low", number(self.low, "Clamp: low"))
        self._set("high", number(self.high, "Clamp: high"))
        if not self.low <= self.high:
            raise ValueError(f"{self}: low must be at most high, got {self.low} and {self.high}")
        if self.low == -math.inf and self.high == math.inf:
            raise ValueError(f"{self}: without low and high nothing would change; give one of them")

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        return [replace(part, low=self.low, high=self.high) for part in self.parts_of(table, stop_at_layer, "clamp")]


@dataclass(frozen=True, eq=False)
class WithValue(OnSites):
    """value: float32, broadcast to the site's dims (docs/sites.md), or to the part that head and index choose. With
    several rows on axis T, `pos` names their positions, in order."""

    value: ArrayLike

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("value", frozen(self.value, type(self).__name__))

    def _valued(self, table: SiteTable, stop_at_layer: int | None, kind: Kind, factor: float = 1.0) -> list[SiteEdit]:
        parts = self.parts_of(table, stop_at_layer, kind)
        for part in parts:
            refuse_infinite(self, part.site, cast(F32, self.value))
        return [self._with_rows(replace(part, factor=factor)) for part in parts]

    def _with_rows(self, part: SiteEdit) -> SiteEdit:
        values = cast(F32, self.value)
        axis = next(i for i, dim in enumerate(part.site.dims) if dim == (part.site.rows or "S"))
        at = axis - len(part.site.dims) + values.ndim
        if at < 0 or values.shape[at] == 1:
            return replace(part, values=values)
        rows = listed(self.where)
        if rows is None or len(rows) != values.shape[at]:
            raise ValueError(
                f"{self}: the value has {values.shape[at]} rows of positions; pos must list as many, got {self.pos}"
            )
        return replace(part, values=values, rows=rows)


def refuse_infinite(edit: Edit, site: Site, values: F32) -> None:
    """Raise ValueError for infinities, which become NaN; -inf is allowed before a softmax, where it is the weight 0."""
    before_softmax = site.keys == "scores" or site.stem in ("moe.hook_router_logits", "hook_logits_raw", "hook_logits")
    bad = values[np.isposinf(values) if before_softmax else np.isinf(values)]
    if bad.size:
        raise ValueError(f"{edit}: the values for {site.name} hold {bad[0]}, which would become NaN; expected numbers")


@dataclass(frozen=True, eq=False)
class Add(WithValue):
    """x += factor * value."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("factor", finite(self.factor, f"{type(self).__name__}: factor"))

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        return self._valued(table, stop_at_layer, "add", self.factor)


@dataclass(frozen=True, eq=False)
class Set(WithValue):
    """x = value. In scores and logits -inf is allowed: the key, the expert or the token gets no weight."""

    overwrites = True

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        return self._valued(table, stop_at_layer, "set")


@dataclass(frozen=True, eq=False)
class ProjectOut(WithValue):
    """x -= factor * (x . v) / (v . v) * v along the last axis; v is `value`. factor=2 reflects."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.atleast_1d(cast(F32, self.value)).any(axis=-1).all():
            raise ValueError(f"{self}: a vector of zeros has no direction to project out")
        self._set("factor", finite(self.factor, f"{type(self).__name__}: factor"))

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        return self._valued(table, stop_at_layer, "project_out", self.factor)


def number(value: object, what: str) -> float:
    if not is_number(value):
        raise TypeError(f"{what} must be a number, got {value!r:.60}")
    return float(value)


def finite(value: object, what: str) -> float:
    result = number(value, what)
    if not math.isfinite(result):
        raise ValueError(f"{what} must be finite, got {result}")
    return result


def frozen(value: object, what: str) -> F32:
    """A read-only float32 copy without NaN."""
    if is_mapping(value):
        raise TypeError(f"{what}: the value must be an array, got a {type(value).__name__}; give the array of one site")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"{what}: the value must be numbers, got {array.dtype}")
    copy = np.array(array, np.float32, order="C")
    if np.isnan(copy).any():
        raise ValueError(f"{what}: the value holds NaN")
    copy.setflags(write=False)
    return copy
