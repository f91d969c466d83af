# SPDX-License-Identifier: Apache-2.0
"""Metadata and tensor names of a Gemma 4 GGUF file -> `TextConfig` and the engine's tensor names.

Ref: llama.cpp src/models/gemma4.cpp (what is read, what may be absent) and conversion/gemma.py (how it is written).
The converter changes no value of the text model: norms are stored as they are, nothing is folded in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.config import (
    FULL,
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_MLP,
    MAX_VOCAB,
    MAX_WIDTH,
    SLIDING,
    Rope,
    TextConfig,
    kv_sources,
)
from gemma4.load.fields import Fields
from gemma4.load.mapped import TensorInfo
from gemma4.load.names import PLE_TABLE, text_tensors
from gemma4.narrow import is_list

ARCHITECTURE = "gemma4"
ROPE_FREQS = "rope_freqs.weight"
_STILL = 1e20  # a pair whose frequency is divided by this or more does not rotate; files have 1e30

_MODEL_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    PLE_TABLE: "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.gate_proj": "ffn_gate_exps.weight",
    "experts.up_proj": "ffn_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
}


def stored_name(name: str) -> str:
    """The GGUF name of an engine tensor: "layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight"."""
    if not name.startswith("layers."):
        return _MODEL_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def wanted_tensors(config: TextConfig, stored: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Engine name and shape of every tensor the text decoder reads, experts' gate and up separate if the file has them
    so. Layer scalars may be absent: the engine's name is then omitted (they are 1)."""
    for name, shape in text_tensors(config).items():
        if name.endswith(".layer_scalar") and stored_name(name) not in stored:
            continue
        apart = name.replace("gate_up_proj", "gate_proj")
        if name.endswith(".gate_up_proj") and stored_name(name) not in stored and stored_name(apart) in stored:
            half = (shape[0], shape[1] // 2, shape[2])
            yield apart, half
            yield name.replace("gate_up_proj", "up_proj"), half
        else:
            yield name, shape


def parse_metadata(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    rope_freqs: NDArray[Any] | None,
    eos_token_ids: Sequence[int],
    where: str,
) -> TextConfig:
    """The text decoder of a GGUF file. `metadata` in plain types, `rope_freqs` the tensor of that name.

    Raises FormatError (a key or tensor is missing or out of range), NotImplementedError (another architecture, or an
    option that this engine lacks).
    """
    _check_architecture(metadata, where)
    f = _Keys(dict(metadata), where)
    n_layers = f.integer("gemma4.block_count", None, 1, MAX_LAYERS)
    types = _layer_types(f, n_layers)
    n_heads = _one_for_all(f, "gemma4.attention.head_count", n_layers, MAX_HEADS)
    head_dim = _head_dims(f, types)
    d_model = f.integer("gemma4.embedding_length", None, 1, MAX_WIDTH)
    sources = kv_sources(f, "gemma4.attention.shared_kv_layers", types)
    n_experts, top_k, d_expert = _experts(f, n_layers)
    d_ple = f.integer("gemma4.embedding_length_per_layer_input", 0, 0, MAX_WIDTH)
    return TextConfig(
        model_type="gemma4_text",
        d_model=d_model,
        n_heads=n_heads,
        d_vocab=_rows(tensors, "token_embd.weight", where),
        d_ple=d_ple,
        d_vocab_ple=_rows(tensors, "per_layer_token_embd.weight", where) if d_ple else 0,
        rms_norm_eps=f.number("gemma4.attention.layer_norm_rms_epsilon", None, 1e-12, 1.0),
        logit_softcap=_softcap(f),
        context_length=f.integer("gemma4.context_length", None, 1, MAX_CONTEXT),
        n_experts=n_experts,
        top_k_experts=top_k,
        d_expert=d_expert,
        tied="output.weight" not in tensors,
        sliding_window=f.integer("gemma4.attention.sliding_window", None, 1, MAX_CONTEXT),
        layer_types=types,
        head_dim=head_dim,
        n_kv_heads=_kv_heads(f, n_layers, n_heads),
        d_mlp=f.per_layer("gemma4.feed_forward_length", n_layers, MAX_MLP),
        kv_source=sources,
        k_eq_v=tuple(f"blk.{source}.attn_v.weight" not in tensors for source in sources),
        rope=_ropes(f, types, head_dim, rope_freqs),
        # Not in the metadata; llama.cpp infers it from the size, and per-layer embeddings indicate the size.
        bidirectional=None if d_ple else "vision",
        bos_token_id=f.token_id("tokenizer.ggml.bos_token_id", None, MAX_VOCAB),
        eos_token_ids=tuple(eos_token_ids),
        pad_token_id=f.token_id("tokenizer.ggml.padding_token_id", None, MAX_VOCAB),
    )


class _Keys(Fields):
    def per_layer(self, name: str, n_layers: int, high: int) -> tuple[int, ...]:
        """A number for all layers, or an array with one for each."""
        value = self.get(name, None)
        if not is_list(value):
            return (self.integer(name, None, 1, high),) * n_layers
        if len(value) != n_layers:
            self.fail(name, f"an array of {len(value)}", f"one entry for each of {n_layers} layers")
        return tuple(
            _Keys({f"{name}[{i}]": x}, self.where).integer(f"{name}[{i}]", None, 1, high) for i, x in enumerate(value)
        )


# general.type of files that are not models -> their content, and advice
_NO_MODELS = {
    "adapter": "a LoRA adapter, no model: merge it into its model and convert that",
    "imatrix": "an importance matrix, which guides a quantisation; it is no model",
}


def _check_architecture(metadata: Mapping[str, Any], where: str) -> None:
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if isinstance(kind, str) and kind in _NO_MODELS:
        raise NotImplementedError(f"{where} is {_NO_MODELS[kind]}")
    if name == ARCHITECTURE:
        return
    if not isinstance(name, str):
        raise FormatError(f"{where}: general.architecture is {name!r:.60}, expected a name such as {ARCHITECTURE}")
    advice = ": image and audio encoders; load the text model, and these with mmproj=" if name == "clip" else ""
    raise NotImplementedError(
        f"{where}: unsupported architecture {name!r:.80}{advice}; supported: {ARCHITECTURE} (text)"
    )


def _layer_types(f: _Keys, n_layers: int) -> tuple[str, ...]:
    name = "gemma4.attention.sliding_window_pattern"
    pattern = f.get(name, None)
    if isinstance(pattern, int) and not isinstance(pattern, bool):  # every n-th layer is global
        period = f.integer(name, None, 1, MAX_LAYERS)
        pattern = [bool((i + 1) % period) for i in range(n_layers)]
    if not is_list(pattern) or len(pattern) != n_layers or not all(x in (0, 1) for x in pattern):
        found = f"{len(pattern)} entries" if is_list(pattern) else pattern
        f.fail(name, found, f"true (sliding) or false (global) for each of {n_layers} layers")
    return tuple(SLIDING if sliding else FULL for sliding in pattern)


def _one_for_all(f: _Keys, name: str, n_layers: int, high: int) -> int:
    values = f.per_layer(name, n_layers, high)
    if len(set(values)) > 1:
        raise NotImplementedError(f"{name} differs between layers: {sorted(set(values))}")
    return values[0]


def _head_dims(f: _Keys, types: tuple[str, ...]) -> tuple[int, ...]:
    by_type: dict[str, int] = {}
    for kind, suffix in ((FULL, ""), (SLIDING, "_swa")):
        key = f"gemma4.attention.key_length{suffix}"
        if kind not in types:
            continue
        by_type[kind] = size = f.integer(key, None, 2, MAX_HEAD_DIM)
        if size % 2:
            f.fail(key, size, "an even number (RoPE rotates pairs)")
        for other in (f"gemma4.attention.value_length{suffix}", f"gemma4.rope.dimension_count{suffix}"):
            if f.get(other, size) != size:
                raise NotImplementedError(f"{other} is {f.get(other, None)!r:.60}, but {key} is {size}: only the same")
    return tuple(by_type[kind] for kind in types)


def _kv_heads(f: _Keys, n_layers: int, n_heads: int) -> tuple[int, ...]:
    name = "gemma4.attention.head_count_kv"
    heads = f.per_layer(name, n_layers, MAX_HEADS)
    for i, n in enumerate(heads):
        if n_heads % n:
            f.fail(f"{name} of layer {i}", n, f"a divisor of {n_heads} heads")
    return heads


def _softcap(f: _Keys) -> float:
    value = f.optional_number("gemma4.final_logit_softcapping", None, 0.0, 1e6)
    return value or 0.0


def _experts(f: _Keys, n_layers: int) -> tuple[int, int, int]:
    n = f.integer("gemma4.expert_count", 0, 0, MAX_EXPERTS)
    if not n:
        return 0, 0, 0
    width = _one_for_all(f, "gemma4.expert_feed_forward_length", n_layers, MAX_MLP)
    return n, f.integer("gemma4.expert_used_count", None, 1, n), width


def _rows(tensors: Mapping[str, TensorInfo], name: str, where: str) -> int:
    if name not in tensors:
        raise FormatError(f"{where} holds no Gemma 4 text decoder: there is no tensor {name}")
    rows = tensors[name].shape[0]
    if rows > MAX_VOCAB:
        raise FormatError(f"{where}: {name} has {rows} rows, the limit is {MAX_VOCAB}")
    return rows


def _ropes(
    f: _Keys, types: tuple[str, ...], head_dim: tuple[int, ...], rope_freqs: NDArray[Any] | None
) -> dict[str, Rope]:
    # As in llama.cpp: without a type the scaling is linear, the older key counts if the newer is absent, 0 is unset.
    scaling = f.get("gemma4.rope.scaling.type", "linear")
    factor = f.get("gemma4.rope.scaling.factor", f.get("gemma4.rope.scale_linear", 1))
    if scaling != "none" and not (scaling == "linear" and factor in (0, 1)):
        what = f"gemma4.rope.scaling.type {scaling!r:.60}, factor {factor!r:.40}"
        raise NotImplementedError(f"{what}: only unscaled positions are supported")
    out: dict[str, Rope] = {}
    if SLIDING in types:
        out[SLIDING] = Rope("default", f.number("gemma4.rope.freq_base_swa", 10_000.0, 1.0, 1e12))
    if FULL in types:
        theta = f.number("gemma4.rope.freq_base", 10_000.0, 1.0, 1e12)
        width = head_dim[types.index(FULL)]
        out[FULL] = Rope("proportional", theta, _rotating_share(f, rope_freqs, width))
    return out


def _rotating_share(f: _Keys, freqs: NDArray[Any] | None, head_dim: int) -> float:
    """Share of the global layers' pairs that rotate. freqs: divisors, 1 for those pairs, huge for the others."""
    half = head_dim // 2
    if freqs is None:
        f.fail(ROPE_FREQS, "missing", f"a tensor of {half} numbers, as the file has global layers")
    if freqs.shape != (half,) or freqs.dtype != np.float32:
        f.fail(
            ROPE_FREQS, f"{freqs.dtype} {list(freqs.shape)}", f"float32 [{half}], one for each pair of a global head"
        )
    turning = int(np.count_nonzero(freqs < _STILL))
    if not (np.all(freqs[:turning] == 1) and np.all(freqs[turning:] >= _STILL)):
        raise NotImplementedError(f"{ROPE_FREQS} holds factors other than 1 for the first pairs and 1e30 for the rest")
    share = 2 * turning / head_dim
    return share if int(share * head_dim // 2) == turning else math.nextafter(share, 1.0)  # 6 / 14 * 14 is below 6
