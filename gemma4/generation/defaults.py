# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's defaults for generation, read leniently: editors and converters leave all kinds of values there.

A valid value is used in whatever type it was written; an invalid one causes one warning, and the plain default is
used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from gemma4 import checks
from gemma4.narrow import is_list

if TYPE_CHECKING:
    from gemma4.core import Core
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

T = TypeVar("T")

# name -> lowest, highest: keys of generation_config.json, and the options of the same names.
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e4), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3), "frequency_penalty": (-1e3, 1e3),
}  # fmt: skip
MAX_TOP_K = 1 << 31
_IN_FILES = ("temperature", "top_p", "min_p", "repetition_penalty")
_UNSET_IDS = (-1, (1 << 32) - 1)  # written by converters where there is no such token
# Besides the tokens with which the template ends turns: here the model waits for the result of a call.
_WAITS = ("<|tool_response>", "<start_function_response>")  # of Gemma 4, of FunctionGemma


def read_defaults(config: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """(sampling parameters, with "stop_ids" if there are any; unusable entries) of a generation_config.json.

    As in transformers, do_sample absent or false means greedy. `suppress_tokens` become biases of -inf.
    """
    out: dict[str, Any] = {}
    bad: list[str] = []

    def take(name: str, read: Callable[[Any], T]) -> T | None:
        value = config.get(name)
        if value is None:
            return None
        try:
            return read(value)
        except (TypeError, ValueError, OverflowError):
            bad.append(f"{name} is {checks.shown(value)}")
            return None

    for name in _IN_FILES:
        out[name] = take(name, lambda value, name=name: checks.number(name, _as_number(value), *NUMBERS[name]))
    out["top_k"] = take("top_k", _top_k)
    if not take("do_sample", _as_boolean):
        out["temperature"] = 0.0
    banned = take("suppress_tokens", _as_ids)
    out["logit_bias"] = dict.fromkeys(banned, -math.inf) if banned else None
    out["stop_ids"] = take("eos_token_id", _as_ids) or None
    return {name: value for name, value in out.items() if value is not None}, bad


def warn_of(bad: Iterable[str]) -> None:
    for what in bad:
        warnings.warn(f"generation_config.json: {what}: not understood, not used", UserWarning, stacklevel=3)


class Defaults:
    """The defaults of one model: `model.attached(Defaults).of(model)`. Read and warned about once.

    sampling        parameters of the checkpoint, without ids outside the model's vocabulary
    stop_ids        end a continuation: generation_config's eos_token_id, else the configuration's
    turn_stop_ids   end a turn of a chat: these, and the tokens that the chat template writes after a model's turn
    """

    def __init__(self) -> None:
        self.sampling: dict[str, Any] | None = None
        self.stop_ids: tuple[int, ...] = ()
        self._turn_stop_ids: tuple[int, ...] | None = None

    def of(self, model: Core) -> Defaults:
        if self.sampling is None:
            found, bad = read_defaults(model.checkpoint.generation_config)
            self.stop_ids = tuple(found.pop("stop_ids", model.config.eos_token_ids))
            bias = {token: value for token, value in found.pop("logit_bias", {}).items() if token < model.d_vocab}
            self.sampling = found | ({"logit_bias": bias} if bias else {})
            warn_of(bad)
        return self

    def turn_stop_ids(self, model: Core) -> tuple[int, ...]:
        if self._turn_stop_ids is None:
            ends: tuple[int, ...] = ()
            if model.chat_template is not None:
                ends = turn_ends(model.chat_template, model.tokenizer)
            self._turn_stop_ids = tuple(dict.fromkeys((*self.stop_ids, *ends)))
        return self._turn_stop_ids


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Control tokens that a template writes right after the model's text, and the one for waiting for a tool.

    Some merged checkpoints list only <eos>; without these ids the model would continue with the user's turns.
    """
    said = "0f3a9c"
    asked = [{"role": "user", "content": "7e"}, {"role": "assistant", "content": said}]
    try:
        after = template.render(asked, add_generation_prompt=False).rpartition(said)[2]
    except ValueError:  # a template that needs more than a question and an answer
        after = ""
    ids: list[int] = tokenizer.encode(after.lstrip(), bos=False)[:1].tolist() if after.strip() else []
    for waits in _WAITS:
        if waits in template.source:
            ids += tokenizer.encode(waits, bos=False)[:1].tolist()
    return tuple(token for token in ids if token in tokenizer.special_ids and token != tokenizer.bos_id)


def _as_number(value: Any) -> float:
    """A number, also as text."""
    return float(value) if isinstance(value, str) else value


def _as_integer(value: Any) -> int:
    """An integer, also as 64.0 or "64"."""
    if isinstance(value, str | float):
        number = float(value)
        value = int(number) if number.is_integer() else value
    return value


def _as_boolean(value: Any) -> bool:
    words = {"true": True, "false": False}
    return checks.boolean("do_sample", words.get(value.lower(), value) if isinstance(value, str) else value)


def _top_k(value: Any) -> int:
    k = _as_integer(value)
    return 0 if k == -1 else checks.integer("top_k", k, 0, MAX_TOP_K)  # -1 often means "all"


def _as_ids(value: Any) -> tuple[int, ...]:
    """One id or a list of them, also as text; those that are unset left out."""
    ids = [_as_integer(one) for one in (value if is_list(value) else [value]) if one is not None]
    return checks.token_ids("ids", [token for token in ids if token not in _UNSET_IDS])
