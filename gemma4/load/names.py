# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the tensors of a Hugging Face checkpoint: the text decoder, and the image and audio encoders.

Ref: transformers models/gemma4/modeling_gemma4.py (Gemma4TextModel and the modules it is made of).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from gemma4 import _engine
from gemma4.errors import FormatError
from gemma4.load.config import TextConfig
from gemma4.load.encoder_config import EncoderConfig

Shape = tuple[int, ...]
PLE_TABLE = "embed_tokens_per_layer.weight"

# Where the text decoder sits -> where an untied head would be. In order: Gemma4ForConditionalGeneration, an older
# multimodal layout (Gemma 3's released files), Gemma4Model alone, Gemma4ForCausalLM, Gemma4TextModel alone.
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
    raise FormatError(
        f"the weights hold no Gemma 4 text decoder, nor one of an earlier Gemma: none of {tried} is there"
    )


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
    """Name without prefix -> shape, of every tensor the text decoder reads: the engine's own table."""
    return dict(_engine.text_tensors(config.engine()))


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
