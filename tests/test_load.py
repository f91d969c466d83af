# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: what transformers writes is read back bit for bit; damaged and hostile files are refused."""

import json
import os
import random
import re
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gemma4.errors import FormatError, StateError
from gemma4.load import huggingface, open_checkpoint, shipped_models
from gemma4.load.safetensors import DTYPES, SafetensorsFile, parse_header

F, S = "full_attention", "sliding_attention"
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "sliding_window": 5,
    "layer_types": [S, F, S, F, S, F],
    "final_logit_softcapping": 30.0,
}
MOE = TINY | {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 16,
}


def make_model(kind, text, seed=0):
    torch = pytest.importorskip("torch")
    import transformers as t

    torch.manual_seed(seed)
    if kind == "text":
        return t.Gemma4ForCausalLM(t.Gemma4TextConfig(**text))
    return t.Gemma4ForConditionalGeneration(t.Gemma4Config(text_config=dict(text), vision_config=TOWER))


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8).tobytes()


def write_safetensors(path, tensors, header=None, pad=b""):
    """tensors: name -> (dtype, shape, bytes). header overrides the JSON; pad follows it."""
    table, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = (json.dumps(table) if header is None else header).encode() + pad
    Path(path).write_bytes(struct.pack("<Q", len(head)) + head + data)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small multimodal checkpoint in one bf16 file. Copy it (`clone`) before damaging it."""
    torch = pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("tiny")
    make_model("multimodal", TINY).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    make_model("text", TINY).save_pretrained(path, max_shard_size="40KB")
    return path


@pytest.fixture
def clone(tmp_path):
    def copy(source):
        for file in source.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copy


# -- what transformers writes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "text"), [("text", TINY), ("text", MOE), ("multimodal", TINY), ("multimodal", MOE)])
@pytest.mark.parametrize("shard", [None, "40KB"])
def test_round_trip(tmp_path, kind, text, dtype, shard):
    torch = pytest.importorskip("torch")
    model = make_model(kind, text).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shard else (tmp_path / "model.safetensors").is_file()
    state = model.state_dict()
    prefix = "model." if kind == "text" else "model.language_model."
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        wanted = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert set(checkpoint.engine_tensors) == set(wanted)
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        for name, (stored, shape, buffer, offset) in checkpoint.engine_tensors.items():
            assert (stored, shape) == (code, tuple(wanted[name].shape))
            raw = bits(wanted[name].contiguous().view(torch.uint8).numpy())
            assert bytes(memoryview(buffer)[offset : offset + len(raw)]) == raw
            array = checkpoint.tensors[prefix + name]
            assert array.dtype == DTYPES[code][1] and array.shape == shape and bits(array) == raw
            assert not array.flags.writeable and not array.flags.owndata
        assert checkpoint.n_parameters == sum(v.numel() for v in wanted.values())
        assert checkpoint.dtypes == {code: checkpoint.n_parameters}
        assert all("tower" in name or "embed_vision" in name for name in checkpoint.ignored)
        assert (kind == "text") == (not checkpoint.ignored)
        assert checkpoint.engine_config["embed_scale"] == float(DTYPES[code][1].type(np.float32(32**0.5)))
        assert checkpoint.total_bytes == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))


def test_untied_head(tmp_path):
    model = make_model("text", TINY | {"tie_word_embeddings": False})
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert not checkpoint.config.tied and checkpoint.engine_tensors["lm_head.weight"][1] == (96, 32)
        assert np.array_equal(checkpoint.tensors["lm_head.weight"], model.lm_head.weight.detach().numpy())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with open_checkpoint(tmp_path) as checkpoint:  # a head that differs from its table is used, whatever the file says
        assert not checkpoint.config.tied and "lm_head.weight" in checkpoint.engine_tensors and not checkpoint.ignored


def test_untied_head_missing(clone, tiny):
    path = clone(tiny)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(FormatError, match=r"lm_head\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize("prefix", ["", "language_model.", "language_model.model.", "model.", "model.language_model."])
def test_prefixes_and_dead_tensors(tmp_path, prefix):
    """Every known layout; keys and values of sharing layers in the file are dropped (as in the real E2B and E4B)."""
    model = make_model("text", TINY)
    tensors = {prefix + k.removeprefix("model."): v.numpy() for k, v in model.model.state_dict().items()}
    dead = {
        f"{prefix}layers.5.self_attn.{n}.weight": np.ones((2, 3), np.float32) for n in ("k_proj", "v_proj", "k_norm")
    }
    raw = {k: ("F32", v.shape, v.tobytes()) for k, v in (tensors | dead).items()}
    write_safetensors(tmp_path / "model.safetensors", raw)
    model.config.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.ignored) == set(dead)
        assert not any("layers.5.self_attn.k" in name for name in checkpoint.engine_tensors)
        assert np.array_equal(checkpoint.tensors[f"{prefix}layers.5.self_attn.k_proj.weight"], np.ones((2, 3)))
        assert len(checkpoint.tensors) == len(raw) and set(checkpoint.tensors) == set(raw)


def test_progress_and_side_files(sharded):
    calls = []
    with open_checkpoint(str(sharded), progress=lambda *a: calls.append(a)) as checkpoint:
        n = len(list(sharded.glob("*.safetensors")))
        assert [c[0] for c in calls] == list(range(n + 1)) and {c[1] for c in calls} == {n}
        assert checkpoint.generation_config == json.loads((sharded / "generation_config.json").read_text())
        assert checkpoint.tokenizer_path is None and "sharded" in repr(checkpoint)
        (sharded / "tokenizer.json").write_text("{}")
    with open_checkpoint(sharded) as checkpoint:
        assert checkpoint.tokenizer_path == sharded / "tokenizer.json"
    (sharded / "tokenizer.json").unlink()


def test_unaligned_data_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for pad in range(4):
        path = tmp_path / f"{pad}.safetensors"
        write_safetensors(path, {"a": ("F32", (2, 3), values.tobytes())}, pad=b" " * pad)
        assert np.array_equal(SafetensorsFile(path).array("a"), values)


def test_every_dtype_and_empty_tensors(tmp_path):
    shapes = {name: ("F4" in name or "F6" in name) * 4 + 4 for name in DTYPES}
    tensors = {n: (n, (shapes[n],), bytes(shapes[n] * DTYPES[n][0] // 8)) for n in DTYPES}
    tensors |= {"scalar": ("F32", (), struct.pack("<f", 7)), "none": ("BF16", (0, 5), b"")}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.array("BF16").dtype == ml_dtypes.bfloat16 and file.array("F4").dtype == np.uint8
    assert file.array("scalar") == 7 and file.array("none").shape == (0, 5)
    assert not any(file.array(name).flags.writeable for name in tensors)


def test_arrays_outlive_close(tiny):
    checkpoint = open_checkpoint(tiny)
    array = checkpoint.tensors["model.language_model.norm.weight"]
    before = bits(array)
    checkpoint.close()
    checkpoint.close()
    assert bits(array) == before
    with pytest.raises(StateError, match="closed"):
        checkpoint.check()
    with pytest.raises(StateError, match="closed"):
        checkpoint.tensors["model.language_model.norm.weight"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_advice_on_pages(tmp_path):
    big = bytes(1 << 20)
    write_safetensors(tmp_path / "x.safetensors", {"a": ("U8", (1 << 20,), big), "table": ("U8", (1 << 20,), big)})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    file.advise_random("table")
    maps = re.findall(r"^[0-9a-f]+-[0-9a-f]+ (.*?)^VmFlags:(.*?)$", Path("/proc/self/smaps").read_text(), re.M | re.S)
    flags = [set(flags.split()) for where, flags in maps if str(tmp_path) in where]
    assert any("rr" in f for f in flags) and not all("rr" in f for f in flags)
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert any("hg" in f for f in flags)
        assert all("nh" in f and "hg" not in f for f in flags if "rr" in f)
    assert file.array("table")[-1] == 0


# -- where models are looked for ---------------------------------------------------------------------------------------


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in (
        "no-such-model",
        "google/gemma-4-E2B-it",
        "a/../b",
        "a/b/c",
        "x" * 300,
        "~nobody-here/x",
        "a\0b",
        str(tmp_path / "absent"),
    ):
        with pytest.raises(FileNotFoundError, match="shipped models") as caught:
            open_checkpoint(name)
        assert all(shipped in str(caught.value) for shipped in shipped_models())


def test_hub_cache_is_used_offline(tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--google--gemma-4-test"
    for revision in ("old", "new"):
        (repo / "snapshots" / revision).mkdir(parents=True)
        for file in tiny.iterdir():
            os.symlink(file, repo / "snapshots" / revision / file.name)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("old")
    with open_checkpoint("google/gemma-4-test") as checkpoint:
        assert checkpoint.path.name == "old" and checkpoint.n_parameters > 0


def test_shipped_name(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(huggingface, "PRETRAINED", tmp_path)
    os.symlink(tiny, tmp_path / "tiny-x")
    assert huggingface.shipped_models() == ["tiny-x"]
    with open_checkpoint("tiny-x") as checkpoint:
        assert checkpoint.config.n_layers == 6


def test_gguf_and_plain_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.gguf"):
        open_checkpoint(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"give the \.gguf file itself: model\.gguf"):
            open_checkpoint(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "gemma4_text"}')
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="directory"):
        open_checkpoint(tmp_path / "weights.safetensors")


# -- damaged directories -----------------------------------------------------------------------------------------------


def test_no_config_no_weights(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*never read"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": ' * 50_000, "\x00", "1" * 10_000, "\ufffe"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_json(clone, tiny, name, text):
    path = clone(tiny)
    (path / name).write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    with pytest.raises(FormatError, match=re.escape(name)):
        open_checkpoint(path)


def test_unknown_architecture(clone, tiny):
    path = clone(tiny)
    (path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NotImplementedError, match=r"llama.*gemma4_unified"):
        open_checkpoint(path)


def test_missing_shard(clone, sharded):
    path = clone(sharded)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = sorted(set(index.values()))[1]
    (path / lost).unlink()
    held = [name for name, file in index.items() if file == lost]
    with pytest.raises(FileNotFoundError, match=re.escape(lost)) as caught:
        open_checkpoint(path)
    assert held[0] in str(caught.value) and f"{len(held)} tensors" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        7,
        None,
        "a\\b.safetensors",
        "C:x",
        "x\x00y",
        "\n",
    ],
)
def test_index_cannot_lead_elsewhere(clone, sharded, name):
    path = clone(sharded)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = name
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="plain file name"):
        open_checkpoint(path)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_bad_weight_map(clone, sharded, weight_map):
    path = clone(sharded)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="weight_map"):
        open_checkpoint(path)


def test_index_and_shards_disagree(clone, sharded):
    path = clone(sharded)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.extra.weight"] = shards[0]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint(path).close()  # nobody needs it
    del index["weight_map"]["model.extra.weight"]
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / shards[1]).write_bytes((path / shards[0]).read_bytes())  # the same tensors twice
    with pytest.raises(FormatError):
        open_checkpoint(path)


def damaged(tiny, edit):
    """The tiny checkpoint's file with `edit(header table)` applied."""
    raw = (tiny / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + n])
    edit(table)
    head = json.dumps(table).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + n :]


