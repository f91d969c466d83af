# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of every format: files written here, results by their formula in float64; hostile files."""

import json
import os
import pickle
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gemma4
from gemma4 import SAE, FormatError, StateError, Transcoder
from gemma4.dictionaries import AblateFeature, ClampFeature, Features, ScaleFeature
from gemma4.dictionaries.features import join
from gemma4.edits import Scale, load_edits, save_edits
from gemma4.load.safetensors import SafetensorsFile

D, N, OUT = 24, 9000, 16  # N: more than two blocks of features
RNG = np.random.default_rng(0)
X = RNG.standard_normal((7, D)).astype(np.float32)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order_of_tests():
    RNG.bit_generator.state = np.random.default_rng(1).bit_generator.state


def numbers(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def weights(d_out=D, n=N):
    return {"W_enc": numbers(D, n), "W_dec": numbers(n, d_out), "b_enc": numbers(n) - 4, "b_dec": numbers(d_out)}


def saelens(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    d_in, d_sae = tensors["W_enc"].shape
    metadata = {"hook_name": "blocks.2.hook_resid_post", "model_name": "gemma", "sae_lens_version": "6.54.12"}
    plain = {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(plain | config))
    return folder


def scope_2(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name.lower(): array for name, array in tensors.items()}, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "width": N} | config))
    return folder


def sparsify(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    tensors = {renamed.get(name, name): array for name, array in tensors.items()}
    tensors["encoder.weight"] = np.ascontiguousarray(tensors["encoder.weight"].T)
    save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": 8} | config))
    return folder


# ---- the formulas, dense and in float64 -----------------------------------------------------------------------------


def wide(tensors):
    return {name: array.astype(np.float64) for name, array in tensors.items()}


def pre_of(w, x, b_in=0.0):
    return (x.astype(np.float64) - b_in) @ w["W_enc"] + w["b_enc"]


def jump(pre, threshold):
    return np.where(pre > threshold, np.maximum(pre, 0), 0)


def top(pre, k):
    kept = np.zeros_like(pre)
    for row, out in zip(pre, kept, strict=True):
        best = np.argsort(-row)[:k]
        out[best] = np.maximum(row[best], 0)
    return kept


def agrees(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def check(dictionary, activations, out, x=X):
    features = dictionary.encode(x)
    assert len(features.ids) and (features.values > 0).all()
    assert features.ids.dtype == np.int32 and features.values.dtype == np.float32
    for ids, _ in features:
        assert (np.diff(ids) > 0).all()
    dense = features.dense()
    rows = ((dense > 0) == (activations > 0)).all(axis=1)  # float32 may round one over its threshold
    assert (~rows).sum() <= 1
    agrees(dense[rows], activations[rows])
    agrees(dictionary.decode(features, x)[rows], out[rows])
    agrees(dictionary(x)[rows], out[rows])


# ---- Gemma Scope ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_gemma_scope_1(tmp_path, order):
    tensors = weights() | {"threshold": np.abs(numbers(N)) * 3}
    tensors["threshold"][:9] = -1.0  # with the ReLU, as 0
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_9k" / "average_l0_7"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: np.asarray(v, order=order) for k, v in tensors.items()})
    w = wide(tensors)
    expected = jump(pre_of(w, X), w["threshold"])
    for path in (folder, folder / "params.npz", str(folder)):
        with SAE.load(path) as sae:
            assert (sae.site, sae.d_in, sae.d_sae, sae.d_out) == ("blocks.3.hook_resid_post", D, N, D)
            check(sae, expected, expected @ w["W_dec"] + w["b_dec"])
            agrees(sae.error(X), X - (expected @ w["W_dec"] + w["b_dec"]))


@pytest.mark.parametrize(
    ("repository", "layer", "site", "site_out"),
    [
        ("gemma-scope-9b-pt-mlp", 4, "blocks.4.hook_mlp_out", None),
        ("models--google--gemma-scope-27b-pt-att", 11, "blocks.11.attn.hook_z", None),
        ("gemma-scope-2b-pt-transcoders", 0, "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"),
        ("elsewhere", 4, None, None),
    ],
)
def test_sites_of_gemma_scope_1(tmp_path, repository, layer, site, site_out):
    """The transcoders read before the gain: it was folded into them."""
    folder = tmp_path / repository / f"layer_{layer}" / "width_9k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **weights(n=32), threshold=np.ones(32, np.float32))
    kind = Transcoder if site_out else SAE
    assert kind.load(folder).site == site and getattr(kind.load(folder), "site_out", None) == site_out
    assert kind.load(folder, site="model.layers.1.output").site == "blocks.1.hook_resid_post"
    if site_out:
        with pytest.raises(ValueError, match=r"is a transcoder: open it with gemma4.Transcoder.load"):
            SAE.load(folder)


def test_embeddings_of_gemma_scope_1_are_unscaled(tmp_path):
    tensors = weights() | {"threshold": np.abs(numbers(N))}
    folder = tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **tensors)
    w, root = wide(tensors), D**0.5
    expected = jump(pre_of(w, X / root), w["threshold"])
    sae = SAE.load(folder)
    assert sae.site == "hook_embed"
    check(sae, expected, (expected @ w["W_dec"] + w["b_dec"]) * root)


def test_a_compressed_npz_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "params.npz", **weights(n=32))
    with pytest.raises(FormatError, match=r"compressed.*numpy.savez"):
        SAE.load(tmp_path)


HOOKS = {
    "model.layers.7.output": "blocks.7.hook_resid_post",
    "model.layers.7.self_attn.o_proj.input": "blocks.7.attn.hook_z",
    "model.layers.7.post_feedforward_layernorm.output": "blocks.7.hook_mlp_out",
}


@pytest.mark.parametrize("hook", HOOKS)
def test_gemma_scope_2(tmp_path, hook):
    tensors = weights() | {"threshold": np.abs(numbers(N))}
    model = {"model_name": "google/gemma-3-1b-it", "affine_connection": False}
    sae = SAE.load(scope_2(tmp_path, tensors, hf_hook_point_in=hook, hf_hook_point_out=hook, **model))
    assert sae.site == HOOKS[hook] and sae.skip_positions == 4 and sae.metadata["width"] == N
    w = wide(tensors)
    expected = jump(pre_of(w, X), w["threshold"])
    check(sae, expected, expected @ w["W_dec"] + w["b_dec"])


