# SPDX-License-Identifier: Apache-2.0
"""Crosscoders and cross-layer transcoders in files written here; results by their formula in float64."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import gemma4
from gemma4 import SAE, Crosscoder, CrossLayerTranscoder, FormatError, StateError
from gemma4.load.safetensors import SafetensorsFile

D, N, LAYERS, POS = 16, 70, 3, 6


def tensors(rng, d=D, n=N, layers=LAYERS, affine=False):
    def numbers(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    return [
        {
            "w_enc": numbers(d, n),
            "w_dec": numbers(n, layers, d),
            "b_enc": numbers(n),
            "threshold": np.abs(numbers(n)) * 3,
            "b_dec": numbers(d),
        }
        | ({"affine_skip_connection": numbers(d, d)} if affine else {})
        for _ in range(layers)
    ]


def written(folder, files, **config):
    folder.mkdir(parents=True, exist_ok=True)
    for layer, one in enumerate(files):
        save_file(one, folder / f"params_layer_{layer}.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu"} | config))
    return folder


def expected(files, x):
    """Dense activations [layer, pos, n] and reconstructions [layer, pos, d], in float64."""
    wide = [{name: np.float64(array) for name, array in one.items()} for one in files]
    acts = []
    for w, part in zip(wide, x, strict=True):
        pre = np.float64(part) @ w["w_enc"] + w["b_enc"]
        acts.append(np.where(pre > w["threshold"], pre, 0))
    out = [sum(acts[i] @ wide[i]["w_dec"][:, layer] for i in range(len(files))) for layer in range(len(files))]
    out = [one + w["b_dec"] for one, w in zip(out, wide, strict=True)]
    skips = [w.get("affine_skip_connection") for w in wide]
    return acts, [one if a is None else one + np.float64(p) @ a for one, a, p in zip(out, skips, x, strict=True)]


def agrees(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("layers", [1, 3, 26])
@pytest.mark.parametrize("kind", [Crosscoder, CrossLayerTranscoder])
@pytest.mark.parametrize("affine", [False, True])
def test_formula(tmp_path, kind, affine, layers):
    """Of every layer, also the last one and those from the tenth on."""
    rng = np.random.default_rng(layers)
    files = tensors(rng, layers=layers, affine=affine)
    x = rng.standard_normal((layers, POS, D)).astype(np.float32)
    acts, out = expected(files, x)
    with kind.load(written(tmp_path / "one", files)) as dictionary:
        assert (dictionary.n_layers, dictionary.d_in, dictionary.d_sae, dictionary.d_out) == (layers, D, N, D)
        features = dictionary.encode(list(x))
        assert len(features) == layers and sum(len(one.ids) for one in features) > 20
        for layer in range(layers):
            agrees(features[layer].dense(), acts[layer])
        for found in (dictionary.decode(features, x), dictionary(x)):
            assert len(found) == layers
            for layer in range(layers):
                agrees(found[layer], out[layer])
        target = rng.standard_normal(x.shape).astype(np.float32)
        agrees(np.stack(dictionary.error(x, target)), target - np.stack(out))
        agrees(dictionary.direction(layers - 1, 5), files[-1]["w_dec"][5])
        if kind is Crosscoder:
            agrees(np.stack(dictionary.error(x)), x - np.stack(out))


def test_other_types(tmp_path):
    rng = np.random.default_rng(0)
    files = [{k: v.astype(ml_dtypes.bfloat16) for k, v in one.items()} for one in tensors(rng)]
    x = rng.standard_normal((LAYERS, POS, D)).astype(np.float32)
    with Crosscoder.load(written(tmp_path / "one", files)) as dictionary:
        agrees(np.stack(dictionary(x)), np.stack(expected(files, x)[1]))


def width_of(model, site):
    return model.sites[site].dims[1]


@pytest.mark.parametrize("form", ["list", "one", "name"])
def test_crosscoder_of_a_cache(tiny, tmp_path, form):
    """The sites come from the configuration, a list or one for all, or from the folder's name."""
    rng = np.random.default_rng(1)
    d = tiny.config.d_model
    files = tensors(rng, d=d)
    hooks = {"list": [f"model.layers.{i}.output" for i in (1, 4, 8)], "one": "model.layers.1.output"}
    config = {"hf_hook_point_in": hooks[form], "hf_hook_point_out": hooks[form]} if form in hooks else {}
    folder = tmp_path / "crosscoder" / ("layer_1_4_8_width_70_l0_small" if form != "list" else "any")
    with Crosscoder.load(written(folder, files, **config)) as crosscoder:
        assert crosscoder.sites == crosscoder.sites_out == tuple(f"blocks.{i}.hook_resid_post" for i in (1, 4, 8))
        _, cache = tiny.run_with_cache("Once upon a time", crosscoder.sites)
        x = [cache[site] for site in crosscoder.sites]
        acts, out = expected(files, x)
        agrees(np.stack(crosscoder(cache)), np.stack(out))
        agrees(np.stack(crosscoder.error(cache)), np.stack(x) - np.stack(out))
        agrees(np.stack([one.dense() for one in crosscoder.encode(cache)]), np.stack(acts))


