# SPDX-License-Identifier: Apache-2.0
"""Writing GGUF files: the bytes of each type, the choice of types, the file as others read it, and what it costs."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_files import convert, gguf, vocabulary_of
from safetensors.numpy import load_file, save_file
from small_models import E_LIKE, MOE_LIKE, write_checkpoint

import gemma4
from gemma4.cli import main
from gemma4.errors import FormatError
from gemma4.load import open_checkpoint
from gemma4.load.dtypes import ENGINE_DTYPES, PLAIN
from gemma4.load.gguf import GgufFile
from gemma4.quantization import KINDS, compare, sample_ids
from gemma4.quantization import convert as convert_module
from gemma4.quantization.codec import CAN_WRITE, pack_rows, unpack_rows
from gemma4.quantization.metadata import _tokens
from gemma4.quantization.plan import plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from train_tiny.evaluate import generators, held_out  # noqa: E402
from train_tiny.mixture import tokenize  # noqa: E402

BIN = Path(os.environ.get("GEMMA4_LLAMACPP", "/nonexistent")) / "build" / "bin"
BLOCKS = [name for name in CAN_WRITE if name not in PLAIN]
NAMES = ("tiny-e", "tiny-moe")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model, type) -> what `gemma4.quantize` made of it, each made once."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def get(name, kind):
        if (name, kind) not in made:
            made[name, kind] = gemma4.quantize(name, folder / f"{name}-{kind}.gguf", type=kind)
        return made[name, kind]

    return get


def checkpoint_of(folder, config):
    """`write_checkpoint`, with the head under its own name if it is not tied."""
    write_checkpoint(folder, config)
    stored = load_file(folder / "model.safetensors")
    renamed = {"lm_head.weight" if k == "model.lm_head.weight" else k: v for k, v in stored.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name != "cache")


# -- the bytes ---------------------------------------------------------------------------------------------------------


def awkward_rows():
    """float32 [n, 256] with zeros, ties, constants, one value, huge and tiny ones, one sign only."""
    rng = np.random.default_rng(3)
    normal = rng.standard_normal((40, 256)).astype(np.float32)
    one = np.zeros((3, 256), np.float32)
    one[0, 17], one[1, 255], one[2, 100] = 3, -2, 1e-3
    halves = rng.integers(-16, 17, (6, 256)).astype(np.float32) / 2
    special = [np.zeros((1, 256)), np.full((1, 256), 0.3), np.full((1, 256), -0.3), one, halves]
    return np.concatenate(
        [
            normal,
            *special,
            np.abs(normal[:4]),
            -np.abs(normal[:4]),
            normal[:4] * 1e3,
            normal[:4] * 1e-3,
            normal[:4] ** 5,
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_bytes_of_the_reference(dtype):
    x = awkward_rows()
    kind = gguf.GGMLQuantizationType[dtype]
    assert np.array_equal(pack_rows(dtype, x), gguf.quants.quantize(x, kind).view(np.uint8))


# RMSE that ggml's own quantisers (ggml_quantize_chunk, without an importance matrix) leave on these very numbers
GGML_RMSE = {
    "Q8_0": 0.005322, "Q4_0": 0.085524, "Q4_1": 0.077712, "Q5_0": 0.042448, "Q5_1": 0.037696, "IQ4_NL": 0.075577,
    "IQ4_XS": 0.076155, "MXFP4": 0.114378, "Q2_K": 0.296564, "Q3_K": 0.149879, "Q4_K": 0.070959, "Q5_K": 0.035887,
    "Q6_K": 0.017575,
}  # fmt: skip


@pytest.mark.parametrize("dtype", BLOCKS)
def test_error_is_that_of_the_reference(dtype):
    x = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    error = np.sqrt(np.mean((unpack_rows(dtype, pack_rows(dtype, x), 1024) - x) ** 2))
    assert error <= 1.02 * GGML_RMSE[dtype]
    assert error >= 0.9 * GGML_RMSE[dtype]  # or the bits were spent otherwise than the type allows


@pytest.mark.parametrize("dtype", BLOCKS)
def test_decodes_as_the_gguf_package_decodes(dtype):
    x = awkward_rows()
    packed = pack_rows(dtype, x)
    assert packed.shape == (len(x), 256 // ENGINE_DTYPES[dtype].elements * ENGINE_DTYPES[dtype].nbytes)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[dtype])
    assert np.array_equal(unpack_rows(dtype, packed, 256), theirs)


@pytest.mark.parametrize("dtype", BLOCKS)
def test_awkward_values(dtype):
    """Zeros stay zeros, and no value is further off than the steps of its type over the row's range."""
    x = awkward_rows()
    y = unpack_rows(dtype, pack_rows(dtype, x), 256)
    assert np.isfinite(y).all() and not y[(x == 0).all(1)].any()
    bits = {"Q2_K": 2, "Q3_K": 3, "MXFP4": 3}.get(dtype, int(dtype[1]) if dtype[0] == "Q" else 4)
    span = np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)
    worst = np.abs(y - x).max(1)
    normal = slice(0, 40)
    assert (worst[normal] <= 1.5 * span[normal] / 2**bits).all()
    assert (worst <= 3 * span / 2**bits + 1e-6).all()


