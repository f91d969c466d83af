# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token, in NumPy, and when to stop.

Order, as transformers' `generate` has it: logit bias, repetition penalty, presence and frequency penalties, processors,
temperature, top-k, top-p, min-p, draw. Ties at the top-k border are all kept, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4 import checks
from gemma4.checks import shown
from gemma4.generation.defaults import MAX_TOP_K, NUMBERS, read_defaults, warn_of
from gemma4.narrow import is_integer

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
# (ids int32 [pos], logits float32 [vocab]) -> logits of the same shape, or None if they were edited in place
Processor = Callable[[I32, F32], "ArrayLike | None"]


@dataclass(frozen=True)
class SamplingParams:
    """Parameters of sampling. Every field is neutral by default; raises ValueError when out of range.

    temperature          0 = greedy (the largest logit, the lowest id among equals), otherwise logits are divided by it
    top_k                keep the k largest; 0 = all
    top_p                keep the fewest tokens whose probabilities sum to at least this (nucleus sampling); 1 = all
    min_p                drop tokens below this share of the likeliest one's probability; 0 = none
    repetition_penalty   tokens in prompt or output: positive logits divided, negative ones multiplied by it; 1 = off
    presence_penalty, frequency_penalty   subtracted once, and once per occurrence, for tokens in the output only
    logit_bias           token id -> added to its logit; -inf bans it
    seed                 the same seed gives the same draws; None = unpredictable
    processors           functions (ids, logits) -> logits or None, in order, before the temperature
    logprobs             None = none; n = the chosen token's log-probability and the n likeliest of the model's own
                         distribution: logits as they came, before bias, penalties and temperature
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    processors: tuple[Processor, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in NUMBERS.items():
            checks.number(name, getattr(self, name), low, high)
        checks.integer("top_k", self.top_k, 0, MAX_TOP_K)
        if self.seed is not None:
            checks.integer("seed", self.seed, 0, (1 << 128) - 1)
        if self.logprobs is not None:
            checks.integer("logprobs", self.logprobs, 0, 1 << 20)
        object.__setattr__(self, "logit_bias", checks.logit_bias("logit_bias", self.logit_bias))
        object.__setattr__(self, "processors", checks.functions("processors", self.processors))

    @classmethod
    def from_generation_config(cls, config: Mapping[str, object], **overrides: object) -> SamplingParams:
        """A checkpoint's generation_config.json with `overrides` (those that are not None) on top.

        As in transformers, do_sample absent or false means greedy, unless a temperature is given in `overrides`.
        `suppress_tokens` become -inf biases. Warns of invalid values in the file, and does not use them.
        Raises ValueError (in overrides), TypeError (an override that is not a field).
        """
        defaults, bad = read_defaults(config)
        warn_of(bad)
        defaults.pop("stop_ids", None)
        return cls.with_defaults(defaults, **overrides)

    @classmethod
    def with_defaults(cls, defaults: Mapping[str, object], **overrides: object) -> SamplingParams:
        """`defaults` with `overrides` (those that are not None) on top; biases are joined. top_k=-1 means all."""
        values: dict[str, Any] = dict(defaults)
        given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
        if "logit_bias" in given and "logit_bias" in values:
            given["logit_bias"] = values["logit_bias"] | checks.logit_bias("logit_bias", given["logit_bias"])
        if is_integer(given.get("top_k")) and given["top_k"] == -1:
            given["top_k"] = 0
        return cls(**(values | given))


@dataclass(frozen=True)
class Sample:
    """A chosen token; `logprob` (nats) and `top_logprobs` ((id, nats), likeliest first) if params.logprobs is set."""

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens for one sequence. It owns its random generator, so the draws depend on (seed, stream) and on this
    sequence's logits only, not on what else is in the batch. Give samples of one prompt different `stream`s."""

    def __init__(self, params: SamplingParams, stream: int = 0) -> None:
        self.params = params
        self._rng = np.random.default_rng(np.random.SeedSequence(params.seed, spawn_key=(stream,)))

    def sample(self, logits: F32, ids: I32, n_prompt: int = 0) -> Sample:
        """The next token after `ids` (int32 [pos], of which the first `n_prompt` are the prompt).

        logits: float32 [vocab], not changed. Raises ValueError if they hold NaN or +inf or allow no token, or if a
        processor returns anything but logits.
        """
        logits = _as_logits(logits)
        p = self.params
        scores = _apply_processors(_edit(p, logits, ids, n_prompt), ids, p.processors)
        greedy = np.float32(p.temperature) == 0  # also for values too small for float32: the limit is the argmax
        token = int(scores.argmax()) if greedy else self._draw(scores)
        if p.logprobs is None:
            return Sample(token)
        logprob, top = logprobs(logits, token, p.logprobs)
        return Sample(token, logprob, top)

    def _draw(self, scores: F32) -> int:
        tokens, weights = _candidates(scores, self.params)
        total = float(weights.sum(dtype=np.float64))
        at = _index_of_sum(weights, self._rng.random() * total, beyond=True)
        return at if tokens is None else int(tokens[at])


