# SPDX-License-Identifier: Apache-2.0
"""Experiments that many papers begin with: activation patching, head ablation, induction scores.

Each runs all of its variants of a prompt in few ragged steps. In `exact`, a variant's logits are those of a run by
itself, to the bit. Hooks, edits and dictionaries of open `with` blocks act in every variant, before its own edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.edits import Ablate, Add, Patch
from gemma4.edits.base import Edit
from gemma4.edits.scope import checked_where, listed
from gemma4.html import Picture, heat
from gemma4.html.picture import FEW, left_out
from gemma4.inputs import TextOrIds, as_ids
from gemma4.interp.cache import ActivationCache
from gemma4.interp.hooks import bind_inside_active
from gemma4.interp.lens import first_shown
from gemma4.interp.sites import GLOB
from gemma4.narrow import is_array, is_list_or_tuple
from gemma4.step import Prompt, run_step

if TYPE_CHECKING:
    from gemma4.model import Model
    from gemma4.sequence import Sequence

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
Metric: TypeAlias = Callable[[F32], float] | tuple[int | str, int | str]
Score: TypeAlias = Callable[[F32], float]
Chosen: TypeAlias = int | slice | Iterable[int] | None
What: TypeAlias = Literal["residual", "attention", "mlp", "ple", "heads", "experts"]
Variant: TypeAlias = "tuple[Sequence, I32, Seq[Edit]]"
T = TypeVar("T")
_SITES = {
    "residual": "hook_resid_pre",
    "attention": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "ple": "hook_ple_in",
    "heads": "attn.hook_z",
}
_ROWS_PER_STEP = 2048  # of all variants that run together; their keys and values are in memory meanwhile


@dataclass(frozen=True, repr=False)
class Grid:
    """A metric for each variant of a run.

    values   float32 [rows, columns]: the metric with the patch or ablation of that cell
    rows     names of the rows, "0", "1", ... for layers, "3.17" for head or expert 17 of layer 3
    columns  names of the columns: tokens of the positions, or heads
    clean    the metric of the run that the patches come from; of the plain run for ablations
    corrupt  the metric of the run that is patched; the same as `clean` for ablations
    across   the meaning of the columns: "position" or "head"
    down     the meaning of the rows: "layer", "layer.head" or "layer.expert"
    """

    values: F32
    rows: list[str]
    columns: list[str]
    clean: float
    corrupt: float
    across: str = "head"
    down: str = "layer"

    @property
    def recovered(self) -> F32:
        """(values - corrupt) / (clean - corrupt): 0 = the patch does nothing, 1 = it brings the clean run back.

        Raises ValueError where clean and corrupt are equal, as for ablations.
        """
        if self.clean == self.corrupt:
            raise ValueError(
                f"clean and corrupt both have the metric {self.clean:g}, so there is no share to recover: take `change`"
            )
        return (self.values - np.float32(self.corrupt)) / np.float32(self.clean - self.corrupt)

    @property
    def change(self) -> F32:
        """values - corrupt."""
        return self.values - np.float32(self.corrupt)

    def __repr__(self) -> str:
        size = f"{len(self.rows)} x {len(self.columns)} ({self.down} by {self.across})"
        values = f"{self.values.min():.4g} to {self.values.max():.4g}" if self.values.size else "none"
        return f"Grid: {size}, values {values}; clean {self.clean:.4g}, corrupt {self.corrupt:.4g}"

    def shown(self, recovered: bool | None = None) -> tuple[F32, str]:
        """The numbers that a picture shows, float32 [rows, columns], and their name: recovered, or for False change.

        recovered: None = the share, unless clean and corrupt are equal, which raise ValueError for True.
        """
        share = self.clean != self.corrupt if recovered is None else recovered
        return (self.recovered, "share of the clean run recovered") if share else (self.change, "change of the metric")

    def to_html(self, last: int | None = None, *, recovered: bool | None = None) -> Picture:
        """A table with a coloured cell for each variant; the numbers are said when a cell is pointed at.

        last: only that number of columns at the end, all if there are fewer. recovered: as for `shown`.
        Raises ValueError (last below 1).
        """
        values, name = self.shown(recovered)
        n = len(self.columns)
        first = first_shown(last, n)
        return heat(
            values[::-1, first:],
            [f"{row}" for row in reversed(self.rows)],
            self.columns[first:],
            title=f"{name[0].upper()}{name[1:]}, {self.down} by {self.across}",
            corner=f"{self.down} \\ {self.across}",
            small_print=left_out(n - first, n, f"{self.across}s"),
        )

    def _repr_html_(self) -> str:
        return self.to_html(min(FEW, len(self.columns)) or None).fragment()


def patching_grid(
    model: Model,
    clean: TextOrIds,
    corrupt: TextOrIds,
    metric: Metric,
    *,
    what: What | None = None,
    site: str | None = None,
    layers: Chosen = None,
    positions: Chosen = None,
) -> Grid:
    """Activation patching: run `corrupt` once for each layer and position with the activation of `clean` in that place.

        grid = patching_grid(model, "... Mary gave a book to", "... John gave a book to", (" John", " Mary"))
        plots.grid(grid)

    clean, corrupt  text or ids of equal length
    metric          function of the last position's logits, float32 [d_vocab]; or a pair of tokens (ids, or text that is
                    one token): the difference of their logits
    what            "residual" (the default), "attention", "mlp", "ple" (per-layer embeddings): a row for each layer;
                    "heads": a row for each head of each layer; "experts": a row for each expert that a token of either
                    run has, whose weighted output at that position becomes that of the clean run, 0 where it has none
    site            instead of `what`, a site of the block: "hook_resid_mid", "mlp.hook_post", ...
    layers          an int, a slice or a list; None = all that have the site; a slice takes those that have it
    positions       an int, a slice or a list; None = all. Negative layers and positions count from the end

    Positions before the patched one are computed once for all cells. Returns a `Grid` [rows, positions].
    Raises ValueError (unequal lengths, no such position, a slice that holds none), SiteError (no such site or layer, no
    experts in this model).
    """
    ids, others = aligned(model, corrupt, clean)
    score, where = metric_of(model, metric), _chosen(positions, len(ids), "positions")
    rows, down = _rows_of(model, ids, others, what, site, layers)
    with model.new_sequence(capacity=len(ids)) as base:
        before = score(last_logits(model, ids, base))
        cells = [(i, j) for j, position in enumerate(where) for i, row in enumerate(rows) if row.edit(position)]

        def variants() -> Iterator[Variant]:
            for j, of_position in groupby(cells, lambda cell: cell[1]):
                prefix = base.fork()
                prefix.rewind(where[j])
                for i, _ in of_position:
                    edit = rows[i].edit(where[j])
                    assert edit is not None
                    yield prefix.fork(), ids[prefix.length :], [edit]
                prefix.close()

        table = np.full((len(rows), len(where)), before, np.float32)
        for cell, value in zip(cells, scores_of(model, variants(), score), strict=True):
            table[cell] = value
    tokens = model.to_str_tokens(ids) if _has_tokenizer(model) else [str(p) for p in range(len(ids))]
    after = score(last_logits(model, others))
    return Grid(table, [row.label for row in rows], [tokens[p] for p in where], after, before, "position", down)


class _Row(NamedTuple):
    """A row of a grid of positions: its name, and its edit at a position; None where nothing would change."""

    label: str
    edit: Callable[[int], Edit | None]


def _rows_of(
    model: Model, corrupt: I32, clean: I32, what: What | None, site: str | None, layers: Chosen
) -> tuple[list[_Row], str]:
    """The rows of `patching_grid`, and their meaning."""
    if what is not None and (site is not None or what not in get_args(What)):
        raise ValueError(f"patching_grid takes site= or what= of {', '.join(get_args(What))}, got {what!r:.60}")
    if what == "experts":
        return _expert_rows(model, corrupt, clean, _layers_with(model, "moe.hook_out", layers)), "layer.expert"
    stem = _SITES.get(what or "residual", "") if site is None else site
    if GLOB.search(stem):
        raise ValueError(f"patching_grid patches one site of each layer, got site={stem!r:.60}")
    chosen = _layers_with(model, stem, layers)
    cache = model.run_with_cache(clean, [f"blocks.{layer}.{stem}" for layer in chosen], logits=None)[1]
    heads = range(model.engine_config["n_heads"]) if what == "heads" else (None,)

    def row(layer: int, head: int | None) -> _Row:
        def edit(position: int) -> Edit:
            return Patch(f"blocks.{layer}.{stem}", cache, head=head, pos=position)

        return _Row(str(layer) if head is None else f"{layer}.{head}", edit)

    return [row(layer, head) for layer in chosen for head in heads], "layer" if heads == (None,) else "layer.head"


def _expert_rows(model: Model, corrupt: I32, clean: I32, layers: list[int]) -> list[_Row]:
    names = [f"blocks.{layer}.moe.hook_expert_{what}" for layer in layers for what in ("ids", "out")]
    before, after = (model.run_with_cache(ids, names, logits=None)[1] for ids in (corrupt, clean))

    def row(layer: int, expert: int) -> _Row:
        block = f"blocks.{layer}.moe"
        chosen, outs = ([c[f"{block}.hook_expert_{what}"] for c in (before, after)] for what in ("ids", "out"))

        def edit(position: int) -> Edit | None:
            has = [ids[position] == expert for ids in chosen]
            if not np.any(has):
                return None
            old, new = (out[position][mask].sum(0) for out, mask in zip(outs, has, strict=True))
            return Add(f"{block}.hook_out", new - old, pos=position)

        return _Row(f"{layer}.{expert}", edit)

    pairs = [
        (layer, int(expert))
        for layer in layers
        for expert in np.unique([c[f"blocks.{layer}.moe.hook_expert_ids"] for c in (before, after)])
    ]
    return [row(layer, expert) for layer, expert in pairs]


def head_patching(model: Model, clean: TextOrIds, corrupt: TextOrIds, metric: Metric, *, layers: Chosen = None) -> Grid:
    """As `patching_grid`, with one head's attn.hook_z at all positions in each cell: [layers, heads]."""
    ids, others = aligned(model, corrupt, clean)
    cache = model.run_with_cache(others, "blocks.*.attn.hook_z", logits=None)[1]
    score = metric_of(model, metric)
    chosen, n_heads = _layers_with(model, "attn.hook_z", layers), model.engine_config["n_heads"]
    edits = [Patch(f"blocks.{i}.attn.hook_z", cache, head=head) for i in chosen for head in range(n_heads)]
    values = _table(model, ids, edits, score, n_heads)
    heads = [str(head) for head in range(n_heads)]
    before, after = score(last_logits(model, ids)), score(last_logits(model, others))
    return Grid(values, [str(x) for x in chosen], heads, after, before)


