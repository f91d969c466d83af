# SPDX-License-Identifier: Apache-2.0
"""Edits by their names in the literature: patching, steering, ablation, knocking out attention, choosing experts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.edits.arithmetic import OnSites, Scale, Set, checked_sites, finite, frozen, names_within, refuse_infinite
from gemma4.edits.base import Edit, Routing, SiteEdit, Source
from gemma4.edits.scope import Checked, Where, checked_where, listed
from gemma4.interp.sites import ENCODER_PREFIXES, Names, Site, SiteTable
from gemma4.narrow import is_integer, is_list_or_tuple

F32: TypeAlias = NDArray[np.float32]
Layers: TypeAlias = int | Iterable[int] | None
End: TypeAlias = Where | str  # of an edge
_MASKED = np.full(1, -math.inf, np.float32)  # a score whose softmax is 0


@runtime_checkable
class Cache(Protocol):
    """The face of an `ActivationCache` that edits and dictionaries use."""

    positions: NDArray[np.int64]

    def __getitem__(self, name: str, /) -> F32: ...
    def __contains__(self, name: object, /) -> bool: ...


def _positions_axis(site: Site) -> int:
    """The axis of positions, or of key positions where there is no other."""
    return site.dims.index(site.rows or "S")


@dataclass(frozen=True)
class FromPrompt:
    """As the value of a `Patch`: what another prompt of the same batch has at that site, in the same step.

        with model.edit(Patch("blocks.3.hook_resid_post", FromPrompt(0), pos=5)):
            clean, patched = model.forward([clean_prompt, corrupt_prompt])

    prompt  its index in the batch. Its own edits of the site come first: the value is the one that a capture shows.

    While generating, a prompt that cannot take a value ends with the text that it has, as "cancelled", and a warning
    says why; mostly prompt i ended before. The others go on.
    """

    prompt: int

    def __post_init__(self) -> None:
        given = cast(object, self.prompt)
        if not is_integer(given) or given < 0:
            raise ValueError(f"FromPrompt: the index of a prompt of the batch, from 0 on, got {given!r:.60}")


@dataclass(frozen=True, eq=False)
class Patch(OnSites):
    """x = value, taken from another run.

    value       an `ActivationCache`; an array as for `Set`; or `FromPrompt(i)`, what prompt i of the same batch has in
                the same step
    source_pos  positions in the cache or in prompt i, as many as `pos` names, in its order; None = the same. Negative
                ones count from the cache's end, or from that of prompt i; so does a slice as `pos`, in both prompts.

    pos=None means every position that the cache holds. From a prompt, it means all positions of a step, as many as
    prompt i has; and prompts=None means all but prompt i. No prompt may take from one that takes from it.
    """

    value: Cache | FromPrompt | ArrayLike
    source_pos: Where = field(default=None, kw_only=True)

    overwrites = True

    def __post_init__(self) -> None:
        super().__post_init__()
        source = checked_where(self.source_pos, "source_pos")
        if isinstance(self.value, FromPrompt):
            self._check_prompt(self.value.prompt)
        elif not isinstance(self.value, Cache):
            if source is not None:
                raise ValueError("Patch: source_pos needs a cache as value; of an array give the rows themselves")
            self._set("value", frozen(self.value, "Patch"))
            return
        if isinstance(source, slice) or (isinstance(self.where, slice) and isinstance(self.value, Cache)):
            raise TypeError("Patch: with a cache, pos and source_pos must be positions, not slices")
        if self.where is None and source is not None:
            self._set("pos", source)
        elif self.where is None and isinstance(self.value, Cache):
            self._set("pos", tuple(int(p) for p in self.value.positions))
        self._set("source_pos", source)
        if source is not None and len(listed(source) or ()) != len(listed(self.where) or ()):
            raise ValueError(
                f"Patch: source_pos names {len(listed(source) or ())} positions, pos {len(listed(self.where) or ())}"
            )

    def _check_prompt(self, prompt: int) -> None:
        if self.prompt_set is not None and self.prompt_set <= {prompt}:
            raise ValueError(f"{self}: prompt {prompt} would take from itself; prompts= names those that take")

    def concerns(self, prompt: int) -> bool:
        return super().concerns(prompt) and not (isinstance(self.value, FromPrompt) and prompt == self.value.prompt)

    def check_prompts(self, n_prompts: int | None) -> None:
        super().check_prompts(n_prompts)
        if not isinstance(self.value, FromPrompt) or n_prompts is None:
            return
        if self.value.prompt >= n_prompts:
            raise ValueError(f"{self}: there is no prompt {self.value.prompt} to take from, only 0 to {n_prompts - 1}")
        if n_prompts == 1:
            raise ValueError(f"{self}: there is no other prompt to take from prompt 0")

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        if isinstance(self.value, FromPrompt):
            source, parts = (
                Source(self.value.prompt, cast(Checked, self.source_pos)),
                self.parts_of(table, stop_at_layer, "set"),
            )
            if any(part.site.name.startswith(ENCODER_PREFIXES) for part in parts):
                raise ValueError(f"{self}: encoders run before the step; capture `cache.media` and give the array")
            return [replace(part, source=source) for part in parts]
        if not isinstance(self.value, Cache):
            same = Set(self.site, self.value, head=self.head, index=self.index, pos=self.where)
            return [replace(part, edit=self) for part in same.bound(table, stop_at_layer=stop_at_layer)]
        parts = self.parts_of(table, stop_at_layer, "set")
        return [replace(part, values=self._rows(part), rows=listed(self.where)) for part in parts]

    def _rows(self, part: SiteEdit) -> F32:
        """The rows to write at `pos`, cut to the part that is edited."""
        cache, site = cast(Cache, self.value), part.site
        array, axis = _held(cache, site, self), _positions_axis(site)
        held = [int(p) for p in (cache.positions if site.rows else range(array.shape[axis]))]
        index = {p: i for i, p in enumerate(held)}
        end = held[-1] + 1 if held else 0
        source = [p + end if p < 0 else p for p in listed(self.source_pos) or listed(self.where) or ()]
        missing = [p for p in source if p not in index]
        if missing:
            raise ValueError(f"{self}: the cache holds no position {missing[0]} of {site.name}")
        array = array.take([index[p] for p in source], axis=axis)
        for axis, (first, end) in part.spans:
            array = array.take(range(first, end), axis=axis)
        return frozen(array, str(self))


@dataclass(frozen=True, eq=False)
class Steer(Edit):
    """x += scale * direction at the end of a block: activation steering.

    direction  float32 [d_model]
    layer      the block or blocks
    at         another site of the block to add it to
    """

    direction: ArrayLike
    layer: int | Iterable[int]
    scale: float = 1.0
    at: str = field(default="hook_resid_post", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("direction", frozen(self.direction, "Steer"))
        self._set("layer", _checked_layers(self.layer))
        self._set("scale", finite(self.scale, "Steer: scale"))
        if cast(F32, self.direction).ndim != 1:
            raise ValueError(f"Steer: a direction is [d_model], got shape {cast(F32, self.direction).shape}")

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        names = [f"blocks.{layer}.{self.at}" for layer in listed(self.layer) or ()]
        values, sites = cast(F32, self.direction), table.select(names, stop_at_layer=stop_at_layer)
        for site in sites:
            refuse_infinite(self, site, values)
        return [SiteEdit(self, site, "add", factor=self.scale, values=values) for site in sites]


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """x = 0, the mean, or what another run has: zero, mean and resample ablation.

        Ablate("blocks.3.hook_mlp_out")
        Ablate(head=(2, 3), mean=[cache, other_cache])
        Ablate("blocks.*.hook_attn_out", resample=cache)

    site      what to ablate; or head: (layer, head), whose part of attn.hook_z it is
    mean      caches of other runs: their mean over all positions; or the mean itself, an array
    resample  the cache of another run, whose value at the same position is used
    """

    site: Names = None
    head: tuple[int, int] | None = field(default=None, kw_only=True)
    mean: Cache | Seq[Cache] | ArrayLike | None = field(default=None, kw_only=True)
    resample: Cache | None = field(default=None, kw_only=True)

    overwrites = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("site", checked_sites(self.site, "Ablate"))
        if (self.site is None) == (self.head is None):
            raise TypeError("Ablate needs either a site or head=(layer, head)")
        if self.mean is not None and self.resample is not None:
            raise TypeError("Ablate takes mean= or resample=, not both")
        if self.head is not None:
            pair = listed(checked_where(self.head, "head")) or ()
            if len(pair) != 2:
                raise TypeError(f"head must be a pair (layer, head), got {self.head!r}")
            self._set("head", pair)
        if isinstance(self.resample, Cache):
            if self.where is None:
                self._set("pos", tuple(int(p) for p in self.resample.positions))
        elif self.resample is not None:
            raise TypeError(f"resample must be an ActivationCache, got {type(self.resample).__name__}")
        if self.mean is not None and not _caches(self.mean):
            self._set("mean", frozen(self.mean, "Ablate"))

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        layer, head = self.head or (0, None)
        names = self.site if head is None else f"blocks.{layer}.attn.hook_z"
        if self.resample is not None:
            parts = Patch(names, self.resample, head=head, pos=self.where).bound(table, stop_at_layer=stop_at_layer)
        else:
            parts = Set(names, 0.0, head=head).bound(table, stop_at_layer=stop_at_layer)
        parts = [replace(part, edit=self) for part in parts]
        return parts if self.mean is None else [self._at_mean(part) for part in parts]

    def within(self, prefix: str) -> Edit | None:
        if self.site is None:
            return super().within(prefix)
        names = names_within(self.site, prefix)
        return None if names is None else self if names is self.site else replace(self, site=names)

    def _at_mean(self, part: SiteEdit) -> SiteEdit:
        caches, site = _caches(self.mean), part.site
        if not caches:
            refuse_infinite(self, site, cast(F32, self.mean))
            return replace(part, values=cast(F32, self.mean))
        if "S" in site.dims and site.rows:
            raise ValueError(f"{self}: {site.name} has one value for each pair of positions, of which there is no mean")
        axis = _positions_axis(site)
        rows = np.concatenate([_held(cache, site, self) for cache in caches], axis=axis)
        mean = rows.mean(axis=axis, keepdims=True, dtype=np.float64)
        for along, (first, end) in part.spans:
            mean = mean.take(range(first, end), axis=along)
        return replace(part, values=frozen(mean, str(self)))

    def __str__(self) -> str:
        return f"Ablate(head={self.head})" if self.head else f"Ablate({self.site!r})"


def _held(cache: Cache, site: Site, edit: Edit) -> F32:
    """A cache's array of a site. Raises ValueError if there is none, or if its shape is not that of the site."""
    if site.name not in cache:
        raise ValueError(f"{edit}: {_absent(site)}")
    array, rows = cache[site.name], len(cache.positions)
    expected = [rows if dim == site.rows else dim for dim in site.dims]
    fits = (isinstance(dim, str) or dim == size for dim, size in zip(expected, array.shape, strict=False))
    if len(expected) != array.ndim or not all(fits):
        raise ValueError(
            f"{edit}: the cache's {site.name} has shape {array.shape} at {rows} positions, expected "
            f"[{', '.join(map(str, expected))}]"
        )
    return array


