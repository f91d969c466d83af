# SPDX-License-Identifier: Apache-2.0
"""How to generate: what a caller may say, and what holds where nothing is said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gemma4.core import Core
from gemma4.generation import checks
from gemma4.generation.defaults import Defaults
from gemma4.generation.sampling import Processor, SamplingParams, StopCriteria
from gemma4.interp.hooks import Hook
from gemma4.interp.sites import Names
from gemma4.media.image import BUDGETS, check_budget
from gemma4.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate. None for a sampling value means the checkpoint's generation_config, else the plain default.

    max_tokens:   most tokens to generate
    temperature:  0 = greedy (then top_k, top_p, min_p do not matter)
    seed:         makes the run reproducible; each prompt of a batch draws its own numbers from it
    logit_bias:   token id -> added to its logit
    processors:   fn(ids int32 [pos], logits float32 [d_vocab]) -> logits, or None after an edit in place
    logprobs:     None, or how many alternatives to report beside each token's log-probability
    stop:         text that ends generation (and is not part of the result), also across pieces
    stop_ids:     ids that end generation; None = the checkpoint's
    hooks:        (site, fn) pairs for this run, after those of open `model.hooks` blocks; sites of the encoders, too
    capture:      sites to keep, as `names` of run_with_cache ("blocks.*.hook_resid_post"); None = nothing
    sequence:     keep the cache here, reusing the longest common prefix with the prompt (chat turns)
    tools, think: for messages, passed to the chat template
    image_tokens: budget of soft tokens for each image of the messages: 70, 140, 280, 560, 1120; None = the model's own
    show_thinking: stream() also yields the pieces of the thinking channel (`piece.channel == "thinking"`)
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    processors: tuple[Processor, ...] | None = None
    logprobs: int | None = None
    stop: str | Iterable[str] = ()
    stop_ids: Iterable[int] | None = None
    hooks: Iterable[Hook] = ()
    capture: Names = None
    sequence: Sequence | None = None
    tools: Seq[Mapping[str, Any]] | None = None
    think: bool | None = None
    image_tokens: int | None = None
    show_thinking: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            object.__setattr__(self, name, default if value is None else check(name, value))

    def sampling(self, model: Core) -> SamplingParams:
        """The checkpoint's defaults with what was given here on top."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        defaults = model.attached(Defaults).of(model).sampling
        params = SamplingParams.with_defaults(defaults or {}, **given)
        beyond = [token for token in params.logit_bias if token >= model.d_vocab]
        if beyond:
            raise ValueError(f"logit_bias: token id {beyond[0]} is outside the vocabulary of {model.d_vocab}")
        return params

    def stops(self, model: Core, turn: bool) -> StopCriteria:
        """turn: the model's turn of a chat, not the continuation of a text."""
        ids = self.stop_ids
        if ids is None:
            defaults = model.attached(Defaults).of(model)
            ids = defaults.turn_stop_ids(model) if turn else defaults.stop_ids
        return StopCriteria(ids, self.stop)


def _max_tokens(name: str, value: Any) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value < 1:
        raise ValueError(f"{name} must be at least 1, got {checks.shown(value)}")
    return checks.integer(name, value, 1, sys.maxsize)


def _hooks(name: str, value: Any) -> tuple[Hook, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        checks.fail(name, value, "pairs (site name, glob or predicate; function)")
    return tuple(value)


def _capture(name: str, value: Any) -> Names:
    if isinstance(value, str) or callable(value):
        return value
    names = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(site, str) for site in names):
        checks.fail(name, value, "a site name or glob, several of them, or a predicate")
    return names


def _sequence(name: str, value: Any) -> Sequence:
    if not isinstance(value, Sequence):
        checks.fail(name, value, "a Sequence, as Model.new_sequence() makes it")
    return value


def _tools(name: str, value: Any) -> Seq[Mapping[str, Any]]:
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        checks.fail(name, value, "a list of JSON schemas (mappings)")
    return value


def _image_tokens(name: str, value: Any) -> int:
    budget = checks.integer(name, value, 1, max(BUDGETS))
    check_budget(budget)
    return budget


# Those that Options has under the same name are checked by SamplingParams.
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _max_tokens, "stop": checks.strings, "stop_ids": checks.token_ids, "hooks": _hooks,
    "capture": _capture, "sequence": _sequence, "tools": _tools, "think": checks.boolean,
    "image_tokens": _image_tokens, "show_thinking": checks.boolean,
}  # fmt: skip


def default_stop_ids(model: Core) -> tuple[int, ...]:
    """The checkpoint's stop ids: generation_config's eos_token_id, else the configuration's."""
    return model.attached(Defaults).of(model).stop_ids
