# SPDX-License-Identifier: Apache-2.0
"""Generation: prompts in, sampled text out. The loop itself is in gemma4/decode.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gemma4.errors import StateError
from gemma4.generation.loop import Generation, Run, Timings
from gemma4.generation.pieces import Piece
from gemma4.generation.sampling import Processor, SamplingParams, StopCriteria
from gemma4.inputs import PromptLike, is_prompt_list
from gemma4.interp.hooks import Hook
from gemma4.interp.sites import Names
from gemma4.sequence import Sequence

if TYPE_CHECKING:
    from gemma4.model import Model

__all__ = ["Generation", "Options", "TextStream", "Timings", "default_stop_ids", "generate", "stream"]


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

    def sampling(self, model: Model) -> SamplingParams:
        """The checkpoint's defaults with what was given here on top."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        return SamplingParams.from_generation_config(model.checkpoint.generation_config, **given)

    def stops(self, model: Model) -> StopCriteria:
        ids = default_stop_ids(model) if self.stop_ids is None else self.stop_ids
        return StopCriteria(ids, [self.stop] if isinstance(self.stop, str) else self.stop)


_SAMPLING = tuple(field.name for field in fields(SamplingParams))  # those that Options has under the same name


def default_stop_ids(model: Model) -> tuple[int, ...]:
    """The checkpoint's stop ids: generation_config's eos_token_id, else the configuration's."""
    ids = model.checkpoint.generation_config.get("eos_token_id")
    if ids is None:
        return tuple(model.config.eos_token_ids)
    return (ids,) if isinstance(ids, int) else tuple(ids)


def generate(model: Model, prompt: PromptLike | Seq[PromptLike], **options: Any) -> Any:
    """Continue a prompt. Keyword arguments: see `Options`. Returns a Generation, or a list of them for a list.

    prompt: text (continued as it is, BOS added once), token ids, chat messages (dicts with "role" and "content", put
    through the checkpoint's own template; content may hold images, sound and video, see docs/media.md), what
    `Model.to_prompt` made of them, or a list of any of those, decoded together in one step per token.

    Raises ValueError (empty prompt, bad option), CapacityError (prompt longer than the context, before anything is
    computed), StateError (messages without a chat template, text without a tokenizer), FormatError (a damaged image or
    sound), NotImplementedError (media that the model has no encoder for), KeyboardInterrupt.
    """
    opts = Options(**options)
    many = is_prompt_list(prompt)
    prompts: list[Any] = list(prompt) if many else [prompt]  # type: ignore[arg-type]
    if many and opts.sequence is not None:
        raise ValueError("sequence= goes with one prompt, not a list")
    run = Run(model, prompts, opts)
    for _ in run.steps():
        pass
    results = [track.result() for track in run.tracks]
    return results if many else results[0]


def stream(model: Model, prompt: PromptLike, **options: Any) -> TextStream:
    """Continue one prompt piece by piece. Arguments and errors as for `generate`; the prompt is checked right here."""
    if is_prompt_list(prompt):
        raise ValueError("stream() takes one prompt; generate() takes a list")
    return TextStream(Run(model, [prompt], Options(**options)))


class TextStream(Iterator[Piece]):
    """Iterator over pieces of text (`str`; whole characters; nothing that may still be part of a stop string).

    `result` is the Generation once the stream has ended. Leaving early (`close()`, the end of a `with` block, or
    dropping the object) frees what the stream held; its result then says "cancelled".
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps = run.steps()
        self._ready: list[Piece] = []

    def __next__(self) -> Piece:
        while not self._ready:
            self._ready = next(self._steps)[0]
        return self._ready.pop(0)

    def close(self) -> None:
        """Stop generating. Safe at any time, also twice."""
        self._steps.close()
        self._run.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """The whole answer. Raises StateError while the stream still runs."""
        track = self._run.tracks[0]
        if not track.finish:
            raise StateError("the stream has not ended: read on, or close() it")
        return track.result()
