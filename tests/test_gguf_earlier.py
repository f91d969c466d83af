# SPDX-License-Identifier: Apache-2.0
"""GGUF files of Gemma 2 and Gemma 3: every site as from the Hugging Face directory to the bit, and no wrong answers.

The directories are compared with the reference implementation in tests/reference; here each has the released sizes'
numbers of layers, patterns, windows, scales and RoPE, and is narrow.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf_files import convert, convert_mmproj, metadata, vocabulary_of
from safetensors.numpy import load_file, save_file
from small_models import F, S, write_checkpoint, write_multimodal_checkpoint

import gemma4
from gemma4.errors import FormatError
from gemma4.load import open_checkpoint
from gemma4.load.gguf import GgufFile
from gemma4.load.gguf_config import parse_metadata
from gemma4.load.gguf_tokenizer import merges_from_scores, tokenizer_table
from gemma4.load.names import text_tensors
from gemma4.quantization.metadata import _scores
from gemma4.text.tokenizer import CONTROL, Tokenizer

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
IDS = [2, *((7 * i * i) % 300 for i in range(60))]  # several windows

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA2 = BASE | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = BASE | {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2-2b": GEMMA2 | {"num_hidden_layers": 26},
    "gemma2-9b": GEMMA2 | {"num_hidden_layers": 42, "num_attention_heads": 8},
    # scores are scaled by the width per head, 10, and not by the head size, 8
    "gemma2-27b": GEMMA2 | {"num_hidden_layers": 46, "query_pre_attn_scalar": 10},
    "gemma2-low-caps": GEMMA2 | {"num_hidden_layers": 4, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5},
    "gemma3-270m": GEMMA3 | {"num_hidden_layers": 18, "num_key_value_heads": 1},
    "gemma3-1b": GEMMA3 | {"num_hidden_layers": 26, "num_key_value_heads": 1},  # the last two layers slide
    "gemma3-4b": GEMMA3 | LINEAR | {"num_hidden_layers": 34, "vocab_size": 384},  # rows beyond the tokenizer
    "gemma3-12b": GEMMA3 | LINEAR | {"num_hidden_layers": 48, "num_attention_heads": 8},
    "gemma3-27b": GEMMA3 | LINEAR | {"num_hidden_layers": 62, "query_pre_attn_scalar": 10},
    "gemma3-untied": GEMMA3 | {"num_hidden_layers": 7, "tie_word_embeddings": False, "final_logit_softcapping": 2.0},
    "gemma3-window-1": GEMMA3
    | {"num_hidden_layers": 7, "sliding_window": 1, "head_dim": 10, "query_pre_attn_scalar": 10},
}
EVERY = pytest.mark.parametrize("name", MODELS)
Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMA4_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """folder(config, dtype) -> its Hugging Face directory, with norms near 0 as these models store them."""
    made: dict[str, Path] = {}

    def get(config: dict[str, Any], dtype: Any = np.float32) -> Path:
        key = json.dumps(config) + np.dtype(dtype).name
        if key not in made:
            made[key] = path = write_checkpoint(tmp_path_factory.mktemp("hf"), config)
            tensors = load_file(path / "model.safetensors")
            if "model.lm_head.weight" in tensors:
                tensors["lm_head.weight"] = tensors.pop("model.lm_head.weight")
            for name, values in tensors.items():
                values = values.astype(np.float32)
                tensors[name] = (values - 1 if name.endswith("norm.weight") else values).astype(dtype)
            save_file(tensors, path / "model.safetensors")
        return made[key]

    return get


def same_sites(ours: gemma4.Model, theirs: gemma4.Model) -> None:
    found, expected = ours.run_with_cache(IDS, "*"), theirs.run_with_cache(IDS, "*")
    assert np.array_equal(found[0], expected[0])
    assert list(found[1]) == list(expected[1])
    for site, values in expected[1].items():
        assert np.array_equal(found[1][site], values), site


# -- the same model ----------------------------------------------------------------------------------------------------


@EVERY
def test_every_site_is_that_of_the_directory(name: str, folder: Folder, tmp_path: Path) -> None:
    source = folder(MODELS[name])
    with gemma4.load(convert(source, tmp_path / "x.gguf", "F32")) as ours, gemma4.load(source) as theirs:
        assert ours.engine.precision == "exact"
        same_sites(ours, theirs)


@EVERY
def test_configuration(name: str, folder: Folder, tmp_path: Path) -> None:
    source = folder(MODELS[name])
    with open_checkpoint(convert(source, tmp_path / "x.gguf", "F32")) as ours, open_checkpoint(source) as theirs:
        different = {key for key, value in vars(theirs.config).items() if value != getattr(ours.config, key)}
        assert different <= {"unit_gains", "eos_token_ids", "bos_token_id", "pad_token_id"}
        assert theirs.config.unit_gains and not ours.config.unit_gains
        assert ours.n_parameters == theirs.n_parameters and ours.ignored == ()


def test_gains_are_what_is_stored(folder: Folder, tmp_path: Path) -> None:
    source = folder(MODELS["gemma3-270m"])
    with gemma4.load(convert(source, tmp_path / "x.gguf", "F32")) as ours, gemma4.load(source) as theirs:
        for norm in ("norm", "layers.3.self_attn.q_norm", "layers.17.post_feedforward_layernorm"):
            assert np.array_equal(ours.gain(norm), theirs.gain(norm))
            assert np.array_equal(ours.gain(norm), ours.weight(f"{norm}.weight"))


@pytest.mark.parametrize("name", ["gemma2-2b", "gemma3-4b"])
def test_released_files_are_bfloat16(name: str, folder: Folder, tmp_path: Path) -> None:
    """Norms become F32, of which each is exact; the scale of embeddings is rounded as the table's type."""
    source = folder(MODELS[name], ml_dtypes.bfloat16)
    with gemma4.load(convert(source, tmp_path / "x.gguf", "BF16")) as ours, gemma4.load(source) as theirs:
        assert ours.engine_config["embed_scale"] == theirs.engine_config["embed_scale"] == 6.3125
        same_sites(ours, theirs)


