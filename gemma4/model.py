# SPDX-License-Identifier: Apache-2.0
"""The model as a researcher sees it: tokens in, logits and every intermediate out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine, info
from gemma4.encoders.encoder import Encoder
from gemma4.encoders.hooks import EncoderTaps
from gemma4.encoders.soft_tokens import EncodedMedia, encode_audio, encode_image, encode_video
from gemma4.inputs import Messages, TokensLike, as_batch, tokenize_prompt
from gemma4.interp.hooks import Hook, NaNLog, activated, active_hooks, bind_hooks, hooks_of
from gemma4.interp.sites import Names, SiteTable, names_of, reusable
from gemma4.load import Checkpoint, TextConfig, open_checkpoint
from gemma4.load.checkpoint import EngineTensor
from gemma4.load.dtypes import is_quantised, stored_rows
from gemma4.media.image import BUDGETS
from gemma4.media.medium import Modalities
from gemma4.media.prompt import TokenizedPrompt
from gemma4.profile import Profile, profiling
from gemma4.sequence import KVDtype, Sequence, restore
from gemma4.step import Output, Positions, Want, run_step

if TYPE_CHECKING:
    from gemma4.generation.stream import TextStream
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]
Precision: TypeAlias = Literal["exact", "fast"]


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


class Model:
    """A loaded model. Immutable weights: threads may share it, each with its own sequences. Made by `gemma4.load`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int = 0,
        precision: Precision | None = None,
        kv_dtype: KVDtype | None = None,
    ) -> None:
        if kv_dtype is not None and kv_dtype not in get_args(KVDtype):
            raise ValueError(f"kv_dtype must be one of {', '.join(get_args(KVDtype))} or None, got {kv_dtype!r}")
        precision = precision or ("fast" if checkpoint.quantised else "exact")
        self.checkpoint = checkpoint
        self.engine_config = checkpoint.engine_config
        self.engine = _engine.Model(
            checkpoint.engine_config,  # type: ignore[arg-type]
            checkpoint.engine_tensors,
            threads=threads,
            precision=precision,
        )
        self.kv_dtype: KVDtype = kv_dtype or ("f16" if precision == "fast" else "f32")
        self.sites = SiteTable(self.engine.sites(), self.engine_config["layers"])
        self.nan_log = NaNLog()

    # -- what is loaded ------------------------------------------------------------------------------------------

    @property
    def config(self) -> TextConfig:
        """The text model's configuration, whichever spelling the checkpoint uses."""
        return self.checkpoint.config

    @property
    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Every stored tensor under its stored name: read-only views of the file, bf16 as ml_dtypes.bfloat16."""
        return self.checkpoint.tensors

    @property
    def n_layers(self) -> int:
        return len(self.engine_config["layers"])

    @property
    def d_vocab(self) -> int:
        return self.engine_config["d_vocab"]

    @property
    def context_length(self) -> int:
        """The most positions a sequence of this model can hold."""
        return self.engine_config["context_length"]

    @property
    def n_token_ids(self) -> int:
        """Ids below this may be fed in: every embedding table has a row for them."""
        config = self.engine_config
        return min(config["d_vocab"], config["d_vocab_ple"]) if config["d_ple"] else config["d_vocab"]

    def info(self) -> info.ModelInfo:
        """Architecture, parameters, types, instruction set, threads, memory, warnings: print it."""
        return info.describe(self)

    def __repr__(self) -> str:
        how = f"{self.engine.precision}, {self.engine.isa}"
        return f"<gemma4.Model {self.checkpoint.path.name}: {self.n_layers} layers, {how}>"

    def close(self) -> None:
        """Let go of the files; any later run raises StateError. Arrays handed out before stay valid."""
        self.checkpoint.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def weight(self, name: str) -> F32:
        """A text-model tensor as float32 (a copy), without the checkpoint's prefix: "layers.0.mlp.up_proj.weight"."""
        return self._rows(name, slice(None))

    def layer_scalar(self, layer: int) -> float:
        """The number that block `layer` multiplies the residual stream by at its end."""
        return float(self._rows(f"layers.{layer}.layer_scalar", slice(0, 1))[0])

    def unembed(self, ids: NDArray[np.integer[Any]] | slice) -> F32:
        """Rows of the output head, float32 [n, d_model]: logit before the softcap = row . ln_final.hook_out."""
        tied = "lm_head.weight" not in self.checkpoint.engine_tensors
        return self._rows("embed_tokens.weight" if tied else "lm_head.weight", ids)

    def _rows(self, name: str, ids: Any) -> F32:
        """A tensor, or some of its rows, unpacked to float32; only those rows are read."""
        dtype, shape, _, _ = self._stored(name)
        rows = self._view(name)[ids]
        if not is_quantised(dtype):
            return rows.astype(np.float32)
        unpacked = (*rows.shape[:-1], shape[-1])
        return _engine.dequantize(dtype, unpacked, np.ascontiguousarray(rows), 0)

    def _view(self, name: str) -> NDArray[Any]:
        return stored_rows(*self._stored(name))

    def _stored(self, name: str) -> EngineTensor:
        if name not in self.checkpoint.engine_tensors:
            raise KeyError(f"no tensor {name!r} in the text model")
        return self.checkpoint.engine_tensors[name]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell models apart: configuration, tensor shapes, and a sample of every tensor's bytes."""
        digest = hashlib.sha256(json.dumps(self.checkpoint.hf_config, sort_keys=True, default=str).encode())
        for name in sorted(self.checkpoint.engine_tensors):
            dtype, shape, *_ = self.checkpoint.engine_tensors[name]
            flat = self._view(name).reshape(-1)
            digest.update(f"{name} {dtype} {tuple(shape)}".encode())
            digest.update(flat[:512].tobytes() + flat[-512:].tobytes())
        return digest.hexdigest()[:16]

    # -- text ----------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use. Raises StateError if the checkpoint has none; token ids work without."""
        return self.checkpoint.load_tokenizer()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's own chat template, None if it has none."""
        return self.checkpoint.load_chat_template()

    def to_tokens(self, text: str, bos: bool = True) -> I32:
        """int32 [pos]: token ids of `text`, BOS first exactly once (bos=False: none added)."""
        return self.tokenizer.encode(text, bos=bos)

    def to_string(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.tokenizer.decode(ids)

    def to_str_tokens(self, text_or_ids: str | Iterable[int], bos: bool = True) -> list[str]:
        """One string per token, for labels in plots."""
        ids = self.to_tokens(text_or_ids, bos=bos) if isinstance(text_or_ids, str) else text_or_ids
        return self.tokenizer.str_tokens(ids)

    def to_single_token(self, text: str) -> int:
        """The id of text that is exactly one token. Raises ValueError otherwise, with the tokens it splits into."""
        ids = self.to_tokens(text, bos=False)
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.tokenizer.str_tokens(ids)}")
        return int(ids[0])

    # -- images, sound, video ------------------------------------------------------------------------------------

    @property
    def modalities(self) -> Modalities:
        """What the checkpoint has encoders for."""
        return Modalities.of(self.checkpoint.encoders, self.checkpoint.encoder_advice)

    @cached_property
    def image_tokens(self) -> int:
        """How many soft tokens a picture takes at most where nobody says: 280, or what processor_config.json says."""
        processor = self.checkpoint.processor_config.get("image_processor")
        found = processor.get("max_soft_tokens") if isinstance(processor, Mapping) else None
        return int(found) if isinstance(found, int) and found in BUDGETS else 280

    @cached_property
    def encoded_media(self) -> EncodedMedia:
        """Soft tokens of the media seen last, by content."""
        return EncodedMedia()

    @cached_property
    def vision(self) -> Encoder:
        """The image encoder, bound at first use. Raises NotImplementedError if the checkpoint has none."""
        return Encoder(self, "vision")

    @cached_property
    def audio(self) -> Encoder:
        """The audio encoder, bound at first use. Raises NotImplementedError if the checkpoint has none."""
        return Encoder(self, "audio")

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
        """An empty cached sequence; capacity in positions, 0 = the model's context."""
        return Sequence(self, self.engine.new_sequence(kv_dtype=kv_dtype or self.kv_dtype, capacity=capacity))

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
        outputs, many = self._run(ids, Want(logits=logits), sequence)
        return [out.logits for out in outputs] if many else outputs[0].logits

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
        want = Want(
            logits=logits,
            capture=self.sites.select(names_of(names), stop_at_layer=stop_at_layer),
            pos="all" if pos is None else pos,
            stop_at_layer=stop_at_layer,
        )
        outputs, many = self._run(ids, want, sequence, names)
        if many:
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
        self, ids: TokensLike, want: Want, sequence: Sequence | list[Sequence] | None, names: Names = ()
    ) -> tuple[list[Output], bool]:
        batch, many = as_batch(self, ids, sequence, EncoderTaps.of(self, active_hooks(self), names))
        want.hooks = bind_hooks(self.sites, hooks_of(active_hooks(self)), stop_at_layer=want.stop_at_layer)
        try:
            return run_step(self, batch.prompts, want), many
        finally:
            batch.close()

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt; see `gemma4.generation.stream.generate` for the options and the result."""
        from gemma4.generation.stream import generate

        return generate(self, prompt, **options)

    def stream(self, prompt: Any, **options: Any) -> TextStream:
        """Continue a prompt piece by piece; see `gemma4.generation.stream.stream`."""
        from gemma4.generation.stream import stream

        return stream(self, prompt, **options)
