# SPDX-License-Identifier: Apache-2.0
"""Small random multimodal Gemma 4 checkpoints, and every site of their encoders out of transformers in float32."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig
from transformers.models.gemma4 import modeling_gemma4

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

TOWERS = [
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
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**tower.text),
        vision_config=None if tower.vision is None else Gemma4VisionConfig(**tower.vision),
        audio_config=None,
    )
    model = Gemma4ForConditionalGeneration._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    randomise(model, tower.seed)
    variants.round_to(model, variants.DTYPES[tower.dtype])
    return model.eval()


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
    if name.endswith("position_embedding_table"):
        return 0.3 * torch.randn(shape, generator=generator)
    if name.endswith("std_scale"):
        return 0.5 + uniform
    return None


def save(tower: Tower, model: Any, directory: Path) -> Path:
    variants.save(variants.Variant(tower.name, tower.text, multimodal=True, dtype=tower.dtype), model, directory)
    return directory


# ---- media ----------------------------------------------------------------------------------------------------------


def image(tower: Tower, width: int, height: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random patches [n, d_in] in 0..1 and their positions [n, 2], row after row; sides in patches."""
    config = Gemma4VisionConfig(**(tower.vision or {}))
    rng = np.random.default_rng(1000 * width + height + 17 * seed)
    y, x = np.divmod(np.arange(width * height), width)
    patches = rng.random((width * height, 3 * config.patch_size**2), dtype=np.float32)
    return patches, np.stack([x, y], axis=1).astype(np.int32)


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
