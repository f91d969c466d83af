# SPDX-License-Identifier: Apache-2.0
"""examples.safetensors of Gemma Scope 2: files written here in its layout, and what each feature's parts must be."""

import json
import os
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma4 import FormatError, StateError
from gemma4.dictionaries import Example, Examples, FeatureSource
from gemma4.load.safetensors import SafetensorsFile

N, STORED, SEQUENCES, LENGTH, K = 12, 30, 9, 20, 10


def tensors(rng):
    """Entries of a feature are distinct places, in no order; feature 3 has only five, feature 4 none."""
    places = np.stack([rng.permutation(SEQUENCES * LENGTH)[:STORED] for _ in range(N)])
    activations = rng.uniform(0.1, 9, (N, STORED)).astype(np.float32)
    activations[3, 5:] = activations[4] = 0
    seq_ids, positions = places // LENGTH, places % LENGTH
    seq_ids[3, 5:] = seq_ids[4] = -1
    top = np.sort(rng.standard_normal((N, K)).astype(np.float32))
    return {
        "activations": activations,
        "seq_ids": seq_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "feature_frequencies": rng.uniform(0, 0.1, N).astype(np.float32),
        "tokens": rng.integers(0, 1000, (SEQUENCES, LENGTH)).astype(np.int32),
        "top_tokens": rng.integers(0, 1000, (N, K)).astype(np.int32),
        "top_logits": top,
        "bottom_tokens": rng.integers(0, 1000, (N, K)).astype(np.int32),
        "bottom_logits": -top,
    }


@pytest.fixture
def data():
    return tensors(np.random.default_rng(0))


@pytest.fixture
def examples(data, tmp_path):
    save_file(data, tmp_path / "examples.safetensors")
    with Examples.load(tmp_path) as examples:
        yield examples


def grid(data, feature):
    """The feature at every token, [sequences, length]."""
    values = np.zeros((SEQUENCES, LENGTH), np.float32)
    at = data["activations"][feature] > 0
    values[data["seq_ids"][feature][at], data["positions"][feature][at]] = data["activations"][feature][at]
    return values


@pytest.mark.parametrize("context", [None, 0, 3, 100])
def test_top_examples(data, examples, context):
    for feature in range(N):
        values = grid(data, feature)
        order = np.argsort(-values.max(axis=1), kind="stable")
        order = [int(i) for i in order if values[i].max() > 0]
        for n in (1, 4, 50):
            found = examples.top(feature, n, context=context)
            assert [one.sequence for one in found] == order[:n] and all(isinstance(one, Example) for one in found)
            for one in found:
                peak = int(values[one.sequence].argmax())
                first = 0 if context is None else max(0, peak - context)
                last = LENGTH if context is None else min(LENGTH, peak + context + 1)
                assert one.start == first and one.tokens.dtype == np.int32 and one.values.dtype == np.float32
                np.testing.assert_array_equal(one.tokens, data["tokens"][one.sequence, first:last])
                np.testing.assert_array_equal(one.values, values[one.sequence, first:last])
    assert examples.top(4) == [] and len(examples.top(3, 50)) <= 5


def test_the_other_parts(data, examples):
    for feature in range(N):
        up, down = examples.logits(feature)
        order = np.argsort(-data["top_logits"][feature])
        np.testing.assert_array_equal(up.logits, data["top_logits"][feature][order])
        np.testing.assert_array_equal(up.tokens, data["top_tokens"][feature][order])
        order = np.argsort(data["bottom_logits"][feature])
        np.testing.assert_array_equal(down.logits, data["bottom_logits"][feature][order])
        np.testing.assert_array_equal(down.tokens, data["bottom_tokens"][feature][order])
        assert examples.density(feature) == data["feature_frequencies"][feature]
        counts, edges = examples.histogram(feature, 7)
        values = data["activations"][feature][data["activations"][feature] > 0]
        assert counts.sum() == len(values) and len(edges) == 8 and edges[0] == 0
        if len(values):
            assert edges[-1] == values.max() and counts[-1] == (values >= edges[-2]).sum()
    np.testing.assert_array_equal(examples.densities, data["feature_frequencies"])
    assert (examples.d_sae, len(examples)) == (N, N)
    assert repr(examples) == "Examples: up to 30 of each of 12 features, from 9 sequences"


def test_other_types(data, examples, tmp_path):
    other = {k: v.astype(np.int64) if v.dtype == np.int32 else v.astype(ml_dtypes.bfloat16) for k, v in data.items()}
    path = tmp_path / "other.safetensors"
    save_file(other, path)
    with Examples.load(path) as found:
        for feature in (0, 3, 4):
            wanted = sorted((one.sequence, one.start, *one.tokens) for one in examples.top(feature, 50, context=None))
            got = sorted((one.sequence, one.start, *one.tokens) for one in found.top(feature, 50, context=None))
            assert got == wanted
            np.testing.assert_allclose(found.logits(feature)[0].logits, examples.logits(feature)[0].logits, rtol=0.01)


def test_arrays_of_ones_own(data):
    """As a harvested dataset has them: sequences of any length, and no logits."""
    ragged = [data["tokens"][i, : LENGTH + i - SEQUENCES] if i else data["tokens"][i] for i in range(SEQUENCES)]
    own = {name: data[name] for name in ("activations", "seq_ids", "positions", "feature_frequencies")}
    own["positions"] = np.minimum(own["positions"], 10)
    examples: FeatureSource = Examples(own, lambda sequence: ragged[sequence], SEQUENCES)
    for one in examples.top(0, 50, context=None):
        np.testing.assert_array_equal(one.tokens, ragged[one.sequence])
    up, down = examples.logits(0)
    assert not len(up.tokens) and not len(down.logits)


