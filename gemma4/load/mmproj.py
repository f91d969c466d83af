# SPDX-License-Identifier: Apache-2.0
"""The second file of a multimodal GGUF model ("mmproj", architecture clip): image and audio encoders.

Ref: llama.cpp conversion/gemma.py (Gemma4VisionAudioModel, Gemma4UnifiedVisionAudioModel: what is written) and
tools/mtmd/clip.cpp (what is read, and the numbers that no file holds). Pixels of a patch are stored channel by
channel, the unified model's positions axis by axis, and an audio layer's per_dim_scale after its softplus; these are
converted when an encoder is first used. All other tensors are used in place.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.checkpoint import TEXT_ALONE, EngineTensor, check_dtype, check_shape
from gemma4.load.config import EARLIER, MAX_EPS, MAX_HEADS, MAX_LAYERS, MAX_MLP, MAX_WIDTH, TextConfig
from gemma4.load.dtypes import PLAIN, stored_rows
from gemma4.load.encoder_config import MODALITIES, EncoderConfig, Kind, Modality, parse_encoder
from gemma4.load.fields import Fields
from gemma4.load.gguf import GgufArray, GgufFile
from gemma4.load.names import Shape, encoder_tensors

ARCHITECTURE = "clip"
_KINDS: dict[Modality, dict[str, Kind]] = {
    "vision": {"gemma4v": "vision_tower", "gemma4uv": "vision_embedder"},
    "audio": {"gemma4a": "audio_tower", "gemma4ua": "audio_embedder"},
}
_FOLDERS: dict[Modality, tuple[str, ...]] = {"vision": ("v.", "mm.input_projection."), "audio": ("a.", "mm.a.")}
_NO_LEAF = ("per_dim_scale", "position_embedding_table", "pos_embedding")  # their stored names end in .weight
_PIXELS = ("patch_embedder.input_proj.weight", "patch_dense.weight", "patch_ln1.weight", "patch_ln1.bias")

# engine name without .weight, .linear and layer -> stored name without .weight and layer
_VISION = {
    "embedding_projection": "mm.input_projection",
    "patch_embedder.input_proj": "v.patch_embd",
    "patch_embedder.position_embedding_table": "v.position_embd",
    "patch_dense": "v.patch_embd",
    "patch_ln1": "v.patch_norm.1",
    "patch_ln2": "v.patch_norm.2",
    "pos_embedding": "v.position_embd",
    "pos_norm": "v.patch_norm.3",
}
_VISION_LAYER = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ffn_post_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AUDIO = {
    "embedding_projection": "mm.a.input_projection",
    "subsample_conv_projection.layer0.conv": "a.conv1d.0",
    "subsample_conv_projection.layer0.norm": "a.conv1d.0.norm",
    "subsample_conv_projection.layer1.conv": "a.conv1d.1",
    "subsample_conv_projection.layer1.norm": "a.conv1d.1.norm",
    "subsample_conv_projection.input_proj_linear": "a.input_projection",
    "output_proj": "a.pre_encode.out",
}
_AUDIO_LAYER = {
    "feed_forward1.pre_layer_norm": "ffn_norm",
    "feed_forward1.ffw_layer_1": "ffn_up",
    "feed_forward1.ffw_layer_2": "ffn_down",
    "feed_forward1.post_layer_norm": "ffn_post_norm",
    "feed_forward2.pre_layer_norm": "ffn_norm_1",
    "feed_forward2.ffw_layer_1": "ffn_up_1",
    "feed_forward2.ffw_layer_2": "ffn_down_1",
    "feed_forward2.post_layer_norm": "ffn_post_norm_1",
    "norm_pre_attn": "attn_pre_norm",
    "norm_post_attn": "attn_post_norm",
    "norm_out": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.post": "attn_out",
    "self_attn.relative_k_proj": "attn_k_rel",
    "self_attn.per_dim_scale": "per_dim_scale",
    "lconv1d.pre_layer_norm": "conv_norm",  # llama.cpp swapped these two names
    "lconv1d.conv_norm": "norm_conv",
    "lconv1d.linear_start": "conv_pw1",
    "lconv1d.linear_end": "conv_pw2",
    "lconv1d.depthwise_conv1d": "conv_dw",
}


class Mmproj:
    """An opened mmproj file whose encoders fit a text model. The opener closes `file`.

    file      the mapped file
    encoders  EncoderConfig of each encoder it holds, by modality
    Raises what GgufFile raises, and FormatError (not an mmproj file of Gemma 4, made for another model, a tensor
    missing or misshapen, an option that this engine lacks), NotImplementedError (a text model before Gemma 4).
    """

    def __init__(self, path: Path, text: TextConfig) -> None:
        self.file = GgufFile(path)
        try:
            self._check_architecture()
            if text.model_type in EARLIER:
                raise NotImplementedError(f"{path} holds encoders{TEXT_ALONE}")
            metadata = {key: _plain(value) for key, value in self.file.metadata.items()}
            keys = Fields(metadata, str(path))
            self.encoders: dict[Modality, EncoderConfig] = {
                modality: _Reader(keys, self.file, modality).config(text.d_model)
                for modality in MODALITIES
                if keys.boolean(f"clip.has_{modality}_encoder", False)
            }
            if not self.encoders:
                keys.fail("clip.has_vision_encoder", "missing", "true, or clip.has_audio_encoder, in an mmproj file")
            for modality in self.encoders:
                self._check_tensors(modality)
        except BaseException:
            self.file.close()
            raise

    def _check_architecture(self) -> None:
        found = self.file.metadata.get("general.architecture")
        if found != ARCHITECTURE:
            raise FormatError(
                f"{self.file.path}: general.architecture is {found!r:.60}, expected {ARCHITECTURE!r}: this is no "
                "mmproj file (image and audio encoders)"
            )

    def _check_tensors(self, modality: Modality) -> None:
        used: set[str] = set()
        for _, stored, shape in self._wanted(modality):
            if stored not in self.file.tensors:
                kind = self.encoders[modality].kind
                raise FormatError(f"{self.file.path}: the tensor {stored} is missing, which its {kind} needs")
            check_shape(self.file, stored, shape)
            check_dtype(self.file, self.file.tensors[stored])
            used.add(stored)
        for name in self.file.tensors:
            if name.startswith(_FOLDERS[modality]) and name not in used:
                raise FormatError(f"{self.file.path}: it holds {name!r:.80}, which no Gemma 4 {modality} encoder has")

    def _wanted(self, modality: Modality) -> Iterator[tuple[str, str, Shape]]:
        """Engine name, stored name and stored shape of every tensor."""
        for name, shape in encoder_tensors(self.encoders[modality]).items():
            yield name, _stored_name(modality, name), _stored_shape(name, shape)

    def tensors(self, modality: Modality) -> dict[str, EngineTensor]:
        """The arguments of `_engine.Encoder`. Raises FormatError (values that no softplus gives)."""
        shapes = encoder_tensors(self.encoders[modality])
        return {name: self._tensor(name, stored, shapes[name]) for name, stored, _ in self._wanted(modality)}

    def _tensor(self, name: str, stored: str, shape: Shape) -> EngineTensor:
        info = self.file.tensors[stored]
        if name in _PIXELS or name.endswith("per_dim_scale"):
            _check_plain(self.file, stored)
        values = stored_rows(info.dtype, info.shape, self.file.view, info.offset)
        if name in _PIXELS:
            side = math.isqrt(shape[-1] // 3)
            return _made(info.dtype, shape, values.reshape(-1, 3, side, side).transpose(0, 2, 3, 1))
        if name == "pos_embedding":
            return _made(info.dtype, shape, values.transpose(1, 0, 2))
        if name.endswith("per_dim_scale"):
            return _made("F32", shape, _before_softplus(values, f"{self.file.path}: {stored}"))
        return info.dtype, shape, self.file.view, info.offset


class _Reader:
    """The config of one encoder, from metadata and the shapes of tensors."""

    def __init__(self, keys: Fields, file: GgufFile, modality: Modality) -> None:
        self._keys, self._file = keys, file
        self._modality: Modality = modality

    def config(self, d_out: int) -> EncoderConfig:
        projector = f"clip.{self._modality}.projector_type"
        if projector not in self._keys:
            projector = "clip.projector_type"  # in files with one encoder
        found, kinds = self._keys.get(projector, None), _KINDS[self._modality]
        if not isinstance(found, str) or found not in kinds:
            self._keys.fail(projector, found, " or ".join(kinds))
        width = self._integer("projection_dim", 1, MAX_WIDTH)
        if width != d_out:
            expected = f"{d_out}, the width of the text model: it was made for another one"
            self._keys.fail(f"clip.{self._modality}.projection_dim", width, expected)
        kind = kinds[found]
        values: dict[str, Any] = {
            "vision_tower": self._vision_tower,
            "vision_embedder": self._vision_embedder,
            "audio_tower": self._audio_tower,
            "audio_embedder": lambda: {"audio_embed_dim": self._integer("embedding_length", 1, MAX_WIDTH)},
        }[kind]()
        return parse_encoder(kind, values, d_out, f"{self._keys.where}: {self._modality} encoder")

    def _integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        return self._keys.integer(f"clip.{self._modality}.{key}", default, low, high)

    def _shape(self, name: str, rank: int) -> Shape:
        info = self._file.tensors.get(name)
        if info is None or len(info.shape) != rank:
            found = "missing" if info is None else f"a tensor of shape {list(info.shape)}"
            self._keys.fail(name, found, f"a tensor of {rank} dimensions")
        return info.shape

    def _bounded(self, prefix: str) -> bool:
        return any(name.startswith(prefix) and name.endswith(".input_max") for name in self._file.tensors)

    def _pixels(self) -> dict[str, Any]:
        for key, expected in (("image_mean", 0), ("image_std", 1)):
            found = self._keys.get(f"clip.vision.{key}", [expected] * 3)
            if found != [expected] * 3:
                self._keys.fail(f"clip.vision.{key}", found, str([expected] * 3))
        return {
            "patch_size": self._integer("patch_size", 1, 256),
            "pooling_kernel_size": self._integer("projector.scale_factor", 1, 64, 3),
            "rms_norm_eps": self._keys.number("clip.vision.attention.layer_norm_epsilon", 1e-6, 1e-12, MAX_EPS),
        }

    def _vision_tower(self) -> dict[str, Any]:
        n_heads = self._integer("attention.head_count", 1, MAX_HEADS)
        [head_dim] = self._shape("v.blk.0.attn_q_norm.weight", 1)
        return self._pixels() | {
            "hidden_size": self._integer("embedding_length", 1, MAX_WIDTH),
            "intermediate_size": self._integer("feed_forward_length", 1, MAX_MLP),
            "num_hidden_layers": self._integer("block_count", 1, MAX_LAYERS),
            "num_attention_heads": n_heads,
            "num_key_value_heads": self._shape("v.blk.0.attn_k.weight", 2)[0] // head_dim,
            "head_dim": head_dim,
            "position_embedding_size": self._shape("v.position_embd.weight", 3)[1],
            "use_clipped_linears": self._bounded("v.blk."),
            "standardize": "v.std_bias" in self._file.tensors,
        }

    def _vision_embedder(self) -> dict[str, Any]:
        width = self._integer("embedding_length", 1, MAX_WIDTH)
        n_positions = self._shape("v.position_embd.weight", 3)[1]
        return self._pixels() | {"mm_embed_dim": width, "output_proj_dims": width, "mm_posemb_size": n_positions}

    def _audio_tower(self) -> dict[str, Any]:
        """Chunks, context, cap and residual weight are in no file: those of the released models are used. So is the
        norms' epsilon: converters wrote another number under its name."""
        return {
            "hidden_size": self._integer("embedding_length", 2, MAX_WIDTH),
            "num_hidden_layers": self._integer("block_count", 1, MAX_LAYERS),
            "num_attention_heads": self._integer("attention.head_count", 1, MAX_HEADS),
            "subsampling_conv_channels": [self._shape(f"a.conv1d.{i}.weight", 4)[0] for i in (0, 1)],
            "conv_kernel_size": self._shape("a.blk.0.conv_dw.weight", 2)[1],
            "output_proj_dims": self._shape("a.pre_encode.out.weight", 2)[0],
            "use_clipped_linears": self._bounded("a.blk."),
        }


