# SPDX-License-Identifier: Apache-2.0
"""The sites inside an attached dictionary: captured, read and edited by functions, under SAELens's names."""

import copy
import json
import pickle

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma4 import SAE, ActivationCache, Features, FormatError, NaNWarning, SiteError, Transcoder

TEXT = "Once upon a time there was a little girl named Lily"
RESID = "blocks.2.hook_resid_post"
ACTS, INPUT, RECONS, ERROR = (f"{RESID}.hook_sae_{part}" for part in ("acts_post", "input", "recons", "error"))
N = 80


def written(folder, model, site, out=None, **config):
    rng = np.random.default_rng(3)
    d, d_out = (int(np.prod(model.sites[name].dims[1:])) for name in (site, out or site))
    folder.mkdir()
    sizes = {"W_enc": (d, N), "W_dec": (N, d_out), "b_enc": (N,), "b_dec": (d_out,)}
    save_file(
        {k: rng.standard_normal(v, dtype=np.float32) / 8 for k, v in sizes.items()}, folder / "sae_weights.safetensors"
    )
    names = {"hook_name": site, "hook_name_out": out}
    (folder / "cfg.json").write_text(json.dumps({"d_in": d, "d_sae": N, "d_out": d_out, "metadata": names} | config))
    return folder


@pytest.fixture
def sae(tiny, tmp_path):
    with SAE.load(written(tmp_path / "sae", tiny, RESID, apply_b_dec_to_input=False)) as sae:
        yield sae


def test_captured(tiny, sae):
    plain, cache = tiny.run_with_cache(TEXT, RESID)
    with tiny.attach(sae):
        logits, inside = tiny.run_with_cache(TEXT, [RESID, ACTS, INPUT, RECONS, ERROR])
        _, same = tiny.run_with_cache(TEXT, f"{RESID}.*")
    x = cache[RESID]
    features = sae.encode(x)
    assert isinstance(inside.features[ACTS], Features) and list(inside) == [RESID] and not list(same)
    np.testing.assert_array_equal(inside[ACTS], features.dense())
    np.testing.assert_array_equal(inside.features[ACTS].offsets, features.offsets)
    np.testing.assert_array_equal(inside[INPUT], x)
    np.testing.assert_array_equal(inside[RECONS], sae.decode(features, x))
    np.testing.assert_array_equal(inside[ERROR], x - sae.decode(features, x))
    np.testing.assert_array_equal(inside[RESID], inside[RECONS] + inside[ERROR])
    assert np.abs(logits - plain).max() < 2e-5 * np.abs(plain).max()
    assert ACTS in inside and ACTS not in cache and set(same.features) == {ACTS}
    assert inside.nbytes > same.nbytes > inside.features[ACTS].nbytes
    assert f"{ACTS}: Features: {len(x)} positions" in repr(inside) and f"{RECONS}: {list(x.shape)}" in repr(inside)


def test_captured_positions_and_batches(tiny, sae):
    prompts = [TEXT, "The dog", "Lily likes to play"]
    with tiny.attach(sae):
        _, whole = tiny.run_with_cache(prompts, [ACTS, RESID])
        _, some = tiny.run_with_cache(prompts, ACTS, pos=[0, -1])
        _, last = tiny.run_with_cache(TEXT, ACTS, pos=-1)
    for one, two in zip(whole, some, strict=True):
        np.testing.assert_array_equal(two[ACTS], one[ACTS][[0, -1]])
    np.testing.assert_array_equal(last[ACTS], whole[0][ACTS][-1:])
    assert not np.array_equal(whole[0][ACTS][:3], whole[2][ACTS][:3])


