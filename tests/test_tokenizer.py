# SPDX-License-Identifier: Apache-2.0
"""Gemma 4's real tokenizer: ids equal to transformers' and to a merge loop of our own, BOS, streaming."""

import json
import lzma
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from gemma4.errors import FormatError
from gemma4.text.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"

TEXTS = {
    "empty": "",
    "space": " ",
    "word": "Hello",
    "english": "The quick brown fox, it's said, jumps over 13 lazy dogs!",
    "spaces": "  two   three    four     five",
    "trailing": "ends with spaces   ",
    "tabs": "a\tb\t\tc\t\t\td",
    "carriage": "line\r\nline\r\n\r\n\rend",
    "newlines": "\n",
    "mixed space": " \n \t \n\n  \n\t",
    "digits": "0123456789 3.14159 1,000,000 2026-04-02",
    "german": "Größenwahn und Übermut: Straßenbahnhaltestelle",
    "french": "L'été, où êtes-vous ? « Ça va. »",
    "russian": "Съешь ещё этих мягких французских булок",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "hebrew": "דג סקרן שט בים",
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "我能吞下玻璃而不伤身体。",
    "japanese": "いろはにほへと ちりぬるを カタカナ",
    "korean": "다람쥐 헌 쳇바퀴에 타고파",
    "burmese": "သီဟိုဠ်မှ ဉာဏ်ကြီးရှင်သည်",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🧑🏿‍🚀 🇩🇪",
    "combining": "e\u0301 vs \u00e9, Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "math": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β)",
    "code": "def f(x):\n    return {'a': x ** 2}  # ok\n\n\nclass A:\n\tpass\n",
    "json": '{"k": [1, -2.5e+10, null, true, "\\u00e9"]}',
    "html": '<div class="x"><b>bold</b></div><br/><table><tr><td>',
    "url": "https://example.org/a?b=c&d=%20#e",
    "controls": "\x00\x01\x02\x1b[0m\x7f\x80\x9f",
    "private": "\ue000\uf8ff\U000f0000",
    "rare": "𒀀𓀀𝔘𝔫𝔦 \U0001f9ff\u0d9a",
    "meta": "a▁b ▁ ▁▁c",
    "bytes text": "<0x41><0xFF>",
    "unused": "<unused0> <unused99>",
    "long word": "Donaudampfschiff" * 20,
    "replacement": "\ufffd \ufeff\u200b\u2028",
    "eos in text": "a<eos>b<pad>c<unk>d<mask>e",
    "turns": "<|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    "near turns": "<|turn <turn|> <|turn|> |turn>",
    "tools": '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><|tool_response>',
    "media": "<|image><|image|><image|> <|audio|><|video|>",
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(lzma.decompress((DATA / "tokenizer.json.xz").read_bytes()))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return Tokenizer.load(tokenizer_file.parent)


@pytest.fixture(scope="session")
def reference(tokenizer_file):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))


def plain(tokenizer, text):
    return tokenizer.encode(text, bos=False).tolist()


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_transformers_ids(tokenizer, reference, name):
    text = TEXTS[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids[0] == 2
    assert ids[1:].tolist() == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids[1:]) == text.replace("▁", " ")


def random_text(rng):
    pools = [
        "abc XYZ",
        " ",
        "\n",
        "\t",
        "0123",
        "éßñ",
        "漢字かな",
        "🤖👍🏽‍",
        "\x00\x7f\r",
        "<|turn>",
        "<turn|>",
        "𝕏𒀀",
        "▁",
        "اب",
    ]
    parts = rng.choices(pools, k=rng.randrange(1, 12))
    return "".join(p if "turn" in p else "".join(rng.choices(p, k=rng.randrange(1, 9))) for p in parts)