def find_mmproj(model: Path) -> tuple[Path | None, str]:
    """The only mmproj file beside a model file, and a note if there are several: ("mmproj*.gguf", case ignored)."""
    folder = model.parent
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r"mmproj.*\.gguf", name, re.IGNORECASE)]
    except OSError:
        return None, ""
    found = sorted(name for name in names if name != model.name)
    if len(found) > 1:
        return None, f"{len(found)} mmproj files beside the model, none used: name one of {', '.join(found)[:200]}"
    return (folder / found[0], "") if found else (None, "")


def _stored_name(modality: Modality, name: str) -> str:
    """The GGUF name of an encoder's tensor: "layers.3.norm_out.weight" -> "a.blk.3.ln2.weight"."""
    if name in ("std_bias", "std_scale"):
        return f"v.{name}"
    stem, leaf = (name, "weight") if name.endswith(_NO_LEAF) else name.rsplit(".", 1)
    stem = stem.removesuffix(".linear").removeprefix("encoder.")
    top, inner = (_VISION, _VISION_LAYER) if modality == "vision" else (_AUDIO, _AUDIO_LAYER)
    if not stem.startswith("layers."):
        return f"{top[stem]}.{leaf}"
    _, layer, rest = stem.split(".", 2)
    return f"{modality[0]}.blk.{layer}.{inner[rest]}.{leaf}"


