# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token, and when to stop.

Order, as transformers' `generate` has it: logit bias, repetition penalty, presence and frequency penalties, processors,
temperature, top-k, top-p, min-p, draw. Ties at the top-k border are all kept, as in transformers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4 import _engine, checks
from gemma4.checks import shown
from gemma4.generation.defaults import MAX_TOP_K, NUMBERS, read_defaults, warn_of
from gemma4.narrow import is_integer
from gemma4.picks import Picker, TopLogits

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
        # also for values too small for float32: the limit is the argmax
        self._greedy = bool(np.float32(params.temperature) == 0)
        self._edits = Edits(params)
        self._pickers: dict[tuple[int, bool], Picker] = {}

    def picker(self, n_vocab: int) -> Picker:
        """Finds what `choose` needs of a row of `n_vocab` logits: seldom the row itself."""
        edits, logprobs = bool(self._edits), self.params.logprobs
        k, within = (0, 0.0) if edits else self._candidates(n_vocab)
        whole = edits or not (k or within or self._greedy)
        return Picker(n_vocab, max(k, logprobs or 0), within=within, log_sum=logprobs is not None, rows=whole)

    def _candidates(self, n_vocab: int) -> tuple[int, float]:
        """A token is drawn from the k largest logits, or from those not further below the largest; (0, 0): from all, or
        the largest is taken."""
        p = self.params
        if self._greedy:
            return 0, 0.0
        if 0 < p.top_k < n_vocab:
            return p.top_k, 0.0
        if p.min_p > 0 and p.top_p == 1:
            return 0, 1e-2 - 1.001 * math.log(p.min_p) * p.temperature  # the weights decide: this is a bit more
        return 0, 0.0

    def sample(self, logits: F32, ids: I32, n_prompt: int = 0) -> Sample:
        """The next token after `ids` (int32 [pos], of which the first `n_prompt` are the prompt).

        logits: float32 [vocab], not changed. Raises ValueError if they hold NaN or +inf or allow no token, or if a
        processor returns anything but logits.
        """
        logits = _as_logits(logits)
        return self.choose(self._picked(logits, edited=False), logits, ids, n_prompt)

    def choose(
        self, found: TopLogits, logits: F32 | None, ids: I32, n_prompt: int = 0, *, may_edit: bool = False
    ) -> Sample:
        """`sample`, from what a `picker` found in the logits; and from the logits, if it `needs_rows`.

        may_edit: bias and penalties may change the logits.
        """
        _check_top(found.top, "the logits")
        p, scores, top = self.params, logits, found
        if self._edits:
            assert logits is not None
            keep = not may_edit or p.processors or p.logprobs is not None
            edited = self._edits.of(logits.copy() if keep else logits, ids, n_prompt)
            scores = _apply_processors(edited, ids, p.processors)
            top = self._picked(scores, edited=True)
            _check_top(top.top, "the logits after bias, penalties and processors")
        token = top.best if self._greedy else self._draw(top, scores)
        if p.logprobs is None:
            return Sample(token)
        logit = _logit_of(token, found, logits)
        return Sample(token, logit - found.log_sum, _likeliest(found, p.logprobs))

    def _picked(self, logits: F32, edited: bool) -> TopLogits:
        """Finds what `choose` needs in a row that is not a step's, or no longer."""
        n_vocab = logits.size
        if (n_vocab, edited) not in self._pickers:
            k, within = self._candidates(n_vocab)
            picker = Picker(n_vocab, k, within=within) if edited else self.picker(n_vocab)
            self._pickers[n_vocab, edited] = picker
        return self._pickers[n_vocab, edited].of(logits)

    def _draw(self, top: TopLogits, scores: F32 | None) -> int:
        k, within = self._candidates(top.n_vocab)
        tokens = None
        if k:
            tokens, scores = _largest(top, k)
        elif within:
            tokens, scores = top.ids, top.values
        assert scores is not None
        weights = _weights(scores, top.top, self.params.temperature)
        at = _engine.draw(weights, _least(weights, self.params), self._rng.random())
        return at if tokens is None else int(tokens[at])


