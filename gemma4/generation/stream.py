# SPDX-License-Identifier: Apache-2.0
"""Generation: prompts in, sampled text out. The loop itself is in generation/loop.py."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Unpack, cast, overload

from gemma4.core import Core
from gemma4.edits.base import SourceError
from gemma4.errors import StateError
from gemma4.generation.loop import Batch, Continuation, Generation, Timings
from gemma4.generation.options import GenerateOptions, Options, default_stop_ids
from gemma4.generation.pieces import Piece
from gemma4.inputs import PromptLike, is_prompt_list

__all__ = [
    "GenerateOptions",
    "Generation",
    "Options",
    "TextStream",
    "Timings",
    "default_stop_ids",
    "generate",
    "stream",
]


@overload
def generate(model: Core, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Generation: ...
@overload
def generate(model: Core, prompt: Seq[PromptLike], **options: Unpack[GenerateOptions]) -> list[Generation]: ...
def generate(
    model: Core, prompt: PromptLike | Seq[PromptLike], **options: Unpack[GenerateOptions]
) -> Generation | list[Generation]:
    """See `Model.generate`."""
    opts = Options.of(options)
    many = is_prompt_list(prompt)
    prompts = list(prompt) if is_prompt_list(prompt) else [cast("PromptLike", prompt)]
    if many and opts.sequence is not None:
        raise ValueError("sequence= goes with one prompt, not a list")
    with Batch(model) as batch:
        joined = [batch.join(one, opts, n_prompts=len(prompts)) for one in prompts]
        _check_media(joined)
        while batch.running:
            _step(batch)
    results = [one.result() for one in joined]
    return results if many else results[0]


def stream(model: Core, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> TextStream:
    """See `Model.stream`."""
    opts = Options.of(options)
    if is_prompt_list(prompt):
        raise ValueError("stream() takes one prompt; generate() takes a list")
    batch = Batch(model)
    joined = batch.join(prompt, opts, n_prompts=1)
    _check_media([joined])
    return TextStream(batch, joined)


def _check_media(joined: Seq[Continuation]) -> None:
    joined[0].taps.check([one.prompt for one in joined])  # all have the same hooks


def _step(batch: Batch) -> None:
    """A step. A prompt that cannot take what an edit takes from another one leaves, and keeps its text.

    Raises what `Batch.step` raises, and SourceError where that prompt has no text yet.
    """
    try:
        batch.step()
    except SourceError as error:
        taker = next((one for one in batch.running if one.number == error.prompt), None)
        if taker is None or not taker.samples:
            raise
        warnings.warn(f"{error}; prompt {taker.number} ends here, with {len(taker.samples)} tokens", stacklevel=4)
        batch.leave(taker)


class TextStream(Iterator[Piece]):
    """Iterator over pieces of text (`str`; whole characters; nothing that may still be part of a stop string).

    `result` is the Generation once the stream has ended. Leaving early (`close()`, the end of a `with` block, or
    dropping the object) frees what the stream held; its result then says "cancelled".
    """

    def __init__(self, batch: Batch, continuation: Continuation) -> None:
        self._batch, self._continuation = batch, continuation
        self._ready: list[Piece] = []
        self._stepping = threading.Lock()  # one step at a time; `_reader` is the thread that runs it
        self._reader = 0
        self._closing = False

    def __next__(self) -> Piece:
        while True:
            try:
                return self._ready.pop(0)
            except IndexError:
                self._step()

    def _step(self) -> None:
        """Put the next pieces into `_ready`. Raises StopIteration at the end, or if the stream was closed."""
        if self._reader == threading.get_ident():
            raise StateError("the stream is read while it computes a step: by a hook or a processor of its own")
        one = self._continuation
        with self._stepping:
            self._reader = threading.get_ident()
            try:
                if not self._closing and not self._ready:  # another reader's step may have added some
                    n_known = len(one.pieces)
                    self._batch.step()
                    self._ready += one.pieces[n_known:]
            except StopIteration as error:  # a reader would take it for the end
                self._closing = True
                raise RuntimeError("a hook or a processor raised StopIteration") from error
            except BaseException:
                self._closing = True
                raise
            finally:
                self._reader = 0
                if self._closing:
                    self._batch.close()
            if one.finish and not self._ready:
                raise StopIteration

    def close(self) -> None:
        """Stop generating. Safe at any time, also twice, and from any thread: a step that runs there ends first. In a
        hook or a processor of the stream itself, the stream ends after the step."""
        self._closing = True
        if self._reader != threading.get_ident():
            with self._stepping:
                self._batch.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> Generation:
        """The whole answer. Raises StateError while the stream still runs."""
        if not self._continuation.finish:
            raise StateError("the stream has not ended: read on, or close() it")
        return self._continuation.result()
