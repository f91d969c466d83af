# SPDX-License-Identifier: Apache-2.0
"""GGUF files for tests: a Hugging Face checkpoint of Gemma 2, 3 or 4 written by the gguf package under llama.cpp's
conventions (conversion/gemma.py), and files put together byte by byte, which may be wrong in any way."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma4.load import open_checkpoint
from gemma4.load.dtypes import stored_rows

gguf = pytest.importorskip("gguf")

VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
_EARLIER = {"gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"}  # model_type -> architecture
_SCALES = {"router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale"}


def convert(
    source: str | Path,
    path: Path,
    dtype: str = "BF16",
    *,
    keys: dict[str, Any] | None = None,
    apart: bool = False,
    part_tensors: int = 0,
    text: bool = True,
) -> Path:
    """Write `source` as GGUF, matrices as `dtype`.

    keys: override metadata (None: leave the key out). apart: experts' gate and up as two tensors. part_tensors: split
    into files of so many tensors. text: with tokenizer and chat template.
    """
    with open_checkpoint(source) as checkpoint:
        writer = gguf.GGUFWriter(path, _architecture(checkpoint), split_max_tensors=part_tensors)
        table = metadata(checkpoint) | (vocabulary(checkpoint.path) if text else {}) | (keys or {})
        _write(writer, table, _tensors(checkpoint, apart), dtype)
    return path


def _write(writer: Any, keys: dict[str, Any], tensors: dict[str, np.ndarray], dtype: str) -> None:
    for key, value in keys.items():
        if value is not None:
            _add_key(writer, key, value)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType[_stored_type(name, values, dtype)]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_key(writer: Any, key: str, value: Any) -> None:
    types = gguf.GGUFValueType
    if key == "general.alignment":
        writer.add_custom_alignment(value)
        return
    if isinstance(value, list):
        writer.add_array(key, value)
        return
    kind = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}[type(value)]
    writer.add_key_value(key, value, kind)


def _architecture(checkpoint: Any) -> str:
    return _EARLIER.get(checkpoint.config.model_type, "gemma4")


def metadata(checkpoint: Any) -> dict[str, Any]:
    """What the converter writes on the text model and on sampling."""
    architecture, c = _architecture(checkpoint), checkpoint.config
    out = _gemma4(c) if architecture == "gemma4" else _earlier(c)
    sampling = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}
    chosen = {f"general.sampling.{key}": checkpoint.generation_config.get(name) for key, name in sampling.items()}
    return {f"{architecture}.{key}": value for key, value in out.items()} | chosen


def _earlier(c: Any) -> dict[str, Any]:
    """Gemma 2 and 3. No key has the pattern of layers, the scale of scores or the sliding layers' base."""
    out = {
        "block_count": c.n_layers,
        "context_length": c.context_length,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_mlp[0],
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads[0],
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.key_length": c.head_dim[0],
        "attention.value_length": c.head_dim[0],
        "attention.sliding_window": c.sliding_window or None,
        "final_logit_softcapping": c.logit_softcap or None,
        "attn_logit_softcapping": c.attention_softcap or None,
    }
    rope = c.rope.get("full_attention")
    if "q" in c.head_norms and rope:
        out["rope.freq_base"] = rope.theta
    if rope and rope.rope_type == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    return out


def _gemma4(c: Any) -> dict[str, Any]:
    sliding = [kind == "sliding_attention" for kind in c.layer_types]
    full = sliding.index(False)
    local = sliding.index(True)
    out: dict[str, Any] = {
        "block_count": c.n_layers,
        "context_length": c.context_length,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_mlp[0] if len(set(c.d_mlp)) == 1 else list(c.d_mlp),
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads[0] if len(set(c.n_kv_heads)) == 1 else list(c.n_kv_heads),
        "rope.freq_base": c.rope["full_attention"].theta,
        "rope.freq_base_swa": c.rope["sliding_attention"].theta,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.sliding_window": c.sliding_window,
        "attention.shared_kv_layers": c.n_layers - c.first_shared_layer,
        "embedding_length_per_layer_input": c.d_ple,
        "attention.sliding_window_pattern": sliding,
    }
    for suffix, layer in (("", full), ("_swa", local)):
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            out[key + suffix] = c.head_dim[layer]
    if c.logit_softcap:
        out["final_logit_softcapping"] = c.logit_softcap
    if c.n_experts:
        out |= {"expert_count": c.n_experts, "expert_used_count": c.top_k_experts}
        out["expert_feed_forward_length"] = c.d_expert
    return out


