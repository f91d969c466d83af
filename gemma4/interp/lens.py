# SPDX-License-Identifier: Apache-2.0
"""The logit lens: next-token predictions from each layer's residual stream through the model's output head.

nostalgebraist, "interpreting GPT: the logit lens" (2020). Final norm, head and softcap are the model's own. Computed in
NumPy in blocks of the vocabulary, so that neither a float32 head nor all logits of all layers are ever in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.html import Picture, heat
from gemma4.html.markup import number, visible
from gemma4.html.picture import FEW, left_out
from gemma4.interp.cache import ActivationCache
from gemma4.memory import ready_blas

if TYPE_CHECKING:
    from gemma4.model import Model
    from gemma4.step import Positions

F32 = NDArray[np.float32]
_BLOCK_ROWS = 8192  # rows of the head converted to float32 at a time: 50 MB for d_model 1536

LENS_SITES = ["blocks.0.hook_resid_pre", "blocks.*.hook_resid_post"]


@dataclass(frozen=True, repr=False)
class LogitLens:
    """Most likely next tokens read off the residual stream, before the first block and after each.

    labels:     n names, "embed", "0", "1", ... (the block whose output it is)
    positions:  int64 [pos]
    ids:        int32 [n, pos, k], most likely first
    probs:      float32 [n, pos, k]
    tokens:     text of `ids`, n lists of pos lists of k
    target_probs:  float32 [n, pos], the probability of the target token, if one was given
    norms:      float32 [n, pos], length of the residual vector
    prompt:     pos texts of the tokens at the positions
    """

    labels: list[str]
    positions: NDArray[np.int64]
    ids: NDArray[np.int32]
    probs: F32
    tokens: list[list[list[str]]]
    target_probs: F32 | None
    norms: F32
    prompt: list[str] = field(default_factory=list[str])

    def __repr__(self) -> str:
        rows, positions, best = self.ids.shape
        found = f"{self.tokens[-1][-1][0]!r} ({self.probs[-1, -1, 0]:.3f})" if positions and rows else "nothing"
        return f"LogitLens: {rows} rows, {positions} positions, the best {best}; last of all: {found}"

    def to_html(self, last: int | None = None) -> Picture:
        """A table of layers by positions: the likeliest token, its probability as colour, the others when pointed at.

        last: only that number of positions at the end, all if there are fewer. Raises ValueError (last below 1).
        """
        n = len(self.positions)
        kept = range(first_shown(last, n), n)
        rows = range(len(self.labels) - 1, -1, -1)  # the last block on top
        prompt = self.prompt or [str(position) for position in self.positions]
        return heat(
            self.probs[rows.start :: -1, kept.start :, 0],
            [self.labels[row] for row in rows],
            [prompt[at] for at in kept],
            words=[[self.tokens[row][at][0] for at in kept] for row in rows],
            tips=[[self._tip(row, at, prompt[at]) for at in kept] for row in rows],
            title="Logit lens: the likeliest next token after each block",
            corner="after block",
            limit=1.0,
            small_print=left_out(len(kept), n, "positions"),
        )

    def _tip(self, row: int, at: int, token: str) -> str:
        place = f"after block {self.labels[row]}, at {visible(token)} (position {self.positions[at]})"
        best = zip(self.tokens[row][at], self.probs[row, at].tolist(), strict=True)
        lines = [f"{number(p)}  {visible(text)}" for text, p in best]
        if self.target_probs is not None:
            lines.append(f"{number(self.target_probs[row, at])}  the target")
        return "\n".join([place, *lines])

    def _repr_html_(self) -> str:
        return self.to_html(min(FEW, len(self.positions)) or None).fragment()


def first_shown(last: int | None, n: int) -> int:
    """The first of n columns in a picture of the last ones: all, if there are fewer.

    Raises ValueError (last below 1).
    """
    return 0 if last is None else max(0, n - checks.integer("last", last, 1, sys.maxsize))


def logit_lens(
    model: Model,
    source: ActivationCache | str | Iterable[int],
    *,
    top_k: int = 5,
    target: int | str | None = None,
    pos: Positions = None,
) -> LogitLens:
    """Apply the logit lens to every layer.

        lens = logit_lens(model, "Once upon a", target=" time")
        lens.tokens[-1][-1][0]  # the likeliest token after the last block, at the last position

    source  a cache that holds `LENS_SITES`, or a prompt to run: text, or token ids
    top_k   int >= 1: tokens to keep for each layer and position [5]
    target  a token whose probability is also computed: its id, or text that is exactly one token [none]
    pos     for a prompt, the positions to keep: an int, a slice, a list; None = all

    Raises ValueError (top_k, target or pos out of range, a target of several tokens), SiteError (a cache without one of
    `LENS_SITES`), and what `Model.run_with_cache` raises.
    """
    top_k = checks.integer("top_k", top_k, 1, checks.MAX_TOKEN_ID)
    cache = source if isinstance(source, ActivationCache) else _run(model, source, pos)
    resid = cache.accumulated_resid().values  # [n, pos, d_model]
    goal = model.to_single_token(target) if isinstance(target, str) else target
    if goal is not None:
        checks.integer("target", goal, 0, model.d_vocab - 1)
    flat = resid.reshape(-1, resid.shape[-1])
    ids, probs, target_probs = top_tokens(model, flat, top_k, goal)
    shape = resid.shape[:2]
    return LogitLens(
        labels=["embed", *map(str, range(model.n_layers))],
        positions=cache.positions,
        ids=ids.reshape(*shape, -1),
        probs=probs.reshape(*shape, -1),
        tokens=[[texts_of(model, row) for row in layer] for layer in ids.reshape(*shape, -1)],
        target_probs=None if target_probs is None else target_probs.reshape(shape),
        norms=np.linalg.norm(resid, axis=-1),
        prompt=texts_of(model, cache.tokens),
    )


def _run(model: Model, prompt: str | Iterable[int], pos: Positions) -> ActivationCache:
    ids: str | NDArray[Any] = prompt if isinstance(prompt, str) else np.asarray(list(prompt))
    return model.run_with_cache(ids, LENS_SITES, pos=pos, logits=None)[1]


def final_norm(model: Model, resid: F32) -> F32:
    """The model's last RMSNorm, float32 [..., d_model]: x / rms(x) * weight."""
    mean_square = np.mean(resid * resid, axis=-1, keepdims=True)
    rms = np.sqrt(mean_square + np.float32(model.engine_config["rms_norm_eps"]))
    return (resid / rms * model.gain("norm")).astype(np.float32, copy=False)


