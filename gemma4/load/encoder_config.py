# SPDX-License-Identifier: Apache-2.0
"""vision_config and audio_config of a Hugging Face Gemma 4 checkpoint -> `EncoderConfig` -> the engine's.

The reference is transformers' `Gemma4VisionConfig`, `Gemma4AudioConfig`, `Gemma4UnifiedVisionConfig` and
`Gemma4UnifiedAudioConfig`, whose class defaults fill absent keys. Every value is checked, as in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.config import EARLIER, MAX_EPS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_MLP, TextConfig
from gemma4.load.fields import Fields
from gemma4.narrow import is_dict, is_list

if TYPE_CHECKING:
    from gemma4 import _engine

Modality: TypeAlias = Literal["vision", "audio"]
Kind: TypeAlias = Literal["vision_tower", "vision_embedder", "audio_tower", "audio_embedder"]
MODALITIES: tuple[Modality, ...] = ("vision", "audio")
_MAX_WIDTH, _MAX_POSITIONS = 1 << 16, 1 << 20


@dataclass(frozen=True)
class EncoderConfig:
    """One encoder of a checkpoint. All sizes are checked; sizes that its kind lacks are 0.

    kind    "vision_tower" | "audio_tower", or "vision_embedder" | "audio_embedder" (unified: no tower)
    d_in    values of an input row: a patch's pixels, a frame's mel bins or samples
    d_soft  width of a soft token before its projection to `d_out`, the text model's d_model
    """

    kind: Kind
    d_in: int
    d_soft: int
    d_out: int
    rms_norm_eps: float
    d_model: int = 0
    n_layers: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    d_mlp: int = 0
    clipped: bool = False  # linear layers clip their inputs and outputs
    n_positions: int = 0  # rows of each axis' position table
    patch_size: int = 0  # pixels
    pool: int = 0  # patches that a soft token averages (or covers) along each axis
    standardize: bool = False
    rope_theta: float = 0.0
    conv_channels: tuple[int, int] = (0, 0)  # channels of the two convolutions that halve the frames
    conv_kernel: int = 0  # frames that a layer's own convolution sees
    chunk: int = (
        0  # audio attention: frame t sees the frames t - (context_left - 1) < j < t + context_right, itself too
    )
    context_left: int = 0
    context_right: int = 0
    logit_cap: float = 0.0
    residual_weight: float = 0.0
    gradient_clipping: float = 0.0

    def rope_inv_freq(self) -> NDArray[np.float32]:
        """Angular frequencies of either axis, float32 [head_dim / 4], radians per patch; [0] without rotation.

        Ref: transformers Gemma4VisionRotaryEmbedding.compute_axial_rope_parameters.
        """
        if not self.rope_theta:
            return np.zeros(0, np.float32)
        half = self.head_dim // 2
        exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(max(half, 1))
        power = np.power(np.float64(np.float32(self.rope_theta)), exponent.astype(np.float64)).astype(np.float32)
        return np.float32(1.0) / power

    def engine(self, on_disk: bool = False) -> _engine.EncoderConfig:
        """The engine's form (gemma4/_engine.pyi). on_disk: the layers' linear weights are file mappings."""
        return {
            "kind": self.kind,
            "d_in": self.d_in,
            "d_soft": self.d_soft,
            "d_out": self.d_out,
            "rms_norm_eps": self.rms_norm_eps,
            "on_disk": on_disk,
            "d_model": self.d_model,
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "d_mlp": self.d_mlp,
            "clipped": self.clipped,
            "n_positions": self.n_positions,
            "pool": self.pool,
            "standardize": self.standardize,
            "rope_inv_freq": self.rope_inv_freq(),
            "conv_channels": self.conv_channels,
            "conv_kernel": self.conv_kernel,
            "chunk": self.chunk,
            "context_left": self.context_left,
            "context_right": self.context_right,
            "logit_cap": self.logit_cap,
            "residual_weight": self.residual_weight,
            "gradient_clipping": self.gradient_clipping,
        }


def parse_encoders(raw: dict[str, Any], text: TextConfig) -> dict[Modality, EncoderConfig]:
    """The encoders that a parsed config.json describes, by modality.

    Raises FormatError and NotImplementedError as `parse_config` does.
    """
    if text.model_type in EARLIER:  # Gemma 3's image encoder is a different one
        return {}
    unified = text.model_type.startswith("gemma4_unified")
    kinds: dict[Modality, Kind] = {
        "vision": "vision_embedder" if unified else "vision_tower",
        "audio": "audio_embedder" if unified else "audio_tower",
    }
    out: dict[Modality, EncoderConfig] = {}
    for modality, kind in kinds.items():
        config = raw.get(f"{modality}_config")
        if config is None:
            continue
        if not is_dict(config):
            raise FormatError(f"config.json: {modality}_config is {config!r:.60}, expected an object or null")
        out[modality] = parse_encoder(kind, config, text.d_model, f"config.json: {modality}_config")
    return out


def parse_encoder(kind: Kind, raw: dict[str, Any], d_out: int, where: str) -> EncoderConfig:
    """One encoder, from the fields of its config; `where` names those in messages. Raises as `parse_encoders`."""
    parsers = {
        "vision_tower": _vision_tower,
        "vision_embedder": _unified_vision,
        "audio_tower": _audio_tower,
        "audio_embedder": _unified_audio,
    }
    return parsers[kind](Fields(raw, where), d_out)


def _vision_tower(f: Fields, d_out: int) -> EncoderConfig:
    if f.get("attention_bias", False):
        raise NotImplementedError("vision_config: attention_bias = true: no Gemma 4 release has it, nor this engine")
    _check_activation(f, "hidden_activation", "gelu_pytorch_tanh")
    d_model = f.integer("hidden_size", 768, 1, _MAX_WIDTH)
    n_heads = f.integer("num_attention_heads", 12, 1, MAX_HEADS)
    n_kv_heads = f.integer("num_key_value_heads", 12, 1, MAX_HEADS)
    head_dim = f.integer("head_dim", 64, 4, MAX_HEAD_DIM)
    patch = f.integer("patch_size", 16, 1, 256)
    if n_heads % n_kv_heads:
        f.fail("num_key_value_heads", n_kv_heads, f"a divisor of {n_heads} heads")
    if head_dim % 4:
        f.fail("head_dim", head_dim, "a multiple of 4 (two axes of rotated pairs)")
    return EncoderConfig(
        kind="vision_tower",
        d_in=3 * patch**2,
        d_soft=d_model,
        d_out=d_out,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 1e-12, MAX_EPS),
        d_model=d_model,
        n_layers=f.integer("num_hidden_layers", 16, 1, MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_mlp=f.integer("intermediate_size", 3072, 1, MAX_MLP >> 2),
        clipped=f.boolean("use_clipped_linears", False),
        n_positions=f.integer("position_embedding_size", 10_240, 1, _MAX_POSITIONS),
        patch_size=patch,
        pool=f.integer("pooling_kernel_size", 3, 1, 64),
        standardize=f.boolean("standardize", False),
        rope_theta=_axial_theta(f),
    )


def _axial_theta(f: Fields) -> float:
    raw = f.get("rope_parameters", None)
    if raw is None:
        return 100.0
    if not is_dict(raw):
        f.fail("rope_parameters", raw, "an object")
    rope = Fields(raw, f"{f.where}.rope_parameters")
    rope_type = rope.get("rope_type", "axial")
    if rope_type not in ("axial", "default"):  # "default" in files older than the name
        raise NotImplementedError(f'rope_type {rope_type!r:.80} in vision_config: only "axial"')
    return rope.number("rope_theta", 100.0, 1.0, 1e12)


def _check_activation(f: Fields, name: str, wanted: str) -> None:
    found = f.get(name, wanted)
    if found != wanted:
        raise NotImplementedError(f'{name} {found!r:.80} of an encoder: only "{wanted}" is supported')


def _unified_vision(f: Fields, d_out: int) -> EncoderConfig:
    patch = f.integer("patch_size", 16, 1, 256)
    pool = f.integer("pooling_kernel_size", 3, 1, 64)
    side = f.integer("model_patch_size", patch * pool, patch * pool, patch * pool)
    width = f.integer("mm_embed_dim", 3840, 1, _MAX_WIDTH)
    if 3 * side**2 > _MAX_WIDTH:
        f.fail("patch_size * pooling_kernel_size", side, f"at most {int((_MAX_WIDTH / 3) ** 0.5)}")
    return EncoderConfig(
        kind="vision_embedder",
        d_in=3 * side**2,
        d_soft=f.integer("output_proj_dims", 3840, width, width),
        d_out=d_out,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 1e-12, MAX_EPS),
        d_model=width,
        n_positions=f.integer("mm_posemb_size", 1120, 1, _MAX_POSITIONS),
        patch_size=patch,
        pool=pool,
    )


def _unified_audio(f: Fields, d_out: int) -> EncoderConfig:
    width = f.integer("audio_embed_dim", 640, 1, _MAX_WIDTH)
    eps = f.number("rms_norm_eps", 1e-6, 1e-12, MAX_EPS)
    return EncoderConfig(kind="audio_embedder", d_in=width, d_soft=width, d_out=d_out, rms_norm_eps=eps)


def _audio_tower(f: Fields, d_out: int) -> EncoderConfig:
    _check_activation(f, "hidden_act", "silu")
    d_model = f.integer("hidden_size", 1024, 2, _MAX_WIDTH)
    n_heads = f.integer("num_attention_heads", 8, 1, MAX_HEADS)
    channels = f.get("subsampling_conv_channels", [128, 32])
    if not is_list(channels) or len(channels) != 2:
        f.fail("subsampling_conv_channels", channels, "a list of two integers")
    first, second = (Fields({"c": c}, f"{f.where}.channels[{i}]") for i, c in enumerate(channels))
    if d_model % n_heads or d_model % 2:
        f.fail("hidden_size", d_model, f"an even multiple of {n_heads} heads")
    # The reference's projection has channels / 4 inputs; that fits if there are as many mel bins as channels.
    d_in = first.integer("c", None, 4, 4096)
    if d_in % 4:
        f.fail("subsampling_conv_channels[0]", d_in, "a multiple of 4")
    return EncoderConfig(
        kind="audio_tower",
        d_in=d_in,
        d_soft=f.integer("output_proj_dims", 1536, 1, _MAX_WIDTH),
        d_out=d_out,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 1e-12, MAX_EPS),
        d_model=d_model,
        n_layers=f.integer("num_hidden_layers", 12, 1, MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_mlp=4 * d_model,
        clipped=f.boolean("use_clipped_linears", True),
        conv_channels=(d_in, second.integer("c", None, 1, 4096)),
        conv_kernel=f.integer("conv_kernel_size", 5, 1, 256),
        chunk=f.integer("attention_chunk_size", 12, 1, 128),
        context_left=f.integer("attention_context_left", 13, 2, 128),
        context_right=f.integer("attention_context_right", 0, 0, 128),
        logit_cap=f.number("attention_logit_cap", 50.0, 1e-6, 1e6),
        residual_weight=f.number("residual_weight", 0.5, -1e6, 1e6),
        gradient_clipping=f.number("gradient_clipping", 1e10, 1e-6, 1e38),
    )
