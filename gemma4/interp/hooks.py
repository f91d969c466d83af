# SPDX-License-Identifier: Apache-2.0
"""Python functions that read or edit activations while the model runs.

A hook is a pair (names, fn). `fn(array, site)` gets the activation as a writable float32 array of its own and either
edits it in place (and returns None) or returns a new array of the same shape; the forward pass goes on with that.
It always sees every new position of its sequence at once, also where the pass would otherwise have skipped some.
Wherever a hook can stand, an edit of `gemma4.edits` can, too: it is data, and the engine applies it without Python.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.edits.base import Edit, SiteEdit, Work, check_edits
from gemma4.edits.scope import Extent
from gemma4.errors import SiteError
from gemma4.interp.sites import Names, Site, SiteTable, canonical_name, names_of, reusable
from gemma4.narrow import is_iterable, is_sequence

Array: TypeAlias = NDArray[Any]
I32: TypeAlias = NDArray[np.int32]
HookFn: TypeAlias = Callable[[NDArray[np.float32], "HookPoint"], ArrayLike | None]
NamedFn: TypeAlias = tuple[Names, HookFn]
Hook: TypeAlias = "NamedFn | Edit | Nested"
SiteHooks: TypeAlias = list[tuple[Site, list[HookFn | SiteEdit]]]


NESTED_MARK = ".hook_sae_"  # after the site's name, in the names of sites inside an attached dictionary


class NaNWarning(RuntimeWarning):
    """An edit put NaN into the forward pass; reported once per site and model."""


@dataclass(frozen=True, slots=True, eq=False)
class HookPoint:
    """Place and time of a hook's call.

    name:       the site, e.g. "blocks.3.hook_mlp_out"
    layer:      its block, None for a site of the whole model
    sequence:   index of the sequence in the batch (0 for a single prompt)
    positions:  int64 [T], the sequence positions along the array's "T" axis; inside an encoder its rows, from 0
    medium:     inside an encoder: which picture, frame or recording, counted as the prompt's `runs` are, or as the list
                that was given to `Encoder.encode`
    """

    name: str
    layer: int | None
    sequence: int
    positions: NDArray[np.int64]
    medium: int = 0

    @property
    def start(self) -> int:
        """The first of `positions`: 0 in the prompt's pass, then the position of the token being decoded."""
        return int(self.positions[0])


class Nested(ABC):
    """A hook with sites of its own inside, as an attached dictionary has. Functions of other hooks can stand there.

    sites  name -> site, in the order in which they are passed; each begins with the name of a site of the model
    asked  the same, of sites that are passed only if they are named exactly, since they cost time and memory
    """

    sites: Mapping[str, Site]
    asked: Mapping[str, Site]

    @abstractmethod
    def pairs(self, inner: Mapping[str, Sequence[HookFn]]) -> list[NamedFn]:
        """The functions that it has on sites of the model, which call those of `inner` at its own."""

    @abstractmethod
    def unrecorded(self) -> Nested:
        """The same, which keeps nothing of what passes for its user."""