def vocabulary(source: Path | str) -> dict[str, Any]:
    """Metadata of a directory's tokenizer.json and chat template."""
    source = Path(source)
    if not (source / "tokenizer.json").is_file():
        return {}
    out = vocabulary_of(json.loads((source / "tokenizer.json").read_text(encoding="utf-8")))
    template = source / "chat_template.jinja"
    if template.is_file():
        out["tokenizer.chat_template"] = template.read_text(encoding="utf-8")
    return out


def vocabulary_of(table: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a parsed tokenizer.json, as LlamaHfVocab and Gemma4Model.set_vocab make it."""
    vocab = table["model"]["vocab"] | {token["content"]: token["id"] for token in table["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["content"] for token in table["added_tokens"] if token["special"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in table["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-1000.0] * len(tokens),
        "tokenizer.ggml.token_type": [_token_type(token, special) for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": vocab["<bos>"],
        "tokenizer.ggml.eos_token_id": vocab["<eos>"],
        "tokenizer.ggml.unknown_token_id": vocab["<unk>"],
        "tokenizer.ggml.padding_token_id": vocab["<pad>"],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }


def _token_type(token: str, special: set[str]) -> int:
    types = gguf.TokenType
    if token in VISIBLE:
        return int(types.USER_DEFINED)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(types.BYTE)
    return int(types.CONTROL if token in special else types.NORMAL)


def _tensors(checkpoint: Any, apart: bool) -> dict[str, np.ndarray]:
    """GGUF name -> float32 values. Names from the gguf package's own table."""
    architecture = _architecture(checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], checkpoint.config.n_layers)
    out = {"rope_freqs.weight": _rope_freqs(checkpoint.config)} if architecture == "gemma4" else {}
    for name in checkpoint.engine_tensors:
        values = np.asarray(stored_rows(*checkpoint.engine_tensors[name]), np.float32)
        if architecture != "gemma4" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        scale = next((new for old, new in _SCALES.items() if name.endswith(old)), None)
        if scale:
            out[f"blk.{layer}.{scale}"] = values
        elif apart and name.endswith("experts.gate_up_proj"):
            half = values.shape[1] // 2
            out[f"blk.{layer}.ffn_gate_exps.weight"] = np.ascontiguousarray(values[:, :half])
            out[f"blk.{layer}.ffn_up_exps.weight"] = np.ascontiguousarray(values[:, half:])
        else:
            theirs = name.removesuffix(".weight")
            stored = names.get_name(theirs if theirs == "lm_head" else f"model.{theirs}")
            assert stored, name
            out[stored + ".weight"] = values
    return out


