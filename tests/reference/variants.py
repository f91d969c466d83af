# SPDX-License-Identifier: Apache-2.0
"""Small random Gemma text models, one per branch of the architecture, written as Hugging Face directories.

Every factor a forward pass could forget (norm gains, layer scalars, router and expert scales, per-layer embeddings,
eps, softcap) is drawn away from its neutral value, so that forgetting it fails a comparison.
"""

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    SiglipVisionConfig,
    VaultGemmaConfig,
    VaultGemmaForCausalLM,
)

S, F = "sliding_attention", "full_attention"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEXT_CLASSES: dict[str, Any] = {
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "vaultgemma": (VaultGemmaConfig, VaultGemmaForCausalLM),
}
_OUTPUT_NORM = re.compile(r"layers\.\d+\.post_(attention|feedforward|per_layer_input)_(layer)?norm\.weight$")
LONG = 70  # several windows of every variant


@dataclass(frozen=True)
class Variant:
    """One checkpoint: the text config's fields, and how it lies on disk."""

    name: str
    text: dict[str, Any]
    seed: int = 0
    family: str = "gemma4"  # of TEXT_CLASSES
    multimodal: bool = False  # …ForConditionalGeneration: prefix model.language_model., nested config
    dtype: str = "float32"
    legacy_config: bool = False  # the keys of older files, which transformers still reads
    legacy_names: bool = False  # language_model.model. in front of the text model's names: Gemma 3's released files
    damped: bool = True  # what a layer adds is smaller than the stream, so that rounding is not amplified without end
    dead_kv: bool = False  # k/v tensors for layers that share keys, as the released E2B and E4B files have
    shards: bool = False
    lengths: tuple[int, ...] = field(default=())  # () = around the window

    @property
    def window(self) -> int:
        return self.text["sliding_window"]

    @property
    def stores_unit_gains(self) -> bool:
        """Whether norms are stored as w and multiply by 1 + w."""
        return self.family != "gemma4"

    @property
    def model_class(self) -> Any:
        if not self.multimodal:
            return TEXT_CLASSES[self.family][1]
        return Gemma3ForConditionalGeneration if self.family == "gemma3" else Gemma4ForConditionalGeneration

    @property
    def prompt_lengths(self) -> list[int]:
        w = self.window
        wanted = self.lengths or (1, 2, w - 1, w, w + 1, 2 * w + 3, LONG)
        return sorted({n for n in wanted if n > 0})

    @property
    def d_vocab(self) -> int:
        """Ids below this are valid in both embedding tables."""
        tables = [self.text["vocab_size"]]
        if self.text.get("hidden_size_per_layer_input"):
            tables.append(self.text["vocab_size_per_layer_input"])
        return min(tables)


def _text(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 5,
        "max_position_embeddings": 1024,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "layer_types": [S, S, S, S, S, F],
    }
    text = base | changes
    text.setdefault("vocab_size_per_layer_input", text["vocab_size"])
    text["num_hidden_layers"] = len(text["layer_types"])
    return text


def _rope(theta_sliding: float, theta_full: float, factor: float) -> dict[str, Any]:
    return {
        S: {"rope_type": "default", "rope_theta": theta_sliding},
        F: {"rope_type": "proportional", "rope_theta": theta_full, "partial_rotary_factor": factor},
    }


E2B = _text(
    layer_types=[S, S, S, S, F] * 2,
    num_key_value_heads=1,
    num_kv_shared_layers=5,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=16,
)
E4B = _text(
    layer_types=[S, S, S, S, S, F] * 2,
    hidden_size=80,
    intermediate_size=112,
    num_kv_shared_layers=6,
    hidden_size_per_layer_input=16,
    sliding_window=7,
)
MOE = _text(
    num_key_value_heads=4,
    num_global_key_value_heads=2,
    attention_k_eq_v=True,
    enable_moe_block=True,
    num_experts=16,
    top_k_experts=4,
    moe_intermediate_size=24,
    intermediate_size=40,
    sliding_window=6,
    use_bidirectional_attention="vision",
)
DENSE = _text(
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_global_key_value_heads=2,
    attention_k_eq_v=True,
    use_bidirectional_attention="vision",
)
UNIFIED = _text(num_key_value_heads=4, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=8)

