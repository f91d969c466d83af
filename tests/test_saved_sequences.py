# SPDX-License-Identifier: Apache-2.0
"""Saved sequences of strangers: read by name, size, type and order, and one kind of exception for all that is wrong."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import zipfile

import numpy as np
import pytest

import gemma4
from gemma4.errors import FormatError

IDS = np.array([2, 5, 6, 7, 8], np.int32)
AFTER = np.array([9, 10], np.int32)


@pytest.fixture(scope="module")
def model():
    return gemma4.load("tiny-e")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    sequence = model.new_sequence()
    model.forward(IDS, sequence=sequence)
    path = sequence.save(tmp_path_factory.mktemp("saved") / "s.npz")
    arrays = dict(np.load(path))
    return path, arrays, json.loads(arrays["meta"].tobytes())


def swapped(array):
    return array.astype(array.dtype.newbyteorder(">"))


def as_bytes(meta):
    return np.frombuffer(meta if isinstance(meta, bytes) else json.dumps(meta).encode(), np.uint8)


ARRAYS = {
    "k.0": lambda a: swapped(a["k.0"]),
    "v.1": lambda a: swapped(a["v.1"]),
    "k.1": lambda a: a["k.1"].astype(np.float64),
    "k.2": lambda a: np.asfortranarray(a["k.2"]),
    "v.2": lambda a: a["v.2"][:, :, :-1].copy(),
    "v.3": lambda a: a["v.3"][:-1].copy(),
    "tokens": lambda a: np.full(5, 1 << 20, np.int32),
    "keys": lambda a: swapped(a["keys"]),
    "extra": lambda a: np.zeros(3),
    "meta": lambda a: np.zeros((2, 2), np.uint8),
}
TOKENS = [
    np.full(5, -7, np.int32),
    np.full(5, 2603, np.int32),
    np.full(5, 1 << 40),
    np.array(["a"] * 5),
    np.zeros((5, 2), np.int32),
    np.zeros(4, np.int32),
    np.array([1.0] * 5),
]
META = {
    "list": lambda m: m.update(first_positions=["0"]),
    "null": lambda m: m["first_positions"].update({"0": None}),
    "infinite": lambda m: m["first_positions"].update({"0": 1e999}),
    "huge": lambda m: m["first_positions"].update({"0": 2**70}),
    "true": lambda m: m["first_positions"].update({"0": True}),
    "one key too few": lambda m: m["first_positions"].update({"0": 1}),
    "layer missing": lambda m: m["first_positions"].pop("0"),
    "layer too many": lambda m: m["first_positions"].update({"7": 0}),
    "length": lambda m: m.update(length=6),
    "length huge": lambda m: m.update(length=10**5000),
    "length text": lambda m: m.update(length="5"),
    "kv_dtype": lambda m: m.update(kv_dtype="f64"),
    "other kv_dtype": lambda m: m.update(kv_dtype="f16"),
    "kv_dtype list": lambda m: m.update(kv_dtype=["f32"]),
    "format": lambda m: m.update(format="gemma4-sequence-9"),
}


def check_refused(model, path):
    with pytest.raises(FormatError) as caught:
        model.restore(path)
    assert f"{path} is not a saved sequence, or is damaged" in str(caught.value)


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(model, saved, tmp_path, name):
    np.savez(tmp_path / "s.npz", **(saved[1] | {name: ARRAYS[name](saved[1])}))
    check_refused(model, tmp_path / "s.npz")


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
def test_tokens(model, saved, tmp_path, tokens):
    keys = np.zeros(tokens.shape, np.int64)
    np.savez(tmp_path / "s.npz", **(saved[1] | {"tokens": tokens, "keys": keys}))
    check_refused(model, tmp_path / "s.npz")


@pytest.mark.parametrize("name", META)
def test_description(model, saved, tmp_path, name):
    meta = json.loads(json.dumps(saved[2]))
    META[name](meta)
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        np.savez(tmp_path / "s.npz", **(saved[1] | {"meta": as_bytes(meta)}))
    finally:
        sys.set_int_max_str_digits(digits)
    check_refused(model, tmp_path / "s.npz")


@pytest.mark.parametrize("text", [b"[" * 100_000, b"{", b"[]", b"null", b"\xff", b"", b"0" * (1 << 21)], ids=len)
def test_damaged_description(model, saved, tmp_path, text):
    np.savez(tmp_path / "s.npz", **(saved[1] | {"meta": as_bytes(text)}))
    check_refused(model, tmp_path / "s.npz")


def test_a_window_with_one_key_too_few(random_e, tmp_path):
    """A sliding layer continues from the keys that the next query sees, window - 1 of them, and from no fewer."""
    ids, path = np.random.default_rng(0).integers(3, 320, 43).astype(np.int32), tmp_path / "s.npz"
    sequence = random_e.new_sequence()
    for i in range(0, 40, 10):
        random_e.forward(ids[i : i + 10], sequence=sequence, logits=None)
    sequence.truncate(sequence.min_truncate)
    arrays = dict(np.load(sequence.save(path)))
    assert len(arrays["k.0"]) == random_e.engine_config["layers"][0]["window"] - 1
    rest = ids[len(sequence) :]
    expected = random_e.forward(rest, sequence=sequence)
    np.testing.assert_array_equal(random_e.forward(rest, sequence=random_e.restore(path)), expected)
    for layer in ("0", "1", "3"):
        meta = json.loads(arrays["meta"].tobytes())
        meta["first_positions"][layer] += 1
        fewer = {name: arrays[name][1:] for name in (f"k.{layer}", f"v.{layer}")}
        np.savez(path, **(arrays | fewer | {"meta": as_bytes(meta)}))
        check_refused(random_e, path)


def test_keys_of_other_tokens(model, saved, tmp_path):
    """The keys decide what a cached prefix is; without media they are the ids."""
    other = saved[1]["keys"].copy()
    other[2] += 1
    np.savez(tmp_path / "s.npz", **(saved[1] | {"keys": other}))
    check_refused(model, tmp_path / "s.npz")


@pytest.mark.parametrize("header", ["(" * 5000, "[" * 200, '{\'descr\': """', "\\", "{'descr': 1e", "\0"], ids=repr)
def test_headers_that_are_no_python(model, saved, tmp_path, header):
    head = header.encode() + b" " * 64 + b"\n"
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as file:
        for name, array in saved[1].items():
            data = io.BytesIO()
            np.save(data, array)
            text = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), text if name == "tokens" else data.getvalue())
    check_refused(model, tmp_path / "s.npz")


