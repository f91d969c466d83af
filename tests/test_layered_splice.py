# SPDX-License-Identifier: Apache-2.0
"""Crosscoders and cross-layer transcoders in the forward pass: attached, edited, and refused where they are not causal.

What must come out is computed here by functions on the model's sites, in float64.
"""

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_layered_dictionaries import expected, tensors, written

import gemma4
from gemma4 import Crosscoder, CrossLayerTranscoder, FormatError, SiteError
from gemma4.dictionaries import AblateFeature, ClampFeature, ScaleFeature
from gemma4.edits import load_edits, save_edits

TEXT = "Once upon a time there was a little girl named Lily"
CROSS_LAYERS = (1, 4, 8)


def causal_files(layers, d, affine=False, seed=0):
    """Small numbers, so that a few features fire; zeros towards earlier layers."""
    rng = np.random.default_rng(seed)
    files = tensors(rng, d=d, layers=layers, affine=affine)
    for i, one in enumerate(files):
        one["w_enc"] /= 8
        one["w_dec"][:, :i] = 0
        for name in ("w_dec", "affine_skip_connection", "b_dec"):
            if name in one:
                one[name] /= 30
    return files


def of_kind(kind, model, folder, **config):
    """(dictionary, its files): "crosscoder", "clt" or "affine clt" of this model."""
    d = model.config.d_model
    if kind == "crosscoder":
        files = causal_files(len(CROSS_LAYERS), d)
        name = f"layer_{'_'.join(map(str, CROSS_LAYERS))}_width_70"
        return Crosscoder.load(written(folder / "crosscoder" / name, files, **config)), files
    files = causal_files(model.n_layers, d, affine=kind == "affine clt")
    return CrossLayerTranscoder.load(written(folder / "clt" / "width_70", files, **config)), files


@pytest.fixture(params=["crosscoder", "clt", "affine clt"])
def layered(request, tiny, tmp_path):
    dictionary, files = of_kind(request.param, tiny, tmp_path)
    with dictionary:
        yield dictionary, files


def inner(dictionary, part):
    return [f"{site}.hook_sae_{part}" for site in dictionary.sites]


def close(found, wanted, tolerance=2e-5):
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def replacing(dictionary, files, change=lambda layer, acts: acts):
    """Hooks that put the reconstruction in place of each site, in float64."""
    x = {}

    def read(layer):
        def act(array, site):
            x[layer] = np.float64(array)

        return act

    def write(layer):
        def act(array, site):
            out = np.float64(files[layer]["b_dec"])
            if "affine_skip_connection" in files[layer]:
                out = out + x[layer] @ np.float64(files[layer]["affine_skip_connection"])
            for i in range(layer + 1):
                wide = {name: np.float64(part) for name, part in files[i].items()}
                pre = x[i] @ wide["w_enc"] + wide["b_enc"]
                out = out + change(i, np.where(pre > wide["threshold"], pre, 0)) @ wide["w_dec"][:, layer]
            return np.broadcast_to(out, array.shape)

        return act

    sites = [(site, read(i)) for i, site in enumerate(dictionary.sites)]
    return sites + [(site, write(i)) for i, site in enumerate(dictionary.sites_out)]


def test_attach_keeps_the_logits(tiny, layered):
    dictionary, _ = layered
    plain = tiny.forward(TEXT)
    with tiny.attach(dictionary) as record:
        attached = tiny.forward(TEXT)
    close(attached, plain)
    assert [len(features) for features in record.features()] == [len(plain)] * dictionary.n_layers
    assert min(len(features.ids) for features in record.features()) > 20
    np.testing.assert_array_equal(tiny.forward(TEXT), plain)
    assert repr(record).startswith("LayeredRecord: 1 passes of C") and "layer 1 of" in repr(record.layers[1])
    record.clear()
    assert not any(map(len, record.features()))


def test_encode_inside_is_encode_of_the_cache(tiny, layered):
    """To the bit: of each layer's own input in that pass."""
    dictionary, _ = layered
    with tiny.attach(dictionary) as record:
        _, cache = tiny.run_with_cache(TEXT, [*inner(dictionary, "*")])
    found = dictionary.encode([cache[name] for name in inner(dictionary, "input")])
    for layer, (features, acts) in enumerate(zip(found, inner(dictionary, "acts_post"), strict=True)):
        for other in (cache.features[acts], record.layers[layer].features()):
            for part in ("offsets", "ids", "values"):
                np.testing.assert_array_equal(getattr(other, part), getattr(features, part))
        np.testing.assert_array_equal(record.layers[layer].positions(), cache.positions)
    out = dictionary([cache[name] for name in inner(dictionary, "input")])
    for one, recons in zip(out, inner(dictionary, "recons"), strict=True):
        close(cache[recons], one)


