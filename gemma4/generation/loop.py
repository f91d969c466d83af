# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: an open batch, one ragged engine step at a time for all of its prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.core import Core
from gemma4.edits.scope import Extent
from gemma4.encoders.hooks import EncoderTaps
from gemma4.generation.options import Options
from gemma4.generation.pieces import ContinuationText, Piece, TurnText
from gemma4.generation.sampling import Sample, Sampler, StopCriteria
from gemma4.inputs import PromptLike, as_ids, check_fits, is_messages, tokenize_prompt
from gemma4.interp.cache import ActivationCache, join_caches
from gemma4.interp.hooks import Capture, Hook, SiteHooks, active_hooks, apart, bind_hooks, check_hooks, hooks_of
from gemma4.interp.sites import Site, names_of
from gemma4.media.prompt import TokenizedPrompt
from gemma4.picks import Picker
from gemma4.sequence import Sequence, new_sequence
from gemma4.step import Output, Prompt, run_step
from gemma4.text.turn import ToolCall

I32: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds and rates, sampling included. The prefill gives the first token, decoding the others."""

    prefill_tokens: int  # prompt tokens that were run (a reused prefix is not)
    prefill_s: float
    decode_tokens: int
    decode_s: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second; in a batch, of this prompt alone."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one prompt.

    text:           the continuation; for messages, the answer without thinking and tool calls
    tokens:         int32 [n], every sampled id, the stop id included
    finish_reason:  "stop" (stop id or string), "length" (max_tokens or context), "tool_calls", "malformed" (the model
                    stopped, but wrote a tool call that has no single meaning), "cancelled"
    prompt_tokens:  length of the prompt in tokens
    logprobs:       one Sample per token if logprobs= was given
    thinking, tool_calls:  parsed from a model turn (messages only)
    malformed:      the text of tool calls that could not be read, as the model wrote it
    cache:          with capture=: activations of every position that was run, i.e. of the prompt and of all generated
                    tokens but the last (which was never fed back); `cache.positions` says where the prompt ends;
                    `cache.media` holds those inside the encoders
    """

    text: str
    tokens: NDArray[np.int32]
    finish_reason: str
    prompt_tokens: int
    timings: Timings
    logprobs: list[Sample] | None = None
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    malformed: tuple[str, ...] = ()
    cache: ActivationCache | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True, eq=False)