def test_random_ids_are_transformers_ids(tokenizer, reference):
    rng = random.Random(1)
    for _ in range(1500):
        text = random_text(rng)
        ids = plain(tokenizer, text)
        assert ids == reference.encode(text, add_special_tokens=False), repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_merge_loop(tokenizer, tokenizer_file):
    """An independent reading of the format: UTF-8 bytes for unknown characters, always the lowest-ranked merge."""
    model = json.loads(tokenizer_file.read_text())["model"]
    vocab = model["vocab"]
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    rank = {}
    for i, pair in enumerate(pairs):
        rank.setdefault(pair, i)

    def encode(text):
        pieces = []
        for c in text.replace(" ", "▁"):
            pieces += [c] if c in vocab else [f"<0x{b:02X}>" for b in c.encode()]
        while True:
            best = min(
                range(len(pieces) - 1), key=lambda i: rank.get((pieces[i], pieces[i + 1]), 1 << 60), default=None
            )
            if best is None or (pieces[best], pieces[best + 1]) not in rank:
                return [vocab[p] for p in pieces]
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]

    for name, text in TEXTS.items():
        if "<" not in text:  # no control tokens
            assert plain(tokenizer, text) == encode(text), name


@pytest.mark.parametrize(("char", "base", "first"), [("\n", 107, 1), (" ", 138, 2), ("\t", 255968, 1)])
def test_runs(tokenizer, reference, char, base, first):
    """Runs of up to 31 newlines, spaces or tabs are one token each; a longer run is 31 and the rest."""
    for n in range(1, 41):
        ids = plain(tokenizer, char * n)
        assert ids == reference.encode(char * n, add_special_tokens=False)
        assert tokenizer.decode(ids) == char * n
        if first <= n <= 31:
            assert len(ids) == 1 and (char != "\n" or ids == [106 + n]) and (char != " " or ids == [136 + n])
        elif n > 31:
            assert len(ids) == 2
        assert plain(tokenizer, f"a{char * n}b") == reference.encode(f"a{char * n}b", add_special_tokens=False)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["x", "the quick brown fox ", "é🤖漢 ", " ", "ab<|turn>"])
def test_one_megabyte_in_one_line(tokenizer, reference, line):
    text = (line * (2**20 // len(line.encode()) + 1)).encode()[: 2**20].decode(errors="ignore")
    start = time.perf_counter()
    ids = plain(tokenizer, text)
    seconds = time.perf_counter() - start
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert seconds < 20  # linear: about one second on one core; a quadratic merge loop would take hours


@pytest.mark.parametrize("text", ["Hi", "<bos>Hi", "<bos><bos><bos>Hi"])
def test_bos_exactly_once(tokenizer, text):
    assert tokenizer.encode(text).tolist() == [2, *plain(tokenizer, "Hi")]
    assert tokenizer.encode("").tolist() == tokenizer.encode("<bos>").tolist() == [2]


@pytest.mark.slow
def test_bos_of_the_file_s_own_post_processor_is_not_doubled(tokenizer_file, tmp_path):
    table = json.loads(tokenizer_file.read_text())
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
    }
    table["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("one two three four five six").tolist()
    assert ids.count(2) == 1 and ids[0] == 2 and len(ids) == 7  # nor is anything cut off
    assert 2 not in tokenizer.encode("one", bos=False)


def test_special_tokens(tokenizer):
    expected = {
        "<pad>": 0,
        "<eos>": 1,
        "<bos>": 2,
        "<unk>": 3,
        "<|tool_call>": 48,
        '<|"|>': 52,
        "<|think|>": 98,
        "<|channel>": 100,
        "<channel|>": 101,
        "<|turn>": 105,
        "<turn|>": 106,
        "<|image|>": 258880,
    }
    for text, token in expected.items():
        assert plain(tokenizer, text) == [token] == [tokenizer.piece_to_id(text)]
        assert token in tokenizer.special_ids and tokenizer.id_to_piece(token) == text
    assert len(tokenizer.special_ids) == 24 and tokenizer.vocab_size == len(tokenizer) == 262144
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 1, 0)


def test_text_from_strangers_cannot_write_control_tokens(tokenizer):
    for token in sorted(tokenizer.special_ids):
        text = f"a {tokenizer.id_to_piece(token)} b"
        ids = tokenizer.encode(text, bos=False, parse_special=False)
        assert not tokenizer.special_ids & set(ids.tolist()) and tokenizer.decode(ids) == text
        assert token in tokenizer.encode(text, bos=False)  # and the switch is not left on
    assert tokenizer.encode("<bos>x", parse_special=False).tolist().count(2) == 1


@pytest.mark.slow
def test_control_tokens_listed_as_ordinary_are_still_special(tokenizer_file, tmp_path):
    table = json.loads(tokenizer_file.read_text())
    for token in table["added_tokens"]:
        token["special"] = token["id"] < 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer.special_ids) == 24
    assert 105 not in tokenizer.encode("<|turn>", parse_special=False) and 105 in tokenizer.encode("<|turn>")


