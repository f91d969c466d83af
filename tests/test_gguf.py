# SPDX-License-Identifier: Apache-2.0
"""GGUF checkpoints: the same model as from safetensors to the bit, the same tokenizer, and no harm from bad files."""

import json
import lzma
import random
import shutil
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf_files import array, convert, gguf, pair, raw, string, tensor, vocabulary_of
from safetensors.numpy import load_file, save_file
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4.errors import FormatError, StateError
from gemma4.interp.lens import logit_lens
from gemma4.load import cache, open_checkpoint
from gemma4.load.dtypes import ENGINE_DTYPES, is_quantised, stored_rows
from gemma4.load.gguf import TENSOR_TYPES, GgufFile
from gemma4.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
IDS = np.array([2, 5, 90, 17, 300, 33, 64, 129, 7, 300, 11, 12] * 5, np.int32)  # longer than the window of 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model, dtype) -> converted file, each made once."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def get(name, dtype="BF16"):
        if (name, dtype) not in made:
            made[name, dtype] = convert(name, folder / f"{name}-{dtype}.gguf", dtype)
        return made[name, dtype]

    return get


def plain_copy(name, folder, dtype, change=lambda name, values: values):
    """A shipped model as a Hugging Face directory whose weights are `dtype`, changed by name in float32."""
    with open_checkpoint(name) as source:
        shutil.copytree(source.path, folder, dirs_exist_ok=True)
    stored = load_file(folder / "model.safetensors")
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    new = {key: change(key, values.astype(np.float32)).astype(kinds[dtype]) for key, values in stored.items()}
    save_file(new, folder / "model.safetensors")
    return folder


# -- the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["tiny-e", "tiny-moe"])
def test_logits_are_those_of_the_directory(files, tmp_path, name, dtype):
    theirs = gemma4.load(plain_copy(name, tmp_path, dtype))
    with gemma4.load(files(name, dtype)) as ours:
        assert ours.engine.precision == "exact"
        assert np.array_equal(ours.forward(IDS), theirs.forward(IDS))
        assert ours.fingerprint != theirs.fingerprint


@pytest.mark.parametrize("name", ["tiny-e", "tiny-moe"])
def test_configuration(files, name):
    theirs = open_checkpoint(name)
    with open_checkpoint(files(name)) as ours:
        different = {k for k, v in vars(theirs.config).items() if v != getattr(ours.config, k)}
        assert different <= {"model_type", "eos_token_ids", "bidirectional"}
        assert ours.config.eos_token_ids == tuple(theirs.generation_config["eos_token_id"])
        assert ours.config.bidirectional == (None if name == "tiny-e" else "vision")
        assert ours.generation_config == theirs.generation_config
        assert ours.engine_config.keys() == theirs.engine_config.keys()
        layers = [layer | {"ahead": 0} for layer in ours.engine_config["layers"]]  # that is "bidirectional"
        assert layers == theirs.engine_config["layers"]
        for mine, other in zip(ours.engine_config["rope_inv_freq"], theirs.engine_config["rope_inv_freq"], strict=True):
            assert np.array_equal(mine, other)
        assert set(ours.engine_tensors) == set(theirs.engine_tensors)
        assert ours.n_parameters == theirs.n_parameters and ours.ignored == ("rope_freqs.weight",)
        assert ours.total_bytes == files(name).stat().st_size and not ours.quantised
        assert ours.hf_config["gemma4.block_count"] == theirs.config.n_layers
        json.dumps(ours.hf_config)  # plain values only


def test_tensors_are_read_only_views(files):
    model = gemma4.load(files("tiny-e"))
    table = model.tensors["token_embd.weight"]
    assert table.dtype == ml_dtypes.bfloat16 and table.shape == (model.d_vocab, 128) and not table.flags.writeable
    assert np.array_equal(model.weight("embed_tokens.weight"), table.astype(np.float32))
    assert np.array_equal(model.unembed(slice(3, 9)), table[3:9].astype(np.float32))
    assert model.layer_scalar(2) == float(model.tensors["blk.2.layer_output_scale.weight"][0])
    model.close()
    assert table[0, 0] == table[0, 0]
    with pytest.raises(StateError, match="closed"):
        model.forward(IDS)


def test_text_works_as_from_the_directory(files):
    ours, theirs = gemma4.load(files("tiny-e")), gemma4.load("tiny-e")
    messages = [{"role": "user", "content": "Once upon a time"}]
    assert ours.chat_template.source == theirs.chat_template.source
    assert ours.chat_template.tokens == theirs.chat_template.tokens
    options = {"max_tokens": 12, "temperature": 0.0}
    assert list(ours.generate(messages, **options).tokens) == list(theirs.generate(messages, **options).tokens)
    assert "tiny-e-BF16.gguf" in str(ours.info()) and "tiny-e-BF16.gguf" in repr(ours)


