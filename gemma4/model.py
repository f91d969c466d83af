# SPDX-License-Identifier: Apache-2.0
"""The model for users: tokens in, logits and every intermediate out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeAlias, Unpack, cast, overload

import numpy as np
from numpy.typing import ArrayLike

from gemma4 import checks, info
from gemma4.core import F32, Core, KVDtype, Precision
from gemma4.dictionaries import SAE, Dictionary, LayeredDictionary, LayeredRecord, Record, Transcoder
from gemma4.dictionaries.layered_splice import LayeredSplice
from gemma4.dictionaries.splice import Entered, Splice, warn_of_another_model
from gemma4.edits.base import Edit, checked_edits
from gemma4.edits.scope import Extent
from gemma4.encoders.encoder import Encoder, encoder_of
from gemma4.encoders.hooks import EncoderTaps
from gemma4.encoders.soft_tokens import EncodedMedia, encode_audio, encode_image, encode_video
from gemma4.generation.loop import Generation
from gemma4.generation.options import GenerateOptions
from gemma4.generation.stream import TextStream, generate, stream
from gemma4.guard import GuardScores, Policies, answer_ids, guard_prompts, probabilities
from gemma4.inputs import PromptLike, Single, TokensLike, is_batch, opened_prompts, tokenize_prompt
from gemma4.interp.cache import ActivationCache
from gemma4.interp.hooks import (
    Activated,
    Capture,
    Hook,
    Nested,
    active_hooks,
    apart,
    bind_hooks,
    check_hooks,
    checked_hooks,
    hooks_of,
)
from gemma4.interp.sites import Names, Site, SiteTable, names_of
from gemma4.load import open_checkpoint
from gemma4.media.audio import AudioLike
from gemma4.media.image import ImageLike
from gemma4.media.prompt import TokenizedPrompt
from gemma4.media.video import FRAME_TOKENS, NUM_FRAMES, Sampling, VideoLike
from gemma4.narrow import is_array, is_integer, is_sequence
from gemma4.profile import Profile, profiling
from gemma4.sequence import Sequence, new_sequence, restore
from gemma4.step import Output, Positions, Prompt, Rows, run_step

__all__ = ["KVDtype", "Model", "Precision", "load"]

_ELSEWHERE = {
    "logits": "return_type logits_to_keep num_logits_to_keep",
    "sequence": "past_key_values past_kv_cache kv_cache cache",
    "`run_from(resid, layer, ids)`": "start_at_layer",
    "token ids in place of text, which gets BOS": "prepend_bos",
}
_STOP = {"`run_with_cache(ids, stop_at_layer=n)`": "stop_at_layer"}
_FORWARD_OPTIONS = ("logits", "sequence")
_FORWARD_OPTIONS_ELSEWHERE = checks.by_their_names(_ELSEWHERE | _STOP)
_HOOK_OPTIONS = ("hooks", *_FORWARD_OPTIONS)
_HOOK_OPTIONS_ELSEWHERE = checks.by_their_names({"hooks": "fwd_hooks", **_ELSEWHERE, **_STOP})
_CACHE_OPTIONS = ("names", "names_filter", "pos", "stop_at_layer", "logits", "sequence")
_CACHE_OPTIONS_ELSEWHERE = checks.by_their_names(
    {
        "names": "hook_names hook_filter layers sites",
        "pos": "pos_slice positions seq_pos",
        "stop_at_layer": "end_layer n_layers",
        **_ELSEWHERE,
    }
)
Start: TypeAlias = tuple[int, Seq[ArrayLike]]  # the first layer to run, and what enters it for each prompt


def load(
    name_or_path: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    threads: int = 0,
    precision: Precision | None = None,
    kv_dtype: KVDtype | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Model:
    """Open a checkpoint.

        model = gemma4.load("tiny-e")
        model = gemma4.load("/models/gemma-4-E2B-it-Q4_0.gguf", threads=4, kv_dtype="q8_0")

    The files are mapped, not read, so loading is fast for any size.

    name_or_path  a shipped model ("tiny-e", "tiny-moe"), a Hugging Face directory, a hub id that is in the local cache
                  (nothing is downloaded), or a .gguf file: any part of a split one; tokenizer and chat template come
                  from its metadata
    mmproj        path of the file with a .gguf model's image and audio encoders; None = the only mmproj*.gguf beside
                  it, if there is one that fits
    threads       1 to 1024; 0 = the physical cores that this process may use, at most its CPU quota
    precision     "exact": the same bits for any thread count, batch, chunking and machine; "high": float32's accuracy
                  by bf16 products, the same bits for any batch, on processors with AMX and for bf16 weights, else
                  as "exact"; "fast": the fastest method; None = "fast" if a weight is quantised, else "exact"
    kv_dtype      type of new sequences' keys and values: "f32", "f16", "bf16" or "q8_0" (heads of a multiple of 32);
                  None = "f16" when fast, else "f32"
    progress      function (files done, files in all, file name), called while a checkpoint in parts is opened

    Raises FileNotFoundError (no such model, or a part is missing), FormatError (damaged or misshapen files, an mmproj
    of another model), NotImplementedError (an architecture, dtype or file format that this engine does not run),
    ValueError (an option out of range, an mmproj for a directory), MemoryError.
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

    def encode_image(self, image: ImageLike, image_tokens: int | None = None) -> F32:
        """Soft tokens of one picture, float32 [n, d_model], n <= image_tokens: the input of the text model.

        image         path, bytes of a file, PIL image, or array [height, width(, 1|3|4)] of uint8, uint16 or floats in
                      0..1
        image_tokens  70, 140, 280, 560 or 1120; None = `Model.image_tokens`

        Raises NotImplementedError (no vision encoder), and as `gemma4.media.image.preprocess`: FormatError (damaged, no
        picture, too many pixels), ValueError, OSError, ImportError. `model.vision.run_with_cache` shows the inside.
        """
        return encode_image(self, image, self.image_tokens if image_tokens is None else image_tokens)

    def encode_audio(self, audio: AudioLike, rate: int | None = None) -> F32:
        """Soft tokens of one recording, float32 [n, d_model], one for every 40 ms.

        audio  path, bytes of a file, or array [n] or [n, channels] of floats in -1..1 or of integers of full scale
        rate   samples per second of an array, None = 16,000; files state their own

        Raises NotImplementedError (no audio encoder), and as `gemma4.media.audio.load_audio` and `log_mel`: FormatError
        (damaged), ValueError (array, rate, over 30 s, too short), OSError, ImportError. `model.audio.run_with_cache`
        shows the inside.
        """
        return encode_audio(self, audio, rate)

    def encode_video(
        self,
        video: VideoLike,
        image_tokens: int = FRAME_TOKENS,
        *,
        num_frames: int = NUM_FRAMES,
        fps: float | None = None,
        sampling: Sampling = "time",
    ) -> F32:
        """Soft tokens of the frames of one video, float32 [frames * n, d_model], n <= image_tokens.

        video, num_frames, fps, sampling: see `gemma4.media.video.load_video`; or a VideoFrames. Raises what that
        raises, and NotImplementedError if the model has no vision encoder.
        """
        return encode_video(self, video, image_tokens, num_frames=num_frames, fps=fps, sampling=sampling)

    def to_prompt(
        self,
        messages: PromptLike,
        *,
        tools: Seq[Mapping[str, object]] | None = None,
        think: bool | None = None,
        image_tokens: int | None = None,
    ) -> TokenizedPrompt:
        """Chat messages as `forward`, `run_with_cache` and `generate` take them, with the places of their soft tokens.

        tools, think: passed to the chat template. image_tokens: budget of each image. Raises as `generate`.
        """
        return tokenize_prompt(self, messages, tools=tools, think=think, image_tokens=image_tokens)

    # -- the forward pass ----------------------------------------------------------------------------------------

    def new_sequence(self, *, capacity: int = 0, kv_dtype: KVDtype | None = None) -> Sequence:
        """An empty cached sequence: what it has read is not run again.

        capacity  the most positions it can hold; 0 = the model's context
        kv_dtype  type of its keys and values, "f32", "f16", "bf16" or "q8_0"; None = the model's

        Raises ValueError (capacity beyond the context, unknown type), FormatError (a weight file changed since it was
        loaded).
        """
        return new_sequence(self, capacity=capacity, kv_dtype=kv_dtype)

    def restore(self, path: str | os.PathLike[str]) -> Sequence:
        """A sequence from a file that `Sequence.save` wrote, of the same weights; it continues with the same bits.

        Raises FormatError (no such file's format, or damaged), StateError (saved by another model), OSError.
        """
        return restore(self, path)

    @overload
    def forward(self, ids: Single, *, logits: Rows = "all", sequence: Sequence | None = None) -> F32: ...
    @overload
    def forward(self, ids: Single, *, logits: None, sequence: Sequence | None = None) -> None: ...
    @overload
    def forward(
        self, ids: Seq[Single], *, logits: Rows = "all", sequence: Seq[Sequence] | None = None
    ) -> list[F32]: ...
    @overload
    def forward(self, ids: Seq[Single], *, logits: None, sequence: Seq[Sequence] | None = None) -> list[None]: ...
    def forward(
        self,
        ids: TokensLike,
        *,
        logits: Positions = "all",
        sequence: Sequence | Seq[Sequence] | None = None,
        **unknown: object,
    ) -> F32 | None | list[F32] | list[None]:
        """Next-token logits, float32 [n, d_vocab]; a list of prompts gives a list (ragged, never padded).

            model.forward("Once upon a time", logits="last").argmax()

        ids       text (BOS is added unless the sequence continues), token ids int [pos], what `to_prompt` made, or a
                  list of those, all run in one step
        logits    positions within `ids` to return, n of them: "all", "last", an int, a slice, a list (negative counts
                  from the end), or None: nothing is returned, only the sequence grows
        sequence  cached sequence to continue, a list of them for a list of prompts; None = a fresh one that is dropped

        Raises ValueError (empty prompt, id or position out of range, other numbers of prompts and sequences), TypeError
        (ids that are no integers, an unknown option: its message names the nearest), CapacityError (longer than the
        context, before anything is computed), StateError (sequence closed or in use by another thread, text without a
        tokenizer), FormatError (weight files changed), KeyboardInterrupt within 100 ms of Ctrl-C.
        """
        checks.known_names(unknown, _FORWARD_OPTIONS, _FORWARD_OPTIONS_ELSEWHERE)
        return self._forward(ids, logits, sequence)

    @overload
    def run_with_cache(
        self,
        ids: Single,
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: Rows = "all",
        sequence: Sequence | None = None,
    ) -> tuple[F32, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        ids: Single,
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: None,
        sequence: Sequence | None = None,
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        ids: Single,
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: int,
        logits: Positions = "all",
        sequence: Sequence | None = None,
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_with_cache(
        self,
        ids: Seq[Single],
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: Rows = "all",
        sequence: Seq[Sequence] | None = None,
    ) -> tuple[list[F32], list[ActivationCache]]: ...
    @overload
    def run_with_cache(
        self,
        ids: Seq[Single],
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: None,
        sequence: Seq[Sequence] | None = None,
    ) -> tuple[list[None], list[ActivationCache]]: ...
    @overload
    def run_with_cache(
        self,
        ids: Seq[Single],
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: int,
        logits: Positions = "all",
        sequence: Seq[Sequence] | None = None,
    ) -> tuple[list[None], list[ActivationCache]]: ...
    def run_with_cache(
        self,
        ids: TokensLike,
        names: Names = None,
        *,
        names_filter: Names = None,
        pos: Positions = None,
        stop_at_layer: int | None = None,
        logits: Positions = "all",
        sequence: Sequence | Seq[Sequence] | None = None,
        **unknown: object,
    ) -> tuple[F32 | None | list[F32] | list[None], ActivationCache | list[ActivationCache]]:
        """Logits as `forward` gives them, and the activations: (logits, ActivationCache), lists of both for a list.

            logits, cache = model.run_with_cache("Once upon a time", "blocks.*.hook_resid_post", pos=-1)
            cache["blocks.3.hook_resid_post"]  # float32 [1, d_model]

        ids, logits, sequence: as for `forward`.

        names          sites to keep: a name or glob ("*" is really every one), several, or a predicate on the name;
                       None = every site of the text model except those that grow with T*S, T*heads*d_model or d_vocab
                       (attn.hook_attn_scores, attn.hook_pattern, attn.hook_result, hook_logits_raw, hook_logits). Only
                       what is named is stored. `model.sites` lists the names, docs/sites.md explains them. Names that
                       begin with "vision." or "audio." are of the encoders: see `ActivationCache.media`. Sites inside
                       a dictionary (`attach`) are kept if they are named: see `ActivationCache.features`
        names_filter   another name for `names`, that of TransformerLens
        pos            keep only these positions of `ids`: an int, a slice, a list (negative counts from the end); None:
                       all of them
        stop_at_layer  run blocks 0..n-1 only: logits are None, and the sequence does not grow; None = all blocks

        Raises as `forward`, and SiteError (a name that matches no site, with the closest ones; a site that
        stop_at_layer leaves out), ValueError (pos or stop_at_layer out of range), TypeError (names that are no names;
        an unknown option: its message names the nearest).
        """
        checks.known_names(unknown, _CACHE_OPTIONS, _CACHE_OPTIONS_ELSEWHERE)
        if names is not None and names_filter is not None:
            raise TypeError("names_filter is another name for names: give one of them")
        names = names_filter if names is None else names
        return self._run_with_cache(ids, names, None, pos, stop_at_layer, logits, sequence)

    @overload
    def run_from(
        self,
        resid: ArrayLike,
        layer: int,
        ids: Single,
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: Rows = "all",
        sequence: Sequence | None = None,
    ) -> tuple[F32, ActivationCache]: ...
    @overload
    def run_from(
        self,
        resid: ArrayLike,
        layer: int,
        ids: Single,
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: None,
        sequence: Sequence | None = None,
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_from(
        self,
        resid: ArrayLike,
        layer: int,
        ids: Single,
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: int,
        logits: Positions = "all",
        sequence: Sequence | None = None,
    ) -> tuple[None, ActivationCache]: ...
    @overload
    def run_from(
        self,
        resid: Seq[ArrayLike],
        layer: int,
        ids: Seq[Single],
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: Rows = "all",
        sequence: Seq[Sequence] | None = None,
    ) -> tuple[list[F32], list[ActivationCache]]: ...
    @overload
    def run_from(
        self,
        resid: Seq[ArrayLike],
        layer: int,
        ids: Seq[Single],
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: None = None,
        logits: None,
        sequence: Seq[Sequence] | None = None,
    ) -> tuple[list[None], list[ActivationCache]]: ...
    @overload
    def run_from(
        self,
        resid: Seq[ArrayLike],
        layer: int,
        ids: Seq[Single],
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: int,
        logits: Positions = "all",
        sequence: Seq[Sequence] | None = None,
    ) -> tuple[list[None], list[ActivationCache]]: ...
    def run_from(
        self,
        resid: ArrayLike | Seq[ArrayLike],
        layer: int,
        ids: TokensLike,
        names: Names = None,
        *,
        pos: Positions = None,
        stop_at_layer: int | None = None,
        logits: Positions = "all",
        sequence: Sequence | Seq[Sequence] | None = None,
    ) -> tuple[F32 | None | list[F32] | list[None], ActivationCache | list[ActivationCache]]:
        """Run the rest of the model, from a residual stream that you give: what `run_with_cache` returns.

            _, cache = model.run_with_cache(ids, "blocks.3.hook_resid_pre")
            logits, _ = model.run_from(cache["resid_pre", 3], 3, ids)    # the logits of the whole run, to the bit

        ids, names, pos, stop_at_layer, logits: as for `run_with_cache`; sites of earlier blocks are not reached.

        resid     float32 [pos, d_model], a row for each token of `ids`; for a list of prompts a list of such arrays
        layer     the first block that runs, 0 to the last one
        ids       the tokens: per-layer embeddings and the attention among soft tokens need them
        sequence  its positions stand before the new ones, as for `run_with_cache`; but it does not grow, as blocks
                  before `layer` compute no keys and values for it

        Raises as `run_with_cache`, and ValueError: resid of another shape, or a block from `layer` on that attends to
        keys and values of one before it (in models whose last blocks share them), which then do not exist.
        """
        layer = checks.integer("layer", layer, 0, self.n_layers - 1)
        given = cast("Seq[ArrayLike]", resid if is_batch(ids) else [resid])
        return self._run_with_cache(ids, names, (layer, given), pos, stop_at_layer, logits, sequence)

    def _run_with_cache(
        self,
        ids: TokensLike,
        names: Names,
        start: Start | None,
        pos: Positions,
        stop_at_layer: int | None,
        logits: Positions,
        sequence: Sequence | Seq[Sequence] | None,
    ) -> tuple[F32 | None | list[F32] | list[None], ActivationCache | list[ActivationCache]]:
        if stop_at_layer is not None:
            stop_at_layer, logits = self._checked_stop(stop_at_layer), None
        table = self._sites_from(start)
        inside, names = apart(names, active_hooks(self), table, stop_at_layer=stop_at_layer)
        capture = table.select(names_of(names), stop_at_layer=stop_at_layer)
        pos = "all" if pos is None else pos
        kept = Capture()
        with Activated(self, [(inside, kept)] if inside else []):
            outputs = self._run(ids, sequence, names, stop_at_layer, start, logits=logits, capture=capture, pos=pos)
        caches = cast("list[ActivationCache]", [out.cache for out in outputs])
        for number, cache in enumerate(caches):
            cache.keep_inside(kept.kept.get(number, {}))
        if is_batch(ids):
            return cast("list[F32]", [out.logits for out in outputs]), caches
        return outputs[0].logits, caches[0]

    @overload
    def run_with_hooks(
        self, ids: Single, hooks: Iterable[Hook] | Edit, *, logits: Rows = "all", sequence: Sequence | None = None
    ) -> F32: ...
    @overload
    def run_with_hooks(
        self, ids: Single, hooks: Iterable[Hook] | Edit, *, logits: None, sequence: Sequence | None = None
    ) -> None: ...
    @overload
    def run_with_hooks(
        self,
        ids: Seq[Single],
        hooks: Iterable[Hook] | Edit,
        *,
        logits: Rows = "all",
        sequence: Seq[Sequence] | None = None,
    ) -> list[F32]: ...
    @overload
    def run_with_hooks(
        self, ids: Seq[Single], hooks: Iterable[Hook] | Edit, *, logits: None, sequence: Seq[Sequence] | None = None
    ) -> list[None]: ...
    def run_with_hooks(
        self,
        ids: TokensLike,
        hooks: Iterable[Hook] | Edit | None = None,
        *,
        logits: Positions = "all",
        sequence: Sequence | Seq[Sequence] | None = None,
        **unknown: object,
    ) -> F32 | None | list[F32] | list[None]:
        """`forward` with hooks, which read or edit activations while the model runs.

            model.run_with_hooks("Once upon a time", [("blocks.3.hook_mlp_out", lambda array, site: 0 * array)])

        ids, logits, sequence: as for `forward`.

        hooks  pairs (names, fn): names as for `run_with_cache`, but not None. fn(array, site) gets float32 with the
               site's shape and a `HookPoint`, and edits the array in place (returning None) or returns one of the same
               shape. Edits of `gemma4.edits` may stand among them, and one alone for the list.

        Raises as `forward`, and SiteError (a name that matches no site), TypeError (no hooks, no pair, an unknown
        option, or an array of text or objects returned), ValueError (another shape), and whatever a hook raises. Warns
        NaNWarning once per site.
        """
        checks.known_names(unknown, _HOOK_OPTIONS, _HOOK_OPTIONS_ELSEWHERE)
        with self.hooks(checked_hooks(hooks)):
            return self._forward(ids, logits, sequence)

    def hooks(self, hooks: Iterable[Hook] | Edit) -> AbstractContextManager[None]:
        """`with model.hooks([...]):` forward, run_with_cache, generate and stream run with these hooks. Nestable.

        hooks: pairs (names, fn) and edits, as for `run_with_hooks`. Hooks of outer blocks act first; captured values
        are those after all edits. Raises SiteError and TypeError here, not at the first run, and NotImplementedError
        for a name of an encoder that the model does not have.
        """
        hooks = checked_hooks(hooks)
        attached = [hook for hook in active_hooks(self) if isinstance(hook, Nested)]
        bind_hooks(
            self.sites, hooks_of([*attached, *hooks])
        )  # raises here for a wrong name, not at the first forward pass
        EncoderTaps.of(self, hooks)
        return Activated(self, hooks)

    def edit(self, edits: Edit | Iterable[Edit]) -> AbstractContextManager[None]:
        """`with model.edit([Steer(...), Ablate(...)]):` the same as `hooks`, for edits as data: see gemma4.edits.

        Raises TypeError for what is no edit, SiteError and ValueError for one that does not fit this model.
        """
        return self.hooks(checked_edits(edits))

    @overload
    def attach(self, dictionary: SAE | Transcoder, *, error: bool = True) -> AbstractContextManager[Record]: ...
    @overload
    def attach(self, dictionary: LayeredDictionary, *, error: bool = True) -> AbstractContextManager[LayeredRecord]: ...
    def attach(
        self, dictionary: SAE | Transcoder | LayeredDictionary, *, error: bool = True
    ) -> AbstractContextManager[Record] | AbstractContextManager[LayeredRecord]:
        """`with model.attach(sae) as record:` the dictionary's reconstruction takes the place of the site it writes.

            with model.attach(sae) as record:
                model.forward("Once upon a time")
            record.features()[-1].ids

        Inside the block the dictionary has sites of its own, named after the site that it reads: blocks.5.
        hook_resid_post.hook_sae_acts_post (float [pos, d_sae]), .hook_sae_input, .hook_sae_recons and .hook_sae_error.
        Functions (`hooks`, `run_with_hooks`) can read and edit them. `run_with_cache` and `generate(capture=…)` keep
        those that are named. hook_sae_acts_pre, before the activation function, is computed if it is named exactly, and
        can only be read.

        error: add what the reconstruction misses, so that logits stay the same up to rounding; False replaces the site,
        but for positions that the dictionary was not trained on. Nestable.

        A `Crosscoder` or `CrossLayerTranscoder` is read and written at each of its sites; the record has `layers`.
        Layer l's output is made of the features of all layers that the pass has read by then, and the error is what the
        unedited ones miss. So it must be causal: a feature writes to no site that the pass computes before the one
        where it is read.

        Warns if its files name another model by its `fingerprint`. Raises ValueError (a dictionary that names no site,
        of another width, or not causal: a forward pass that meets such a feature raises it, too), SiteError (a site
        that this model lacks), TypeError.
        """
        if isinstance(dictionary, LayeredDictionary):
            layered = LayeredSplice(self.sites, dictionary, error=error)
            return Entered(self.hooks([layered]), layered.record)
        if not isinstance(cast(object, dictionary), Dictionary):
            kinds = "an SAE, a Transcoder, a Crosscoder or a CrossLayerTranscoder"
            raise TypeError(f"{kinds} can be attached, got {type(dictionary).__name__}")
        spliced = Splice(self.sites, dictionary, error=error)
        warn_of_another_model(dictionary, lambda: self.fingerprint)
        return Entered(self.hooks([spliced]), spliced.record)

    def profile(self) -> AbstractContextManager[Profile]:
        """`with model.profile() as profile:` notes the time of every operation run inside; see gemma4.profile."""
        return profiling(self)

    def _checked_stop(self, layer: int) -> int:
        if not is_integer(layer) or not 0 <= layer <= self.n_layers:
            checks.fail("stop_at_layer", layer, f"0 to {self.n_layers} (the number of layers)")
        return int(layer)

    def _forward(
        self, ids: TokensLike, logits: Positions, sequence: Sequence | Seq[Sequence] | None
    ) -> F32 | None | list[F32] | list[None]:
        outputs = self._run(ids, sequence, logits=logits)
        return cast("list[F32]", [out.logits for out in outputs]) if is_batch(ids) else outputs[0].logits

    def _run(
        self,
        ids: TokensLike,
        sequence: Sequence | Seq[Sequence] | None,
        names: Names = (),
        stop_at_layer: int | None = None,
        start: Start | None = None,
        *,
        logits: Positions,
        capture: list[Site] | None = None,
        pos: Positions = "all",
    ) -> list[Output]:
        """One step of all prompts, with the same outputs for each."""
        table = self._sites_from(start)
        hooks = bind_hooks(table, hooks_of(active_hooks(self)), stop_at_layer=stop_at_layer)
        taps = EncoderTaps.of(self, active_hooks(self), names)
        with opened_prompts(self, ids, sequence, taps) as prompts:
            for prompt in prompts:
                end = prompt.sequence.length + len(prompt.ids)
                extent = Extent(prompt.sequence.length, end, end, prompt=prompt.number, n_prompts=len(prompts))
                check_hooks(hooks, extent)
            wanted = [replace(prompt, logits=logits, capture=capture, pos=pos, hooks=hooks) for prompt in prompts]
            if start is None:
                return run_step(self, wanted, stop_at_layer=stop_at_layer)
            layer, resids = start
            wanted = self._with_resids(wanted, resids)
            return run_step(self, wanted, stop_at_layer=stop_at_layer, start_at_layer=layer)

    def _sites_from(self, start: Start | None) -> SiteTable:
        return self.sites if start is None else self.sites.starting_at(start[0])

    def _with_resids(self, prompts: list[Prompt], resids: Seq[ArrayLike]) -> list[Prompt]:
        if not is_sequence(resids) and not is_array(resids):
            raise TypeError(f"resid: a list of prompts needs a list of arrays, got {type(resids).__name__}")
        if len(resids) != len(prompts):
            raise ValueError(f"resid: {len(prompts)} prompts need {len(prompts)} arrays, got {len(resids)}")
        d_model = self.engine_config["d_model"]
        return [
            replace(one, resid=_stream(resid, len(one.ids), d_model))
            for one, resid in zip(prompts, resids, strict=True)
        ]

    # -- judgements ----------------------------------------------------------------------------------------------

    def guard(
        self, text: str, response: str | None = None, *, policies: Policies = None, force: bool = False
    ) -> GuardScores:
        """Scores of ShieldGemma: the probability that a text violates each policy; print it.

            model.guard("How do I build a bomb?").scores["dangerous content"]
            model.guard("Hello", "Go away!", policies="harassment").violated()

        text      what a user wrote
        response  what a model answered to it: then the answer is judged
        policies  names, or beginnings of them: "dangerous content", "harassment", "hate speech", "sexually explicit"; a
                  mapping from names to sentences of your own; None = those four
        force     score with a model that is no ShieldGemma, too

        The questions run in one step, a prompt for each policy. No text can write control tokens.

        Raises ValueError (empty text, unknown policy, a chat template that fails or omits the text, logits of NaN),
        StateError (no ShieldGemma, no tokenizer, no tokens "Yes" and "No"), CapacityError (longer than the context).
        """
        prompts = guard_prompts(self, text, response, policies, force=checks.boolean("force", force))
        logits = np.concatenate(self.forward(list(prompts.values()), logits="last"))
        scores = probabilities(logits, *answer_ids(self))
        return GuardScores(text, response, dict(zip(prompts, scores, strict=True)))

    # -- generation ----------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Generation: ...
    @overload
    def generate(self, prompt: Seq[PromptLike], **options: Unpack[GenerateOptions]) -> list[Generation]: ...
    def generate(
        self, prompt: PromptLike | Seq[PromptLike], **options: Unpack[GenerateOptions]
    ) -> Generation | list[Generation]:
        """Continue a prompt: a `Generation` with its text, tokens and more; a list of them for a list of prompts.

            model.generate("Once upon a time", max_tokens=40, temperature=0).text
            model.generate([{"role": "user", "content": "What is the capital of France?"}]).text

        prompt: text (continued as it is, BOS added once); token ids, int [pos]; chat messages (dicts with "role" and
            "content", put through the checkpoint's own template; content may hold images, sound and video, see
            docs/media.md); what `to_prompt` made of them; or a list of any of those, decoded together in one step a
            token. A prompt's result does not depend on the others.

        Options are given by name (omitted ones, or None, come from the checkpoint's generation_config, else from the
        defaults in brackets):

        max_tokens      int >= 1: most tokens to generate [256]
        temperature     float, 0 to 10,000: divides the logits before a token is drawn; 0 = greedy: the likeliest one
                        [1, or 0 if the checkpoint does not say that it samples]
        top_k           int: draw from the k likeliest tokens only; 0 or -1 = all [0]
        top_p           float, 0 to 1: draw from the fewest tokens whose probabilities sum to this [1 = all]
        min_p           float, 0 to 1: not from tokens less probable than this share of the likeliest one's probability
                        [0]
        repetition_penalty   float, 0.001 to 1,000, for tokens that prompt or answer hold: logits > 0 divided, others
                        multiplied by it [1 = off]
        presence_penalty, frequency_penalty   floats, -1,000 to 1,000: subtracted from logits of tokens in the answer,
                        once or per occurrence [0]
        logit_bias      {token id: float added to its logit}; -inf bans it [none]
        seed            int >= 0: the same draws each time; each prompt of a list has its own [None = unpredictable]
        processors      functions (ids int32 [pos], logits float32 [d_vocab]) -> logits, or None after an edit in place
                        [none]
        logprobs        int >= 0: result.logprobs holds each token's log-probability (nats) and that many alternatives
                        [None = neither]
        stop            str, or several, that end the answer and are not part of it [none]
        stop_ids        int, or several: token ids that end it [the checkpoint's, and for messages the end of the
                        template's turn]
        hooks           pairs (site, fn(array, site)) that read or edit activations, see `run_with_hooks`; or edits of
                        gemma4.edits [none]
        capture         sites to keep in result.cache: a name, glob, list of them, or predicate, as for `run_with_cache`
                        [None = no cache]
        sequence        a `Sequence` that keeps the cache, for one prompt: what the prompt shares with it is not run
                        again (chat turns) [None]
        tools           of messages: JSON schemas (dicts) of functions that the model may call [none]
        think           of messages: bool, whether to think first [what the chat template does by itself]
        image_tokens    of messages: soft tokens for each image at most: 70, 140, 280, 560 or 1120 [the model's own]
        show_thinking   bool: `stream` also yields pieces of the thoughts (`piece.channel == "thinking"`) [False]

        Raises TypeError (no such option; its message names the nearest), ValueError (empty prompt, bad value),
        CapacityError (prompt longer than the context, before anything is computed), StateError (messages without a chat
        template, text without a tokenizer), FormatError (a damaged image or sound), NotImplementedError (media that the
        model has no encoder for), KeyboardInterrupt within 100 ms of Ctrl-C.
        """
        return generate(self, prompt, **options)

    def stream(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> TextStream:
        """Continue one prompt piece by piece: an iterator of `str`, whose `result` is the `Generation` at its end.

            stream = model.stream("Once upon a time", max_tokens=40)
            for piece in stream:
                print(piece, end="", flush=True)
            print(stream.result.finish_reason)

        prompt: one prompt, as for `generate`. Pieces are whole characters; `piece.channel` is "text" or, with
        show_thinking, "thinking". `close()`, or leaving a `with` block, stops early.

        Options and their defaults are those of `generate`: max_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias, seed, processors, logprobs, stop, stop_ids,
        hooks, capture, sequence, tools, think, image_tokens, show_thinking.

        Raises as `generate`, here and not at the first piece, and ValueError for a list of prompts. Errors of a hook, a
        processor or Ctrl-C are raised at the piece.
        """
        return stream(self, prompt, **options)


def _stream(resid: ArrayLike, n_rows: int, d_model: int) -> F32:
    """A residual stream as the engine takes it. Raises TypeError (no numbers), ValueError (another shape)."""
    try:
        array = np.asarray(resid)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"resid must be an array [{n_rows}, {d_model}]: {error}") from None
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"resid must hold numbers, got {array.dtype}")
    if array.shape != (n_rows, d_model):
        raise ValueError(f"resid must be [{n_rows}, {d_model}], a row for each token of ids, got {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=np.float32)