def test_copies_keep_them(tiny, sae, tmp_path):
    with tiny.attach(sae):
        _, cache = tiny.run_with_cache(TEXT, [ACTS, RECONS, RESID])
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        np.testing.assert_array_equal(other[ACTS], cache[ACTS])
        np.testing.assert_array_equal(other[RECONS], cache[RECONS])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_saved_caches_keep_them(tiny, sae, tmp_path, dtype):
    with tiny.attach(sae):
        _, cache = tiny.run_with_cache(TEXT, [ACTS, RECONS, RESID])
        _, alone = tiny.run_with_cache(TEXT, ACTS, pos=[1, -1])
    loaded = ActivationCache.load(cache.save(tmp_path / "cache.safetensors", dtype=dtype))
    assert list(loaded) == [RESID] and set(loaded.features) == {ACTS} and loaded.features[ACTS].d_sae == N
    for part in ("offsets", "ids"):
        np.testing.assert_array_equal(getattr(loaded.features[ACTS], part), getattr(cache.features[ACTS], part))
    np.testing.assert_allclose(loaded[ACTS], cache[ACTS], rtol=2**-8 if dtype == "bf16" else 0)
    np.testing.assert_allclose(loaded[RECONS], cache[RECONS], rtol=2**-8 if dtype == "bf16" else 0)
    again = ActivationCache.load(loaded.save(tmp_path / "again.safetensors"))
    np.testing.assert_array_equal(again[ACTS], loaded[ACTS])
    few = ActivationCache.load(alone.save(tmp_path / "few.safetensors"))
    np.testing.assert_array_equal(few[ACTS], alone[ACTS])
    size = (tmp_path / "few.safetensors").stat().st_size
    assert few.features[ACTS].nbytes < 2 * N * 4 and not list(few) and size < cache.nbytes + 100_000


def damaged(change):
    return pytest.param(change, id=change.__name__)


def ids_too_large(tensors, meta):
    tensors[f"{ACTS}.ids"][-1] = N


def ids_negative(tensors, meta):
    tensors[f"{ACTS}.ids"][0] = -1


def ids_descending(tensors, meta):
    row = int(np.argmax(np.diff(tensors[f"{ACTS}.offsets"]) > 1))
    first = int(tensors[f"{ACTS}.offsets"][row])
    tensors[f"{ACTS}.ids"][first : first + 2] = tensors[f"{ACTS}.ids"][first : first + 2][::-1].copy()


def offsets_descending(tensors, meta):
    tensors[f"{ACTS}.offsets"][1] = -3


def offsets_beyond(tensors, meta):
    tensors[f"{ACTS}.offsets"][-1] += 1


def offsets_too_few(tensors, meta):
    tensors[f"{ACTS}.offsets"] = tensors[f"{ACTS}.offsets"][:-1].copy()


def values_too_few(tensors, meta):
    tensors[f"{ACTS}.values"] = tensors[f"{ACTS}.values"][:-1].copy()


def no_values(tensors, meta):
    del tensors[f"{ACTS}.values"]


def recons_of_another_width(tensors, meta):
    tensors[RECONS] = tensors[RECONS][:, :-1].copy()


def no_json(tensors, meta):
    meta["inside"] = "{"


def no_widths(tensors, meta):
    meta["inside"] = json.dumps({ACTS: "many", RECONS: 128})


def unnamed(tensors, meta):
    del meta["inside"]


@pytest.mark.parametrize(
    "change",
    [
        damaged(change)
        for change in (
            ids_too_large, ids_negative, ids_descending, offsets_descending, offsets_beyond, offsets_too_few,
            values_too_few, no_values, recons_of_another_width, no_json, no_widths, unnamed,
        )
    ],
)  # fmt: skip
def test_damaged_caches_of_dictionaries(tiny, sae, tmp_path, change):
    with tiny.attach(sae):
        _, cache = tiny.run_with_cache(TEXT, [ACTS, RECONS])
    file = cache.save(tmp_path / "cache.safetensors")
    with safe_open(file, "np") as opened:
        meta, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    change(tensors, meta)
    save_file(tensors, file, meta)
    with pytest.raises(FormatError, match=r"cache\.safetensors"):
        ActivationCache.load(file)