@pytest.mark.parametrize("dtype", BLOCKS)
def test_rows_are_packed_one_by_one(dtype):
    x = awkward_rows()[:7]
    together = pack_rows(dtype, x)
    assert np.array_equal(together, np.concatenate([pack_rows(dtype, x[i : i + 1]) for i in range(7)]))
    with pytest.raises(FormatError, match="whole number"):
        pack_rows(dtype, x[:, : 256 - 8])


# -- which type --------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 64, "vocab_size_per_layer_input": 64}


def types(folder, config, kind, **overrides):
    with open_checkpoint(checkpoint_of(folder, config)) as checkpoint:
        planned, notes = plan(checkpoint, kind, overrides)
    return {tensor.name: tensor.dtype for tensor in planned}, notes


def layers_of(found, name, dtype):
    return [i for i in range(6) if found.get(f"blk.{i}.{name}.weight") == dtype]


def test_mixes_are_those_of_llama_quantize(tmp_path):
    """As its own log shows them for such a model."""
    config = E_LIKE | WIDE | {"hidden_size_per_layer_input": 256, "head_dim": 64, "global_head_dim": 128}
    found, notes = types(tmp_path / "a", config, "Q4_K_M")
    assert not notes
    assert layers_of(found, "ffn_down", "Q6_K") == [2, 5] and layers_of(found, "ffn_down", "Q4_K") == [0, 1, 3, 4]
    assert layers_of(found, "attn_v", "Q6_K") == [2, 3] and layers_of(found, "attn_v", "Q4_K") == [0, 1]
    assert found["token_embd.weight"] == found["per_layer_token_embd.weight"] == "Q6_K"
    assert found["per_layer_model_proj.weight"] == "BF16"
    assert {found[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up", "inp_gate", "proj")} == {"Q4_K"}
    found, _ = types(tmp_path / "b", config, "Q4_K_S")
    assert layers_of(found, "attn_v", "Q5_K") == [0, 1, 2, 3] and not layers_of(found, "ffn_down", "Q5_K")
    found, _ = types(tmp_path / "c", config, "Q5_K_M")
    assert layers_of(found, "ffn_down", "Q6_K") == [2, 5] and found["blk.0.ffn_up.weight"] == "Q5_K"
    found, _ = types(tmp_path / "d", config, "Q5_K_S")
    assert set(found.values()) == {"F32", "BF16", "Q5_K", "Q6_K"} and not layers_of(found, "ffn_down", "Q6_K")


def test_untied_head_and_experts(tmp_path):
    config = MOE_LIKE | WIDE | {"tie_word_embeddings": False, "moe_intermediate_size": 256}
    found, _ = types(tmp_path, config, "Q4_K_M")
    assert found["output.weight"] == "Q6_K" and found["token_embd.weight"] == "Q4_K"
    assert layers_of(found, "ffn_down_exps", "Q6_K") == [2, 5] and found["blk.0.ffn_gate_up_exps.weight"] == "Q4_K"
    f32 = {name.split(".", 2)[-1] for name, dtype in found.items() if dtype == "F32"}
    assert {"ffn_gate_inp.weight", "ffn_gate_inp.scale", "ffn_down_exps.scale", "layer_output_scale.weight"} < f32


def test_rows_that_do_not_fit(tmp_path):
    config = E_LIKE | WIDE | {"hidden_size": 96, "head_dim": 20}
    for kind, instead in {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.items():
        found, notes = types(tmp_path / kind, config, kind)
        assert found["blk.0.ffn_up.weight"] == instead and found["blk.0.ffn_down.weight"] == kind
        assert found["blk.0.attn_output.weight"] == "BF16"  # rows of 80
        assert any(f"{instead} instead of {kind}, as rows of 96" in note for note in notes)
        assert any(f"BF16 instead of {kind}, as rows of 80" in note for note in notes)
    found, notes = types(tmp_path / "plain", config, "F16")
    assert not notes and set(found.values()) == {"F16", "F32"}


def test_overrides(tmp_path):
    config = E_LIKE | WIDE
    found, _ = types(
        tmp_path,
        config,
        "q4_0",
        **{"blk.0.*": "Q8_0", "blk.0.ffn_up": "f16", "token_embd": "Q6_K", "attn_[qk]": "Q5_0"},
    )
    assert found["token_embd.weight"] == "Q6_K" and found["per_layer_token_embd.weight"] == "Q4_0"
    assert found["blk.0.ffn_up.weight"] == "F16" and found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["blk.0.attn_q.weight"] == found["blk.5.attn_q.weight"] == "Q5_0"
    assert found["blk.0.attn_norm.weight"] == "F32" and found["blk.1.ffn_up.weight"] == "Q4_0"


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_unquantised_files_give_the_same_bits(files, name):
    theirs = gemma4.load(name, precision="exact")
    ours = gemma4.load(files(name, "BF16").path, precision="exact")
    ids = theirs.to_tokens("Once upon a time there was a fox. When Mary and John went to the store, John gave" * 2)
    assert np.array_equal(ours.forward(ids), theirs.forward(ids))
    assert np.array_equal(
        ours.to_tokens("The cat, 12 dogs\n\n sat.<turn|>"), theirs.to_tokens("The cat, 12 dogs\n\n sat.<turn|>")
    )
    assert ours.chat_template.source == theirs.chat_template.source
    assert ours.checkpoint.generation_config == theirs.checkpoint.generation_config
    assert not ours.checkpoint.quantised


@pytest.mark.parametrize("name", NAMES)
def test_file_is_what_the_converter_writes(files, tmp_path, name):
    """Keys, types and tensors of a file that the gguf package wrote under the converter's conventions."""
    ours, theirs = GgufFile(files(name, "BF16").path), GgufFile(convert(name, tmp_path / "x.gguf"))
    own = {"general.type", "general.name", "general.file_type", "general.quantization_version",
           "tokenizer.ggml.eot_token_id"}  # fmt: skip
    assert set(ours.metadata) == set(theirs.metadata) | own
    reader = [gguf.GGUFReader(file.path).fields for file in (ours, theirs)]
    for key in theirs.metadata:
        a, b = (fields[key] for fields in reader)
        assert a.types == b.types and a.contents() == b.contents(), key
    assert set(ours.tensors) == set(theirs.tensors)
    for tensor in theirs.tensors:
        if tensor != "per_layer_model_proj.weight":
            assert ours.tensors[tensor].dtype == theirs.tensors[tensor].dtype
        assert np.array_equal(ours.array(tensor), theirs.array(tensor)), tensor


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("name", NAMES)
def test_result_says_what_is_in_the_file(files, name, kind):
    result = files(name, kind)
    source, written = gemma4.load(name), gemma4.load(result.path)
    assert result.nbytes == result.path.stat().st_size == written.checkpoint.total_bytes
    assert written.checkpoint.quantised and written.checkpoint.n_parameters == source.checkpoint.n_parameters
    file = GgufFile(result.path)
    assert [(t.name, t.dtype, t.nbytes) for t in result.tensors] == [
        (info.name, info.dtype, info.nbytes) for info in file.tensors.values()
    ]
    by_name = {t.name: t for t in result.tensors}
    from gemma4.load.gguf_config import stored_name

    for tensor in source.checkpoint.engine_tensors:
        error = np.sqrt(np.mean((written.weight(tensor) - source.weight(tensor)).astype(np.float64) ** 2))
        assert by_name[stored_name(tensor)].rmse == pytest.approx(error, rel=1e-4, abs=1e-12), tensor
    rows = {row.dtype: row for row in result.by_type()}
    assert sum(row.n_tensors for row in rows.values()) == len(result.tensors)
    assert rows["F32"].rmse == 0 and rows["Q8_0" if kind == "Q4_K_M" else kind].relative_error > 0.001
    text = str(result)
    assert str(result.path) in text and all(dtype in text for dtype in rows) and "bits per weight" in text


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("Q8_0", "Q4_0", "Q4_K_M", "BF16")])
def test_every_type_loads(files, kind):
    source, model = gemma4.load("tiny-e"), gemma4.load(files("tiny-e", kind).path)
    found = compare(source, model, "Once upon a time there was a little fox who lived in the forest.")
    assert found.kl_mean < (1.5 if kind in ("Q2_K", "MXFP4") else 0.5)
    wanted = {"F32": "F32", "F16": "F16"}.get(kind)
    assert wanted is None or set(model.checkpoint.dtypes) <= {wanted, "F32"}


@pytest.mark.parametrize("name", NAMES)
def test_skills_survive(files, name):
    """On held-out examples of every skill that is text."""
    source, model = gemma4.load(name), gemma4.load(files(name, "Q8_0").path)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source.checkpoint.tokenizer_path))
    skills = [skill for skill in sorted(generators(tokenizer)) if skill != "induction"]  # random tokens
    docs = [tokenize(example, tokenizer).ids for skill in skills for example in held_out(skill, tokenizer, 4)]
    found = [compare(source, model, ids) for ids in docs]
    n = np.array([c.n_positions for c in found])
    assert n.sum() > 2000
    assert np.dot(n, [c.kl_mean for c in found]) / n.sum() <= 1e-3
    assert np.dot(n, [c.top1_agreement for c in found]) / n.sum() >= 0.99