def test_attach_replaces(tiny, layered):
    dictionary, files = layered
    plain = tiny.forward(TEXT)
    with tiny.attach(dictionary, error=False):
        logits, cache = tiny.run_with_cache(TEXT, [*dictionary.sites_out, *inner(dictionary, "*")])
        with pytest.raises(SiteError, match="no site"):
            tiny.run_with_cache(TEXT, inner(dictionary, "error")[0])
    x = [cache[name] for name in inner(dictionary, "input")]
    for one, site in zip(expected(files, x)[1], dictionary.sites_out, strict=True):
        close(cache[site], one)
    close(logits, tiny.run_with_hooks(TEXT, replacing(dictionary, files)))
    assert np.abs(logits - plain).max() > 0.01 * np.abs(plain).max()


def test_sites_inside(tiny, layered):
    """Their names, order and sums; what a later layer writes is in the recons of that layer."""
    dictionary, _ = layered
    names = [name for part in ("input", "acts_post", "recons", "error") for name in inner(dictionary, part)]
    with tiny.attach(dictionary):
        _, cache = tiny.run_with_cache(TEXT, [*dictionary.sites_out, *inner(dictionary, "*")])
        seen = []
        tiny.run_with_hooks(TEXT, [(inner(dictionary, "*"), lambda array, site: seen.append((site.name, site.layer)))])
    assert sorted(name for name, _ in seen) == sorted(names)
    order = [name for name, _ in seen if "acts_post" in name or "recons" in name]
    assert order == [f"{site}.hook_sae_{part}" for site in dictionary.sites for part in ("acts_post", "recons")]
    assert all(name.startswith(f"blocks.{layer}.") for name, layer in seen)
    for site, recons, error in zip(
        dictionary.sites_out, inner(dictionary, "recons"), inner(dictionary, "error"), strict=True
    ):
        np.testing.assert_array_equal(cache[site], cache[recons] + cache[error])


def test_pre_activations_inside(tiny, layered):
    dictionary, files = layered
    name = inner(dictionary, "acts_pre")[1]
    with tiny.attach(dictionary):
        _, cache = tiny.run_with_cache(TEXT, [name, inner(dictionary, "input")[1]])
        with pytest.raises(ValueError, match="can only be read"):
            tiny.run_with_hooks(TEXT, [(name, lambda array, site: array * 2)])
    x = np.float64(cache[inner(dictionary, "input")[1]])
    close(cache[name], x @ files[1]["w_enc"] + files[1]["b_enc"])


# ---- edits -----------------------------------------------------------------------------------------------------------

EDITS = {
    "clamp": (lambda d, f, **k: ClampFeature(d, f, 7.5, **k), lambda old: np.full_like(old, 7.5)),
    "scale": (lambda d, f, **k: ScaleFeature(d, f, -3, **k), lambda old: -3 * old),
    "ablate": (lambda d, f, **k: AblateFeature(d, f, **k), lambda old: 0 * old),
}


def busiest(dictionary, cache, layer):
    return int(np.bincount(dictionary.encode(cache)[layer].ids).argmax())


def adding(dictionary, files, layer, feature, new, pos):
    """Hooks that compute the feature and add the difference to every site that it writes to, in float64."""
    wide = {name: np.float64(array) for name, array in files[layer].items()}
    amount = {}

    def read(array, site):
        pre = np.float64(array) @ wide["w_enc"][:, feature] + wide["b_enc"][feature]
        old = np.where(pre > wide["threshold"][feature], pre, 0)
        amount[0] = np.zeros_like(old)
        amount[0][pos] = (new(old) - old)[pos]

    def write(to):
        return lambda array, site: array + np.outer(amount[0], wide["w_dec"][feature, to])

    later = range(layer, dictionary.n_layers)
    return [(dictionary.sites[layer], read), *((dictionary.sites_out[to], write(to)) for to in later)]