def test_gemma_scope_2_transcoder(tmp_path):
    """It reads after the gain, and its affine part is x @ A, not transposed."""
    tensors = weights() | {"threshold": np.abs(numbers(N)), "affine_skip_connection": numbers(D, D)}
    ends = {
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
    }
    folder = scope_2(tmp_path, tensors, affine_connection=True, model_name="google/gemma-3-1b-pt", **ends)
    transcoder = Transcoder.load(folder)
    assert (transcoder.site, transcoder.site_out) == ("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out")
    assert transcoder.skip_positions == 0
    w = wide(tensors)
    expected = jump(pre_of(w, X), w["threshold"])
    out = expected @ w["W_dec"] + w["b_dec"] + X.astype(np.float64) @ w["affine_skip_connection"]
    check(transcoder, expected, out)
    target = numbers(7, D)
    agrees(transcoder.error(X, target), target - out)
    with pytest.raises(ValueError, match="needs the input besides"):
        transcoder.decode(transcoder.encode(X))
    with pytest.raises(ValueError, match="needs the output besides"):
        transcoder.error(X)


def test_gemma_scope_2_without_its_config(tmp_path):
    folder = scope_2(tmp_path, weights() | {"threshold": np.ones(N, np.float32)})
    (folder / "config.json").unlink()
    assert SAE.load(folder).site is None


@pytest.mark.parametrize(
    ("place", "kind", "sites", "skip"),
    [
        ("gemma-scope-2-1b-it/resid_post/layer_13_width_16k_l0_medium", SAE, ("13.hook_resid_post", None), 4),
        ("gemma-scope-2-270m-pt/attn_out_all/layer_3_width_16k_l0_small", SAE, ("3.attn.hook_z", None), 0),
        (
            "models--google--gemma-scope-2-4b-it/snapshots/0a1b/transcoder_all/layer_0_width_16k_l0_small_affine",
            Transcoder,
            ("0.mlp.hook_in", "0.hook_mlp_out"),
            4,
        ),
    ],
)
def test_the_place_of_gemma_scope_2_stands_for_its_config(tmp_path, place, kind, sites, skip):
    """Published folders of which only params.safetensors was fetched."""
    skips = {"affine_skip_connection": numbers(D, D)} if "affine" in place else {}
    (folder := tmp_path / place).mkdir(parents=True)
    scope_2(folder, weights() | {"threshold": np.ones(N, np.float32)} | skips)
    (folder / "config.json").unlink()
    dictionary = kind.load(folder)
    assert dictionary.site == f"blocks.{sites[0]}" and dictionary.skip_positions == skip
    assert getattr(dictionary, "site_out", None) == (sites[1] and f"blocks.{sites[1]}")
    shutil.move(folder, tmp_path / "elsewhere")
    moved = kind.load(tmp_path / "elsewhere")
    assert moved.fingerprint == dictionary.fingerprint and moved.site is None


# ---- SAELens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply", [True, False, None])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm", None])
def test_saelens_standard(tmp_path, apply, norm):
    tensors = weights()
    config = {"apply_b_dec_to_input": apply, "normalize_activations": norm}
    sae = SAE.load(saelens(tmp_path, tensors, **{k: v for k, v in config.items() if v is not None}))
    assert sae.site == "blocks.2.hook_resid_post"
    w, x = wide(tensors), X.astype(np.float64) + 3
    shift = x.mean(axis=1, keepdims=True) if norm == "layer_norm" else 0.0
    factor = np.float64(1)
    if norm == "layer_norm":
        factor = x.std(axis=1, ddof=1, keepdims=True)
    elif norm == "constant_norm_rescale":
        factor = np.linalg.norm(x, axis=1, keepdims=True) / D**0.5
    eps = 1e-5 if norm == "layer_norm" else 0
    expected = jump(pre_of(w, (x - shift) / (factor + eps), w["b_dec"] if apply in (True, None) else 0), 0)
    check(sae, expected, (expected @ w["W_dec"] + w["b_dec"]) * factor + shift, x)


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("k", [1, 40, N])
def test_saelens_topk(tmp_path, by_norm, k):
    tensors = weights()
    tensors["b_enc"] += 3
    sae = SAE.load(saelens(tmp_path, tensors, architecture="topk", k=k, rescale_acts_by_decoder_norm=by_norm))
    w = wide(tensors)
    norms = np.linalg.norm(w["W_dec"], axis=1) if by_norm else np.ones(N)
    expected = top(pre_of(w, X, w["b_dec"]) * norms, k)
    check(sae, expected, (expected / norms) @ w["W_dec"] + w["b_dec"])


def test_top_k_of_equal_features_is_the_first(tmp_path):
    tensors = weights()
    tensors["W_enc"][:] = tensors["W_enc"][:, :1]
    tensors["b_enc"][:] = 100
    sae = SAE.load(saelens(tmp_path, tensors, architecture="topk", k=3))
    assert sae.encode(X).ids.tolist() == [0, 1, 2] * len(X)


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "matryoshka_batchtopk"])
def test_saelens_jumprelu(tmp_path, architecture):
    """Batch-top-k is saved with a constant threshold; a feature at it does not fire."""
    tensors = weights() | {"threshold": np.full(N, 1.5, np.float32)}
    tensors["W_enc"][:, 5], tensors["b_enc"][5] = 0, 1.5
    tensors["W_enc"][:, 6], tensors["b_enc"][6] = 0, np.nextafter(np.float32(1.5), np.float32(2))
    sae = SAE.load(saelens(tmp_path, tensors, architecture=architecture))
    w = wide(tensors)
    expected = jump(pre_of(w, X, w["b_dec"]), 1.5)
    assert not expected[:, 5].any() and expected[:, 6].all()
    check(sae, expected, expected @ w["W_dec"] + w["b_dec"])