def logprobs(logits: F32, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log softmax(logits)[token] and the `n` largest entries as (id, nats), likeliest first, equals by id."""
    top = float(logits.max())
    total = top + math.log(float(np.exp(logits - np.float32(top)).sum(dtype=np.float64)))
    if n == 0:
        return float(logits[token]) - total, ()
    ids = np.flatnonzero(logits >= kth_largest(logits, n))
    ids = ids[np.lexsort((ids, -logits[ids]))][:n]
    return float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ids)


def kth_largest(x: F32, k: int) -> float:
    """The k-th largest value of x (-inf if x has no more than k), without sorting or copying all of it."""
    if k >= x.size:
        return -math.inf
    blocks = max(1024, 4 * k)
    if x.size >= 16 * blocks:
        # k block maxima are k elements, so the k-th largest maximum is a floor that leaves few candidates.
        maxima = x[: x.size // blocks * blocks].reshape(blocks, -1).max(axis=1)
        x = x[x >= np.partition(maxima, blocks - k)[blocks - k]]
    return float(np.partition(x, x.size - k)[x.size - k])


def _as_logits(logits: Any) -> F32:
    logits = np.asarray(logits, np.float32)
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits must be one row [vocab], got shape {list(logits.shape)}")
    _check_finite(logits, "the logits")
    return logits


def _check_finite(logits: F32, what: str) -> None:
    top = logits.max()  # NaN if any is
    if np.isnan(top):
        raise ValueError(f"{what} hold NaN: an edited activation or damaged weights; no token can be chosen")
    if np.isinf(top):
        kind = "hold +inf" if top > 0 else "are all -inf: every token is banned"
        raise ValueError(f"{what} {kind}; no token can be chosen")


def _edit(p: SamplingParams, logits: F32, ids: I32, n_prompt: int) -> F32:
    """Bias and penalties, on a copy if there are any."""
    counted = p.presence_penalty != 0 or p.frequency_penalty != 0
    if not (p.logit_bias or p.processors or counted or p.repetition_penalty != 1):
        return logits
    scores = logits.copy()
    if p.logit_bias:
        tokens = _in_vocab(np.fromiter(p.logit_bias.keys(), np.int64), scores.size)
        scores[tokens] += np.fromiter(p.logit_bias.values(), np.float32)
    if p.repetition_penalty != 1:
        seen = _in_vocab(np.unique(ids), scores.size)
        values = scores[seen]
        scores[seen] = np.where(values < 0, values * p.repetition_penalty, values / p.repetition_penalty)
    if counted:
        seen, counts = np.unique(np.asarray(ids)[n_prompt:], return_counts=True)
        scores[_in_vocab(seen, scores.size)] -= (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
    return scores


def _in_vocab(tokens: NDArray[Any], n_vocab: int) -> NDArray[Any]:
    if tokens.size and (tokens.min() < 0 or tokens.max() >= n_vocab):
        raise ValueError(f"token ids {tokens.min()}..{tokens.max()} are outside the vocabulary of {n_vocab}")
    return tokens


def _real(values: Any) -> Any:
    """values, unless they are complex numbers. Raises TypeError."""
    if np.iscomplexobj(values):
        raise TypeError
    return values


def _apply_processors(scores: F32, ids: I32, processors: tuple[Processor, ...]) -> F32:
    shape = scores.shape
    ids = np.asarray(ids).view()
    ids.flags.writeable = False  # the continuation's own
    for processor in processors:
        result = processor(ids, scores)
        if scores.dtype != np.float32 or scores.strides != (4,):
            raise ValueError(f"the processor {processor!r:.80} changed the type or strides of the logits it was given")
        try:
            scores = scores if result is None else np.asarray(_real(result), np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"the processor {processor!r:.80} returned {shown(result)}, no logits") from None
        if scores.shape != shape:
            raise ValueError(f"the processor {processor!r:.80} returned shape {list(scores.shape)}, not {list(shape)}")
    _check_finite(scores, "the logits after bias, penalties and processors")
    return scores


def _candidates(scores: F32, p: SamplingParams) -> tuple[NDArray[np.intp] | None, F32]:
    """Unnormalised probabilities and the token ids they belong to, ascending; None = all of the vocabulary."""
    tokens = None
    floor = kth_largest(scores, p.top_k) if p.top_k else -math.inf
    if floor > -math.inf:
        tokens = np.flatnonzero(scores >= np.float32(floor))
        scores = scores[tokens]
    weights = np.exp((scores - scores.max()) / np.float32(p.temperature))
    floor = max(p.min_p, _nucleus_floor(weights, p.top_p) if p.top_p < 1 else 0.0)  # the likeliest weighs exactly 1
    if floor > 0:
        keep = np.flatnonzero(weights >= np.float32(floor))
        tokens, weights = keep if tokens is None else tokens[keep], weights[keep]
    return tokens, weights


def _nucleus_floor(weights: F32, top_p: float) -> float:
    """The weight of the last token of the nucleus.

    Of n weights, those below (1 - top_p) / n of their sum make less than 1 - top_p of it together: the nucleus lies
    among the others, and only those are sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    head = weights[weights >= np.float32((1 - top_p) * total / weights.size)]
    head = np.sort(head)[::-1]
    return float(head[_index_of_sum(head, top_p * total, beyond=False)])


_SUM_BLOCK = 512


def _index_of_sum(weights: F32, wanted: float, beyond: bool) -> int:
    """The first index up to which `weights` sum to at least `wanted` (beyond: to more), in float64.

    Never an index of weight 0; if rounding leaves all sums short of `wanted`, the last positive weight. Whole blocks
    are summed first: running sums of 262,144 weights are 2 MB to write, ten times as slow.
    """
    n_whole = weights.size // _SUM_BLOCK * _SUM_BLOCK
    blocks = weights[:n_whole].reshape(-1, _SUM_BLOCK).sum(axis=1, dtype=np.float64)
    sums = np.cumsum(np.append(blocks, weights[n_whole:].sum(dtype=np.float64)))
    block = _first_reaching(sums, wanted, beyond)
    before = float(sums[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * _SUM_BLOCK : (block + 1) * _SUM_BLOCK], dtype=np.float64)
    return block * _SUM_BLOCK + _first_reaching(inside, wanted - before, beyond)


def _first_reaching(sums: NDArray[np.float64], wanted: float, beyond: bool) -> int:
    """A weight of 0 does not change the sum, so it is never the first to reach a value above 0."""
    at = int(np.searchsorted(sums, wanted, side="right" if beyond else "left"))
    return min(at, int(np.searchsorted(sums, float(sums[-1]))))


class StopCriteria:
    """Ends a generation at token ids or at strings, which may begin in one piece of text and end in a later one.

    Feed it each piece with `push`; it returns what can be shown and holds back a tail that may be the start of a stop
    string. Stop strings themselves are never shown. Raises ValueError for empty or non-string stop strings.
    """

    def __init__(self, stop_ids: Iterable[int] = (), stop_strings: Iterable[str] = ()) -> None:
        self.stop_ids = frozenset(checks.token_ids("stop_ids", stop_ids))
        self.stop_strings = checks.strings("stop", stop_strings)
        self.stopped: str | None = None
        self._held = ""

    def is_stop_id(self, token: int) -> bool:
        return token in self.stop_ids

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that can be shown, the stop string that was reached or None). No text follows a stop."""
        if self.stopped is not None:
            return "", self.stopped
        text = self._held + text
        hits = [(text.find(s), -len(s), s) for s in self.stop_strings if s in text]
        if hits:
            at, _, self.stopped = min(hits)
            self._held = ""
            return text[:at], self.stopped
        keep = max((_overlap(text, s) for s in self.stop_strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The held-back text, at the end of the generation."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, all of it excluded."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