@pytest.mark.parametrize("kind", EDITS)
def test_edits_of_a_feature(tiny, layered, kind):
    dictionary, files = layered
    edit, new = EDITS[kind]
    plain, cache = tiny.run_with_cache(TEXT, dictionary.sites)
    for layer in (0, 1, dictionary.n_layers - 1):
        feature = busiest(dictionary, cache, layer)
        for pos in (None, -1, [3, 5]):
            found = tiny.run_with_hooks(TEXT, edit(dictionary, (layer, feature), pos=pos))
            hooks = adding(dictionary, files, layer, feature, new, slice(None) if pos is None else pos)
            close(found, tiny.run_with_hooks(TEXT, hooks))
            assert pos is not None or np.abs(found - plain).max() > 1e-3 * np.abs(plain).max()
            if pos == -1:
                np.testing.assert_array_equal(found[:-1], plain[:-1])


def test_an_edit_is_that_of_a_function_inside(tiny, layered):
    """A clamp on hook_sae_acts_post beside the error term, and the same clamp as data with nothing attached."""
    dictionary, files = layered
    acts = inner(dictionary, "acts_post")

    def clamp(array, site):
        array[:, 9] = 7.5

    with tiny.attach(dictionary) as record, tiny.hooks([(acts[1], clamp)]):
        attached, cache = tiny.run_with_cache(TEXT, [acts[1], dictionary.sites_out[-1]])
    edited, plain = (tiny.run_with_hooks(TEXT, edits) for edits in ([ClampFeature(dictionary, (1, 9), 7.5)], []))
    close(attached, edited)
    assert np.abs(attached - plain).max() > 0.01
    assert (record.layers[1].features().feature(9) == 7.5).all() and (cache[acts[1]][:, 9] == 7.5).all()

    def clamped(layer, found):
        if layer == 1:
            found[:, 9] = 7.5
        return found

    with tiny.attach(dictionary, error=False), tiny.hooks([(acts[1], clamp)]):
        replaced = tiny.forward(TEXT)
    close(replaced, tiny.run_with_hooks(TEXT, replacing(dictionary, files, clamped)))


def test_functions_edit_the_other_sites(tiny, layered):
    dictionary, files = layered
    with tiny.attach(dictionary):
        _, cache = tiny.run_with_cache(TEXT, inner(dictionary, "*"))
    x, recons, error = (cache[inner(dictionary, part)[0]] for part in ("input", "recons", "error"))
    first = expected([one | {"w_dec": one["w_dec"][:, :1]} for one in files[:1]], [x / 2])[1][0]
    wanted = {"input": first + error, "recons": recons / 2 + error, "error": recons + error / 2}
    for part, rows in wanted.items():
        name, out = inner(dictionary, part)[0], dictionary.sites_out[0]
        with tiny.attach(dictionary), tiny.hooks([(name, lambda array, site: array / 2)]):
            _, after = tiny.run_with_cache(TEXT, out)
        close(after[out], rows)


def test_errors_of_another_run(tiny, layered):
    """Functions set the error terms of the unedited run, so the dictionary alone carries the edit."""
    dictionary, files = layered
    errors, acts, plain = inner(dictionary, "error"), inner(dictionary, "acts_post"), tiny.forward(TEXT)
    with tiny.attach(dictionary):
        _, clean = tiny.run_with_cache(TEXT, errors)
    frozen = [(name, lambda array, site: clean[site.name]) for name in errors]

    def clamp(array, site):
        array[:, 9] = 7.5

    def clamped(layer, found):
        if layer == 0:
            found[:, 9] = 7.5
        return found

    with tiny.attach(dictionary), tiny.hooks(frozen):
        close(tiny.forward(TEXT), plain)
        logits = tiny.run_with_hooks(TEXT, [(acts[0], clamp)])
    added = [
        (site, lambda array, at, name=name: array + clean[name])
        for site, name in zip(dictionary.sites_out, errors, strict=True)
    ]
    by_hand = tiny.run_with_hooks(TEXT, [*replacing(dictionary, files, clamped), *added])
    close(logits, by_hand)
    assert np.abs(logits - tiny.run_with_hooks(TEXT, ClampFeature(dictionary, (0, 9), 7.5))).max() > 0.01


