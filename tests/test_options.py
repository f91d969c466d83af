# SPDX-License-Identifier: Apache-2.0
"""Options of generate and stream as people bring them, and defaults as editors and merges leave them in checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import gemma4
from gemma4.generation.options import Options
from gemma4.generation.stream import default_stop_ids

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


def copy_of_tiny(folder, **files):
    """tiny-e with files replaced, or (None) left out."""
    for file in filter(Path.is_file, TINY.iterdir()):
        text = files.get(file.stem)
        if text is not None:
            (folder / file.name).write_text(json.dumps(text))
        elif file.stem not in files:
            shutil.copy(file, folder / file.name)
    return gemma4.load(folder)


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in Options.__dataclass_fields__ if name != "seed"])
def test_none_is_the_default(tiny, name):
    wanted = tiny.generate(CHAT, max_tokens=4, seed=1).tokens
    given = {"max_tokens": 4, "seed": 1, name: None}
    assert np.array_equal(tiny.generate(CHAT, **given).tokens[:4], wanted)


HUGE = 10**6000  # more digits than Python prints
WRONG = {
    "max_tokens": (0, -1, 1.5, "5", True, math.nan, HUGE, [5]),
    "temperature": (-1, "0.7", math.nan, math.inf, HUGE, True, [1.0], 1j),
    "top_k": (-2, 1.5, "5", math.nan, HUGE, True),
    "top_p": (-0.1, 1.0001, "0.9", math.nan, math.inf, HUGE),
    "min_p": (-1, 2, "0", math.nan),
    "repetition_penalty": (0, -1, math.inf, math.nan, "1", HUGE),
    "presence_penalty": (math.nan, math.inf, 1e9, "0"),
    "frequency_penalty": (math.nan, -math.inf, -1e9, "0"),
    "logit_bias": (
        5,
        [1],
        {"a": 1.0},
        {-1: 0.0},
        {1: math.inf},
        {1: math.nan},
        {1: HUGE},
        {1: 1e39},
        {1: "x"},
        {1.5: 1.0},
        {10**6: 1.0},
    ),
    "seed": (-1, 1.0, "7", math.nan, HUGE, True),
    "processors": (5, "x", [5], [None]),
    "logprobs": (-1, 1.5, "5", True, HUGE),
    "stop": (5, [5], [""], "", [None], {"a": 1}, b"x"),
    "stop_ids": ("5", ["<eos>"], [1.5], [-1], [None], [HUGE], {"a": 1}, -1, 1.5, [True]),
    "hooks": (5, "hook_embed", ["hook_embed"], [("hook_embed",)], [("hook_embed", 5)], [(None, print)]),
    "capture": (5, [5], [None]),
    "sequence": (5, "x", object()),
    "tools": (5, "x", [5], {"type": "function"}),
    "think": ("low", 2, []),
    "show_thinking": ("yes", 2, []),
    "image_tokens": (0, 71, -1, "280", 280.5, True, HUGE),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_option(tiny, name):
    assert set(WRONG) == set(Options.__dataclass_fields__)
    singular = name.removesuffix("s")
    for value in WRONG[name]:
        for run in (tiny.generate, tiny.stream):
            with pytest.raises((ValueError, TypeError), match=singular):
                run(CHAT, **{"max_tokens": 2, name: value})


def test_odd_values_that_mean_something(tiny):
    plain = tiny.generate(CHAT, max_tokens=6, temperature=0)
    for options in (
        {"temperature": 1e-300}, {"temperature": 1e-46}, {"temperature": np.float32(0)}, {"top_k": 1, "temperature": 1},
        {"temperature": 0, "top_k": -1}, {"temperature": 0, "logit_bias": {"719": 0.0, np.int64(5): np.float32(0)}},
        {"temperature": 0, "processors": lambda ids, logits: None}, {"temperature": 0, "stop": []},
        {"temperature": 0, "seed": np.int64(3)}, {"temperature": 0, "max_tokens": np.int64(6)},
        {"temperature": 0, "think": np.bool_(False)},
    ):  # fmt: skip
        assert tiny.generate(CHAT, **{"max_tokens": 6, **options}).text == plain.text
    first = int(plain.tokens[0])
    for ids in (first, np.int32(first), {first}, np.array([first])):
        out = tiny.generate(CHAT, max_tokens=6, temperature=0, stop_ids=ids)
        assert out.tokens.tolist() == [first] and out.finish_reason == "stop"


def test_top_k_of_minus_one_is_all(tiny):
    a, b = (tiny.generate("Once", max_tokens=8, seed=3, top_k=k, top_p=1.0, temperature=3.0).text for k in (-1, 0))
    assert a == b


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_processors_change_the_logits_alone(tiny):
    """Not the ids, which are the answer's own, nor the type of the array."""

    def spoil(ids, logits):
        ids[:] = 0

    def retype(ids, logits):
        logits.dtype = np.int32

    with pytest.raises(ValueError, match="read-only"):
        tiny.generate("Once", max_tokens=4, temperature=0, processors=spoil)
    with pytest.raises(ValueError, match="changed the type or strides"):
        tiny.generate("Once", max_tokens=4, temperature=0, processors=retype)


def test_a_ban_may_be_any_number_below_all(tiny):
    first = int(tiny.generate("Once", max_tokens=1, temperature=0).tokens[0])
    for ban in (-math.inf, -1e39, -HUGE):
        assert tiny.generate("Once", max_tokens=1, temperature=0, logit_bias={first: ban}).tokens[0] != first


