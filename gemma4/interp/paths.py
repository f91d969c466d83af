# SPDX-License-Identifier: Apache-2.0
"""Path patching: the effect of one component on another along the residual stream alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma4.edits import Patch
from gemma4.edits.scope import Where, checked_where
from gemma4.inputs import TextOrIds
from gemma4.interp.cache import ActivationCache
from gemma4.interp.experiments import Metric, aligned, in_batches, last_logits, metric_of, scores_of, whole_runs
from gemma4.interp.hooks import SiteHooks, bind_hooks, bind_inside_active, joined
from gemma4.interp.sites import Site
from gemma4.narrow import is_array, is_integer, is_iterable, is_list_or_tuple
from gemma4.step import Prompt, run_step

if TYPE_CHECKING:
    from gemma4.model import Model

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
Sender: TypeAlias = tuple[int, int] | str
Receiver: TypeAlias = str | tuple[str, int]
T = TypeVar("T")
_OUTPUTS = ("hook_embed", "hook_attn_out", "hook_mlp_out", "hook_ple_out")  # what is added to the residual stream


@dataclass(frozen=True, repr=False)
class PathEffects:
    """A metric for each sender, whose direct paths to the receivers carry what it has in the corrupt run.

    values   float32 [n]
    senders  n names: "3.2" is head 2 of layer 3, others are sites
    clean    the metric of the clean run
    corrupt  that of the corrupt run
    """

    values: F32
    senders: list[str]
    clean: float
    corrupt: float

    def __repr__(self) -> str:
        largest = np.argsort(-np.abs(self.change), kind="stable")[:4]
        found = ", ".join(f"{self.senders[i]} {self.values[i]:.4g}" for i in largest)
        runs = f"clean {self.clean:.4g}, corrupt {self.corrupt:.4g}"
        return f"PathEffects: {len(self.senders)} senders; {runs}; furthest from clean: {found}"

    @property
    def change(self) -> F32:
        """values - clean."""
        return self.values - np.float32(self.clean)

    @property
    def share(self) -> F32:
        """(values - clean) / (corrupt - clean): 1 = the paths explain the whole difference of the runs.

        Raises ValueError where clean and corrupt are equal.
        """
        if self.clean == self.corrupt:
            raise ValueError(
                f"clean and corrupt both have the metric {self.clean:g}, so there is no share: take `change`"
            )
        return self.change / np.float32(self.corrupt - self.clean)


class _Path(NamedTuple):
    """A sender with the open hooks and what is written to it, and the outputs behind it, held at their clean values."""

    name: str
    hooks: SiteHooks
    held: list[str]


def path_patching(
    model: Model,
    clean: TextOrIds,
    corrupt: TextOrIds,
    sender: Sender | Iterable[Sender] | None,
    receivers: Receiver | Iterable[Receiver],
    metric: Metric,
    *,
    pos: Where = None,
) -> PathEffects:
    """Path patching (Goldowsky-Dill et al. 2023; Wang et al. 2022): the direct effect of a sender on receivers.

        path_patching(model, clean, corrupt, (3, 2), ("blocks.5.attn.hook_q", 1), (" Mary", " John")).change
        path_patching(model, clean, corrupt, None, "blocks.9.hook_resid_post", metric)   # on the logits, of each

    clean, corrupt  text or ids of equal length
    sender     (layer, head), or the site of an output: "blocks.3.hook_mlp_out", "hook_attn_out", "hook_ple_out" or
               "hook_embed"; several; or None: every head, MLP and per-layer embedding before the last receiver
    receivers  sites that the sender's change is to reach: a name or glob, a pair (site, head), or several of them. The
               input of a component, as "blocks.5.mlp.hook_in" or "blocks.5.attn.hook_q", or a residual stream
    metric     as for `patching_grid`
    pos        positions of the sender to patch; None = all

    Pairs may be NumPy's: the rows of an array [n, 2], as `np.argwhere` gives them, are senders.
    Two runs for each sender, both on `clean`. In the first, the sender has its corrupt activation, and every output
    that is added to the residual stream after it is held at its clean value; so its change reaches the receivers
    directly, through norms and layer scalars. In the second, the receivers have the values that they had in the first,
    and everything else runs on. Many senders run in few steps; in `exact` each value is that of runs by themselves.
    Open hooks and edits act in all of these runs. A receiver before a sender has its clean value.

    Raises ValueError (unequal lengths, a sender or receiver that is none, a sender without a receiver after it),
    SiteError.
    """
    ids, others = aligned(model, clean, corrupt)
    score, sites = metric_of(model, metric), _receivers(model, receivers)
    last = max(list(model.sites).index(site.name) for site, _ in sites)
    names = [name for name in list(model.sites)[:last] if model.sites[name].stem in _OUTPUTS]
    cache = model.run_with_cache(ids, names, logits=None)[1]
    corrupt_cache = model.run_with_cache(others, [*names, "blocks.*.attn.hook_z"], logits=None)[1]
    paths = list(_paths(model, sender, corrupt_cache, last, checked_where(pos, "pos")))
    hold = bind_hooks(model.sites, [Patch(name, cache) for name in names])
    values = list[float]()
    for some in in_batches(paths, len(ids)):
        found = _reach(model, ids, some, hold, [site for site, _ in sites])
        edits = [[Patch(site.name, one, head=head) for site, head in sites] for one in found]
        values += scores_of(model, whole_runs(model, ids, edits), score)
    plain = [score(last_logits(model, given)) for given in (ids, others)]
    return PathEffects(np.array(values, np.float32), [path.name for path in paths], *plain)


def _receivers(model: Model, receivers: object) -> list[tuple[Site, int | None]]:
    """Each site with the head that is to receive, or None for all of it."""
    found: list[tuple[Site, int | None]] = []
    for one in [receivers] if isinstance(receivers, str) or _pair(receivers, str) else _listed(receivers):
        name, head = _pair(one, str) or (_name(one), None)
        found += [(site, head) for site in model.sites.select([name])]
    outputs = [site.name for site, _ in found if site.stem in _OUTPUTS]
    if outputs:
        raise ValueError(
            f"{outputs[0]} is the output of a component, which is held at its clean value; name what the component "
            'reads, as "blocks.5.mlp.hook_in" or "blocks.5.attn.hook_q", or a residual stream'
        )
    if not found:
        raise ValueError("there are no receivers")
    return found


def _paths(model: Model, sender: object, cache: ActivationCache, last: int, pos: Where) -> Iterator[_Path]:
    """Each sender's edit, and the outputs after it."""
    order = {name: i for i, name in enumerate(model.sites)}
    outputs = [name for name, site in model.sites.items() if site.stem in _OUTPUTS and order[name] < last]
    if sender is None:
        senders: list[object] = [*_heads_before(model, order, last)]
        senders += [name for name in outputs if model.sites[name].stem in ("hook_mlp_out", "hook_ple_out")]
    else:
        senders = [sender] if isinstance(sender, str) or _pair(sender, int) else _listed(sender)
    for one in senders:
        layer, head = _pair(one, int) or (0, None)
        name = model.sites[_name(one) if head is None else f"blocks.{layer}.attn.hook_z"].name
        output = name if head is None else f"blocks.{layer}.hook_attn_out"
        if model.sites[output].stem not in _OUTPUTS:
            raise ValueError(f"a sender is (layer, head) or the site of an output, {', '.join(_OUTPUTS)}; got {one!r}")
        if order[name] >= last:
            raise ValueError(f"no receiver comes after the sender {one!r}, so no path leads from it to one")
        bound = bind_inside_active(model, model.sites, [Patch(name, cache, head=head, pos=pos)])
        hooks = [(site, acts) for site, acts in bound if order[site.name] <= last]
        held = [other for other in outputs if order[other] > order[output]]
        yield _Path(name if head is None else f"{layer}.{head}", hooks, held)


