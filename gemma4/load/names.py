# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the tensors of a Hugging Face checkpoint: the text decoder, and the image and audio encoders.

Ref: transformers models/gemma4/modeling_gemma4.py (Gemma4TextModel and the modules it is made of).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from gemma4.errors import FormatError
from gemma4.load.config import TextConfig
from gemma4.load.encoder_config import EncoderConfig

Shape = tuple[int, ...]
PLE_TABLE = "embed_tokens_per_layer.weight"

# Where the text decoder sits -> where an untied head would be. In order: Gemma4ForConditionalGeneration, an older
# multimodal layout, Gemma4Model alone, Gemma4ForCausalLM, Gemma4TextModel alone.
_LAYOUTS = {
    "model.language_model.": "lm_head.weight",
    "language_model.model.": "language_model.lm_head.weight",
    "language_model.": "lm_head.weight",
    "model.": "lm_head.weight",
    "": "lm_head.weight",
}


def text_prefix(stored: Container[str]) -> tuple[str, str]:
    """(prefix of the text decoder's names, full name an untied head has). Raises FormatError if it is not there."""
    for prefix, head in _LAYOUTS.items():
        if prefix + "embed_tokens.weight" in stored:
            return prefix, head
    tried = ", ".join(prefix + "embed_tokens.weight" for prefix in _LAYOUTS)
    raise FormatError(f"the weights hold no Gemma 4 text decoder: none of {tried} is there")


# Folders of an encoder's tensors, where the names inside are told apart. The unified model's were renamed by
# transformers at loading; files exist under both names.
_ENCODER_FOLDERS = {
    "vision": ("vision_tower.", "vision_embedder.", "embed_vision.multimodal_embedder.", "embed_vision."),
    "audio": ("audio_tower.", "embed_audio."),
}


def encoder_names(stored: Iterable[str], modality: str) -> dict[str, str]:
    """Engine name -> stored name of every tensor of the "vision" or "audio" encoder; {} if there is none."""
    folders = [prefix + folder for folder in _ENCODER_FOLDERS[modality] for prefix in ("model.", "")]
    out: dict[str, str] = {}
    for name in stored:
        folder = next((folder for folder in folders if name.startswith(folder)), None)
        if folder is not None:
            out[name.removeprefix(folder)] = name
    return out


def text_tensors(config: TextConfig) -> dict[str, Shape]:
    """Name without prefix -> shape, of every tensor the text decoder reads."""
    d, wide = config.d_model, config.n_layers * config.d_ple
    out: dict[str, Shape] = {"embed_tokens.weight": (config.d_vocab, d), "norm.weight": (d,)}
    if not config.tied:
        out["lm_head.weight"] = (config.d_vocab, d)
    if config.d_ple:
        out[PLE_TABLE] = (config.d_vocab_ple, wide)
        out["per_layer_model_projection.weight"] = (wide, d)
        out["per_layer_projection_norm.weight"] = (config.d_ple,)
    for i in range(config.n_layers):
        out.update({f"layers.{i}.{name}": shape for name, shape in _layer_tensors(config, i)})
    return out


def _layer_tensors(config: TextConfig, i: int) -> Iterator[tuple[str, Shape]]:
    d, mlp = config.d_model, config.d_mlp[i]
    yield "layer_scalar", (1,)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{norm}_layernorm.weight", (d,)
    yield from _attention_tensors(config, i)
    yield "mlp.gate_proj.weight", (mlp, d)
    yield "mlp.up_proj.weight", (mlp, d)
    yield "mlp.down_proj.weight", (d, mlp)
    if config.d_ple:
        yield "per_layer_input_gate.weight", (config.d_ple, d)
        yield "per_layer_projection.weight", (d, config.d_ple)
        yield "post_per_layer_input_norm.weight", (d,)
    if config.n_experts:
        yield from _expert_tensors(config)


def _attention_tensors(config: TextConfig, i: int) -> Iterator[tuple[str, Shape]]:
    d, head = config.d_model, config.head_dim[i]
    q, kv = config.n_heads * head, config.n_kv_heads[i] * head
    yield "self_attn.q_proj.weight", (q, d)
    yield "self_attn.q_norm.weight", (head,)
    yield "self_attn.o_proj.weight", (d, q)
    if config.kv_source[i] != i:
        return
    yield "self_attn.k_proj.weight", (kv, d)
    yield "self_attn.k_norm.weight", (head,)
    if not config.k_eq_v[i]:
        yield "self_attn.v_proj.weight", (kv, d)


def _expert_tensors(config: TextConfig) -> Iterator[tuple[str, Shape]]:
    d, n, width = config.d_model, config.n_experts, config.d_expert
    yield "router.proj.weight", (n, d)
    yield "router.scale", (d,)
    yield "router.per_expert_scale", (n,)
    yield "experts.gate_up_proj", (n, 2 * width, d)
    yield "experts.down_proj", (n, d, width)
    yield "pre_feedforward_layernorm_2.weight", (d,)
    yield "post_feedforward_layernorm_1.weight", (d,)
    yield "post_feedforward_layernorm_2.weight", (d,)


