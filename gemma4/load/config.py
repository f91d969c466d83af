# SPDX-License-Identifier: Apache-2.0
"""config.json of a Hugging Face Gemma 2, 3 or 4 checkpoint -> `TextConfig` -> the engine's `Config`.

The reference is transformers' `Gemma4TextConfig` / `Gemma4UnifiedTextConfig` (models/gemma4/configuration_gemma4.py)
and those of earlier models, whose class defaults fill absent keys, and `modeling_rope_utils.py` for the RoPE
frequencies. Every value is checked: the file may be hostile, and the engine sizes its memory from these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.errors import FormatError
from gemma4.load.fields import Fields
from gemma4.narrow import is_dict, is_list

if TYPE_CHECKING:
    from gemma4._engine import Config, LayerConfig

SLIDING, FULL = "sliding_attention", "full_attention"
WHOLE_STRETCH = 1 << 30  # a layer's `ahead` without limit: to the end of a bidirectional stretch

# Where Gemma4UnifiedTextConfig's defaults differ. It has no per-layer embeddings and no experts at all.
_TEXT_DEFAULTS: dict[str, Any] = {"context": 131_072, "window": 512, "bidirectional": None, "d_ple": 256}
_UNIFIED_DEFAULTS: dict[str, Any] = {"context": 262_144, "window": 1024, "bidirectional": "vision", "d_ple": 0}

_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}

# Ceilings some 8 to 60 times above the largest released model: far enough to never be in the way, low enough that no
# product of two of them overflows 63 bits and no config can request an absurd allocation.
MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 1 << 17, 1024, 1024, 4096
MAX_MLP, MAX_VOCAB, MAX_CONTEXT, MAX_EXPERTS = 1 << 20, 1 << 24, 1 << 24, 4096
MAX_EPS = 0.5  # of a norm; the engine takes what is below 1 in float32

_SCALE_DTYPES: dict[str, Any] = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}  # all others: float32


@dataclass(frozen=True)
class _Family:
    """Models before Gemma 4: constants of their classes, and the defaults of absent keys."""

    period: int  # one layer in every `period` is global
    d_vocab: int
    context: int
    logit_softcap: float | None
    attention_softcap: float | None  # None: the class has no such key, or ignores it
    head_norms: bool  # norms of queries and keys
    post_norms: bool
    rope_by_type: bool  # each layer type has its own rope


_GEMMA2 = _Family(2, 256_000, 8192, 30.0, 50.0, head_norms=False, post_norms=True, rope_by_type=False)
_GEMMA3 = _Family(6, 262_208, 131_072, None, None, head_norms=True, post_norms=True, rope_by_type=True)
EARLIER = {
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "vaultgemma": replace(_GEMMA2, post_norms=False),
}
SUPPORTED = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", *EARLIER)
_NESTED = ("gemma4", "gemma4_unified", "gemma3")  # the text model's config lies in "text_config"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: `rope_type` "default", "linear" or "proportional", `theta` the base
    wavelength, `partial` the share of pairs that rotate (proportional only), `factor` the divisor of frequencies
    by."""

    rope_type: str
    theta: float
    partial: float = 1.0
    factor: float = 1.0

    def inv_freq(self, head_dim: int) -> NDArray[np.float32]:
        """Angular frequencies, float32 [head_dim / 2], radians per position; 0 where a pair does not rotate.

        "proportional" spaces the rotating pairs as if all of `head_dim` rotated.
        Ref: transformers modeling_rope_utils `_compute_proportional_rope_parameters`.
        """
        half = head_dim // 2
        n = int(self.partial * head_dim // 2) if self.rope_type == "proportional" else half
        exponent = np.arange(0, 2 * n, 2, dtype=np.float32) / np.float32(head_dim)
        # base ** x is the one inexact step. In float64 it rounds to the nearest float32, which is what a good float32
        # pow gives; NumPy's own float32 pow differs between machines.
        power = np.power(np.float64(np.float32(self.theta)), exponent.astype(np.float64)).astype(np.float32)
        out = np.zeros(half, np.float32)
        out[:n] = np.float32(1.0) / power
        return out if self.rope_type == "default" else out / np.float32(self.factor)


@dataclass(frozen=True)
class TextConfig:
    """The text decoder of a checkpoint, one entry per layer where layers differ. All sizes are checked."""

    model_type: str
    d_model: int
    n_heads: int
    d_vocab: int
    d_ple: int  # 0: no per-layer embeddings
    d_vocab_ple: int
    rms_norm_eps: float
    logit_softcap: float  # 0: none
    context_length: int
    n_experts: int  # 0: no experts in any layer
    top_k_experts: int
    d_expert: int
    tied: bool  # the head is embed_tokens.weight
    sliding_window: int
    layer_types: tuple[str, ...]  # "sliding_attention" | "full_attention"
    head_dim: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    d_mlp: tuple[int, ...]
    kv_source: tuple[int, ...]  # the layer whose keys and values are read
    k_eq_v: tuple[bool, ...]
    rope: Mapping[str, Rope]  # by layer type
    bidirectional: str | None  # None | "vision": image positions see each other in sliding layers
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    bidirectional_global: bool = False  # … and, if so, in global layers
    attention_scale: float = 1.0  # factor of query-key dot products
    attention_softcap: float = 0.0  # softcap of the scaled scores; 0: none
    head_norms: tuple[str, ...] = ("q", "k", "v")  # which of them have a norm
    post_norms: bool = True  # whether outputs of attention and MLP pass a norm before the residual add
    layer_scalar: bool = True
    unit_gains: bool = False  # norms are stored as w and multiply by 1 + w

    @property
    def n_layers(self) -> int:
        return len(self.layer_types)

    @property
    def first_shared_layer(self) -> int:
        """Index of the first layer that reads another layer's keys and values; `n_layers` if none does."""
        return next((i for i, source in enumerate(self.kv_source) if source != i), self.n_layers)

    def table_scale(self, width: int, dtype: str) -> float:
        """sqrt(width), rounded to the embedding table's dtype as in the reference.

        A quantised table unpacks to float32, and llama.cpp multiplies it by a float32 square root.
        """
        return float(_SCALE_DTYPES.get(dtype, np.float32)(np.float32(math.sqrt(width))))

    def engine(self, embed_dtype: str = "F32", ple_dtype: str | None = None) -> Config:
        """The engine's config (gemma4/_engine.pyi). `embed_dtype` and `ple_dtype` are the stored dtypes of
        embed_tokens.weight and embed_tokens_per_layer.weight (None: the same)."""
        types = sorted(set(self.layer_types))
        return {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "d_vocab": self.d_vocab,
            "d_ple": self.d_ple,
            "d_vocab_ple": self.d_vocab_ple,
            "rms_norm_eps": self.rms_norm_eps,
            "logit_softcap": self.logit_softcap,
            "embed_scale": self.table_scale(self.d_model, embed_dtype),
            "ple_scale": self.table_scale(self.d_ple, ple_dtype or embed_dtype),
            "pad_token": self.pad_token_id or 0,
            "ple_on_disk": False,
            "attention_scale": self.attention_scale,
            "attention_softcap": self.attention_softcap,
            "q_norm": "q" in self.head_norms,
            "k_norm": "k" in self.head_norms,
            "v_norm": "v" in self.head_norms,
            "post_norms": self.post_norms,
            "layer_scalar": self.layer_scalar,
            "unit_gains": self.unit_gains,
            "tied": self.tied,
            "context_length": self.context_length,
            "n_experts": self.n_experts,
            "top_k_experts": self.top_k_experts,
            "d_expert": self.d_expert,
            "rope_inv_freq": [self.rope[t].inv_freq(self.head_dim[self.layer_types.index(t)]) for t in types],
            "layers": [self._layer(i, types.index(t)) for i, t in enumerate(self.layer_types)],
        }

    def _layer(self, i: int, rope: int) -> LayerConfig:
        sliding = self.layer_types[i] == SLIDING
        both_ways = self.bidirectional == "vision" and (sliding or self.bidirectional_global)
        return {
            "window": self.sliding_window if sliding else 0,
            "ahead": WHOLE_STRETCH if both_ways else 0,
            "head_dim": self.head_dim[i],
            "n_kv_heads": self.n_kv_heads[i],
            "d_mlp": self.d_mlp[i],
            "kv_source": self.kv_source[i],
            "k_eq_v": self.k_eq_v[i],
            "moe": self.n_experts > 0,
            "rope": rope,
        }


def parse_config(raw: Any) -> TextConfig:
    """The text decoder of a parsed config.json.

    Raises FormatError (a value is missing, of the wrong type or out of range: the message names it and its range) and
    NotImplementedError (an architecture or option that this engine lacks: the message names it).
    """
    if not is_dict(raw):
        raise FormatError(f"config.json: expected a JSON object, found {type(raw).__name__}")
    model_type = _model_type(raw)
    text = raw
    if model_type in _NESTED:
        text = raw.get("text_config")
        if not is_dict(text):
            raise FormatError(
                f'config.json: model_type "{model_type}" needs an object "text_config", found {checks.shown(text)}'
            )
        inner = text.get("model_type", f"{model_type}_text")
        if inner not in (model_type, f"{model_type}_text"):
            Fields(text, "config.json: text_config").fail("model_type", inner, f'"{model_type}_text"')
    parse = _earlier_config if model_type in EARLIER else _text_config
    return parse(model_type, Fields(text, "config.json"), Fields(raw, "config.json"))


def _model_type(raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in SUPPORTED:
        return model_type
    named = model_type if isinstance(model_type, str) else raw.get("architectures")
    if named is None:
        raise FormatError('config.json names no architecture: "model_type" is missing')
    raise NotImplementedError(
        f"unsupported architecture {checks.shown(named)}: supported model_type: {', '.join(SUPPORTED)}"
    )


def _text_config(model_type: str, f: Fields, outer: Fields) -> TextConfig:
    unified = model_type.startswith("gemma4_unified")
    defaults = _UNIFIED_DEFAULTS if unified else _TEXT_DEFAULTS
    _refuse_options(f, defaults)
    n_layers = f.integer("num_hidden_layers", 30, 1, MAX_LAYERS)
    n_heads = f.integer("num_attention_heads", 8, 1, MAX_HEADS)
    types = (*_layer_types(f, n_layers, 6)[:-1], FULL)  # the reference class forces the last layer to be global
    head_dim, n_kv_heads = _attention_shapes(f, types, n_heads)
    sources = kv_sources(f, "num_kv_shared_layers", types)
    softcap = f.optional_number("final_logit_softcapping", None, 1e-6, 1e6)
    n_experts, top_k, d_expert = (0, 0, 0) if unified else _experts(f)
    d_ple = 0 if unified else f.integer("hidden_size_per_layer_input", defaults["d_ple"], 0, MAX_WIDTH)
    d_vocab = f.integer("vocab_size", 262_144, 1, MAX_VOCAB)
    return TextConfig(
        model_type=model_type,
        d_model=f.integer("hidden_size", 2304, 1, MAX_WIDTH),
        n_heads=n_heads,
        d_vocab=d_vocab,
        d_ple=d_ple,
        d_vocab_ple=f.integer("vocab_size_per_layer_input", 262_144, 1, MAX_VOCAB) if d_ple else 0,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 1e-12, MAX_EPS),
        logit_softcap=0.0 if softcap is None else softcap,
        context_length=f.integer("max_position_embeddings", defaults["context"], 1, MAX_CONTEXT),
        n_experts=n_experts,
        top_k_experts=top_k,
        d_expert=d_expert,
        # The class that owns the head decides: the outer config where there is one.
        tied=outer.boolean("tie_word_embeddings", f.boolean("tie_word_embeddings", True)),
        sliding_window=f.integer("sliding_window", defaults["window"], 1, MAX_CONTEXT),
        layer_types=types,
        head_dim=head_dim,
        n_kv_heads=n_kv_heads,
        d_mlp=_mlp_widths(f, sources),
        kv_source=sources,
        k_eq_v=_k_eq_v(f, types),
        rope=_ropes(f, types),
        bidirectional=f.get("use_bidirectional_attention", defaults["bidirectional"]),
        bos_token_id=f.token_id("bos_token_id", 2, MAX_VOCAB),
        eos_token_ids=outer.token_ids("eos_token_id", f.token_ids("eos_token_id", (1,), MAX_VOCAB), MAX_VOCAB),
        pad_token_id=f.token_id("pad_token_id", 0, MAX_VOCAB),
    )


def _earlier_config(model_type: str, f: Fields, outer: Fields) -> TextConfig:
    """Gemma 2, 3 and VaultGemma. Ref: transformers models/gemma2, gemma3, vaultgemma."""
    family = EARLIER[model_type]
    _refuse_blocks(f)
    if f.get("use_bidirectional_attention", None) not in (None, False):
        raise NotImplementedError(
            "use_bidirectional_attention: embedding models (EmbeddingGemma) are not supported yet"
        )
    types = _layer_types(f, f.integer("num_hidden_layers", 26, 1, MAX_LAYERS), _period(f, family))
    n_heads = f.integer("num_attention_heads", 8, 1, MAX_HEADS)
    shape = {
        "head_dim": f.integer("head_dim", 256, 2, MAX_HEAD_DIM),
        "num_key_value_heads": f.integer("num_key_value_heads", 4, 1, MAX_HEADS),
    }
    head_dim, n_kv_heads = _checked_shapes(f, [shape] * len(types), n_heads)
    logit_softcap = f.optional_number("final_logit_softcapping", family.logit_softcap, 1e-6, 1e6)
    softcap = f.optional_number("attn_logit_softcapping", family.attention_softcap, 1e-6, 1e6)
    return TextConfig(
        model_type=model_type,
        d_model=f.integer("hidden_size", 2304, 1, MAX_WIDTH),
        n_heads=n_heads,
        d_vocab=f.integer("vocab_size", family.d_vocab, 1, MAX_VOCAB),
        d_ple=0,
        d_vocab_ple=0,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 1e-12, MAX_EPS),
        # Gemma3ForConditionalGeneration never applies it
        logit_softcap=0.0 if model_type == "gemma3" else logit_softcap or 0.0,
        context_length=f.integer("max_position_embeddings", family.context, 1, MAX_CONTEXT),
        n_experts=0,
        top_k_experts=0,
        d_expert=0,
        tied=outer.boolean("tie_word_embeddings", f.boolean("tie_word_embeddings", True)),
        sliding_window=f.integer("sliding_window", 4096, 1, MAX_CONTEXT) if SLIDING in types else 0,
        layer_types=types,
        head_dim=head_dim,
        n_kv_heads=n_kv_heads,
        d_mlp=(f.integer("intermediate_size", 9216, 1, MAX_MLP),) * len(types),
        kv_source=tuple(range(len(types))),
        k_eq_v=(False,) * len(types),
        rope=_ropes_by_type(f, types) if family.rope_by_type else _one_rope(f, types),
        bidirectional="vision" if outer.get("vision_config", None) is not None else None,
        bos_token_id=f.token_id("bos_token_id", 2, MAX_VOCAB),
        eos_token_ids=outer.token_ids("eos_token_id", f.token_ids("eos_token_id", (1,), MAX_VOCAB), MAX_VOCAB),
        pad_token_id=f.token_id("pad_token_id", 0, MAX_VOCAB),
        bidirectional_global=True,
        attention_scale=f.number("query_pre_attn_scalar", 256, 1e-6, 1e6) ** -0.5,
        attention_softcap=0.0 if family.attention_softcap is None else softcap or 0.0,
        head_norms=("q", "k") if family.head_norms else (),
        post_norms=family.post_norms,
        layer_scalar=False,
        unit_gains=True,
    )