NORM = "model.language_model.norm.weight"


def test_wrong_shape_dtype_and_missing_tensor(clone, tiny):
    path = clone(tiny)

    def opened(edit):
        (path / "model.safetensors").write_bytes(damaged(tiny, edit))
        open_checkpoint(path)

    with pytest.raises(FormatError, match=r"norm\.weight has shape \[4, 8\].*asks for \[32\]"):
        opened(lambda t: t[NORM].update(shape=[4, 8]))
    with pytest.raises(NotImplementedError, match=r"norm\.weight is I16.*F32, F16, BF16"):
        opened(lambda t: t[NORM].update(dtype="I16"))
    with pytest.raises(FormatError, match=r"norm\.weight, which a gemma4 of 6 layers needs"):
        opened(lambda t: t.update({"model.other": t.pop(NORM)}))
    with pytest.raises(FormatError, match=r"q_proj\.weight_packed.*quantised"):
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        opened(lambda t: t.update({name + "_packed": t.pop(name)}))
    with pytest.raises(FormatError, match="no Gemma 4 text decoder"):
        opened(lambda t: t.update({"x": t.pop("model.language_model.embed_tokens.weight")}))


def test_truncated_file(clone, tiny):
    path = clone(tiny)
    raw = (tiny / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    for size in (0, 7, 8, 8 + n // 2, 8 + n, len(raw) - 1):
        (path / "model.safetensors").write_bytes(raw[:size])
        with pytest.raises(FormatError, match=r"truncated|at least 8"):
            open_checkpoint(path)
    (path / "model.safetensors").write_bytes(raw + b"\0")
    with pytest.raises(FormatError, match="after the last tensor"):
        open_checkpoint(path)


def test_files_changed_while_open(clone, tiny):
    """A read past the end of a truncated map would be SIGBUS; `check` makes it an exception beforehand."""
    path = clone(tiny)
    file = path / "model.safetensors"
    raw = file.read_bytes()

    def opened():
        file.unlink()
        file.write_bytes(raw)
        return open_checkpoint(path)

    checkpoint = opened()
    os.truncate(file, 5000)
    with pytest.raises(FormatError, match=r"changed size.*to 5000 bytes"):
        checkpoint.check()
    checkpoint = opened()
    with open(file, "r+b") as f:
        f.seek(len(raw) - 1)
        f.write(b"\1")
    os.utime(file, ns=(1, 1))
    with pytest.raises(FormatError, match="written to"):
        checkpoint.check()
    checkpoint = opened()
    (path / "other").write_bytes(raw)
    os.replace(path / "other", file)
    with pytest.raises(FormatError, match="replaced"):
        checkpoint.check()
    checkpoint = opened()
    file.unlink()
    checkpoint.check()  # a deleted file stays mapped


# -- hostile headers ---------------------------------------------------------------------------------------------------


def entry(name, dtype, shape, begin, end):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'  # and 8 bytes of data
HOSTILE = {
    "empty": "",
    "not json": "{",
    "array": "[]",
    "string": '"x"',
    "nan": '{"a":NaN}',
    "number": "1",
    "deep": '{"a":' * 100_000,
    "deep list": "[" * 500_000,
    "huge int": '{"a":' + "9" * 10_000 + "}",
    "duplicate": "{" + entry("a", "F32", [1], 0, 4) + "," + entry("a", "F32", [1], 4, 8) + "}",
    "duplicate inside": ONE.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F32"'),
    "metadata type": '{"__metadata__":{"x":1},' + ONE[1:],
    "metadata list": '{"__metadata__":[],' + ONE[1:],
    "entry type": '{"a":[]}',
    "entry null": '{"a":null}',
    "extra key": ONE.replace('"shape"', '"x":1,"shape"'),
    "no dtype": '{"a":{"shape":[2],"data_offsets":[0,8]}}',
    "no shape": '{"a":{"dtype":"F32","data_offsets":[0,8]}}',
    "no offsets": '{"a":{"dtype":"F32","shape":[2]}}',
    "dtype": ONE.replace("F32", "F33"),
    "dtype type": ONE.replace('"F32"', "32"),
    "dtype list": ONE.replace('"F32"', '["F32"]'),
    "empty name": ONE.replace('"a"', '""'),
    "long name": ONE.replace('"a"', '"' + "a" * 5000 + '"'),
    "negative dim": ONE.replace("[2]", "[-2]"),
    "two negative dims": ONE.replace("[2]", "[-1,-2]"),
    "float dim": ONE.replace("[2]", "[2.0]"),
    "bool dim": ONE.replace("[2]", "[true,2]"),
    "null dim": ONE.replace("[2]", "[null]"),
    "shape type": ONE.replace("[2]", "2"),
    "many dims": ONE.replace("[2]", str([1] * 64 + [2])),
    "wrong size": ONE.replace("[2]", "[3]"),
    "overflow to fit": ONE.replace("[2]", "[4294967296,4294967296,2]"),
    "2^64 elements": ONE.replace("[2]", "[18446744073709551616]"),
    "2^62 elements": ONE.replace("[2]", "[4611686018427387906]"),  # × 4 bytes wraps to 8
    "zero and huge": ONE.replace("[2]", "[0,9223372036854775807]"),
    "backwards": ONE.replace("[0,8]", "[8,0]"),
    "negative offset": ONE.replace("[0,8]", "[-8,0]"),
    "three offsets": ONE.replace("[0,8]", "[0,8,8]"),
    "one offset": ONE.replace("[0,8]", "[8]"),
    "offset type": ONE.replace("[0,8]", '["0","8"]'),
    "past the end": ONE.replace("[0,8]", "[4,12]"),
    "far past the end": ONE.replace("[0,8]", "[1099511627776,1099511627784]"),
    "hole at start": "{" + entry("a", "F32", [1], 4, 8) + "}",
    "hole at end": "{" + entry("a", "F32", [1], 0, 4) + "}",
    "hole between": "{" + entry("a", "I8", [2], 0, 2) + "," + entry("b", "I8", [2], 6, 8) + "}",
    "overlap": "{" + entry("a", "I8", [6], 0, 6) + "," + entry("b", "I8", [4], 4, 8) + "}",
    "same bytes twice": "{" + entry("a", "F32", [2], 0, 8) + "," + entry("b", "F32", [2], 0, 8) + "}",
    "odd bits": "{" + entry("a", "F4", [15], 0, 8) + "}",
    "no tensors": "{}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(tmp_path, name):
    assert parse_header(ONE.encode(), 8 + len(ONE) + 8)[0]["a"].shape == (2,)
    head = HOSTILE[name].encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    assert "x.safetensors" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("head", [b"\xff\xfe{}", b'{"\xc3":1}', b"\xef\xbb\xbf{}", b"\0" * 64])
def test_header_that_is_no_utf8_json(head):
    with pytest.raises(FormatError):
        parse_header(head, 8 + len(head))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 1 << 32, 64])
def test_header_length_is_checked_before_it_is_read(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FormatError, match=r"claims"):
        SafetensorsFile(path)


def mutate(rng, head):
    """One random edit: a byte, a cut, a repeat, a number or a piece of JSON swapped in."""
    at = rng.randrange(len(head))
    choice = rng.randrange(5)
    if choice == 0:
        return head[:at] + bytes([rng.randrange(256)]) + head[at + 1 :]
    if choice == 1:
        return head[:at] + head[at + rng.randrange(1, 9) :]
    if choice == 2:
        end = at + rng.randrange(1, 60)
        return head[:end] + head[at:]
    if choice == 3:
        numbers = [m.span() for m in re.finditer(rb"\d+", head)]
        start, stop = rng.choice(numbers) if numbers else (at, at)
        value = rng.choice([0, 1, 2, 3, 8, 16, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**40])
        return head[:start] + str(value).encode() + head[stop:]
    return head[:at] + rng.choice([b"[]", b"{}", b"null", b"-1", b"1e9", b'"', b"\\u0000", b",", b"[[[["]) + head[at:]


def test_random_headers_never_crash(tmp_path):
    """5,000 mutated headers: each is read, and then describes the file exactly, or is a FormatError."""
    rng = random.Random(4)
    data = bytes(range(64))
    tensors = {
        "w": ("F32", (2, 4), data[:32]),
        "layers.0.b": ("BF16", (8,), data[32:48]),
        "c": ("I8", (4, 4), data[48:]),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    raw = path.read_bytes()
    good = raw[8:-64]
    accepted = 0
    for _ in range(5000):
        head = good
        for _ in range(rng.choice((1, 1, 2, 4))):
            head = mutate(rng, head) or good
        size = 8 + len(head) + 64
        try:
            infos, _ = parse_header(head, size)
        except FormatError:
            continue
        accepted += 1
        assert sum(i.nbytes for i in infos.values()) == 64
        assert all(i.offset >= 8 + len(head) and i.offset + i.nbytes <= size for i in infos.values())
        path.write_bytes(struct.pack("<Q", len(head)) + head + data)
        file = SafetensorsFile(path)
        assert b"".join(bits(file.array(n)) for n in file.tensors) == data
        file.close()
    assert 20 < accepted < 4000