def test_saelens_gated(tmp_path):
    tensors = weights()
    del tensors["b_enc"]
    tensors |= {"r_mag": numbers(N), "b_mag": numbers(N), "b_gate": numbers(N) - 3}
    sae = SAE.load(saelens(tmp_path, tensors, architecture="gated"))
    w = wide(tensors)
    x = X.astype(np.float64) - w["b_dec"]
    magnitude = np.maximum(x @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    expected = np.where(x @ w["W_enc"] + w["b_gate"] > 0, magnitude, 0)
    check(sae, expected, expected @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("r_mag", [100, 88.8])
def test_scales_beyond_float32(tmp_path, r_mag):
    tensors = weights(n=32) | {"r_mag": numbers(32), "b_mag": numbers(32), "b_gate": numbers(32)}
    tensors["r_mag"][7] = r_mag
    with pytest.raises(FormatError, match=rf"r_mag\[7\] is {r_mag}.*, expected a number whose exp is finite"):
        SAE.load(saelens(tmp_path, tensors, architecture="gated"))


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (1e30, "inf")])
def test_norms_of_rows_that_are_not_finite(tmp_path, value, shown):
    """A feature would never fire, or write nothing."""
    tensors = weights(n=32)
    tensors["W_dec"][5, 2] = value
    folder = saelens(tmp_path, tensors, architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    sae = SAE.load(folder)
    with pytest.raises(FormatError, match=f"decoder's rows hold {shown}"):
        sae.encode(X)
    with pytest.raises(FormatError, match=f"decoder's rows hold {shown}"):
        sae.add_feature(X.copy(), 5, np.ones(len(X), np.float32))


def test_a_row_of_zeros_writes_nothing(tmp_path):
    tensors = weights(n=32)
    tensors["W_dec"][5] = 0
    sae = SAE.load(saelens(tmp_path, tensors, architecture="topk", k=3, rescale_acts_by_decoder_norm=True))
    out = X.copy()
    sae.add_feature(out, 5, np.ones(len(X), np.float32))
    np.testing.assert_array_equal(out, X)


@pytest.mark.parametrize("architecture", [j + s + "transcoder" for j in ("", "jumprelu_") for s in ("", "skip_")])
def test_saelens_transcoder(tmp_path, architecture):
    """b_dec is of the output's width, and W_skip is [d_out, d_in]."""
    tensors = weights(OUT) | {"threshold": np.full(N, 1, np.float32), "W_skip": numbers(OUT, D)}
    named = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    folder = saelens(tmp_path, tensors, architecture=architecture, d_out=OUT, metadata=named, apply_b_dec_to_input=True)
    transcoder = Transcoder.load(folder)
    assert (transcoder.site, transcoder.site_out) == (named["hook_name"], named["hook_name_out"])
    w = wide(tensors)
    expected = jump(pre_of(w, X), 1 if "jumprelu" in architecture else 0)
    skip = X @ w["W_skip"].T if "skip" in architecture else 0
    check(transcoder, expected, expected @ w["W_dec"] + w["b_dec"] + skip)
    with pytest.raises(ValueError, match="Transcoder"):
        SAE.load(folder)
    with pytest.raises(ValueError, match="is an autoencoder"):
        Transcoder.load(saelens(tmp_path / "sae", weights()))


def test_hook_point_of_hugging_face_wins(tmp_path):
    """SAELens names the wrong input for transcoders of Gemma Scope 2."""
    named = {"hook_name": "blocks.1.hook_mlp_in", "hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output"}
    sae = Transcoder.load(saelens(tmp_path, weights(), architecture="transcoder", metadata=named))
    assert sae.site == "blocks.1.mlp.hook_in"


@pytest.mark.parametrize(
    "old", [{"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}, {"architecture": "topk", "k": 5}]
)
def test_saelens_before_6(tmp_path, old):
    tensors = weights()
    folder = saelens(tmp_path, tensors, **{"metadata": {}, "hook_point": "blocks.1.hook_resid_pre"} | old)
    sae = SAE.load(folder)
    assert sae.site == "blocks.1.hook_resid_pre"
    assert (sae.encode(X).counts == 5).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_are_computed_in_float32(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in weights().items()}
    sae = SAE.load(saelens(tmp_path, tensors))
    w = wide(tensors)
    expected = jump(pre_of(w, X, w["b_dec"]), 0)
    agrees(sae.encode(X).dense(), expected)
    agrees(sae(X), expected @ w["W_dec"] + w["b_dec"])


# ---- sparsify -------------------------------------------------------------------------------------------------------


def test_sparsify(tmp_path):
    """W_dec is [d_sae, d_in], and the encoder is stored transposed."""
    tensors = weights()
    sae = SAE.load(sparsify(tmp_path / "layers.5", tensors))
    assert sae.site == "blocks.5.hook_resid_post"
    w = wide(tensors)
    expected = top(pre_of(w, X, w["b_dec"]), 8)
    check(sae, expected, expected @ w["W_dec"] + w["b_dec"])


def test_configurations_that_are_missing_or_old(tmp_path):
    folder = sparsify(tmp_path / "layers.5", weights(), signed=True)
    with pytest.raises(NotImplementedError, match="signed features"):
        SAE.load(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match="which says how to compute"):
        SAE.load(folder)


@pytest.mark.parametrize("skip", [True, False])
def test_sparsify_transcoder(tmp_path, skip):
    tensors = weights() | {"W_skip": numbers(D, D)}
    config = {"transcode": True, "skip_connection": skip, "num_latents": 0, "expansion_factor": N // D}
    folder = sparsify(tmp_path / "layers.5.mlp", tensors, **config)
    transcoder = Transcoder.load(folder / "sae.safetensors")
    assert (transcoder.site, transcoder.site_out) == ("blocks.5.mlp.hook_in", "blocks.5.mlp.hook_out")
    w = wide(tensors)
    expected = top(pre_of(w, X), 8)
    check(transcoder, expected, expected @ w["W_dec"] + w["b_dec"] + (X @ w["W_skip"].T if skip else 0))


# ---- features -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    return SAE.load(saelens(tmp_path_factory.mktemp("standard"), weights()))


def test_features(standard):
    features = standard.encode(X)
    dense = features.dense()
    assert len(features) == len(X) and features[2].ids.tolist() == np.flatnonzero(dense[2]).tolist()
    assert features[-1].values.tolist() == dense[-1][features[-1].ids].tolist()
    np.testing.assert_array_equal(features[2:5].dense(), dense[2:5])
    np.testing.assert_array_equal(features[5:2].dense(), dense[5:2])
    np.testing.assert_array_equal(features.feature(int(features.ids[0])), dense[:, features.ids[0]])
    best = features.top(3)
    assert (best.counts == 3).all()
    for row, (ids, values) in zip(dense, best, strict=True):
        assert sorted(ids) == sorted(np.argsort(-row)[:3]) and values.tolist() == row[ids].tolist()
    np.testing.assert_array_equal(join([features[:3], features[3:]], N).dense(), dense)
    with pytest.raises(IndexError):
        features[len(X)]
    with pytest.raises(IndexError, match="0 to 8999"):
        features.feature(N)
    with pytest.raises(ValueError, match="k must be"):
        features.top(0)
    with pytest.raises(ValueError, match="dictionary of 5"):
        standard.decode(Features(features.offsets, features.ids, features.values, 5))


def test_no_positions(standard):
    features = standard.encode(X[:0])
    assert len(features) == 0 and standard.decode(features).shape == (0, D) and features.dense().shape == (0, N)


def test_many_positions_are_those_of_few(standard):
    x = numbers(1100, D)  # more than two blocks of positions
    features = standard.encode(x)
    for first in (0, 500, 1000):
        few = standard.encode(x[first : first + 100])
        np.testing.assert_array_equal(features[first : first + 100].dense(), few.dense())


def test_encoding_makes_no_dense_array(tmp_path):
    d, n, pos = 8, 200_000, 600
    tensors = {"W_enc": numbers(d, n), "W_dec": numbers(n, d), "b_enc": np.full(n, -9, np.float32), "b_dec": numbers(d)}
    for config in ({}, {"architecture": "topk", "k": 20}):
        sae, x = SAE.load(saelens(tmp_path, tensors, **config)), numbers(pos, d)
        sae.encode(x[:1])
        tracemalloc.start()
        features = sae.encode(x)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(features.ids) > 1000 and peak - 8 * len(features.ids) < 80 << 20 < 4 * n * pos / 4


def test_heads_are_concatenated(standard):
    np.testing.assert_array_equal(standard.encode(X.reshape(7, 4, 6)).dense(), standard.encode(X).dense())


def test_metrics(standard):
    found = standard.metrics(X)
    dense, out = standard.encode(X).dense(), standard(X).astype(np.float64)
    spread = ((X - X.mean(axis=0, dtype=np.float64)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - ((X - out) ** 2).sum() / spread, rel=1e-5)
    assert found.l0 == pytest.approx((dense > 0).sum(axis=1).mean())
    assert found.dead == pytest.approx((dense == 0).all(axis=0).mean())


def test_a_row_of_the_decoder(standard):
    only = Features(np.array([0, 1, 1]), np.array([77], np.int32), np.array([2], np.float32), N)
    with_it, without = standard.decode(only)
    agrees(with_it - without, 2 * standard.direction(77))
    with pytest.raises(IndexError, match="no feature 9000"):
        standard.direction(N)


def test_a_cache(tiny, tmp_path):
    (d_model,) = tiny.sites["blocks.2.hook_resid_post"].dims[1:]
    tensors = {"w_enc": numbers(d_model, 64), "w_dec": numbers(64, d_model)}
    tensors |= {"b_enc": numbers(64), "b_dec": numbers(d_model)}
    hook = "model.layers.2.output"
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": 64, "model_name": "some-it"}
    sae = SAE.load(scope_2(tmp_path, tensors | {"threshold": np.zeros(64, np.float32)}, **config))
    _, cache = tiny.run_with_cache("Once upon a time there was", sae.site)
    features, plain = sae.encode(cache), sae.encode(cache[sae.site])
    assert (features.counts[:4] == 0).all() and plain.counts[:4].all()
    np.testing.assert_array_equal(features[4:].dense(), plain[4:].dense())
    agrees(sae.error(cache), cache[sae.site] - sae(cache))
    assert sae.metrics(cache) == sae.metrics(cache[sae.site][4:])
    with pytest.raises(ValueError, match=rf"reads \[pos, {d_model}\]"):
        sae.encode(cache[sae.site][:, :-1])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_no_numbers(standard, bad):
    x = X.copy()
    x[3, 2] = bad
    with pytest.raises(ValueError, match="row 3 hold NaN or infinities"):
        standard.encode(x)
    with pytest.raises(TypeError, match="must be numbers"):
        standard.encode(np.array([["a"] * D]))
    for shape in ((D,), (2, D + 1), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=rf"reads \[pos, {D}\]"):
            standard.encode(np.zeros(shape, np.float32))


def changed(name, change):
    tensors = weights(n=32) | {"threshold": np.ones(32, np.float32)}
    tensors[name] = change(tensors[name])
    return tensors


def put(value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("threshold", put(np.nan), r"threshold\[3\] is nan"),
        ("b_enc", put(np.inf), r"b_enc\[3\] is inf, expected a finite"),
        ("b_dec", put(np.nan), r"b_dec\[3\] is nan"),
        ("b_dec", lambda a: a[:-1], r"b_dec has shape \[23\], expected \[24\]"),
        ("W_dec", lambda a: a[:-1], r"W_dec has shape \[31, 24\], expected \[32, 24\]"),
        ("W_enc", lambda a: a.T.copy(), r"W_enc has shape \[32, 24\], expected \[24, 32\]"),
        ("W_enc", lambda a: a.reshape(-1), r"W_enc has shape \[768\]"),
        ("W_enc", lambda a: a.astype(np.int32), r"W_enc is <i4, expected one of float32"),
    ],
)
def test_hostile_tensors(tmp_path, name, change, message):
    saelens(tmp_path, weights(n=32), architecture="jumprelu")
    save_file(changed(name, change), tmp_path / "sae_weights.safetensors")
    with pytest.raises(FormatError, match=message):
        SAE.load(tmp_path)


def test_missing_tensor(tmp_path):
    tensors = weights(n=32)
    del tensors["b_enc"]
    with pytest.raises(FormatError, match="no tensor b_enc; it has W_"):
        SAE.load(saelens(tmp_path, tensors))


def test_weights_that_are_nan_are_found_when_used(tmp_path):
    sae = SAE.load(saelens(tmp_path, changed("W_enc", put(np.nan))))
    with pytest.raises(FormatError, match="NaN or infinities for features 0 to 31"):
        sae.encode(X)
    sae = SAE.load(saelens(tmp_path, changed("W_enc", put(np.inf))))
    with pytest.raises(FormatError, match="NaN or infinities for features 0 to 31"):
        sae.encode(X)
    sae = SAE.load(saelens(tmp_path, changed("W_dec", put(np.nan)), architecture="jumprelu"))
    with pytest.raises(FormatError, match="decoder's weights"):
        sae(100 * X)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"architecture": "temporal"}, NotImplementedError, "'temporal' is not read"),
        ({"architecture": ["standard"]}, NotImplementedError, "is not read"),
        ({"architecture": "batchtopk"}, NotImplementedError, "no threshold"),
        ({"activation_fn": "tanh-relu"}, NotImplementedError, "'tanh-relu'"),
        ({"normalize_activations": "expected_average_only_in"}, NotImplementedError, "fold_activation_norm"),
        ({"normalize_activations": "covariance_whitening"}, NotImplementedError, "covariance_whitening"),
        ({"reshape_activations": "odd"}, NotImplementedError, "'odd'"),
        ({"hook_head_index": 2}, NotImplementedError, "one attention head"),
        ({"d_in": 25}, FormatError, r"W_enc has shape \[24, 32\], expected \[25, 32\]"),
        ({"d_sae": "32"}, FormatError, "d_sae is 32, expected an integer"),
        ({"d_in": None}, FormatError, "d_in is None"),
        ({"architecture": "topk", "k": 0}, FormatError, r"k is 0, expected an integer in 1..32"),
        ({"architecture": "topk"}, FormatError, "k is None"),
        ({"metadata": []}, FormatError, r"metadata is \[\], expected an object"),
        ({"metadata": {"hook_name": 7}}, FormatError, "hook_name is 7"),
        ({"apply_b_dec_to_input": "yes"}, FormatError, "expected true or false"),
    ],
)
def test_hostile_configurations(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        SAE.load(saelens(tmp_path, weights(n=32), **config))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"architecture": "topk"}, NotImplementedError, "'topk' is not read"),
        ({"width": 7}, FormatError, "w_enc has 9000 features, width in config.json is 7"),
        ({"affine_connection": True}, FormatError, "no tensor affine_skip_connection"),
        ({"type": "crosscoder"}, NotImplementedError, "crosscoder"),
    ],
)
def test_hostile_gemma_scope_2(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        SAE.load(scope_2(tmp_path, weights() | {"threshold": np.ones(N, np.float32)}, **config))


def test_json_that_is_none(tmp_path):
    folder = saelens(tmp_path, weights(n=32))
    for text in ("[" * 100_000, "{", "7", '{"d_in": 1' + "0" * 5000 + "}"):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(FormatError):
            SAE.load(folder)
    (folder / "cfg.json").write_bytes(b" " * (17 << 20))
    with pytest.raises(FormatError, match="limit"):
        SAE.load(folder)


def test_files_cut_anywhere(tmp_path):
    folder = saelens(tmp_path / "a", weights(n=32))
    np.savez(tmp_path / "params.npz", **weights(n=32), threshold=np.ones(32, np.float32))
    for file in (folder / "sae_weights.safetensors", tmp_path / "params.npz"):
        data = file.read_bytes()
        for end in [*range(0, 400, 13), *range(400, len(data), 997), len(data) - 1]:
            file.write_bytes(data[:end])
            with pytest.raises(FormatError):
                SAE.load(file)


def test_damaged_npz(tmp_path):
    """Every single byte of the headers may be wrong: the file loads with the same shapes, or is a FormatError."""
    file = tmp_path / "params.npz"
    np.savez(file, **weights(n=8), threshold=np.ones(8, np.float32))
    data, refused = bytearray(file.read_bytes()), 0
    places = [*range(300), *range(len(data) - 600, len(data))]
    for place in places[::3]:
        damaged = data.copy()
        damaged[place] ^= 0xFF
        file.write_bytes(damaged)
        try:
            with SAE.load(file) as sae:
                sae.encode(X)
        except (FormatError, NotImplementedError):
            refused += 1
    assert refused > 20


def test_objects_in_an_npz_are_not_read(tmp_path):
    np.savez(tmp_path / "params.npz", **weights(n=8) | {"W_enc": np.array([[Evil()]], object)})
    with pytest.raises(FormatError):
        SAE.load(tmp_path / "params.npz")
    assert not Evil.ran


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (b"'shape': (24, 8), ", b"'shape': (-24, -8), "),
        (b"'descr': '<f4', ", b"'descr': '|V4', "),
        (b"'descr': '<f4', ", b"'descr': '<U1', "),
        (b"'descr': '<f4', ", b"'descr': '<U0', "),
        (b"'descr': '<f4', ", b"'descr': '|O', "),
        (b"'descr': '<f4', ", b"'descr': '>f4', "),
        (b"'descr': '<f4', ", b"'descr': ('<f2', (2,)), "),
        (b"'descr': '<f4', ", b"'descr': [('a', '<f4')], "),
        (b"'shape': (24, 8), ", b"'shape': (192,), "),
        (b"'shape': (24, 8), ", b"'shape': (24, 8.0), "),
        (b"'shape': (24, 8), ", b"'shape': (24, 8, 9), "),
    ],
)
def test_hostile_headers_of_an_npz(tmp_path, was, now):
    file = tmp_path / "params.npz"
    np.savez(file, **weights(n=8), threshold=numbers(8))
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    data = entries["W_enc.npy"]
    header = data[10:128]
    assert was in header and header.endswith(b"\n")
    entries["W_enc.npy"] = data[:10] + header.replace(was, now).rstrip().ljust(117) + b"\n" + data[128:]
    with zipfile.ZipFile(file, "w") as archive:  # with checksums that are right
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(FormatError, match="W_enc"):
        SAE.load(file)