def _absent(site: Site) -> str:
    if site.name.startswith(ENCODER_PREFIXES):
        return f"a cache has {site.name} for each medium; give the array, cache.media[0][{site.name!r}]"
    return f"the cache holds no {site.name}; capture it with names="


def _caches(value: object) -> list[Cache]:
    if isinstance(value, Cache):
        return [value]
    if not is_list_or_tuple(value):
        return []
    caches = [one for one in value if isinstance(one, Cache)]
    return caches if len(caches) == len(value) else []


@dataclass(frozen=True, eq=False)
class KnockOut(Edit):
    """No attention along an edge: the scores of these queries for these keys are -inf before the softmax.

        KnockOut(edge=("pos 9", "pos 5"), layers=range(4))      # position 9 does not see position 5
        KnockOut(edge=(-1, slice(0, 4)), heads=[2])             # the last token does not see the first four

    edge    (query positions, key positions), each as `pos`, or text: "pos 5", "pos 5-9". As text, they may come in
            either order, as an edge of a graph does: only the later position sees the earlier one.
    layers  None = all
    heads   None = all

    Keys that a query cannot see anyway (later ones, and those outside a sliding window) are unaffected. Each query must
    keep a key, else ValueError: attention to nothing is NaN.
    """

    edge: tuple[End, End]
    layers: Layers = None
    heads: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        if not is_list_or_tuple(self.edge) or len(self.edge) != 2:
            raise TypeError(f"edge must be a pair (query positions, key positions), got {self.edge!r}")
        if self.pos is not None:
            raise TypeError("KnockOut has its positions in edge, not in pos")
        query, key = (_parsed(end) for end in self.edge)
        if all(isinstance(end, str) for end in self.edge) and _is_earlier(query, key):
            query, key = key, query
        self._set("pos", query)
        super().__post_init__()
        self._set("edge", (self.where, checked_where(key, "a key position")))
        self._set("layers", _checked_layers(self.layers))
        self._set("heads", checked_where(self.heads, "heads"))
        if _is_earlier(*self.edge):
            raise ValueError(f"{self}: no query sees a later key, so nothing would change; edge is (query, key)")

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        names = _in_layers("attn.hook_attn_scores", self.layers)
        sites = OnSites(names, head=self.heads).parts_of(table, stop_at_layer, "set")
        keys = slice(None) if self.edge[1] is None else cast(Checked, self.edge[1])
        return [
            replace(part, edit=self, values=_MASKED, keys=keys, window=table.window(cast(int, part.site.layer)))
            for part in sites
        ]

    def __str__(self) -> str:
        return f"KnockOut(edge={self.edge})"