def encoder_tensors(config: EncoderConfig) -> dict[str, Shape]:
    """Name without folder -> shape, of every tensor an encoder reads; a bound, one number, is (1,) here.

    Ref: transformers models/gemma4/modeling_gemma4.py (Gemma4VisionModel, Gemma4AudioModel), models/gemma4_unified.
    """
    parts = {
        "vision_tower": _vision_tensors,
        "vision_embedder": _embedder_tensors,
        "audio_tower": _audio_tensors,
        "audio_embedder": lambda _: iter(()),
    }
    projection = ("embedding_projection.weight", (config.d_out, config.d_soft))
    return dict([projection, *parts[config.kind](config)])


_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def _clipped(config: EncoderConfig, name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """A linear map, with its bounds if the encoder has them. Ref: Gemma4ClippableLinear."""
    yield f"{name}.linear.weight", shape
    if config.clipped:
        yield from ((f"{name}.{bound}", (1,)) for bound in _BOUNDS)


def _vision_tensors(config: EncoderConfig) -> Iterator[tuple[str, Shape]]:
    d, mlp = config.d_model, config.d_mlp
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield "patch_embedder.input_proj.weight", (d, config.d_in)
    yield "patch_embedder.position_embedding_table", (2, config.n_positions, d)
    if config.standardize:
        yield from (("std_bias", (d,)), ("std_scale", (d,)))
    maps = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    maps |= {"self_attn.o_proj": (d, q)}
    maps |= {"mlp.gate_proj": (mlp, d), "mlp.up_proj": (mlp, d), "mlp.down_proj": (d, mlp)}
    for i in range(config.n_layers):
        layer = f"encoder.layers.{i}."
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{layer}{norm}_layernorm.weight", (d,)
        for norm in ("q_norm", "k_norm"):
            yield f"{layer}self_attn.{norm}.weight", (config.head_dim,)
        for name, shape in maps.items():
            yield from _clipped(config, layer + name, shape)


def _embedder_tensors(config: EncoderConfig) -> Iterator[tuple[str, Shape]]:
    d, pixels = config.d_model, config.d_in
    yield "patch_dense.weight", (d, pixels)
    yield "patch_dense.bias", (d,)
    yield "pos_embedding", (config.n_positions, 2, d)
    for norm, width in (("patch_ln1", pixels), ("patch_ln2", d), ("pos_norm", d)):
        yield from ((f"{norm}.weight", (width,)), (f"{norm}.bias", (width,)))


def _audio_tensors(config: EncoderConfig) -> Iterator[tuple[str, Shape]]:
    d, (first, second) = config.d_model, config.conv_channels
    bins = ((config.d_in + 1) // 2 + 1) // 2
    convs = "subsample_conv_projection."
    for i, (outputs, inputs) in enumerate(((first, 1), (second, first))):
        yield f"{convs}layer{i}.conv.weight", (outputs, inputs, 3, 3)
        yield f"{convs}layer{i}.norm.weight", (outputs,)
    yield f"{convs}input_proj_linear.weight", (d, bins * second)
    yield "output_proj.weight", (config.d_soft, d)
    yield "output_proj.bias", (config.d_soft,)
    for i in range(config.n_layers):
        yield from ((f"layers.{i}.{name}", shape) for name, shape in _audio_layer_tensors(config))


def _audio_layer_tensors(config: EncoderConfig) -> Iterator[tuple[str, Shape]]:
    d, mlp = config.d_model, config.d_mlp
    for block in ("feed_forward1", "feed_forward2"):
        yield from _clipped(config, f"{block}.ffw_layer_1", (mlp, d))
        yield from _clipped(config, f"{block}.ffw_layer_2", (d, mlp))
        yield from ((f"{block}.{norm}_layer_norm.weight", (d,)) for norm in ("pre", "post"))
    for norm in ("norm_pre_attn", "norm_post_attn", "norm_out", "lconv1d.pre_layer_norm", "lconv1d.conv_norm"):
        yield f"{norm}.weight", (d,)
    for name in ("q_proj", "k_proj", "v_proj", "post"):
        yield from _clipped(config, f"self_attn.{name}", (d, d))
    yield "self_attn.relative_k_proj.weight", (d, d)
    yield "self_attn.per_dim_scale", (config.head_dim,)
    yield from _clipped(config, "lconv1d.linear_start", (2 * d, d))
    yield from _clipped(config, "lconv1d.linear_end", (d, d))
    yield "lconv1d.depthwise_conv1d.weight", (d, 1, config.conv_kernel)
