# SPDX-License-Identifier: Apache-2.0
"""Metadata and tensor names of a GGUF file of Gemma 2, 3 or 4 -> `TextConfig` and the engine's tensor names.

Ref: llama.cpp src/models/gemma{2,3,4}.cpp (what is read, what may be absent) and conversion/gemma.py (how it is
written). The norms of Gemma 2 and 3 are stored as the factor 1 + w; no other value of a text model is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.config import (
    EARLIER,
    FULL,
    MAX_CONTEXT,
    MAX_EPS,
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


class Earlier(NamedTuple):
    """An architecture before Gemma 4: what its files leave unsaid."""

    model_type: str  # of the reference class
    window: int  # where the file names none; 0: all layers are global
    n_layers_27b: int  # the model that scales scores by its width per head instead of its head size


EARLIER_ARCHITECTURES = {"gemma2": Earlier("gemma2", 4096, 46), "gemma3": Earlier("gemma3_text", 0, 62)}


def architecture_of(config: TextConfig) -> str | None:
    """The name that GGUF files have for a model's architecture; None if there is none (VaultGemma)."""
    if config.model_type not in EARLIER:
        return ARCHITECTURE
    family = EARLIER[config.model_type]
    return next((name for name, own in EARLIER_ARCHITECTURES.items() if EARLIER[own.model_type] == family), None)


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
    architecture = _architecture(metadata, where)
    f = _Keys(metadata, where, architecture)
    earlier = EARLIER_ARCHITECTURES.get(architecture)
    if earlier:
        _refuse_variants(f, tensors)
    config = _earlier(f, earlier, tensors) if earlier else _gemma4(f, tensors, rope_freqs)
    special = Fields(dict(metadata), where)
    return replace(
        config,
        bos_token_id=special.token_id("tokenizer.ggml.bos_token_id", None, MAX_VOCAB),
        eos_token_ids=tuple(eos_token_ids),
        pad_token_id=special.token_id("tokenizer.ggml.padding_token_id", None, MAX_VOCAB),
    )


def _gemma4(f: _Keys, tensors: Mapping[str, TensorInfo], rope_freqs: NDArray[Any] | None) -> TextConfig:
    n_layers = f.integer("block_count", None, 1, MAX_LAYERS)
    types = _layer_types(f, n_layers, None)
    n_heads = _one_for_all(f, "attention.head_count", n_layers, MAX_HEADS)
    head_dim = _head_dims(f, types)
    d_model = f.integer("embedding_length", None, 1, MAX_WIDTH)
    sources = kv_sources(f, "attention.shared_kv_layers", types)
    n_experts, top_k, d_expert = _experts(f, n_layers)
    d_ple = f.integer("embedding_length_per_layer_input", 0, 0, MAX_WIDTH)
    return TextConfig(
        model_type="gemma4_text",
        d_model=d_model,
        n_heads=n_heads,
        d_vocab=_rows(tensors, "token_embd.weight", f.where),
        d_ple=d_ple,
        d_vocab_ple=_rows(tensors, "per_layer_token_embd.weight", f.where) if d_ple else 0,
        rms_norm_eps=f.number("attention.layer_norm_rms_epsilon", None, 1e-12, MAX_EPS),
        logit_softcap=_softcap(f, "final_logit_softcapping", None),
        context_length=f.integer("context_length", None, 1, MAX_CONTEXT),
        n_experts=n_experts,
        top_k_experts=top_k,
        d_expert=d_expert,
        tied="output.weight" not in tensors,
        sliding_window=f.integer("attention.sliding_window", None, 1, MAX_CONTEXT),
        layer_types=types,
        head_dim=head_dim,
        n_kv_heads=_kv_heads(f, n_layers, n_heads),
        d_mlp=f.per_layer("feed_forward_length", n_layers, MAX_MLP),
        kv_source=sources,
        k_eq_v=tuple(f"blk.{source}.attn_v.weight" not in tensors for source in sources),
        rope=_ropes(f, types, head_dim, rope_freqs),
        # Not in the metadata; llama.cpp infers it from the size, and per-layer embeddings indicate the size.
        bidirectional=None if d_ple else "vision",
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )


