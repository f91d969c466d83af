# SPDX-License-Identifier: Apache-2.0
"""Caches in safetensors files: what comes back, what the files promise to other readers, and damaged ones."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import PROMPT
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma4 import ActivationCache, FormatError, SiteError, StateError
from gemma4.edits import Patch
from gemma4.load.safetensors import SafetensorsFile, write_safetensors

OTHER = "When Lily and Tom went to the forest"


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "run.safetensors"
    return tiny.run_with_cache(PROMPT, ["hook_embed", "blocks.*.hook_resid_*", "blocks.1.attn.*"])[1].save(path)


def same(a, b):
    assert list(a) == list(b) and repr(a) == repr(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    for one, other in ((a.tokens, b.tokens), (a.positions, b.positions)):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_loaded_cache_is_like_a_pickled_one(model, cache, tmp_path):
    path = cache.save(tmp_path / "run.safetensors")
    again, pickled = ActivationCache.load(path), pickle.loads(pickle.dumps(cache))
    same(again, cache)
    assert again.model_name == pickled.model_name == cache.model_name == model.checkpoint.path.name
    assert again.fingerprint == pickled.fingerprint == model.fingerprint
    np.testing.assert_array_equal(again.decompose_resid().values, cache.decompose_resid().values)
    with pytest.raises(SiteError, match="resid_post"):
        again["blocks.0.hook_resid_pots"]
    with pytest.raises(StateError, match=r"attach\(model\)"):
        again.logit_attrs(again.decompose_resid(), " Mary")
    again.attach(model)
    np.testing.assert_array_equal(
        again.logit_attrs(again.decompose_resid(), " Mary"), cache.logit_attrs(cache.decompose_resid(), " Mary")
    )
    again["hook_embed"][:] = 0  # in memory of its own
    same(ActivationCache.load(path), cache)
    same(pickle.loads(pickle.dumps(ActivationCache.load(path))), cache)


def test_a_loaded_cache_after_its_file_is_gone(cache, tmp_path):
    path = cache.save(tmp_path / "run.safetensors")
    again = ActivationCache.load(path)
    path.write_bytes(b"")
    same(again, cache)


def test_some_positions_and_a_continued_sequence(model, tmp_path):
    sequence = model.new_sequence()
    model.forward(PROMPT, sequence=sequence)
    cache = model.run_with_cache([5, 6, 7], "*", pos=[2, 0], sequence=sequence)[1]
    again = ActivationCache.load(cache.save(tmp_path / "part.safetensors"))
    same(again, cache)
    assert again.positions.tolist() == [len(sequence) - 3, len(sequence) - 1]


@pytest.mark.parametrize(("dtype", "stored", "numpy"), [
    ("f32", "F32", np.float32), ("f16", "F16", np.float16), ("bf16", "BF16", ml_dtypes.bfloat16),
])  # fmt: skip
def test_types(cache, tmp_path, dtype, stored, numpy):
    path = cache.save(tmp_path / "run.safetensors", dtype=dtype)
    again = ActivationCache.load(path)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {*cache, "tokens", "positions"}
        for name, array in cache.items():
            floats = array.dtype == np.float32
            assert file.get_slice(name).get_dtype() == (stored if floats else "I32")
            np.testing.assert_array_equal(again[name], array.astype(numpy).astype(np.float32) if floats else array)
    assert {name: array.shape for name, array in again.items()} == {name: array.shape for name, array in cache.items()}
    assert path.stat().st_size < cache.nbytes * np.dtype(numpy).itemsize / 4 + 300_000


def test_numbers_beyond_f16(tiny, tmp_path):
    cache = tiny.run_with_cache(PROMPT, ["blocks.0.attn.hook_attn_scores", "hook_embed"])[1]
    cache.save(tmp_path / "masked.safetensors", dtype="f16")  # -inf where masked is itself
    cache["hook_embed"][0, 0] = 70_000
    with pytest.raises(ValueError, match=r"hook_embed holds numbers beyond 65504.*bf16"):
        cache.save(tmp_path / "run.safetensors", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["masked.safetensors"]


def test_values_of_a_loaded_cache_are_patched_in(tiny, tmp_path):
    site = "blocks.2.hook_resid_post"
    clean = tiny.run_with_cache(PROMPT, site)[1]
    loaded = ActivationCache.load(clean.save(tmp_path / "run.safetensors"))
    with tiny.edit(Patch(site, clean, pos=5)):
        wanted = tiny.forward(OTHER)
    with tiny.edit(Patch(site, loaded, pos=5)):
        np.testing.assert_array_equal(tiny.forward(OTHER), wanted)
    assert not np.array_equal(tiny.forward(OTHER), wanted)


def test_writing(cache, tmp_path):
    path = cache.save(tmp_path / "run.safetensors")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="force=True"):
        cache.save(path)
    with pytest.raises(ValueError, match="dtype must be one of f32, f16, bf16"):
        cache.save(path, dtype="f64", force=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cache.save(tmp_path / "none" / "run.safetensors")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    cache.save(path, dtype="bf16", force=True)
    assert len(path.read_bytes()) < len(before)


def test_caches_of_media(tiny, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": "What?"}]
    prompt = tiny.to_prompt([{"role": "user", "content": content}])
    cache = tiny.run_with_cache(prompt, ["hook_embed", "vision.blocks.0.hook_resid_post"])[1]
    with pytest.raises(ValueError, match=r"inside encoders of 1 pictures.*pickle"):
        cache.save(tmp_path / "run.safetensors")
    cache = tiny.run_with_cache(prompt, "hook_embed")[1]
    same(ActivationCache.load(cache.save(tmp_path / "run.safetensors")), cache)


# -- files of strangers ------------------------------------------------------------------------------------------------


def changed(saved, path, *, tensors=None, drop=(), metadata=None, sites=None):
    """A copy with some tensors, metadata and facts on the model replaced."""
    arrays = {name: array for name, array in load_file(saved).items() if name not in drop} | (tensors or {})
    with safe_open(saved, "numpy") as file:
        meta = file.metadata() | (metadata or {})
    if sites:
        meta["sites"] = json.dumps(sites(json.loads(meta["sites"])))
    save_file(arrays, path, meta)
    return path


def with_row(**facts):
    """Facts on the first site replaced, by column."""

    def change(sites):
        for column, value in facts.items():
            sites["sites"][0][int(column[1:])] = value
        return sites

    return change


@pytest.mark.parametrize(("change", "words"), [
    ({"metadata": {"format": "gemma4.edits"}}, "holds no activations: format 'gemma4.edits'"),
    ({"metadata": {"version": "2"}}, "version '2', expected"),
    ({"metadata": {"sites": ""}}, "description of the model's sites is damaged"),
    ({"metadata": {"sites": "[" * 100_000}}, "description of the model's sites is damaged"),
    ({"metadata": {"sites": "[]"}}, "expected lists of sites"),
    ({"sites": lambda sites: sites | {"scalars": [1.0]}}, "expected 10 layer scalars"),
    ({"sites": lambda sites: sites | {"scalars": [float("nan")] * 10}}, "expected 10 layer scalars"),
    ({"sites": lambda sites: sites | {"scalars": [10**400] * 10}}, "expected 10 layer scalars"),
    ({"sites": lambda sites: sites | {"layers": [{}] * 10}}, "expected window and kv_source"),
    ({"sites": lambda sites: sites | {"layers": 6}}, "expected lists of sites"),
    ({"sites": lambda sites: sites | {"sites": [*sites["sites"][:-1], [1]]}}, "expected 9 facts"),
    ({"sites": lambda sites: sites | {"sites": []}}, "is none of the sites"),
    ({"sites": with_row(c2=-1)}, "layer that does not exist"),
    ({"sites": with_row(c2=True)}, "layer that does not exist"),
    ({"sites": with_row(c3=["T", -1])}, "unknown axes"),
    ({"sites": with_row(c3=["T"])}, "unknown axes"),
    ({"sites": with_row(c3=["T", 10**30])}, "hook_embed is F32"),
    ({"sites": with_row(c4="object")}, "unknown type"),
    ({"sites": with_row(c4=["int32"])}, "unknown type"),
    ({"sites": with_row(c5={})}, "unknown type"),
    ({"sites": with_row(c6=1)}, "neither read-only nor writable"),
    ({"drop": ["tokens"]}, "expected a tensor 'tokens', I32 .*, found none"),
    ({"tensors": {"positions": np.zeros(9, np.float32)}}, "expected a tensor 'positions', I64"),
    ({"tensors": {"positions": np.zeros((9, 1), np.int64)}}, r"expected a tensor 'positions', I64 \[pos\]"),
    ({"tensors": {"positions": np.zeros(3, np.int64)}}, "9 tokens and 3 positions"),
    ({"tensors": {"hook_embeds": np.zeros((9, 2), np.float32)}}, "'hook_embeds' is none of the sites"),
    ({"tensors": {"hook_embed": np.zeros((9, 2), np.float32)}}, r"hook_embed is F32 \[9, 2\], expected .* \[9, "),
    ({"tensors": {"hook_embed": np.zeros((9, 160), np.int32)}}, "hook_embed is I32"),
    ({"tensors": {"hook_embed": np.zeros((2, 3, 4, 5), np.float32)}}, "hook_embed is F32"),
])  # fmt: skip
def test_files_that_hold_something_else(saved, tmp_path, change, words):
    path = changed(saved, tmp_path / "x.safetensors", **change)
    with pytest.raises(FormatError, match=words) as info:
        ActivationCache.load(path)
    assert "x.safetensors" in str(info.value) and len(str(info.value)) < 500


def test_damaged_files(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path / "x.safetensors"
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            ActivationCache.load(path)
    rng = np.random.default_rng(0)
    head = int.from_bytes(whole[:8], "little") + 8
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(head)] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(FormatError):
            assert isinstance(repr(ActivationCache.load(path)), str)
    with pytest.raises(FileNotFoundError):
        ActivationCache.load(tmp_path / "none.safetensors")


def test_a_file_that_changes_while_it_is_read(saved, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(saved.read_bytes())
    read = SafetensorsFile.array

    def cut(self, name):
        path.write_bytes(saved.read_bytes()[:-4])
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "array", cut)
    with pytest.raises(FormatError, match=r"x.safetensors (changed size|was written to)"):
        ActivationCache.load(path)


# -- the writer --------------------------------------------------------------------------------------------------------


def test_every_type_of_the_writer(tmp_path):
    rng = np.random.default_rng(0)
    types = [np.int8, np.bool_, np.float16, np.uint16, np.float32, np.int64, np.float64, np.complex64]
    arrays = {f"{np.dtype(one).name} ü": rng.integers(0, 2, (3, 1, 5)).astype(one) for one in types}
    arrays |= {"bf16": arrays["float32 ü"].astype(ml_dtypes.bfloat16), "empty": np.zeros((0, 4), np.float32)}
    arrays |= {"scalar": np.array(7, np.int32), "strided": np.arange(12, dtype=np.int16)[::-3]}
    arrays["big-endian"] = np.arange(5, dtype=">i4")
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        write_safetensors(file, arrays, {"key": "välue"})
    theirs, ours = load_file(path), SafetensorsFile(path)
    assert ours.metadata == {"key": "välue"} and set(ours.tensors) == set(theirs) == set(arrays)
    for name, array in arrays.items():
        assert ours.tensors[name].offset % array.dtype.itemsize == 0
        for found in (ours.array(name), theirs[name]):
            assert found.shape == array.shape and found.dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found, array, err_msg=name)
    ours.close()


def test_what_the_writer_refuses(tmp_path):
    with open(tmp_path / "x.safetensors", "wb") as file:
        with pytest.raises(TypeError, match="cannot hold"):
            write_safetensors(file, {"x": np.array(["text"])})
        with pytest.raises(ValueError, match="names and metadata take"):
            write_safetensors(file, {}, {"x": "y" * (17 << 20)})
        assert file.tell() == 0


def test_the_package_runs_without_safetensors():
    """The package of that name is a tool of our tests; users need not have it."""
    code = "import sys; sys.modules['safetensors'] = None\nimport gemma4, gemma4.edits, gemma4.interp.lens"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