def test_skipped_positions_batches_and_generation(tiny, tmp_path):
    dictionary, _ = of_kind("affine clt", tiny, tmp_path, model_name="some-it")
    assert dictionary.skip_positions == 4
    prompts = [TEXT, "The dog and the cat ran"]
    plain = [tiny.run_with_cache(prompt, dictionary.sites_out)[1] for prompt in prompts]
    with tiny.attach(dictionary, error=False) as record:
        _, caches = tiny.run_with_cache(prompts, dictionary.sites_out)
    for number, (cache, before) in enumerate(zip(caches, plain, strict=True)):
        site = dictionary.sites_out[0]
        np.testing.assert_array_equal(cache[site][:4], before[site][:4])
        assert np.abs(cache[site][4:] - before[site][4:]).max() > 0.01
        assert not any(features.counts[:4].any() for features in record.features(number))
        with tiny.attach(dictionary, error=False):
            _, alone = tiny.run_with_cache(prompts[number], site)
        np.testing.assert_array_equal(alone[site], cache[site])
    acts = inner(dictionary, "acts_post")[2]
    options = {"max_tokens": 5, "temperature": 0, "capture": acts}
    with tiny.attach(dictionary) as record:
        found = tiny.generate(prompts, **options)
    for number, (one, other) in enumerate(zip(found, tiny.generate(prompts, max_tokens=5, temperature=0), strict=True)):
        assert one.text == other.text
        np.testing.assert_array_equal(one.cache[acts], record.layers[2].features(number).dense())
        np.testing.assert_array_equal(one.cache.positions, record.layers[9].positions(number))
    site, at = dictionary.sites_out[2], len(tiny.to_tokens(TEXT))
    edit = ClampFeature(dictionary, (2, 5), 50.0, steps=[1])
    caches = [tiny.generate(TEXT, max_tokens=3, temperature=0, capture=site, hooks=h).cache for h in ([], [edit])]
    changed = (caches[0][site][: at + 1] != caches[1][site][: at + 1]).any(axis=1)
    assert changed.tolist() == [False] * at + [True]


def test_runs_that_end_or_begin_between_the_layers(tiny, layered):
    dictionary, _ = layered
    cut = int(dictionary.sites[1].split(".")[1]) + 1  # after the second layer
    names = [*dictionary.sites_out[:2], *inner(dictionary, "acts_post")[:2]]
    with tiny.attach(dictionary) as record:
        _, whole = tiny.run_with_cache(TEXT, names)
        _, part = tiny.run_with_cache(TEXT, names, stop_at_layer=cut)
        _, chosen = tiny.run_with_cache(TEXT, "*.hook_sae_acts_post", stop_at_layer=cut)
        for name in names:
            np.testing.assert_array_equal(whole[name], part[name])
        assert set(chosen.features) == set(inner(dictionary, "acts_post")[:2])
        with pytest.raises(SiteError, match=f"acts_post' is not reached with stop_at_layer={cut}"):
            tiny.run_with_cache(TEXT, inner(dictionary, "acts_post")[2], stop_at_layer=cut)
        with pytest.raises(SiteError, match="is not reached with stop_at_layer=0"):
            tiny.run_with_cache(TEXT, "hook_embed", stop_at_layer=0)
        with pytest.raises(SiteError, match=f"is not reached with start_at_layer={cut}"):
            tiny.run_from(np.zeros((5, tiny.config.d_model), np.float32), layer=cut, ids=[2, 3, 4, 5, 6])
    assert len(record.layers[0].passes) == 3 and len(record.layers[2].passes) == 1
    with tiny.edit(ClampFeature(dictionary, (0, 5), 9.0)):
        _, part = tiny.run_with_cache(TEXT, dictionary.sites_out[1], stop_at_layer=cut)
        _, whole = tiny.run_with_cache(TEXT, dictionary.sites_out[1])
    np.testing.assert_array_equal(part[dictionary.sites_out[1]], whole[dictionary.sites_out[1]])
    with tiny.edit(ClampFeature(dictionary, (2, 5), 9.0)), pytest.raises(SiteError, match="is not reached with stop"):
        tiny.run_with_cache(TEXT, "hook_embed", stop_at_layer=cut)


def test_saved_edits(tiny, layered, tmp_path):
    dictionary, files = layered
    edits = [ClampFeature(dictionary, (1, 5), 7.0), AblateFeature(dictionary, (0, 3), pos=[1, 2])]
    path = save_edits(edits, tmp_path / "edits.safetensors")
    loaded = load_edits(path)
    assert loaded[0].feature == (1, 5) and loaded[0].dictionary is loaded[1].dictionary
    assert loaded[0].dictionary.sites == dictionary.sites and type(loaded[0].dictionary) is type(dictionary)
    np.testing.assert_array_equal(tiny.run_with_hooks(TEXT, loaded), tiny.run_with_hooks(TEXT, edits))
    files[1]["w_dec"][0] += 1
    written(tmp_path / "other", files)
    with pytest.raises(FormatError, match="is another dictionary than the saved one"):
        load_edits(path, dictionaries={str(dictionary.path.absolute()): tmp_path / "other"})


