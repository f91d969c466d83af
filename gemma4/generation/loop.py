# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: all prompts together, one ragged engine step per token."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core
from gemma4.encoders.hooks import EncoderTaps
from gemma4.generation.options import Options
from gemma4.generation.pieces import ContinuationText, Piece, TurnText
from gemma4.generation.sampling import Sample, Sampler, StopCriteria
from gemma4.inputs import PromptLike, check_fits, is_messages, tokenize_prompt
from gemma4.interp.cache import ActivationCache, join_caches
from gemma4.interp.hooks import active_hooks, bind_hooks, hooks_of
from gemma4.interp.sites import names_of, reusable
from gemma4.media.prompt import TokenizedPrompt
from gemma4.sequence import Sequence, new_sequence
from gemma4.step import Output, Prompt, Want, run_step
from gemma4.text.turn import ToolCall


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds and rates, sampling included. The first token comes out of the prefill; decoding makes the others."""

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
    """What came of one prompt.

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


@dataclass(slots=True)
class Track:
    """One prompt on its way."""

    index: int  # in the batch
    prompt: TokenizedPrompt
    buffer: NDArray[np.int32]  # prompt, generated, room for more
    n_ids: int
    n_prompt: int
    sequence: Sequence
    sampler: Sampler
    stops: StopCriteria
    taps: EncoderTaps
    text: ContinuationText | TurnText
    finish: str = ""
    pieces: list[Piece] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    caches: list[ActivationCache] = field(default_factory=list)
    reused: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ids(self) -> NDArray[np.int32]:
        """int32 [pos]: prompt and generated."""
        return self.buffer[: self.n_ids]

    def pending(self, model: Core) -> Prompt:
        """What the cache does not hold yet: the prompt, whose media are encoded here, later one token."""
        start = self.sequence.length
        soft = self.taps.soft_rows(model, self.prompt, start, self.index) if start < self.n_prompt else None
        return Prompt(self.sequence, self.ids[start:], self.index, soft)

    def accept(self, output: Output) -> list[Piece]:
        """Sample from a step's logits; returns the text that became certain."""
        if output.cache is not None:
            self.caches.append(output.cache)
        assert output.logits is not None
        sample = self.sampler.sample(output.logits[-1], self.ids, self.n_prompt)
        self.samples.append(sample)
        self.buffer[self.n_ids] = sample.token
        self.n_ids += 1
        pieces = self._text_of(sample.token)
        self.pieces += pieces
        return pieces

    def spend(self, seconds: float) -> None:
        """Note how long the last step and its sampling took."""
        if len(self.samples) == 1:
            self.prefill_s = seconds
        else:
            self.decode_s += seconds

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
        """Pieces with what a stop string takes away removed; held-back text comes with the last one."""
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


class Run:
    """Several tracks decoded together."""

    def __init__(self, model: Core, prompts: list[PromptLike], opts: Options) -> None:
        self.model, self.opts = model, opts
        if opts.sequence is not None:
            opts.sequence.check_usable_by(model)
        options: dict[str, Any] = {"tools": opts.tools, "think": opts.think, "image_tokens": opts.image_tokens}
        rows = [tokenize_prompt(model, prompt, **options) for prompt in prompts]
        check_fits(max(len(row) for row in rows), model.context_length)
        hooks, kept = [*active_hooks(model), *opts.hooks], reusable(opts.capture)
        self.want = Want(
            logits="last",
            capture=None if kept is None else model.sites.select(names_of(kept)),
            hooks=bind_hooks(model.sites, hooks_of(hooks)),
        )
        self.taps = EncoderTaps.of(model, hooks, kept)
        self.own_sequences = opts.sequence is None
        self.tracks = [self._track(i, p, row) for i, (p, row) in enumerate(zip(prompts, rows, strict=True))]

    def _track(self, index: int, prompt: PromptLike, tokenized: TokenizedPrompt) -> Track:
        model, opts, ids = self.model, self.opts, tokenized.ids
        if opts.sequence is None:
            room = min(opts.max_tokens, model.context_length - len(ids) + 1)  # the last token needs no place
            sequence = new_sequence(model, capacity=len(ids) + room - 1)
        else:
            sequence = opts.sequence
            check_fits(len(ids), sequence.capacity, "the sequence's capacity")
            room = min(opts.max_tokens, sequence.capacity - len(ids) + 1)
        text = (
            TurnText(model.tokenizer, ids, opts.show_thinking, _tool_names(opts))
            if is_messages(prompt)
            else ContinuationText(model)
        )
        sampler, stops = Sampler(opts.sampling(model), stream=index), opts.stops(model, is_messages(prompt))
        buffer = np.append(ids, np.zeros(room, dtype=np.int32))
        tokenized = self.taps.apart(model, tokenized)
        track = Track(index, tokenized, buffer, len(ids), len(ids), sequence, sampler, stops, self.taps, text)
        track.reused = sequence.rewind_to(tokenized.keys()) if opts.sequence is not None else 0
        return track

    def steps(self) -> Generator[list[list[Piece]], None, None]:
        """One engine step per turn of the loop; yields the new pieces of each track."""
        try:
            while active := [track for track in self.tracks if not track.finish]:
                start = time.perf_counter()
                outputs = run_step(self.model, [track.pending(self.model) for track in active], self.want)
                fresh = {id(track): track.accept(out) for track, out in zip(active, outputs, strict=True)}
                for track in active:
                    track.spend(time.perf_counter() - start)
                yield [fresh.get(id(track), []) for track in self.tracks]
        finally:
            self.close()

    def close(self) -> None:
        for track in self.tracks:
            track.finish = track.finish or "cancelled"
            if self.own_sequences:
                track.sequence.close()


def _tool_names(opts: Options) -> list[str]:
    return [tool.get("function", tool).get("name", "") for tool in opts.tools or ()]