ODD_E = _text(
    vocab_size=257,
    hidden_size=37,
    intermediate_size=51,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=10,
    global_head_dim=22,
    layer_types=[S, F, S, F, S, S, F],
    num_kv_shared_layers=3,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=7,
    sliding_window=3,
    rms_norm_eps=1e-3,
    rope_parameters=_rope(500.0, 30_000.0, 0.5),
    final_logit_softcapping=4.0,
)
ODD_MOE = _text(
    vocab_size=1003,
    hidden_size=45,
    intermediate_size=33,
    num_attention_heads=9,
    num_key_value_heads=3,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
    head_dim=6,  # a global layer of 0.25 * 6 // 2 = 0 rotated pairs
    global_head_dim=6,
    layer_types=[S, F, F],
    enable_moe_block=True,
    num_experts=5,
    top_k_experts=5,
    moe_intermediate_size=13,
    sliding_window=7,
    final_logit_softcapping=None,
)
EVERYTHING = _text(
    vocab_size=211,
    hidden_size=52,
    intermediate_size=30,
    num_attention_heads=6,
    num_key_value_heads=3,
    num_global_key_value_heads=2,
    attention_k_eq_v=True,
    head_dim=12,
    global_head_dim=20,
    layer_types=[S, F, S, F, S, F],
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    hidden_size_per_layer_input=11,
    enable_moe_block=True,
    num_experts=7,
    top_k_experts=1,
    moe_intermediate_size=9,
    sliding_window=4,
    final_logit_softcapping=8.0,
)

WIDE = _text(
    vocab_size=1041,
    hidden_size=272,
    intermediate_size=528,
    num_attention_heads=4,
    head_dim=64,
    global_head_dim=128,
    sliding_window=33,
    layer_types=[S, F],
)
LONG_PROMPT = _text(
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=2,
    num_key_value_heads=1,
    hidden_size_per_layer_input=8,
    sliding_window=64,
    layer_types=[S, F],
)
FAR = _text(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    global_head_dim=8,
    max_position_embeddings=32_768,
    layer_types=[S, F],
)


def _earlier(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 7,
        "sliding_window": 5,
        "max_position_embeddings": 1024,
    }
    text = base | changes
    text["num_hidden_layers"] = len(text["layer_types"])
    return text