class Continuation:
    """A prompt in progress: its outputs per step, and its results so far. Made by `Batch.join`.

    finish: "" while it runs, then as `Generation.finish_reason`. pieces: the text that is certain.
    """

    model: Core
    number: int  # for hooks, and for the sampler's random numbers
    prompt: TokenizedPrompt
    buffer: I32  # prompt, generated, room for more
    n_ids: int
    n_prompt: int
    sequence: Sequence
    owns_sequence: bool
    sampler: Sampler
    picker: Picker
    stops: StopCriteria
    taps: EncoderTaps
    capture: list[Site] | None
    inside: Capture  # of sites inside attached dictionaries
    hooks: SiteHooks
    text: ContinuationText | TurnText
    finish: str = ""
    pieces: list[Piece] = field(default_factory=list[Piece])
    samples: list[Sample] = field(default_factory=list[Sample])
    caches: list[ActivationCache] = field(default_factory=list[ActivationCache])
    guesses: I32 = field(default_factory=lambda: np.empty(0, np.int32))
    reused: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ids(self) -> I32:
        """int32 [pos]: prompt and generated."""
        return self.buffer[: self.n_ids]

    def propose(self, ids: NDArray[np.integer] | Seq[int]) -> None:
        """Guess the next tokens: the next step runs them, too, and keeps those that sampling confirms.

        The generated text does not depend on the guesses; correct guesses save steps. ids: int [n]. No guess is run
        where activations are captured or edited, nor in the step of a prompt with media. Raises ValueError (out of
        range).
        """
        self.guesses = as_ids(self.model, ids) if len(ids) else np.empty(0, np.int32)

    def pending(self) -> Prompt:
        """Input not yet in the cache: the prompt (media are encoded here), later one token; and guesses."""
        self._forget_guesses()
        start = self.sequence.length
        soft = self.taps.soft_rows(self.model, self.prompt, start, self.number) if start < self.n_prompt else None
        watched = soft is not None or self.capture is not None or bool(self.hooks)
        room = 0 if watched else len(self.buffer) - self.n_ids - 1  # the last token needs no place
        self.guesses = self.guesses[:room]
        stop = self.n_ids + len(self.guesses)
        self.buffer[self.n_ids : stop] = self.guesses
        rows = slice(self.n_ids - 1 - start, None)
        return Prompt(
            self.sequence,
            self.buffer[start:stop],
            self.number,
            soft,
            logits=rows,
            capture=self.capture,
            hooks=self.hooks,
            n_prompt=self.n_prompt,
            step=len(self.samples),
            picker=self.picker,
        )

    def accept(self, output: Output) -> None:
        """Sample from a step's logits: one token, and one more after each correct guess."""
        if output.cache is not None:
            output.cache.keep_inside(self.inside.kept.pop(self.number, {}))
            self.caches.append(output.cache)
        assert output.tops is not None
        for row, (top, guess) in enumerate(zip(output.tops, (*self.guesses, None), strict=True)):
            logits = None if output.logits is None else output.logits[row]
            sample = self.sampler.choose(top, logits, self.ids, self.n_prompt, may_edit=True)
            self.samples.append(sample)
            self.buffer[self.n_ids] = sample.token
            self.n_ids += 1
            self.pieces += self._text_of(sample.token)
            if self.finish or sample.token != guess:
                break
        self.guesses = self.guesses[:0]
        self._forget_guesses()

    def spend(self, seconds: float) -> None:
        """Record the time of a step and its sampling: the first is the prompt's."""
        if self.prefill_s:
            self.decode_s += seconds
        else:
            self.prefill_s = seconds

    def _forget_guesses(self) -> None:
        """Truncate the cache to the sampled tokens without the last, whose logits are still to come."""
        if self.sequence.length >= self.n_ids:
            self.sequence.rewind(self.n_ids - 1)

    def _text_of(self, token: int) -> list[Piece]:
        if self.stops.is_stop_id(token):
            self.finish = "stop"
            return self._released(self.text.end(token), last=True)
        pieces = self._released(self.text.push(token), last=False)
        if not self.finish and self.n_ids == len(self.buffer):
            self.finish = "length"
            pieces += self._released(self.text.flush(), last=True)
        return pieces

    def _released(self, pieces: list[Piece], last: bool) -> list[Piece]:
        """Pieces without text removed by a stop string; held-back text is released with the last one."""
        if not self.stops.stop_strings:
            return pieces
        out: list[Piece] = []
        for piece in pieces:
            if piece.channel != "text":
                out.append(piece)
                continue
            safe, found = self.stops.push(piece)
            out.append(Piece(safe))
            if found is not None:
                self.finish = "stop"
                return [p for p in out if p]
        if last:
            out.append(Piece(self.stops.flush()))
        return [p for p in out if p]

    def result(self) -> Generation:
        n = len(self.samples)
        turn = self.text.parsed() if isinstance(self.text, TurnText) else None
        finish = self.finish
        if turn and finish == "stop":
            finish = "malformed" if turn.malformed else "tool_calls" if turn.tool_calls else finish
        return Generation(
            text="".join(piece for piece in self.pieces if piece.channel == "text"),
            tokens=self.ids[self.n_prompt :].copy(),
            finish_reason=finish,
            prompt_tokens=self.n_prompt,
            timings=Timings(self.n_prompt - self.reused, self.prefill_s, max(n - 1, 0), self.decode_s),
            logprobs=self.samples if self.sampler.params.logprobs is not None else None,
            thinking=turn.thinking if turn else "",
            tool_calls=turn.tool_calls if turn else (),
            malformed=turn.malformed if turn else (),
            cache=join_caches(self.caches) if self.caches else None,
        )