def test_arrays_beyond_the_file(tmp_path):
    """The list of entries claims more data than the file has."""
    file = tmp_path / "params.npz"
    np.savez(file, **weights(n=8), threshold=np.ones(8, np.float32))
    data = file.read_bytes()
    sizes = data.rindex(b"PK\x01\x02") + 20
    file.write_bytes(data[:sizes] + 2 * (1 << 30).to_bytes(4, "little") + data[sizes + 8 :])
    with pytest.raises(FormatError):
        SAE.load(file)


@pytest.mark.parametrize("name", ["ae.pt", "sae.pkl", "pytorch_model.bin", "w.pth"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FormatError, match=r"pickles can run code.*Convert it"):
            SAE.load(path)
    assert not Evil.ran


def test_what_is_no_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        SAE.load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"holds nothing; expected one of params\.npz"):
        SAE.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="no dictionary by its name"):
        SAE.load(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "params.npz")
    with pytest.raises((FormatError, FileNotFoundError)):
        SAE.load(tmp_path / "params.npz")
    (tmp_path / "params_layer_0.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"several layers: open it with gemma4\.Crosscoder\.load"):
        SAE.load(tmp_path)


def test_a_file_that_changes_or_is_closed(tmp_path):
    folder = saelens(tmp_path, weights(n=32))
    sae = SAE.load(folder)
    file = folder / "sae_weights.safetensors"
    os.truncate(file, 100)
    with pytest.raises(FormatError, match="changed size"):
        sae.encode(X)
    sae.close()
    with pytest.raises(StateError, match="closed"):
        sae.direction(0)


@pytest.mark.slow
def test_opening_does_not_read(tmp_path):
    """A sparse file of 4 GB opens at once, and takes memory for what is used."""
    d_in, d_sae = 4096, 131072
    half = 4 * d_in * d_sae
    header = {}
    sizes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_enc": [d_sae], "b_dec": [d_in]}
    end = 0
    for name, shape in sizes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    saelens(tmp_path, weights(n=32), d_in=d_in, d_sae=d_sae)
    with open(tmp_path / "sae_weights.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 2 * half and Path(tmp_path / "sae_weights.safetensors").stat().st_size > 4 << 30
    start = time.perf_counter()
    sae = SAE.load(tmp_path)
    assert time.perf_counter() - start < 1
    before = resident()
    assert not sae.direction(d_sae - 1).any() and not sae.values_of(99, np.ones((2, d_in), np.float32)).any()
    assert resident() - before < 64 << 20  # the pages of a column: 16 MiB


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_public_names():
    assert {"SAE", "Transcoder", "Features"} <= set(gemma4.__all__)


# ---- inside the model -----------------------------------------------------------------------------------------------

TEXT = "Once upon a time there was a little girl named Lily"
RESID = "blocks.2.hook_resid_post"
ALL = slice(None)


def width(model, site):
    return int(np.prod(model.sites[site].dims[1:]))


def trained(folder, model, site=RESID, n=96, **config):
    """An autoencoder of this site that reconstructs something of it: directions of its own activations."""
    d = width(model, site)
    _, cache = model.run_with_cache("Lily likes to play with the red ball in the park", site, logits=None)
    directions = np.resize(cache[site].reshape(-1, d), (n, d)) + numbers(n, d)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    tensors = {"W_enc": directions.T.copy(), "W_dec": 0.7 * directions, "b_enc": numbers(n), "b_dec": 0.1 * numbers(d)}
    config = {"d_out": d, "metadata": {"hook_name": site, "hook_name_out": "blocks.3.hook_mlp_out"}} | config
    return saelens(folder, tensors, **config)


@pytest.fixture(params=["standard", "topk", "layer_norm", "heads"])
def sae(request, tiny, tmp_path):
    site = "blocks.1.attn.hook_z" if request.param == "heads" else RESID
    config = {"topk": {"architecture": "topk", "k": 9, "rescale_acts_by_decoder_norm": True}}
    config |= {"layer_norm": {"normalize_activations": "layer_norm"}}
    return SAE.load(trained(tmp_path, tiny, site, **config.get(request.param, {})))


def test_attach_keeps_the_logits(tiny, sae):
    """With the error term, the pass is the same up to rounding; the record holds what fired."""
    plain, cache = tiny.run_with_cache(TEXT, sae.site)
    with tiny.attach(sae) as record:
        attached = tiny.forward(TEXT)
    assert np.abs(attached - plain).max() < 2e-5 * np.abs(plain).max()
    expected = sae.encode(cache)
    assert len(expected.ids) > 50
    np.testing.assert_array_equal(record.features().dense(), expected.dense())
    np.testing.assert_array_equal(record.positions(), cache.positions)
    np.testing.assert_array_equal(tiny.forward(TEXT), plain)
    record.clear()
    assert len(record.features()) == 0


def test_attach_replaces(tiny, sae):
    _, cache = tiny.run_with_cache(TEXT, sae.site)
    with tiny.attach(sae, error=False):
        logits, after = tiny.run_with_cache(TEXT, sae.site)
    agrees(after[sae.site].reshape(len(cache.positions), -1), sae(cache))
    shape = cache[sae.site].shape
    np.testing.assert_allclose(
        logits,
        tiny.run_with_hooks(TEXT, [(sae.site, lambda array, site: sae(array).reshape(shape))]),
        atol=1e-4,
    )
    assert np.abs(logits - tiny.forward(TEXT)).max() > 0.01


def test_attach_while_generating_and_in_batches(tiny, tmp_path):
    sae = SAE.load(trained(tmp_path, tiny))
    prompts, options = [TEXT, "Hello"], {"max_tokens": 5, "temperature": 0, "capture": RESID}
    plain = tiny.generate(prompts, **options)
    with tiny.attach(sae) as record:
        attached = tiny.generate(prompts, **options)
    for number, (a, b) in enumerate(zip(plain, attached, strict=True)):
        assert a.text == b.text and len(a.cache.positions) > 5
        np.testing.assert_array_equal(record.positions(number), a.cache.positions)
        agrees(record.features(number).dense(), sae.encode(a.cache).dense())


def trained_from_position_4(tiny, folder):
    d = width(tiny, RESID)
    tensors = {"w_enc": numbers(d, 64), "w_dec": numbers(64, d), "b_enc": numbers(64), "b_dec": numbers(d)}
    config = dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.2.output")
    config |= {"width": 64, "model_name": "some-it"}
    return SAE.load(scope_2(folder, tensors | {"threshold": np.zeros(64, np.float32)}, **config))


def test_attach_leaves_positions_that_were_not_trained_on(tiny, tmp_path):
    sae = trained_from_position_4(tiny, tmp_path)
    _, plain = tiny.run_with_cache(TEXT, RESID)
    with tiny.attach(sae, error=False) as record:
        _, cache = tiny.run_with_cache(TEXT, RESID)
    np.testing.assert_array_equal(cache[RESID][:4], plain[RESID][:4])
    agrees(cache[RESID][4:], sae(plain[RESID])[4:])
    assert (record.features().counts[:4] == 0).all() and record.features().counts[4:].all()


@pytest.fixture
def transcoder(tiny, tmp_path):
    folder = trained(tmp_path / "transcoder", tiny, "blocks.3.mlp.hook_in", architecture="skip_transcoder")
    d = width(tiny, RESID)
    tensors = {name: np.array(array) for name, array in load_file(folder / "sae_weights.safetensors").items()}
    save_file(tensors | {"W_skip": 0.1 * numbers(d, d)}, folder / "sae_weights.safetensors")
    return Transcoder.load(folder)


def test_attach_a_transcoder(tiny, transcoder):
    names = [transcoder.site, transcoder.site_out]
    plain, cache = tiny.run_with_cache(TEXT, names)
    with tiny.attach(transcoder) as record:
        attached = tiny.forward(TEXT)
    assert np.abs(attached - plain).max() < 2e-5 * np.abs(plain).max()
    np.testing.assert_array_equal(record.features().dense(), transcoder.encode(cache).dense())
    with tiny.attach(transcoder, error=False):
        _, after = tiny.run_with_cache(TEXT, names)
    agrees(after[transcoder.site_out], transcoder(cache))
    np.testing.assert_array_equal(after[transcoder.site], cache[transcoder.site])
    agrees(transcoder.error(cache), cache[transcoder.site_out] - transcoder(cache))


def test_dictionaries_that_do_not_fit_the_model(tiny, tmp_path):
    d = width(tiny, RESID)
    narrow = SAE.load(saelens(tmp_path / "narrow", weights(n=32)))
    with pytest.raises(ValueError, match=rf"width {D}, but {RESID} of this model is \[T, {d}\]"):
        tiny.attach(narrow)
    with pytest.raises(ValueError, match=rf"width {D}, but"):
        tiny.edit([ClampFeature(narrow, 3, 1.0)])
    far = SAE.load(trained(tmp_path / "far", tiny), site="blocks.99.hook_resid_post")
    with pytest.raises(gemma4.SiteError, match="this model has 10 layers"):
        tiny.attach(far)
    trap = Transcoder.load(trained(tmp_path / "a", tiny, architecture="transcoder"), site="blocks.2.hook_mlp_in")
    with pytest.raises(ValueError, match="means different tensors"):
        tiny.attach(trap)
    unnamed = SAE.load(trained(tmp_path / "b", tiny, metadata={}))
    with pytest.raises(ValueError, match=r"do not name its site: load it with site="):
        tiny.attach(unnamed)
    mute = Transcoder.load(trained(tmp_path / "c", tiny, architecture="transcoder", metadata={"hook_name": RESID}))
    with pytest.raises(ValueError, match=r"load it with site_out="):
        tiny.attach(mute)
    back = trained(tmp_path / "d", tiny, "blocks.3.mlp.hook_in", architecture="transcoder")
    backwards = Transcoder.load(back, site_out="blocks.2.hook_mlp_out")
    with pytest.raises(ValueError, match=r"would write blocks.2.hook_mlp_out, which comes before blocks.3.mlp.hook_in"):
        tiny.attach(backwards)
    with pytest.raises(ValueError, match="comes before"):
        tiny.edit(ClampFeature(backwards, 3, 1.0))


# ---- edits of features ----------------------------------------------------------------------------------------------


def edited_by(dictionary, x, feature, new, pos):
    """Independent: the difference of two reconstructions, of all features with and without the change."""
    dense = dictionary.encode(x).dense().astype(np.float64)
    changed = dense.copy()
    changed[pos, feature] = new(dense[pos, feature])
    w = dictionary._weights
    rows = w.w_dec.astype(np.float64)
    if w.by_norm:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    factor = x.std(axis=1, ddof=1, keepdims=True) if w.norm == "layer_norm" else 1
    return (changed - dense) @ rows * factor


EDITS = {
    "clamp": (lambda s, f, **k: ClampFeature(s, f, 3.5, **k), lambda old: np.full_like(old, 3.5)),
    "scale": (lambda s, f, **k: ScaleFeature(s, f, -2, **k), lambda old: -2 * old),
    "ablate": (lambda s, f, **k: AblateFeature(s, f, **k), lambda old: 0 * old),
}


def busiest(dictionary, cache):
    ids, counts = np.unique(dictionary.encode(cache).ids, return_counts=True)
    return int(ids[np.argmin(np.abs(counts - len(cache.positions) / 2))])  # it fires at about half of the positions


@pytest.mark.parametrize("kind", EDITS)
def test_edits_of_a_feature(tiny, sae, kind):
    edit, new = EDITS[kind]
    _, cache = tiny.run_with_cache(TEXT, sae.site)
    x = cache[sae.site].reshape(len(cache.positions), -1)
    feature = busiest(sae, cache)
    fired = np.flatnonzero(sae.encode(cache).feature(feature))
    for pos in (ALL, [int(fired[-1]), int(fired[0])], -1):
        with tiny.edit([edit(sae, feature, pos=None if pos == ALL else pos)]):
            _, after = tiny.run_with_cache(TEXT, sae.site)
        change = edited_by(sae, x, feature, new, pos)
        assert np.abs(change).max() > 0.01 or pos == -1
        found = after[sae.site].reshape(x.shape)
        np.testing.assert_allclose(found, x + change, atol=1e-5 * np.abs(x).max())
        same = (change == 0).all(axis=1)
        np.testing.assert_array_equal(found[same], x[same])  # to the bit


@pytest.mark.parametrize("kind", EDITS)
def test_edits_of_a_transcoder(tiny, transcoder, kind):
    edit, new = EDITS[kind]
    site, out = transcoder.site, transcoder.site_out
    _, cache = tiny.run_with_cache(TEXT, [site, out])
    feature = busiest(transcoder, cache)
    with tiny.edit(edit(transcoder, feature)):
        _, after = tiny.run_with_cache(TEXT, [site, out])
    change = edited_by(transcoder, cache[site], feature, new, ALL)
    assert np.abs(change).max() > 0.01
    np.testing.assert_allclose(after[out], cache[out] + change, atol=1e-5 * np.abs(cache[out]).max())
    np.testing.assert_array_equal(after[site], cache[site])


def test_feature_edits_keep_their_scope(tiny, tmp_path):
    """Steps of a generation and prompts of a batch; beside other edits, in order."""
    sae = SAE.load(trained(tmp_path, tiny))
    _, plain = tiny.run_with_cache([TEXT, "Hello"], RESID)
    with tiny.edit([ClampFeature(sae, 5, 40.0, prompts=1)]):
        _, caches = tiny.run_with_cache([TEXT, "Hello"], RESID)
    np.testing.assert_array_equal(caches[0][RESID], plain[0][RESID])
    assert np.abs(caches[1][RESID] - plain[1][RESID]).max() > 1
    options = {"max_tokens": 3, "temperature": 0, "capture": RESID}
    before = tiny.generate(TEXT, **options).cache
    after = tiny.generate(TEXT, hooks=[ClampFeature(sae, 5, 40.0, steps=1)], **options).cache
    n = len(before.positions) - 2
    np.testing.assert_array_equal(after[RESID][:n], before[RESID][:n])
    assert np.abs(after[RESID][n] - before[RESID][n]).max() > 1
    with tiny.edit([Scale(RESID, 0.0), ClampFeature(sae, 5, 2.0)]):
        _, zeroed = tiny.run_with_cache(TEXT, RESID)
    old = sae.encode(np.zeros((1, width(tiny, RESID)), np.float32)).feature(5)
    agrees(zeroed[RESID][3], (2 - old[0]) * sae.direction(5))
    with pytest.raises(ValueError, match="position 99 cannot be edited"), tiny.edit([AblateFeature(sae, 5, pos=99)]):
        tiny.forward(TEXT)


def test_feature_edits_leave_positions_that_were_not_trained_on(tiny, tmp_path):
    """As `attach` does; named positions are edited."""
    sae = trained_from_position_4(tiny, tmp_path)
    _, plain = tiny.run_with_cache(TEXT, RESID)
    for edit, first in (
        (ClampFeature(sae, 5, 40.0), 4),
        (ClampFeature(sae, 5, 40.0, pos=slice(2, None)), 2),
        (ClampFeature(sae, 5, 40.0, pos=range(1, 9)), 1),
    ):
        with tiny.edit(edit):
            _, cache = tiny.run_with_cache(TEXT, RESID)
        changed = np.flatnonzero((cache[RESID] != plain[RESID]).any(axis=1))
        assert changed[0] == first and (np.diff(changed) == 1).all()


def test_bad_feature_edits(standard, tmp_path):
    with pytest.raises(IndexError, match="no feature 9000, the dictionary has 0 to 8999"):
        AblateFeature(standard, N)
    with pytest.raises(TypeError, match="a feature is an integer"):
        AblateFeature(standard, 1.5)
    with pytest.raises(TypeError, match="needs a dictionary"):
        ClampFeature("sae", 1, 2.0)
    with pytest.raises(ValueError, match="must be finite"):
        ClampFeature(standard, 1, float("nan"))


# ---- edits of features in files -------------------------------------------------------------------------------------


def test_saved_feature_edits(tiny, sae, transcoder, tmp_path):
    """They act as before, to the bit; those of one dictionary share it."""
    edits = [
        ClampFeature(sae, 5, 2.5, pos=slice(2, None)),
        ScaleFeature(sae, 7, -1.5, steps=[0]),
        AblateFeature(transcoder, 3, prompts=0),
    ]
    with tiny.edit(edits):
        expected = tiny.forward(TEXT)
    again = load_edits(save_edits(edits, tmp_path / "e.safetensors"))
    with tiny.edit(again):
        np.testing.assert_array_equal(tiny.forward(TEXT), expected)
    assert again[0].dictionary is again[1].dictionary is not sae
    assert (type(again[0].dictionary), type(again[2].dictionary)) == (SAE, Transcoder)
    for one, other in zip(edits, again, strict=True):
        assert str(one) == str(other) and (one.pos, one.steps, one.prompts) == (other.pos, other.steps, other.prompts)
        for name in ("site", "site_out", "fingerprint"):
            assert getattr(one.dictionary, name, None) == getattr(other.dictionary, name, None)


def test_a_site_given_to_load_is_saved(tmp_path):
    sae = SAE.load(saelens(tmp_path / "sae", weights(n=8)), site="model.layers.1.output")
    (again,) = load_edits(save_edits(AblateFeature(sae, 1), tmp_path / "e.safetensors"))
    assert again.dictionary.site == "blocks.1.hook_resid_post"


def test_saved_edits_of_dictionaries_that_moved(tmp_path):
    work = tmp_path / "work"
    sae = SAE.load(saelens(work / "dictionaries" / "sae", weights(n=8)))
    path = save_edits([AblateFeature(sae, 1), ScaleFeature(sae, 1, 2)], work / "e.safetensors")
    moved = tmp_path / "moved"
    work.rename(moved)  # both together
    assert load_edits(moved / "e.safetensors")[0].dictionary.path == moved / "dictionaries" / "sae"
    elsewhere = tmp_path / "elsewhere"
    (moved / "dictionaries" / "sae").rename(elsewhere)
    with pytest.raises(FileNotFoundError, match=r"edit 0: its dictionary .*sae is not there; .*dictionaries=\{'.*sae'"):
        load_edits(moved / "e.safetensors")
    (first, _) = load_edits(moved / path.name, dictionaries={str(sae.path): elsewhere})
    assert first.dictionary.fingerprint == sae.fingerprint


@pytest.mark.parametrize("change", ["weight", "bias", "configuration", "width", "format"])
def test_saved_edits_of_a_dictionary_that_changed(tmp_path, change):
    tensors = weights(n=8)
    folder = saelens(tmp_path / "sae", tensors)
    path = save_edits(AblateFeature(SAE.load(folder), 1), tmp_path / "e.safetensors")
    load_edits(path)
    if change == "weight":
        tensors["W_enc"][3, 3] += 1
    elif change == "bias":
        tensors["b_dec"][0] += 1
    elif change == "width":
        tensors = weights(n=9)
    saelens(folder, tensors, **({"architecture": "topk", "k": 3} if change == "configuration" else {}))
    if change == "format":
        (folder / "sae_weights.safetensors").unlink()
        sparsify(folder, weights(n=8), num_latents=8)
    with pytest.raises(
        FormatError, match=r"edit 0: .* is another dictionary than the saved one .*make the edits again"
    ):
        load_edits(path)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "sae",
        [],
        {},
        {"kind": "SAE"},
        {"kind": "Pickle"},
        {"path": 3},
        {"path": None},
        {"fingerprint": ["a"]},
        {"site_out": "hook_embed"},
        {"more": 1},
    ],
)
def test_hostile_names_of_dictionaries(tmp_path, entry):
    sae = SAE.load(saelens(tmp_path / "sae", weights(n=8)))
    good = SafetensorsFile(save_edits(AblateFeature(sae, 1), tmp_path / "e.safetensors"))
    rows = json.loads(good.metadata["edits"])
    named = rows[0]["dictionary"]["dictionary"]
    whole = not isinstance(entry, dict) or not entry or entry == {"kind": "SAE"}
    rows[0]["dictionary"]["dictionary"] = entry if whole else named | entry
    save_file({"x": numbers(1)}, tmp_path / "f.safetensors", good.metadata | {"edits": json.dumps(rows)})
    with pytest.raises(FormatError, match="edit 0: "):
        load_edits(tmp_path / "f.safetensors")