def test_captured_while_generating(tiny, sae):
    prompts = ["Once upon a time", "The dog"]
    with tiny.attach(sae):
        outs = tiny.generate(prompts, max_tokens=5, temperature=0, seed=0, capture=[ACTS, RECONS, RESID])
        only = tiny.generate(prompts[0], max_tokens=5, temperature=0, seed=0, capture=ACTS)
        _, whole = tiny.run_with_cache([out.cache.tokens for out in outs], [ACTS, RECONS])
    for out, expected in zip(outs, whole, strict=True):
        assert len(out.cache.features[ACTS]) == len(out.cache.positions) == len(expected.positions)
        np.testing.assert_allclose(out.cache[ACTS], expected[ACTS], atol=1e-4)
        np.testing.assert_allclose(out.cache[RECONS], expected[RECONS], atol=1e-4)
    np.testing.assert_array_equal(only.cache[ACTS], outs[0].cache[ACTS])
    assert not list(only.cache)
    with pytest.raises(SiteError, match="no dictionary is attached"):
        tiny.generate("Once", max_tokens=2, capture=ACTS)


def test_by_predicate_and_by_default(tiny, sae):
    with tiny.attach(sae):
        _, chosen = tiny.run_with_cache(TEXT, lambda name: name.endswith(("acts_post", "resid_mid")))
        _, default = tiny.run_with_cache(TEXT)
        _, alias = tiny.run_with_cache(TEXT, "model.layers.2.output.hook_sae_acts_post")
    assert set(chosen.features) == {ACTS} == set(alias.features) and len(chosen) == tiny.n_layers
    assert not default.features and len(default) > 50
    with tiny.attach(sae):
        _, both = tiny.run_with_cache(TEXT, "blocks.2.*resid_post*")
    assert list(both) == [RESID] and ACTS in both.features


def test_functions_read(tiny, sae):
    seen = {}

    def look(array, site):
        seen[site.name] = (array.copy(), site.layer, site.positions.copy())

    with tiny.attach(sae):
        expected = tiny.forward(TEXT)
        logits = tiny.run_with_hooks(TEXT, [(f"{RESID}.hook_sae_*", look)])
        _, cache = tiny.run_with_cache(TEXT, f"{RESID}.hook_sae_*")
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert set(seen) == {ACTS, INPUT, RECONS, ERROR}
    for name, (array, layer, positions) in seen.items():
        np.testing.assert_array_equal(array, cache[name])
        assert layer == 2 and array.dtype == np.float32
        np.testing.assert_array_equal(positions, cache.positions)


def test_functions_edit(tiny, sae):
    """As SAELens: the error is that of the unedited features."""
    _, plain = tiny.run_with_cache(TEXT, RESID)
    x, features = plain[RESID], sae.encode(plain[RESID])
    error = x - sae.decode(features, x)
    feature = int(features[3].ids[0])

    def clamp(acts, site):
        acts[:, feature] = 4

    def halved(array, site):
        return array / 2

    expected = features.dense()
    expected[:, feature] = 4
    changed = {
        ACTS: (clamp, expected @ np.float32(sae._weights.w_dec) + sae._weights.b_dec + error),
        INPUT: (halved, sae.decode(sae.encode(x / 2), x / 2) + error),
        RECONS: (halved, sae.decode(features, x) / 2 + error),
        ERROR: (halved, sae.decode(features, x) + error / 2),
    }
    for name, (fn, wanted) in changed.items():
        with tiny.attach(sae) as record, tiny.hooks([(name, fn)]):
            _, cache = tiny.run_with_cache(TEXT, [RESID, name])
        np.testing.assert_allclose(cache[RESID], wanted, atol=2e-5 * np.abs(wanted).max())
        assert not np.allclose(cache[RESID], x, atol=1e-2)
    assert record.features().d_sae == N
    with tiny.attach(sae) as record, tiny.hooks([(ACTS, clamp)]):
        _, cache = tiny.run_with_cache(TEXT, ACTS)
    np.testing.assert_array_equal(cache[ACTS], expected)  # after the edit
    np.testing.assert_array_equal(record.features().dense(), expected)