_POSITIONS = re.compile(r"\s*pos\s+(-?\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*")
_MOST_POSITIONS = 1 << 20  # in a text; more than any model's context


def _parsed(end: End) -> Where:
    if not isinstance(end, str):
        return end
    match = _POSITIONS.fullmatch(end)
    if not match:
        raise ValueError(f'an end of an edge is positions or text like "pos 5" or "pos 5-9", got {end!r}')
    first = int(match[1])
    if match[2] is None:
        return first
    named = range(first, int(match[2]) + 1)
    if len(named) > _MOST_POSITIONS:
        raise ValueError(f"{end!r} names {len(named)} positions, more than any model has ({_MOST_POSITIONS})")
    return named


def _is_earlier(query: Where, key: Where) -> bool:
    """Whether all queries come before all keys, so that none sees one."""
    queries, keys = (listed(checked_where(end, "an edge")) for end in (query, key))
    if not queries or not keys:
        return False
    return min(queries) >= 0 and max(queries) < min(keys)


@dataclass(frozen=True, eq=False)
class OfExperts(Edit):
    """The base of edits of the router's choice.

    experts  one index or several; layers  None = all that have experts
    """

    experts: int | Iterable[int]
    layers: Layers = None

    def __post_init__(self) -> None:
        super().__post_init__()
        experts = checked_where(self.experts, "experts")
        if not listed(experts):
            raise TypeError(f"experts must be one index or several, got {self.experts!r}")
        self._set("experts", experts)
        self._set("layers", _checked_layers(self.layers))

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        names = _in_layers("moe.hook_router_logits", self.layers)
        return [self._on(site, table) for site in table.select(names, stop_at_layer=stop_at_layer)]

    def _on(self, site: Site, table: SiteTable) -> SiteEdit:
        n_experts = int(site.dims[-1])
        top_k = int(table[f"blocks.{site.layer}.moe.hook_expert_ids"].dims[-1])
        wrong = [expert for expert in listed(self.experts) or () if not -n_experts <= expert < n_experts]
        if wrong:
            raise ValueError(f"{self}: {site.name} has experts 0 to {n_experts - 1}, got {wrong[0]}")
        named = frozenset(expert % n_experts for expert in listed(self.experts) or ())
        routing = self._routing(named, n_experts, top_k)
        mask = np.zeros(n_experts, np.float32)  # to add to the logits
        mask[list(routing.barred)] = -math.inf
        return SiteEdit(self, site, "add", values=mask, routing=routing)

    def _routing(self, named: frozenset[int], n_experts: int, top_k: int) -> Routing:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ForbidExperts(OfExperts):
    """The router cannot choose these experts: their logits are -inf before its softmax.

    experts  one index or several; layers  None = all that have experts
    """

    def _routing(self, named: frozenset[int], n_experts: int, top_k: int) -> Routing:
        if n_experts - len(named) < top_k:
            raise ValueError(f"{self}: {len(named)} of {n_experts} are forbidden, but a token needs {top_k}")
        return Routing(n_experts, top_k, named)