def _earlier(f: _Keys, earlier: Earlier, tensors: Mapping[str, TensorInfo]) -> TextConfig:
    """Gemma 2 and 3. Keys that may be absent have llama.cpp's defaults."""
    family = EARLIER[earlier.model_type]
    n_layers = f.integer("block_count", None, 1, MAX_LAYERS)
    window = f.integer("attention.sliding_window", earlier.window, min(earlier.window, 1), MAX_CONTEXT)
    types = _layer_types(f, n_layers, family.period if window else 1)
    if SLIDING in types and not window:
        f.fail("attention.sliding_window", window, "the window's length, as the file has sliding layers")
    n_heads = _one_for_all(f, "attention.head_count", n_layers, MAX_HEADS)
    d_model = f.integer("embedding_length", None, 1, MAX_WIDTH)
    head_dim = _head_dim(f, "", also="_swa")
    softcap = _softcap(f, "attn_logit_softcapping", family.attention_softcap)
    return TextConfig(
        model_type=earlier.model_type,
        d_model=d_model,
        n_heads=n_heads,
        d_vocab=_rows(tensors, "token_embd.weight", f.where),
        d_ple=0,
        d_vocab_ple=0,
        rms_norm_eps=f.number("attention.layer_norm_rms_epsilon", None, 1e-12, MAX_EPS),
        logit_softcap=_softcap(f, "final_logit_softcapping", family.logit_softcap),
        context_length=f.integer("context_length", None, 1, MAX_CONTEXT),
        n_experts=0,
        top_k_experts=0,
        d_expert=0,
        tied="output.weight" not in tensors,
        sliding_window=window if SLIDING in types else 0,
        layer_types=types,
        head_dim=(head_dim,) * n_layers,
        n_kv_heads=_kv_heads(f, n_layers, n_heads),
        d_mlp=f.per_layer("feed_forward_length", n_layers, MAX_MLP),
        kv_source=tuple(range(n_layers)),
        k_eq_v=(False,) * n_layers,
        rope=_earlier_ropes(f, types, own_base=family.rope_by_type),
        bidirectional=None,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
        bidirectional_global=True,
        attention_scale=_score_scale(f, d_model // n_heads if n_layers == earlier.n_layers_27b else head_dim),
        attention_softcap=softcap if family.attention_softcap else 0.0,
        head_norms=("q", "k") if family.head_norms else (),
        layer_scalar=False,
    )


def _score_scale(f: _Keys, width: int) -> float:
    """No key says it: llama.cpp infers the width from the number of layers."""
    if not width:
        f.fail("embedding_length", "less than the number of heads", "a width of at least 1 per head")
    return float(width) ** -0.5


def _refuse_variants(f: _Keys, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a key or tensor that would change the result, and that this reader has no use for."""
    if f.get("attention.causal", True) is not True:
        raise NotImplementedError(f"{f.where}: {f.prefix}attention.causal is false: embedding models are not supported")
    odd = next((name for name in tensors if re.fullmatch(r"blk\..*\.bias", name) or name == ROPE_FREQS), None)
    if odd:
        raise NotImplementedError(f"{f.where}: it holds {odd!r:.80}, which no Gemma 2 or 3 has")


class _Keys(Fields):
    """The keys of one architecture, which are named here without it."""

    def __init__(self, metadata: Mapping[str, Any], where: str, architecture: str) -> None:
        self.prefix = f"{architecture}."
        own = {key: value for key, value in metadata.items() if key.startswith(self.prefix)}
        super().__init__({key.removeprefix(self.prefix): value for key, value in own.items()}, where)

    def fail(self, name: str, found: Any, expected: str) -> NoReturn:
        super().fail(self.prefix + name, found, expected)

    def per_layer(self, name: str, n_layers: int, high: int) -> tuple[int, ...]:
        """A number for all layers, or an array with one for each."""
        value = self.get(name, None)
        if not is_list(value):
            return (self.integer(name, None, 1, high),) * n_layers
        if len(value) != n_layers:
            self.fail(name, f"an array of {len(value)}", f"one entry for each of {n_layers} layers")
        entries = {f"{self.prefix}{name}[{i}]": x for i, x in enumerate(value)}
        return tuple(Fields(entries, self.where).integer(entry, None, 1, high) for entry in entries)


# general.type of files that are not models -> their content, and advice
_NO_MODELS = {
    "adapter": "a LoRA adapter, no model: merge it into its model and convert that",
    "imatrix": "an importance matrix, which guides a quantisation; it is no model",
}


def _architecture(metadata: Mapping[str, Any], where: str) -> str:
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    if isinstance(kind, str) and kind in _NO_MODELS:
        raise NotImplementedError(f"{where} is {_NO_MODELS[kind]}")
    known = (*EARLIER_ARCHITECTURES, ARCHITECTURE)
    if not isinstance(name, str):
        raise FormatError(f"{where}: general.architecture is {name!r:.60}, expected a name such as {ARCHITECTURE}")
    if name in known:
        return name
    advice = ": image and audio encoders; load the text model, and these with mmproj=" if name == "clip" else ""
    raise NotImplementedError(
        f"{where}: unsupported architecture {name!r:.80}{advice}; supported: {', '.join(known)} (text)"
    )


def _layer_types(f: _Keys, n_layers: int, period: int | None) -> tuple[str, ...]:
    """Every `period`-th layer is global if the file does not say; None: it must."""
    name = "attention.sliding_window_pattern"
    pattern = f.get(name, period)
    if isinstance(pattern, int) and not isinstance(pattern, bool):  # every n-th layer is global
        period = f.integer(name, period, 1, MAX_LAYERS)
        pattern = [bool((i + 1) % period) for i in range(n_layers)]
    if not is_list(pattern) or len(pattern) != n_layers or not all(x in (0, 1) for x in pattern):
        found = f"{len(pattern)} entries" if is_list(pattern) else pattern
        f.fail(name, found, f"true (sliding) or false (global) for each of {n_layers} layers")
    return tuple(SLIDING if sliding else FULL for sliding in pattern)


def _one_for_all(f: _Keys, name: str, n_layers: int, high: int) -> int:
    values = f.per_layer(name, n_layers, high)
    if len(set(values)) > 1:
        raise NotImplementedError(f"{f.prefix}{name} differs between layers: {sorted(set(values))}")
    return values[0]


def _head_dims(f: _Keys, types: tuple[str, ...]) -> tuple[int, ...]:
    suffixes = {FULL: "", SLIDING: "_swa"}
    by_type = {kind: _head_dim(f, suffix) for kind, suffix in suffixes.items() if kind in types}
    return tuple(by_type[kind] for kind in types)


def _head_dim(f: _Keys, suffix: str, also: str = "") -> int:
    """The head size of the keys that end so, and, if there are any, of those that end in `also`."""
    key = f"attention.key_length{suffix}"
    size = f.integer(key, None, 2, MAX_HEAD_DIM)
    if size % 2:
        f.fail(key, size, "an even number (RoPE rotates pairs)")
    for stem in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        for other in (stem + suffix, stem + suffix + also):
            if f.get(other, size) != size:
                found = f"{f.prefix}{other} is {f.get(other, None)!r:.60}"
                raise NotImplementedError(f"{found}, but {f.prefix}{key} is {size}: only the same")
    return size


def _kv_heads(f: _Keys, n_layers: int, n_heads: int) -> tuple[int, ...]:
    name = "attention.head_count_kv"
    heads = f.per_layer(name, n_layers, MAX_HEADS)
    for i, n in enumerate(heads):
        if n_heads % n:
            f.fail(f"{name} of layer {i}", n, f"a divisor of {n_heads} heads")
    return heads


def _softcap(f: _Keys, name: str, default: float | None) -> float:
    """0: none."""
    return f.optional_number(name, default, 0.0, 1e6) or 0.0


def _experts(f: _Keys, n_layers: int) -> tuple[int, int, int]:
    n = f.integer("expert_count", 0, 0, MAX_EXPERTS)
    if not n:
        return 0, 0, 0
    width = _one_for_all(f, "expert_feed_forward_length", n_layers, MAX_MLP)
    return n, f.integer("expert_used_count", None, 1, n), width


def _rows(tensors: Mapping[str, TensorInfo], name: str, where: str) -> int:
    if name not in tensors:
        raise FormatError(f"{where} holds no text decoder of Gemma: there is no tensor {name}")
    rows = tensors[name].shape[0]
    if rows > MAX_VOCAB:
        raise FormatError(f"{where}: {name} has {rows} rows, the limit is {MAX_VOCAB}")
    return rows


def _ropes(
    f: _Keys, types: tuple[str, ...], head_dim: tuple[int, ...], rope_freqs: NDArray[Any] | None
) -> dict[str, Rope]:
    factor = _linear_factor(f)
    if factor != 1:
        raise NotImplementedError(f"{f.prefix}rope.scaling.factor {factor}: only unscaled positions are supported")
    out: dict[str, Rope] = {}
    if SLIDING in types:
        out[SLIDING] = Rope("default", f.number("rope.freq_base_swa", 10_000.0, 1.0, 1e12))
    if FULL in types:
        theta = f.number("rope.freq_base", 10_000.0, 1.0, 1e12)
        width = head_dim[types.index(FULL)]
        out[FULL] = Rope("proportional", theta, _rotating_share(f, rope_freqs, width))
    return out


def _earlier_ropes(f: _Keys, types: tuple[str, ...], *, own_base: bool) -> dict[str, Rope]:
    """own_base: sliding layers have a base of their own, and unscaled positions; else those of the global layers."""
    factor = _linear_factor(f)
    theta = f.number("rope.freq_base", None if own_base else 10_000.0, 1.0, 1e12)
    rope = Rope("default", theta) if factor == 1 else Rope("linear", theta, factor=factor)
    name = "rope.freq_base_swa" if "rope.freq_base_swa" in f else "rope.local.freq_base"  # ollama's name
    local = f.number(name, 10_000.0 if own_base else theta, 1.0, 1e12)
    ropes = {FULL: rope, SLIDING: Rope("default", local) if own_base else replace(rope, theta=local)}
    return {kind: ropes[kind] for kind in sorted(set(types))}


def _linear_factor(f: _Keys) -> float:
    """Divisor of positions, 1 if there is none. As in llama.cpp: without a type the scaling is linear, the older key
    counts if the newer is absent, 0 is unset."""
    scaling = f.get("rope.scaling.type", "linear")
    name = "rope.scaling.factor" if "rope.scaling.factor" in f else "rope.scale_linear"
    if scaling not in ("none", "linear") or f.get("rope.scaling.attn_factor", 1) != 1:
        what = f"{f.prefix}rope.scaling.type {scaling!r:.60}, factor {f.get(name, 1)!r:.40}"
        raise NotImplementedError(f"{what}: only linear scaling of positions is supported, and none")
    return 1.0 if scaling == "none" or f.get(name, 0) == 0 else f.number(name, None, 1e-6, 1e6)


def _rotating_share(f: _Keys, freqs: NDArray[Any] | None, head_dim: int) -> float:
    """Share of the global layers' pairs that rotate. freqs: divisors, 1 for those pairs, huge for the others."""
    half = head_dim // 2
    if freqs is None or freqs.shape != (half,) or freqs.dtype != np.float32:
        found = "missing" if freqs is None else f"{freqs.dtype} {list(freqs.shape)}"
        wanted = f"float32 [{half}], one for each pair of a global layer's head"
        raise FormatError(f"{f.where}: the tensor {ROPE_FREQS} is {found}, expected {wanted}")
    turning = int(np.count_nonzero(freqs < _STILL))
    if not (np.all(freqs[:turning] == 1) and np.all(freqs[turning:] >= _STILL)):
        raise NotImplementedError(f"{ROPE_FREQS} holds factors other than 1 for the first pairs and 1e30 for the rest")
    share = 2 * turning / head_dim
    return share if int(share * head_dim // 2) == turning else math.nextafter(share, 1.0)  # 6 / 14 * 14 is below 6
