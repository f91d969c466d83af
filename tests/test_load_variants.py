# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as people really have them: merged, stale, unaligned, in part; and files that are none, said clearly."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import time

import ml_dtypes
import numpy as np
import pytest

import gemma4
from gemma4.errors import FormatError
from gemma4.load import open_checkpoint
from gemma4.load.patterns import Pattern
from gemma4.load.safetensors import SafetensorsFile

SOURCE = open_checkpoint("tiny-e").path
IDS = np.array([2, 5, 6, 7, 8, 100, 200], np.int32)
NAMES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "uint8": "U8", "uint32": "U32"}
EMBED = "model.language_model.embed_tokens.weight"


def read(path):
    with_file = SafetensorsFile(path)
    return {name: with_file.array(name).copy() for name in with_file.tensors}


STORED = read(SOURCE / "model.safetensors")


def write(tensors, path, *, pad=0):
    """A header of no round length, and no order of sizes."""
    table, at = {}, 0
    for name, array in tensors.items():
        table[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape)}
        table[name]["data_offsets"] = [at, at := at + array.nbytes]
    head = json.dumps(table).encode()
    head += b" " * ((pad - 8 - len(head)) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(a.tobytes() for a in tensors.values()))


def folder(path, *, tensors=None, config=None, pad=0, **files):
    shutil.copytree(SOURCE, path)
    write(STORED if tensors is None else tensors, path / "model.safetensors", pad=pad)
    if config:
        table = json.loads((path / "config.json").read_text())
        config(table)
        (path / "config.json").write_text(json.dumps(table))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.fixture(scope="module")
def right():
    return gemma4.load("tiny-e").forward(IDS)


# -- a trained head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_differs_from_its_table_is_used(tmp_path, tied):
    """transformers does; ours took the table where config.json says they are tied."""

    def config(table):
        table["tie_word_embeddings"] = table["text_config"]["tie_word_embeddings"] = tied

    other = np.ascontiguousarray(STORED[EMBED][::-1])
    path = folder(tmp_path / "m", tensors=STORED | {"lm_head.weight": other}, config=config)
    model, plain = gemma4.load(path), gemma4.load("tiny-e")
    _, cache = plain.run_with_cache(IDS, "ln_final.hook_out")
    raw = cache["ln_final.hook_out"].astype(np.float64) @ other.astype(np.float64).T
    cap = model.engine_config["logit_softcap"]
    expected = cap * np.tanh(raw / cap) if cap else raw
    np.testing.assert_allclose(model.forward(IDS), expected, atol=2e-4)
    assert any("the stored head is used" in note for note in model.info().notes) == tied
    np.testing.assert_array_equal(model.unembed(np.array([3])), other[3:4].astype(np.float32))
    gemma4.quantize(path, tmp_path / "x.gguf", type="BF16")
    np.testing.assert_array_equal(gemma4.load(tmp_path / "x.gguf", precision="exact").unembed(slice(None)), other)


def test_one_value_makes_a_head_another(tmp_path):
    other = STORED[EMBED].copy()
    other[-1, -1] += 1
    model = gemma4.load(folder(tmp_path / "m", tensors=STORED | {"lm_head.weight": other}))
    assert "lm_head.weight" in model.checkpoint.engine_tensors


def test_a_head_that_is_a_copy_is_left_alone(tmp_path, right):
    model = gemma4.load(folder(tmp_path / "m", tensors=STORED | {"lm_head.weight": STORED[EMBED].copy()}))
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert "lm_head.weight" not in model.checkpoint.engine_tensors and model.info().notes == ()


# -- alignment ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", range(4))
def test_data_that_is_not_aligned(tmp_path, right, pad):
    model = gemma4.load(folder(tmp_path / "m", pad=pad))
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert model.encode_image(np.zeros((48, 48, 3), np.uint8)).shape[1] == 128
    copied = f"{len(model.checkpoint.engine_tensors)} tensors do not lie aligned"
    assert [note[: len(copied)] for note in model.info().notes] == ([copied] if pad % 2 else [])
    np.testing.assert_array_equal(model.tensors[EMBED], STORED[EMBED])


