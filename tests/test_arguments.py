# SPDX-License-Identifier: Apache-2.0
"""Arguments of every public call as careless callers bring them: an error that names the argument, or the same answer.

Options of generation: test_options.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

import gemma4
from gemma4.bench import bench
from gemma4.generation import Batch, Options
from gemma4.interp.lens import logit_lens

HUGE = 10**6000  # more digits than Python prints
WRONG = ("2", 1.5, -1, True, None, 2**40, 2**64, HUGE, [1], math.nan, 1j)
IDS = [2, 5, 6, 7]
FRAMES = np.zeros((2, 48, 48, 3), np.uint8)


def sequence_of(model):
    sequence = model.new_sequence()
    model.forward(IDS, sequence=sequence)
    return sequence


@pytest.fixture(scope="module")
def cache(tiny):
    return tiny.run_with_cache(IDS, "*")[1]


# argument -> a call with it, and the values above that mean something there
COUNTS = {
    "threads": (lambda model, value: gemma4.load("tiny-e", threads=value), ()),
    "capacity": (lambda model, value: model.new_sequence(capacity=value), ()),
    "length": (lambda model, value: sequence_of(model).truncate(value), ()),
    "length ": (lambda model, value: sequence_of(model).rewind(value), ()),
    "layer": (lambda model, value: model.run_with_cache(IDS, "*")[1].decompose_resid(value), (None,)),
    "layer ": (lambda model, value: model.run_from(np.zeros((4, 160)), value, IDS), ()),
    "stop_at_layer": (lambda model, value: model.run_with_cache(IDS, stop_at_layer=value), (None,)),
    "number": (lambda model, value: Batch(model).join("x", number=value), (None,)),
    "target": (lambda model, value: logit_lens(model, IDS, target=value), (None, "2")),
    "prompt": (lambda model, value: bench("tiny-e", prompt=value), ()),
    "decode": (lambda model, value: bench("tiny-e", decode=value), ()),
    "repeats": (lambda model, value: bench("tiny-e", repeats=value), ()),
    "fps": (lambda model, value: model.encode_video(FRAMES, fps=value), (None, 1.5)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_numbers(tiny, name):
    call, meaningful = COUNTS[name]
    for value in WRONG:
        if not any(value is one for one in meaningful):
            with pytest.raises(ValueError, match=name.strip()) as info:
                call(tiny, value)
            assert len(str(info.value)) < 300


@pytest.mark.parametrize("threads", ["2", 1.5, -1, 10**6, None, True])
def test_threads_of_quantize(tmp_path, threads):
    with pytest.raises(ValueError, match="threads must be an integer in"):
        gemma4.quantize("tiny-e", tmp_path / "x.gguf", type="Q8_0", threads=threads)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "words"), [
    ({"type": 5}, "type must be a string"), ({"type": None}, "type must be a string"),
    ({"overrides": "abc"}, "overrides must be a mapping"), ({"overrides": [("a", "b")]}, "overrides must be a mapping"),
    ({"overrides": {5: "Q8_0"}}, "overrides must be"), ({"overrides": {"*": 5}}, "overrides must be"),
    ({"out": None}, "out must be a path"), ({"out": 5}, "out must be a path"), ({"out": b"x"}, "out must be a path"),
])  # fmt: skip
def test_options_of_quantize(tmp_path, options, words):
    given = {"type": "Q8_0", "out": tmp_path / "x.gguf", **options}
    with pytest.raises(ValueError, match=words):
        gemma4.quantize("tiny-e", given.pop("out"), **given)


@pytest.mark.parametrize("name", [5, None, b"tiny-e", [], ["tiny-e"]])
def test_names_of_models(name):
    with pytest.raises(ValueError, match="a model must be a path"):
        gemma4.load(name)


def test_no_name_is_not_the_working_folder(tmp_path, monkeypatch):
    gemma4.quantize("tiny-e", tmp_path / "x.gguf", type="Q8_0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='no model ""'):
        gemma4.load("")


@pytest.mark.parametrize("value", ["turbo", "", 5, True, b"exact", ["exact"]])
def test_precision(value):
    with pytest.raises(ValueError, match="precision must be one of exact, high, fast"):
        gemma4.load("tiny-e", precision=value)


@pytest.mark.parametrize("value", ["f64", "", 5, b"f32", ["f32"]])
def test_kv_dtype(tiny, value):
    for call in (tiny.new_sequence, lambda kv_dtype: gemma4.load("tiny-e", kv_dtype=kv_dtype)):
        with pytest.raises(ValueError, match="kv_dtype must be one of f32, f16, bf16, q8_0"):
            call(kv_dtype=value)


def test_a_sequence_keeps_its_contents_after_a_wrong_length(tiny):
    sequence = sequence_of(tiny)
    for value in WRONG:
        for call in (sequence.truncate, sequence.rewind):
            with pytest.raises(ValueError, match="length"):
                call(value)
    assert sequence.tokens.tolist() == IDS and len(sequence) == 4


@pytest.mark.parametrize("spec", [[[0, 1]], np.zeros((1, 1), int), [[0]]])
def test_positions_in_one_row(tiny, spec):
    with pytest.raises(ValueError, match="logits must be one row of positions"):
        tiny.forward(IDS, logits=spec)
    with pytest.raises(ValueError, match="pos must be one row of positions"):
        tiny.run_with_cache(IDS, "hook_embed", pos=spec)
    assert tiny.forward(IDS, logits=np.array(1)).shape[0] == 1


@pytest.mark.parametrize("prompt", [5, None, [2.0, 3.0], [None], b"ab", {2}, {"role": "user"}, ["a", 5], object(), 1j])
def test_prompts(tiny, prompt):
    with pytest.raises(TypeError, match="a prompt must be text, token ids, or a list of those, got"):
        tiny.forward(prompt)


@pytest.mark.parametrize("sequence", [5, "x", ["x"], object(), {}])
def test_sequences(tiny, sequence):
    with pytest.raises(TypeError, match="sequence must be a Sequence"):
        tiny.forward(IDS, sequence=sequence)


@pytest.mark.parametrize("names", [5, True, 1.5, object()])
def test_names_of_sites(tiny, names):
    with pytest.raises(TypeError, match="names must be a site name or glob"):
        tiny.run_with_cache(IDS, names)
    with pytest.raises(TypeError, match=r"names must be a site name or glob|a hook is a pair"):
        tiny.run_with_hooks(IDS, [(names, print)])


@pytest.mark.parametrize("hooks", [5, None, "hook_embed", object()])
def test_hooks(tiny, hooks):
    with pytest.raises(TypeError, match="hooks are pairs"):
        tiny.hooks(hooks)


@pytest.mark.parametrize("text", [5, None, b"x", ["a"]])
def test_texts(tiny, text):
    for call in (tiny.to_tokens, tiny.to_single_token):
        with pytest.raises(ValueError, match="text must be a string"):
            call(text)


@pytest.mark.parametrize(
    "ids", [5, None, "abc", [1.5], [2.0], ["a"], [None], [[2, 5]], np.array(2), np.array([2.7]), np.array([[2, 5]])]
)
def test_ids(tiny, ids):
    """1.5 is no id, and not the text of 1."""
    with pytest.raises(ValueError, match="token ids must be integers"):
        tiny.to_string(ids)
    if not isinstance(ids, str):
        with pytest.raises(ValueError, match="token ids must be integers"):
            tiny.to_str_tokens(ids)


def test_ids_of_every_kind(tiny):
    for ids in ([2, 5], (2, 5), np.array([2, 5]), np.array([2, 5], np.uint8), range(2, 3), iter([2, 5]), {2: 0}):
        assert tiny.to_string(ids).startswith("<bos>")


@pytest.mark.parametrize("tokens", [-1, 10**6, 1.5, None, [1, 2], [1.5], 2**70, [[1]], "two words"])
def test_tokens_of_an_attribution(cache, tokens):
    """-1 is no token, and not the last row of the head."""
    stack = cache.decompose_resid()
    with pytest.raises(ValueError, match="token"):
        cache.logit_attrs(stack, tokens)
    assert cache.logit_attrs(stack, [5]).shape == cache.logit_attrs(stack, [5, 6, 7, 8]).shape == (len(stack.labels), 4)


@pytest.mark.parametrize("stack", [5, np.zeros((2, 2, 2)), np.zeros((4, 128))])
def test_stacks_of_an_attribution(cache, stack):
    with pytest.raises(ValueError, match=r"stack must be \[n, 4, d_model\]"):
        cache.logit_attrs(stack, 5)


@pytest.mark.parametrize("key", [5, None, ("a",), ("a", 1, 2), b"x"])
def test_keys_of_a_cache(cache, key):
    with pytest.raises(TypeError, match="a cache's key is a site name"):
        cache[key]


def test_batches(tiny):
    with pytest.raises(TypeError, match="a batch is of a Model"):
        Batch(5)
    with pytest.raises(TypeError, match="options must be Options"):
        Batch(tiny).join("x", {"max_tokens": 5})
    assert Batch(tiny).join("x", Options(max_tokens=1), number=np.int64(3)).number == 3
