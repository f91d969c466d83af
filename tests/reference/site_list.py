# SPDX-License-Identifier: Apache-2.0
"""Which sites a config must have, and their shapes: csrc/model/sites.inc read for a transformers config."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from . import oracle

SITES_INC = Path(__file__).parents[2] / "csrc" / "model" / "sites.inc"
_ROW = re.compile(r'^G4_SITE\(\s*\w+\s*,\s*"([^"]+)"\s*,\s*"(\w+)"\s*,\s*(\w+)\s*,', re.MULTILINE)


class Row(NamedTuple):
    name: str
    dims: str
    when: str


def rows() -> list[Row]:
    """The text model's; the encoders' are compared by name in test_vision.py and test_audio.py."""
    found = [Row(*match.groups()) for match in _ROW.finditer(SITES_INC.read_text())]
    return [row for row in found if not row.name.startswith(("vision.", "audio."))]


def expected(model: Any, n_tokens: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every site that a model of transformers has, for one prompt of n_tokens."""
    found, text = {}, oracle.text_model(model)
    for row in rows():
        layers = range(len(text.layers)) if "{}" in row.name else [0]
        for layer in layers:
            if _has(model, text.layers[layer], row.when):
                sizes = _sizes(text, layer, n_tokens)
                found[row.name.format(layer)] = tuple(sizes[d] for d in row.dims)
    return found


def _has(model: Any, block: Any, when: str) -> bool:
    attention, computes_keys = block.self_attn, oracle.computes_keys(block.self_attn)
    ple = bool(getattr(oracle.text_model(model), "hidden_size_per_layer_input", 0))
    return {
        "MODEL": True,
        "LAYER": True,
        "KV": computes_keys,
        "VPROJ": computes_keys and attention.v_proj is not None,
        "QNORM": hasattr(attention, "q_norm"),
        "KNORM": computes_keys and hasattr(attention, "k_norm"),
        "VNORM": computes_keys and hasattr(attention, "v_norm"),
        "POST": hasattr(block, "post_attention_layernorm"),
        "SCALAR": hasattr(block, "layer_scalar"),
        "PLE_MODEL": ple,
        "PLE": ple,
        "MOE": getattr(block, "enable_moe_block", False),
        "SOFTCAP": oracle.logit_softcap(model) is not None,
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
        "P": getattr(config, "hidden_size_per_layer_input", None),
        "L": len(text.layers),
        "E": getattr(config, "num_experts", None),
        "k": getattr(config, "top_k_experts", None),
        "M": getattr(config, "moe_intermediate_size", None),
        "V": config.vocab_size,
        "1": 1,
    }