class Capture:
    """A function for sites inside a `Nested`: it keeps what passes, by sequence and name. There it gets features as
    they are, not as a dense array."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, tuple[NDArray[np.int64], Any]]] = {}

    def __call__(self, value: Any, point: HookPoint) -> None:
        self.kept.setdefault(point.sequence, {})[point.name] = (point.positions, value)


class NaNLog:
    """The sites where edits produced NaN, so that each is reported once."""

    def __init__(self) -> None:
        self.sites: list[str] = []

    def report(self, name: str) -> None:
        if name not in self.sites:
            self.sites.append(name)
            warnings.warn(f"an edit produced NaN at {name}; the run goes on with it", NaNWarning, stacklevel=3)


def has_nan(array: Array) -> bool:
    """min() carries a NaN through without allocating; the -inf of masked scores is not one."""
    return array.dtype.kind == "f" and array.size > 0 and bool(np.isnan(array.min()))


def bind_hooks(table: SiteTable, hooks: Iterable[Hook], *, stop_at_layer: int | None = None) -> SiteHooks:
    """Sites in forward order, each with its functions in the order in which they were given.

    Raises SiteError for a name that matches no site, TypeError for something that is not a (names, function) pair.
    """
    bound: dict[str, tuple[Site, list[HookFn | SiteEdit]]] = {}
    plain, inner = _without_nested(list(hooks), table, stop_at_layer)
    for hook in plain:
        if isinstance(hook, Edit):
            for part in hook.bound(table, stop_at_layer=stop_at_layer):
                bound.setdefault(part.site.name, (part.site, []))[1].append(part)
            continue
        for names, fn in hook.pairs(inner) if isinstance(hook, Nested) else [hook]:
            for site in table.select(names, stop_at_layer=stop_at_layer):
                bound.setdefault(site.name, (site, []))[1].append(fn)
    return [bound[name] for name in table if name in bound]


def joined(table: SiteTable, first: SiteHooks, then: SiteHooks) -> SiteHooks:
    """Both in forward order; at a site that both have, those of `first` act first."""
    found: dict[str, tuple[Site, list[HookFn | SiteEdit]]] = {}
    for site, acts in (*first, *then):
        found.setdefault(site.name, (site, []))[1].extend(acts)
    return [found[name] for name in table if name in found]


def _without_nested(
    hooks: list[Hook], table: SiteTable, stop_at_layer: int | None
) -> tuple[list[Hook], dict[str, list[HookFn]]]:
    """The hooks on sites of the model, and the functions on sites inside nested ones."""
    plain: list[Hook] = []
    inner: dict[str, list[HookFn]] = {}
    for hook in hooks:
        if isinstance(hook, Edit | Nested):
            plain.append(hook)
            continue
        names, fn = _checked_pair(hook)
        inside, names = apart(names, hooks, table, stop_at_layer=stop_at_layer)
        for name in inside:
            inner.setdefault(name, []).append(fn)
        if callable(names) or not inside or (is_iterable(names) and list(names)):
            plain.append((names, fn))
    return plain, inner


def apart(
    names: Names, hooks: Iterable[Hook], table: SiteTable, *, stop_at_layer: int | None = None
) -> tuple[list[str], Names]:
    """The chosen sites inside nested hooks, and the names that are left for the model. None chooses none inside.

    stop_at_layer: globs and predicates choose sites that are reached when blocks 0..n-1 run.
    Raises SiteError for a name of a site inside that none of them has, or two, or that is not reached; TypeError for
    what is no name.
    """
    names = reusable(names)
    nested = [hook for hook in hooks if isinstance(hook, Nested)]
    inner, asked = [name for hook in nested for name in hook.sites], [name for hook in nested for name in hook.asked]
    late = _late(nested, table, stop_at_layer)
    reached = [name for name in inner if name not in late]
    if names is None or callable(names):
        chosen = [name for name in reached if names is not None and names(name)]
        rest = names
    else:
        chosen, rest = list[str](), list[str]()
        for pattern in [names] if isinstance(names, str) else names:
            found = _inside(pattern, reached, inner + asked)
            chosen += found
            if not found or fnmatch.filter(table, pattern):
                rest.append(pattern)
    _check_inside(chosen, inner + asked, late, stop_at_layer)
    return list(dict.fromkeys(chosen)), rest


def _inside(pattern: object, inner: list[str], every: list[str]) -> list[str]:
    """The names that a pattern matches: as a glob those of `inner`. Raises SiteError where it can mean no site of a
    model."""
    if not isinstance(pattern, str):
        return []
    outer, mark, part = pattern.rpartition(NESTED_MARK)
    name = canonical_name(outer) + mark + part if mark else pattern
    found = [name] if name in every else fnmatch.filter(inner, name)
    if mark and not found:
        near = difflib.get_close_matches(pattern, every, n=4, cutoff=0.5) or inner
        known = f"closest: {', '.join(near)}" if near else "no dictionary is attached: use it in `with model.attach(…)`"
        raise SiteError(f"no site {pattern!r}; {known}")
    return found


def _late(nested: Iterable[Nested], table: SiteTable, stop_at_layer: int | None) -> set[str]:
    """The names of sites inside that a run of blocks 0..n-1 does not reach."""
    if stop_at_layer is None:
        return set()
    reached = {site.name for site in table.select(lambda _: True, stop_at_layer=stop_at_layer)}
    sites = [site for hook in nested for site in (*hook.sites.values(), *hook.asked.values())]

    def is_late(site: Site) -> bool:
        is_read = site.name.rpartition(NESTED_MARK)[0] in reached
        return not is_read or (site.layer is not None and site.layer >= stop_at_layer)

    return {site.name for site in sites if is_late(site)}


def _check_inside(chosen: list[str], every: list[str], late: set[str], stop_at_layer: int | None) -> None:
    for name in chosen:
        if name in late:
            raise SiteError(f"site {name!r} is not reached with stop_at_layer={stop_at_layer}")
        if every.count(name) > 1:
            raise SiteError(f"two dictionaries are attached at {name!r}: name its site with one of them attached")


def checked_hooks(hooks: object) -> list[Hook]:
    """The hooks as a list of pairs and edits; one edit is a list of one. Raises TypeError."""
    if isinstance(hooks, Edit):
        return [hooks]
    if isinstance(hooks, str) or not is_iterable(hooks):
        raise TypeError(f"hooks are pairs (site name, glob or predicate; function) in a list, got {hooks!r:.80}")
    return [hook if isinstance(hook, Edit | Nested) else _checked_pair(hook) for hook in hooks]


def check_hooks(hooks: SiteHooks, extent: Extent | Callable[[Site], Extent]) -> None:
    """Raise ValueError for an edit that cannot act on a prompt, or that contradicts another. Functions always can.

    extent: of all sites, or a function of the site.
    """
    edits = (act for _, acts in hooks for act in acts if isinstance(act, SiteEdit))
    check_edits(edits, (lambda _: extent) if isinstance(extent, Extent) else extent)


def _checked_pair(hook: Any) -> NamedFn:
    if not is_sequence(hook) or isinstance(hook, str) or len(hook) != 2 or not callable(hook[1]):
        raise TypeError(
            f"a hook is a pair (site name, glob or predicate; function) or an edit of gemma4.edits, got {hook!r}"
        )
    if hook[0] is None:
        raise TypeError('a hook needs a site name, glob or predicate; "*" means every site')
    return cast("NamedFn", (hook[0], hook[1]))


def hooks_of(hooks: Iterable[Hook], prefix: str = "") -> list[Hook]:
    """The hooks whose names begin with an encoder's prefix ("vision.", "audio."), or ("") those of the text model.

    Predicates of functions are called with every name of both.
    """
    chosen: list[Hook] = []
    for hook in hooks:
        if isinstance(hook, Edit | Nested):
            whole = None if prefix else hook  # an attached dictionary is of the text model
            part = hook.within(prefix) if isinstance(hook, Edit) else whole
            chosen += [] if part is None else [part]
            continue
        names, fn = _checked_pair(hook)
        names = names_of(names, prefix)
        if callable(names) or names:
            chosen.append((names, fn))
    return chosen


def works(
    site: Site,
    acts: list[HookFn | SiteEdit],
    point: HookPoint,
    log: NaNLog,
    taps_of: Callable[[SiteEdit], list[tuple[Work, I32 | None]]],
) -> Iterator[tuple[Work, I32 | None]]:
    """The engine's work at a site, in order: functions that follow each other are one call."""
    for are_edits, group in groupby(acts, lambda act: isinstance(act, SiteEdit)):
        if are_edits:
            for edit in cast("Iterator[SiteEdit]", group):
                yield from taps_of(edit)
        else:
            yield make_edit(site, cast("list[HookFn]", list(group)), point, log), None


