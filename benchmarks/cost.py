# SPDX-License-Identifier: Apache-2.0
"""What a model must read and compute, from its config and its files' headers: the denominators of "share of peak".

Counted is what this engine computes for a prompt of which only the last position's logits are wanted. Below the last
layer that makes keys: every position; in that layer: keys and values of every position, the rest for one; above it: one
position. Per-layer embeddings are projected for every position, and their table is read row by row.
"""

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PLE_TABLE = "embed_tokens_per_layer.weight"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the text model: its size in bytes and in elements."""

    n_bytes: int
    n_elements: int
    is_matrix: bool


@dataclass(frozen=True)
class Cost:
    """bytes_resident: weights that generating touches · bytes_per_token: weights and cached keys and values that one
    decoded token reads after `context` positions · prefill_flops: for `context` positions."""

    bytes_resident: int
    bytes_per_token: int
    kv_bytes: int
    prefill_flops: int
    context: int


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))


def text_tensors(model: Path) -> dict[str, Tensor]:
    """Every tensor of the text model, by its name without prefix ("layers.0.mlp.up_proj.weight")."""
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            match = re.match(
                r"(?:model\.language_model\.|model\.|)((?:embed_tokens|per_layer|layers|norm|lm_head).*)", name
            )
            if match:
                n = prod(entry["shape"])
                tensors[match[1]] = Tensor(n * BYTES[entry["dtype"]], n, len(entry["shape"]) > 1)
    return tensors


def text_config(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text())
    return config.get("text_config", config)


class Layer:
    """One layer's place in the model: which positions it runs for and what it attends to."""

    def __init__(self, config: dict[str, Any], index: int) -> None:
        n, shared = config["num_hidden_layers"], config.get("num_kv_shared_layers", 0)
        own = {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"]}
        self.is_global = config["layer_types"][index] == "full_attention"
        if self.is_global and "per_layer_config" in config:
            own |= config["per_layer_config"].get(str(index), {})
        elif self.is_global:
            own["head_dim"] = config.get("global_head_dim", 512)
            if config.get("attention_k_eq_v"):
                own["num_key_value_heads"] = config.get("num_global_key_value_heads") or own["num_key_value_heads"]
        self.shares_kv = index >= n - shared
        self.window = 0 if self.is_global else config["sliding_window"]
        self.n_heads, self.head_dim, self.n_kv_heads = (
            config["num_attention_heads"],
            own["head_dim"],
            own["num_key_value_heads"],
        )

    def keys(self, context: int) -> int:
        """How many keys the last of `context` positions sees."""
        return min(context, self.window) if self.window else context

    def attention_flops(self, context: int, n_rows: int) -> int:
        """Scores and weighted values for the last n_rows of `context` positions."""
        first = context - n_rows
        n_pairs = sum(self.keys(position + 1) for position in range(first, context))
        return 4 * n_pairs * self.n_heads * self.head_dim

    def kv_bytes(self, context: int, itemsize: int = 4) -> int:
        return 2 * self.keys(context) * self.n_kv_heads * self.head_dim * itemsize


def _layer_elements(tensors: dict[str, Tensor], index: int, expert_share: float) -> tuple[int, int, int]:
    """One layer's matrix elements that a position multiplies by, those of them that make keys and values, and bytes."""
    elements = kv = n_bytes = 0
    for name, tensor in tensors.items():
        if name.startswith(f"layers.{index}."):
            share = expert_share if ".experts." in name else 1.0
            n = int(tensor.n_elements * share) if tensor.is_matrix else 0
            elements += n
            kv += n if re.search(r"self_attn\.[kv]_proj", name) else 0
            n_bytes += int(tensor.n_bytes * share)
    return elements, kv, n_bytes


def live_tensors(tensors: dict[str, Tensor], layers: list[Layer]) -> dict[str, Tensor]:
    """Without the keys and values of KV-sharing layers, which released files hold and nobody reads."""
    dead = [f"layers.{i}.self_attn.{kind}_" for i, layer in enumerate(layers) if layer.shares_kv for kind in "kv"]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(dead))}


def of_model(model: Path, context: int) -> Cost:
    """The cost of `context` prompt positions, and of one more token after them (float32 keys and values)."""
    config = text_config(model)
    layers = [Layer(config, i) for i in range(config["num_hidden_layers"])]
    tensors = live_tensors(text_tensors(model), layers)
    experts = (config.get("top_k_experts") or 1) / (config.get("num_experts") or 1)
    head = tensors.get("lm_head.weight", tensors["embed_tokens.weight"])
    projection = tensors.get("per_layer_model_projection.weight")
    flops = 2 * head.n_elements + (2 * context * projection.n_elements if projection else 0)
    per_token = head.n_bytes + (projection.n_bytes if projection else 0)
    last_with_keys = max(i for i, layer in enumerate(layers) if not layer.shares_kv)
    for i, layer in enumerate(layers):
        elements, kv, n_bytes = _layer_elements(tensors, i, experts)
        n_rows = context if i < last_with_keys else 1
        n_kv_rows = context if i <= last_with_keys else 1
        flops += 2 * n_rows * (elements - kv) + 2 * n_kv_rows * kv + layer.attention_flops(context, n_rows)
        per_token += n_bytes
    resident = sum(tensor.n_bytes for name, tensor in tensors.items() if name != PLE_TABLE)
    kv = sum(layer.kv_bytes(context) for layer in layers if not layer.shares_kv)
    kv_read = sum(layer.kv_bytes(context) for layer in layers)
    return Cost(resident, per_token + kv_read, kv, flops, context)
