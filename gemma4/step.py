# SPDX-License-Identifier: Apache-2.0
"""One forward pass over a batch: from prompts to the engine's runs and taps, and to output arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core
from gemma4.edits.base import SiteEdit, SourceError, Work
from gemma4.edits.scope import Place
from gemma4.encoders.soft_tokens import SoftRows
from gemma4.errors import CapacityError, StateError
from gemma4.interp.cache import ActivationCache
from gemma4.interp.hooks import HookPoint, SiteHooks, has_nan, works
from gemma4.interp.sites import Site
from gemma4.narrow import is_array, is_iterable
from gemma4.picks import Picker, TopLogits
from gemma4.profile import step_array
from gemma4.sequence import Sequence

if TYPE_CHECKING:
    from gemma4._engine import Run, Tap

I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]
Rows: TypeAlias = Literal["all", "last"] | int | slice | Iterable[int]
Positions: TypeAlias = Rows | None


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """New tokens for one sequence, and the outputs it needs. Prompts of one step may need different outputs."""

    sequence: Sequence
    ids: I32  # int32 [T], T >= 1
    number: int = 0  # in the user's batch, for hooks; some of its prompts may have finished
    soft: SoftRows | None = None  # which of them are soft tokens
    logits: Positions = "all"  # positions within `ids` whose next-token logits to return; None: no array at all
    capture: Seq[Site] | None = None  # sites to keep; None: no cache at all
    pos: Positions = "all"  # at which positions within `ids`
    resid: F32 | None = None  # float32 [T, d_model]: the residual stream that enters the step's start_at_layer
    hooks: SiteHooks = field(default_factory=SiteHooks)  # sites to edit, those of other prompts stay as they are
    n_prompt: int | None = None  # length of the prompt that these tokens belong to, for edits; None: it ends with them
    step: int = 0  # of a generation, for edits; 0: the prompt itself
    picker: Picker | None = None  # what to find in those logits; the logits themselves only if it needs them


class Output(NamedTuple):
    """The outputs of one prompt of a batch. With a picker, the next step overwrites the logits."""

    logits: F32 | None  # float32 [n, d_vocab]
    cache: ActivationCache | None
    tops: list[TopLogits] | None = None  # [n] with a picker


def select_positions(spec: Positions, length: int, what: str = "pos") -> I32:
    """int32 indices into 0..length-1, in the given order. Raises ValueError for one out of range."""
    if spec is None:
        return np.empty(0, dtype=np.int32)
    if isinstance(spec, str):
        if spec not in ("all", "last"):
            raise ValueError(f'{what} must be "all", "last", positions or None, got {spec!r}')
        return np.arange(0 if spec == "all" else length - 1, length, dtype=np.int32)
    if isinstance(spec, slice):
        return np.arange(*spec.indices(length), dtype=np.int32)
    given: Any = spec if is_array(spec) or not is_iterable(spec) else list(spec)
    wanted = np.atleast_1d(np.asarray(given))
    if wanted.dtype.kind not in "iu" and wanted.size:
        raise TypeError(f"{what} must hold whole numbers, got {wanted.dtype}")
    if wanted.ndim > 1:
        raise ValueError(f"{what} must be one row of positions, got shape {wanted.shape}")
    if wanted.size and (wanted.min() < -length or wanted.max() >= length):
        raise ValueError(f"{what}: position out of range, there are {length} (got {wanted.tolist()})")
    return np.where(wanted < 0, wanted + length, wanted).astype(np.int32)


def _ascending(rows: I32) -> tuple[I32, NDArray[np.intp] | None]:
    """Sorted rows without repetition, as the engine needs them, and indices to restore the given order (or None)."""
    if len(rows) < 2 or (rows[1:] > rows[:-1]).all():
        return rows, None
    return np.unique(rows, return_inverse=True)


class _Plan:
    """The engine's view of one prompt, and the arrays it will fill."""

    def __init__(self, model: Core, run_index: int, prompt: Prompt) -> None:
        self.prompt, self.run_index = prompt, run_index
        n_new = len(prompt.ids)
        self.before = prompt.sequence.length
        self.captures = prompt.capture is not None
        self.kept, _ = _ascending(select_positions(prompt.pos if self.captures else None, n_new))
        self.rows, self.order = _ascending(select_positions(prompt.logits, n_new, "logits"))
        self.picker = prompt.picker
        self.logits = self._logits(model)
        self.arrays = self._allocate(prompt.capture or ())
        self.lent: dict[tuple[str, bytes], tuple[Site, I32 | None, F32]] = {}  # copies that other runs' edits read

    def _logits(self, model: Core) -> F32 | None:
        """Memory for the rows of logits; None: none are needed."""
        if self.prompt.logits is None:
            return None
        if self.picker:
            return self.picker.buffer(len(self.rows))
        return np.empty((len(self.rows), model.d_vocab), dtype=np.float32)

    def _allocate(self, sites: Iterable[Site]) -> dict[str, NDArray[Any]]:
        # zeros, not empty: the engine leaves rows that it never reaches unchanged (and zero pages are free)
        rows, keys = len(self.kept), self.before + len(self.prompt.ids)
        return {site.name: np.zeros(site.shape(rows, keys), dtype=site.dtype) for site in sites}

    def run(self) -> Run:
        sequence, soft, resid = self.prompt.sequence.engine, self.prompt.soft, self.prompt.resid
        rows, logits = (self.rows, self.logits) if len(self.rows) else (None, None)
        picks = self.picker.arguments(len(self.rows)) if self.picker and rows is not None else None
        if soft is None and resid is None and picks is None:
            return sequence, self.prompt.ids, None, rows, logits
        ids, embeddings, ends = (soft.ids, soft.embeddings, soft.ends) if soft else (self.prompt.ids, None, None)
        return sequence, ids, embeddings, rows, logits, ends, resid, picks

    def edits(self, model: Core, plans: Seq[_Plan]) -> list[Tap]:
        """The taps of hooks and edits, in their order."""
        return [
            (site.id, site.layer or 0, self.run_index, *work)
            for site, acts in self.prompt.hooks
            for work in works(site, acts, self._point(site), model.nan_log, lambda edit: self._work_of(edit, plans))
        ]

    def copies(self) -> Iterator[Tap]:
        """The captures, and the rows that other runs take, which their `edits` have asked for."""
        rows = self._row_map(self.kept) if self.arrays else None
        for site in self.prompt.capture or ():
            yield self._copy(site, self.arrays[site.name], rows)
        for site, taken, array in self.lent.values():
            yield self._copy(site, array, taken)

    def _copy(self, site: Site, array: NDArray[Any], rows: I32 | None) -> Tap:
        return site.id, site.layer or 0, self.run_index, array, rows if "T" in site.dims else None

    def lend(self, site: Site, positions: I64) -> F32:
        """See `gemma4.edits.base.Lend`."""
        n_keys = self.before + len(self.prompt.ids)
        empty = np.zeros(site.shape(len(positions), n_keys), np.float32)
        rows = self._row_map(positions - self.before) if site.rows else None
        return self.lent.setdefault((site.name, positions.tobytes()), (site, rows, empty))[2]

    def _work_of(self, edit: SiteEdit, plans: Seq[_Plan]) -> list[tuple[Work, I32 | None]]:
        place = _place_of(self.prompt, self.before)
        if edit.source is None:
            return edit.taps(place)
        if edit.rests(place):
            return []
        lenders = [plan for plan in plans if plan.prompt.number == edit.source.prompt]
        if len(lenders) != 1:
            which = "more than one prompt has this number" if lenders else "it has ended, or never was in the batch"
            raise SourceError(
                f"{edit.edit}: prompt {edit.source.prompt} is not in step {place.step}: {which}; "
                "limit the edit with steps= or pos=",
                place.prompt,
            )
        (lender,) = lenders
        return edit.taps_from(edit.source, place, _place_of(lender.prompt, lender.before), lender.lend)

    def _point(self, site: Site) -> HookPoint:
        positions = np.arange(self.before, self.before + len(self.prompt.ids))
        return HookPoint(site.name, site.layer, self.prompt.number, positions)

    def _row_map(self, kept: I32 | I64) -> I32 | None:
        """Where a copy puts each new position, of which it keeps these, ascending."""
        if len(kept) == len(self.prompt.ids):
            return None
        rows = np.full(len(self.prompt.ids), -1, dtype=np.int32)
        rows[kept] = np.arange(len(kept), dtype=np.int32)
        return rows

    def made_nan(self) -> bool:
        """Whether logits of a run with edits hold NaN: the engine's own edits are not looked at one by one."""
        edited = any(isinstance(act, SiteEdit) for _, acts in self.prompt.hooks for act in acts)
        if self.picker:
            return edited and any(math.isnan(top.top) for top in self._tops() or ())
        return edited and self.logits is not None and has_nan(self.logits)

    def _tops(self) -> list[TopLogits] | None:
        """In the order that was asked for."""
        rows = range(len(self.rows)) if self.order is None else self.order.tolist()
        return [self.picker.found(row) for row in rows] if self.picker else None

    def output(self, model: Core) -> Output:
        logits = self.logits if self.logits is None or self.order is None else self.logits[self.order]
        if not self.captures:
            return Output(logits, None, self._tops())
        positions = self.before + self.kept.astype(np.int64)
        media = self.prompt.soft.caches if self.prompt.soft else ()
        return Output(
            logits, ActivationCache(model, self.arrays, self.prompt.ids[self.kept], positions, media), self._tops()
        )