_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0}
GEMMA2 = _earlier(layer_types=[S, F, S, F], rope_parameters={"rope_type": "default", "rope_theta": 700.0}, **_CAPS)
GEMMA2_ODD = _earlier(
    vocab_size=257,
    hidden_size=45,
    intermediate_size=33,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=6,
    query_pre_attn_scalar=3,
    sliding_window=3,
    rms_norm_eps=1e-3,
    layer_types=[F, S, S, F, S],
    rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
GEMMA2_WIDE = _earlier(
    vocab_size=1041,
    hidden_size=272,
    intermediate_size=528,
    num_attention_heads=4,
    head_dim=64,
    query_pre_attn_scalar=24,
    sliding_window=33,
    layer_types=[S, F],
    **_CAPS,
)
GEMMA3 = _earlier(
    query_pre_attn_scalar=20,
    layer_types=[S] * 5 + [F, S, S],  # the last one is not global
    rope_parameters={
        S: {"rope_type": "default", "rope_theta": 300.0},
        F: {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
    },
    final_logit_softcapping=9.0,
)
GEMMA3_ODD = GEMMA3 | {
    "vocab_size": 231,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "sliding_window": 1,
    "tie_word_embeddings": False,
    "final_logit_softcapping": None,
}
_LINEAR = {
    S: {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0},
    F: {"rope_type": "linear", "rope_theta": 9000.0, "factor": 8.0},
}

_FEW = (1, 2, 13, LONG)
VARIANTS: list[Variant] = [
    Variant("e2b", E2B, multimodal=True, legacy_config=True, dead_kv=True),
    Variant("e2b-seed1", E2B, seed=1, lengths=_FEW),
    Variant("e2b-seed2", E2B, seed=2, lengths=_FEW),
    Variant("e4b", E4B, dead_kv=True, shards=True),
    Variant("e4b-seed1", E4B, seed=1, multimodal=True, lengths=_FEW),
    Variant("moe26b", MOE, multimodal=True, shards=True),
    Variant("moe26b-seed1", MOE, seed=1, legacy_config=True, lengths=_FEW),
    Variant("moe26b-seed2", MOE, seed=2, lengths=_FEW),
    Variant("dense31b", DENSE),
    Variant("dense31b-seed1", DENSE, seed=1, multimodal=True, legacy_config=True, lengths=_FEW),
    Variant("text12b", UNIFIED, legacy_config=True),
    Variant("text12b-seed1", UNIFIED, seed=1, lengths=_FEW),
    Variant("odd-e", ODD_E),
    Variant("odd-e-seed1", ODD_E, seed=1, lengths=_FEW),
    Variant("odd-moe", ODD_MOE),
    Variant("everything", EVERYTHING),
    Variant("window1", _text(sliding_window=1, hidden_size=24, num_attention_heads=2, layer_types=[S, S, F, S, F])),
    Variant(
        "one-layer",
        _text(layer_types=[F], hidden_size_per_layer_input=12, num_attention_heads=1, num_key_value_heads=1),
        lengths=_FEW,
    ),
    Variant("all-global", _text(layer_types=[F, F, F], rope_parameters=_rope(10.0, 700.0, 1.0)), lengths=_FEW),
    Variant("plain", _text(final_logit_softcapping=None, sliding_window=3, layer_types=[S, S, F])),
    Variant("untied", _text(tie_word_embeddings=False, vocab_size=121, layer_types=[S, F]), lengths=_FEW),
    Variant("sharing-without-ple", _text(num_kv_shared_layers=2, layer_types=[S, F, S, F]), lengths=_FEW),
    Variant(
        "ple-vocab",
        _text(hidden_size_per_layer_input=24, vocab_size_per_layer_input=199, layer_types=[S, F]),
        lengths=_FEW,
    ),
    Variant(
        "wide",  # sizes beyond one tile of every kernel, rows that are no multiple of it
        WIDE,
        lengths=(1, 5, 33, 150),
    ),
    Variant(
        "long",  # more positions than one chunk of a step
        LONG_PROMPT,
        lengths=(600,),
    ),
    Variant("far", FAR, lengths=(*_FEW, 1100)),  # a context that test_exactness fills
    Variant("wide-mlp", _text(hidden_size=24, intermediate_size=4500, layer_types=[S, F]), lengths=(1, 13)),
    Variant("e2b-bf16", E2B, dtype="bfloat16", multimodal=True, lengths=_FEW),
    Variant("moe26b-bf16", MOE, dtype="bfloat16", lengths=_FEW),
    Variant("e2b-f16", E2B, dtype="float16", lengths=_FEW),
    Variant("odd-e-bf16", ODD_E | {"hidden_size_per_layer_input": 9}, dtype="bfloat16", lengths=_FEW),
    Variant("odd-moe-f16", ODD_MOE, dtype="float16", lengths=_FEW),
    Variant("linear-rope", _text(rope_parameters=_LINEAR, layer_types=[S, F, S, F]), lengths=_FEW),
    Variant("gemma2", GEMMA2, family="gemma2"),
    Variant("gemma2-seed1", GEMMA2, seed=1, family="gemma2", legacy_config=True, lengths=_FEW),
    Variant("gemma2-odd", GEMMA2_ODD, family="gemma2", legacy_config=True),
    Variant("gemma2-bf16", GEMMA2, family="gemma2", dtype="bfloat16", lengths=_FEW),
    Variant("gemma2-wide", GEMMA2_WIDE, family="gemma2", lengths=(1, 5, 33, 150)),
    Variant("gemma2-wide-bf16", GEMMA2_WIDE, family="gemma2", dtype="bfloat16", lengths=(41,)),
    Variant("gemma2-long", GEMMA2 | {"sliding_window": 64}, family="gemma2", lengths=(600,)),
    Variant("gemma3", GEMMA3, family="gemma3"),
    Variant("gemma3-seed1", GEMMA3, seed=1, family="gemma3", legacy_config=True, shards=True, lengths=_FEW),
    Variant("gemma3-mm", GEMMA3, family="gemma3", multimodal=True, lengths=_FEW),
    Variant(
        "gemma3-mm-old", GEMMA3, family="gemma3", multimodal=True, legacy_config=True, legacy_names=True, lengths=_FEW
    ),
    Variant("gemma3-odd", GEMMA3_ODD, family="gemma3"),
    Variant("gemma3-bf16", GEMMA3, family="gemma3", dtype="bfloat16", lengths=_FEW),
    Variant("gemma3-f16", GEMMA3_ODD, family="gemma3", dtype="float16", legacy_config=True, lengths=_FEW),
    Variant("vaultgemma", GEMMA2, family="vaultgemma"),
    Variant("vaultgemma-bf16", GEMMA2, family="vaultgemma", dtype="bfloat16", legacy_config=True, lengths=_FEW),
]
# not compared with float32, whose rounding they amplify: test_float64.py
UNDAMPED = [
    replace(variant, name=f"{variant.name}-undamped", damped=False)
    for variant in VARIANTS
    if variant.dtype == "float32" and not variant.seed and variant.name not in ("long", "far")
]
BY_NAME = {v.name: v for v in [*VARIANTS, *UNDAMPED]}


def token_ids(variant: Variant, n: int, seed: int = 0) -> torch.Tensor:
    """n random valid ids, int64 [n]."""
    generator = torch.Generator().manual_seed(7919 * seed + n)
    return torch.randint(0, variant.d_vocab, (n,), generator=generator)


def build(variant: Variant) -> Any:
    """The reference model in float32 with eager attention and experts; its weights are exactly those on disk."""
    config = TEXT_CLASSES[variant.family][0](**copy.deepcopy(variant.text))
    if variant.multimodal and variant.family == "gemma3":
        config = Gemma3Config(text_config=config, vision_config=_siglip(), mm_tokens_per_image=4)
    elif variant.multimodal:
        config = Gemma4Config(text_config=config, vision_config=None, audio_config=None)
    model = variant.model_class._from_config(config, dtype=torch.float32, **eager(variant))
    _randomise(model, variant.seed, variant.stores_unit_gains, variant.damped)
    round_to(model, DTYPES[variant.dtype])
    return model.eval()


def eager(variant: Variant) -> dict[str, str]:
    """Options of transformers that choose plain implementations."""
    experts = {"experts_implementation": "eager"} if variant.family == "gemma4" else {}
    return {"attn_implementation": "eager", **experts}


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=56,
        patch_size=7,
        vision_use_head=False,
    )


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int, unit_gains: bool = False, damped: bool = True) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("lm_head.weight") and tensor is model.get_input_embeddings().weight:  # type: ignore[operator]
            continue
        drawn = _draw(name, tuple(tensor.shape), generator, damped)
        tensor.copy_(drawn - 1 if unit_gains and name.endswith("norm.weight") else drawn)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, damped: bool) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("layer_scalar"):
        return 0.7 + 0.6 * uniform
    if name.endswith("per_expert_scale"):
        return 0.5 + uniform
    if name.endswith("k_norm.weight"):  # attention scale is 1: this keeps scores at a spread of about 2
        return (1 + 0.25 * normal) * 2 * shape[0] ** -0.5
    if damped and _OUTPUT_NORM.search(name):
        return 0.4 + 0.12 * normal
    if name.endswith("router.scale") or "norm" in name:
        return 1 + 0.3 * normal
    if name.endswith("router.proj.weight"):
        return normal
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return 3 * normal * shape[-1] ** -0.5
    if name.endswith("embed_tokens_per_layer.weight"):
        return normal * 0.3
    return normal * (shape or (1,))[-1] ** -0.5  # a linear map keeps the spread of what it is given


