# SPDX-License-Identifier: Apache-2.0
"""The two architectures: Gemma 4 E2B and 26B-A4B in small, as transformers' own configuration."""

from __future__ import annotations

import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig

SLIDING, FULL = "sliding_attention", "full_attention"
CONTEXT, WINDOW = 1024, 32

_COMMON = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
}

SHAPES = {
    # per-layer embeddings, 4:1 local/global, the second half reads the keys and values of layers 3 and 4
    "tiny-e": {
        "num_hidden_layers": 10,
        "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 5,
        "intermediate_size": 160,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32,
    },
    # 2:1, a dense branch beside 8 experts, keys used as values in the global layers, no per-layer embeddings. With 5:1
    # and one global head of 64, at this size, neither induction nor indirect objects were learned in 1300 steps.
    "tiny-moe": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "intermediate_size": 128,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
        "hidden_size_per_layer_input": 0,
    },
}


def config(name: str, vocab: int) -> Gemma4Config:
    """The configuration of `tiny-e` or `tiny-moe`, text only."""
    text = Gemma4TextConfig(vocab_size=vocab, vocab_size_per_layer_input=vocab, **_COMMON, **SHAPES[name])
    return Gemma4Config(text_config=text, vision_config=None, audio_config=None, tie_word_embeddings=True)


def layer_scalars(layers: int) -> list[float]:
    """Fixed, not trained (a buffer in transformers): 0.875, 1.0, 0.9375, …, exact in bf16 and not all 1."""
    return [1.0 - 0.0625 * ((2 - 2 * i) % 3) for i in range(layers)]


@torch.no_grad()
def build(name: str, vocab: int, seed: int) -> Gemma4ForConditionalGeneration:
    """A fresh model. The gains start below 1 so that the embedding is heard beside ten layers of unit-norm output."""
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(config(name, vocab))
    for key, value in model.named_parameters():
        if ("post_" in key and key.endswith("norm.weight")) or ("layernorm_" in key and "post" in key):
            value.fill_(0.35)
        elif key.endswith(("q_norm.weight", "k_norm.weight")):
            value.fill_(0.6)
        elif "embed_tokens" in key:
            value.normal_(0.0, 0.08)
    text = model.model.language_model
    for layer, scalar in zip(text.layers, layer_scalars(len(text.layers)), strict=True):
        layer.layer_scalar.fill_(scalar)
    return model