# ---- what one forward pass cannot compute ----------------------------------------------------------------------------


def test_dictionaries_that_are_not_causal(tiny, tmp_path):
    """Features of a later layer write to an earlier one."""
    files = causal_files(3, tiny.config.d_model)
    files[2]["w_dec"][:, 0] = 0.1
    crosscoder = Crosscoder.load(written(tmp_path / "crosscoder" / "layer_1_4_8_width_70", files))
    message = (
        r"not causal: feature 0 of layer 2 reads blocks\.8\.hook_resid_post and writes to blocks\.1\.hook_resid_post, "
        "which the forward pass computes before it"
    )
    with pytest.raises(ValueError, match=message):
        tiny.attach(crosscoder)
    with pytest.raises(ValueError, match=message):
        tiny.edit(ClampFeature(crosscoder, (2, 0), 1.0))
    with tiny.edit(ClampFeature(crosscoder, (1, 0), 1.0)):  # features of causal layers can be edited
        tiny.forward(TEXT)
    _, cache = tiny.run_with_cache(TEXT, crosscoder.sites)
    close(np.stack(crosscoder(cache)), np.stack(expected(files, [cache[site] for site in crosscoder.sites])[1]))


def test_a_single_feature_that_is_not_causal(tiny, tmp_path):
    """It is found when it fires, if not before; nothing of it is dropped silently."""
    files = causal_files(3, tiny.config.d_model)
    n = 640
    for one in files:
        one["w_enc"] = np.resize(one["w_enc"].T, (n, tiny.config.d_model)).T.copy()
        one["w_dec"] = np.resize(one["w_dec"], (n, 3, tiny.config.d_model))
        one["b_enc"], one["threshold"] = np.zeros(n, np.float32), np.full(n, 1e9, np.float32)
    rare = 123
    files[1]["w_dec"][rare, 0, 7] = 1e-3
    folder = written(tmp_path / "crosscoder" / "layer_1_4_8_width_640", files)
    with Crosscoder.load(folder) as quiet, tiny.attach(quiet):
        tiny.forward(TEXT)  # it does not fire
    files[1]["threshold"][rare] = 0
    save_file(files[1], folder / "params_layer_1.safetensors")
    with (
        Crosscoder.load(folder) as loud,
        tiny.attach(loud),
        pytest.raises(ValueError, match=r"not causal: a feature of layer 1 reads blocks\.4"),
    ):
        tiny.forward(TEXT)


def test_sites_in_another_order(tiny, tmp_path):
    """Weakly causal is what counts, not the numbers of layers: layer 0 may read what comes last, if it writes there."""
    d = tiny.config.d_model
    sites = [f"blocks.{i}.hook_resid_post" for i in (8, 4, 1)]
    files = causal_files(3, d)
    folder = written(tmp_path / "reversed", files)
    with (
        Crosscoder.load(folder, sites=sites) as crosscoder,
        pytest.raises(ValueError, match=r"of layer 0 reads blocks\.8.* writes to blocks\.4"),
    ):
        tiny.attach(crosscoder)
    for i, one in enumerate(files):
        one["w_dec"] = np.where(np.arange(3)[None, :, None] <= i, np.float32(0.02), np.float32(0))
        one["w_dec"] = np.broadcast_to(one["w_dec"], (70, 3, d)).copy()
    plain = tiny.forward(TEXT)
    with Crosscoder.load(written(tmp_path / "reversed", files), sites=sites) as crosscoder, tiny.attach(crosscoder):
        close(tiny.forward(TEXT), plain)
        assert list(tiny.run_with_cache(TEXT, "*.hook_sae_recons")[1].keys()) == []


def test_skip_connections_that_are_not_causal(tiny, tmp_path):
    files = causal_files(2, tiny.config.d_model, affine=True)
    names = ["blocks.1.mlp.hook_in", "blocks.5.mlp.hook_in"]
    outs = ["blocks.3.hook_mlp_out", "blocks.4.hook_mlp_out"]
    files[1]["w_dec"][:] = 0
    folder = written(tmp_path / "one", files)
    with (
        CrossLayerTranscoder.load(folder, sites=names, sites_out=outs) as clt,
        pytest.raises(ValueError, match=r"the skip connection of layer 1 reads blocks\.5\.mlp.* writes to blocks\.4"),
    ):
        tiny.attach(clt)
    for one in files:
        del one["affine_skip_connection"]
    with CrossLayerTranscoder.load(written(tmp_path / "two", files), sites=names, sites_out=outs) as clt:
        plain = tiny.forward(TEXT)
        with tiny.attach(clt):  # its features write nothing: bias alone
            close(tiny.forward(TEXT), plain)