@pytest.mark.parametrize("keys", [
    {"tokenizer.ggml.model": "llama"},
    {"tokenizer.ggml.scores": None, "gemma4.rope.freq_base_swa": None},
    {"gemma4.attention.head_count_kv": [1] * 10, "gemma4.attention.head_count": [4] * 10},
    {"gemma4.attention.sliding_window_pattern": 5},
    {"gemma4.rope.scaling.type": "none", "some.other.key": [1.5, 2.5], "general.alignment": 64},
])  # fmt: skip
def test_other_spellings(files, tmp_path, keys):
    theirs = gemma4.load(files("tiny-e"))
    ours = gemma4.load(convert("tiny-e", tmp_path / "x.gguf", keys=keys))
    assert np.array_equal(ours.forward(IDS), theirs.forward(IDS))
    assert np.array_equal(ours.to_tokens("The cat sat."), theirs.to_tokens("The cat sat."))


def test_experts_apart(files, tmp_path):
    path = convert("tiny-moe", tmp_path / "apart.gguf", apart=True)
    with open_checkpoint(path) as checkpoint:
        shapes = {name: entry[1] for name, entry in checkpoint.engine_tensors.items() if ".0.experts." in name}
        assert shapes == {
            "layers.0.experts.gate_proj": (8, 64, 128),
            "layers.0.experts.up_proj": (8, 64, 128),
            "layers.0.experts.down_proj": (8, 128, 64),
        }
    ours = gemma4.load(path)
    assert np.array_equal(ours.forward(IDS), gemma4.load(files("tiny-moe")).forward(IDS))
    assert ours.info().effective_parameters == gemma4.load(files("tiny-moe")).info().effective_parameters


def test_no_layer_scalars(tmp_path):
    """They are 1 in a file that has none."""

    def ones(name, values):
        return np.ones_like(values) if name.endswith("layer_scalar") else values

    source = plain_copy("tiny-e", tmp_path / "hf", "BF16", ones)
    path = convert(source, tmp_path / "x.gguf")
    data = path.read_bytes()
    assert data.count(b"layer_output_scale") == 10
    path.write_bytes(data.replace(b"layer_output_scale", b"layer_output_xxxxx"))
    ours = gemma4.load(path)
    assert np.array_equal(ours.forward(IDS), gemma4.load(source).forward(IDS)) and ours.layer_scalar(3) == 1.0