def _rope_freqs(config: Any) -> np.ndarray:
    width = config.head_dim[config.layer_types.index("full_attention")]
    turning = int(config.rope["full_attention"].partial * width / 2)
    return np.array([1.0] * turning + [1e30] * (width // 2 - turning), np.float32)


def _stored_type(name: str, values: np.ndarray, dtype: str) -> str:
    """As the converter: vectors, norms and the router stay F32."""
    if values.ndim == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or name in _ALWAYS_F32:
        return "F32"
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][0]
    return dtype if values.shape[-1] % block == 0 else "F16"


# -- the encoders' file ------------------------------------------------------------------------------------------------

_ALWAYS_F32 = {"v.patch_embd.weight", "v.position_embd.weight", "a.conv1d.0.weight", "a.conv1d.1.weight"}
# of the unified model, which the gguf package does not know yet
_UNIFIED = {
    "vision_embedder.patch_dense": "v.patch_embd",
    "vision_embedder.patch_ln1": "v.patch_norm.1",
    "vision_embedder.patch_ln2": "v.patch_norm.2",
    "vision_embedder.pos_norm": "v.patch_norm.3",
    "vision_embedder.pos_embedding": "v.position_embd",
}


def convert_mmproj(
    source: str | Path,
    path: Path,
    dtype: str = "F32",
    *,
    keys: dict[str, Any] | None = None,
    change: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write the encoders of `source` as the converter's --mmproj does. keys, change: override metadata and tensors (or
    add some; None: leave out)."""
    with open_checkpoint(source) as checkpoint:
        tensors: dict[str, Any] = {}
        for modality in ("vision", "audio"):
            for name, values in checkpoint.tensors.items():
                if f"{modality}_" in name or f"embed_{modality}" in name:
                    tensors.update([_encoder_tensor(name.removeprefix("model."), np.asarray(values, np.float32))])
        tensors = {name: values for name, values in (tensors | dict(change or {})).items() if values is not None}
        _write(gguf.GGUFWriter(path, "clip"), _encoder_metadata(checkpoint) | (keys or {}), tensors, dtype)
    return path


def _encoder_metadata(checkpoint: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"general.type": "mmproj"}
    projectors = {"vision_tower": "gemma4v", "vision_embedder": "gemma4uv"}
    projectors |= {"audio_tower": "gemma4a", "audio_embedder": "gemma4ua"}
    for modality, encoder in checkpoint.encoders.items():
        out[f"clip.has_{modality}_encoder"] = True
        out |= {
            f"clip.{modality}.{key}": value
            for key, value in {
                "projector_type": projectors[encoder.kind],
                "projection_dim": encoder.d_out,
                "embedding_length": encoder.d_model or encoder.d_soft,
                "feed_forward_length": encoder.d_mlp,
                "block_count": encoder.n_layers,
                "attention.head_count": encoder.n_heads,
                "attention.layer_norm_epsilon": 1e-6 if modality == "vision" else 0.125,  # known to be wrong in files
            }.items()
        }
    if "vision" in checkpoint.encoders:
        out |= {"clip.vision.patch_size": 16, "clip.vision.image_size": 224}
        out |= {"clip.vision.image_mean": [0, 0, 0], "clip.vision.image_std": [1, 1, 1]}
    return out


def _encoder_tensor(name: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and values of a tensor in the file. Names from the gguf package's own table."""
    names = _mmproj_names()
    values = np.atleast_1d(values)
    alone = name.endswith(("per_dim_scale", "position_embedding_table", "pos_embedding", "std_bias", "std_scale"))
    stem, leaf = (name, "weight") if alone else name.rsplit(".", 1)
    stem = stem.removesuffix(".linear")
    if name.endswith("per_dim_scale"):
        values = np.logaddexp(np.float32(0), values)
    elif name.endswith("depthwise_conv1d.weight"):
        values = values[:, 0]
    elif name.endswith("pos_embedding"):
        values = values.transpose(1, 0, 2)
    elif stem.endswith(("patch_embedder.input_proj", "patch_dense")) and leaf == "weight":
        values = _channels_first(values)
        values = values if stem.endswith("input_proj") else values.reshape(len(values), -1)
    elif stem.endswith("patch_ln1"):
        values = _channels_first(values[None]).reshape(-1)
    theirs = stem.replace("vision_tower.encoder.", "vision_model.model.").replace("audio_tower.", "conformer.")
    stored = _UNIFIED.get(stem) or names.get_name(theirs) or names.get_name(f"model.{stem}")
    assert stored, name
    exact = stored if name.endswith(("std_bias", "std_scale")) else f"{stored}.{leaf}"
    return exact, np.ascontiguousarray(values)


@functools.cache
def _mmproj_names() -> Any:
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 8)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """[n, side * side * 3] -> [n, 3, side, side]"""
    side = int((pixels.shape[1] // 3) ** 0.5)
    return np.stack([pixels[:, channel::3].reshape(-1, side, side) for channel in range(3)], axis=1)


# -- byte by byte ------------------------------------------------------------------------------------------------------


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(name: str | bytes, sizes: list[int], kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    """`sizes` innermost first, as in the file."""
    rank = len(sizes) if rank is None else rank
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", rank, *sizes, kind, offset)


def raw(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """The bytes of a file; counts can be made to lie."""
    pairs, tensors = pairs or [], tensors or []
    counts = len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