def test_from_an_unquantised_gguf(files, tmp_path):
    wanted = GgufFile(files("tiny-e", "Q4_K_M").path)
    whole = convert("tiny-e", tmp_path / "whole.gguf", keys={"general.alignment": 64, "some.key": 1.5})
    convert("tiny-e", tmp_path / "m.gguf", part_tensors=70)
    for source in (whole, min(tmp_path.glob("m-*.gguf"))):
        path = gemma4.quantize(source, tmp_path / "out.gguf", type="Q4_K_M", force=True).path
        found = GgufFile(path)
        for tensor, info in wanted.tensors.items():
            if tensor != "per_layer_model_proj.weight":
                assert info.dtype == found.tensors[tensor].dtype
            assert np.array_equal(wanted.array(tensor), found.array(tensor))
        assert not [key for key in found.metadata if key.startswith("split.") or key == "general.alignment"]
        ours, theirs = gemma4.load(path), gemma4.load("tiny-e")
        assert np.array_equal(ours.to_tokens("A fox."), theirs.to_tokens("A fox."))
    assert GgufFile(gemma4.quantize(whole, path, type="F32", force=True).path).metadata["some.key"] == 1.5


def test_experts_apart_stay_apart(files, tmp_path):
    source = convert("tiny-moe", tmp_path / "apart.gguf", apart=True)
    ours = gemma4.load(gemma4.quantize(source, tmp_path / "out.gguf", type="Q8_0").path, precision="exact")
    theirs = gemma4.load(files("tiny-moe", "Q8_0").path, precision="exact")
    ids = np.arange(500, 540)
    assert "blk.0.ffn_up_exps.weight" in ours.tensors and np.array_equal(ours.forward(ids), theirs.forward(ids))


