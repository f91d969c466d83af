# SPDX-License-Identifier: Apache-2.0
"""The released sizes of Gemma 2 and 3 and the models made from them: every site against transformers.

Each config.json has the keys of the released file, none more, and is read by transformers itself. Layers, heads, query
scales, windows' pattern and RoPE are the released ones; widths are narrower, at the same ratios where nothing else is
said.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForConditionalGeneration

import gemma4

from . import oracle, variants
from .compare import difference, first_failures

S, F = variants.S, variants.F
LINEAR = {"factor": 8.0, "rope_type": "linear"}


def gemma2(width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, scalar: int) -> dict[str, Any]:
    """The file of transformers 4.42, also of ShieldGemma 1 and SEA-LION v3."""
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": scalar,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 16,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.4",
        "use_cache": True,
        "vocab_size": 250,
    }


def gemma3_text(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> dict[str, Any]:
    """The file of transformers 4.50 of a text model alone."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 16,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
        "vocab_size": 250,
    } | changes


def gemma3(text: dict[str, Any]) -> dict[str, Any]:
    """The file of a model that sees pictures: the text model's part has what differs from its class alone."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 4,
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "rope_scaling": LINEAR, "sliding_window": 16, **text},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 24,
            "image_size": 56,
            "intermediate_size": 48,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 7,
            "vision_use_head": False,
        },
    }


def narrow(width: int, mlp: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> dict[str, Any]:
    return {
        "head_dim": 8,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": 250,
    } | changes


NEW_ROPE = {F: LINEAR | {"rope_theta": 1e6}, S: {"rope_theta": 1e4, "rope_type": "default"}}
NEW_TEXT = {  # as transformers 5 writes it
    "rope_scaling": None,
    "rope_parameters": NEW_ROPE,
    "layer_types": [F if (i + 1) % 6 == 0 else S for i in range(34)],
    "use_bidirectional_attention": False,
    "_sliding_window_pattern": 6,
}

# widths and head sizes of the released models, divided by 32; the widest ones rounded to a multiple of the heads
RELEASED: dict[str, dict[str, Any]] = {
    "gemma-2-2b": gemma2(72, 288, 26, 8, 4, 8, 256),
    "gemma-2-9b": gemma2(112, 448, 42, 16, 8, 8, 256),
    "gemma-2-27b": gemma2(160, 576, 46, 32, 16, 4, 144),
    "shieldgemma-2b": gemma2(72, 288, 26, 8, 4, 8, 256),
    "sea-lion-v3-9b": gemma2(112, 448, 42, 16, 8, 8, 256) | {"eos_token_id": [1, 107]},
    "gemma-3-270m": gemma3_text(20, 64, 18, 4, 1, _sliding_window_pattern=6, layer_types=[*[S] * 5, F] * 3),
    "functiongemma-270m": gemma3_text(20, 64, 18, 4, 1, eos_token_id=[1, 50, 106], use_bidirectional_attention=False),
    "gemma-3-1b": gemma3_text(36, 216, 26, 4, 1),
    "gemma-3-4b": gemma3({"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 34}),
    "gemma-3-12b": gemma3(narrow(128, 480, 48, 16, 8)),
    "gemma-3-27b": gemma3(narrow(160, 336, 62, 32, 16, query_pre_attn_scalar=168)),
    "translategemma-4b": gemma3(narrow(80, 320, 34, 8, 4) | NEW_TEXT),
    "sarvam-translate": gemma3_text(80, 320, 34, 8, 4, rope_scaling=LINEAR, vocab_size=262),
    "medgemma-27b-text": gemma3_text(
        160, 336, 62, 32, 16, query_pre_attn_scalar=168, rope_scaling=LINEAR, cache_implementation=None
    ),
}
LONG = {  # two full layers, one of them not the last
    "gemma-3": gemma3(narrow(24, 32, 13, 3, 1, vocab_size=97)),
    "gemma-2": gemma2(24, 32, 3, 3, 1, 8, 256),
}
Made = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """made(name) -> its directory, and transformers' model of the same config.json and weights."""

    def get(name: str) -> tuple[Path, Any]:
        torch.set_num_threads(1)
        path = tmp_path_factory.mktemp(name) / name
        path.mkdir()
        raw = (RELEASED | LONG)[name]
        text = json.dumps(raw)
        (path / "config.json").write_text(text)
        config = AutoConfig.from_pretrained(path)
        nested = "text_config" in raw
        kind = Gemma3ForConditionalGeneration if nested else AutoModelForCausalLM
        build = kind._from_config if nested else kind.from_config
        model = build(config, dtype=torch.float32, attn_implementation="eager").eval()
        variants._randomise(model, 6, unit_gains=True)
        variants.round_to(model, torch.float32)
        model.save_pretrained(path)
        if nested:
            variants._legacy_names(path)
        (path / "config.json").write_text(text)
        return path, model

    return get


@pytest.mark.parametrize("name", RELEASED)
def test_every_site(name: str, made: Made) -> None:
    path, reference = made(name)
    ids = _ids(40, 250)
    expected = oracle.sites_from(reference, oracle.record(reference, ids))
    with gemma4.load(path) as model:
        logits, cache = model.run_with_cache(ids.numpy(), "*")
        assert set(cache) == set(expected)
        assert first_failures(cache, expected) == []
        assert difference(logits, expected["hook_logits"]) is None


@pytest.mark.parametrize("name", LONG)
def test_far_positions(name: str, made: Made) -> None:
    """A wrong factor of positions, or one on sliding layers, changes little in the first hundreds of tokens."""
    path, reference = made(name)
    ids = _ids(2200, 97)
    with gemma4.load(path) as model, torch.no_grad():
        expected = reference(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        logits, cache = model.run_with_cache(ids.numpy(), "*.hook_resid_post")
        assert difference(logits, expected.logits[0].numpy()) is None
        assert len(cache) == len(expected.hidden_states) - 1
        for found, wanted in list(zip(cache.values(), expected.hidden_states[1:], strict=True))[:-1]:
            assert difference(found, wanted[0].numpy()) is None  # the last one is after the final norm


def _ids(n: int, below: int) -> torch.Tensor:
    return torch.randint(0, below, (n,), generator=torch.Generator().manual_seed(3))
