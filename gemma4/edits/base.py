# SPDX-License-Identifier: Apache-2.0
"""The base of all edits, and what the engine gets of one: arithmetic on a site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.edits.scope import (
    Bools,
    Checked,
    Extent,
    Place,
    Span,
    Where,
    absolute,
    as_set,
    checked_where,
    listed,
    mask_of,
    stretches,
)
from gemma4.interp.sites import Site, SiteTable
from gemma4.narrow import is_iterable

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
Kind: TypeAlias = Literal["add", "scale", "set", "project_out", "clamp"]
Array: TypeAlias = NDArray[Any]
Arithmetic: TypeAlias = tuple[str, float, float, float, F32 | None, tuple[Span, ...]]  # `Edit` of _engine.pyi
Work: TypeAlias = Arithmetic | Callable[[Array], Array]
WHOLE: Span = (0, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """The base of all edits: the scope. See the module for `pos`, `steps` and `prompts`."""

    pos: Where = None
    steps: int | Iterable[int] | None = None
    prompts: int | Iterable[int] | None = None

    overwrites = False  # whether it leaves nothing of what it edits

    def __post_init__(self) -> None:
        self._set("pos", checked_where(self.pos, "pos"))
        for name in ("steps", "prompts"):
            given = getattr(self, name)
            checked = checked_where(given, name)
            if isinstance(checked, slice) or min(listed(checked) or (0,)) < 0:
                raise ValueError(f"{name} must be whole numbers from 0 on, or None, got {given!r}")
            self._set(name, checked)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        """The edits of each site. Raises SiteError (unknown name), ValueError (values that do not fit)."""
        raise NotImplementedError

    @property
    def where(self) -> Checked:
        return cast("Checked", self.pos)

    @property
    def step_set(self) -> frozenset[int] | None:
        return as_set(self.steps)

    @property
    def prompt_set(self) -> frozenset[int] | None:
        return as_set(self.prompts)

    def within(self, prefix: str) -> Edit | None:
        """The edit on those of its sites that are an encoder's ("vision.", "audio."), or ("") the text model's."""
        return None if prefix else self

    def concerns(self, prompt: int) -> bool:
        return self.prompt_set is None or prompt in self.prompt_set

    def acts(self, step: int, prompt: int) -> bool:
        return (self.step_set is None or step in self.step_set) and self.concerns(prompt)

    def check_prompts(self, n_prompts: int | None) -> None:
        if n_prompts is not None and self.prompt_set and max(self.prompt_set) >= n_prompts:
            raise ValueError(f"{self}: there is no prompt {max(self.prompt_set)}, only 0 to {n_prompts - 1}")

    def check_extent(self, extent: Extent, *, cached: bool) -> Bools:
        """Which of the extent's positions the edit acts on. Raises ValueError (none, or one that is not there).

        cached: they are those of cached keys, on which the edit acts in each of its steps.
        """
        steps = self.step_set
        if steps is not None and max(steps) >= extent.n_steps:
            raise ValueError(
                f"{self}: there is no step {max(steps)}, only 0 (the prompt) to {extent.n_steps - 1}"
                if extent.n_steps > 1
                else f"{self}: a forward pass is step 0 alone, step {max(steps)} is one of a generation"
            )
        first = 0 if cached else extent.first
        for named, position in zip(
            listed(self.where) or (), absolute(listed(self.where) or (), extent.n_prompt), strict=True
        ):
            if not first <= position < extent.end:
                why = (
                    "it is in the cached prefix, which is not computed again"
                    if 0 <= position < first
                    else "there is none"
                )
                raise ValueError(
                    f"{self}: position {named} cannot be edited: {why}; "
                    f"this call computes positions {extent.first} to {extent.end - 1}"
                )
        chosen = mask_of(self.where, np.arange(first, extent.end), extent.n_prompt)
        if not chosen.any():
            raise ValueError(
                f"{self}: no position of {self.pos} is computed: this call computes {extent.first} to {extent.end - 1}"
            )
        if steps is None or cached:
            return chosen
        in_steps = chosen & np.isin(extent.steps(), list(steps))
        if not in_steps.any():
            raise ValueError(
                f"{self}: no position of {self.pos} is computed in the steps {sorted(steps)}: step 0 computes the "
                f"prompt, up to position {extent.n_prompt - 1}, and step n position {extent.n_prompt - 1} + n"
            )
        return in_steps

    def __str__(self) -> str:
        return type(self).__name__


class SourceError(ValueError):
    """A prompt cannot take in this step what an edit takes from another one. prompt: its number."""

    def __init__(self, message: str, prompt: int = -1) -> None:  # unpickling passes the message alone
        super().__init__(message)
        self.prompt = prompt


class Source(NamedTuple):
    """Where values come from that are computed in the same step.

    prompt  index in the batch
    pos     its positions, in the order of the edit's `pos`; None: the same
    """

    prompt: int
    pos: Checked


# lend(site, positions): the array that a copy fills with the source's rows of these positions, ascending, while the
# step runs; of a site without axis T, with all keys
Lend: TypeAlias = Callable[[Site, NDArray[np.int64]], F32]


class Routing(NamedTuple):
    """The choice of experts under an edit of router logits.

    barred   they cannot be chosen
    forced   they must be; empty: the router chooses
    """

    n_experts: int
    top_k: int
    barred: frozenset[int]
    forced: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class SiteEdit:
    """The arithmetic of an edit on one site.

    edit     whose scope it has
    values   float32, to be broadcast to the site's dims with the row axis of size 1, or of len(rows)
    rows     the positions of the rows of `values`, in order; None: one row for all
    spans    axis -> (first, end); the engine changes only that part
    keys     positions along axis "S" to change, for scores and patterns; None = all
    window   with keys: how many keys, up to its own, a query of the layer sees; 0 = all
    routing  of an edit that chooses experts
    source   of an edit whose values another prompt of the step computes
    """

    edit: Edit
    site: Site
    kind: Kind
    factor: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    values: F32 | None = None
    rows: tuple[int, ...] | None = None
    spans: tuple[tuple[int, Span], ...] = ()
    keys: Checked = None
    window: int = 0
    routing: Routing | None = None
    source: Source | None = None
    ready: Arithmetic | None = field(init=False, default=None)  # where it is the same in every run

    def __post_init__(self) -> None:
        """Raises ValueError at once if values cannot fit, where the site's shape is known without a run."""
        if "S" not in self.site.dims and self.source is None:
            object.__setattr__(self, "ready", self._arithmetic(0, WHOLE))

    def taps(self, place: Place) -> list[tuple[Work, I32 | None]]:
        """The work for the engine in this run: pairs (work, rows), see `_engine.Tap`; [] if the edit rests."""
        if not self.edit.acts(place.step, place.prompt):
            return []
        if not self.site.rows:
            return self._cached_taps(place)
        if self.ready and self.edit.where is None and self.rows is None:  # all rows, every time: the usual steering
            return [(self.ready, None)]
        rows = self._row_map(place)
        if (rows < 0).all():
            return []
        if self.ready:
            return [(self.ready, rows)]
        n_keys = place.first + place.n
        of_keys: Iterable[Span] = (WHOLE,)
        if self.keys is not None:
            of_keys = stretches(mask_of(self.keys, np.arange(n_keys), place.n_prompt))
        return [(self._arithmetic(n_keys, keys), rows) for keys in of_keys]

    def _row_map(self, place: Place) -> I32:
        positions = np.arange(place.first, place.first + place.n)
        chosen = mask_of(self.edit.where, positions, place.n_prompt)
        rows = np.where(chosen, 0, -1).astype(np.int32)
        if self.rows is not None:
            index = {int(p): i for i, p in enumerate(absolute(self.rows, place.n_prompt))}
            rows[chosen] = [index[int(p)] for p in positions[chosen]]
        return rows

    def _cached_taps(self, place: Place) -> list[tuple[Work, I32 | None]]:
        """Keys or values in use, dims "SKh": `pos` chooses along their first axis."""
        positions = np.arange(place.first + place.n)
        taps: list[tuple[Work, I32 | None]] = []
        for first, end in stretches(mask_of(self.edit.where, positions, place.n_prompt)):
            part = self
            if self.rows is not None and self.values is not None:
                index = {int(p): i for i, p in enumerate(absolute(self.rows, place.n_prompt))}
                part = replace(self, values=self.values[[index[p] for p in range(first, end)]])
            taps.append((part._arithmetic(len(positions), (first, end)), None))
        return taps

    def taps_from(self, source: Source, place: Place, theirs: Place, lend: Lend) -> list[tuple[Work, I32 | None]]:
        """`taps` with the values that `theirs`, the source's part of the step, computes.

        Raises SourceError for a position that the source does not compute in this step.
        """
        ours, wanted = self._matched(source, place, theirs)
        if not len(ours):
            return []
        n_keys, spans = place.first + place.n, dict(self.spans)
        rows = np.unique(wanted)
        values = lend(self.site, rows)[tuple(slice(*spans.get(axis, (None,))) for axis in range(len(self.site.dims)))]
        if not self.site.rows:
            together = np.flatnonzero((np.diff(ours) != 1) | (np.diff(wanted) != 1)) + 1
            return [
                (
                    replace(self, source=None, values=values[q[0] : q[-1] + 1])._arithmetic(n_keys, (p[0], p[-1] + 1)),
                    None,
                )
                for p, q in zip(np.split(ours, together), np.split(wanted, together), strict=True)
            ]
        part = replace(self, source=None, values=values, rows=tuple(rows))
        index = np.full(place.n, -1, np.int32)
        index[ours - place.first] = np.searchsorted(rows, wanted)
        return [(part._arithmetic(n_keys, WHOLE), index)]

    def _matched(self, source: Source, place: Place, theirs: Place) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The positions to edit in this step, and those of the source that they take, in the same order."""
        here, there = self._reach(place), self._reach(theirs)
        named = listed(self.edit.where)
        if named is not None:
            ours = absolute(named, place.n_prompt)
            wanted = absolute(named if source.pos is None else listed(source.pos) or (), theirs.n_prompt)
            computed = np.isin(ours, here)
            order = np.argsort(ours[computed], kind="stable")
            ours, wanted = ours[computed][order], wanted[computed][order]
        else:
            ours = wanted = here[mask_of(self.edit.where, here, place.n_prompt)]
            if _from_the_end(self.edit.where):
                wanted = there[mask_of(self.edit.where, there, theirs.n_prompt)]
        if len(ours) != len(wanted):
            raise SourceError(
                f"{self.edit}: {self.edit.where} is {len(ours)} positions of prompt {place.prompt} in this step, but "
                f"{len(wanted)} of prompt {source.prompt}: name positions with pos= and source_pos=",
                place.prompt,
            )
        missing = wanted[~np.isin(wanted, there)]
        if len(missing):
            raise SourceError(
                f"{self.edit}: prompt {place.prompt} cannot take position {missing[0]} of {self.site.name} from prompt "
                f"{source.prompt}, which computes positions {there[0]} to {there[-1]} in this step",
                place.prompt,
            )
        same_length = self.edit.where is None or ("S" in self.site.dims and self.site.rows != "")
        if len(ours) and same_length and here[-1] != there[-1]:
            raise SourceError(
                f"{self.edit}: prompt {place.prompt} ends at position {here[-1]} in this step, prompt {source.prompt} "
                f"at {there[-1]}: all of {self.site.name} can be taken only at equal lengths; name positions with pos="
                + (", of a site without keys" if "S" in self.site.dims else ""),
                place.prompt,
            )
        return ours, wanted

    def rests(self, place: Place) -> bool:
        """Whether nothing that it changes is computed in this run."""
        chosen = mask_of(self.edit.where, self._reach(place), place.n_prompt)
        return not self.edit.acts(place.step, place.prompt) or not chosen.any()

    def _reach(self, place: Place) -> NDArray[np.int64]:
        """The positions of the site that a run has: those that it computes, or all keys."""
        return np.arange(place.first if self.site.rows else 0, place.first + place.n)

    def _arithmetic(self, n_keys: int, keys: Span) -> Arithmetic:
        spans, sizes = [WHOLE] * len(self.site.dims), list[int]()
        for axis, dim in enumerate(self.site.dims):
            spans[axis] = keys if dim == "S" else dict(self.spans).get(axis, WHOLE)
            size = n_keys if dim == "S" else self._n_value_rows() if dim == self.site.rows else int(dim)
            sizes.append(size if spans[axis] == WHOLE else spans[axis][1] - spans[axis][0])
        values = self.values
        if values is not None:
            try:
                values = np.broadcast_to(values, sizes)
            except ValueError:
                axes = ", ".join(map(str, self.site.dims))
                raise ValueError(
                    f"{self.edit}: values of shape {values.shape} do not fit {self.site.name} [{axes}]"
                ) from None
        return self.kind, self.factor, self.low, self.high, values, tuple(spans)

    def _n_value_rows(self) -> int:
        return 2 if self.rows is None else len(self.rows)  # 2 of one row: broadcasting gives the axis the stride 0


def checked_edits(edits: object) -> list[Edit]:
    """One edit or several as a list. Raises TypeError."""
    found: list[Edit] = []
    for edit in edits if is_iterable(edits) else [edits]:
        if not isinstance(edit, Edit):
            raise TypeError(f"an edit is one of gemma4.edits, got {edit!r:.80}; functions go to Model.hooks")
        found.append(edit)
    return found


def check_edits(edits: Iterable[SiteEdit], extent_of: Callable[[Site], Extent]) -> None:
    """Raise ValueError for an edit that cannot act on this prompt, and for edits that contradict.

    extent_of: what the call computes of the prompt at a site.
    """
    at_site: dict[str, list[_Acting]] = {}
    masked, routed = dict[str, list[_Acting]](), dict[str, list[_Acting]]()
    for part in edits:
        edit, extent = part.edit, extent_of(part.site)
        edit.check_prompts(extent.n_prompts)
        if not edit.concerns(extent.prompt):
            continue
        acting = _Acting(part, edit.check_extent(extent, cached=not part.site.rows))
        _check_rows(part, extent)
        at_site.setdefault(part.site.name, []).append(acting)
        if part.keys is not None:
            masked.setdefault(part.site.name, []).append(acting)
        elif part.routing is not None:
            routed.setdefault(part.site.name, []).append(acting)
    _check_effects(at_site, extent_of)
    for parts in masked.values():
        for spans in {acting.part.spans for acting in parts}:  # of one head, or () of all
            together = [acting for acting in parts if acting.part.spans in (spans, ())]
            _check_keys_left(together, extent_of(together[0].part.site))
    for parts in routed.values():
        _check_experts_left(parts)


class _Acting(NamedTuple):
    """A part, and the positions at which it acts in a call, by its extent; of cached keys those from 0 on."""

    part: SiteEdit
    rows: Bools

    @property
    def overwrites(self) -> bool:
        """Whether nothing is left of what it edits."""
        return self.part.kind == "set" and self.part.edit.overwrites


def _check_rows(part: SiteEdit, extent: Extent) -> None:
    """Raise ValueError if rows of different values are for one position."""
    named = listed(part.edit.where) if part.source is not None else part.rows
    positions = absolute(named or (), extent.n_prompt)
    if len(np.unique(positions)) < len(positions):
        twice = next(int(p) for p in positions if (positions == p).sum() > 1)
        raise ValueError(f"{part.edit}: pos names position {twice} twice, with a value for each: which one counts?")


def _check_effects(at_site: dict[str, list[_Acting]], extent_of: Callable[[Site], Extent]) -> None:
    """Raise ValueError for an edit of which later ones overwrite everything. at_site: by site, in order."""
    overwriting: dict[Edit, tuple[Edit, str] | None] = {}  # the last edit that does so, and where; None: none does
    for site, parts in at_site.items():
        writers = [(i, other) for i, other in enumerate(parts) if other.overwrites]
        for i, acting in enumerate(parts):
            extent = extent_of(acting.part.site)
            behind = (other for j, other in writers if j > i)
            later = [other for other in behind if _meet(acting, other) and _lasts(other, acting, extent)]
            if not later or not _is_overwritten(acting, later):
                overwriting[acting.part.edit] = None
            else:
                overwriting.setdefault(acting.part.edit, (later[-1].part.edit, site))
    for edit, found in overwriting.items():
        if found:
            last, site = found
            clash = f"{edit} and {last} both set {site}, so the first"
            if not edit.overwrites:
                clash = f"{last} sets all that {edit} changes of {site}, so {edit}"
            raise ValueError(
                f"{clash} would have no effect; remove one, change their order, or let them differ in pos, head, "
                "index, steps or prompts"
            )


def _meet(a: _Acting, b: _Acting) -> bool:
    """Whether parts of two edits have numbers in common."""
    others = dict(b.part.spans)
    same = all(
        axis not in others or max(s[0], others[axis][0]) < min(s[1], others[axis][1]) for axis, s in a.part.spans
    )
    return a.part.edit is not b.part.edit and same and bool((a.rows & b.rows).any())


def _lasts(later: _Acting, acting: _Acting, extent: Extent) -> bool:
    """Whether an edit acts on all prompts on which another one acts, and on cached keys in all of its steps."""
    edit, other = later.part.edit, acting.part.edit
    steps, others = edit.step_set, other.step_set
    if not acting.part.site.rows and steps is not None and (others is None or not others <= steps):
        return False
    prompts = range(extent.n_prompts or 0)
    if extent.n_prompts is None:
        prompts = (extent.prompt,) if later.part.source is None else (extent.prompt, later.part.source.prompt)
    return all(edit.concerns(prompt) for prompt in prompts if other.concerns(prompt))


def _is_overwritten(acting: _Acting, later: list[_Acting]) -> bool:
    """Whether later parts together cover its positions and spans: each cell between the ends of theirs."""
    part, spans = acting.part, [dict(other.part.spans) for other in later]
    axes = sorted({axis for of_one in spans for axis in of_one})
    starts: list[list[int]] = []
    for axis in axes:
        first, end = dict(part.spans).get(axis, (0, int(part.site.dims[axis])))
        ends = {bound for of_one in spans for bound in of_one.get(axis, ()) if first < bound < end}
        starts.append(sorted(ends | {first}))
    for cell in product(*starts):
        left = acting.rows.copy()
        for of_one, other in zip(spans, later, strict=True):
            inside = (of_one.get(axis, (at, at + 1)) for axis, at in zip(axes, cell, strict=True))
            if all(first <= at < end for (first, end), at in zip(inside, cell, strict=True)):
                left &= ~other.rows
        if left.any():
            return False
    return True


def _check_keys_left(parts: list[_Acting], extent: Extent) -> None:
    """Raise ValueError if these edits together take every key from a query: its softmax would be NaN."""
    part = parts[0].part
    positions = np.arange(extent.end)
    cuts = np.array([mask_of(other.part.keys, positions, extent.n_prompt) for other in parts])
    # queries on which the same edits act have the same keys cut
    acting, kind_of = np.unique(np.array([other.rows for other in parts]), axis=1, return_inverse=True)
    blind = np.zeros(len(parts[0].rows), np.bool_)
    for kind, together in enumerate(acting.T):
        rows = np.flatnonzero(kind_of.reshape(-1) == kind)
        if together.any():
            left = np.asarray(~cuts[together].any(axis=0))
            blind[rows] = _keys_seen(left, extent.first + rows, part.window) == 0
    if blind.any():
        query = extent.first + int(blind.argmax())
        first = max(0, query - part.window + 1) if part.window else 0
        raise ValueError(
            f"{part.edit}: in {part.site.name} position {query} would keep no key: it sees {first} to {query}"
        )


def _keys_seen(kept: Bools, queries: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """How many of the kept keys each query sees, its own among them."""
    up_to = np.concatenate(([0], np.cumsum(kept)))
    return up_to[queries + 1] - up_to[np.maximum(0, queries - window + 1) if window else 0]


def _check_experts_left(parts: list[_Acting]) -> None:
    """Raise ValueError if these edits together bar an expert that one of them forces, or leave a token too few."""
    routings = [cast(Routing, part.routing) for part, _ in parts]
    n_experts, top_k = routings[0].n_experts, routings[0].top_k
    barred = np.zeros((n_experts, len(parts[0].rows)), np.bool_)  # expert by position
    needed = np.full(len(parts[0].rows), top_k)
    for (part, rows), routing in zip(parts, routings, strict=True):
        for (other, other_rows), others in zip(parts, routings, strict=True):
            conflict = sorted(routing.forced & others.barred)
            if conflict and (rows & other_rows).any():
                raise ValueError(
                    f"{part.edit} and {other.edit} contradict: one forces expert {conflict[0]}, one bars it"
                )
        barred[list(routing.barred)] |= rows
        if routing.forced:
            needed[rows] = np.minimum(needed[rows], len(routing.forced))
    lacking = needed - (n_experts - barred.sum(axis=0))
    worst = int(lacking.argmax())
    if lacking[worst] > 0:
        raise ValueError(
            f"{parts[-1].part.edit}: {barred[:, worst].sum()} of {n_experts} experts are forbidden, but a token needs "
            f"{needed[worst]} ({parts[0].part.site.name})"
        )


def _from_the_end(where: Checked) -> bool:
    """Whether a slice has an end that counts from the prompt's."""
    return isinstance(where, slice) and min(where.start or 0, where.stop or 0) < 0