@pytest.mark.parametrize("stated", [True, False])
def test_transcoder_of_a_cache(tiny, tmp_path, stated):
    """It reads after the norm's gain. An -it model's first four positions get no features, but skip connections."""
    rng = np.random.default_rng(2)
    n = tiny.n_layers
    files = tensors(rng, d=tiny.config.d_model, layers=n, affine=True)
    hooks = [
        [f"model.layers.{i}.{name}.output" for i in range(n)]
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    ]
    config = {"hf_hook_point_in": hooks[0], "hf_hook_point_out": hooks[1], "type": "clt"} if stated else {}
    folder = written(tmp_path / "clt" / "width_1k_l0_small", files, **config, model_name="google/gemma-3-1b-it")
    with CrossLayerTranscoder.load(folder) as clt:
        assert clt.sites == tuple(f"blocks.{i}.mlp.hook_in" for i in range(n))
        assert clt.sites_out == tuple(f"blocks.{i}.hook_mlp_out" for i in range(n)) and clt.skip_positions == 4
        _, cache = tiny.run_with_cache("Once upon a time there was a girl", [*clt.sites, *clt.sites_out])
        acts, out = expected(files, [cache[site] for site in clt.sites])
        for layer, features in enumerate(clt.encode(cache)):
            assert not features.counts[:4].any()
            agrees(features.dense()[4:], acts[layer][4:])
        agrees(clt(cache)[n - 1][4:], out[n - 1][4:])
        agrees(clt.error(cache)[0][4:], cache[clt.sites_out[0]][4:] - out[0][4:])


def test_sites_given_to_load(tmp_path):
    folder = written(tmp_path / "any", tensors(np.random.default_rng(3)))
    given = [f"model.layers.{i}.output" for i in (2, 3, 5)]
    assert Crosscoder.load(folder).sites is None
    assert Crosscoder.load(folder, sites=given).sites_out == tuple(f"blocks.{i}.hook_resid_post" for i in (2, 3, 5))
    with pytest.raises(ValueError, match="3 layers, but 1 sites"):
        Crosscoder.load(folder, sites=given[:1])
    other = Crosscoder.load(folder, sites=given, sites_out=["hook_embed"] * 3)
    assert other.sites_out == ("hook_embed",) * 3


def test_hook_points_of_the_files_are_trusted(tmp_path):
    folder = tmp_path / "crosscoder" / "layer_2_3_5_width_70"
    hooks = {"hf_hook_point_in": "model.layers.2.self_attn.o_proj.input", "hf_hook_point_out": "model.layers.2.output"}
    crosscoder = Crosscoder.load(written(folder, tensors(np.random.default_rng(8)), **hooks))
    assert crosscoder.sites == tuple(f"blocks.{i}.attn.hook_z" for i in (2, 3, 5))
    assert crosscoder.sites_out == tuple(f"blocks.{i}.hook_resid_post" for i in (2, 3, 5))


def damage(name):
    def remove_middle(folder):
        (folder / "params_layer_1.safetensors").unlink()

    def remove_first(folder):
        (folder / "params_layer_0.safetensors").unlink()

    def remove_last(folder):
        (folder / "params_layer_2.safetensors").unlink()

    def truncate(folder):
        file = folder / "params_layer_2.safetensors"
        file.write_bytes(file.read_bytes()[:-5])

    def change(**arrays):
        def apply(folder):
            files = tensors(np.random.default_rng(4))
            files[2] |= arrays
            written(folder, files)

        return apply

    return {
        "middle": (remove_middle, FormatError, r"of these layers: 0, 2; expected all from 0 on"),
        "first": (remove_first, FormatError, r"of these layers: 1, 2; expected"),
        "last": (remove_last, FormatError, r"w_dec has shape \[70, 3, 16\], expected \[any, 2, any\]"),
        "truncated": (truncate, FormatError, "params_layer_2"),
        "width": (change(w_enc=np.zeros((D, N + 1), np.float32)), FormatError, r"w_enc has shape \[16, 71\]"),
        "rank": (change(w_dec=np.zeros((N, D), np.float32)), FormatError, r"w_dec has shape \[70, 16\]"),
        "threshold": (change(threshold=np.full(N, np.nan, np.float32)), FormatError, r"threshold\[0\] is nan"),
        "type": (change(b_dec=np.zeros(D, np.int32)), FormatError, "b_dec is <i4"),
    }[name]