def test_functions_act_in_order(tiny, sae):
    def add(acts, site):
        acts[:, 0] += 1

    def double(acts, site):
        acts *= 2

    with tiny.attach(sae):
        _, plain = tiny.run_with_cache(TEXT, ACTS)
        with tiny.hooks([(ACTS, add)]), tiny.hooks([(ACTS, double)]):
            _, cache = tiny.run_with_cache(TEXT, ACTS)
    one = np.eye(1, N, dtype=np.float32)
    np.testing.assert_array_equal(cache[ACTS], 2 * (plain[ACTS] + one))


def test_without_the_error_term(tiny, sae):
    with tiny.attach(sae, error=False):
        _, cache = tiny.run_with_cache(TEXT, [RESID, RECONS])
        with pytest.raises(SiteError, match=f"closest: .*{RECONS}"):
            tiny.run_with_cache(TEXT, ERROR)
    np.testing.assert_array_equal(cache[RESID], cache[RECONS])


def test_while_generating(tiny, sae):
    seen = []

    def clamp(acts, site):
        seen.append(site.start)
        acts[:, 7] = 9

    with tiny.attach(sae) as record, tiny.hooks([(ACTS, clamp)]):
        tiny.generate("Once upon a time", max_tokens=4, temperature=0, seed=0)
    assert seen[0] == 0 and len(seen) >= 3 and (record.features().feature(7) == 9).all()