def _stored_shape(name: str, shape: Shape) -> Shape:
    if name == "patch_embedder.input_proj.weight":
        side = math.isqrt(shape[1] // 3)
        return (shape[0], 3, side, side)
    if name == "pos_embedding":
        return (2, shape[0], shape[2])
    return (shape[0], shape[2]) if name.endswith("depthwise_conv1d.weight") else shape


def _check_plain(file: GgufFile, stored: str) -> None:
    dtype = file.tensors[stored].dtype
    if dtype not in PLAIN:
        raise FormatError(f"{file.path}: {stored} is {dtype}, expected one of {', '.join(PLAIN)}")


def _made(dtype: str, shape: Shape, values: NDArray[Any]) -> EngineTensor:
    return dtype, shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8), 0


def _before_softplus(values: NDArray[Any], what: str) -> NDArray[np.float32]:
    """float32 x with log(1 + exp(x)) = values. Several x may give a value that was rounded to float32; weights are
    bfloat16 and may never have left 0, so if one of those does, it is x to the bit."""
    wanted = values.astype(np.float64)
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise FormatError(f"{what} holds {wanted.min()} to {wanted.max()}, expected softplus values, above 0")
    x = wanted + np.log(-np.expm1(-wanted))
    short = np.where(np.abs(x) < 2.0**-22, 0.0, x.astype(ml_dtypes.bfloat16).astype(np.float64))
    same = np.abs(np.logaddexp(0, short) - wanted) <= 2.0**-22 * wanted  # both roundings: half a unit of 2^-23 each
    return np.where(same, short, x).astype(np.float32)


def _plain(value: Any) -> Any:
    return value.values() if isinstance(value, GgufArray) and value.count <= 16 else value