@torch.no_grad()
def round_to(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round weights, and the embedding scales that transformers casts to the weights' dtype, as `dtype` stores them."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.copy_(tensor.to(dtype))
    for module in model.modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale.copy_(module.embed_scale.to(dtype))  # type: ignore[operator, union-attr]


def save(variant: Variant, model: Any, directory: Path) -> None:
    """Write the checkpoint as save_pretrained does, then apply the variant's disk quirks."""
    stored = copy.deepcopy(model).to(DTYPES[variant.dtype])  # a copy: .to() would round RoPE's frequencies for good
    size = sum(t.numel() * t.element_size() for t in stored.state_dict().values())
    stored.save_pretrained(directory, max_shard_size=size // 3 if variant.shards else "5GB")
    if variant.dead_kv:
        _add_dead_kv(variant, directory)
    if variant.legacy_names:
        _legacy_names(directory)
    if variant.legacy_config:
        _LEGACY[variant.family](directory)


def _add_dead_kv(variant: Variant, directory: Path) -> None:
    file = sorted(directory.glob("*.safetensors"))[-1]
    index = directory / "model.safetensors.index.json"
    tensors = load_file(file)
    dead = dict(_dead_kv(variant))
    save_file(tensors | dead, file, metadata={"format": "pt"})
    if index.exists():
        listing = json.loads(index.read_text())
        listing["weight_map"] |= dict.fromkeys(dead, file.name)
        index.write_text(json.dumps(listing))


def _dead_kv(variant: Variant) -> Iterator[tuple[str, torch.Tensor]]:
    text = variant.text
    prefix = "model.language_model." if variant.multimodal else "model."
    n = text["num_hidden_layers"]
    for layer in range(n - text["num_kv_shared_layers"], n):
        d = text["head_dim"] if text["layer_types"][layer] == S else text["global_head_dim"]
        attention = f"{prefix}layers.{layer}.self_attn."
        for part in ("k_proj", "v_proj"):
            shape = (text["num_key_value_heads"] * d, text["hidden_size"])
            yield f"{attention}{part}.weight", torch.full(shape, math.nan)
        yield f"{attention}k_norm.weight", torch.full((d,), math.nan)


def _legacy_names(directory: Path) -> None:
    file = directory / "model.safetensors"
    old = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."}
    tensors = {}
    for name, tensor in load_file(file).items():
        prefix = next((p for p in old if name.startswith(p)), None)
        tensors[old[prefix] + name.removeprefix(prefix) if prefix else name.removeprefix("model.")] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def _rewritten(directory: Path) -> Iterator[dict[str, Any]]:
    """The text model's part of config.json, to be changed."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    yield config.get("text_config", config)
    path.write_text(json.dumps(config, indent=2))


def _legacy_config(directory: Path) -> None:
    """The spelling of the released checkpoints, which transformers still reads."""
    with _rewritten(directory) as text:
        overrides = next(iter(text.pop("per_layer_config").values()))
        text["global_head_dim"] = overrides["head_dim"]
        text["num_global_key_value_heads"] = overrides.get("num_key_value_heads")


def _legacy_gemma2(directory: Path) -> None:
    with _rewritten(directory) as text:
        rope = text.pop("rope_parameters")
        text["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] != "default":
            text["rope_scaling"] = rope
        if text["layer_types"] == [S, F] * (len(text["layer_types"]) // 2):  # the class's pattern
            del text["layer_types"]


def _legacy_gemma3(directory: Path) -> None:
    with _rewritten(directory) as text:
        ropes = text.pop("rope_parameters")
        text["rope_local_base_freq"] = ropes[S]["rope_theta"]
        text["rope_theta"] = ropes[F].pop("rope_theta")
        text["rope_scaling"] = ropes[F]
        del text["layer_types"]
        text["sliding_window_pattern"] = 6


_LEGACY = {
    "gemma4": _legacy_config,
    "gemma3": _legacy_gemma3,
    "gemma2": _legacy_gemma2,
    "vaultgemma": _legacy_gemma2,
}
