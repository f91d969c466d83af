# SPDX-License-Identifier: Apache-2.0
"""What a model must read and compute, from its config and its tensors' sizes: the denominators of "share of peak".

Counted is what this engine computes for a prompt of which only the last position's logits are wanted. Below the last
layer that makes keys: every position; in that layer: keys and values of every position, the rest for one; above it: one
position. Per-layer embeddings are projected for every position, and their table is read row by row.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from gemma4.load import TextConfig, open_checkpoint
from gemma4.load.dtypes import row_bytes

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


class Layer:
    """One layer's place in the model: which positions it runs for and what it attends to."""

    def __init__(self, config: TextConfig, index: int) -> None:
        self.shares_kv = config.kv_source[index] != index
        self.window = config.sliding_window if config.layer_types[index] == "sliding_attention" else 0
        self.n_heads, self.head_dim = config.n_heads, config.head_dim[index]
        self.n_kv_heads = config.n_kv_heads[index]

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


def text_tensors(model: Path) -> tuple[TextConfig, dict[str, Tensor]]:
    """The configuration, and every tensor that the text model reads, by its name without prefix."""
    with open_checkpoint(model) as checkpoint:
        tensors = {}
        for name, (dtype, shape, _, _) in checkpoint.engine_tensors.items():
            rows = math.prod(shape[:-1])
            tensors[name] = Tensor(rows * row_bytes(dtype, shape[-1]), math.prod(shape), len(shape) > 1)
        return checkpoint.config, tensors


def of_model(model: Path, context: int) -> Cost:
    """The cost of `context` prompt positions, and of one more token after them (float32 keys and values)."""
    config, tensors = text_tensors(model)
    layers = [Layer(config, i) for i in range(config.n_layers)]
    experts = config.top_k_experts / config.n_experts if config.n_experts else 1.0
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