def make_edit(site: Site, fns: Sequence[HookFn], point: HookPoint, log: NaNLog) -> Callable[[Array], Array]:
    """One callable for the engine that applies `fns` in turn, checks what they return and notes NaN."""

    def edit(array: Array) -> Array:
        already = has_nan(array)  # present before this edit
        for fn in fns:
            before = _face(array)
            result = fn(array, point)
            _check_face(array, before, site)
            if result is not None and result is not array:
                array = _checked_result(result, array, site)
        if not already and has_nan(array):
            log.report(site.name)
        return array

    return edit


def _face(array: Array) -> tuple[Any, ...]:
    """The properties of its array that a hook may not change, in the order of `_FACE`."""
    address, read_only = array.__array_interface__["data"]
    return array.shape, array.dtype, array.strides, address, read_only


_FACE = ("shape", "dtype", "strides", "memory", "writeable flag")


def _check_face(array: Array, before: tuple[Any, ...], site: Site) -> None:
    """The engine and the next hook rely on the array being unchanged except for its numbers."""
    after = _face(array)
    if after == before:
        return
    what, was, now = next(change for change in zip(_FACE, before, after, strict=True) if change[1] != change[2])
    shown = "" if what in ("memory", "writeable flag") else f" from {was} to {now}"
    raise ValueError(
        f"the hook on {site.name} changed the {what} of the array it was given{shown}; change the numbers in it, or "
        "return another array of the same shape"
    )