def test_skip_special(tokenizer):
    ids = tokenizer.encode("<|turn>user\nHi<turn|>")
    assert tokenizer.decode(ids) == "<bos><|turn>user\nHi<turn|>"
    assert tokenizer.decode(ids, skip_special=True) == "user\nHi"


def test_stream_never_shows_half_a_character(tokenizer):
    text = "a𝕏é\U0001f9ff\x07 漢\r\n𒀀"
    ids = plain(tokenizer, text)
    stream, out = tokenizer.decode_stream(), []
    for token in ids:
        out.append(stream.push(token))
        assert "�" not in out[-1] and text.startswith("".join(out))
    assert "".join(out) + stream.flush() == text and "" in out


def test_stream_of_broken_bytes(tokenizer):
    def b(value):
        return tokenizer.piece_to_id(f"<0x{value:02X}>")

    word = tokenizer.piece_to_id("a")
    assert tokenizer.decode([b(0xF0), b(0x9D)]) == "�"  # an end in the middle of a character
    assert tokenizer.decode([b(0xF0), word]) == "�a" and tokenizer.decode([b(0xFF), b(0xFE)]) == "��"
    assert tokenizer.decode([b(0xC3), 2, b(0xA9)], skip_special=True) == "��"  # no character across a control token
    stream = tokenizer.decode_stream()
    assert [stream.push(b(0xC3)), stream.push(b(0xA9))] == ["", "é"] and stream.flush() == ""


def test_random_ids_stream_to_what_decode_gives(tokenizer):
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.choice((rng.randrange(238, 494), rng.randrange(262144))) for _ in range(rng.randrange(20))]
        stream = tokenizer.decode_stream()
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_str_tokens_and_pieces(tokenizer):
    assert tokenizer.str_tokens("Hi there") == ["<bos>", "Hi", " there"]
    assert tokenizer.str_tokens("𝕏", bos=False) == ["<0xF0>", "<0x9D>", "<0x95>", "<0x8F>"]
    assert tokenizer.str_tokens(np.array([2, 107])) == ["<bos>", "\n"]
    assert tokenizer.id_to_piece(tokenizer.piece_to_id("▁there")) == "▁there"
    with pytest.raises(KeyError, match="▁"):
        tokenizer.piece_to_id(" there")
    for bad in (-1, 262144, 1 << 40):
        with pytest.raises(ValueError, match="262144"):
            tokenizer.decode([bad])


def test_lone_surrogate(tokenizer):
    with pytest.raises(ValueError, match="Unicode"):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json", '{"model": {"type": "BPE"}}'])
def test_damaged_file(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="token ids"):
        Tokenizer.load(tmp_path)


def test_llama_cpp_cases(tokenizer):
    """GEMMA4_LLAMACPP names a llama.cpp source folder: its own test strings and ids for this vocabulary."""
    folder = Path(os.environ.get("GEMMA4_LLAMACPP", "/nonexistent")) / "models"
    if not folder.is_dir():
        pytest.skip("GEMMA4_LLAMACPP is not set")
    texts = (folder / "ggml-vocab-gemma-4.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-gemma-4.gguf.out").read_text().splitlines()
    assert len(lines) >= 40
    for text, line in zip(texts, lines, strict=False):
        assert plain(tokenizer, text) == [int(i) for i in line.split()], repr(text)