def _period(f: Fields, family: _Family) -> int:
    """Older configs have this key instead of layer_types."""
    if not family.rope_by_type:
        return family.period
    inner = f.integer("_sliding_window_pattern", family.period, 1, MAX_LAYERS)
    return f.integer("sliding_window_pattern", inner, 1, MAX_LAYERS)


def _refuse_blocks(f: Fields) -> None:
    """Refuse options of a block that the reference classes have and this engine lacks."""
    if f.boolean("attention_bias", False):
        raise NotImplementedError("attention_bias = true: no Gemma release has biases in attention, nor this engine")
    activation = f.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise NotImplementedError(
            f'hidden_activation {checks.shown(activation)}: only "gelu_pytorch_tanh" is supported'
        )


def _refuse_options(f: Fields, defaults: Mapping[str, Any]) -> None:
    _refuse_blocks(f)
    bidirectional = f.get("use_bidirectional_attention", defaults["bidirectional"])
    if bidirectional == "all":
        raise NotImplementedError('use_bidirectional_attention "all" (an encoder) is not supported yet')
    if bidirectional not in (None, "vision"):
        f.fail("use_bidirectional_attention", bidirectional, 'null, "vision" or "all"')


def _layer_types(f: Fields, n_layers: int, period: int) -> tuple[str, ...]:
    types = f.get("layer_types", None)
    if types is None:
        types = [SLIDING if (i + 1) % period else FULL for i in range(n_layers)]
    if not is_list(types) or len(types) != n_layers:
        found = f"{len(types)} entries" if is_list(types) else types
        f.fail("layer_types", found, f"a list of num_hidden_layers = {n_layers} entries")
    for i, kind in enumerate(types):
        if kind not in (SLIDING, FULL):
            f.fail(f"layer_types[{i}]", kind, f'"{SLIDING}" or "{FULL}"')
    return tuple(types)


