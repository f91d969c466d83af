# SPDX-License-Identifier: Apache-2.0
"""Norms, cosines, per-head results and datasets of captures, against the formulas in float64."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import PROMPT
from small_models import E_LIKE, MOE_LIKE, write_checkpoint

import gemma4
from gemma4 import ActivationCache, SiteError, StateError


def close(a, b):
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def angle(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


# -- norms and cosines -------------------------------------------------------------------------------------------------


def test_norms(model, cache):
    for name in ("resid_post", "hook_resid_post"):
        table = cache.norms(name)
        assert table.labels == [f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)]
        wanted = [[np.sqrt(sum(float(x) ** 2 for x in row)) for row in cache["resid_post", i]] for i in range(2)]
        close(table.values[:2], np.array(wanted))
        assert table.values.shape == (model.n_layers, len(cache.positions))
    z = [cache["attn.hook_z", i].astype(np.float64) for i in range(model.n_layers)]  # of two widths
    close(cache.norms("z", by="head").values, np.sqrt([(x**2).sum(2) for x in z]))
    close(cache.norms("z").values, np.sqrt([(x**2).sum((1, 2)) for x in z]))
    close(cache.norms("z", by="site").values, np.sqrt([(x**2).sum() for x in z]))
    one = cache.norms("hook_embed")
    assert one.labels == ["hook_embed"]
    close(one.values, np.linalg.norm(cache["hook_embed"].astype(np.float64), axis=1)[None])
    for key in (("resid_post", 1), "blocks.1.hook_resid_post"):
        close(cache.norms(key).values, table.values[1:2])
    assert cache.norms("model.layers.1.output").labels == ["blocks.1.hook_resid_post"]


def test_norms_of_patterns_and_keys(cache):
    """Positions are on another axis there: [head, pos, key] and [key, head, channel]."""
    pattern, keys = cache["attn.hook_pattern", 0].astype(np.float64), cache["attn.hook_k_used", 0].astype(np.float64)
    close(cache.norms("blocks.0.attn.hook_pattern").values[0], np.sqrt((pattern**2).sum((0, 2))))
    close(cache.norms("blocks.0.attn.hook_pattern", by="head").values[0], np.sqrt((pattern**2).sum(2)).T)
    close(cache.norms("blocks.0.attn.hook_k_used", by="head").values[0], np.sqrt((keys**2).sum(2)))


def test_cosine(cache):
    a, b = cache["resid_pre", 0], cache["resid_post", 3]
    close(cache.cosine(("resid_pre", 0), "blocks.3.hook_resid_post"), angle(a, b))
    close(cache.cosine("hook_embed", "hook_embed"), np.ones(len(a)))
    q, z = cache["blocks.0.attn.hook_rot_q"], cache["blocks.0.attn.hook_z"]
    close(cache.cosine(("rot_q", 0), ("z", 0)), angle(q, z))
    pattern = cache["pattern", 0].transpose(1, 0, 2)
    close(cache.cosine(("pattern", 0), ("pattern", 0)), angle(pattern, pattern))


def test_cosine_matrix(model, cache):
    resid = cache.stack("hook_resid_post")  # [n, pos, d]
    table = cache.cosine_matrix("resid_post")
    assert table.labels == cache.norms("resid_post").labels
    close(table.values, angle(resid[:, None], resid[None]).transpose(2, 0, 1))
    close(cache.cosine_matrix("resid_post", by="pos").values, angle(resid[:, :, None], resid[:, None]))
    assert table.values.max() <= 1 and cache.cosine_matrix("resid_post", by="pos").values.max() <= 1
    z = cache["blocks.0.attn.hook_z"].transpose(1, 0, 2)  # [head, pos, d]
    close(cache.cosine_matrix("blocks.0.attn.hook_z", by="pos").values[0], angle(z[:, :, None], z[:, None]))


def test_lengths_that_square_beyond_float32(tiny):
    cache = tiny.run_with_cache([2, 5, 6], "hook_embed")[1]
    cache["hook_embed"][:] = 0
    cache["hook_embed"][0, :2], cache["hook_embed"][1, :2] = (3e25, 4e25), (3e-30, 4e-30)
    np.testing.assert_allclose(cache.norms("hook_embed").values[0], [5e25, 5e-30, 0], rtol=1e-6)
    np.testing.assert_array_equal(cache.cosine("hook_embed", "hook_embed"), np.float32([1, 1, 0]))
    matrix = cache.cosine_matrix("hook_embed", by="pos").values[0]
    np.testing.assert_allclose(matrix, [[1, 1, 0], [1, 1, 0], [0, 0, 0]], rtol=1e-6)
    assert matrix.max() <= 1


def test_what_has_no_table(model, cache):
    for call in (cache.norms, cache.cosine_matrix, lambda name: cache.cosine(name, name)):
        with pytest.raises(ValueError, match="-inf where keys are masked, which have no norm"):
            call("blocks.0.attn.hook_attn_scores")
        with pytest.raises(SiteError, match=r"captured|no site"):
            call("hook_resid_pots")
        for key in (5, None, ("resid_post", 1, 2)):
            with pytest.raises(TypeError, match="a cache's key is a site name"):
                call(key)
    for call in (cache.norms, cache.cosine_matrix):
        with pytest.raises(ValueError, match="by must be one of"):
            call("resid_post", by="layers")
    with pytest.raises(ValueError, match="hook_embed has no heads"):
        cache.norms("hook_embed", by="head")
    with pytest.raises(ValueError, match="different shape in different layers"):
        cache.cosine_matrix("attn.hook_z")
    with pytest.raises(ValueError, match=r"hook_embed and blocks.0.attn.hook_z have different shapes"):
        cache.cosine("hook_embed", ("z", 0))
    ids = [name for name in cache if cache[name].dtype == np.int32]
    assert bool(ids) == (model.checkpoint.path.name == "tiny-moe")
    for name in ids:
        with pytest.raises(ValueError, match="holds ids, which have no norm"):
            cache.norms(name)


# -- per-head results --------------------------------------------------------------------------------------------------


def check_results(model, tolerance=3e-6):
    names = ["*.attn.hook_z", "*.attn.hook_result", "*.attn.hook_out"]
    whole = model.run_with_cache(PROMPT if model.d_vocab > 1000 else [2, 5, 6, 7, 9], names)[1]
    only_z = ActivationCache(
        model, {name: array for name, array in whole.items() if name.endswith("_z")}, whole.tokens, whole.positions
    )
    for layer in range(model.n_layers):
        wanted, found = whole["attn.hook_result", layer], only_z.head_results(layer)
        assert found.dtype == np.float32 and found.shape == wanted.shape and found.flags["C_CONTIGUOUS"]
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()
        assert np.abs(found.sum(1) - whole["attn.hook_out", layer]).max() <= 3 * tolerance * np.abs(wanted).max()
        assert whole.head_results(layer) is wanted


def test_head_results(model):
    check_results(model)


@pytest.mark.parametrize("config", [E_LIKE, MOE_LIKE])
def test_head_results_of_random_models(tmp_path, config):
    check_results(gemma4.load(write_checkpoint(tmp_path / "random", config)))


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize(("precision", "tolerance"), [("exact", 3e-6), ("fast", 2e-2)])
def test_head_results_of_quantised_models(tmp_path, type, precision, tolerance):
    path = tmp_path / "q.gguf"
    gemma4.quantize("tiny-e", path, type=type)
    check_results(gemma4.load(path, precision=precision), tolerance)


def test_heads_in_the_decomposition_need_no_results(model, cache, tmp_path):
    names = ["hook_embed", "*.attn.hook_z", "*.ln1_post.hook_scale", "*.hook_mlp_out", "*.hook_resid_post"]
    names += ["*.hook_ple_out"] if "blocks.0.hook_ple_out" in model.sites else []
    small = model.run_with_cache(PROMPT, names)[1]
    parts, wanted = small.decompose_resid(per_head=True), cache.decompose_resid(per_head=True)
    assert parts.labels == wanted.labels
    scale = np.abs(wanted.values).max()
    assert np.abs(parts.values - wanted.values).max() < 1e-5 * scale
    assert np.abs(parts.values.sum(0) - small["resid_post", model.n_layers - 1]).max() < 1e-4 * scale
    again = ActivationCache.load(small.save(tmp_path / "x.safetensors"))
    with pytest.raises(StateError, match="attach"):
        again.head_results(0)
    with pytest.raises(SiteError, match="hook_z"):
        model.run_with_cache(PROMPT, "hook_embed")[1].head_results(0)
    for layer in (-1, model.n_layers, 1.0, True):
        with pytest.raises(ValueError, match="layer must be an integer"):
            small.head_results(layer)


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_dataset(model, cache):
    pytest.importorskip("xarray")
    data = cache.to_dataset()
    assert list(data.data_vars) == list(cache)
    for name, array in cache.items():
        assert data[name].shape == array.shape and np.shares_memory(data[name].values, array), name
    assert data.attrs == {"model": model.checkpoint.path.name, "fingerprint": model.fingerprint}
    np.testing.assert_array_equal(data["pos"], cache.positions)
    np.testing.assert_array_equal(data["token"], cache.tokens)
    assert data["token"].dims == ("pos",)
    pattern = data["blocks.2.attn.hook_pattern"]
    assert pattern.dims == ("head", "pos", "key") and pattern.attrs["layer"] == 2
    assert "0 at masked keys" in pattern.attrs["keys"] and pattern.attrs["axes"].startswith(
        "head: attention head; pos:"
    )
    np.testing.assert_allclose(pattern.sel(pos=3).sum("key"), 1, rtol=1e-5)
    assert (pattern.sel(pos=3, key=slice(4, None)) == 0).all()
    assert data["hook_embed"].dims == ("pos", "d_model") and "layer" not in data["hook_embed"].attrs
    assert data["blocks.0.attn.hook_z"].dims[:2] == ("pos", "head")


def test_dimensions_of_several_sizes(tmp_path):
    pytest.importorskip("xarray")
    for name, config in (("e", E_LIKE), ("moe", MOE_LIKE)):
        model = gemma4.load(write_checkpoint(tmp_path / name, config))
        data = model.run_with_cache([2, 5, 6], "*")[1].to_dataset()
        assert data["blocks.0.attn.hook_z"].dims == ("pos", "head", "d_head_16")
        assert data["blocks.2.attn.hook_z"].dims == ("pos", "head", "d_head_32")
    assert data["blocks.0.moe.hook_expert_ids"].dims == ("pos", "choice")
    assert data["blocks.0.attn.hook_k"].dims[1] == "kv_head_2" and data["blocks.2.attn.hook_k"].dims[1] == "kv_head_1"


def test_dataset_of_some_positions_and_of_a_loaded_cache(tiny, tmp_path):
    pytest.importorskip("xarray")
    sequence = tiny.new_sequence()
    tiny.forward(PROMPT, sequence=sequence)
    cache = tiny.run_with_cache([5, 6, 7], ["hook_embed", "*.hook_pattern"], pos=[0, 2], sequence=sequence)[1]
    again = ActivationCache.load(cache.save(tmp_path / "x.safetensors"))
    for data in (cache.to_dataset(), again.to_dataset()):
        last = len(sequence) - 1
        assert data["pos"].values.tolist() == [last - 2, last] and data["token"].values.tolist() == [5, 7]
        assert data["key"].values.tolist() == list(range(last + 1))
        np.testing.assert_array_equal(data["hook_embed"].sel(pos=last), cache["hook_embed"][1])
        assert data.attrs["fingerprint"] == tiny.fingerprint


def test_dataset_without_keys(tiny):
    pytest.importorskip("xarray")
    data = tiny.run_with_cache([5, 6], "hook_embed")[1].to_dataset()
    assert set(data.dims) == {"pos", "d_model"} and set(data.coords) == {"pos", "token"}


def test_dataset_without_xarray():
    code = """if True:
        import sys
        sys.modules["xarray"] = None
        import gemma4
        gemma4.load("tiny-e").run_with_cache([2, 5], "hook_embed")[1].to_dataset()"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ImportError: this needs xarray")
    assert 'pip install "gemma4[xarray]"' in done.stderr
