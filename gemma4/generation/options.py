# SPDX-License-Identifier: Apache-2.0
"""How to generate: what a caller may say, and what holds where nothing is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from typing import Any

from gemma4.core import Core
from gemma4.generation.sampling import Processor, SamplingParams, StopCriteria
from gemma4.interp.hooks import Hook
from gemma4.interp.sites import Names
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
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    def sampling(self, model: Core) -> SamplingParams:
        """The checkpoint's defaults with what was given here on top."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        return SamplingParams.from_generation_config(model.checkpoint.generation_config, **given)

    def stops(self, model: Core) -> StopCriteria:
        ids = default_stop_ids(model) if self.stop_ids is None else self.stop_ids
        return StopCriteria(ids, [self.stop] if isinstance(self.stop, str) else self.stop)


_SAMPLING = tuple(field.name for field in fields(SamplingParams))  # those that Options has under the same name


def default_stop_ids(model: Core) -> tuple[int, ...]:
    """The checkpoint's stop ids: generation_config's eos_token_id, else the configuration's."""
    ids = model.checkpoint.generation_config.get("eos_token_id")
    if ids is None:
        return tuple(model.config.eos_token_ids)
    return (ids,) if isinstance(ids, int) else tuple(ids)