@pytest.mark.parametrize("config", [E_LIKE, MOE_LIKE, MOE_LIKE | {"tie_word_embeddings": False}, E_LIKE | {
    "layer_types": ["full_attention"] * 6, "num_kv_shared_layers": 0, "final_logit_softcapping": None}])  # fmt: skip
def test_without_a_tokenizer(tmp_path, config):
    source = checkpoint_of(tmp_path / "hf", config)
    result = gemma4.quantize(source, tmp_path / "x.gguf", type="Q4_0")
    assert result.notes and GgufFile(result.path).metadata["gemma4.vocab_size"] == 320
    ours = gemma4.load(gemma4.quantize(source, tmp_path / "y.gguf", type="bf16").path)
    ids = np.arange(40)
    assert np.array_equal(ours.forward(ids), gemma4.load(source).forward(ids))


def edited_tokenizer(folder, change):
    with open_checkpoint("tiny-e") as source:
        shutil.copytree(source.path, folder)
    table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(table)
    (folder / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def test_rows_without_a_token(tmp_path):
    """The last token is gone: its row gets a name, so that there are as many tokens as rows."""

    def change(table):
        last = table["added_tokens"].pop()
        table["model"]["vocab"].pop(last["content"], None)

    source = edited_tokenizer(tmp_path / "hf", change)
    model = gemma4.load(gemma4.quantize(source, tmp_path / "x.gguf", type="Q8_0").path)
    assert len(model.tokenizer) == model.d_vocab
    assert model.tokenizer.id_to_piece(model.d_vocab - 1) == f"[PAD{model.d_vocab - 1}]"
    assert np.array_equal(model.to_tokens("A fox."), gemma4.load("tiny-e").to_tokens("A fox."))


def test_tokenizers_that_do_not_fit(tmp_path):
    random = write_checkpoint(tmp_path / "hf", E_LIKE)
    with open_checkpoint("tiny-e") as source:
        shutil.copy(source.path / "tokenizer.json", random)
    with pytest.raises(FormatError, match="below the model's 320"):
        gemma4.quantize(random, tmp_path / "x.gguf", type="Q8_0")

    def spaced(table):
        table["model"]["vocab"] |= {"a b": 400, "a bc": 401}
        table["model"]["merges"].append(["a b", "c"])

    with pytest.raises((NotImplementedError, FormatError), match=r"space|different"):
        gemma4.quantize(edited_tokenizer(tmp_path / "spaced", spaced), tmp_path / "x.gguf", type="Q8_0")
    assert leftovers(tmp_path) == ["hf", "spaced"]


@pytest.mark.slow
def test_real_vocabulary_has_the_converter_s_token_types():
    import lzma

    table = json.loads(lzma.decompress((Path(__file__).parent / "data" / "tokenizer.json.xz").read_bytes()))
    added = {token["content"]: token for token in table["added_tokens"]}
    ids = table["model"]["vocab"] | {text: token["id"] for text, token in added.items()}
    tokens, kinds = _tokens(ids, added, 262_144, "x")
    theirs = vocabulary_of(table)
    assert tokens == theirs["tokenizer.ggml.tokens"] and kinds == theirs["tokenizer.ggml.token_type"]
    assert np.bincount(kinds).tolist() == [0, 261_864, 0, 17, 7, 0, 256]


def test_threads_and_slices_change_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "_SLICE", 1000)
    for threads in (1, 3):
        path = gemma4.quantize("tiny-e", tmp_path / f"{threads}.gguf", type="Q4_K_M", threads=threads).path
        assert path.read_bytes() == files("tiny-e", "Q4_K_M").path.read_bytes()