def test_the_end_that_a_processor_raises_is_no_end_of_the_stream(tiny):
    def stop(ids, logits):
        raise StopIteration

    for options in ({"processors": stop}, {"hooks": [("hook_embed", stop)]}):
        with tiny.stream("Once", max_tokens=4, **options) as stream, pytest.raises(RuntimeError, match="StopIteration"):
            list(stream)
        assert stream.result.finish_reason == "cancelled"


@pytest.mark.parametrize("result", ["logits", object(), 1j, np.zeros(3, complex), [[1.0], [2.0, 3.0]]])
def test_a_processor_that_returns_no_logits(tiny, result):
    with pytest.raises(ValueError, match=r"the processor .* returned"):
        tiny.generate("Once", max_tokens=2, processors=lambda ids, logits: result)


# -- what a checkpoint says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "warm"}, {"temperature": float("nan")}, {"top_k": 1.5}, {"top_p": -1}, {"top_p": [0.9]},
        {"repetition_penalty": 0}, {"suppress_tokens": "x"}, {"suppress_tokens": {"a": 1}}, {"do_sample": "perhaps"},
        {"eos_token_id": 1.5}, {"eos_token_id": [[1, 106]]}, {"eos_token_id": {"a": 1}}, {"eos_token_id": [1e999]},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_default_is_a_warning_once(tmp_path, bad):
    base = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "do_sample": True, "temperature": 0.0}
    model = copy_of_tiny(tmp_path, generation_config=base | bad)
    with pytest.warns(UserWarning, match=f"generation_config.json: {next(iter(bad))} is .*not used"):
        model.generate(CHAT, max_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(CHAT, max_tokens=40, temperature=0).text == ANSWER


@pytest.mark.parametrize(
    "odd",
    [
        {"top_k": None}, {"top_k": 64.0}, {"top_k": -1}, {"temperature": "0"}, {"repetition_penalty": None},
        {"eos_token_id": "106"}, {"eos_token_id": -1}, {"eos_token_id": 4294967295}, {"eos_token_id": []},
        {"eos_token_id": [None]}, {"eos_token_id": [1.0, 106.0]}, {"suppress_tokens": None}, {"suppress_tokens": [-1]},
        {"suppress_tokens": [258883, 258882]}, {"suppress_tokens": "7"}, {"do_sample": None}, {"num_beams": 4},
    ],
    ids=str,
)  # fmt: skip
def test_odd_defaults_are_understood(tmp_path, odd):
    base = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "do_sample": True, "temperature": 0.0}
    model = copy_of_tiny(tmp_path, generation_config=base | odd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(CHAT, max_tokens=40)
    assert (out.text, out.finish_reason) == (ANSWER, "stop")


def test_eos_as_text_is_one_id(tmp_path):
    assert default_stop_ids(copy_of_tiny(tmp_path, generation_config={"eos_token_id": "106"})) == (106,)


# -- a chat ends where its template ends a turn ------------------------------------------------------------------------

MERGED = {
    "eos 1": {"generation_config": {"eos_token_id": 1}},
    "eos [1]": {"generation_config": {"eos_token_id": [1]}},
    "no eos": {"generation_config": {}},
    "no file": {"generation_config": None},
    "another eos": {"generation_config": {"eos_token_id": 1}, "tokenizer_config": {"eos_token": "<turn|>"}},
}


@pytest.mark.parametrize("name", MERGED)
def test_turns_end_though_eos_is_alone(tmp_path, name):
    model = copy_of_tiny(tmp_path, **MERGED[name])
    out = model.generate(CHAT, temperature=0, max_tokens=60)
    assert (out.text, out.finish_reason) == (ANSWER, "stop")


def test_calls_end_a_turn_though_eos_is_alone(tmp_path):
    model = copy_of_tiny(tmp_path, generation_config={"eos_token_id": 1})
    ids = iter(model.to_tokens("<|tool_call>call:f{}<tool_call|><|tool_response>response", bos=False).tolist())

    def write(so_far, logits):
        logits[:] = -np.inf
        logits[next(ids)] = 0

    tools = [{"type": "function", "function": {"name": "f"}}]
    out = model.generate(CHAT, tools=tools, processors=write, max_tokens=20)
    assert out.finish_reason == "tool_calls" and [call.name for call in out.tool_calls] == ["f"]


def test_a_gguf_file_without_its_end_of_turn(tmp_path):
    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    gemma4.quantize("tiny-e", source, type="BF16")
    data = source.read_bytes()
    assert b"ggml.eot_token_id" in data
    target.write_bytes(data.replace(b"ggml.eot_token_id", b"ggml.xxx_token_id"))
    out = gemma4.load(target).generate(CHAT, temperature=0, max_tokens=60)
    assert (out.text, out.finish_reason) == (ANSWER, "stop")


def test_texts_and_given_stops_end_as_before(tmp_path):
    model = copy_of_tiny(tmp_path, generation_config={"eos_token_id": 1})
    assert default_stop_ids(model) == (1,)
    prompt = model.to_tokens(model.chat_template.render(CHAT), bos=False)
    assert "<turn|>" in model.generate(prompt, temperature=0, max_tokens=20).text
    assert model.generate(CHAT, temperature=0, max_tokens=20, stop_ids=[1]).finish_reason == "length"