def test_opening_does_not_read(tmp_path):
    """1.6 GB, sparse on disk, of the published shapes: opened at once, and one feature is little of it."""
    data = {k: v[:1] for k, v in tensors(np.random.default_rng(1)).items()}
    path = tmp_path / "examples.safetensors"
    shapes = {"activations": (16384, 1000), "seq_ids": (16384, 1000), "positions": (16384, 1000)}
    shapes |= {"feature_frequencies": (16384,), "tokens": (237_000, 512)}
    shapes |= {name: (16384, 10) for name in data if name.startswith(("top", "bottom"))}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        kind = "I32" if data[name].dtype == np.int32 else "F32"
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    before, start = resident(), time.perf_counter()
    with Examples.load(path) as examples:
        assert examples.top(16383) == [] and examples.density(0) == 0 and examples.histogram(7).counts.sum() == 0
        assert len(examples.logits(16383)[0].tokens) == 10
    assert time.perf_counter() - start < 2 and resident() - before < 20 << 20


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("activations", None, "no tensor activations; it has"),
        ("tokens", None, "no tensor tokens"),
        ("feature_frequencies", None, "no tensor feature_frequencies"),
        ("bottom_logits", None, "no tensor bottom_logits"),
        ("tokens", lambda a: a[0], "no tensor tokens"),
        ("tokens", lambda a: a.astype(np.float32), "tokens is float32, expected integers"),
        ("seq_ids", lambda a: a[:, 1:], r"seq_ids has shape \[12, 29\], expected that of 12 features, \[12, 30\]"),
        ("seq_ids", lambda a: a.astype(np.float32), "seq_ids is float32, expected integers"),
        ("activations", lambda a: a.astype(np.int32), "activations is int32, expected floats"),
        ("activations", lambda a: a[0], "activations has shape"),
        ("feature_frequencies", lambda a: a[1:], "feature_frequencies has shape"),
        ("top_tokens", lambda a: a[1:], "top_tokens has shape"),
        ("top_logits", lambda a: a[:, 1:], "top_logits has shape"),
    ],
)
def test_other_files(data, tmp_path, name, change, message):
    if change is None:
        del data[name]
    else:
        data[name] = np.ascontiguousarray(change(data[name]))
    save_file(data, tmp_path / "examples.safetensors")
    with pytest.raises(FormatError, match=message):
        Examples.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activations", np.nan, "activations of feature 2 hold NaN"),
        ("activations", np.inf, "activations of feature 2 hold NaN"),
        ("seq_ids", SEQUENCES, r"seq_ids of feature 2 are \d+ to 9, expected 0 to 8"),
        ("seq_ids", -5, "seq_ids of feature 2 are -5 to"),
        ("positions", LENGTH, "position 20 of sequence"),
        ("positions", -1, "positions of feature 2 are -1 to"),
    ],
)
def test_hostile_numbers(data, tmp_path, name, value, message):
    data[name][2, 7] = value
    save_file(data, tmp_path / "examples.safetensors")
    with Examples.load(tmp_path) as examples, pytest.raises(FormatError, match=message):
        examples.top(2, 50)


def test_wrong_calls(examples, tmp_path):
    calls = [
        (lambda: examples.top(N), IndexError, "no feature 12"),
        (lambda: examples.top(-1), IndexError, "no feature -1"),
        (lambda: examples.density("a"), TypeError, "a feature is an integer"),
        (lambda: examples.logits(N), IndexError, "no feature"),
        (lambda: examples.top(1, 0), ValueError, "n must be a whole number"),
        (lambda: examples.top(1, context=-1), ValueError, "context must be"),
        (lambda: examples.histogram(1, 0), ValueError, "bins must be"),
        (lambda: examples.histogram(1, 1 << 40), ValueError, "bins must be"),
        (lambda: Examples.load(tmp_path / "nowhere"), FileNotFoundError, "there is no"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()


def test_a_file_that_changes_or_is_closed(examples, tmp_path):
    os.truncate(tmp_path / "examples.safetensors", 400)
    for call in (examples.top, examples.density, examples.logits, examples.histogram):
        with pytest.raises(FormatError, match="changed size"):
            call(1)
    examples.close()
    with pytest.raises(StateError, match="closed"):
        examples.density(0)


CALLS = {
    "densities": lambda examples: examples.densities,
    "peaks": lambda examples: examples.peaks(),
    "top": lambda examples: examples.top(1),
    "density": lambda examples: examples.density(1),
    "logits": lambda examples: examples.logits(1),
    "histogram": lambda examples: examples.histogram(1),
    "together": lambda examples: examples.together([1]),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows does not shrink mapped files")
@pytest.mark.parametrize("name", list(CALLS))
def test_a_file_that_shrinks_while_it_is_read(examples, tmp_path, monkeypatch, name):
    check = SafetensorsFile.check

    def check_and_cut(file):
        check(file)
        os.truncate(tmp_path / "examples.safetensors", 400)

    monkeypatch.setattr(SafetensorsFile, "check", check_and_cut)
    with pytest.raises(FormatError, match=r"changed size|lost a part"):
        CALLS[name](examples)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_frequencies_that_are_no_numbers(data, tmp_path, bad):
    frequencies = data["feature_frequencies"].copy()
    frequencies[3] = bad
    save_file(data | {"feature_frequencies": frequencies}, tmp_path / "examples.safetensors")
    with Examples.load(tmp_path) as examples:
        assert examples.density(2) == data["feature_frequencies"][2]
        for call in (lambda: examples.density(3), lambda: examples.densities):
            with pytest.raises(FormatError, match=rf"feature_frequencies\[3\] is {bad}, expected a finite number"):
                call()