def test_memory_does_not_grow_with_a_table(tmp_path):
    """One of 25 MB (50 MB as float32); the file itself is mapped."""
    config = E_LIKE | {"vocab_size": 2**17, "vocab_size_per_layer_input": 2**17, "hidden_size": 32}
    source = write_checkpoint(tmp_path / "hf", config)
    tracemalloc.start()
    try:
        result = gemma4.quantize(source, tmp_path / "x.gguf", type="Q4_0", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(t.n_values for t in result.tensors) == 2**17 * 96
    assert peak < 24e6


def test_tokens_never_to_be_generated(tmp_path):
    """The file says which, under llama.cpp's key, and is read again: the same text as from the folder."""
    options = {"max_tokens": 16, "temperature": 0, "stop_ids": ()}
    usual = gemma4.load("tiny-e").generate("Once upon a time", **options).tokens
    banned = sorted({int(i) for i in usual[[0, 3]]})
    source = edited_tokenizer(tmp_path / "hf", lambda table: None)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106], "suppress_tokens": banned}))
    path = gemma4.quantize(source, tmp_path / "x.gguf", type="BF16").path
    table = GgufFile(path).metadata
    assert table["tokenizer.ggml.suppress_tokens"].values() == banned
    assert table["tokenizer.ggml.eos_token_id"] == 1 and table["tokenizer.ggml.eot_token_id"] == 106
    folder, file = (gemma4.load(x).generate("Once upon a time", **options).tokens for x in (source, path))
    assert folder.tolist() == file.tolist() != usual.tolist()
    assert not set(banned) & set(file.tolist())


