# SPDX-License-Identifier: Apache-2.0
"""Which sites a config must have, and their shapes: csrc/model/sites.inc read for a transformers config."""

import re
from pathlib import Path
from typing import Any, NamedTuple

SITES_INC = Path(__file__).parents[2] / "csrc" / "model" / "sites.inc"
_ROW = re.compile(r'^G4_SITE\(\s*\w+\s*,\s*"([^"]+)"\s*,\s*"(\w+)"\s*,\s*(\w+)\s*\)', re.MULTILINE)


class Row(NamedTuple):
    name: str
    dims: str
    when: str


def rows() -> list[Row]:
    """The text model's; the encoders' are compared by name in test_vision.py and test_audio.py."""
    found = [Row(*match.groups()) for match in _ROW.finditer(SITES_INC.read_text())]
    return [row for row in found if not row.name.startswith(("vision.", "audio."))]


def expected(text: Any, n_tokens: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every site the text model has, for one prompt of n_tokens; `text` is a Gemma4TextModel."""
    found = {}
    for row in rows():
        layers = range(len(text.layers)) if "{}" in row.name else [0]
        for layer in layers:
            if _has(text, layer, row.when):
                sizes = _sizes(text, layer, n_tokens)
                found[row.name.format(layer)] = tuple(sizes[d] for d in row.dims)
    return found


def _has(text: Any, layer: int, when: str) -> bool:
    attention = text.layers[layer].self_attn
    computes_keys = not attention.is_kv_shared_layer
    return {
        "MODEL": True,
        "LAYER": True,
        "KV": computes_keys,
        "VPROJ": computes_keys and attention.v_proj is not None,
        "PLE_MODEL": bool(text.hidden_size_per_layer_input),
        "PLE": bool(text.hidden_size_per_layer_input),
        "MOE": text.config.enable_moe_block,
        "SOFTCAP": text.config.final_logit_softcapping is not None,
    }[when]


def _sizes(text: Any, layer: int, n_tokens: int) -> dict[str, int | None]:
    config, block = text.config, text.layers[layer]
    return {
        "T": n_tokens,
        "S": n_tokens,
        "D": config.hidden_size,
        "H": config.num_attention_heads,
        "K": config.num_attention_heads // block.self_attn.num_key_value_groups,
        "h": block.self_attn.head_dim,
        "F": block.mlp.intermediate_size,
        "P": config.hidden_size_per_layer_input,
        "L": len(text.layers),
        "E": config.num_experts,
        "k": config.top_k_experts,
        "M": config.moe_intermediate_size,
        "V": config.vocab_size,
        "1": 1,
    }