def _heads_before(model: Model, order: dict[str, int], last: int) -> list[tuple[int, int]]:
    layers = [layer for layer in range(model.n_layers) if order[f"blocks.{layer}.attn.hook_z"] < last]
    return [(layer, head) for layer in layers for head in range(model.engine_config["n_heads"])]


def _reach(model: Model, ids: I32, paths: list[_Path], hold: SiteHooks, sites: list[Site]) -> list[ActivationCache]:
    """The receivers' values with each sender patched and all else on its way held."""
    in_blocks = [site.layer for site in sites if site.layer is not None]
    stop = max(in_blocks) + 1 if len(in_blocks) == len(sites) else None
    prompts: list[Prompt] = []
    try:
        for path in paths:
            hooks = joined(model.sites, path.hooks, [held for held in hold if held[0].name in path.held])
            sequence = model.new_sequence(capacity=len(ids))
            prompts.append(Prompt(sequence, ids, logits=None, capture=sites, hooks=hooks))
        outputs = run_step(model, prompts, stop_at_layer=stop)
    finally:
        for prompt in prompts:
            prompt.sequence.close()
    return [output.cache for output in outputs if output.cache is not None]


def _pair(value: object, first: type[T]) -> tuple[T, int] | None:
    """A pair of such a value and an integer, Python's or NumPy's; None for anything else."""
    plain: object = value.tolist() if is_array(value) else value
    if not is_list_or_tuple(plain) or len(plain) != 2 or not is_integer(plain[1]):
        return None
    one: object = int(plain[0]) if is_integer(plain[0]) else plain[0]
    return (one, int(plain[1])) if isinstance(one, first) else None


def _listed(value: object) -> list[object]:
    return list(value) if is_iterable(value) else [_name(value)]


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"senders are (layer, head) or sites, receivers sites or (site, head); got {value!r:.80}")
    return value