def _place_of(prompt: Prompt, before: int) -> Place:
    """The part of a prompt that a step computes. before: length of its sequence when the step began."""
    n_new = len(prompt.ids)
    n_prompt = before + n_new if prompt.n_prompt is None else prompt.n_prompt
    return Place(before, n_new, n_prompt, prompt.step, prompt.number)


def run_step(
    model: Core, prompts: Seq[Prompt], *, stop_at_layer: int | None = None, start_at_layer: int = 0
) -> list[Output]:
    """Run every prompt in one engine step; sequences grow by their ids. Each output equals that of the prompt alone.

    stop_at_layer: run blocks 0..n-1 only, of all prompts; no sequence grows.
    start_at_layer: of prompts with resid: run this block and later ones only, on it; no sequence grows.
    Raises CapacityError (numbers in the message) before anything is computed, and what the engine raises.
    """
    _check_capacity(prompts)
    model.checkpoint.check()
    order = _lenders_first(prompts)
    plans = [_Plan(model, run_index, prompts[i]) for run_index, i in enumerate(order)]
    edits = [plan.edits(model, plans) for plan in plans]
    taps = [tap for plan, own in zip(plans, edits, strict=True) for tap in (*own, *plan.copies())]
    lends = any(plan.lent for plan in plans)
    stop = -1 if stop_at_layer is None else stop_at_layer
    try:
        with step_array(model) as profile:
            runs = [plan.run() for plan in plans]
            model.engine.step(
                runs, taps, stop_at_layer=stop, start_at_layer=start_at_layer, in_order=lends, profile=profile
            )
    except StateError:  # closed, or in use by another thread
        raise
    except BaseException:
        _record(plans)  # Ctrl-C keeps whole chunks
        raise
    _record(plans)
    if any(plan.made_nan() for plan in plans):
        model.nan_log.report("hook_logits")
    return [plan.output(model) for _, plan in sorted(zip(order, plans, strict=True), key=lambda pair: pair[0])]


