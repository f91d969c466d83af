# SPDX-License-Identifier: Apache-2.0
"""Options of generation, and their defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from typing import Any, TypedDict, cast

from gemma4 import checks
from gemma4.core import Core
from gemma4.edits.base import Edit
from gemma4.generation.defaults import Defaults
from gemma4.generation.sampling import Processor, SamplingParams, StopCriteria
from gemma4.interp.hooks import Hook
from gemma4.interp.sites import Names
from gemma4.media.image import BUDGETS, check_budget
from gemma4.narrow import is_integer, is_iterable, is_list_or_tuple
from gemma4.sequence import Sequence


class GenerateOptions(TypedDict, total=False):
    """Options of `Model.generate` and `Model.stream`, documented there; None is the same as omitting one."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    processors: Seq[Processor] | None
    logprobs: int | None
    stop: str | Iterable[str] | None
    stop_ids: int | Iterable[int] | None
    hooks: Iterable[Hook] | Edit | None
    capture: Names
    sequence: Sequence | None
    tools: Seq[Mapping[str, object]] | None
    think: bool | None
    image_tokens: int | None
    show_thinking: bool | None


# Names in other libraries
_ELSEWHERE = {
    "max_tokens": "max_new_tokens max_length max_output_tokens max_completion_tokens n_predict num_predict max_gen_len",
    "temperature": "do_sample temp greedy",
    "repetition_penalty": "repeat_penalty",
    "logit_bias": "bad_words_ids suppress_tokens sequence_bias",
    "seed": "random_seed manual_seed generator random_state",
    "processors": "logits_processor logits_processors logit_processors",
    "logprobs": "top_logprobs output_scores output_logits n_probs",
    "stop": "stop_strings stop_sequences stop_words stopping_criteria",
    "stop_ids": "eos_token_id eos_token_ids eos_id stop_token_ids",
    "hooks": "fwd_hooks forward_hooks",
    "capture": "names names_filter output_hidden_states output_attentions return_cache",
    "sequence": "past_key_values past_kv_cache kv_cache cache prompt_cache",
    "tools": "functions",
    "think": "enable_thinking thinking reasoning reasoning_effort",
    "image_tokens": "max_soft_tokens image_seq_length",
}
_OURS = checks.by_their_names(_ELSEWHERE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `Model.generate`, where they are documented, checked.

    None for a sampling value means the checkpoint's generation_config, else the plain default.
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
    processors: Seq[Processor] | None = None
    logprobs: int | None = None
    stop: str | Iterable[str] = ()
    stop_ids: int | Iterable[int] | None = None
    hooks: Iterable[Hook] = ()
    capture: Names = None
    sequence: Sequence | None = None
    tools: Seq[Mapping[str, object]] | None = None
    think: bool | None = None
    image_tokens: int | None = None
    show_thinking: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            object.__setattr__(self, name, default if value is None else check(name, value))

    @classmethod
    def of(cls, given: GenerateOptions) -> Options:
        """From keyword arguments. Raises TypeError for an unknown option, with the likely intended ones."""
        checks.known_names(given, [field.name for field in fields(cls)], _OURS)
        return cls(**cast("dict[str, Any]", given))  # None is typed nowhere: __post_init__ replaces it by the default

    def sampling(self, model: Core) -> SamplingParams:
        """The checkpoint's defaults, overridden by these options."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        defaults = model.attached(Defaults).of(model).sampling
        params = SamplingParams.with_defaults(defaults or {}, **given)
        beyond = [token for token in params.logit_bias if token >= model.d_vocab]
        if beyond:
            raise ValueError(f"logit_bias: token id {beyond[0]} is outside the vocabulary of {model.d_vocab}")
        return params

    def stops(self, model: Core, turn: bool) -> StopCriteria:
        """turn: a model's turn of a chat, not a text continuation."""
        ids = cast("tuple[int, ...] | None", self.stop_ids)  # once checked
        if ids is None:
            defaults = model.attached(Defaults).of(model)
            ids = defaults.turn_stop_ids(model) if turn else defaults.stop_ids
        return StopCriteria(ids, self.stop)


def _max_tokens(name: str, value: Any) -> int:
    if is_integer(value) and value < 1:
        raise ValueError(f"{name} must be at least 1, got {checks.shown(value)}")
    return checks.integer(name, value, 1, sys.maxsize)


def _hooks(name: str, value: Any) -> tuple[Hook, ...]:
    if isinstance(value, Edit):
        return (value,)
    if isinstance(value, str) or not is_iterable(value):
        checks.fail(name, value, "pairs (site name, glob or predicate; function)")
    return tuple(value)


def _capture(name: str, value: Any) -> Names:
    if isinstance(value, str) or callable(value):
        return value
    names = list(value) if is_iterable(value) else [value]
    if not all(isinstance(site, str) for site in names):
        checks.fail(name, value, "a site name or glob, several of them, or a predicate")
    return names


def _sequence(name: str, value: Any) -> Sequence:
    if not isinstance(value, Sequence):
        checks.fail(name, value, "a Sequence, as Model.new_sequence() makes it")
    return value


def _tools(name: str, value: Any) -> Seq[Mapping[str, Any]]:
    if not is_list_or_tuple(value) or not all(isinstance(tool, Mapping) for tool in value):
        checks.fail(name, value, "a list of JSON schemas (mappings)")
    return value


def _image_tokens(name: str, value: Any) -> int:
    budget = checks.integer(name, value, 1, max(BUDGETS))
    check_budget(budget)
    return budget


# SamplingParams checks the options that Options has under the same name.
_SAMPLING = tuple(field.name for field in fields(SamplingParams))
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _max_tokens, "stop": checks.strings, "stop_ids": checks.token_ids, "hooks": _hooks,
    "capture": _capture, "sequence": _sequence, "tools": _tools, "think": checks.boolean,
    "image_tokens": _image_tokens, "show_thinking": checks.boolean,
}  # fmt: skip


def default_stop_ids(model: Core) -> tuple[int, ...]:
    """The checkpoint's stop ids: generation_config's eos_token_id, else the configuration's."""
    return model.attached(Defaults).of(model).stop_ids
