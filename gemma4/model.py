# SPDX-License-Identifier: Apache-2.0
"""The model as a researcher sees it: tokens in, logits and every intermediate out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from gemma4 import info
from gemma4.core import F32, Core, KVDtype, Precision
from gemma4.encoders.encoder import Encoder, encoder_of
from gemma4.encoders.hooks import EncoderTaps
from gemma4.encoders.soft_tokens import EncodedMedia, encode_audio, encode_image, encode_video
from gemma4.generation.stream import TextStream, generate, stream
from gemma4.inputs import Messages, TokensLike, is_batch, opened_prompts, tokenize_prompt
from gemma4.interp.hooks import Hook, activated, active_hooks, bind_hooks, hooks_of
from gemma4.interp.sites import Names, names_of, reusable
from gemma4.load import open_checkpoint
from gemma4.media.prompt import TokenizedPrompt
from gemma4.profile import Profile, profiling
from gemma4.sequence import Sequence, new_sequence, restore
from gemma4.step import Output, Positions, run_step

__all__ = ["KVDtype", "Model", "Precision", "load"]


def load(
    name_or_path: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    threads: int = 0,
    precision: Precision | None = None,
    kv_dtype: KVDtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Model:
    """Open a checkpoint: a shipped model's name ("tiny-e", "tiny-moe"), a Hugging Face directory, or a .gguf file (any
    part of a split one; tokenizer and chat template come from its metadata).

    The files are mapped, not read: this takes a moment for any size. mmproj: the file that holds a .gguf model's image
    and audio encoders; None: the only mmproj*.gguf beside it, if there is one that fits. threads: 0 = the physical
    cores this process may use, at most its CPU quota. precision: "exact" (the same bits for any thread count, batch and
    chunking), "fast" (whatever is quickest), or None: "fast" if a weight is quantised, else "exact". kv_dtype: how new
    sequences keep keys and values: "f32", "f16", "bf16" or "q8_0" (heads of a multiple of 32); None: "f16" when fast,
    else "f32". progress(files done, files in all, file name) is called while the files of a checkpoint in parts are
    opened.

    Raises FileNotFoundError, FormatError (damaged, missing or misshapen files, an mmproj of another model),
    NotImplementedError (an architecture that this engine does not run; the message lists those it does).
    """
    checkpoint = open_checkpoint(name_or_path, mmproj=mmproj, progress=progress)
    return Model(checkpoint, threads=threads, precision=precision, kv_dtype=kv_dtype)


class Model(Core):
    """A loaded model. Immutable weights: threads may share it, each with its own sequences. Made by `gemma4.load`."""

    def info(self) -> info.ModelInfo:
        """Architecture, parameters, types, instruction set, threads, memory, warnings: print it."""
        return info.describe(self)

    # -- images, sound, video ------------------------------------------------------------------------------------

    @property
    def encoded_media(self) -> EncodedMedia:
        """Soft tokens of the media seen last, by content."""
        return self.attached(EncodedMedia)

    @property
    def vision(self) -> Encoder:
        """The image encoder, bound at first use. Raises NotImplementedError if the checkpoint has none."""
        return encoder_of(self, "vision")

    @property
    def audio(self) -> Encoder:
        """The audio encoder, bound at first use. Raises NotImplementedError if the checkpoint has none."""
        return encoder_of(self, "audio")

    def encode_image(self, image: Any, image_tokens: int | None = None) -> F32:
        """Soft tokens of one picture, float32 [n, d_model], n <= image_tokens: what enters the text model.

        image_tokens: None = `Model.image_tokens`. `gemma4.media.image.preprocess` says what an image may be and what is
        raised; besides, NotImplementedError if the model has no vision encoder. `model.vision.run_with_cache` shows
        the inside.
        """
        return encode_image(self, image, self.image_tokens if image_tokens is None else image_tokens)

    def encode_audio(self, audio: Any, rate: int | None = None) -> F32:
        """Soft tokens of one recording, float32 [n, d_model], one for every 40 ms.

        audio, rate: see `gemma4.media.audio.load_audio`. Raises what that and `log_mel` raise (over 30 s, too short),
        and NotImplementedError if the model has no audio encoder.
        """
        return encode_audio(self, audio, rate)

    def encode_video(self, video: Any, image_tokens: int = 70, **options: Any) -> F32:
        """Soft tokens of the frames of one video, float32 [frames * n, d_model], n <= image_tokens.

        video, options (num_frames, fps): see `gemma4.media.video.load_video`; or a VideoFrames. Raises what that
        raises, and NotImplementedError if the model has no vision encoder.
        """
        return encode_video(self, video, image_tokens, **options)

    def to_prompt(self, messages: Messages, **options: Any) -> TokenizedPrompt:
        """Chat messages as `forward`, `run_with_cache` and `generate` take them, with the places of their soft tokens.

        options: tools, think, image_tokens; see `gemma4.inputs.tokenize_prompt`.
        """
        return tokenize_prompt(self, messages, **options)

    # -- the forward pass ----------------------------------------------------------------------------------------

    def new_sequence(self, *, capacity: int = 0, kv_dtype: KVDtype | None = None) -> Sequence:
        """An empty cached sequence; capacity in positions, 0 = the model's context. Raises FormatError (a weight file
        changed since it was loaded)."""
        return new_sequence(self, capacity=capacity, kv_dtype=kv_dtype)

    def restore(self, path: str | os.PathLike[str]) -> Sequence:
        """A sequence from a file that `Sequence.save` wrote; see `gemma4.sequence.restore`."""
        return restore(self, path)

    def forward(
        self, ids: TokensLike, *, logits: Positions = "all", sequence: Sequence | list[Sequence] | None = None
    ) -> Any:
        """Next-token logits, float32 [n, d_vocab]; a list of prompts gives a list (ragged, never padded).

        ids: token ids, text (BOS is added unless the sequence continues), what `to_prompt` made, or a list of those,
            all run in one step.
        logits: "all", "last", positions within `ids`, or None (nothing is returned; only the sequence grows).
        sequence: continue this cached sequence (one per prompt for a list); None = a fresh one that is dropped.

        Raises ValueError (empty prompt, id out of range), CapacityError, StateError (sequence closed or in use by
        another thread), KeyboardInterrupt within 100 ms of Ctrl-C.
        """
        outputs = self._run(ids, sequence, logits=logits)
        return [out.logits for out in outputs] if is_batch(ids) else outputs[0].logits

    def run_with_cache(
        self,
        ids: TokensLike,
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: int | None = None,
        logits: Positions = "all",
        sequence: Sequence | list[Sequence] | None = None,
    ) -> tuple[Any, Any]:
        """Logits as `forward` gives them, and the activations: (logits, ActivationCache), lists of both for a list.

        names: None = every site of the text model except those that grow with T*S, T*heads*d_model or d_vocab
            (attn.hook_attn_scores, attn.hook_pattern, attn.hook_result, hook_logits_raw, hook_logits); a name or glob
            ("*" is really every one); a list of those; a predicate on the name. Only what is named is stored. Names
            that begin with "vision." or "audio." are of the encoders: see `ActivationCache.media`.
        pos: keep only these positions of `ids` (int, slice, list; negative counts from the end). None = all.
        stop_at_layer: run blocks 0..n-1 only; logits are None and the sequence does not grow.
        Raises SiteError for an unknown name, with the closest ones.
        """
        if stop_at_layer is not None:
            stop_at_layer, logits = self._checked_stop(stop_at_layer), None
        names = reusable(names)
        capture = self.sites.select(names_of(names), stop_at_layer=stop_at_layer)
        pos = "all" if pos is None else pos
        outputs = self._run(ids, sequence, names, stop_at_layer, logits=logits, capture=capture, pos=pos)
        if is_batch(ids):
            return [out.logits for out in outputs], [out.cache for out in outputs]
        return outputs[0].logits, outputs[0].cache

    def run_with_hooks(
        self,
        ids: TokensLike,
        hooks: Iterable[Hook],
        *,
        logits: Positions = "all",
        sequence: Sequence | list[Sequence] | None = None,
    ) -> Any:
        """`forward` with hooks: pairs (site name, glob or predicate; fn(array, site)). See gemma4.interp.hooks."""
        with self.hooks(hooks):
            return self.forward(ids, logits=logits, sequence=sequence)

    def hooks(self, hooks: Iterable[Hook]) -> AbstractContextManager[None]:
        """`with model.hooks([...]):` forward, run_with_cache, generate and stream run with these hooks. Nestable.

        Hooks of outer blocks act first; captured values are those after all edits.
        """
        hooks = list(hooks)
        bind_hooks(self.sites, hooks_of(hooks))  # a wrong name is an error here, not at the first forward pass
        EncoderTaps.of(self, hooks)
        return activated(self, hooks)

    def profile(self) -> AbstractContextManager[Profile]:
        """`with model.profile() as profile:` notes the time of every operation run inside; see gemma4.profile."""
        return profiling(self)

    def _checked_stop(self, layer: int) -> int:
        if not 0 <= layer <= self.n_layers:
            raise ValueError(f"stop_at_layer must be 0 to {self.n_layers} (the number of layers), got {layer}")
        return layer

    def _run(
        self,
        ids: TokensLike,
        sequence: Sequence | list[Sequence] | None,
        names: Names = (),
        stop_at_layer: int | None = None,
        **wanted: Any,
    ) -> list[Output]:
        """One step of all prompts, each of which wants the same (fields of `Prompt`)."""
        wanted["hooks"] = bind_hooks(self.sites, hooks_of(active_hooks(self)), stop_at_layer=stop_at_layer)
        taps = EncoderTaps.of(self, active_hooks(self), names)
        with opened_prompts(self, ids, sequence, taps) as prompts:
            return run_step(self, [replace(prompt, **wanted) for prompt in prompts], stop_at_layer=stop_at_layer)

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt; see `gemma4.generation.stream.generate` for the options and the result."""
        return generate(self, prompt, **options)

    def stream(self, prompt: Any, **options: Any) -> TextStream:
        """Continue a prompt piece by piece; see `gemma4.generation.stream.stream`."""
        return stream(self, prompt, **options)
