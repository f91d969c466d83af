# SPDX-License-Identifier: Apache-2.0
"""Features of a dictionary as cards, and as Neuronpedia's JSON: from Gemma Scope 2's examples, or from a harvest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.dictionaries import Transcoder
from gemma4.dictionaries.examples import Example, FeatureSource, Ranked
from gemma4.html import Card
from gemma4.html import Example as Stretch
from gemma4.html.markup import number, visible
from gemma4.memory import ready_blas

if TYPE_CHECKING:
    from gemma4.dictionaries import Dictionary
    from gemma4.interp.sites import Site
    from gemma4.model import Model

F32: TypeAlias = NDArray[np.float32]
Texts: TypeAlias = Callable[[NDArray[np.int32]], list[str]]
Logits: TypeAlias = tuple[Ranked, Ranked]
_ROWS = 8192  # of the head, unpacked at once
_DIRECTIONS = 256  # whose logits are computed at once
# Sites in the space of the residual stream; and those that are where no norm follows
_RESIDUAL = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_mlp",
    "hook_resid_unscaled",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_ple_out",
)
_NORMED = {"attn.hook_out": "ln1_post", "mlp.hook_out": "ln2_post"}


def feature_card(
    source: FeatureSource,
    feature: int,
    texts: Texts,
    *,
    n_examples: int = 8,
    context: int | None = 24,
    near: Sequence[tuple[int, float]] = (),
    logits: Logits | None = None,
) -> Card:
    """A feature as `gemma4.html.cards` takes it.

    texts    ids -> a text for each
    context  tokens beside the strongest one; None = whole sequences
    near     other features and how strongly they go together
    logits   tokens that it raises and lowers most; None = those of the source

    Raises what the source raises: IndexError (no such feature), FormatError (damaged).
    """
    histogram, stretches = source.histogram(feature), source.top(feature, n_examples, context=context)
    up, down = source.logits(feature) if logits is None else logits
    largest = max((float(one.values.max(initial=0)) for one in stretches), default=0.0)
    facts = [("fires at", f"{100 * source.density(feature):.3g} % of tokens"), ("largest value", number(largest))]
    fired = histogram.counts.sum() > 0
    return Card(
        feature,
        f"feature {feature}",
        facts,
        histogram=(histogram.counts, histogram.edges) if fired else None,
        histogram_title="stored values",
        up=_pairs(up, texts),
        down=_pairs(down, texts),
        near=near,
        near_title="strong at the same tokens (share)",
        examples=[Stretch(texts(one.tokens), one.values.astype(np.float64)) for one in stretches],
    )


def _pairs(ranked: Ranked, texts: Texts) -> list[tuple[str, float]]:
    return list(zip(texts(ranked.tokens), ranked.logits.tolist(), strict=True))


def neuronpedia(
    source: FeatureSource,
    feature: int,
    texts: Texts,
    *,
    model_id: str,
    source_id: str,
    n_examples: int = 8,
    context: int | None = 24,
    near: Sequence[tuple[int, float]] = (),
    logits: Logits | None = None,
) -> dict[str, Any]:
    """A feature as Neuronpedia's JSON has it; the arguments are those of `feature_card`.

    model_id, source_id   Neuronpedia's names, for example "gemma-3-1b" and "13-gemmascope-2-res-16k"
    """
    histogram, stretches = source.histogram(feature), source.top(feature, n_examples, context=context)
    up, down = source.logits(feature) if logits is None else logits
    activations = [_activation(one, texts) for one in stretches]
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2  # as many as bars
    return {
        "modelId": model_id,
        "layer": source_id,
        "index": str(feature),
        "sourceSetName": source_id.partition("-")[2],
        "maxActApprox": max((one["maxValue"] for one in activations), default=0.0),
        "frac_nonzero": source.density(feature),
        "freq_hist_data_bar_heights": histogram.counts.tolist(),
        "freq_hist_data_bar_values": [float(f"{value:.6g}") for value in middles],
        "pos_str": texts(up.tokens),
        "pos_values": up.logits.tolist(),
        "neg_str": texts(down.tokens),
        "neg_values": down.logits.tolist(),
        "correlated_features_indices": [other for other, _ in near],
        "correlated_features_l1": [share for _, share in near],
        "activations": activations,
    }


def _activation(one: Example, texts: Texts) -> dict[str, Any]:
    at = int(one.values.argmax()) if len(one.values) else 0
    return {
        "tokens": texts(one.tokens),
        "values": one.values.tolist(),
        "maxValue": float(one.values.max(initial=0)),
        "minValue": float(one.values.min(initial=0)),
        "maxValueTokenIndex": at,
        "dataIndex": str(one.sequence),
    }


def direct_logits(model: Model, dictionary: Dictionary, features: Sequence[int], k: int = 10) -> list[Logits]:
    """The tokens whose logits each feature's direction raises and lowers most, by the final norm's gain and the head.

    Its scale is left out: the numbers compare tokens, not features. Memory is taken for blocks of the vocabulary, and
    for the directions. Raises ValueError for a dictionary that does not write into the residual stream, SiteError (its
    site is none of this model), IndexError (no such feature).
    """
    _check_writes_residual(model, dictionary)
    if not features:
        return []
    ready_blas()
    directions = np.stack([dictionary.direction(feature) for feature in features]) * model.gain("norm")
    up, down = _Ranking(len(features), k), _Ranking(len(features), k)
    for at in range(0, model.d_vocab, _ROWS):
        head = model.unembed(slice(at, at + _ROWS)).T
        for first in range(0, len(directions), _DIRECTIONS):
            rows = slice(first, first + _DIRECTIONS)
            logits = cast(F32, directions[rows] @ head)
            up.add(rows, logits, at)
            down.add(rows, -logits, at)
    return [(up.ranked(row), down.ranked(row, -1)) for row in range(len(features))]


def _check_writes_residual(model: Model, dictionary: Dictionary) -> None:
    width = model.engine_config["d_model"]
    if dictionary.d_out != width:
        raise ValueError(f"{dictionary!r} writes {dictionary.d_out} numbers, the residual stream has {width}")
    name = dictionary.site_out if isinstance(dictionary, Transcoder) else dictionary.site
    if name is not None and not _is_residual(model, model.sites[name]):
        raise ValueError(
            f"{dictionary!r} writes {name}, which is not in the space of the residual stream: logits of its directions "
            "mean nothing"
        )


def _is_residual(model: Model, site: Site) -> bool:
    if site.stem in _RESIDUAL:
        return True
    return site.stem in _NORMED and f"blocks.{site.layer}.{_NORMED[site.stem]}.hook_scale" not in model.sites


class _Ranking:
    """The k tokens of each row with the highest numbers, the highest first, of equal ones the first."""

    def __init__(self, n_rows: int, k: int) -> None:
        self._tokens = np.full((n_rows, k), -1, np.int32)  # -1: none so far
        self._numbers = np.full((n_rows, k), -np.inf, np.float32)

    def add(self, rows: slice, numbers: F32, first: int) -> None:
        """numbers: float32 [rows, tokens] of the tokens from `first` on."""
        ids = np.broadcast_to(np.arange(first, first + numbers.shape[1], dtype=np.int32), numbers.shape)
        tokens = np.concatenate([self._tokens[rows], ids], axis=1)
        numbers = np.concatenate([self._numbers[rows], numbers], axis=1)
        order = np.argsort(-numbers, axis=1, kind="stable")[:, : self._tokens.shape[1]]
        self._tokens[rows] = np.take_along_axis(tokens, order, 1)
        self._numbers[rows] = np.take_along_axis(numbers, order, 1)

    def ranked(self, row: int, sign: int = 1) -> Ranked:
        there = self._tokens[row] >= 0
        return Ranked(self._tokens[row][there], sign * self._numbers[row][there])


def holding(words: str, tokens: Sequence[str]) -> NDArray[np.bool_]:
    """Which tokens hold the words, as they are or as they are shown; capitals do not matter."""
    wanted = words.casefold()
    return np.array([wanted in token.casefold() or wanted in visible(token).casefold() for token in tokens], np.bool_)