@pytest.mark.parametrize("variant", ["random_e", "random_moe"])
@pytest.mark.parametrize("kind", ["clt", "affine clt"])
def test_attach_to_other_models(request, tmp_path, variant, kind, prompt):
    model = request.getfixturevalue(variant)
    plain = model.forward(prompt)
    dictionary, files = of_kind(kind, model, tmp_path)
    with dictionary, model.attach(dictionary) as record:
        close(model.forward(prompt), plain)
        assert min(len(features.ids) for features in record.features()) > 5
    with CrossLayerTranscoder.load(dictionary.path) as again:
        with model.attach(again, error=False):
            replaced = model.forward(prompt)
        close(replaced, model.run_with_hooks(prompt, replacing(again, files)), 1e-4)


def test_bad_input(tiny, tmp_path):
    crosscoder, files = of_kind("crosscoder", tiny, tmp_path)
    with pytest.raises(TypeError, match=r"is a pair \(layer, feature\), got 5"):
        ClampFeature(crosscoder, 5, 1.0)
    with pytest.raises(IndexError, match="no layer 3, the dictionary has 0 to 2"):
        AblateFeature(crosscoder, (3, 5))
    with pytest.raises(IndexError, match="no feature 70"):
        AblateFeature(crosscoder, (2, 70))
    with pytest.raises(TypeError, match=r"SAE.*CrossLayerTranscoder can be attached, got str"):
        tiny.attach("folder")
    with gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post") as sae, pytest.raises(TypeError, match="is an integer"):
        AblateFeature(sae, (0, 5))
    folder = written(tmp_path / "any", files)
    resid = [f"blocks.{i}.hook_resid_post" for i in range(3)]
    cases = [
        ({}, ValueError, "do not name its site: load it with sites="),
        ({"sites": [*resid[:2], "blocks.99.hook_resid_post"]}, SiteError, "this model has 10 layers"),
        ({"sites": [*resid[:2], "blocks.2.attn.hook_k"]}, ValueError, "has width 128, but blocks.2.attn.hook_k"),
        ({"sites": [*resid[:2], resid[1]]}, ValueError, r"blocks.1.hook_resid_post twice in its sites"),
        ({"sites": resid, "sites_out": resid[:1] * 3}, ValueError, "twice in its sites_out"),
        ({"sites": [*resid[:2], "blocks.2.hook_mlp_in"]}, ValueError, "means different tensors"),
    ]
    for options, error, message in cases:
        with Crosscoder.load(folder, **options) as one:
            for use in (tiny.attach, lambda one: tiny.edit(AblateFeature(one, (0, 1)))):
                with pytest.raises(error, match=message):
                    use(one)
    files[0]["w_dec"][4] = 0
    with (
        Crosscoder.load(written(tmp_path / "none", files), sites=resid) as one,
        pytest.raises(ValueError, match=r"AblateFeature\(\(0, 4\)\): this feature .* writes nothing"),
    ):
        tiny.edit(AblateFeature(one, (0, 4)))
    with tiny.attach(crosscoder), pytest.raises(ZeroDivisionError):
        tiny.run_with_hooks(TEXT, [(inner(crosscoder, "recons")[1], lambda array, site: 1 // 0)])
    with tiny.attach(crosscoder), tiny.attach(crosscoder), pytest.raises(SiteError, match="two dictionaries"):
        tiny.run_with_cache(TEXT, inner(crosscoder, "recons")[1])
    one = crosscoder.encode_layer(0, np.zeros((2, 128), np.float32))
    for call, error in (
        (lambda: crosscoder.encode_layer(3, np.zeros((2, 128))), IndexError),
        (lambda: crosscoder.encode_layer(0, np.zeros((2, 5))), ValueError),
        (lambda: crosscoder.written_by(-1, one), IndexError),
        (lambda: crosscoder.skipped(0, np.full((2, 128), np.nan)), ValueError),
    ):
        with pytest.raises(error):
            call()
    assert not crosscoder.has_skip(0) and not crosscoder.skipped(0, np.ones((2, 128))).any()