class Batch:
    """Prompts that are continued together, one engine step at a time for all of them.

    Between any two steps prompts may join, each with its own options, and leave. A prompt's result does not depend on
    the others. One thread at a time may use a batch.

    running: the prompts that have not finished
    """

    def __init__(self, model: Core) -> None:
        self.running: list[Continuation] = []
        self._n_joined = 0
        if not _is_a(model, Core):
            raise TypeError(f"a batch is of a Model, got {model!r:.80}")
        self.model = model

    def join(
        self,
        prompt: PromptLike,
        options: Options | None = None,
        *,
        number: int | None = None,
        n_prompts: int | None = None,
    ) -> Continuation:
        """Add a prompt, which the next step runs. Hooks of open `model.hooks` blocks stay with it, then the options'.

        number: the seed's stream of random numbers to use, and the prompt's index for edits and hooks; None = the last
        one's number + 1. n_prompts: how many will join in all: edits that name no such prompt are refused; None = open.
        Raises as `Model.generate`, before anything is computed.
        """
        options = Options() if options is None else options
        if not _is_a(options, Options):
            raise TypeError(f"options must be Options, got {options!r:.80}")
        if any(one.sequence is options.sequence for one in self.running):
            raise ValueError("this sequence is being continued in this batch already; fork() it")
        number = self._n_joined if number is None else checks.integer("number", number, 0, 1 << 31)
        joined = _continuation(self.model, prompt, options, number, n_prompts)
        self._n_joined = number + 1
        self.running.append(joined)
        return joined

    def leave(self, continuation: Continuation) -> None:
        """Stop a prompt, as "cancelled" if it has not finished; a sequence given by `sequence=` stays open."""
        continuation.finish = continuation.finish or "cancelled"
        self.running = [one for one in self.running if one is not continuation]
        if continuation.owns_sequence:
            continuation.sequence.close()

    def step(self) -> None:
        """Run the pending input of all `running` prompts, and sample. Finished prompts leave.

        Raises what the engine and hooks raise; no prompt has then got a token, and another step can continue. If one
        prompt's sampling fails (its processor, NaN logits), it leaves first, and the others keep their tokens.
        """
        failed: list[BaseException] = []
        start, ran = time.perf_counter(), self.running
        if not ran:
            return
        for one, output in zip(ran, run_step(self.model, [one.pending() for one in ran]), strict=True):
            try:
                one.accept(output)
            except BaseException as error:
                self.leave(one)
                failed.append(error)
        for one in ran:
            one.spend(time.perf_counter() - start)
            if one.finish:
                self.leave(one)
        if failed:
            raise failed[0]

    def close(self) -> None:
        """Let all prompts leave. Safe at any time, also twice."""
        for one in self.running:
            self.leave(one)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _is_a(value: object, kind: type) -> bool:
    """isinstance, for values whose declared type a caller may not have kept."""
    return isinstance(value, kind)


def _continuation(
    model: Core, prompt: PromptLike, options: Options, number: int, n_prompts: int | None
) -> Continuation:
    given, inside = options.sequence, Capture()
    if given is not None:
        given.check_usable_by(model)
    tokenized = tokenize_prompt(
        model, prompt, tools=options.tools, think=options.think, image_tokens=options.image_tokens
    )
    ids = tokenized.ids
    hooks: list[Hook] = [*active_hooks(model), *options.hooks]
    names, kept = apart(options.capture, hooks, model.sites)
    hooks += [(names, inside)] if names else []
    check_fits(len(ids), model.context_length)
    if given is not None:
        check_fits(len(ids), given.capacity, "the sequence's capacity")
    places = model.context_length if given is None else given.capacity
    room = min(options.max_tokens, places - len(ids) + 1)  # the last token needs no place
    taps = EncoderTaps.of(model, hooks, kept)
    tokenized = taps.apart(model, tokenized)
    sampler = Sampler(options.sampling(model), stream=number)
    text = TurnText(model.tokenizer, ids, options.show_thinking, _tool_names(options)) if is_messages(prompt) else None
    joined = Continuation(
        model,
        number,
        tokenized,
        buffer=np.append(ids, np.zeros(room, dtype=np.int32)),
        n_ids=len(ids),
        n_prompt=len(ids),
        sampler=sampler,
        picker=sampler.picker(model.d_vocab),
        stops=options.stops(model, is_messages(prompt)),
        taps=taps,
        capture=None if kept is None else model.sites.select(names_of(kept)),
        inside=inside,
        hooks=bind_hooks(model.sites, hooks_of(hooks)),
        text=text or ContinuationText(model),
        sequence=new_sequence(model, capacity=len(ids) + room - 1) if given is None else given,
        owns_sequence=given is None,
    )
    joined.reused = joined.sequence.rewind_to(tokenized.keys())
    check_hooks(joined.hooks, Extent(joined.reused, len(joined.buffer) - 1, len(ids), room, number, n_prompts))
    return joined


def _tool_names(opts: Options) -> list[str]:
    functions = [tool.get("function", tool) for tool in opts.tools or ()]
    named = [cast("Mapping[str, object]", function) for function in functions if isinstance(function, Mapping)]
    return [str(function.get("name", "")) for function in named]
