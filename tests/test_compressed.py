# SPDX-License-Identifier: Apache-2.0
"""Safetensors of compressed-tensors (w4a16 and relatives) against the same weights unpacked and against the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import E_LIKE, MOE_LIKE, random_tensors

import gemma4
from gemma4.errors import FormatError
from gemma4.load import open_checkpoint

E32 = E_LIKE | {"hidden_size": 64, "intermediate_size": 96, "hidden_size_per_layer_input": 32, "head_dim": 32}
MOE32 = MOE_LIKE | {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
IDS = np.array([2, 5, 9, 17, 5, 33, 64, 129, 7, 300, 11, 12], dtype=np.int32)
Tensors = dict[str, np.ndarray]


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers [rows, n] -> int32 [rows, words], the first value in a word's lowest bits."""
    per_word = 32 // bits
    codes = (values.astype(np.int64) + (1 << (bits - 1))).astype(np.uint64)
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    words = (codes.reshape(len(codes), -1, per_word) << shifts).sum(axis=2, dtype=np.uint64)
    return words.astype(np.uint32).view(np.int32)


def scheme(bits: int = 4, group: int = 32, symmetric: bool = True, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    weights |= {"group_size": group} if group else {}
    return {"targets": ["Linear"], "weights": weights | changes, "input_activations": None}


def quantization_config(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"]}
    config["quantization_status"] = "compressed"
    return config | {"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}} | changes


def compress(weight: np.ndarray, group: dict[str, Any], dtype: Any, rng: np.random.Generator) -> tuple[Tensors, Any]:
    """Parts of a packed matrix with the values of `weight`, roughly, and its exact float32 values."""
    weights = group["weights"]
    bits, size = weights["num_bits"], weights.get("group_size", weight.shape[1])
    rows, n_groups = len(weight), weight.shape[1] // size
    largest = np.abs(weight.astype(np.float32).reshape(rows, n_groups, size)).max(axis=2)
    scale = (largest / ((1 << (bits - 1)) - 0.7)).astype(dtype)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    wide = scale.astype(np.float32).repeat(size, axis=1)
    codes = np.clip(np.rint(weight.astype(np.float32) / wide), low, high).astype(np.int64)
    parts = {"packed": pack(codes, bits), "scale": scale, "shape": np.array(weight.shape, np.int64)}
    zero = np.zeros((rows, n_groups), np.int64)
    if not weights["symmetric"]:
        zero = rng.integers(low, high + 1, zero.shape)
        parts["zero_point"] = pack(zero.T, bits).T.copy()
    values = (codes - zero.repeat(size, axis=1)).astype(np.float32) * wide
    return {f"weight_{name}": part for name, part in parts.items()}, values


def is_linear(name: str, tensor: np.ndarray) -> bool:
    return tensor.ndim == 2 and "embed_tokens" not in name and "router" not in name


def write(
    path: Path, config: dict[str, Any], group: dict[str, Any], dtype: Any, plain_dtype: Any = ml_dtypes.bfloat16
) -> tuple[Path, Path]:
    """A compressed checkpoint, and one of the same values in float32; what is not packed has plain_dtype in both."""
    rng = np.random.default_rng(1)
    packed: Tensors = {}
    plain: Tensors = {}
    for name, tensor in random_tensors(config).items():
        packed[name] = plain[name] = tensor.astype(plain_dtype)
        if is_linear(name, tensor):
            parts, plain[name] = compress(tensor, group, dtype, rng)
            del packed[name]
            packed |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    for folder, tensors, extra in (
        (path / "packed", packed, {"quantization_config": quantization_config(group)}),
        (path / "plain", plain, {}),
    ):
        save(folder, config | extra, tensors)
    return path / "packed", path / "plain"


def save(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def change(folder: Path, **changes: Any) -> dict[str, Any]:
    """Rewrites the file's tensors: a name's end -> another array, or None to drop it."""
    from safetensors.numpy import load_file

    tensors = dict(load_file(folder / "model.safetensors"))
    name = "model.layers.0.self_attn.q_proj.weight_"
    for part, value in changes.items():
        tensors.pop(name + part, None)
        if value is not None:
            tensors[name + part] = value
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("group", "dtype", "stored"),
    [
        (scheme(), np.float16, "Q4_0"),
        (scheme(), ml_dtypes.bfloat16, "Q4_0"),
        (scheme(group=0), ml_dtypes.bfloat16, "Q4_0"),
        (scheme(bits=2), np.float16, "Q4_0"),
        (scheme(bits=8), np.float16, "Q8_0"),
        (scheme(symmetric=False), ml_dtypes.bfloat16, "Q8_0"),
        (scheme(bits=2, symmetric=False), np.float16, "Q4_0"),
        (scheme(bits=8, symmetric=False), np.float16, "F32"),  # differences of two bytes take nine bits
        (scheme(group=16), np.float16, "F32"),
        (scheme(), np.float32, "F32"),
    ],
    ids=str,
)
def test_values_to_the_bit(tmp_path, group, dtype, stored):
    """The same logits, `exact`, as from the float32 products of codes and scales."""
    packed, plain = write(tmp_path, E32, group, dtype)
    with gemma4.load(packed, precision="exact") as model, gemma4.load(plain) as reference:
        assert set(model.checkpoint.dtypes) == {stored, "BF16"}
        for name in ("layers.0.self_attn.q_proj.weight", "layers.5.mlp.down_proj.weight"):
            np.testing.assert_array_equal(model.weight(name), reference.weight(name))
        np.testing.assert_array_equal(model.forward(IDS), reference.forward(IDS))
        assert not [name for name in model.checkpoint.ignored if ".layers.0.self_attn.q_proj" in name]
        note = model.info().notes[0]
        assert note in str(model.info()) and "compressed-tensors" in note
        assert ("without loss" in note) is (stored != "F32") and ("widened to float32" in note) is (stored == "F32")


def test_small_scales_are_widened(tmp_path):
    """A bfloat16 scale below float16's range would lose bits in a block."""
    packed, _ = write(tmp_path, E32, scheme(), ml_dtypes.bfloat16)
    scale = np.full((4 * 32, 2), 3e-7, ml_dtypes.bfloat16)
    tensors = change(packed, scale=scale)
    with gemma4.load(packed) as model:
        assert model.checkpoint.engine_tensors["layers.0.self_attn.q_proj.weight"][0] == "F32"
        codes = tensors["model.layers.0.self_attn.q_proj.weight_packed"].view(np.uint32)[0, 0] & 15
        expected = (np.float32(codes) - 8) * scale[0, 0].astype(np.float32)
        assert model.weight("layers.0.self_attn.q_proj.weight")[0, 0] == expected
        assert "1 widened to float32" in model.info().notes[0]


def test_fast_is_the_default_and_close(tmp_path):
    packed, plain = write(tmp_path, E32, scheme(), ml_dtypes.bfloat16)
    with gemma4.load(packed) as model, gemma4.load(plain) as reference:
        assert model.engine.precision == "fast"
        pair = np.stack([model.forward(IDS).ravel(), reference.forward(IDS).ravel()])
        assert not np.array_equal(*pair) and np.corrcoef(pair)[0, 1] > 0.99


def test_experts_stored_one_by_one(tmp_path):
    """`experts.3.gate_proj`, as unfused experts are named, and maps of two schemes, one chosen by a pattern."""
    rng, groups = np.random.default_rng(2), (scheme(), scheme(bits=8) | {"targets": ["re:.*down_proj.*"]})
    packed: Tensors = {}
    plain: Tensors = {}
    for name, tensor in random_tensors(MOE32).items():
        plain[name] = tensor
        if ".experts." not in name:
            packed[name] = tensor
            continue
        values = np.empty(tensor.shape, np.float32)
        base, _, kind = name.rpartition(".")
        for e, matrix in enumerate(tensor):
            halves = {"gate_proj": matrix[:32], "up_proj": matrix[32:]} if kind == "gate_up_proj" else {kind: matrix}
            found = []
            for map_name, part in halves.items():
                parts, exact = compress(part, groups[map_name == "down_proj"], np.float16, rng)
                found.append(exact)
                packed |= {f"{base}.{e}.{map_name}.{key}": value for key, value in parts.items()}
            values[e] = np.concatenate(found)
        plain[name] = values
    save(tmp_path / "packed", MOE32 | {"quantization_config": quantization_config(*groups)}, packed)
    save(tmp_path / "plain", MOE32, plain)
    with gemma4.load(tmp_path / "packed", precision="exact") as model, gemma4.load(tmp_path / "plain") as reference:
        assert set(model.checkpoint.dtypes) == {"Q4_0", "Q8_0", "BF16"}
        np.testing.assert_array_equal(model.forward(IDS), reference.forward(IDS))


# ---- against the package ---------------------------------------------------------------------------------------------


def test_against_the_compressed_tensors_package(tmp_path):
    """Packed and unpacked by the package itself, its scales in float32 so that its products are not rounded."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors = random_tensors(E32)
    for bits, size, symmetric in ((4, 32, True), (8, 32, True), (4, 32, False), (4, 0, True), (2, 32, False)):
        group = scheme(bits, size, symmetric)
        oracle = QuantizationScheme(**group)
        packed: Tensors = {}
        expected: Tensors = {}
        for name, tensor in tensors.items():
            if not is_linear(name, tensor):
                packed[name] = tensor
                continue
            weight = torch.from_numpy(tensor.astype(np.float32))
            rows = weight.reshape(len(weight), -1, size or weight.shape[1])
            scale = (rows.abs().amax(2) / (1 << (bits - 1))).half().float()
            state = {"weight": weight, "weight_scale": scale}
            low = -(1 << (bits - 1))
            state["weight_zero_point"] = (
                torch.zeros_like(scale) if symmetric else torch.randint(low, -low, scale.shape)
            ).to(torch.int8)
            state = PackedQuantizationCompressor.compress(state, oracle)
            expected[name] = PackedQuantizationCompressor.decompress(state, oracle)["weight"].numpy()
            base = name.removesuffix("weight")
            packed |= {base + part: value.numpy() for part, value in state.items()}
        save(tmp_path, E32 | {"quantization_config": quantization_config(group)}, packed)
        with gemma4.load(tmp_path) as model:
            for name, values in expected.items():
                np.testing.assert_array_equal(
                    model.weight(name.removeprefix("model.")), values, err_msg=f"{bits} {size}"
                )


def test_against_transformers(tmp_path):
    """The logits of transformers reading the same directory through compressed-tensors, in float32."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors package")
    transformers = pytest.importorskip("transformers")
    packed, _ = write(tmp_path, E32, scheme(), np.float32, np.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(IDS.astype(np.int64))[None]).logits[0].numpy()
    with gemma4.load(packed, precision="exact") as model:
        assert np.abs(model.forward(IDS) - expected).max() <= 2e-5 * np.abs(expected).max()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"quant_method": "gptq"}, NotImplementedError, "gptq"),
        ("awq", NotImplementedError, "awq"),
        (quantization_config(scheme(), format="nvfp4-pack-quantized"), NotImplementedError, "nvfp4"),
        (quantization_config(scheme(bits=3)), NotImplementedError, "3 bits"),
        (quantization_config(scheme(type="float")), NotImplementedError, "float"),
        (quantization_config(scheme(strategy="block")), NotImplementedError, "block"),
        (quantization_config(scheme() | {"input_activations": {"num_bits": 8}}), NotImplementedError, "activations"),
        (quantization_config(scheme() | {"targets": ["re:(a+)+b"]}), NotImplementedError, "pattern"),
        (quantization_config(scheme() | {"targets": ["re:["]}), FormatError, "no pattern"),
        (quantization_config(scheme() | {"targets": "Linear"}), FormatError, "targets"),
        (quantization_config(scheme() | {"targets": ["Embedding"]}), FormatError, "no group's targets match"),
        (quantization_config(scheme(group_size=None)), FormatError, "group_size"),
        (quantization_config(scheme(group_size=48)), FormatError, "groups of 48"),
        (quantization_config(scheme(num_bits="4")), FormatError, "num_bits"),
        (quantization_config(scheme(symmetric="yes")), FormatError, "symmetric"),
        (quantization_config({"targets": ["Linear"]}), FormatError, "weights"),
        (quantization_config(), FormatError, "config_groups"),
        (quantization_config(scheme(symmetric=False)), FormatError, "zero_point"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value)[:30],
)
def test_bad_configs(tmp_path, config, error, words):
    packed, _ = write(tmp_path, E32, scheme(), np.float16)
    (packed / "config.json").write_text(json.dumps(E32 | {"quantization_config": config}))
    with pytest.raises(error, match=words):
        open_checkpoint(packed)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scale": None}, FormatError, "no file holds .*weight_scale"),
        ({"packed": None}, FormatError, "q_proj.weight"),
        ({"packed": np.zeros((128, 7), np.int32)}, FormatError, r"int32 \[128, 7\], expected int32 \[128, 8\]"),
        ({"packed": np.zeros((128, 8), np.float32)}, FormatError, "float32"),
        ({"scale": np.zeros((128, 3), np.float16)}, FormatError, r"expected .* \[128, 2\]"),
        ({"scale": np.full((128, 2), np.inf, np.float16)}, FormatError, "not finite"),
        ({"shape": np.array([128, 60])}, FormatError, r"says \[128, 60\]"),
        ({"g_idx": np.arange(64, dtype=np.int32)}, NotImplementedError, "activation order"),
    ],
    ids=str,
)
def test_bad_parts(tmp_path, changes, error, words):
    packed, _ = write(tmp_path, E32, scheme(), np.float16)
    change(packed, **changes)
    with pytest.raises(error, match=words):
        open_checkpoint(packed)


def test_packed_tensors_without_a_config(tmp_path):
    packed, _ = write(tmp_path, E32, scheme(), np.float16)
    (packed / "config.json").write_text(json.dumps(E32))
    with pytest.raises(FormatError, match="a quantised checkpoint"):
        open_checkpoint(packed)