@pytest.mark.skipif(not (BIN / "llama-perplexity").is_file(), reason="GEMMA4_LLAMACPP names no built llama.cpp")
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_reads_it(files, tmp_path, name, kind):
    """The same token ids, and the same perplexity over a text."""
    path, model = files(name, kind).path, gemma4.load(files(name, kind).path)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(gemma4.load(name).checkpoint.tokenizer_path))
    text = "\n".join(e.prompt + e.answer for e in held_out("story", tokenizer, 8))
    (tmp_path / "text").write_text(text)
    ids = model.to_tokens(text)
    done = subprocess.run(
        [BIN / "llama-tokenize", "-m", path, "-f", tmp_path / "text", "--ids"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == ids.tolist()
    done = subprocess.run(
        [BIN / "llama-perplexity", "-m", path, "-f", tmp_path / "text", "-c", "128", "-t", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    theirs = re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)
    assert theirs and float(theirs[1]) == pytest.approx(perplexity(model, ids, 128), rel=5e-3)


def perplexity(model, ids, size):
    """As llama-perplexity counts: the second half of each whole piece, which begins with <bos>."""
    losses = []
    for at in range(0, len(ids) - size + 1, size):
        piece = ids[at : at + size].copy()
        piece[0] = 2
        logits = model.forward(piece)[size // 2 : -1].astype(np.float64)
        normal = np.log(np.exp(logits).sum(1))
        losses.append(normal - logits[np.arange(len(logits)), piece[size // 2 + 1 :]])
    return np.exp(np.mean(losses))


# -- comparing ---------------------------------------------------------------------------------------------------------


def test_compare_measures_what_it_says(files):
    a, b = gemma4.load("tiny-e"), gemma4.load(files("tiny-e", "Q4_0").path, precision="exact")
    ids = a.to_tokens("Once upon a time there was a little fox. It lived in the forest with an owl.")
    found = compare(a, b, ids)
    x, y = (model.forward(ids).astype(np.float64) for model in (a, b))
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x, y))
    kl = (p * np.log(p / q)).sum(1)
    assert found.n_positions == len(ids) and found.kl_mean == pytest.approx(kl.mean(), rel=1e-6)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-6)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-6)
    assert found.top1_agreement == np.mean(x.argmax(1) == y.argmax(1))
    assert f"{len(ids)} positions" in str(found)
    same = compare(a, gemma4.load("tiny-e"), ids)
    assert (same.kl_mean, same.kl_max, same.top1_agreement) == (0, 0, 1)


def test_compare_in_pieces():
    model = gemma4.load("tiny-e")
    ids = sample_ids(model)
    assert len(ids) > 100 and ids[0] == 2
    whole = compare(model, model, ids[:100], chunk=100)
    pieces = compare(model, model, ids[:100], chunk=34)
    assert whole.n_positions == 100 and pieces.n_positions == 102  # <bos> again in the second and third
    assert compare(model, model, ids[1:100], chunk=33).n_positions == 99  # no <bos>, none added
    assert compare(model, model, ids[:1]).n_positions == 1


def test_compare_refuses(random_e):
    model = gemma4.load("tiny-e")
    with pytest.raises(ValueError, match="vocabularies of"):
        compare(model, random_e, [2, 3])
    with pytest.raises(ValueError, match="at least 2"):
        compare(model, model, [2, 3], chunk=1)
    with pytest.raises(ValueError, match="at least one token"):
        compare(model, model, np.array([], np.int32))
    with pytest.raises(ValueError, match="out of range"):
        compare(model, model, [2, 10**6])


# -- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"type": "Q4_9"}, ValueError, r"unknown type 'Q4_9'.*Q4_0"),
    ({"type": "Q4_K_L"}, ValueError, r"did you mean Q4_K"),
    ({"type": "int8"}, ValueError, "All types: F32"),
    ({"type": ""}, ValueError, "unknown type"),
    ({"type": "IQ3_XS"}, ValueError, "IQ4_XS"),
    ({"type": "Q4_0", "overrides": {"token_embd": "Q4_K_M"}}, ValueError, r"unknown type 'Q4_K_M'"),
    ({"type": "Q4_0", "overrides": {"per_layer_tok": "Q8_0"}}, ValueError, "closest names are per_layer_token_embd"),
    ({"type": "Q4_0", "overrides": {"xyz": "Q8_0"}}, ValueError, "matches no tensor; there are"),
    ({"type": "Q4_0", "overrides": {"attn_norm": "Q8_0"}}, ValueError, "always F32"),
    ({"type": "Q4_0", "overrides": {"layer_output_scale": "Q8_0"}}, ValueError, "always F32"),
])  # fmt: skip
def test_wrong_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        gemma4.quantize("tiny-e", tmp_path / "x.gguf", **options)
    assert not leftovers(tmp_path)


def test_wrong_places(files, tmp_path):
    there = tmp_path / "x.gguf"
    there.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--force"):
        gemma4.quantize("tiny-e", there, type="Q8_0")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        gemma4.quantize("tiny-e", tmp_path / "nowhere" / "x.gguf", type="Q8_0")
    with pytest.raises(IsADirectoryError):
        gemma4.quantize("tiny-e", tmp_path, type="Q8_0", force=True)
    with pytest.raises(FileNotFoundError):
        gemma4.quantize("no-such-model", tmp_path / "y.gguf", type="Q8_0")
    source = shutil.copy(files("tiny-e", "BF16").path, tmp_path / "source.gguf")
    with pytest.raises(ValueError, match="the source itself"):
        gemma4.quantize(source, source, type="Q8_0", force=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="no regular file"):
            gemma4.quantize("tiny-e", tmp_path / "pipe", type="Q8_0", force=True)
    assert there.read_bytes() == b"mine"
    assert gemma4.quantize("tiny-e", there, type="Q8_0", force=True).nbytes == there.stat().st_size
    assert not list(tmp_path.glob(".*"))


def test_source_is_quantised_already(files, tmp_path):
    with pytest.raises(ValueError, match=r"quantised already \(Q8_0\).*unquantised model"):
        gemma4.quantize(files("tiny-e", "Q8_0").path, tmp_path / "x.gguf", type="Q4_0")


@pytest.mark.parametrize(("value", "kind", "message"), [
    (np.nan, "Q8_0", "ffn_up.*infinite ones, or NaN"),
    (np.inf, "Q4_K", "infinite"),
    (2**20, "F16", r"F16 has no room for, up to 1\.04858e\+06"),
    (1e9, "Q4_0", "no room"),
    (3e38, "Q6_K", "no room"),
])  # fmt: skip
def test_values_that_do_not_fit(tmp_path, value, kind, message):
    with open_checkpoint("tiny-e") as source:
        shutil.copytree(source.path, tmp_path / "hf")
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    stored[name] = stored[name].astype(np.float32)
    stored[name][3, 5] = value
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in stored.items()}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        gemma4.quantize(tmp_path / "hf", tmp_path / "x.gguf", type=kind)
    assert leftovers(tmp_path) == ["hf"]