def head_ablations(
    model: Model,
    prompt: TextOrIds,
    metric: Metric,
    *,
    layers: Chosen = None,
    mean: ActivationCache | list[ActivationCache] | None = None,
) -> Grid:
    """The metric without each head in turn, float32 [layers, heads]: zero ablation, or to the mean of other caches.

    prompt, metric, layers: as for `patching_grid`. mean: caches that hold attn.hook_z of the layers.
    """
    ids, score = as_ids(model, prompt), metric_of(model, metric)
    plain = score(last_logits(model, ids))  # first, since it refuses open edits that cannot act on this prompt
    chosen, n_heads = _layers_with(model, "attn.hook_z", layers), model.engine_config["n_heads"]
    edits = [Ablate(head=(i, head), mean=mean) for i in chosen for head in range(n_heads)]
    values = _table(model, ids, edits, score, n_heads)
    return Grid(values, [str(x) for x in chosen], [str(head) for head in range(n_heads)], plain, plain)


def induction_scores(model: Model, *, period: int = 24, n_prompts: int = 4, seed: int = 0) -> F32:
    """How much each head attends to what followed the current token last time, float32 [layers, heads], 0 to 1.

    Random tokens are repeated once; the score is the mean attention from each token of the repetition to the token
    after its first occurrence (Olsson et al. 2022, "In-context Learning and Induction Heads"). An induction head has a
    score near 1. period: length of the random stretch, two of which and BOS fit into the context; n_prompts: of which
    the mean is taken.
    """
    first = [model.tokenizer.bos_id] if _has_tokenizer(model) and model.tokenizer.bos_id is not None else []
    checks.integer("period", period, 2, (model.context_length - len(first)) // 2)
    checks.integer("n_prompts", n_prompts, 1, 1 << 16)
    rng = np.random.default_rng(seed)
    blocks = [rng.choice(np.arange(8, model.n_token_ids), period, replace=False) for _ in range(n_prompts)]
    prompts = [np.concatenate([first, block, block]).astype(np.int32) for block in blocks]
    rows = len(first) + period + np.arange(period - 1)
    scores = np.zeros((model.n_layers, model.engine_config["n_heads"]), np.float32)
    for prompt in prompts:
        _, cache = model.run_with_cache(prompt, "blocks.*.attn.hook_pattern", logits=None)
        for layer in range(model.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
            scores[layer] += pattern[:, rows, rows - period + 1].mean(axis=-1) / n_prompts
    return scores


# -- variants of a run -------------------------------------------------------------------------------------------------


def whole_runs(model: Model, ids: I32, edits: Iterable[Seq[Edit]]) -> Iterator[Variant]:
    for some in edits:
        yield model.new_sequence(capacity=len(ids)), ids, some


def _table(model: Model, ids: I32, edits: Iterable[Edit], score: Score, width: int) -> F32:
    values = scores_of(model, whole_runs(model, ids, ([edit] for edit in edits)), score)
    return np.array(values, np.float32).reshape(-1, width)


def scores_of(model: Model, variants: Iterable[Variant], score: Score) -> list[float]:
    """The metric of each variant (sequence, new tokens, edits), in order; many run in one step. Open hooks act, too."""
    values: list[float] = []
    batch: list[Prompt] = []

    def run() -> None:
        try:
            values.extend(score(_row(output.logits)) for output in run_step(model, batch))
        finally:
            for prompt in batch:
                prompt.sequence.close()
            batch.clear()

    for sequence, ids, edits in variants:
        batch.append(Prompt(sequence, ids, logits="last", hooks=bind_inside_active(model, model.sites, edits)))
        if sum(len(prompt.ids) for prompt in batch) >= _ROWS_PER_STEP:
            run()
    if batch:
        run()
    return values


def in_batches(variants: Seq[T], n_rows: int) -> Iterator[list[T]]:
    """The variants of a prompt of n_rows tokens, as many at a time as run together."""
    size = max(1, _ROWS_PER_STEP // n_rows)
    for first in range(0, len(variants), size):
        yield list(variants[first : first + size])


def _row(logits: F32 | None) -> F32:
    assert logits is not None
    return logits[-1]


def last_logits(model: Model, ids: I32, sequence: Sequence | None = None) -> F32:
    return model.forward(ids, logits="last", sequence=sequence)[0]


def aligned(model: Model, first: TextOrIds, second: TextOrIds) -> tuple[I32, I32]:
    """The ids of two prompts of equal length. Raises ValueError."""
    ids, others = as_ids(model, first), as_ids(model, second)
    if len(ids) != len(others):
        raise ValueError(
            f"clean and corrupt have {len(others)} and {len(ids)} tokens: positions correspond only at equal lengths"
        )
    return ids, others


def metric_of(model: Model, metric: Metric) -> Score:
    if is_list_or_tuple(metric):
        if len(metric) != 2:
            raise TypeError(f"a metric is a function of logits or a pair of tokens, got {metric!r:.80}")
        right, wrong = (_token(model, token) for token in metric)
        return lambda logits: float(logits[right] - logits[wrong])
    if not callable(metric):
        raise TypeError(f"a metric is a function of logits or a pair of tokens, got {metric!r:.80}")

    def score(logits: F32) -> float:
        value: Any = metric(logits)
        try:
            return float(value)
        except (TypeError, ValueError):
            found = f"shape {list(value.shape)}" if is_array(value) else f"{value!r:.60}"
            raise TypeError(f"a metric returns one number for logits [{len(logits)}], got {found}") from None

    return score


def _token(model: Model, token: object) -> int:
    if isinstance(token, str):
        return model.to_single_token(token)
    return checks.integer("a token of the metric", token, 0, model.d_vocab - 1)


def _layers_with(model: Model, site: str, layers: Chosen) -> list[int]:
    having = [s.layer for s in model.sites.select(f"blocks.*.{site}") if s.layer is not None]
    if layers is None:
        return having
    chosen = _numbers(layers, model.n_layers, "layers")
    if isinstance(layers, slice):
        return [layer for layer in chosen if layer in having]
    _ = [model.sites[f"blocks.{layer}.{site}"] for layer in chosen]  # raises SiteError
    return chosen


def _chosen(where: Chosen, n: int, what: str) -> list[int]:
    chosen = _numbers(slice(None) if where is None else where, n, what)
    for position in chosen:
        if not 0 <= position < n:
            raise ValueError(f"{what}: there is no {position}, only 0 to {n - 1}")
    return chosen


def _numbers(where: int | slice | Iterable[int], n: int, what: str) -> list[int]:
    """Numbers as they were given, those from -n to -1 counted from the end n; of a slice those below n."""
    checked = checked_where(where, what)
    if isinstance(checked, slice):
        chosen = list(range(n)[checked])
        if not chosen:
            raise ValueError(f"{what}: {checked} holds none of 0 to {n - 1}")
        return chosen
    return [number + n if -n <= number < 0 else number for number in listed(checked) or ()]


def _has_tokenizer(model: Model) -> bool:
    return model.checkpoint.tokenizer_path is not None