@pytest.mark.parametrize("name", ["gemma2-2b", "gemma3-1b"])
def test_quantised_weights(name: str, folder: Folder, tmp_path: Path) -> None:
    """Q8_0 in wide enough matrices, at the usual precision."""
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "query_pre_attn_scalar": 16}
    source = folder(MODELS[name] | wide)
    with gemma4.load(convert(source, tmp_path / "x.gguf", "Q8_0")) as ours, gemma4.load(source) as theirs:
        assert ours.engine.precision == "fast" and "Q8_0" in ours.checkpoint.dtypes
        expected = theirs.forward(IDS)
        assert np.abs(ours.forward(IDS) - expected).mean() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gemma2-low-caps", "gemma3-1b"])
@pytest.mark.parametrize("pattern", [3, [True, False, False, True, True, False], [1, 1, 1, 1, 1, 1], 1])
def test_a_pattern_in_the_file_counts(name: str, pattern: Any, folder: Folder, tmp_path: Path) -> None:
    types = [S if slides else F for slides in pattern] if isinstance(pattern, list) else []
    config = MODELS[name] | {
        "num_hidden_layers": 6,
        "layer_types": types or [S if (i + 1) % pattern else F for i in range(6)],
    }
    source, prefix = folder(config), config["model_type"].removesuffix("_text")
    keys = {
        f"{prefix}.attention.sliding_window_pattern": pattern,
        f"{prefix}.rope.freq_base": 1e4 if prefix == "gemma2" else 1e6,
    }
    with gemma4.load(convert(source, tmp_path / "x.gguf", "F32", keys=keys)) as ours, gemma4.load(source) as theirs:
        same_sites(ours, theirs)


ROPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "own base": ("gemma3-1b", {"rope_local_base_freq": 700.0}, {"gemma3.rope.freq_base_swa": 700.0}),
    "ollama's name": ("gemma3-1b", {"rope_local_base_freq": 700.0}, {"gemma3.rope.local.freq_base": 700.0}),
    "older key": (
        "gemma3-1b",
        LINEAR,
        {"gemma3.rope.scaling.type": None, "gemma3.rope.scaling.factor": None, "gemma3.rope.scale_linear": 8.0},
    ),
    "no type": ("gemma3-1b", LINEAR, {"gemma3.rope.scaling.type": None}),
    "type none": ("gemma3-1b", {}, {"gemma3.rope.scaling.type": "none", "gemma3.rope.scaling.factor": 8.0}),
    "factor zero": ("gemma3-1b", {}, {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 0.0}),
    "gemma 2, base": ("gemma2-low-caps", {"rope_theta": 700.0}, {"gemma2.rope.freq_base": 700.0}),
    "gemma 2, scaled": ("gemma2-low-caps", LINEAR, {"gemma2.rope.scaling.factor": 8.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_spellings_of_rope(case: str, folder: Folder, tmp_path: Path) -> None:
    name, changes, keys = ROPES[case]
    source = folder(MODELS[name] | {"num_hidden_layers": 8} | changes)
    with gemma4.load(convert(source, tmp_path / "x.gguf", "F32", keys=keys)) as ours, gemma4.load(source) as theirs:
        same_sites(ours, theirs)


@pytest.mark.parametrize("keys", [{"gemma3.attention.sliding_window": None}, {"gemma3.attention.sliding_window": 0}])
def test_no_window_is_no_sliding_layer(keys: dict[str, Any], folder: Folder, tmp_path: Path) -> None:
    """As in Rnj-1, of 32 layers, whose logits have a softcap."""
    config = GEMMA3 | {"num_hidden_layers": 32, "layer_types": [F] * 32, "final_logit_softcapping": 3.0}
    source = folder(config)
    with gemma4.load(convert(source, tmp_path / "x.gguf", "F32", keys=keys)) as ours, gemma4.load(source) as theirs:
        assert set(ours.config.layer_types) == {F}
        same_sites(ours, theirs)


def test_defaults_of_gemma_2(folder: Folder, tmp_path: Path) -> None:
    source = folder(MODELS["gemma2-low-caps"])
    absent = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    with open_checkpoint(convert(source, tmp_path / "x.gguf", keys={f"gemma2.{key}": None for key in absent})) as ours:
        c = ours.config
        assert (c.sliding_window, c.attention_softcap, c.logit_softcap) == (4096, 50.0, 30.0)
        assert c.rope[S] == c.rope[F] and c.rope[F].theta == 1e4


# -- text --------------------------------------------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}
{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def gemma3_vocabulary(changed_type: dict[str, int] | None = None) -> dict[str, Any]:
    """tiny-e's, with the chat format of Gemma 3 in the places of Gemma 4's: a SentencePiece vocabulary with scores."""
    table = json.loads((TINY / "tokenizer.json").read_text())
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(table["model"]["merges"]):
        rank.setdefault(left + right, number)
    keys = vocabulary_of(table)
    tokens = keys["tokenizer.ggml.tokens"]
    new = {"<|turn>": "<start_of_turn>", "<turn|>": "<end_of_turn>"}
    renamed = [new.get(t, f"<spare{i}>" if CONTROL.fullmatch(t) else t) for i, t in enumerate(tokens)]
    kinds = [
        (changed_type or {}).get(token, kind)
        for token, kind in zip(renamed, keys["tokenizer.ggml.token_type"], strict=True)
    ]
    keys |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": renamed,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [-float(rank.get(token, 0)) for token in tokens],
        "tokenizer.chat_template": TEMPLATE,
    }
    return keys


def with_text(folder: Folder, path: Path, kinds: dict[str, int] | None = None) -> Path:
    config = GEMMA3 | {"num_hidden_layers": 7, "vocab_size": 2603 + 64}  # 64 rows without a token
    return convert(folder(config), path, "F32", keys=gemma3_vocabulary(kinds))


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_chat_and_where_it_stops(kind: int, folder: Folder, tmp_path: Path) -> None:
    """Files call the chat format's tokens ordinary, control or user-defined: they are control tokens."""
    kinds = dict.fromkeys(("<start_of_turn>", "<end_of_turn>"), kind)
    with gemma4.load(with_text(folder, tmp_path / "x.gguf", kinds)) as model:
        turn, end = 105, 106
        assert list(model.checkpoint.generation_config["eos_token_id"]) == [1, end]
        assert model.config.eos_token_ids == (1, end)
        prompt = "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
        found = model.generate([{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0.0)
        alone = model.generate(model.to_tokens(prompt, bos=False), max_tokens=4, temperature=0.0)
        assert list(found.tokens) == list(alone.tokens) and found.prompt_tokens == alone.prompt_tokens
        assert {turn, end} <= model.tokenizer.special_ids
        assert end not in model.tokenizer.encode("a<end_of_turn>", parse_special=False)
        assert list(model.tokenizer.encode("<end_of_turn>", bos=False)) == [end]


def test_no_plain_text_becomes_a_control_token(folder: Folder, tmp_path: Path) -> None:
    """Scores alone would let the pieces of a control token be merged."""
    keys = gemma3_vocabulary()
    at = keys["tokenizer.ggml.tokens"].index("ing")
    keys["tokenizer.ggml.token_type"][at] = 3
    config = GEMMA3 | {"num_hidden_layers": 7, "vocab_size": 2603}
    with open_checkpoint(convert(folder(config), tmp_path / "x.gguf", keys=keys)) as ours:
        tokenizer = ours.load_tokenizer()
        assert at in tokenizer.encode("xing") and at not in tokenizer.encode("xing", parse_special=False)


def test_rows_without_a_token(folder: Folder, tmp_path: Path) -> None:
    with gemma4.load(with_text(folder, tmp_path / "x.gguf")) as model:
        assert (model.d_vocab, model.tokenizer.vocab_size) == (2667, 2603)
        assert model.forward([2, 2666]).shape == (2, 2667)
        assert len(model.generate("Once", max_tokens=8, seed=3).tokens) <= 8


def test_the_turn_of_a_function_call_ends(folder: Folder, tmp_path: Path) -> None:
    """FunctionGemma awaits the function's answer there."""
    keys = gemma3_vocabulary()
    keys["tokenizer.ggml.tokens"][50] = "<start_function_response>"
    config = GEMMA3 | {"num_hidden_layers": 7, "vocab_size": 2603}
    with open_checkpoint(convert(folder(config), tmp_path / "x.gguf", keys=keys)) as ours:
        assert ours.config.eos_token_ids == (1, 106, 50)


# -- written by gemma4.quantize ----------------------------------------------------------------------------------------


@EVERY
def test_written_files_are_the_same_model(name: str, folder: Folder, tmp_path: Path) -> None:
    source = folder(MODELS[name])
    result = gemma4.quantize(source, tmp_path / "x.gguf", type="F32")
    assert result.path.stat().st_size == result.nbytes
    with gemma4.load(result.path) as ours, gemma4.load(source) as theirs:
        same_sites(ours, theirs)


@EVERY
def test_written_files_are_those_of_the_converter(name: str, folder: Folder, tmp_path: Path) -> None:
    """The same keys, and the base of sliding layers where there are some; the same tensors to the bit."""
    source = folder(MODELS[name])
    with open_checkpoint(source) as checkpoint:
        expected = {key: value for key, value in metadata(checkpoint).items() if value is not None}
    ours = GgufFile(gemma4.quantize(source, tmp_path / "x.gguf", type="F32").path)
    theirs = GgufFile(convert(source, tmp_path / "y.gguf", "F32"))
    family = name.partition("-")[0]
    found = {key: value for key, value in ours.metadata.items() if not key.startswith(("general.", "tokenizer."))}
    more = {f"{family}.rope.freq_base_swa": 1e4, f"{family}.rope.freq_base": 1e4, f"{family}.vocab_size": 0}
    assert {key: found[key] for key in expected} == expected and set(found) <= {*expected, *more}
    assert ours.metadata["general.architecture"] == family
    assert set(ours.tensors) == set(theirs.tensors)
    for tensor in ours.tensors:
        assert np.array_equal(ours.array(tensor), theirs.array(tensor)), tensor


WRITTEN: dict[str, dict[str, Any]] = {
    "pattern": MODELS["gemma3-1b"] | {"num_hidden_layers": 5, "layer_types": [F, S, F, S, S]},
    "pattern of gemma 2": MODELS["gemma2-2b"] | {"num_hidden_layers": 5, "layer_types": [F, S, S, F, F]},
    "all sliding": MODELS["gemma3-1b"] | {"num_hidden_layers": 4},
    "all global": MODELS["gemma3-1b"] | {"num_hidden_layers": 3, "layer_types": [F] * 3},
    "all global, gemma 2": MODELS["gemma2-2b"] | {"num_hidden_layers": 3, "layer_types": [F] * 3},
    "bases": MODELS["gemma3-1b"] | LINEAR | {"num_hidden_layers": 8, "rope_theta": 900.0, "rope_local_base_freq": 70.0},
    "base of gemma 2": MODELS["gemma2-2b"] | LINEAR | {"num_hidden_layers": 4, "rope_theta": 900.0},
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", WRITTEN)
def test_written_options(case: str, dtype: Any, folder: Folder, tmp_path: Path) -> None:
    source = folder(WRITTEN[case], dtype)
    kind = "F32" if dtype is np.float32 else "BF16"
    first = gemma4.quantize(source, tmp_path / "x.gguf", type=kind).path
    again = gemma4.quantize(first, tmp_path / "y.gguf", type=kind).path  # from a GGUF file: gains stay as they are
    with gemma4.load(source) as theirs:
        for path in (first, again):
            with gemma4.load(path) as ours:
                same_sites(ours, theirs)


def test_quantised_as_the_converter_and_llama_quantize(folder: Folder, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "query_pre_attn_scalar": 16}
    source = folder(MODELS["gemma3-1b"] | wide)
    result = gemma4.quantize(source, tmp_path / "x.gguf", type="Q8_0")
    ours, theirs = GgufFile(result.path), GgufFile(convert(source, tmp_path / "y.gguf", "Q8_0"))
    assert {info.dtype for info in ours.tensors.values()} == {"Q8_0", "F32"}
    for tensor in ours.tensors:
        assert np.array_equal(ours.array(tensor), theirs.array(tensor)), tensor


UNSAID: dict[str, tuple[dict[str, Any], str]] = {
    "scale": (MODELS["gemma2-2b"] | {"query_pre_attn_scalar": 10}, "gemma2 cannot say this model's attention_scale"),
    "scale of 27B": (MODELS["gemma3-27b"] | {"query_pre_attn_scalar": 8}, "gemma3 cannot say .*attention_scale"),
    "no caps": (MODELS["gemma2-2b"] | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
                "cannot say this model's logit_softcap, attention_softcap"),
    "scaled sliding layers": (
        MODELS["gemma3-1b"]
        | {"rope_parameters": {S: {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "rope_inv_freq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAID)
def test_what_the_keys_cannot_say_is_not_written(case: str, folder: Folder, tmp_path: Path) -> None:
    config, message = UNSAID[case]
    with pytest.raises(NotImplementedError, match=message):
        gemma4.quantize(folder(config), tmp_path / "x.gguf", type="F32")
    assert not (tmp_path / "x.gguf").exists()


def like_sentencepiece() -> dict[str, Any]:
    """tiny-e's tokenizer.json with the chat format of Gemma 3 and every merge that scores would give."""
    keys = gemma3_vocabulary()
    tokens = keys["tokenizer.ggml.tokens"]
    table = json.loads((TINY / "tokenizer.json").read_text())
    for token in table["added_tokens"]:
        token["content"] = tokens[token["id"]]
    added = {token["content"] for token in table["added_tokens"]}
    vocab = {token: i for i, token in enumerate(tokens)}
    plain = {token: i for token, i in vocab.items() if token not in added}
    merges = merges_from_scores(plain, keys["tokenizer.ggml.scores"], "x")
    table["model"] |= {"vocab": vocab, "merges": [list(pair) for pair in merges]}
    return table


def text_folder(folder: Folder, path: Path, table: dict[str, Any]) -> Path:
    config = GEMMA3 | {"num_hidden_layers": 7, "vocab_size": 2603 + 64, "eos_token_id": [1, 106]}
    shutil.copytree(folder(config), path)
    (path / "tokenizer.json").write_text(json.dumps(table))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_written_text(folder: Folder, tmp_path: Path) -> None:
    source = text_folder(folder, tmp_path / "hf", like_sentencepiece())
    path = gemma4.quantize(source, tmp_path / "x.gguf", type="F32").path
    stored = GgufFile(path).metadata
    assert (stored["tokenizer.ggml.model"], stored["tokenizer.ggml.eot_token_id"]) == ("llama", 106)
    assert len(stored["tokenizer.ggml.tokens"]) == 2667
    scored = {key: value for key, value in stored.items() if key != "tokenizer.ggml.merges"}  # as llama.cpp reads it
    by_scores = Tokenizer.from_table(tokenizer_table(scored, "x"), "x")
    with gemma4.load(path) as ours, gemma4.load(source) as theirs:
        assert ours.config.eos_token_ids == theirs.config.eos_token_ids == (1, 106)
        for text in ("Once upon a time, there was a cat.", "a\n\n\nb   c", "<start_of_turn>user\nünï<end_of_turn>\n"):
            expected = theirs.tokenizer.encode(text)
            assert np.array_equal(ours.tokenizer.encode(text), expected)
            assert np.array_equal(by_scores.encode(text), expected)
        messages = [{"role": "user", "content": "Hello"}]
        pair = [m.generate(messages, max_tokens=4, temperature=0.0) for m in (ours, theirs)]
        assert list(pair[0].tokens) == list(pair[1].tokens) and pair[0].prompt_tokens == pair[1].prompt_tokens


def test_merges_that_follow_from_no_scores_are_refused(folder: Folder, tmp_path: Path) -> None:
    """llama.cpp would give texts other ids."""
    table = like_sentencepiece()
    merges = table["model"]["merges"]
    by_token: dict[str, list[int]] = {}
    for i, pair in enumerate(merges):
        by_token.setdefault("".join(pair), []).append(i)
    at = next(ranks[0] for token, ranks in by_token.items() if len(ranks) > 1 and len(set(token)) > 1)
    apart = [*merges[:at], *merges[at + 1 : at + 9], merges[at], *merges[at + 9 :]]
    fewer = merges[:at] + merges[at + 1 :]
    for i, changed in enumerate((apart, fewer)):
        table["model"]["merges"] = changed
        source = text_folder(folder, tmp_path / f"hf{i}", table)
        with pytest.raises(NotImplementedError, match="do not follow from scores of tokens"):
            gemma4.quantize(source, tmp_path / "x.gguf", type="F32")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.slow
def test_scores_of_a_whole_vocabulary() -> None:
    """Gemma 4's merges are those of Gemma 3: they follow from scores, which runs of one character share."""
    text = lzma.decompress((Path(__file__).parent / "data" / "tokenizer.json.xz").read_bytes())
    table = json.loads(text)
    vocab, merges = table["model"]["vocab"], [" ".join(pair) for pair in table["model"]["merges"]]
    added = {token["content"]: token for token in table["added_tokens"]}
    scores = _scores(vocab, added, merges, 262_208, "x")
    assert len(scores) == 262_208 and np.array_equal(scores, np.float32(scores))
    runs = [token for token in vocab if len(token) > 1 and len(set(token)) == 1 and scores[vocab[token]] == -1]
    assert len(runs) == 87 and {token[0] for token in runs} == {"\n", "\t", "▁"}


# -- what is refused ---------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "yarn": ("gemma3-1b", {"gemma3.rope.scaling.type": "yarn"}, NotImplementedError, "yarn"),
    "longrope": ("gemma2-2b", {"gemma2.rope.scaling.type": "longrope"}, NotImplementedError, "longrope"),
    "unknown scaling": ("gemma3-4b", {"gemma3.rope.scaling.type": "spiral"}, NotImplementedError, "spiral"),
    "scaling of numbers": ("gemma3-4b", {"gemma3.rope.scaling.type": 7}, NotImplementedError, "7"),
    "attention factor": ("gemma3-4b", {"gemma3.rope.scaling.attn_factor": 2.0}, NotImplementedError, "linear scaling"),
    "negative factor": ("gemma3-4b", {"gemma3.rope.scaling.factor": -8.0}, FormatError, r"scaling\.factor is -8"),
    "tiny factor": ("gemma3-4b", {"gemma3.rope.scaling.factor": 1e-30}, FormatError, r"scaling\.factor"),
    "NaN factor": ("gemma3-4b", {"gemma3.rope.scaling.factor": float("nan")}, FormatError, r"scaling\.factor is nan"),
    "no base": ("gemma3-1b", {"gemma3.rope.freq_base": None, "gemma3.rope.global.freq_base": 1e6}, FormatError,
                r"gemma3\.rope\.freq_base"),
    "no layers": ("gemma2-2b", {"gemma2.block_count": None}, FormatError, r"gemma2\.block_count"),
    "more layers": ("gemma2-2b", {"gemma2.block_count": 27}, FormatError, r"blk\.26\..*missing"),
    "no heads": ("gemma3-1b", {"gemma3.attention.head_count": None}, FormatError, r"gemma3\.attention\.head_count"),
    "no kv heads": ("gemma3-1b", {"gemma3.attention.head_count_kv": None}, FormatError, "head_count_kv"),
    "no head size": ("gemma2-2b", {"gemma2.attention.key_length": None}, FormatError, r"gemma2\.attention\.key_length"),
    "head sizes differ": ("gemma2-2b", {"gemma2.attention.value_length": 4}, NotImplementedError, "value_length"),
    "head sizes by type": ("gemma3-1b", {"gemma3.attention.key_length_swa": 4}, NotImplementedError, "key_length_swa"),
    "partial rotation": ("gemma3-1b", {"gemma3.rope.dimension_count": 4}, NotImplementedError, "dimension_count"),
    "no width": ("gemma2-2b", {"gemma2.embedding_length": None}, FormatError, "embedding_length"),
    "no width per head": ("gemma2-27b", {"gemma2.embedding_length": 1}, FormatError, "embedding_length"),
    "no eps": ("gemma3-1b", {"gemma3.attention.layer_norm_rms_epsilon": None}, FormatError, "epsilon"),
    "no context": ("gemma3-1b", {"gemma3.context_length": None}, FormatError, "context_length"),
    "no MLP": ("gemma3-1b", {"gemma3.feed_forward_length": None}, FormatError, "feed_forward_length"),
    "window of text": ("gemma3-1b", {"gemma3.attention.sliding_window": "wide"}, FormatError, "sliding_window"),
    "gemma 2 without window": ("gemma2-2b", {"gemma2.attention.sliding_window": 0}, FormatError, "sliding_window is 0"),
    "pattern without window": ("gemma3-1b", {"gemma3.attention.sliding_window": None,
                               "gemma3.attention.sliding_window_pattern": 6}, FormatError, r"sliding_window is 0"),
    "pattern short": ("gemma3-1b", {"gemma3.attention.sliding_window_pattern": [True]}, FormatError, "pattern"),
    "softcap": ("gemma2-2b", {"gemma2.attn_logit_softcapping": -1.0}, FormatError, "attn_logit_softcapping"),
    "bidirectional": ("gemma3-1b", {"gemma3.attention.causal": False}, NotImplementedError, "causal"),
    "bos": ("gemma3-1b", {"tokenizer.ggml.bos_token_id": -1.0}, FormatError, r"tokenizer\.ggml\.bos_token_id"),
    "other family's keys": ("gemma2-2b", {"general.architecture": "gemma3"}, FormatError, r"gemma3\.block_count"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata(case: str, folder: Folder, tmp_path: Path) -> None:
    name, keys, kind, message = BAD[case]
    path = convert(
        folder(MODELS[name]),
        tmp_path / "x.gguf",
        "F32",
        keys={k: v for k, v in keys.items() if k != "general.architecture"},
    )
    if "general.architecture" in keys:
        path.write_bytes(path.read_bytes().replace(b"gemma2", b"gemma3", 1))
    with pytest.raises(kind, match=message):
        open_checkpoint(path)


HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64 - 1, 0.0, -1.5, 0.99999999999, 1e-300, 1e300, float("nan"),
    float("inf"), "", "linear",
    [], [1], [1] * 7, [True] * 7, [0.5] * 7, [2**63] * 7, ["x"] * 7, [float("nan")] * 7,
]  # fmt: skip
NEVER_THERE = (
    "attention.sliding_window_pattern", "attention.key_length_swa", "attention.value_length_swa", "attention.causal",
    "rope.dimension_count", "rope.dimension_count_swa", "rope.freq_base", "rope.freq_base_swa", "rope.local.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
    "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip


@pytest.mark.parametrize("name", ["gemma2-27b", "gemma3-4b"])
def test_any_value_of_any_key_is_read_or_refused(name: str, folder: Folder, tmp_path: Path) -> None:
    """Whatever is not refused is a model that the engine's table of tensors can be made for."""
    config = MODELS[name] | ({"num_hidden_layers": 7} if name == "gemma3-4b" else {})
    with open_checkpoint(convert(folder(config), tmp_path / "x.gguf", "F32")) as ours:
        [file] = ours.files
        family = name.partition("-")[0]
        keys = [key for key in ours.hf_config if key.startswith(family)]
        for key in {*keys, *(f"{family}.{key}" for key in NEVER_THERE)}:
            for value in HOSTILE:
                with contextlib.suppress(FormatError, NotImplementedError):
                    read = parse_metadata(ours.hf_config | {key: value}, file.tensors, None, (), "x.gguf")
                    assert text_tensors(read)
                    assert all(np.isfinite(rope).all() for rope in read.engine()["rope_inv_freq"]), (key, value)
                    assert 0 < read.attention_scale <= 1


@pytest.mark.parametrize("name, tensor, message", [
    ("gemma2-2b", "blk.3.post_ffw_norm.weight", "missing"),
    ("gemma3-1b", "blk.25.attn_q_norm.weight", "missing"),
    ("gemma3-1b", "output_norm.weight", "missing"),
    ("gemma2-2b", "token_embd.weight", "no text decoder"),
])  # fmt: skip
def test_a_missing_tensor_is_named(name: str, tensor: str, message: str, folder: Folder, tmp_path: Path) -> None:
    path = convert(folder(MODELS[name]), tmp_path / "x.gguf", "F32")
    path.write_bytes(path.read_bytes().replace(tensor.encode(), b"x" * len(tensor)))
    with pytest.raises(FormatError, match=rf"(?s)({tensor}.*{message}|{message}.*{tensor})"):
        open_checkpoint(path)


@pytest.mark.parametrize("odd", ["blk.0.attn_q.bias", "rope_freqs.weight"])
def test_tensors_of_other_models_are_refused(odd: str, folder: Folder, tmp_path: Path) -> None:
    """What they do would be left out in silence."""
    with open_checkpoint(convert(folder(MODELS["gemma2-2b"]), tmp_path / "x.gguf", "F32")) as ours:
        [file] = ours.files
        more = file.tensors | {odd: file.tensors["output_norm.weight"]}
        with pytest.raises(NotImplementedError, match=odd):
            parse_metadata(ours.hf_config, more, None, (), "x.gguf")
        vision = {f"v.{odd}": file.tensors["output_norm.weight"]}  # an encoder's, which other programs put beside it
        assert parse_metadata(ours.hf_config, file.tensors | vision, None, (), "x.gguf") == ours.config


def test_pictures(folder: Folder, tmp_path: Path) -> None:
    """No encoder of Gemma 4 is taken for one of Gemma 3."""
    path = convert(folder(MODELS["gemma3-4b"]), tmp_path / "x.gguf", "F32")
    (tmp_path / "wide").mkdir()
    with gemma4.load(path) as model, pytest.raises(NotImplementedError, match="before Gemma 4 the text model alone"):
        model.encode_image(np.zeros((8, 8, 3), np.uint8))
    as_wide = convert(folder(MODELS["gemma3-1b"] | {"hidden_size": 48}), tmp_path / "wide" / "x.gguf", "F32")
    encoders = convert_mmproj(write_multimodal_checkpoint(tmp_path / "mm", "effective"), tmp_path / "mmproj.gguf")
    with pytest.raises(
        NotImplementedError, match=r"mmproj\.gguf holds encoders; of models before Gemma 4 the text model"
    ):
        gemma4.load(as_wide, mmproj=encoders)
    shutil.copy(encoders, as_wide.parent)
    with gemma4.load(as_wide) as model:
        assert any("is not used" in note for note in model.checkpoint.notes) and not model.checkpoint.encoders