def test_interrupted_work_leaves_nothing(tmp_path):
    target = tmp_path / "x.gguf"
    target.write_bytes(b"mine")
    calls = []

    def progress(done, total, name):
        calls.append((done, total, name))
        if len(calls) == 20:
            assert len(leftovers(tmp_path)) == 2  # the partial file is there, under another name
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gemma4.quantize("tiny-e", target, type="Q8_0", force=True, progress=progress)
    assert leftovers(tmp_path) == ["x.gguf"] and target.read_bytes() == b"mine"
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)
    result = gemma4.quantize("tiny-e", target, type="Q8_0", force=True, progress=lambda *a: calls.append(a))
    assert calls[-1][:2] == (result.nbytes, result.nbytes)


def test_disk_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(convert_module, "_packed", full)
        with pytest.raises(OSError, match=r"No space left.*x\.gguf") as caught:
            gemma4.quantize("tiny-e", tmp_path / "x.gguf", type="Q8_0")
        assert caught.value.errno == errno.ENOSPC
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs [\d,]+ bytes, the disk has 1,000 left") as caught:
        gemma4.quantize("tiny-e", tmp_path / "x.gguf", type="Q8_0")
    assert caught.value.errno == errno.ENOSPC and not leftovers(tmp_path)


def test_rope_that_gguf_cannot_say(tmp_path):
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
                               "factor": 8.0}}  # fmt: skip
    source = write_checkpoint(tmp_path / "hf", E_LIKE | {"rope_parameters": rope})
    with pytest.raises(NotImplementedError, match="rope_inv_freq"):
        gemma4.quantize(source, tmp_path / "x.gguf", type="BF16")
    assert leftovers(tmp_path) == ["hf"]


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "x.gguf"
    command = ["quantize", "tiny-e", str(out), "--type", "q4_k_m", "--override", "per_layer_token_embd=Q4_0"]
    assert main(command) == 0
    text = capsys.readouterr()
    assert "bits per weight" in text.out and "Q5_0" in text.out and str(out) in text.out and "\x1b" not in text.out
    assert "Q5_0 instead of Q4_K" in text.err and "KL" not in text.out
    assert GgufFile(out).tensors["per_layer_token_embd.weight"].dtype == "Q4_0"
    assert main(command) == 2 and "--force" in capsys.readouterr().err
    (tmp_path / "text").write_text("Once upon a time there was a fox.")
    for report, positions in (([str(tmp_path / "text")], 10), (["-"], 3), ([], len(sample_ids(gemma4.load("tiny-e"))))):
        monkeypatch.setattr(sys, "stdin", io.StringIO("A fox"))
        assert main([*command, "--force", "--report", *report]) == 0
        found = re.search(r"(\d+) positions: KL divergence mean", capsys.readouterr().out)
        assert found and int(found[1]) == pytest.approx(positions, abs=2)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--type", "Q4_9"], "did you mean"),
    (["--type", "Q4_0", "--override", "token_embd"], "expected TENSOR=TYPE"),
    (["--type", "Q4_0", "--override", "=Q8_0"], "expected TENSOR=TYPE"),
    (["--type", "Q4_0", "--report", "/nonexistent/text"], "No such file"),
    (["--type", "Q4_0", "--report", os.devnull], "empty"),
    (["--type", "Q4_0", "--report", os.curdir], "no regular file"),
    (["--type", "Q4_0", "--report", sys.executable], "is not UTF-8"),
])  # fmt: skip
def test_command_with_wrong_arguments(tmp_path, capsys, arguments, message):
    assert main(["quantize", "tiny-e", str(tmp_path / "x.gguf"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not leftovers(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_reports_wait_for_no_pipe_and_read_no_device(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 30)
    for text, words in (("pipe", "no regular file"), ("large", "the limit is 16,777,216")):
        command = ["quantize", "tiny-e", str(tmp_path / "x.gguf"), "--type", "Q4_0", "--report", str(tmp_path / text)]
        assert main(command) == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()