def logprobs(logits: F32, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """log softmax(logits)[token] and the `n` largest entries as (id, nats), likeliest first, equals by id."""
    logits = np.ascontiguousarray(logits, np.float32)
    found = Picker(logits.size, n, log_sum=True).of(logits)
    return float(logits[token]) - found.log_sum, _likeliest(found, n)


def kth_largest(x: F32, k: int) -> float:
    """The k-th largest value of x (-inf if x has no more than k), without sorting or copying all of it."""
    if k >= x.size:
        return -math.inf
    values = Picker(x.size, k).of(np.ascontiguousarray(x, np.float32)).values
    return float(values.min()) if len(values) >= k else -math.inf


def _logit_of(token: int, found: TopLogits, logits: F32 | None) -> float:
    if logits is not None:
        return float(logits[token])
    return found.top if token == found.best else float(found.values[np.searchsorted(found.ids, token)])


def _likeliest(found: TopLogits, n: int) -> tuple[tuple[int, float], ...]:
    """The n largest logits as (id, nats), the lower id first among equals."""
    order = np.lexsort((found.ids, -found.values))[:n]
    pairs = list(zip(found.ids[order].tolist(), (found.values[order] - found.log_sum).tolist(), strict=True))
    if len(pairs) < min(n, found.n_vocab):  # the others are -inf
        banned = np.delete(np.arange(found.n_vocab), found.ids)[: n - len(pairs)]
        pairs += [(token, -math.inf) for token in banned.tolist()]
    return tuple(pairs)


def _as_logits(logits: Any) -> F32:
    logits = np.ascontiguousarray(logits, np.float32) if np.ndim(logits) else np.asarray(logits, np.float32)
    if logits.ndim != 1 or logits.size == 0:
        raise ValueError(f"logits must be one row [vocab], got shape {list(logits.shape)}")
    return logits


def _check_top(top: float, what: str) -> None:
    """Raise ValueError if no token can be chosen from logits whose largest is this; NaN if one of them is."""
    if math.isnan(top):
        raise ValueError(f"{what} hold NaN: an edited activation or damaged weights; no token can be chosen")
    if math.isinf(top):
        kind = "hold +inf" if top > 0 else "are all -inf: every token is banned"
        raise ValueError(f"{what} {kind}; no token can be chosen")


class Edits:
    """The changes of logits by bias and penalties. True if there are any, or processors.

    It remembers the tokens of a sequence that grows from call to call; another sequence only takes longer.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params, self._seen, self._written = params, _Counts(), _Counts()
        self._biased = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), np.float32)
        self._counted = params.presence_penalty != 0 or params.frequency_penalty != 0

    def __bool__(self) -> bool:
        p = self._params
        return bool(p.logit_bias or p.processors or self._counted or p.repetition_penalty != 1)

    def of(self, logits: F32, ids: I32, n_prompt: int) -> F32:
        """The logits [vocab], with bias and penalties in place. Raises ValueError for an id beyond them."""
        p, scores, ids = self._params, logits, np.asarray(ids)
        if self._biased.size:
            scores[_in_vocab(self._biased, scores.size)] += self._bias
        if p.repetition_penalty != 1:
            seen = _in_vocab(self._seen.of(ids)[0], scores.size)
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * p.repetition_penalty, values / p.repetition_penalty)
        if self._counted:
            written, counts = self._written.of(ids[n_prompt:])
            penalties = (p.presence_penalty + p.frequency_penalty * counts).astype(np.float32)
            scores[_in_vocab(written, scores.size)] -= penalties
        return scores


class _Counts:
    """The different tokens of a sequence, each with its number."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.int32)
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)

    def of(self, ids: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """ids and counts, int64 [different], in no order. Those known from the last call are not counted again."""
        n_known = len(self._known)
        if n_known == 0 or n_known > len(ids) or not (ids[:n_known] == self._known).all():
            self._count(ids)
        else:
            for token in ids[n_known:].tolist():
                self._add(token)
        self._known = ids.copy()
        return self._ids, self._counts

    def _count(self, ids: NDArray[np.integer[Any]]) -> None:
        found, self._counts = np.unique(ids, return_counts=True)
        self._ids = found.astype(np.int64)
        self._places = {token: place for place, token in enumerate(self._ids.tolist())}

    def _add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._ids))
        if place == len(self._ids):
            self._ids, self._counts = np.append(self._ids, token), np.append(self._counts, 0)
        self._counts[place] += 1


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
    return np.ascontiguousarray(scores)


def _largest(top: TopLogits, k: int) -> tuple[I32, F32]:
    """The k largest logits and all equal to the last of them: ids, ascending, and values. More may be listed."""
    if len(top.ids) <= k:
        return top.ids, top.values
    keep = np.flatnonzero(top.values >= np.partition(top.values, -k)[-k])
    return top.ids[keep], top.values[keep]


_OF_THREAD = threading.local()  # .weights: see _weights


def _weights(scores: F32, top: float, temperature: float) -> F32:
    """Unnormalised probabilities: the likeliest weighs exactly 1. Valid until this thread calls it again.

    Memory for a whole vocabulary is kept: the system takes longer to give 1 MB than NumPy to fill it.
    """
    weights: F32 | None = getattr(_OF_THREAD, "weights", None)
    if weights is None or weights.size < scores.size:
        weights = _OF_THREAD.weights = np.empty(scores.size, np.float32)
    weights = weights[: scores.size]
    np.subtract(scores, np.float32(top), out=weights)
    if temperature != 1:
        np.divide(weights, np.float32(temperature), out=weights)
    return np.exp(weights, out=weights)


def _least(weights: F32, p: SamplingParams) -> float:
    """The weight below which no token is drawn."""
    return max(p.min_p, _engine.nucleus_floor(weights, p.top_p) if p.top_p < 1 else 0.0)


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
