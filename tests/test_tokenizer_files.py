# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json of strangers: what Gemma's have is read, all else is refused by name, nothing panics."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

import gemma4
from gemma4.errors import FormatError
from gemma4.load import cache, gguf_tokenizer, open_checkpoint
from gemma4.media import source
from gemma4.text.tokenizer import Tokenizer

SOURCE = open_checkpoint("tiny-e").path
TABLE = json.loads((SOURCE / "tokenizer.json").read_text())
TEXTS = ["When Mary and John went", "a  b\n\n\nc <tag> d<tag>e", "Café 123 😊 <|turn>user", " apples <b>x</b>"]


def changed(**changes):
    """model_x changes the model's x."""
    table = copy.deepcopy(TABLE)
    for name, value in changes.items():
        where = table["model"] if name.startswith("model_") else table
        where[name.removeprefix("model_")] = value
    return table


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


REFUSED = {
    "continuing_subword_prefix": changed(model_continuing_subword_prefix="#"),
    "end_of_word_suffix": changed(model_end_of_word_suffix="</w>"),
    "dropout": changed(model_dropout=0.5),
    "ignore_merges": changed(model_ignore_merges=True),
    "model.type": changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "Unigram": changed(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}),
    "WordPiece": changed(model={"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}),
    "model.cache_capacity": changed(model_cache_capacity=1 << 60),
    "Precompiled": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "'aa'": changed(normalizer={"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 34}),
    "normalizer": changed(normalizer=replace({"Regex": " "}, "▁")),
    "'▁▁'": changed(normalizer=replace({"String": " "}, "▁▁")),
    "Lowercase": changed(normalizer={"type": "Lowercase"}),
    "Prepend": changed(normalizer={"type": "Prepend", "prepend": "▁" * 1000}),
    "FixedLength": changed(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "pre_tokenizer": changed(pre_tokenizer=split({"Regex": "(a|aa)+$"})),
    "Isolated": changed(pre_tokenizer=split({"String": " "})),
    "Digits": changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}),
    "ByteLevel": changed(decoder={"type": "ByteLevel", "add_prefix_space": False}),
    "RobertaProcessing": changed(post_processor={"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_gemma_does_not_have(name):
    with pytest.raises(NotImplementedError, match=f"x.json: .*{name}"):
        Tokenizer.from_json(json.dumps(REFUSED[name]), "x.json")


def added(content, number, **flags):
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False, **flags}  # fmt: skip


N = len(TABLE["model"]["vocab"])
VOCAB = TABLE["model"]["vocab"]
DAMAGED = {
    "tokens have the id of another": changed(model_vocab=VOCAB | {"one more": 1000}),
    "vocabulary is empty": changed(model_vocab={}, model_merges=[], added_tokens=[]),
    "token ids must be integers": changed(model_vocab=VOCAB | {"one more": -1}),
    "ids must be integers": changed(model_vocab=VOCAB | {"one more": 1 << 40}),
    "unk_token": changed(model_unk_token="nothing"),
    "has the id 1000 of another": changed(added_tokens=[*TABLE["added_tokens"], added("<tag>", 1000)]),
    "one id or one spelling": changed(added_tokens=[*TABLE["added_tokens"], added("<a>", N), added("<b>", N)]),
    "one spelling": changed(added_tokens=[*TABLE["added_tokens"], added("<a>", N), added("<a>", N + 1)]),
    "leaves a gap": changed(added_tokens=[*TABLE["added_tokens"], added("<a>", N + 7)]),
    "with an id, content": changed(added_tokens=[{"id": 0}]),
    "unk_token.*unk": changed(model_unk_token=["<unk>"]),
    "a merge is not of two": changed(model_merges=[5]),
    "not of two pieces": changed(model_merges=[["a", "b", "c"]]),
    "is not a tokenizer": changed(model_merges=[["no such", "pieces"]]),
    "merges.* is no list": changed(model_merges=7),
    "pairs of an id": changed(same_tokens=[[1, 2, 3]]),
    "text of their own": changed(same_tokens=[[5, "<bos>"]]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_contradictions(name):
    with pytest.raises(FormatError, match=f"x.json.*{name}"):
        Tokenizer.from_json(json.dumps(DAMAGED[name]), "x.json")


def test_a_name_that_is_there_twice():
    text = json.dumps(TABLE).replace('"dropout"', '"type": "BPE", "dropout"')
    with pytest.raises(FormatError, match="'type' is there twice"):
        Tokenizer.from_json(text, "x.json")
    with pytest.raises(FormatError, match="not a tokenizer"):
        Tokenizer.from_json("[" * 100_000, "x.json")


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma4.text.tokenizer.MAX_FILE", 1000)
    shutil.copy(SOURCE / "tokenizer.json", tmp_path)
    with pytest.raises(FormatError, match="the limit is 1,000"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("tokens", [
    [], [added("<tag>", N)], [added("<tag>", N, normalized=True)], [added("<tag>", N, lstrip=True, rstrip=True)],
    [added("apples", N, single_word=True)], [added("▁apples", VOCAB.get("▁apples", N))],
    [added("<b>", N, special=True), added("</b>", N + 1, special=True)],
])  # fmt: skip
def test_same_ids_as_the_library_reads_from_the_file(tokens):
    table = changed(added_tokens=[*TABLE["added_tokens"], *tokens])
    theirs, ours = Backend.from_str(json.dumps(table)), Tokenizer.from_json(json.dumps(table))
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_gemma_s_own_variants_are_read():
    words = split({"String": " "}, "MergedWithPrevious")
    for table in (
        changed(pre_tokenizer=words),
        changed(normalizer={"type": "Sequence", "normalizers": [TABLE["normalizer"]]}),
        changed(model_merges=[" ".join(pair) for pair in TABLE["model"]["merges"]]),
        changed(truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}),
    ):
        ours = Tokenizer.from_json(json.dumps(table))
        assert ours.encode("Once upon a time").tolist() == Tokenizer.load(SOURCE).encode("Once upon a time").tolist()


# -- quantize ----------------------------------------------------------------------------------------------------------


def folder_with(table, folder):
    shutil.copytree(SOURCE, folder)
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize(("table", "reason"), [
    (changed(normalizer=None), "spaces are not written"),
    (changed(normalizer={"type": "Sequence", "normalizers": []}), "spaces are not written"),
    (changed(model_merges=[]), "there are no merges"),
    (changed(model_unk_token=None, model_vocab={t: i for t, i in VOCAB.items() if t != "<0x0B>"}), "every byte"),
    (changed(model_byte_fallback=False), "byte_fallback is false"),
    (changed(model_fuse_unk=False), "fuse_unk is false"),
    (changed(added_tokens=[*TABLE["added_tokens"], added("<b>", 5 + VOCAB["<bos>"])]), "id 7|of another"),
    *((changed(added_tokens=[{**token, flag: True} if token["id"] == 0 else token for token in TABLE["added_tokens"]]),
       f"'<pad>' has {flag} = true") for flag in ("lstrip", "rstrip", "single_word")),
    (changed(added_tokens=[added("▁the", VOCAB["▁the"], normalized=True)]), "normalized = true"),
    (changed(added_tokens=[added("<0x41>", VOCAB["<0x41>"])]), "spelled as a byte"),
    (changed(added_tokens=TABLE["added_tokens"][:3]), "spelled as a control token"),
])  # fmt: skip
def test_quantize_refuses_what_would_change_ids(tmp_path, table, reason):
    with pytest.raises((NotImplementedError, FormatError), match=reason):
        gemma4.quantize(folder_with(table, tmp_path / "m"), tmp_path / "x.gguf", type="Q8_0")
    assert not (tmp_path / "x.gguf").exists()


def test_quantize_keeps_harmless_changes_to_the_id(tmp_path):
    tokens = [{**token, "normalized": token["content"] == "<eos>"} for token in TABLE["added_tokens"]]
    table = changed(added_tokens=tokens, pre_tokenizer=split({"String": " "}, "MergedWithPrevious"))
    source = folder_with(table, tmp_path / "m")
    gemma4.quantize(source, tmp_path / "x.gguf", type="Q8_0")
    ours, theirs = gemma4.load(source), gemma4.load(tmp_path / "x.gguf")
    for text in [*TEXTS, "a<eos>b <eos>"]:
        assert ours.to_tokens(text).tolist() == theirs.to_tokens(text).tolist()


# -- GGUF --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gemma4.quantize("tiny-e", path, type="Q8_0")
    return path


def with_tokens(path, out, edit):
    """A copy of the file whose tokens are edited."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "gemma4")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == "tokenizer.ggml.tokens":
            value = edit(value)
        kind, of = field.types[0], field.types[-1]
        is_array = kind == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, value, kind, sub_type=of if is_array else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_token_that_is_there_twice(gguf_file, tmp_path, monkeypatch):
    """Of Google's own files three are reported: one id encodes, both decode, and info() says so."""
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))
    whole = gemma4.load(gguf_file)
    word = int(whole.to_tokens(" gave", bos=False)[0])
    last = whole.d_vocab - 1

    def edit(tokens):
        return [*tokens[:-2], "<turn|>", tokens[word]]

    path = with_tokens(gguf_file, tmp_path / "twice.gguf", edit)
    for _ in range(2):  # made, and read from the cache
        model = gemma4.load(path)
        for text in [*TEXTS, "When Mary and John went to the store, John gave a book to"]:
            assert model.to_tokens(text).tolist() == whole.to_tokens(text).tolist()
        assert model.to_string([last]) == model.to_string([word]) == " gave"
        assert model.tokenizer.id_to_piece(last - 1) == "<turn|>" and last - 1 in model.tokenizer.special_ids
        assert model.tokenizer.vocab_size == whole.d_vocab
        assert "2 tokens of the vocabulary repeat others" in str(model.info())
        answer = model.generate(
            "When Mary and John went to the store, John gave a book to", temperature=0, max_tokens=2
        )
        assert answer.text == " Mary."
    assert "repeat" not in str(whole.info())


def test_of_equal_tokens_the_named_one_encodes(gguf_file, tmp_path, monkeypatch):
    """A second "<bos>" at the place of another token: the file says which is meant."""
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))
    path = with_tokens(gguf_file, tmp_path / "x.gguf", lambda tokens: ["<bos>", *tokens[1:]])
    for _ in range(2):
        model = gemma4.load(path)
        assert model.to_tokens("Once")[0] == 2 == model.config.bos_token_id
        assert model.to_string([0]) == "<bos>" == model.to_string([2])


def test_a_long_token_without_merges():
    """Every way to cut 600,000 characters in two took hours; the limit is in the message."""

    class Array:
        def __init__(self, values):
            self._values, self.count, self.is_strings = values, len(values), isinstance(values[0], str)

        def __len__(self):
            return self.count

        def values(self):
            return self._values

        def numbers(self):
            return np.array(self._values)

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": Array(["a", "b", "a" * 600_000]),
        "tokenizer.ggml.scores": Array([0.0, -1.0, -2.0]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_tokenizer, "GgufArray", Array)
        with pytest.raises(FormatError, match=r"600,000 characters.*the limit is [\d,]+"):
            gguf_tokenizer.tokenizer_table(metadata, "x.gguf")


def test_a_cached_file_is_read_by_content(gguf_file, tmp_path, monkeypatch):
    """A whole and well-formed tokenizer that is not the one that was kept is made again."""
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))
    ids = open_checkpoint(gguf_file).load_tokenizer().encode("The cat sat.").tolist()
    [kept] = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    table = json.loads(whole)
    a, b = "▁the", "▁a"
    table["model"]["vocab"][a], table["model"]["vocab"][b] = table["model"]["vocab"][b], table["model"]["vocab"][a]
    for damaged in (json.dumps(table).encode(), whole[:-1], whole[: len(whole) // 2], b"", b"\xff" + whole[1:]):
        kept.write_bytes(damaged)
        assert open_checkpoint(gguf_file).load_tokenizer().encode("The cat sat.").tolist() == ids
        assert kept.read_bytes() == whole
    for text in (
        '{"model":5}',
        "{" + '"a":[' * 50_000,
        json.dumps(table | {"sha256": 0, "normalizer": {"type": "Lowercase"}}),
    ):
        kept.write_bytes((cache._seal(text) + text[1:]).encode())  # whole, and of another version or a stranger's
        assert open_checkpoint(gguf_file).load_tokenizer().encode("The cat sat.").tolist() == ids
        assert kept.read_bytes() == whole


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs")
def test_a_pipe_in_the_cache_is_not_waited_for(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))
    ids = gemma4.load(gguf_file).to_tokens("The cat sat.").tolist()
    [kept] = (tmp_path / "cache").iterdir()
    kept.unlink()
    os.mkfifo(kept)
    code = f"import gemma4; print(gemma4.load({str(gguf_file)!r}).to_tokens('The cat sat.').tolist())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{ids}\n", done.stderr


def test_cache_folder_of_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GEMMA4_CACHE", "~/x")
    assert cache.directory() == tmp_path / "x"


def test_cache_folder_of_nobody(gguf_file, monkeypatch, tmp_path):
    """No such user, no home: the name as it is, and a tokenizer in any case."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA4_CACHE", "~nobody-of-that-name/x")
    assert gemma4.load(gguf_file).to_tokens("Once").tolist() == gemma4.load("tiny-e").to_tokens("Once").tolist()


# -- memory ------------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import gemma4
model = gemma4.load("tiny-e", threads=2)
{before}
size = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[1]),) * 2)
try:
    {action}
except MemoryError:
    print("MemoryError")
else:
    print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
@pytest.mark.parametrize("extra", [1 << 18, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20])
@pytest.mark.parametrize(("before", "action"), [
    ("", "model.to_tokens('hello world ' * 20_000)"),
    ("model.tokenizer", "model.to_tokens('hello world ' * 20_000)"),
    ("import numpy; x = numpy.zeros(48_000, 'f4')", "model.encode_audio(x)"),
    ("from gemma4.interp.lens import logit_lens; model.tokenizer", "logit_lens(model, list(range(2, 200)))"),
    ("import os; os.environ['GEMMA4_CACHE'] = '0'", "gemma4.load('tiny-e', threads=2).forward([2, 5])"),
])  # fmt: skip
def test_little_memory(extra, before, action):
    code = LIMITED.format(before=before, action=action)
    done = subprocess.run([sys.executable, "-P", "-c", code, str(extra)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout in ("MemoryError\n", "done\n"), done.stdout + done.stderr
    assert extra < 256 << 20 or done.stdout == "done\n"


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
@pytest.mark.parametrize("extra", [1 << 18, 4 << 20, 32 << 20, 128 << 20, 512 << 20])
def test_quantize_in_little_memory(tmp_path, extra):
    out = tmp_path / "x.gguf"
    code = LIMITED.format(before="", action=f"gemma4.quantize('tiny-e', {str(out)!r}, type='Q4_0', threads=2)")
    done = subprocess.run([sys.executable, "-P", "-c", code, str(extra)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout in ("MemoryError\n", "done\n"), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == ([out] if done.stdout == "done\n" else [])


def test_a_library_that_does_not_fit_is_a_memory_error(monkeypatch):
    """Python reports a shared library that cannot be mapped as ImportError; no package is missing."""

    def import_module(name):
        raise ImportError(f"{name}.so: failed to map segment from shared object")

    monkeypatch.setattr(source.importlib, "import_module", import_module)
    with pytest.raises(MemoryError, match="av cannot be loaded"):
        source.require("av")