def test_missing_arrays(model, saved, tmp_path):
    for name in ("tokens", "k.0", "v.4", "meta"):
        np.savez(tmp_path / "s.npz", **{key: value for key, value in saved[1].items() if key != name})
        check_refused(model, tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", **{key: value for key, value in saved[1].items() if key != "keys"})
    assert model.restore(tmp_path / "s.npz").tokens.tolist() == IDS.tolist()  # written by an older version


def test_every_byte_and_every_length(model, saved, tmp_path):
    """One bit flipped anywhere is a FormatError or StateError, or harmless; a file cut anywhere is one."""
    whole, path, rng = saved[0].read_bytes(), tmp_path / "s.npz", random.Random(1)
    directory = whole.index(b"PK\x01\x02")
    places = [*range(300), *range(directory, len(whole)), *(rng.randrange(len(whole)) for _ in range(300))]
    right = model.forward(AFTER, sequence=model.restore(saved[0]))
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        try:
            restored = model.restore(path)
        except (FormatError, gemma4.StateError):
            continue
        np.testing.assert_array_equal(model.forward(AFTER, sequence=restored), right)
    for end in range(0, len(whole), 997):
        path.write_bytes(whole[:end])
        check_refused(model, path)


def test_compressed_and_bombs(model, saved, tmp_path):
    np.savez_compressed(tmp_path / "s.npz", **saved[1])
    check_refused(model, tmp_path / "s.npz")
    bomb = io.BytesIO()
    np.lib.format.write_array_header_1_0(bomb, {"descr": "|u1", "fortran_order": False, "shape": (1 << 31,)})
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in saved[1].items():
            data = io.BytesIO()
            np.save(data, array)
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue())
        with file.open("unused.npy", "w", force_zip64=True) as entry:
            entry.write(bomb.getvalue())
            for _ in range(128):
                entry.write(bytes(1 << 24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_refused(model, tmp_path / "s.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


def test_a_long_list_of_entries(model, tmp_path):
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as file:
        for i in range(20_000):
            file.writestr(f"{i:>030}", b"")
    with pytest.raises(FormatError, match=r"the limit is 1,048,576"):
        model.restore(tmp_path / "s.npz")


def test_places_that_are_no_files(model, tmp_path):
    with pytest.raises(FormatError, match="no regular file"):
        model.restore(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FormatError, match="no regular file"):
            model.restore(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        model.restore(tmp_path / "nothing")


def test_the_engine_takes_no_swapped_arrays(model):
    """Whoever calls it."""
    sequence = model.new_sequence()
    model.forward(IDS, sequence=sequence)
    state = sequence._engine.state()
    first, keys, values = state["layers"][0]
    state["layers"][0] = (first, swapped(keys), values)
    with pytest.raises(ValueError, match="byte order"):
        model.new_sequence()._engine.load_state(state)


def test_quantised_caches_come_back(model, tmp_path):
    for kv_dtype in ("f16", "bf16", "q8_0"):
        sequence = model.new_sequence(kv_dtype=kv_dtype)
        model.forward(np.arange(2, 90, dtype=np.int32), sequence=sequence, logits=None)
        restored = model.restore(sequence.save(tmp_path / "s.npz"))
        np.testing.assert_array_equal(model.forward(AFTER, sequence=restored), model.forward(AFTER, sequence=sequence))
