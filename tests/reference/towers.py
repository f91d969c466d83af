# SPDX-License-Identifier: Apache-2.0
"""Small random multimodal Gemma 4 checkpoints, and every site of their encoders out of transformers in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
)
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForConditionalGeneration

import gemma4

from . import oracle, variants

Sites = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tower:
    """A multimodal checkpoint: fields of its three configs, None where it has no such encoder."""

    name: str
    vision: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    text: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    unified: bool = False  # gemma4_unified: embedders without towers


EFFECTIVE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "position_embedding_size": 64,
    "use_clipped_linears": True,
}
LARGE = EFFECTIVE | {
    "hidden_size": 72,
    "intermediate_size": 92,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 36,
    "use_clipped_linears": False,
    "standardize": True,
}
ODD = EFFECTIVE | {
    "hidden_size": 37,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "patch_size": 5,
    "pooling_kernel_size": 2,
    "rms_norm_eps": 1e-3,
    "standardize": True,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 20.0},
}

AUDIO: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "subsampling_conv_channels": [32, 8],
    "output_proj_dims": 56,
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "attention_logit_cap": 2.0,
    "residual_weight": 0.4,
}
AUDIO_ODD = AUDIO | {
    "hidden_size": 54,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "subsampling_conv_channels": [20, 5],
    "output_proj_dims": 37,
    "conv_kernel_size": 3,
    "attention_chunk_size": 3,
    "attention_context_left": 8,
    "attention_context_right": 3,
    "rms_norm_eps": 1e-3,
    "gradient_clipping": 0.8,
    "use_clipped_linears": False,
}
AUDIO_REAL = AUDIO | {"subsampling_conv_channels": [128, 6], "attention_chunk_size": 12, "attention_context_left": 13}

UNIFIED_VISION: dict[str, Any] = {
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "mm_embed_dim": 52,
    "output_proj_dims": 52,
    "mm_posemb_size": 40,
}
UNIFIED_AUDIO: dict[str, Any] = {"audio_embed_dim": 40, "rms_norm_eps": 1e-4}

BOTH_WAYS: dict[str, Any] = {"use_bidirectional_attention": "vision"}

TOWERS = [
    Tower("media-e2b", vision=EFFECTIVE, audio=AUDIO, text=variants.E2B),
    Tower("media-pad", vision=EFFECTIVE, audio=AUDIO, text=variants.E2B | {"pad_token_id": 7}),
    Tower("media-26b", vision=LARGE, text=variants.MOE | BOTH_WAYS),
    Tower("media-31b", vision=LARGE, text=variants.DENSE | BOTH_WAYS),
    Tower("media-12b", vision=UNIFIED_VISION, audio=UNIFIED_AUDIO, text=variants.UNIFIED | BOTH_WAYS, unified=True),
    Tower("media-shared", vision=LARGE, text=variants.E2B | BOTH_WAYS),  # no released model shares keys and sees so
    Tower("unified", vision=UNIFIED_VISION, audio=UNIFIED_AUDIO, text=variants.UNIFIED, unified=True),
    Tower(
        "unified-bf16",
        vision=UNIFIED_VISION,
        audio=UNIFIED_AUDIO,
        text=variants.UNIFIED,
        unified=True,
        dtype="bfloat16",
    ),
    Tower("audio", audio=AUDIO, text=variants.E2B),
    Tower("audio-odd", audio=AUDIO_ODD, text=variants.UNIFIED, seed=3),
    Tower("audio-real", vision=EFFECTIVE, audio=AUDIO_REAL, text=variants.E2B, dtype="bfloat16"),
    Tower("audio-f16", audio=AUDIO, text=variants.E4B, dtype="float16", seed=1),
    Tower("vision-effective", vision=EFFECTIVE, text=variants.E2B),
    Tower("vision-large", vision=LARGE, text=variants.DENSE),
    Tower("vision-odd", vision=ODD, text=variants.UNIFIED, seed=1),
    Tower("vision-bf16", vision=LARGE | {"use_clipped_linears": True}, text=variants.E2B, dtype="bfloat16"),
    Tower("vision-wide", vision=EFFECTIVE | {"hidden_size": 272, "head_dim": 72}, text=variants.E2B),
    Tower("vision-f16", vision=EFFECTIVE, text=variants.E2B, dtype="float16", seed=2),
]
BY_NAME = {tower.name: tower for tower in TOWERS}


def build(tower: Tower) -> Any:
    """The reference model in float32 with eager attention; its weights are exactly those on disk."""
    cls, config = _unified_config(tower) if tower.unified else _config(tower)
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, tower.seed)
    variants.round_to(model, variants.DTYPES[tower.dtype])
    return model.eval()


def _config(tower: Tower) -> tuple[Any, Any]:
    return Gemma4ForConditionalGeneration, Gemma4Config(
        text_config=Gemma4TextConfig(**tower.text),
        vision_config=None if tower.vision is None else Gemma4VisionConfig(**tower.vision),
        audio_config=None if tower.audio is None else Gemma4AudioConfig(**tower.audio),
    )


def _unified_config(tower: Tower) -> tuple[Any, Any]:
    absent = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")  # these models have no such tables
    text = {key: value for key, value in tower.text.items() if key not in absent}
    config = Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(**text),
        vision_config=Gemma4UnifiedVisionConfig(**(tower.vision or {})),
        audio_config=Gemma4UnifiedAudioConfig(**(tower.audio or {})),
    )
    return Gemma4UnifiedForConditionalGeneration, config


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every number away from its neutral value; bounds of clipped maps that do clip."""
    variants._randomise(model, seed)
    generator = torch.Generator().manual_seed(2000 + seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        drawn = _draw(name, tuple(tensor.shape), generator)
        if drawn is not None:
            tensor.copy_(drawn)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    uniform = torch.rand(shape, generator=generator)
    if name.endswith(("input_max", "output_max")):
        return 1.0 + uniform
    if name.endswith(("input_min", "output_min")):
        return -1.0 - uniform
    if name.endswith(("position_embedding_table", "pos_embedding")):
        return 0.3 * torch.randn(shape, generator=generator)
    if name.endswith("per_dim_scale"):
        return torch.randn(shape, generator=generator)
    if name.endswith("conv.weight"):  # 3 x 3 of every input channel
        return torch.randn(shape, generator=generator) * (9 * shape[1]) ** -0.5
    if name.endswith("std_scale"):
        return 0.5 + uniform
    return None


def save(tower: Tower, model: Any, directory: Path) -> Path:
    variants.save(variants.Variant(tower.name, tower.text, multimodal=True, dtype=tower.dtype), model, directory)
    return directory


# ---- media ----------------------------------------------------------------------------------------------------------


def image(tower: Tower, width: int, height: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random patches [n, d_in] in 0..1 and their positions [n, 2], row after row; sides in patches."""
    config = (Gemma4UnifiedVisionConfig if tower.unified else Gemma4VisionConfig)(**(tower.vision or {}))
    side = config.model_patch_size if tower.unified else config.patch_size
    rng = np.random.default_rng(1000 * width + height + 17 * seed)
    y, x = np.divmod(np.arange(width * height), width)
    patches = rng.random((width * height, 3 * side**2), dtype=np.float32)
    return patches, np.stack([x, y], axis=1).astype(np.int32)


def mel(tower: Tower, frames: int, seed: int = 0) -> np.ndarray:
    """A random spectrogram, float32 [frames, bins]."""
    config = tower.audio or {}
    bins = config["audio_embed_dim"] if tower.unified else config["subsampling_conv_channels"][0]
    return np.random.default_rng(frames + 100 * seed).standard_normal((frames, bins), dtype=np.float32)


# ---- the oracle ---------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    given: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    made: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    attention: dict[int, oracle.AttentionCall] = field(default_factory=dict)


def record(model: Any, modules: list[str], run: Any, vision_attention: bool = False) -> Recording:
    """What went into and came out of every module below `modules` of model.model while `run()` computes."""
    recording = Recording()
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.model.named_modules():
            if name.startswith(tuple(modules)):
                oracle._hook(recording, name, module, stack)  # type: ignore[arg-type]
        if vision_attention:
            attend = _recording_attention(recording)
            stack.enter_context(mock.patch.object(modeling_gemma4, "eager_attention_forward", attend))
        run()
    return recording


def _recording_attention(recording: Recording) -> Any:
    eager = modeling_gemma4.eager_attention_forward

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, q, k, v, mask, *args, **kwargs)
        recording.attention[module.layer_idx] = oracle.AttentionCall(
            *(tensor.detach().clone() for tensor in (q, k, v, weights, weights)), scaling=kwargs["scaling"]
        )
        return output, weights

    return attend


def vision_sites(model: Any, patches: np.ndarray, positions: np.ndarray) -> Sites:
    """Every site of one image, in forward order."""
    tower, embedder = model.model.vision_tower, "embed_vision"

    def run() -> None:
        model.model.get_image_features(torch.from_numpy(patches)[None], torch.from_numpy(positions).long()[None])

    r = record(model, ["vision_tower", embedder], run, vision_attention=True)
    sites: dict[str, Tensor] = {
        "vision.hook_patch_embed": r.made["vision_tower.patch_embedder.input_proj"][0][0],
        "vision.hook_embed": r.made["vision_tower.patch_embedder"][0][0],
    }
    for layer in range(len(tower.encoder.layers)):
        for name, value in _vision_layer(tower, r, layer).items():
            sites[f"vision.blocks.{layer}.{name}"] = value
    sites["vision.hook_pooled"] = r.made["vision_tower.pooler"][0][0]
    sites["vision.hook_soft"] = r.given[f"{embedder}.embedding_pre_projection_norm"][0]
    sites["vision.hook_soft_normed"] = r.made[f"{embedder}.embedding_pre_projection_norm"][0]
    sites["vision.hook_projected"] = r.made[embedder][0]
    return {name: oracle._numpy(value) for name, value in sites.items()}


def _vision_layer(tower: Any, r: Recording, layer: int) -> dict[str, Tensor]:
    prefix = f"vision_tower.encoder.layers.{layer}"
    head = tower.encoder.layers[layer].self_attn.head_dim
    made, call = r.made, r.attention[layer]
    keys = modeling_gemma4.repeat_kv(call.k, tower.encoder.layers[layer].self_attn.num_key_value_groups)
    sites = {"hook_resid_pre": r.given[prefix][0][0], "ln1.hook_out": made[f"{prefix}.input_layernorm"][0][0]}
    for part in "qkv":
        sites[f"attn.hook_{part}"] = oracle._heads(made[f"{prefix}.self_attn.{part}_proj"][0][0], head)
    for part in "qkv":
        sites[f"attn.hook_{part}_normed"] = made[f"{prefix}.self_attn.{part}_norm"][0][0]
    sites |= {
        "attn.hook_rot_q": call.q[0].transpose(0, 1),
        "attn.hook_rot_k": call.k[0].transpose(0, 1),
        "attn.hook_attn_scores": (call.q @ keys.transpose(2, 3))[0] * call.scaling,
        "attn.hook_pattern": call.weights[0],
        "attn.hook_z": oracle._heads(r.given[f"{prefix}.self_attn.o_proj"][0][0], head),
        "attn.hook_out": made[f"{prefix}.self_attn.o_proj"][0][0],
        "hook_attn_out": made[f"{prefix}.post_attention_layernorm"][0][0],
        "hook_resid_mid": r.given[f"{prefix}.pre_feedforward_layernorm"][0][0],
        "mlp.hook_in": made[f"{prefix}.pre_feedforward_layernorm"][0][0],
        "mlp.hook_pre": made[f"{prefix}.mlp.gate_proj"][0][0],
        "mlp.hook_pre_linear": made[f"{prefix}.mlp.up_proj"][0][0],
        "mlp.hook_post": r.given[f"{prefix}.mlp.down_proj"][0][0],
        "mlp.hook_out": made[f"{prefix}.mlp.down_proj"][0][0],
        "hook_mlp_out": made[f"{prefix}.post_feedforward_layernorm"][0][0],
        "hook_resid_post": made[prefix][0][0],
    }
    return sites


def audio_sites(model: Any, frames: np.ndarray) -> Sites:
    """Every site of one recording, in forward order."""
    tower, conv = model.model.audio_tower, "audio_tower.subsample_conv_projection"

    def run() -> None:
        features = torch.from_numpy(frames)[None]
        model.model.get_audio_features(features, torch.ones(features.shape[:2], dtype=torch.bool))

    r = record(model, ["audio_tower", "embed_audio"], run)
    sites: dict[str, Tensor] = {
        "audio.hook_conv0": r.made[f"{conv}.layer0"][0][0].permute(1, 2, 0),
        "audio.hook_conv1": r.made[f"{conv}.layer1"][0][0].permute(1, 2, 0),
        "audio.hook_embed": r.made[conv][0][0],
    }
    for layer in range(len(tower.layers)):
        for name, value in _audio_layer(tower, r, layer).items():
            sites[f"audio.blocks.{layer}.{name}"] = value
    sites["audio.hook_soft"] = r.made["audio_tower.output_proj"][0][0]
    sites["audio.hook_soft_normed"] = r.made["embed_audio.embedding_pre_projection_norm"][0][0]
    sites["audio.hook_projected"] = r.made["embed_audio"][0][0]
    return {name: oracle._numpy(value) for name, value in sites.items()}


def _audio_layer(tower: Any, r: Recording, layer: int) -> dict[str, Tensor]:
    prefix, module = f"audio_tower.layers.{layer}", tower.layers[layer]
    made, given = r.made, r.given
    resid = given[prefix][0][0]
    sites = {"hook_resid_pre": resid}
    sites |= _audio_mlp(r, f"{prefix}.feed_forward1", module.feed_forward1, "mlp1", resid)
    sites["ln1.hook_out"] = made[f"{prefix}.norm_pre_attn"][0][0]
    head = module.self_attn.head_dim
    for part in "qkv":
        sites[f"attn.hook_{part}"] = oracle._heads(made[f"{prefix}.self_attn.{part}_proj"][0][0], head)
    sites |= _audio_attention(tower, r, layer, sites)
    sites["attn.hook_z"] = oracle._heads(given[f"{prefix}.self_attn.post"][0][0], head)
    sites["attn.hook_out"] = made[f"{prefix}.self_attn.post"][0][0]
    sites["hook_attn_out"] = made[f"{prefix}.norm_post_attn"][0][0]
    sites["hook_resid_mid"] = sites["hook_resid_mlp1"] + sites["hook_attn_out"]
    sites["conv.hook_in"] = made[f"{prefix}.lconv1d.pre_layer_norm"][0][0]
    sites["conv.hook_glu"] = given[f"{prefix}.lconv1d.depthwise_conv1d"][0][0].T
    sites["conv.hook_depthwise"] = made[f"{prefix}.lconv1d.depthwise_conv1d"][0][0].T
    sites["conv.hook_post"] = given[f"{prefix}.lconv1d.linear_end"][0][0]
    sites["hook_conv_out"] = sites["hook_resid_conv"] = made[f"{prefix}.lconv1d"][0][0]
    sites["hook_conv_out"] = sites["hook_resid_conv"] - sites["hook_resid_mid"]
    sites |= _audio_mlp(r, f"{prefix}.feed_forward2", module.feed_forward2, "mlp2", sites["hook_resid_conv"])
    sites["hook_resid_post"] = made[prefix][0][0]
    return sites


def _audio_mlp(r: Recording, prefix: str, module: Any, name: str, resid: Tensor) -> dict[str, Tensor]:
    out = module.post_layer_scale * module.post_layer_norm(
        torch.clamp(_linear_out(r, f"{prefix}.ffw_layer_2"), -module.gradient_clipping, module.gradient_clipping)
    )
    return {
        f"{name}.hook_in": r.made[f"{prefix}.pre_layer_norm"][0][0],
        f"{name}.hook_pre": _linear_out(r, f"{prefix}.ffw_layer_1"),
        f"{name}.hook_post": r.given[f"{prefix}.ffw_layer_2"][0][0],
        f"{name}.hook_out": _linear_out(r, f"{prefix}.ffw_layer_2"),
        f"hook_{name}_out": out,
        f"hook_resid_{name}": resid + out,
    }


def _linear_out(r: Recording, name: str) -> Tensor:
    return r.made[name][0][0]


def _audio_attention(tower: Any, r: Recording, layer: int, sites: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores and pattern [H, T, T] from the definition: each frame against each, its distance's vector added.

    Tied to the reference by hook_z, which is recorded: it is the pattern times v.
    """
    attention = tower.layers[layer].self_attn
    config, n = attention.config, len(sites["attn.hook_q"])
    q = sites["attn.hook_q"] * attention.q_scale * torch.nn.functional.softplus(attention.per_dim_scale)
    k = sites["attn.hook_k"] * attention.k_scale
    distances = oracle._heads(attention.relative_k_proj(tower.rel_pos_enc(q[None]))[0], attention.head_dim)
    past = config.attention_context_left - 1
    back = torch.arange(n)[:, None] - torch.arange(n)[None]  # how far key j lies behind row t
    index = past - back
    known = (index >= 0) & (index < len(distances))
    relative = torch.einsum("thd,phd->htp", q, distances)
    relative = torch.gather(relative, 2, index.clamp(0, len(distances) - 1).expand(len(relative), n, n)) * known
    scores = torch.einsum("thd,jhd->htj", q, k) + relative
    scores = attention.softcap * torch.tanh(scores / attention.softcap)
    seen = ((back >= 0) & (back < past)) | ((back < 0) & (-back < config.attention_context_right))
    scores = scores.masked_fill(~seen, -torch.inf)
    return {"attn.hook_attn_scores": scores, "attn.hook_pattern": torch.softmax(scores, -1)}


def unified_vision_sites(model: Any, patches: np.ndarray, positions: np.ndarray) -> Sites:
    """Every site of one image in the unified model, in forward order."""

    def run() -> None:
        model.model.get_image_features(torch.from_numpy(patches)[None], torch.from_numpy(positions).long()[None])

    r = record(model, ["embed_vision"], run)
    inner = "embed_vision.multimodal_embedder"
    sites = {
        "vision.hook_patch_normed": r.made["embed_vision.patch_ln1"][0][0],
        "vision.hook_patch_dense": r.made["embed_vision.patch_dense"][0][0],
        "vision.hook_patch_dense_normed": r.made["embed_vision.patch_ln2"][0][0],
        "vision.hook_pos_added": r.given["embed_vision.pos_norm"][0][0],
        "vision.hook_soft": r.made["embed_vision.pos_norm"][0][0],
        "vision.hook_soft_normed": r.made[f"{inner}.embedding_pre_projection_norm"][0][0],
        "vision.hook_projected": r.made[inner][0][0],
    }
    return {name: oracle._numpy(value) for name, value in sites.items()}


def unified_audio_sites(model: Any, frames: np.ndarray) -> Sites:
    """Every site of one recording in the unified model."""
    r = record(model, ["embed_audio"], lambda: model.model.get_audio_features(torch.from_numpy(frames)[None]))
    sites = {
        "audio.hook_soft": torch.from_numpy(frames),
        "audio.hook_soft_normed": r.made["embed_audio.embedding_pre_projection_norm"][0][0],
        "audio.hook_projected": r.made["embed_audio"][0][0],
    }
    return {name: oracle._numpy(value) for name, value in sites.items()}


class Pair(NamedTuple):
    """One checkpoint in transformers and in this package."""

    tower: Tower
    theirs: Any
    ours: gemma4.Model


GetPair = Callable[[str], Pair]


def pairs(folder: Callable[[str], Path]) -> GetPair:
    """Pairs by the tower's name, each made once, in folder(name)."""
    torch.set_num_threads(1)

    @functools.cache
    def get(name: str) -> Pair:
        theirs = build(BY_NAME[name])
        directory = save(BY_NAME[name], theirs, folder(name))
        return Pair(BY_NAME[name], theirs, gemma4.load(directory, precision="exact", threads=2))

    return get
