# SPDX-License-Identifier: Apache-2.0
"""What a model must read and compute, from its config and its tensors' sizes: the numerators of "share of peak".

Counted is what this engine computes for a prompt of which only the last position's logits are wanted. Below the last
layer that makes keys: every position; in that layer: keys and values of every position, the rest for one; above it: one
position. Per-layer embeddings are projected for every position, and their table is read row by row.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from gemma4.load import TextConfig, open_checkpoint
from gemma4.load.dtypes import is_quantised, row_bytes

PLE_TABLE = "embed_tokens_per_layer.weight"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the text model: its size in bytes and in elements."""

    n_bytes: int
    n_elements: int
    is_matrix: bool
    dtype: str


@dataclass(frozen=True)
class Cost:
    """bytes_resident: weights that generating touches · bytes_per_token: weights and cached keys and values that one
    decoded token reads after `context` positions · prefill_flops: for `context` positions · prefill_int8: those of them
    that are products with quantised weights · kind: the type of most weights · has_experts: a mixture of experts."""

    bytes_resident: int
    bytes_per_token: int
    kv_bytes: int
    prefill_flops: int
    context: int
    prefill_int8: int = 0
    kind: str = "BF16"
    has_experts: bool = False


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


@dataclass
class Products:
    """Operations of products with weights: all, and those with quantised ones."""

    flops: int = 0
    int8: int = 0

    def add(self, tensor: Tensor, n_rows: float) -> None:
        flops = int(2 * n_rows * tensor.n_elements) if tensor.is_matrix else 0
        self.flops += flops
        self.int8 += flops if is_quantised(tensor.dtype) else 0


def text_tensors(model: Path) -> tuple[TextConfig, dict[str, Tensor]]:
    """The configuration, and every tensor that the text model reads, by its name without prefix."""
    with open_checkpoint(model) as checkpoint:
        tensors = {}
        for name, (dtype, shape, _, _) in checkpoint.engine_tensors.items():
            rows = math.prod(shape[:-1])
            tensors[name] = Tensor(rows * row_bytes(dtype, shape[-1]), math.prod(shape), len(shape) > 1, dtype)
        return checkpoint.config, tensors


def of_model(model: Path, context: int) -> Cost:
    """The cost of `context` prompt positions, and of one more token after them (float32 keys and values)."""
    config, tensors = text_tensors(model)
    layers = [Layer(config, i) for i in range(config.n_layers)]
    experts = config.top_k_experts / config.n_experts if config.n_experts else 1.0
    head = tensors.get("lm_head.weight", tensors["embed_tokens.weight"])
    projection = tensors.get("per_layer_model_projection.weight")
    products, attention = Products(), 0
    products.add(head, 1)
    per_token = head.n_bytes
    if projection:
        products.add(projection, context)
        per_token += projection.n_bytes
    last_with_keys = max(i for i, layer in enumerate(layers) if not layer.shares_kv)
    for i, layer in enumerate(layers):
        n_rows = context if i < last_with_keys else 1
        n_kv_rows = context if i <= last_with_keys else 1
        attention += layer.attention_flops(context, n_rows)
        for name, tensor in tensors.items():
            if name.startswith(f"layers.{i}."):
                share = experts if ".experts." in name else 1.0
                products.add(tensor, share * (n_kv_rows if re.search(r"self_attn\.[kv]_proj", name) else n_rows))
                per_token += int(tensor.n_bytes * share) if tensor.is_matrix else 0  # vectors stay in a cache
    resident = sum(tensor.n_bytes for name, tensor in tensors.items() if name != PLE_TABLE)
    kv = sum(layer.kv_bytes(context) for layer in layers if not layer.shares_kv)
    kv_read = sum(layer.kv_bytes(context) for layer in layers)
    return Cost(
        bytes_resident=resident,
        bytes_per_token=per_token + kv_read,
        kv_bytes=kv,
        prefill_flops=products.flops + attention,
        context=context,
        prefill_int8=products.int8,
        kind=kind_of(tensors),
        has_experts=bool(config.n_experts),
    )


def kind_of(tensors: dict[str, Tensor]) -> str:
    """The type that most elements of the layers' matrices have."""
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.startswith("layers.") and tensor.is_matrix:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.n_elements
    return max(counts, key=lambda dtype: counts[dtype])