def test_float32_after_an_odd_number_of_bfloat16(tmp_path, right):
    mixed = {name: a.astype(np.float32) if "norm" in name else a for name, a in STORED.items()}
    odd = {"odd": np.zeros(1, ml_dtypes.bfloat16)} | mixed
    model = gemma4.load(folder(tmp_path / "m", tensors=odd))
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert any("copied into memory" in note for note in model.info().notes)


# -- an index that names more than there is ----------------------------------------------------------------------------


def sharded(path, *, extra=None, drop=()):
    """Text in one shard, encoders in another; `extra` is in the index alone."""
    shutil.copytree(SOURCE, path)
    (path / "model.safetensors").unlink()
    text = {name: a for name, a in STORED.items() if "language_model" in name}
    rest = {name: a for name, a in STORED.items() if name not in text}
    parts = {"a.safetensors": text, "b.safetensors": rest}
    table = {name: file for file, part in parts.items() for name in part} | (extra or {})
    for file, part in parts.items():
        write({name: a for name, a in part.items() if name not in drop}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return path


def test_an_index_that_names_tensors_nobody_needs(tmp_path, right):
    extra = {"lm_head.weight": "a.safetensors", "model.language_model.layers.9.self_attn.k_proj.bias": "a.safetensors"}
    np.testing.assert_array_equal(gemma4.load(sharded(tmp_path / "m", extra=extra)).forward(IDS), right)


def test_a_shard_that_nobody_needs(tmp_path, right):
    path = sharded(tmp_path / "m", extra={"optimizer.state": "c.safetensors"})
    np.testing.assert_array_equal(gemma4.load(path).forward(IDS), right)
    (path / "b.safetensors").unlink()  # the encoders
    model = gemma4.load(path)
    np.testing.assert_array_equal(model.forward(IDS), right)
    with pytest.raises(gemma4.StateError, match="hold none of the tensors"):
        model.encode_image(np.zeros((48, 48, 3), np.uint8))
    (path / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors is missing"):
        gemma4.load(path)


def test_a_missing_tensor_that_is_needed(tmp_path):
    with pytest.raises(FormatError, match=r"a\.safetensors lacks 1 tensors the index puts there.*norm"):
        gemma4.load(sharded(tmp_path / "m", drop=["model.language_model.norm.weight"]))


# -- stale and unset values --------------------------------------------------------------------------------------------

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DENSE = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}


@pytest.mark.parametrize("where", ["top", "text_config"])
@pytest.mark.parametrize("table", [BNB, DENSE, {"bits": 4, "group_size": 64}, "awq"], ids=str)
def test_a_stale_quantization_config(tmp_path, right, where, table):
    def config(c):
        (c if where == "top" else c["text_config"])["quantization_config"] = table

    model = gemma4.load(folder(tmp_path / "m", config=config))
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert any("they are not" in note for note in model.info().notes)


def test_a_true_quantization_config_is_still_refused(tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    packed = STORED | {name: np.zeros((STORED[name].size // 2, 1), np.uint8)}
    with pytest.raises(NotImplementedError, match="bitsandbytes"):
        gemma4.load(folder(tmp_path / "m", tensors=packed, config=lambda c: c.update(quantization_config=BNB)))


def test_mlx(tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj"
    packed = STORED | {f"{name}.weight": np.zeros((256, 16), np.uint32)}
    packed |= {f"{name}.{part}": np.zeros((256, 2), ml_dtypes.bfloat16) for part in ("scales", "biases")}
    with pytest.raises(NotImplementedError, match="quantised by MLX"):
        gemma4.load(folder(tmp_path / "m", tensors=packed, config=lambda c: c.update(quantization={"bits": 4})))


@pytest.mark.parametrize("unset", [-1, 4294967295, None])
def test_unset_special_ids_of_a_folder(tmp_path, right, unset):
    def config(c):
        for table in (c, c["text_config"]):
            table.update(bos_token_id=unset, pad_token_id=unset, eos_token_id=[unset])

    model = gemma4.load(folder(tmp_path / "m", config=config))
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert (
        model.config.bos_token_id is None and model.config.pad_token_id is None and model.config.eos_token_ids == (1,)
    )


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gemma4.quantize("tiny-e", path, type="BF16")
    return path


def with_keys(source, out, keys, arch="gemma4"):
    gguf = pytest.importorskip("gguf")
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(out, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.type") or name in keys:
            continue
        kind, of = field.types[0], field.types[-1]
        writer.add_key_value(name, field.contents(), kind, sub_type=of if kind == gguf.GGUFValueType.ARRAY else None)
    for name, (value, kind) in keys.items():
        writer.add_key_value(name, value, gguf.GGUFValueType[kind])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_unset_and_neutral_keys_of_a_gguf_file(gguf_file, tmp_path, right):
    unset = {f"tokenizer.ggml.{name}_token_id": (0xFFFFFFFF, "UINT32") for name in ("bos", "padding", "eot", "unknown")}
    neutral = {"gemma4.rope.scaling.type": ("linear", "STRING"), "gemma4.rope.scaling.factor": (1.0, "FLOAT32")}
    eos = {"tokenizer.ggml.eos_token_id": (-1, "INT32")}
    model = gemma4.load(with_keys(gguf_file, tmp_path / "x.gguf", unset | neutral | eos), precision="exact")
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert model.config.bos_token_id is None and model.config.pad_token_id is None
    assert model.generate([{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=30)
    scaled = neutral | {"gemma4.rope.scaling.factor": (2.0, "FLOAT32")}
    with pytest.raises(NotImplementedError, match="factor 2"):
        gemma4.load(with_keys(gguf_file, tmp_path / "y.gguf", scaled))


def rope_keys(keys):
    return {f"gemma4.rope.{k}": (v, "STRING" if isinstance(v, str) else "FLOAT32") for k, v in keys.items()}


@pytest.mark.parametrize("keys", [
    {"scaling.factor": 0.0}, {"scale_linear": 1.0}, {"scaling.type": "none", "scaling.factor": 8.0},
    {"scaling.type": "linear"}, {"scaling.factor": 1.0, "scale_linear": 4.0},
], ids=str)  # fmt: skip
def test_neutral_scalings(gguf_file, tmp_path, right, keys):
    model = gemma4.load(with_keys(gguf_file, tmp_path / "x.gguf", rope_keys(keys)), precision="exact")
    np.testing.assert_array_equal(model.forward(IDS), right)


@pytest.mark.parametrize(("keys", "error", "complaint"), [
    ({"scaling.factor": 2.0}, NotImplementedError, "only unscaled positions"),
    ({"scale_linear": 4.0}, NotImplementedError, "only unscaled positions"),
    ({"scaling.type": "yarn"}, NotImplementedError, "only linear scaling"),
    ({"scaling.factor": float("nan")}, gemma4.FormatError, "scaling.factor is nan"),
    ({"scaling.factor": -1.0}, gemma4.FormatError, "scaling.factor is -1.0"),
], ids=str)  # fmt: skip
def test_scalings_that_are_not_neutral(gguf_file, tmp_path, keys, error, complaint):
    """llama.cpp scales without a type, and by the older key."""
    with pytest.raises(error, match=re.escape(complaint)):
        gemma4.load(with_keys(gguf_file, tmp_path / "x.gguf", rope_keys(keys)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_byte_order_mark(tmp_path, right, name):
    path = folder(tmp_path / "m")
    (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    model = gemma4.load(path)
    np.testing.assert_array_equal(model.forward(IDS), right)
    assert model.chat_template is not None


# -- files that are no models ------------------------------------------------------------------------------------------

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_git_lfs_pointers(tmp_path, name):
    path = folder(tmp_path / "m")
    (path / name).write_text(POINTER)
    with pytest.raises(FormatError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        gemma4.load(path).to_tokens("x")
    (tmp_path / "x.gguf").write_text(POINTER)
    with pytest.raises(FormatError, match="Git LFS pointer"):
        gemma4.load(tmp_path / "x.gguf")


@pytest.mark.parametrize(("kind", "words"), [("adapter", "LoRA adapter"), ("imatrix", "importance matrix")])
def test_gguf_files_that_are_no_models(gguf_file, tmp_path, kind, words):
    path = with_keys(gguf_file, tmp_path / "x.gguf", {"general.type": (kind, "STRING")})
    with pytest.raises(NotImplementedError, match=words):
        gemma4.load(path)


def test_types_of_ik_llama_cpp(gguf_file, tmp_path):
    data = bytearray(gguf_file.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 139)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=r"unknown type 139, one of ik_llama\.cpp's own"):
        gemma4.load(tmp_path / "x.gguf")


def test_a_pipe_beside_the_model(gguf_file, tmp_path):
    shutil.copy(gguf_file, tmp_path / "m.gguf")
    os.mkfifo(tmp_path / "mmproj.gguf")
    model = gemma4.load(tmp_path / "m.gguf")
    assert any("mmproj.gguf" in note and "no regular file" in note for note in model.info().notes)


def test_a_large_header(tmp_path):
    head = b'{"a":' + b"[" * (17 << 20) + b"]" * 10
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    start = time.perf_counter()
    with pytest.raises(FormatError, match=r"claims \d+ bytes, over 16777216"):
        SafetensorsFile(tmp_path / "x.safetensors")
    assert time.perf_counter() - start < 1


def test_cached_repositories_of_gguf_files(gguf_file, tmp_path, monkeypatch, right):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--some--gemma-GGUF" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copy(gguf_file, snapshot / "gemma-BF16.gguf")
    (snapshot / "mmproj-gemma.gguf").write_bytes(b"GGUF")
    np.testing.assert_array_equal(gemma4.load("some/gemma-GGUF", precision="exact").forward(IDS), right)
    shutil.copy(gguf_file, snapshot / "gemma-other.gguf")
    with pytest.raises(FileNotFoundError, match=r"gemma-BF16\.gguf, gemma-other\.gguf: name one"):
        gemma4.load("some/gemma-GGUF")


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_patterns_match_as_re_does():
    rng = random.Random(0)
    atoms = ["a", "b", ".", "[ab]", "[^a]", r"\.", r"\d", r"\w", "x"]
    groups = ["(a|bc)", "(?:b|)", "^", "$", "(?:a(b|c)|.)"]
    repeats = ["", "", "*", "+", "?", "{2}", "{1,3}", "{0,}", "*?"]
    for _ in range(5000):
        pattern = "".join(
            rng.choice(atoms) + rng.choice(repeats) if rng.random() < 0.7 else rng.choice(groups)
            for _ in range(rng.randrange(1, 6))
        )
        pattern += rng.choice(["", "", "|a", "|"])
        text = "".join(rng.choice("ab.1cx") for _ in range(rng.randrange(8)))
        assert Pattern(pattern).matches_start(text) == (re.match(pattern, text) is not None), (pattern, text)


@pytest.mark.parametrize("pattern", [".?" * 40 + "X", ".*" * 40 + "X", "a*" * 200 + "b", "(a|a|a)" * 30 + "X"])
def test_no_pattern_takes_long(pattern):
    start = time.perf_counter()
    assert not Pattern(pattern).matches_start("a" * 1000)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?=a)", "(?P<n>a)", r"\bq", "(?i)q", "(a+)+b", "a{4000}", "(?>a)"])
def test_patterns_that_names_do_not_need(pattern):
    with pytest.raises(NotImplementedError, match="the pattern"):
        Pattern(pattern)


@pytest.mark.parametrize("pattern", ["[", "(", "a**", ")", "(" * 2000])
def test_no_patterns(pattern):
    with pytest.raises((FormatError, NotImplementedError), match="pattern"):
        Pattern(pattern)