def _attention_shapes(f: Fields, types: tuple[str, ...], n_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Per layer: head size and number of key/value heads, from either spelling of the global layers' overrides."""
    base = {
        "head_dim": f.integer("head_dim", 256, 2, MAX_HEAD_DIM),
        "num_key_value_heads": f.integer("num_key_value_heads", 4, 1, MAX_HEADS),
    }
    overrides = _per_layer_overrides(f, types) if "per_layer_config" in f else _global_overrides(f, types)
    layers = [base | overrides.get(i, {}) for i in range(len(types))]
    for kind in set(types):
        shapes = {tuple(layer.values()) for layer, t in zip(layers, types, strict=True) if t == kind}
        if len(shapes) > 1:
            found = f"different for layers of the type {kind}: {sorted(shapes)}"
            f.fail("per_layer_config", found, "one shape per layer type")
    return _checked_shapes(f, layers, n_heads)


def _checked_shapes(f: Fields, layers: list[dict[str, int]], n_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for i, layer in enumerate(layers):
        if layer["head_dim"] % 2:
            f.fail(f"head_dim of layer {i}", layer["head_dim"], "an even number (RoPE rotates pairs)")
        if n_heads % layer["num_key_value_heads"]:
            f.fail(f"num_key_value_heads of layer {i}", layer["num_key_value_heads"], f"a divisor of {n_heads} heads")
    return tuple(x["head_dim"] for x in layers), tuple(x["num_key_value_heads"] for x in layers)


def _global_overrides(f: Fields, types: tuple[str, ...]) -> dict[int, dict[str, int]]:
    """The released spelling: global_head_dim and, if K = V, num_global_key_value_heads."""
    override = {"head_dim": f.integer("global_head_dim", 512, 2, MAX_HEAD_DIM)}
    kv_heads = f.optional_integer("num_global_key_value_heads", None, 1, MAX_HEADS)
    if kv_heads is not None and f.boolean("attention_k_eq_v", False):
        override["num_key_value_heads"] = kv_heads
    return {i: override for i, kind in enumerate(types) if kind == FULL}


def _per_layer_overrides(f: Fields, types: tuple[str, ...]) -> dict[int, dict[str, int]]:
    """transformers' newer spelling: {"05": {"head_dim": 512}}, layer indices as zero-padded strings."""
    table = f.get("per_layer_config", None)
    if table is None:
        return {}
    if not is_dict(table):
        f.fail("per_layer_config", table, "an object keyed by layer index")
    out: dict[int, dict[str, int]] = {}
    for key, override in table.items():
        where = f"per_layer_config[{key!r:.40}]"
        index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 8 else -1
        if not 0 <= index < len(types) or index in out:
            f.fail(where, key, f"each layer index in 0..{len(types) - 1} once")
        if not is_dict(override):
            f.fail(where, override, "an object")
        out[index] = _one_override(f, where, override)
    return out


def _one_override(f: Fields, where: str, override: dict[str, Any]) -> dict[str, int]:
    limits = {"head_dim": MAX_HEAD_DIM, "num_key_value_heads": MAX_HEADS}
    fields = Fields(override, f"config.json: {where}")
    for name, value in override.items():
        same = name in f and type(f.get(name, None)) is type(value) and f.get(name, None) == value
        if name not in limits and not same and not (name == "skip" and value == []):
            raise NotImplementedError(f"{where} overrides {name!r:.80}; only {', '.join(limits)} may differ by layer")
    return {name: fields.integer(name, None, 1, limit) for name, limit in limits.items() if name in fields}


def kv_sources(f: Fields, name: str, types: tuple[str, ...]) -> tuple[int, ...]:
    """The last f[name] layers (default 0) read the keys and values of the last earlier layer of their type."""
    n = len(types)
    first_shared = n - f.integer(name, 0, 0, n)
    donors = {kind: i for i, kind in enumerate(types[:first_shared])}
    for kind in sorted(set(types[first_shared:]) - set(donors)):
        f.fail(name, n - first_shared, f"few enough that a {kind} layer remains to share from")
    return tuple(i if i < first_shared else donors[kind] for i, kind in enumerate(types))


def _mlp_widths(f: Fields, sources: tuple[int, ...]) -> tuple[int, ...]:
    width = f.integer("intermediate_size", 9216, 1, MAX_MLP)
    wide = 2 if f.boolean("use_double_wide_mlp", False) else 1  # only layers that share keys and values are double-wide
    return tuple(width * (wide if source != i else 1) for i, source in enumerate(sources))


def _k_eq_v(f: Fields, types: tuple[str, ...]) -> tuple[bool, ...]:
    tied = f.boolean("attention_k_eq_v", False)
    return tuple(tied and kind == FULL for kind in types)


def _experts(f: Fields) -> tuple[int, int, int]:
    if not f.boolean("enable_moe_block", False):
        return 0, 0, 0
    n = f.integer("num_experts", None, 1, MAX_EXPERTS)
    return n, f.integer("top_k_experts", None, 1, n), f.integer("moe_intermediate_size", None, 1, MAX_MLP)


def _ropes(f: Fields, types: tuple[str, ...]) -> dict[str, Rope]:
    table = f.get("rope_parameters", None)
    if table is None:
        table = _ROPE_DEFAULTS
    if not is_dict(table):
        f.fail("rope_parameters", table, "an object with one entry per layer type")
    theta = f.number("rope_theta", None, 1.0, 1e12) if "rope_theta" in f else None
    return {kind: _rope(f"rope_parameters.{kind}", f, table.get(kind), theta) for kind in sorted(set(types))}


def _ropes_by_type(f: Fields, types: tuple[str, ...]) -> dict[str, Rope]:
    """Gemma 3, in the new dialect (rope_parameters) or the old one, whose rope_scaling is of global layers alone.

    Ref: transformers Gemma3TextConfig.convert_rope_params_to_dict.
    """
    table: Any = f.get("rope_parameters", None)
    scaling: Any = f.get("rope_scaling", None)
    if is_dict(scaling) and set(scaling) & {SLIDING, FULL}:  # the new table under the old name, or under both
        if table not in (None, scaling):
            f.fail("rope_scaling", scaling, "the same as rope_parameters, or the scaling of global layers alone")
        table, scaling = scaling, None
    if table is None:
        table = dict[str, Any]()
    if not is_dict(table) or not set(table) <= {SLIDING, FULL}:
        f.fail("rope_parameters", table, "an object with one entry per layer type")
    thetas = {
        SLIDING: f.number("rope_local_base_freq", 10_000.0, 1.0, 1e12),
        FULL: f.number("rope_theta", 1_000_000.0, 1.0, 1e12),
    }
    out: dict[str, Rope] = {}
    for kind in sorted(set(types)):
        raw: Any = table.get(kind)
        if raw is None:
            raw = dict[str, Any]()
        if kind == FULL and scaling is not None and is_dict(raw):
            raw = raw | scaling if is_dict(scaling) else scaling
        out[kind] = _rope(f"rope_parameters.{kind}", f, raw, thetas[kind])
    return out


def _one_rope(f: Fields, types: tuple[str, ...]) -> dict[str, Rope]:
    """Gemma 2: rope_parameters (new) or rope_theta and rope_scaling (old), the same for all layers."""
    raw = f.get("rope_parameters", None)
    if raw is None:
        raw = f.get("rope_scaling", None)
    if is_dict(raw) and set(raw) & {SLIDING, FULL}:
        f.fail("rope_parameters", raw, "one object for all layers")
    rope = _rope("rope_parameters", f, {} if raw is None else raw, f.number("rope_theta", 10_000.0, 1.0, 1e12))
    return dict.fromkeys(sorted(set(types)), rope)


def _rope(where: str, f: Fields, raw: Any, default_theta: float | None) -> Rope:
    if not is_dict(raw):
        f.fail(where, raw, 'an object such as {"rope_type": "default", "rope_theta": 10000.0}')
    r = Fields(raw, f"config.json: {where}")
    rope_type = r.get("rope_type", r.get("type", "default"))
    theta = r.number("rope_theta", default_theta, 1.0, 1e12)
    if rope_type == "default":
        return Rope("default", theta)
    if rope_type == "linear" and r.number("partial_rotary_factor", 1.0, 0.0, 1.0) == 1:
        return Rope("linear", theta, factor=r.number("factor", None, 1e-6, 1e6))
    if rope_type != "proportional":
        raise NotImplementedError(
            f'rope_type {checks.shown(rope_type)} in {where}: only "default", "linear" and "proportional"'
        )
    partial = r.number("partial_rotary_factor", 1.0, 0.0, 1.0)
    return Rope("proportional", theta, partial, r.number("factor", 1.0, 1e-6, 1e6))