@pytest.mark.parametrize("name", ["middle", "first", "last", "truncated", "width", "rank", "threshold", "type"])
def test_damaged(tmp_path, name):
    folder = written(tmp_path / "one", tensors(np.random.default_rng(4)))
    Crosscoder.load(folder).close()
    act, error, message = damage(name)
    act(folder)
    with pytest.raises(error, match=message):
        Crosscoder.load(folder)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"architecture": "topk"}, NotImplementedError, "'topk' is not read"),
        ({"hf_hook_point_in": 3}, FormatError, "hf_hook_point_in is 3"),
        ({"hf_hook_point_in": [1, 2, 3]}, FormatError, "expected hook points' names"),
        ({"hf_hook_point_in": ["model.layers.1.output"]}, ValueError, "3 layers, but 1 sites"),
        ({"hf_hook_point_in": "model.norm.output"}, FormatError, "a place inside a block"),
        ({"type": "clt"}, ValueError, r"open it with gemma4\.CrossLayerTranscoder\.load"),
    ],
)
def test_hostile_configurations(tmp_path, config, error, message):
    folder = written(tmp_path / "one", tensors(np.random.default_rng(5)), **config)
    with pytest.raises(error, match=message):
        Crosscoder.load(folder)


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        CrossLayerTranscoder.load(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="these layers: none"):
        CrossLayerTranscoder.load(tmp_path)
    folder = written(tmp_path / "crosscoder" / "layer_0_1_2_width_70", tensors(np.random.default_rng(6)))
    with pytest.raises(ValueError, match=r"of the kind crosscoder: open it with gemma4\.Crosscoder\.load"):
        CrossLayerTranscoder.load(folder)
    with pytest.raises(ValueError, match=r"several layers: open it with gemma4\.Crosscoder\.load"):
        SAE.load(folder)


def test_wrong_calls(tmp_path):
    rng = np.random.default_rng(7)
    folder = written(tmp_path / "one", tensors(rng, affine=True))
    x = rng.standard_normal((LAYERS, POS, D)).astype(np.float32)
    clt = CrossLayerTranscoder.load(folder)
    features = clt.encode(x)
    calls = [
        (lambda: clt.encode(x[:2]), ValueError, "has 3 layers, got activations of 2"),
        (lambda: clt.encode([x[0], x[1], x[2][:3]]), ValueError, "other numbers of positions"),
        (lambda: clt.encode(x[:, :, :5]), ValueError, "layer 0 has sites"),
        (lambda: clt.encode(x * np.nan), ValueError, "NaN"),
        (lambda: clt.decode(features), ValueError, "needs the input besides"),
        (lambda: clt.decode(features[:2], x), ValueError, "got features of 2"),
        (lambda: clt.decode(features, x[:, :2]), ValueError, "features of 6 positions, but x has 2"),
        (lambda: clt.decode([*features[:2], features[2][:1]], x), ValueError, "layer 2: 1 positions"),
        (lambda: clt.error(x), ValueError, "needs the outputs besides"),
        (lambda: clt.error(x, x[:, :2]), ValueError, "but target has 2"),
        (lambda: clt.direction(3, 0), IndexError, "no layer 3"),
        (lambda: clt.direction(0, N), IndexError, f"no feature {N}"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    assert repr(clt) == "CrossLayerTranscoder(Gemma Scope 2, 3 layers, 16 -> 70 -> 3 x 16)"
    clt.close()
    with pytest.raises(StateError, match="closed"):
        clt.encode(x)


def test_public_names():
    assert {"Crosscoder", "CrossLayerTranscoder"} <= set(gemma4.__all__) & set(gemma4.dictionaries.__all__)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not shrink mapped files")
@pytest.mark.parametrize("name", ["encode", "decode", "direction"])
def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch, name):
    rng = np.random.default_rng(8)
    clt = CrossLayerTranscoder.load(written(tmp_path, tensors(rng)))
    x = rng.standard_normal((LAYERS, POS, D)).astype(np.float32)
    arguments = {"encode": (x,), "decode": (clt.encode(x),), "direction": (1, 3)}[name]
    check, last = SafetensorsFile.check, 1 if name == "direction" else LAYERS - 1  # the last one that it reads

    def check_and_cut(file):
        check(file)
        if file.path.name == f"params_layer_{last}.safetensors":  # all were found to be the same
            os.truncate(tmp_path / "params_layer_1.safetensors", 100)

    monkeypatch.setattr(SafetensorsFile, "check", check_and_cut)
    with pytest.raises(FormatError, match=r"changed size|lost a part"):
        getattr(clt, name)(*arguments)