def lens_logits(model: Model, normed: F32) -> Iterator[tuple[int, F32]]:
    """Logits after the softcap in blocks of the vocabulary: (first id, float32 [rows, ids])."""
    ready_blas()
    cap = np.float32(model.engine_config["logit_softcap"])
    for first in range(0, model.d_vocab, _BLOCK_ROWS):
        logits = normed @ model.unembed(slice(first, first + _BLOCK_ROWS)).T
        yield first, cap * np.tanh(logits / cap) if cap else logits


def top_tokens(
    model: Model, resid: F32, k: int, target: int | None = None
) -> tuple[NDArray[np.int32], F32, F32 | None]:
    """Next tokens read off residual vectors [rows, d_model], from one pass over the vocabulary.

    Returns ids int32 [rows, k], most likely first, their probabilities float32 [rows, k], and those of `target` [rows].
    """
    rows, normed = len(resid), final_norm(model, resid)
    ids, best = np.zeros((rows, 0), np.int32), np.zeros((rows, 0), np.float32)
    peak, total = np.full(rows, -np.inf, np.float32), np.zeros(rows, np.float64)
    goal: F32 | None = None
    for first, logits in lens_logits(model, normed):
        new_peak = np.maximum(peak, logits.max(axis=1))
        total = total * np.exp(peak - new_peak) + np.exp(logits - new_peak[:, None]).sum(axis=1, dtype=np.float64)
        peak = new_peak
        here = np.broadcast_to(np.arange(first, first + logits.shape[1], dtype=np.int32), logits.shape)
        ids, best = _keep_best(np.hstack([ids, here]), np.hstack([best, logits]), k)
        if target is not None and first <= target < first + logits.shape[1]:
            goal = logits[:, target - first].copy()
    log_total = (peak + np.log(total)).astype(np.float32)
    return ids, np.exp(best - log_total[:, None]), None if goal is None else np.exp(goal - log_total)


def _keep_best(ids: NDArray[np.int32], logits: F32, k: int) -> tuple[NDArray[np.int32], F32]:
    k = min(k, logits.shape[1])
    part = np.argpartition(-logits, k - 1, axis=1)[:, :k]
    order = np.take_along_axis(part, np.argsort(-np.take_along_axis(logits, part, 1), axis=1, kind="stable"), 1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(logits, order, 1)


def texts_of(model: Model, ids: NDArray[np.int32]) -> list[str]:
    """The texts of tokens; of a model without a tokenizer their ids."""
    return model.to_str_tokens(ids) if model.checkpoint.tokenizer_path else [str(i) for i in ids]