def _checked_result(result: Any, given: Array, site: Site) -> Array:
    array = np.asarray(result)
    if array.shape != given.shape:
        axes = ", ".join(str(dim) for dim in site.dims)
        raise ValueError(
            f"the hook on {site.name} returned shape {array.shape}, expected {given.shape} [{axes}]; "
            "return an array of the same shape, or edit in place and return None"
        )
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"the hook on {site.name} returned dtype {array.dtype}, expected {given.dtype}")
    # a copy: the engine must not write to an array that the hook may keep
    return np.array(array, dtype=given.dtype, order="C")


# (model, hooks) pairs that enclose the current call; context-local, so threads and async tasks do not see each other's
_ACTIVE: ContextVar[tuple[tuple[Any, tuple[Hook, ...]], ...]] = ContextVar("gemma4_active_hooks", default=())


class Activated(AbstractContextManager[None]):
    """While this is open, `active_hooks(model)` includes `hooks`, after those already there. It can be opened again."""

    def __init__(self, model: object, hooks: Iterable[Hook]) -> None:
        self._opened = model, tuple(hooks)

    def __enter__(self) -> None:
        _ACTIVE.set((*_ACTIVE.get(), self._opened))

    def __exit__(self, *_: object) -> None:
        """Close the last one of these; blocks that others opened meanwhile, as generators do, stay open."""
        active = _ACTIVE.get()
        last = max((i for i, opened in enumerate(active) if opened is self._opened), default=None)
        if last is not None:
            _ACTIVE.set((*active[:last], *active[last + 1 :]))


def bind_inside_active(model: object, table: SiteTable, hooks: Iterable[Hook]) -> SiteHooks:
    """`bind_hooks` of these after the open ones on the text model, for a variant of a run.

    Each call makes new functions for attached dictionaries, so prompts of one step do not share their state. Their
    records stay as they are: nobody could tell thousands of variants apart there.
    """
    outer = [hook.unrecorded() if isinstance(hook, Nested) else hook for hook in active_hooks(model)]
    return bind_hooks(table, [*hooks_of(outer), *hooks])


def active_hooks(model: object) -> list[Hook]:
    """The hooks of every open `Activated` block of this model, outermost first."""
    return [hook for owner, hooks in _ACTIVE.get() if owner is model for hook in hooks]
