# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a dictionary by the losses of a model that runs on its reconstruction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries import SAE, Transcoder
from gemma4.edits import Scale
from gemma4.inputs import TextOrIds, as_ids
from gemma4.model import Model

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_ROWS = 64  # positions whose logits are widened at once


@dataclass(frozen=True)
class DictionaryEvaluation:
    """Means over all prompts; losses are cross entropies of the next token, in nats.

    explained_variance  1 - |target - reconstruction|^2 / |target - mean|^2
    l0                  features that fire at a position
    dead                share of the features that fire at no position
    loss                of the model alone
    loss_spliced        with the reconstruction, without its error term, in place of the site
    loss_ablated        with zeros in place of the site
    n_tokens            positions, of which each prompt's last has no loss
    """

    explained_variance: float
    l0: float
    dead: float
    loss: float
    loss_spliced: float
    loss_ablated: float
    n_tokens: int

    @property
    def loss_recovered(self) -> float:
        """(ablated - spliced) / (ablated - loss): 1 = the reconstruction is as good as the site, 0 = as zeros. NaN if
        zeros are as good as the site."""
        lost = self.loss_ablated - self.loss
        return (self.loss_ablated - self.loss_spliced) / lost if lost else float("nan")


class _Moments:
    """Sums over positions of the target and of what the reconstruction misses."""

    def __init__(self, d_out: int, d_sae: int) -> None:
        self.n, self.sum, self.squares, self.missed = 0, np.zeros(d_out), 0.0, 0.0
        self.fired, self.entries = np.zeros(d_sae, np.bool_), 0

    def add(self, target: F32, missed: F32, ids: NDArray[np.int32]) -> None:
        self.n += len(target)
        self.sum += target.sum(axis=0, dtype=np.float64)
        self.squares += float(np.square(target, dtype=np.float64).sum())
        self.missed += float(np.square(missed, dtype=np.float64).sum())
        self.fired[ids] = True
        self.entries += len(ids)

    @property
    def explained(self) -> float:
        spread = self.squares - float(np.square(self.sum).sum()) / self.n
        return 1 - self.missed / spread if spread > 0 else float("nan")


def evaluate_dictionary(
    model: Model, dictionary: SAE | Transcoder, prompts: str | Iterable[TextOrIds]
) -> DictionaryEvaluation:
    """How well a dictionary stands in for its site on some prompts.

        evaluate_dictionary(model, gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post"), texts).loss_recovered

    prompts: texts or token ids, or one text; one without a next token counts for no loss. Positions below
    `skip_positions` keep the model's own activations and count for nothing but losses.

    Raises ValueError (no prompt with two tokens, none with a position from `skip_positions` on, a dictionary that does
    not fit the model), SiteError.
    """
    site_out = dictionary.site_out if isinstance(dictionary, Transcoder) else dictionary.site
    with model.attach(dictionary):  # raises here for one that does not fit
        sites = [site for site in dict.fromkeys((dictionary.site, site_out)) if site is not None]
    skip = dictionary.skip_positions
    ablation = Scale(sites[-1], factor=0.0, pos=slice(skip, None))
    moments, losses = _Moments(dictionary.d_out, dictionary.d_sae), [list[F64]() for _ in range(3)]
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        ids = as_ids(model, prompt)
        logits, cache = model.run_with_cache(ids, sites)
        features, target = dictionary.encode(cache), cache[sites[-1]].reshape(len(ids), -1)
        moments.add(target[skip:], dictionary.error(cache)[skip:], features.ids)
        losses[0].append(_losses(logits, ids))
        if len(ids) <= skip:  # nothing is replaced
            losses[1].append(losses[0][-1])
            losses[2].append(losses[0][-1])
            continue
        with model.attach(dictionary, error=False):
            losses[1].append(_losses(model.forward(ids), ids))
        with model.edit(ablation):
            losses[2].append(_losses(model.forward(ids), ids))
    plain, spliced, ablated = (np.concatenate([np.empty(0), *found]) for found in losses)
    if not len(plain):
        raise ValueError("evaluate_dictionary needs at least one prompt of two tokens or more")
    if not moments.n:
        raise ValueError(f"evaluate_dictionary needs at least one position from {skip} on: no prompt is so long")
    return DictionaryEvaluation(
        explained_variance=moments.explained,
        l0=moments.entries / moments.n,
        dead=1 - float(moments.fired.mean()),
        loss=float(plain.mean()),
        loss_spliced=float(spliced.mean()),
        loss_ablated=float(ablated.mean()),
        n_tokens=moments.n,
    )


def _losses(logits: F32, ids: NDArray[np.int32]) -> F64:
    """Cross entropy of each next token, float64 [pos - 1]."""
    found = np.empty(len(ids) - 1)
    for first in range(0, len(found), _ROWS):
        wide = logits[first : min(first + _ROWS, len(found))].astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        at = wide[np.arange(len(wide)), ids[first + 1 :][: len(wide)]]
        np.exp(wide, out=wide)
        found[first : first + len(wide)] = np.log(wide.sum(axis=1)) - at
    return found