def test_a_transcoder(tiny, tmp_path):
    folder = written(tmp_path / "tc", tiny, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", architecture="transcoder")
    base = "blocks.1.mlp.hook_in.hook_sae_"
    with Transcoder.load(folder) as tc, tiny.attach(tc):
        _, cache = tiny.run_with_cache(TEXT, f"{base}*")
        _, plain = tiny.run_with_cache(TEXT, ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"])
        np.testing.assert_array_equal(cache[f"{base}recons"], tc(plain["blocks.1.mlp.hook_in"]))
        wanted = plain["blocks.1.hook_mlp_out"]
        np.testing.assert_allclose(
            cache[f"{base}recons"] + cache[f"{base}error"], wanted, atol=1e-5 * np.abs(wanted).max()
        )


def test_names_that_are_wrong(tiny, sae):
    def nothing(array, site):
        pass

    for name in (ACTS, f"{RESID}.hook_sae_*"):
        with pytest.raises(SiteError, match="no dictionary is attached"):
            tiny.run_with_cache(TEXT, name)
        with pytest.raises(SiteError, match="no dictionary is attached"):
            tiny.hooks([(name, nothing)])
    with tiny.attach(sae):
        for name in (f"{RESID}.hook_sae_acts", "blocks.3.hook_resid_post.hook_sae_acts_post", "x.hook_sae_y"):
            with pytest.raises(SiteError, match=f"no site '{name}'; closest: .*hook_sae"):
                tiny.run_with_cache(TEXT, name)
            with pytest.raises(SiteError, match=f"no site '{name}'; closest: .*hook_sae"):
                tiny.run_with_hooks(TEXT, [([name, ACTS], nothing)])
        with pytest.raises(SiteError, match="no site"):
            tiny.run_with_cache(TEXT, [ACTS, "blocks.2.hook_resid_pots"])
        with pytest.raises(TypeError, match="a site name is a string"):
            tiny.run_with_cache(TEXT, [ACTS, 3])
        with tiny.attach(sae), pytest.raises(SiteError, match="two dictionaries"):
            tiny.run_with_cache(TEXT, ACTS)


def test_functions_that_are_wrong(tiny, sae):
    with tiny.attach(sae):
        with pytest.raises(ValueError, match=r"hook_sae_acts_post returned shape \(1,\)"):
            tiny.run_with_hooks(TEXT, [(ACTS, lambda array, site: np.zeros(1))])
        with pytest.raises(ZeroDivisionError):
            tiny.run_with_hooks(TEXT, [(RECONS, lambda array, site: 1 // 0)])
        with pytest.warns(NaNWarning), pytest.raises(ValueError, match=r"hook_sae_acts_post, features are NaN"):
            tiny.run_with_hooks(TEXT, [(ACTS, lambda array, site: array * np.nan)])
        tiny.forward(TEXT)  # goes on


# ---- pre-activations: computed if they are named --------------------------------------------------------------------

PRE = f"{RESID}.hook_sae_acts_pre"


def test_pre_activations(tiny, sae):
    def look(array, site):
        seen[site.name] = array.copy()

    seen = {}
    _, cache = tiny.run_with_cache(TEXT, RESID)
    x, weights = cache[RESID], sae._weights
    expected = np.float64(x) @ np.float64(weights.w_enc) + weights.activation.b_enc
    with tiny.attach(sae), tiny.hooks([(PRE, look)]):
        _, inside = tiny.run_with_cache(TEXT, [PRE, ACTS])
        _, globbed = tiny.run_with_cache(TEXT, f"{RESID}.hook_sae_*")
        _, chosen = tiny.run_with_cache(TEXT, lambda name: "hook_sae" in name)
        out = tiny.generate(TEXT, max_tokens=3, temperature=0, seed=0, capture=PRE)
    np.testing.assert_allclose(inside[PRE], expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(np.maximum(inside[PRE], 0), inside[ACTS])  # to the bit
    np.testing.assert_array_equal(sae.pre_activations(cache), inside[PRE])
    assert PRE not in globbed and PRE not in chosen and set(seen) == {PRE}
    assert out.cache[PRE].shape == (len(out.cache.positions), N)
    with tiny.attach(sae), pytest.raises(SiteError, match=f"closest: .*{PRE}"):
        tiny.run_with_cache(TEXT, f"{PRE}s")


def test_pre_activations_are_read_only(tiny, sae):
    def change(array, site):
        array[0, 0] += 1

    for fn in (change, lambda array, site: array * 2):
        with (
            tiny.attach(sae),
            pytest.raises(ValueError, match="acts_pre, which can only be read: edit hook_sae_acts_post"),
        ):
            tiny.run_with_hooks(TEXT, [(PRE, fn)])


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "topk", "topk by norm"])
def test_pre_activations_of_every_kind(tiny, tmp_path, kind):
    """As SAELens: without threshold, gate, ranking by norms; of a gated one the magnitude."""
    folder = written(tmp_path / "sae", tiny, RESID, architecture=kind.split()[0], k=5)
    if "norm" in kind:
        cfg = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(cfg | {"rescale_acts_by_decoder_norm": True}))
    tensors, rng = load_file(folder / "sae_weights.safetensors"), np.random.default_rng(4)
    extra = ("r_mag", "b_mag", "b_gate") if kind == "gated" else ("threshold",)
    tensors |= {name: np.abs(rng.standard_normal(N, dtype=np.float32)) for name in extra}
    save_file(tensors, folder / "sae_weights.safetensors")
    x = rng.standard_normal((700, len(tensors["W_enc"])), dtype=np.float32)
    raw = (np.float64(x) - tensors["b_dec"]) @ np.float64(tensors["W_enc"])
    wanted = (
        raw * np.exp(np.float64(tensors["r_mag"])) + tensors["b_mag"] if kind == "gated" else raw + tensors["b_enc"]
    )
    with SAE.load(folder) as sae:
        found = sae.pre_activations(x)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
        if "norm" not in kind:
            dense = sae.encode(x).dense()
            np.testing.assert_array_equal(found[dense > 0], dense[dense > 0])