def _lenders_first(prompts: Seq[Prompt]) -> Seq[int]:
    """Indices of the prompts in an order in which those whose activations others take come first.

    Raises SourceError for prompts that take from each other.
    """
    takes = [_lenders_of(prompt) for prompt in prompts]
    if not any(takes):
        return range(len(prompts))
    indices = {prompt.number: i for i, prompt in enumerate(prompts)}
    graph = {i: [indices[number] for number in numbers if number in indices] for i, numbers in enumerate(takes)}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = [prompts[i].number for i in cast("list[int]", error.args[1])[1:]]
        raise SourceError(
            f"Patch: the prompts {' and '.join(map(str, circle))} take activations from each other in one step; "
            "capture one of them first",
            circle[0],
        ) from None


def _lenders_of(prompt: Prompt) -> set[int]:
    """The numbers of the prompts from which edits of this one take."""
    if not prompt.hooks:
        return set()
    place = _place_of(prompt, prompt.sequence.length)
    edits = (act for _, acts in prompt.hooks for act in acts if isinstance(act, SiteEdit))
    return {edit.source.prompt for edit in edits if edit.source and not edit.rests(place)}


def _record(plans: list[_Plan]) -> None:
    for plan in plans:
        if not plan.prompt.sequence.closed:
            soft = plan.prompt.soft
            plan.prompt.sequence.record(plan.prompt.ids, None if soft is None else soft.keys, plan.before)


def _check_capacity(prompts: Seq[Prompt]) -> None:
    for prompt in prompts:
        sequence, ids = prompt.sequence, prompt.ids
        if not sequence.closed and sequence.length + len(ids) > sequence.capacity:
            raise CapacityError(
                f"{len(ids)} new tokens after {sequence.length} in the cache make {sequence.length + len(ids)}; "
                f"this sequence holds at most {sequence.capacity}. Shorten the prompt, or truncate the sequence."
            )
