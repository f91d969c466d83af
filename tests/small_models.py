# SPDX-License-Identifier: Apache-2.0
"""Random small checkpoints for the tests of the Python face; no torch needed to write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma4.load.config import parse_config
from gemma4.load.encoder_config import parse_encoders
from gemma4.load.names import encoder_tensors, text_tensors

S, F = "sliding_attention", "full_attention"

# like E2B: per-layer embeddings, two layers that share keys, double-wide MLP there
E_LIKE: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "layer_types": [S, S, F, S, S, F],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "eos_token_id": [1],
    "bos_token_id": 2,
    "pad_token_id": 0,
}

# like 26B-A4B: experts, K=V in global layers, no per-layer embeddings
MOE_LIKE: dict[str, Any] = E_LIKE | {
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}

# big enough that a long prefill takes seconds
SLOW: dict[str, Any] = E_LIKE | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "layer_types": [S, S, F] * 6,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
    "num_attention_heads": 8,
    "head_dim": 64,
    "global_head_dim": 64,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor the text model reads, bf16, sized so that activations stay near 1."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in text_tensors(parse_config(config)).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("layer_scalar"):
            values = 0.8 + 0.1 * values
        elif "norm" in name or name.endswith("scale"):
            values = 1 + 0.1 * values
        else:
            values /= np.sqrt(shape[-1])
        tensors[f"model.{name}"] = values.astype(ml_dtypes.bfloat16)
    return tensors


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A Hugging Face directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed), directory / "model.safetensors")
    return directory


# every width a multiple of 256, the block of K-quants; shared layers as llama.cpp supposes them (S F before them)
WIDE: dict[str, Any] = E_LIKE | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 7,
    "layer_types": [S, S, S, F, S, S, F],
    "num_kv_shared_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
    "global_head_dim": 64,
    "sliding_window": 32,
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 1024,
}


def write_calm_checkpoint(directory: Path, tokenizer_of: Path) -> Path:
    """WIDE with random weights and another model's tokenizer. Weights as random as elsewhere make attention all but
    pick single keys, so that rounding in the first layer is a different answer in the last; here queries and branches
    are damped, which leaves arithmetic errors about the size that they have in trained models."""
    vocabulary = json.loads((tokenizer_of / "config.json").read_text())["text_config"]["vocab_size"]
    config = WIDE | {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    tensors = random_tensors(config)
    for name, values in tensors.items():
        factor = 0.1 if name.endswith("q_norm.weight") else 0.3 if "post_" in name else 1.0
        tensors[name] = (values.astype(np.float32) * factor).astype(values.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((tokenizer_of / name).read_bytes())
    return directory


# -- with encoders, whose fixed numbers (chunks, context, cap) are those of the released models ------------------------

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 64,
    "use_clipped_linears": True,
}
LARGE_VISION: dict[str, Any] = VISION | {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "use_clipped_linears": False,
    "standardize": True,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 96,
}
UNIFIED_VISION: dict[str, Any] = {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 40}

MULTIMODAL: dict[str, dict[str, Any]] = {
    "effective": {"model_type": "gemma4", "text_config": E_LIKE, "vision_config": VISION, "audio_config": AUDIO},
    "large": {"model_type": "gemma4", "text_config": MOE_LIKE, "vision_config": LARGE_VISION, "audio_config": None},
    "unified": {
        "model_type": "gemma4_unified",
        "text_config": MOE_LIKE | {"model_type": "gemma4_unified_text", "enable_moe_block": False, "num_experts": None},
        "vision_config": UNIFIED_VISION,
        "audio_config": {},
    },
}
_FOLDERS = {"vision_tower": "vision_tower.", "vision_embedder": "vision_embedder.", "audio_tower": "audio_tower."}


def write_multimodal_checkpoint(directory: Path, kind: str, dtype: Any = ml_dtypes.bfloat16, seed: int = 0) -> Path:
    """A Hugging Face directory of MULTIMODAL[kind] without a tokenizer; encoders' weights in `dtype`."""
    config = MULTIMODAL[kind]
    text = parse_config(config)
    tensors = {
        name.replace("model.", "model.language_model.", 1): values
        for name, values in random_tensors(config["text_config"], seed).items()
    }
    rng = np.random.default_rng(seed + 1)
    for modality, encoder in parse_encoders(config, text).items():
        for name, shape in encoder_tensors(encoder).items():
            folder = f"embed_{modality}." if name.startswith("embedding_projection") else _FOLDERS[encoder.kind]
            tensors[f"model.{folder}{name}"] = np.asarray(_encoder_values(name, shape, rng), dtype)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def _encoder_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Near 1 in norms, below 1 in maps, and bounds that some activations pass."""
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith(("_min", "_max")):
        return np.asarray((1.5 + abs(values[0])) * (-1.0 if name.endswith("_min") else 1.0))  # no axis, as released
    if len(shape) > 1:
        return values / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
    return values if name.endswith(("bias", "per_dim_scale")) else 1 + 0.1 * values