def test_untied_head(tmp_path):
    source = plain_copy("tiny-e", tmp_path / "hf", "BF16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored["model.language_model.embed_tokens.weight"][::-1].copy()
    save_file(stored, source / "model.safetensors")
    ours = gemma4.load(convert(source, tmp_path / "x.gguf"))
    assert not ours.config.tied and np.array_equal(ours.forward(IDS), gemma4.load(source).forward(IDS))


def test_without_a_tokenizer(tmp_path):
    model = gemma4.load(convert("tiny-e", tmp_path / "x.gguf", text=False))
    assert model.chat_template is None and model.forward(IDS[:3], logits="last").shape == (1, model.d_vocab)
    with pytest.raises(StateError, match="token ids"):
        model.to_tokens("text")


def test_cli(files, capsys):
    from gemma4.cli import main

    path = str(files("tiny-e"))
    assert main(["info", "--model", path]) == 0 and "BF16" in capsys.readouterr().out
    assert main(["generate", "Once upon", "--model", path, "--max-tokens", "3"]) == 0


def test_found_by_its_first_bytes(files, tmp_path):
    shutil.copy(files("tiny-e"), tmp_path / "sha256-0123abcd")
    assert gemma4.load(tmp_path / "sha256-0123abcd").n_layers == 10


# -- quantised weights -------------------------------------------------------------------------------------------------


def unpacked_copy(checkpoint, name, folder):
    """The shipped model `name` as a float32 directory with the values that the gguf package unpacks from a file."""

    def change(stored, values):
        entry = checkpoint.engine_tensors.get(stored.removeprefix("model.language_model."))
        if entry is None or not is_quantised(entry[0]):
            return values
        return gguf.quants.dequantize(np.array(stored_rows(*entry)), gguf.GGMLQuantizationType[entry[0]])

    return gemma4.load(plain_copy(name, folder, "F32", change))


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ["tiny-e", "tiny-moe"])
def test_quantised_weights_give_the_logits_of_their_values(files, tmp_path, name, dtype):
    ours = gemma4.load(files(name, dtype), precision="exact")
    theirs = unpacked_copy(ours.checkpoint, name, tmp_path)
    assert ours.checkpoint.quantised and set(ours.checkpoint.dtypes) == {"F32", dtype}
    for tensor_name in ours.checkpoint.engine_tensors:
        assert np.array_equal(ours.weight(tensor_name), theirs.weight(tensor_name)), tensor_name
    wanted = theirs.forward(IDS)
    assert np.abs(ours.forward(IDS) - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_quantised_weights_as_python_sees_them(files, tmp_path):
    ours = gemma4.load(files("tiny-e", "Q4_0"), precision="exact")
    theirs = unpacked_copy(ours.checkpoint, "tiny-e", tmp_path)
    stored = ours.tensors["blk.0.ffn_up.weight"]
    assert stored.dtype == np.uint8 and stored.shape == (160, 128 // 32 * 18) and not stored.flags.writeable
    for ids in (slice(5, 11), slice(0, None), np.array([7, 3, 3]), np.arange(12).reshape(3, 4)):
        assert np.array_equal(ours.unembed(ids), theirs.unembed(ids))
    assert ours.layer_scalar(1) == theirs.layer_scalar(1)
    lenses = [logit_lens(model, IDS[:6], pos=-1) for model in (ours, theirs)]
    assert np.array_equal(lenses[0].ids, lenses[1].ids) and np.allclose(lenses[0].probs, lenses[1].probs, atol=1e-6)
    assert ours.info().dtypes.keys() == {"Q4_0", "F32"} and ours.info().parameters == theirs.info().parameters
    assert len(ours.fingerprint) == 16 and ours.fingerprint != gemma4.load(files("tiny-e", "Q8_0")).fingerprint


def test_precision_follows_the_weights(files):
    assert gemma4.load(files("tiny-e", "Q8_0")).engine.precision == "fast"
    assert gemma4.load(files("tiny-e", "Q8_0"), precision="exact").engine.precision == "exact"
    assert gemma4.load(files("tiny-e")).engine.precision == "exact"
    assert gemma4.load(files("tiny-e"), precision="fast").engine.precision == "fast"


def test_embedding_scale_follows_the_table(files):
    """Rounded to a bf16 table's type as the reference does, a float32 root for a quantised one as llama.cpp does."""
    scales = {d: open_checkpoint(files("tiny-e", d)).engine_config["embed_scale"] for d in ("BF16", "Q8_0", "F32")}
    root = np.float32(np.sqrt(128.0))
    assert scales == {"BF16": float(ml_dtypes.bfloat16(root)), "Q8_0": float(root), "F32": float(root)}


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    convert("tiny-e", tmp_path / "m.gguf", part_tensors=70)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert len(found) == 3
    return found


def test_split_files_open_by_any_name(parts, files):
    whole = gemma4.load(files("tiny-e")).forward(IDS)
    for part in parts:
        calls = []
        model = gemma4.load(part, progress=lambda *a: calls.append(a))  # noqa: B023
        assert np.array_equal(model.forward(IDS), whole)
        assert [call[0] for call in calls] == [0, 1, 2, 3] and model.to_tokens("a")[0] == 2
        assert model.checkpoint.total_bytes == sum(p.stat().st_size for p in parts)
    with pytest.raises(FormatError, match="written to"):
        parts[1].touch()
        model.forward(IDS)


def test_damaged_parts(parts):
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf is missing.*part 2 of 3"):
        gemma4.load(parts[2])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(FormatError, match="says it is part 2 of 3"):
        gemma4.load(parts[0])
    parts[1].write_bytes(second)
    shutil.copy(parts[0], parts[0].with_name("renamed.gguf"))
    with pytest.raises(FormatError, match="names must end in"):
        gemma4.load(parts[0].with_name("renamed.gguf"))


@pytest.mark.parametrize("first, second, message", [
    ("a", "a", "in both"),
    ("a", "b", r"hold 2 tensors, split.tensors.count is 3"),
])  # fmt: skip
def test_parts_that_do_not_fit(tmp_path, first, second, message):
    for number, name in enumerate((first, second)):
        keys = [pair("split.no", 2, struct.pack("<H", number)), pair("split.count", 2, struct.pack("<H", 2))]
        keys.append(pair("split.tensors.count", 5, struct.pack("<i", 3)))
        data = raw(keys, [tensor(name, [8])], bytes(32))
        (tmp_path / f"x-0000{number + 1}-of-00002.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        open_checkpoint(tmp_path / "x-00001-of-00002.gguf")


# -- the tokenizer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Gemma 4's own tokenizer: as tokenizer.json, and a GGUF file with nothing but its metadata."""
    folder = tmp_path_factory.mktemp("real")
    text = lzma.decompress((DATA / "tokenizer.json.xz").read_bytes())
    (folder / "tokenizer.json").write_bytes(text)
    writer = gguf.GGUFWriter(folder / "vocab.gguf", "gemma4")
    for key, value in vocabulary_of(json.loads(text)).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, int(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder


@pytest.mark.slow
def test_real_vocabulary_gives_the_same_ids(real):
    from test_tokenizer import TEXTS

    from gemma4.load.gguf_tokenizer import tokenizer_table

    theirs = Tokenizer.load(real)
    ours = Tokenizer.from_json(json.dumps(tokenizer_table(GgufFile(real / "vocab.gguf").metadata, "x")))
    assert ours.special_ids == theirs.special_ids and len(ours) == len(theirs) == 262_144
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 1, 0)
    for text in TEXTS.values():
        for special in (True, False):
            ids = ours.encode(text, parse_special=special)
            assert np.array_equal(ids, theirs.encode(text, parse_special=special)), text
            assert ours.decode(ids) == theirs.decode(ids)
            assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special=True)


def test_real_vocabulary_is_skipped_fast(real):
    def seconds():
        start = time.perf_counter()
        file = GgufFile(real / "vocab.gguf")
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert tokens.index("<turn|>") == 106 and tokens.item(258_884) == "<|video|>"
        assert len(file.metadata["tokenizer.ggml.merges"]) == 514_906
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_control_tokens_that_the_file_calls_ordinary(files, tmp_path):
    """As in files made from a tokenizer_config.json without the chat format's tokens."""
    with open_checkpoint("tiny-e") as source:
        table = json.loads((source.path / "tokenizer.json").read_text())
        for token in table["added_tokens"]:
            token["special"] = token["id"] < 5
        path = convert("tiny-e", tmp_path / "x.gguf", keys=vocabulary_of(table))
        kinds = GgufFile(path).metadata["tokenizer.ggml.token_type"].values()
        assert kinds[106] == gguf.TokenType.NORMAL
        ours, theirs = open_checkpoint(path).load_tokenizer(), source.load_tokenizer()
    assert ours.special_ids == theirs.special_ids
    text = "<|turn>user\nHi<turn|>\n<|channel>thought"
    assert np.array_equal(ours.encode(text), theirs.encode(text))


def test_vocabulary_with_scores_instead_of_merges(files, tmp_path):
    """SentencePiece's way: a token's score is minus the number of its merge."""
    with open_checkpoint("tiny-e") as source:
        theirs = source.load_tokenizer()
        table = json.loads((source.path / "tokenizer.json").read_text())
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(table["model"]["merges"]):
        rank.setdefault(left + right, number)
    keys = vocabulary_of(table)
    keys["tokenizer.ggml.scores"] = [-float(rank.get(token, 0)) for token in keys["tokenizer.ggml.tokens"]]
    keys |= {"tokenizer.ggml.merges": None, "tokenizer.ggml.model": "llama"}
    ours = open_checkpoint(convert("tiny-e", tmp_path / "x.gguf", keys=keys)).load_tokenizer()
    words = [theirs.id_to_piece(i).replace("▁", " ") for i in range(600, 2500, 7)]
    same = sum(np.array_equal(ours.encode(w), theirs.encode(w)) for w in words)
    assert same / len(words) > 0.95
    keys["tokenizer.ggml.scores"] = [0.0] * len(keys["tokenizer.ggml.tokens"])
    with pytest.raises(FormatError, match="neither merges nor scores"):
        open_checkpoint(convert("tiny-e", tmp_path / "y.gguf", keys=keys)).load_tokenizer()


def edited(keys):
    n = len(keys["tokenizer.ggml.tokens"])
    tokens = keys["tokenizer.ggml.tokens"]
    return {
        "scores short": {"tokenizer.ggml.scores": [0.0] * (n - 1)},
        "types long": {"tokenizer.ggml.token_type": [1] * (n + 1)},
        "types are words": {"tokenizer.ggml.token_type": ["a"] * n},
        "merge of one": {"tokenizer.ggml.merges": ["abc"]},
        "merge of strangers": {"tokenizer.ggml.merges": ["zzzz yyyy"]},
        "merge to no token": {"tokenizer.ggml.merges": [f"{tokens[-1]} {tokens[-1]}"]},
        "merges are numbers": {"tokenizer.ggml.merges": [1, 2]},
        "tokens are numbers": {"tokenizer.ggml.tokens": [1, 2, 3]},
    }


@pytest.mark.parametrize("name", list(edited({"tokenizer.ggml.tokens": ["a", "b"]})))
def test_damaged_vocabulary(tmp_path, name):
    with open_checkpoint("tiny-e") as source:
        keys = vocabulary_of(json.loads((source.path / "tokenizer.json").read_text()))
    model = gemma4.load(convert("tiny-e", tmp_path / "x.gguf", keys=keys | edited(keys)[name]))
    assert model.forward(IDS[:4], logits="last").shape[0] == 1  # token ids work
    with pytest.raises(FormatError, match=r"tokenizer\.ggml|merge|twice"):
        model.tokenizer  # noqa: B018


def test_other_tokenizers_and_templates(tmp_path):
    other = gemma4.load(convert("tiny-e", tmp_path / "x.gguf", keys={"tokenizer.ggml.model": "gpt2"}))
    with pytest.raises(NotImplementedError, match=r"gpt2.*gemma4, llama"):
        other.tokenizer  # noqa: B018
    other = gemma4.load(convert("tiny-e", tmp_path / "y.gguf", keys={"tokenizer.chat_template": 7}))
    with pytest.raises(FormatError, match="chat_template is no string"):
        other.chat_template  # noqa: B018
    with pytest.raises(FormatError, match="eos_token_id"):
        gemma4.load(convert("tiny-e", tmp_path / "z.gguf", keys={"tokenizer.ggml.eos_token_id": "<eos>"}))


def test_tokens_never_to_be_generated(tmp_path):
    """Ids outside the vocabulary count for nothing, as in llama.cpp; other than an array of whole numbers is damage."""
    key = "tokenizer.ggml.suppress_tokens"
    model = gemma4.load(convert("tiny-e", tmp_path / "a.gguf", keys={key: [7, -1, 5, 7, 10**6]}))
    assert model.checkpoint.generation_config["suppress_tokens"] == [5, 7]
    model = gemma4.load(convert("tiny-e", tmp_path / "b.gguf", keys={key: [-1]}))
    assert "suppress_tokens" not in model.checkpoint.generation_config
    for i, value in enumerate((["a"], 5, [1.5])):
        with pytest.raises(FormatError, match="suppress_tokens must be an array"):
            gemma4.load(convert("tiny-e", tmp_path / f"c{i}.gguf", keys={key: value}))


def test_cache(files, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(files("tiny-e"))
    ids = checkpoint.load_tokenizer().encode("The cat sat.")
    kept = list((tmp_path / "cache").iterdir())
    assert len(kept) == 1 and kept[0].name.startswith("tokenizer-")
    before = kept[0].stat().st_mtime_ns
    assert np.array_equal(checkpoint.load_tokenizer().encode("The cat sat."), ids)
    assert kept[0].stat().st_mtime_ns == before  # read, not written again
    kept[0].write_text("{")  # damaged: made again
    assert np.array_equal(checkpoint.load_tokenizer().encode("The cat sat."), ids)
    assert len(kept[0].read_text()) > 1000 and list((tmp_path / "cache").iterdir()) == kept
    for place in ("0", str(kept[0] / "below a file"), "/proc/nowhere"):
        monkeypatch.setenv("GEMMA4_CACHE", place)
        assert np.array_equal(checkpoint.load_tokenizer().encode("The cat sat."), ids)


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("GEMMA4_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "gemma4"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.directory() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache.directory() == tmp_path / ".cache" / "gemma4"


# -- values and types --------------------------------------------------------------------------------------------------


def test_type_table_is_that_of_the_gguf_package():
    theirs = {int(kind): (kind.name, size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    theirs[9] = ("Q8_1", (32, 36))  # the package has the size of an old layout; ggml's block is two halves and 32 bytes
    assert {kind: (name, tuple(block)) for kind, (name, block) in TENSOR_TYPES.items() if kind in theirs} == theirs
    assert set(ENGINE_DTYPES) <= {name for name, _ in TENSOR_TYPES.values()}


def test_every_value_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma4")
    numbers = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.1, "float64": 0.1, "bool": True, "string": "é\n",
    }  # fmt: skip
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    lists = {"ints": [1, -2, 3], "floats": [1.5, -2.5], "bools": [True, False], "strings": ["", "a b", "ü"]}
    for key, values in lists.items():
        writer.add_array(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = GgufFile(tmp_path / "x.gguf").metadata
    assert {kind: found[f"a.{kind}"] for kind in numbers} == numbers
    assert {key: found[key].values() for key in lists} == lists
    strings = found["strings"]
    assert [strings.item(i) for i in (-1, 0, 1, 2, 3)] == [None, "", "a b", "ü", None]
    assert [strings.index(x) for x in ("", "ü", "a", "b")] == [0, 2, None, None]


def test_search_is_not_fooled_by_a_string_inside_another(tmp_path):
    elements = string(b"x" + string("needle")) + string("needle")
    (tmp_path / "x").write_bytes(raw([pair("s", 9, array(8, 2, elements))]))
    assert GgufFile(tmp_path / "x").metadata["s"].index("needle") == 1


@pytest.mark.parametrize("dtype", sorted(ENGINE_DTYPES))
def test_stored_arrays_of_every_type(tmp_path, dtype):
    elements, nbytes = ENGINE_DTYPES[dtype]
    kind = next(i for i, (name, _) in TENSOR_TYPES.items() if name == dtype)
    data = np.random.default_rng(0).integers(0, 256, 6 * nbytes * 2, np.uint8).tobytes()
    sizes = [2 * elements, 3, 2]
    (tmp_path / "x").write_bytes(raw([], [tensor("t", sizes, kind)], data + bytes(-len(data) % 32)))
    file = GgufFile(tmp_path / "x")
    assert file.tensors["t"].shape == (2, 3, 2 * elements)
    stored = file.array("t")
    assert stored.shape[:2] == (2, 3) and not stored.flags.writeable and stored.tobytes() == data


def test_unsupported_types_are_named(tmp_path):
    path = convert("tiny-e", tmp_path / "x.gguf")
    data = path.read_bytes()
    name = string("blk.3.attn_q.weight")
    at = data.index(name) + len(name) + 4 + 16
    assert data[at : at + 4] == struct.pack("<I", 30)
    path.write_bytes(data[:at] + struct.pack("<I", 25) + data[at + 4 :])  # I16 takes as many bytes
    with pytest.raises(NotImplementedError, match=r"blk\.3\.attn_q\.weight is I16.*Q8_0.*MXFP4"):
        gemma4.load(path)


# -- configurations that cannot be run ---------------------------------------------------------------------------------

BAD_KEYS = {
    "no layers": ({"gemma4.block_count": None}, FormatError, "block_count"),
    "many layers": ({"gemma4.block_count": 100_000}, FormatError, "block_count"),
    "other number of layers": ({"gemma4.block_count": 9}, FormatError, "sliding_window_pattern"),
    "no pattern": ({"gemma4.attention.sliding_window_pattern": None}, FormatError, "sliding_window_pattern"),
    "pattern of numbers": ({"gemma4.attention.sliding_window_pattern": [7] * 10}, FormatError, "pattern"),
    "period zero": ({"gemma4.attention.sliding_window_pattern": 0}, FormatError, "pattern"),
    "odd head": ({"gemma4.attention.key_length": 63}, FormatError, "key_length.*even"),
    "value heads": ({"gemma4.attention.value_length": 32}, NotImplementedError, "value_length"),
    "partial rotation": ({"gemma4.rope.dimension_count_swa": 16}, NotImplementedError, "dimension_count_swa"),
    "scaled positions": ({"gemma4.rope.scaling.type": "yarn"}, NotImplementedError, "yarn"),
    "kv heads": ({"gemma4.attention.head_count_kv": 3}, FormatError, "head_count_kv.*divisor"),
    "kv heads short": ({"gemma4.attention.head_count_kv": [1] * 9}, FormatError, "head_count_kv.*10 layers"),
    "kv heads zero": ({"gemma4.attention.head_count_kv": [1] * 9 + [0]}, FormatError, r"head_count_kv\[9\]"),
    "heads differ": ({"gemma4.attention.head_count": [4] * 9 + [2]}, NotImplementedError, "head_count differs"),
    "width": ({"gemma4.embedding_length": 64}, FormatError, "shape"),
    "negative": ({"gemma4.embedding_length": -128.0}, FormatError, "embedding_length"),
    "mlp": ({"gemma4.feed_forward_length": [160] * 10}, FormatError, "ffn_.*shape"),
    "all shared": ({"gemma4.attention.shared_kv_layers": 10}, FormatError, "shared_kv_layers"),
    "fewer shared": ({"gemma4.attention.shared_kv_layers": 4}, FormatError, r"blk\.5\.attn_k.*missing"),
    "no window": ({"gemma4.attention.sliding_window": 0}, FormatError, "sliding_window"),
    "nan": ({"gemma4.attention.layer_norm_rms_epsilon": float("nan")}, FormatError, "epsilon"),
    "softcap": ({"gemma4.final_logit_softcapping": float("inf")}, FormatError, "softcapping"),
    "no experts there": ({"gemma4.expert_count": 4, "gemma4.expert_used_count": 2,
                          "gemma4.expert_feed_forward_length": 8}, FormatError, "ffn_gate_inp"),
    "context": ({"gemma4.context_length": "long"}, FormatError, "context_length"),
    "bos": ({"tokenizer.ggml.bos_token_id": -1.0}, FormatError, "bos_token_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_metadata(tmp_path, name):
    keys, kind, message = BAD_KEYS[name]
    with pytest.raises(kind, match=message):
        open_checkpoint(convert("tiny-e", tmp_path / "x.gguf", text=False, keys=keys))


def test_every_missing_tensor_is_named(tmp_path):
    path = convert("tiny-e", tmp_path / "x.gguf", text=False)
    good = path.read_bytes()
    for name in ("token_embd.weight", "rope_freqs.weight", "blk.0.attn_q.weight", "blk.9.ffn_down.weight"):
        path.write_bytes(good.replace(string(name), string("x" * len(name))))
        with pytest.raises(FormatError, match=name.replace(".", r"\.")):
            open_checkpoint(path)


def test_rope_factors_other_than_the_known(tmp_path):
    path = convert("tiny-e", tmp_path / "x.gguf", text=False)
    info = GgufFile(path).tensors["rope_freqs.weight"]
    for values, kind in (([2.0] * 32, NotImplementedError), ([1e30] * 8 + [1.0] * 24, NotImplementedError)):
        data = bytearray(path.read_bytes())
        data[info.offset : info.offset + info.nbytes] = np.array(values, np.float32).tobytes()
        (tmp_path / "y.gguf").write_bytes(data)
        with pytest.raises(kind, match="rope_freqs"):
            open_checkpoint(tmp_path / "y.gguf")


@pytest.mark.parametrize("name", ["llama", "gemma3n", "clip", "gemma4-assistant"])
def test_other_architectures(tmp_path, name):
    (tmp_path / "x.gguf").write_bytes(raw([pair("general.architecture", 8, string(name))]))
    with pytest.raises(NotImplementedError, match=f"'{name}'.*gemma2, gemma3, gemma4"):
        open_checkpoint(tmp_path / "x.gguf")


# -- hostile files -----------------------------------------------------------------------------------------------------

HUGE = 2**64 - 1
U32, F32S, BOOL, STR, ARR = 4, 6, 7, 8, 9
ONE = [tensor("t", [8])]
DATA32 = bytes(32)


def u32(value):
    return struct.pack("<I", value)


def aligned(kind, value):
    return [pair("general.alignment", kind, value)]


HOSTILE = {
    "empty": b"",
    "magic alone": b"GGUF",
    "magic": raw([], ONE, DATA32, magic=b"GGML"),
    "magic of zeros": bytes(64),
    "version 0": raw([], ONE, DATA32, version=0),
    "version 1": raw([], ONE, DATA32, version=1),
    "version 4": raw([], ONE, DATA32, version=4),
    "version 2^32-1": raw([], ONE, DATA32, version=2**32 - 1),
    "version byte-swapped": raw([], ONE, DATA32, version=3 << 24),
    "n_tensors 2^64-1": raw([], [], n_tensors=HUGE),
    "n_pairs 2^64-1": raw([], [], n_pairs=HUGE),
    "n_tensors 2^63": raw([], [], n_tensors=2**63),
    "n_tensors one too many": raw([], ONE, DATA32, n_tensors=2),
    "n_pairs one too many": raw([pair("a", U32, u32(1))], [], n_pairs=2),
    "n_pairs 2^20 of zeros": raw([], [], bytes(2**20), n_pairs=2**20 // 14),
    "key length 2^64-1": raw([struct.pack("<Q", HUGE) + b"x" * 64]),
    "key length 2^63": raw([struct.pack("<Q", 2**63) + b"x" * 64]),
    "key of 65536 bytes": raw([pair("k" * 65536, U32, u32(1))]),
    "key past the end": raw([struct.pack("<Q", 500) + b"x" * 64]),
    "key empty": raw([pair("", U32, u32(1))]),
    "key no utf-8": raw([pair(b"\xff\xfe", U32, u32(1))]),
    "key twice": raw([pair("a", U32, u32(1)), pair("a", U32, u32(1))]),
    "key twice, other type": raw([pair("a", U32, u32(1)), pair("a", BOOL, b"\1")]),
    "value type 13": raw([pair("a", 13, bytes(64))]),
    "value type 2^32-1": raw([pair("a", 2**32 - 1, bytes(64))]),
    "value cut": raw([pair("a", 10, b"\0")])[:40],
    "bool 2": raw([pair("a", BOOL, b"\2")]),
    "string 2^64-1": raw([pair("a", STR, struct.pack("<Q", HUGE) + b"x")]),
    "string past the end": raw([pair("a", STR, struct.pack("<Q", 1000) + b"x")]),
    "string no utf-8": raw([pair("a", STR, string(b"\xc3("))]),
    "array type 13": raw([pair("a", ARR, array(13, 1, bytes(64)))]),
    "array of arrays": raw([pair("a", ARR, array(ARR, 1, array(U32, 1, u32(1))))]),
    "array deep": raw([pair("a", ARR, struct.pack("<IQ", ARR, 1) * 10_000)]),
    "array 2^64-1 bytes": raw([pair("a", ARR, array(0, HUGE))]),
    "array 2^62 words": raw([pair("a", ARR, array(U32, 2**62, bytes(64)))]),
    "array 2^61 doubles": raw([pair("a", ARR, array(12, 2**61, bytes(64)))]),
    "array one too many": raw([pair("a", ARR, array(U32, 1000, bytes(64)))]),
    "array of bools 2": raw([pair("a", ARR, array(BOOL, 2, b"\0\2"))]),
    "strings 2^64-1": raw([pair("a", ARR, array(STR, HUGE))]),
    "strings 2^25": raw([pair("a", ARR, array(STR, 2**25))], [], bytes(2**20)),
    "strings one too many": raw([pair("a", ARR, array(STR, 9, string("b")))]),
    "strings of 2^64-1": raw([pair("a", ARR, array(STR, 1, struct.pack("<Q", HUGE)))]),
    "strings of 2^64-8": raw([pair("a", ARR, array(STR, 3, struct.pack("<Q", 2**64 - 8) * 3))]),
    "alignment 13": raw(aligned(U32, u32(13)), ONE, DATA32),
    "alignment 0": raw(aligned(U32, u32(0)), ONE, DATA32),
    "alignment uint64": raw(aligned(10, struct.pack("<Q", 32)), ONE, DATA32),
    "alignment int32": raw(aligned(5, u32(32)), ONE, DATA32),
    "alignment float": raw(aligned(F32S, struct.pack("<f", 32)), ONE, DATA32),
    "alignment text": raw(aligned(STR, string("32")), ONE, DATA32),
    "alignment array": raw(aligned(ARR, array(U32, 1, u32(32))), ONE, DATA32),
    "alignment bool": raw(aligned(BOOL, b"\1"), ONE, DATA32),
    "alignment 2^31": raw(aligned(U32, u32(2**31)), ONE, DATA32),
    "name of 65 bytes": raw([], [tensor("n" * 65, [8])], DATA32),
    "name length 2^64-1": raw([], [struct.pack("<Q", HUGE) + bytes(64)], DATA32),
    "name no utf-8": raw([], [tensor(b"\xff", [8])], DATA32),
    "name twice": raw([], [tensor("t", [8]), tensor("t", [8], 0, 32)], DATA32 * 2),
    "no dimensions": raw([], [tensor("t", [])], DATA32),
    "5 dimensions": raw([], [tensor("t", [8, 1, 1, 1, 1])], DATA32),
    "2^32-1 dimensions": raw([], [tensor("t", [8], rank=2**32 - 1)], DATA32),
    "dimension 0": raw([], [tensor("t", [8, 0])], DATA32),
    "dimension 2^63 (negative)": raw([], [tensor("t", [2**63])], DATA32),
    "dimension 2^64-1": raw([], [tensor("t", [HUGE, HUGE])], DATA32),
    "elements 2^64 wrap to 8": raw([], [tensor("t", [2**32, 2**32, 8])], DATA32),
    "elements 2^64": raw([], [tensor("t", [2**32, 2**32])], DATA32),
    "bytes 2^64": raw([], [tensor("t", [2**62])], DATA32),
    "bytes wrap to 32": raw([], [tensor("t", [2**62 + 8])], DATA32),
    "zero and huge": raw([], [tensor("t", [0, 2**63 - 1])], DATA32),
    "type 4, removed": raw([], [tensor("t", [8], 4)], DATA32),
    "type 99": raw([], [tensor("t", [8], 99)], DATA32),
    "type 2^32-1 (negative)": raw([], [tensor("t", [8], 2**32 - 1)], DATA32),
    "row is no whole block": raw([], [tensor("t", [33, 2], 8)], bytes(96)),
    "row is half a block, product whole": raw([], [tensor("t", [16, 2], 8)], bytes(64)),
    "K row of 128": raw([], [tensor("t", [128, 2], 12)], bytes(320)),
    "offset 1": raw([], [tensor("t", [8], 0, 1)], bytes(64)),
    "offset 2^64-32": raw([], [tensor("t", [8], 0, 2**64 - 32)], DATA32),
    "offset past the end": raw([], [tensor("t", [8], 0, 32)], DATA32),
    "overlap": raw([], [tensor("t", [8]), tensor("u", [8], 0, 0)], DATA32 * 2),
    "overlap in part": raw([], [tensor("t", [16]), tensor("u", [8], 0, 32)], DATA32 * 3),
    "hole": raw([], [tensor("t", [8]), tensor("u", [8], 0, 64)], DATA32 * 3),
    "backwards": raw([], [tensor("t", [8], 0, 32), tensor("u", [8], 0, 0)], DATA32 * 2),
    "unpadded second": raw([], [tensor("t", [4]), tensor("u", [4], 0, 16)], DATA32),
    "no data": raw([], ONE),
    "short data": raw([], ONE, bytes(31)),
    "many large tensors": raw([], [tensor(str(i), [2**61], 0, i * 2**63 % 2**64) for i in range(8)], DATA32),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw([], ONE, DATA32))
    assert GgufFile(path).array("t").shape == (8,)
    path.write_bytes(HOSTILE[name])
    start = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        GgufFile(path)
    assert time.perf_counter() - start < 2.0
    assert "x.gguf" in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(FormatError):
        open_checkpoint(path)


def test_every_truncation_is_found(tmp_path):
    whole = raw([pair("general.architecture", 8, string("gemma4")), pair("a", ARR, array(STR, 2, string("b") * 2))],
                [tensor("t", [8]), tensor("u", [32], 8, 32)], bytes(32 + 34))  # fmt: skip
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert GgufFile(path).tensors["u"].nbytes == 34
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            GgufFile(path)


def test_random_damage_never_crashes(tmp_path):
    """1,500 damaged files: each is read, and then every array lies in it, or is a FormatError."""
    rng = random.Random(4)
    pairs = [pair("general.architecture", 8, string("gemma4")), pair("s", ARR, array(STR, 3, string("abc") * 3))]
    pairs.append(pair("n", ARR, array(U32, 4, bytes(16))))
    pairs.append(pair("general.alignment", U32, u32(32)))
    good = raw(pairs, [tensor("t", [8]), tensor("u", [32, 2], 8, 32)], bytes(range(100)))
    values = [0, 1, 2, 8, 31, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, HUGE]
    path, accepted = tmp_path / "x.gguf", 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(good) - 100)
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                size = rng.choice((4, 8))
                data[at : at + size] = (rng.choice(values) & (1 << 8 * size) - 1).to_bytes(size, "little")
        path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        try:
            file = GgufFile(path)
            for value in file.metadata.values():
                value.values() if hasattr(value, "values") else None
            for name in file.tensors:
                file.array(name).sum()
        except FormatError:
            continue
        accepted += 1
        file.close()
    assert 20 < accepted < 1450


def test_damaged_checkpoints_never_crash(tmp_path):
    """600 files of a small model with damage in the head: each loads, or is refused with one of our exceptions."""
    rng = random.Random(7)
    source = write_checkpoint(tmp_path / "hf", E_LIKE)
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(256, 316))]
    keys = {"tokenizer.ggml.tokens": names, "tokenizer.ggml.merges": [], "tokenizer.ggml.model": "gemma4"}
    path = convert(source, tmp_path / "x.gguf", keys=keys | {"tokenizer.ggml.eos_token_id": 1})
    good = path.read_bytes()
    file = GgufFile(path)
    head = min(info.offset for info in file.tensors.values())
    values = [0, 1, 2, 3, 6, 255, 2**16, 2**31, 2**32 - 1, 2**63, HUGE]
    loaded = 0
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at, size = rng.randrange(head), rng.choice((1, 1, 2, 4, 8))
            data[at : at + size] = (rng.choice(values) & (1 << 8 * size) - 1).to_bytes(size, "little")
        path.write_bytes(data)
        try:
            with gemma4.load(path) as model:
                loaded += 1
                model.weight("layers.0.self_attn.q_proj.weight")
                model.tokenizer  # noqa: B018
        except (FormatError, NotImplementedError):
            continue
    assert 20 < loaded < 590


def test_files_changed_while_open(files, tmp_path):
    path = tmp_path / "x.gguf"
    shutil.copy(files("tiny-e"), path)
    model = gemma4.load(path)
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(FormatError, match=r"changed size.*to 5000 bytes"):
        model.forward(IDS)