def test_edits_of_other_dictionaries_are_not_saved(tmp_path):
    class Own(SAE):
        pass

    sae = Own.load(saelens(tmp_path / "sae", weights(n=8)))
    with pytest.raises(TypeError, match="SAE, Transcoder, Crosscoder, CrossLayerTranscoder can be saved, got Own"):
        save_edits(AblateFeature(sae, 1), tmp_path / "e.safetensors")


# ---- files that shrink while they are read ---------------------------------------------------------------------------


READS = {
    "encode": lambda sae: sae.encode(X),
    "decode": lambda sae: sae.decode(join([], 32)),
    "direction": lambda sae: sae.direction(3),
    "values_of": lambda sae: sae.values_of(3, X),
    "add_feature": lambda sae: sae.add_feature(X.copy(), 3, np.ones(len(X), np.float32)),
    "fingerprint": lambda sae: sae.fingerprint,
}


@pytest.mark.skipif(os.name == "nt", reason="Windows does not shrink mapped files")
@pytest.mark.parametrize("name", [*READS, "load"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch, name):
    """Right after the check, reading begins: the zeros are never used."""
    folder = saelens(tmp_path, weights(n=32))
    sae = SAE.load(folder)
    check = SafetensorsFile.check

    def check_and_cut(file):
        check(file)
        os.truncate(file.path, 100)

    if name == "load":
        parse = SafetensorsFile._check_same

        def cut(file, when):
            parse(file, when)
            os.truncate(file.path, 8)

        monkeypatch.setattr(SafetensorsFile, "_check_same", cut)
    else:
        monkeypatch.setattr(SafetensorsFile, "check", check_and_cut)
    with pytest.raises(FormatError, match=r"changed size|lost a part"):
        READS[name](sae) if name in READS else SAE.load(folder)