@dataclass(frozen=True, eq=False)
class ForceExperts(OfExperts):
    """The router chooses exactly these experts: the logits of all others are -inf before its softmax.

        ForceExperts([3, 17], layers=2, pos=-1)

    experts  at most as many as a token has (`config.top_k_experts`); layers  None = all that have experts

    Their weights follow the model's own rule: the router's probabilities of the forced experts divided by their sum,
    each times its learned scale. With fewer experts than a token has, the sum is over these, and the other choices of
    `moe.hook_expert_ids` have the weight 0.
    """

    def _routing(self, named: frozenset[int], n_experts: int, top_k: int) -> Routing:
        if len(named) > top_k:
            raise ValueError(
                f"{self}: {len(named)} experts are forced, but a token has {top_k}; to let the router choose among "
                "some, forbid the others with ForbidExperts"
            )
        return Routing(n_experts, top_k, frozenset(range(n_experts)) - named, named)


@dataclass(frozen=True, eq=False)
class ScalePerLayerEmbedding(Edit):
    """A block's per-layer embedding times a factor; 0 takes it away. layers: None = all."""

    factor: float
    layers: Layers = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("factor", finite(self.factor, "ScalePerLayerEmbedding: factor"))
        self._set("layers", _checked_layers(self.layers))

    def bound(self, table: SiteTable, *, stop_at_layer: int | None = None) -> list[SiteEdit]:
        scale = Scale(_in_layers("hook_ple_in", self.layers), self.factor)
        return [replace(part, edit=self) for part in scale.bound(table, stop_at_layer=stop_at_layer)]


def _in_layers(stem: str, layers: Layers) -> Names:
    """A site in chosen layers; None = all that have it."""
    chosen = listed(layers)
    return f"blocks.*.{stem}" if chosen is None else [f"blocks.{layer}.{stem}" for layer in chosen]


def _checked_layers(layers: object) -> int | tuple[int, ...] | None:
    checked = checked_where(layers, "layers")
    if isinstance(checked, slice) or min(listed(checked) or (0,)) < 0:
        raise ValueError(f"layers must be whole numbers from 0 on, or None, got {layers!r}")
    return checked
