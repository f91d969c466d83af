# SPDX-License-Identifier: Apache-2.0
"""run_with_cache, hooks, and the arithmetic of the residual stream.

That the values are those of the reference implementation is for tests/reference to show.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4 import NaNWarning, SiteError
from gemma4.edits import Ablate, Patch, load_edits, save_edits
from gemma4.interp.lens import final_norm, logit_lens

BIG = ("hook_attn_scores", "hook_pattern", "hook_result", "hook_logits", "hook_logits_raw")


@pytest.fixture(scope="module")
def long_e(tmp_path_factory):
    """Room for prompts of more than one chunk."""
    config = E_LIKE | {"max_position_embeddings": 1024}
    return gemma4.load(write_checkpoint(tmp_path_factory.mktemp("long"), config))


def test_default_names_leave_out_what_grows(random_e, prompt):
    logits, cache = random_e.run_with_cache(prompt)
    assert logits.shape == (12, 320)
    assert not [name for name in cache if name.endswith(BIG)]
    assert set(random_e.sites) - set(cache) == {name for name in random_e.sites if name.endswith(BIG)}


def test_star_is_everything(random_e, prompt):
    logits, cache = random_e.run_with_cache(prompt, "*")
    assert list(cache) == list(random_e.sites)
    np.testing.assert_array_equal(cache["hook_logits"], logits)


def test_shapes_and_dtypes(random_moe, prompt):
    _, cache = random_moe.run_with_cache(prompt, "*")
    for name, array in cache.items():
        site = random_moe.sites[name]
        assert array.shape == site.shape(12, 12), name
        assert array.dtype == (np.int32 if name.endswith("hook_expert_ids") else np.float32), name
        assert array.flags.owndata and array.flags.c_contiguous, name
    assert cache["blocks.0.attn.hook_pattern"].shape == (4, 12, 12)
    assert cache["blocks.0.moe.hook_expert_ids"].shape == (12, 2)


def test_name_filters_agree(random_e, prompt):
    wanted = [f"blocks.{i}.hook_resid_post" for i in range(6)]
    for names in (
        "blocks.*.hook_resid_post",
        wanted,
        lambda name: name.endswith("hook_resid_post"),
        [f"model.layers.{i}.output" for i in range(6)],
        [f"blocks.{i}.hook_out" for i in range(6)],
    ):
        _, cache = random_e.run_with_cache(prompt, names)
        assert list(cache) == wanted
    _, cache = random_e.run_with_cache(prompt, [])
    assert len(cache) == 0


def test_aliases_reach_the_same_array(random_e, prompt):
    _, cache = random_e.run_with_cache(prompt, "blocks.3.mlp.hook_in")
    ours = cache["blocks.3.mlp.hook_in"]
    for alias in (
        "blocks.3.ln2.hook_out",
        "model.layers.3.pre_feedforward_layernorm.output",
        "model.language_model.layers.3.pre_feedforward_layernorm.output",
    ):
        assert cache[alias] is ours and alias in cache
    assert cache["mlp.hook_in", 3] is ours


@pytest.mark.parametrize("pos", [3, -1, slice(4, 9), [0, 5, 11], [11, 2]])
def test_position_filter(random_e, prompt, pos):
    _, full = random_e.run_with_cache(prompt, "*")
    _, some = random_e.run_with_cache(prompt, "*", pos=pos)
    rows = np.unique(np.atleast_1d(np.arange(12)[pos]))
    np.testing.assert_array_equal(some.positions, rows)
    np.testing.assert_array_equal(some.tokens, prompt[rows])
    for name, array in some.items():
        dims = random_e.sites[name].dims
        expected = full[name] if "T" not in dims else full[name].take(rows, axis=dims.index("T"))
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_capture_does_not_depend_on_the_logits_asked_for(random_e, prompt):
    """Layers that share keys skip positions nobody needs; a captured position is needed."""
    _, full = random_e.run_with_cache(prompt)
    for logits in ("last", None, [3]):
        _, cache = random_e.run_with_cache(prompt, logits=logits)
        for name in full:
            if not name.startswith("ln_final"):
                np.testing.assert_array_equal(cache[name], full[name], err_msg=f"{name} {logits}")


def test_keys_in_use_are_captured_where_no_position_is_needed(long_e):
    """In layers that share keys, which then compute nothing; also over several chunks of a step."""
    for n in (12, 600):
        ids = np.arange(n, dtype=np.int32) % 300
        _, full = long_e.run_with_cache(ids, "*_used")
        for logits in (None, "last"):
            _, cache = long_e.run_with_cache(ids, "*_used", logits=logits)
            assert list(cache) == list(full)
            for name, array in cache.items():
                assert np.abs(array).reshape(n, -1).max(1).all()
                np.testing.assert_array_equal(array, full[name], err_msg=f"{name} {n} {logits}")


def test_final_norm_is_captured_where_positions_are_kept(random_e, prompt):
    _, full = random_e.run_with_cache(prompt, "ln_final.*")
    _, cache = random_e.run_with_cache(prompt, "ln_final.*", logits="last")
    for name in full:
        np.testing.assert_array_equal(cache[name], full[name], err_msg=name)


def test_logits_site_without_logits(random_e, prompt):
    expected = random_e.forward(prompt)
    logits, cache = random_e.run_with_cache(prompt, "hook_logits", pos=[2, 7], logits=None)
    assert logits is None
    np.testing.assert_array_equal(cache["hook_logits"], expected[[2, 7]])
    logits, cache = random_e.run_with_cache(prompt, "hook_logits", pos=[2, 7], logits="last")
    np.testing.assert_array_equal(logits, expected[-1:])
    np.testing.assert_array_equal(cache["hook_logits"], expected[[2, 7]])


def test_batch_capture_equals_single(random_e, prompt):
    prompts = [prompt, prompt[:3]]
    _, caches = random_e.run_with_cache(prompts, "*")
    for cache, ids in zip(caches, prompts, strict=True):
        _, single = random_e.run_with_cache(ids, "*")
        for name in single:
            np.testing.assert_array_equal(cache[name], single[name], err_msg=name)


def test_capture_on_a_cached_sequence(random_e, prompt):
    _, whole = random_e.run_with_cache(prompt, "*")
    with random_e.new_sequence() as s:
        random_e.forward(prompt[:7], sequence=s)
        _, cache = random_e.run_with_cache(prompt[7:], "*", sequence=s)
    np.testing.assert_array_equal(cache.positions, np.arange(7, 12))
    for name, array in cache.items():
        dims = random_e.sites[name].dims
        expected = whole[name] if "T" not in dims else whole[name].take(range(7, 12), axis=dims.index("T"))
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_names_filter_is_another_name_for_names(random_e, prompt):
    """TransformerLens's callers pass a name, a list, or a predicate."""
    for names in ("hook_embed", ["hook_embed", "blocks.*.hook_mlp_out"], lambda name: name.endswith("hook_z")):
        wanted = random_e.run_with_cache(prompt, names)[1]
        found = random_e.run_with_cache(prompt, names_filter=names)[1]
        assert list(found) == list(wanted) and len(found) > 0
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name])
    (both,) = random_e.run_with_cache([prompt], names_filter="hook_embed")[1]
    assert list(both) == ["hook_embed"]
    assert list(random_e.run_with_cache(prompt, names_filter=[])[1]) == []
    assert list(random_e.run_with_cache(prompt, names_filter=None)[1]) == list(random_e.run_with_cache(prompt)[1])
    with pytest.raises(SiteError, match="closest"):
        random_e.run_with_cache(prompt, names_filter="hook_embd")
    for second in ("hook_embed", []):
        with pytest.raises(TypeError, match="another name for names: give one"):
            random_e.run_with_cache(prompt, "hook_embed", names_filter=second)


@pytest.mark.parametrize(("option", "meant"), [
    ("name_filter", "names_filter"), ("names_filters", "names_filter"), ("name", "names"), ("Names", "names"),
    ("stop_layer", "stop_at_layer"), ("stop_at_layers", "stop_at_layer"), ("pos_slice", "pos"),
    ("past_kv_cache", "sequence"), ("return_type", "logits"), ("logit", "logits"),
])  # fmt: skip
def test_unknown_options_of_run_with_cache(random_e, prompt, option, meant):
    with pytest.raises(TypeError, match=rf"^{option}: did you mean {meant}\b"):
        random_e.run_with_cache(prompt, **{option: None})


def test_an_option_like_no_other(random_e, prompt):
    with pytest.raises(TypeError, match=r"^device: no such option; names, names_filter, pos"):
        random_e.run_with_cache(prompt, device="cpu")


def test_stop_at_layer(random_e, prompt):
    _, full = random_e.run_with_cache(prompt)
    logits, cache = random_e.run_with_cache(prompt, stop_at_layer=2)
    assert logits is None
    assert "blocks.1.hook_resid_post" in cache and "hook_embed" in cache
    assert not [name for name in cache if name.startswith(("blocks.2", "ln_final"))]
    for name in cache:
        np.testing.assert_array_equal(cache[name], full[name], err_msg=name)
    with pytest.raises(SiteError, match="not reached with stop_at_layer=2"):
        random_e.run_with_cache(prompt, "blocks.2.hook_resid_pre", stop_at_layer=2)
    with pytest.raises(ValueError, match="0 to 6"):
        random_e.run_with_cache(prompt, stop_at_layer=7)


def test_stop_at_layer_leaves_the_sequence(random_e, prompt):
    with random_e.new_sequence() as s:
        random_e.run_with_cache(prompt, stop_at_layer=1, sequence=s)
        assert s.length == 0 and len(s.tokens) == 0


def test_residual_identity(random_e, prompt):
    """resid_post = s * (resid_pre + attn_out + mlp_out + ple_out), the layer scalar included."""
    _, c = random_e.run_with_cache(prompt)
    for i in range(6):
        parts = c["resid_pre", i] + c["attn_out", i] + c["mlp_out", i] + c["ple_out", i]
        np.testing.assert_allclose(c["resid_post", i], random_e.layer_scalar(i) * parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["random_e", "random_moe"])
@pytest.mark.parametrize("layer", [None, 0, 1, 4])
@pytest.mark.parametrize("per_head", [False, True])
def test_decomposition_sums_to_the_residual_stream(request, prompt, which, layer, per_head):
    model = request.getfixturevalue(which)
    _, cache = model.run_with_cache(prompt, "*")
    stack = cache.decompose_resid(layer, per_head=per_head)
    assert len(stack.labels) == len(stack.values) and stack.labels[0] == "embed"
    final = cache["blocks.5.hook_resid_post"] if layer is None else cache[f"blocks.{layer}.hook_resid_pre"]
    np.testing.assert_allclose(stack.values.sum(axis=0), final, rtol=0, atol=2e-5 * np.abs(final).max())


def test_logit_attribution_sums_to_the_logit(random_e, prompt):
    _, cache = random_e.run_with_cache(prompt, "*")
    raw = cache["hook_logits_raw"]
    shares = cache.logit_attrs(cache.decompose_resid(), 17)
    np.testing.assert_allclose(shares.sum(axis=0), raw[:, 17], rtol=0, atol=2e-5 * np.abs(raw).max())
    differences = cache.logit_attrs(cache.decompose_resid(), 17, 33)
    np.testing.assert_allclose(differences.sum(axis=0), raw[:, 17] - raw[:, 33], rtol=0, atol=4e-5 * np.abs(raw).max())
    per_position = cache.logit_attrs(cache.decompose_resid(), np.roll(prompt, -1))
    assert per_position[:, 3].sum() == pytest.approx(raw[3, prompt[4]], abs=1e-4 * float(np.abs(raw).max()))


def test_accumulated_residual(random_e, prompt):
    _, cache = random_e.run_with_cache(prompt)
    stack = cache.accumulated_resid(incl_mid=True)
    assert stack.labels[:3] == ["0_pre", "0_mid", "1_pre"] and stack.labels[-1] == "final_post"
    np.testing.assert_array_equal(stack.values[-1], cache["blocks.5.hook_resid_post"])
    np.testing.assert_array_equal(cache.stack("hook_resid_post")[2], cache["blocks.2.hook_resid_post"])


def test_lens_of_the_last_layer_is_the_model(random_e, prompt):
    logits, cache = random_e.run_with_cache(prompt, "*")
    lens = logit_lens(random_e, cache, target=17, top_k=3)
    assert lens.ids.shape == (7, 12, 3) and lens.labels[0] == "embed" and len(lens.labels) == 7
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(lens.ids[-1, :, 0], logits.argmax(axis=1))
    np.testing.assert_allclose(lens.probs[-1, :, 0], probs.max(axis=1), rtol=1e-4)
    np.testing.assert_allclose(lens.target_probs[-1], probs[:, 17], rtol=1e-4)
    normed = final_norm(random_e, cache["blocks.5.hook_resid_post"])
    np.testing.assert_allclose(normed, cache["ln_final.hook_out"], rtol=1e-4, atol=1e-5)


def test_lens_blocks_do_not_matter(random_e, prompt, monkeypatch):
    whole = logit_lens(random_e, prompt, target=300)
    monkeypatch.setattr("gemma4.interp.lens._BLOCK_ROWS", 37)
    blocks = logit_lens(random_e, prompt, target=300)
    np.testing.assert_array_equal(whole.ids, blocks.ids)
    np.testing.assert_allclose(whole.probs, blocks.probs, rtol=1e-5)
    np.testing.assert_allclose(whole.target_probs, blocks.target_probs, rtol=1e-5)


def test_cache_repr_names_shapes_and_memory(random_e, prompt):
    _, cache = random_e.run_with_cache(prompt, ["hook_embed", "blocks.*.hook_resid_post"])
    text = repr(cache)
    assert "7 arrays, 12 positions, 15.8 KiB" in text
    assert "hook_resid_post" in text and "[12, 48]  (6 layers)" in text


# -- hooks ---------------------------------------------------------------------------------------------------------


def test_hook_that_does_nothing_changes_nothing(random_e, prompt):
    expected = random_e.forward(prompt)
    np.testing.assert_array_equal(random_e.run_with_hooks(prompt, [("*", lambda array, site: None)]), expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_hook_equals_a_manual_edit(random_e, prompt, in_place):
    """Adding v to mlp_out is adding v to the residual stream: checked on what the block itself computes from it."""
    v = np.linspace(-1, 1, 48, dtype=np.float32)
    _, plain = random_e.run_with_cache(prompt)

    def add(array, site):
        if in_place:
            array += v
            return None
        return array + v

    with random_e.hooks([("blocks.2.hook_mlp_out", add)]):
        _, edited = random_e.run_with_cache(prompt)
    np.testing.assert_array_equal(edited["blocks.2.hook_mlp_out"], plain["blocks.2.hook_mlp_out"] + v)
    np.testing.assert_array_equal(
        edited["blocks.2.hook_resid_mlp"], plain["blocks.2.hook_resid_mid"] + (plain["blocks.2.hook_mlp_out"] + v)
    )
    np.testing.assert_array_equal(edited["blocks.1.hook_resid_post"], plain["blocks.1.hook_resid_post"])
    assert not np.array_equal(edited["blocks.3.hook_resid_pre"], plain["blocks.3.hook_resid_pre"])


def test_patching_the_residual_stream_carries_a_run_over(random_e, prompt):
    """The whole residual stream of prompt b, patched into prompt a at block 3, gives b's logits from there on."""
    other = prompt[::-1].copy()
    target, cache = random_e.run_with_cache(other, ["blocks.3.hook_resid_pre", "hook_ple_token", "hook_ple_context"])
    hooks = [(name, lambda array, site: cache[site.name]) for name in cache]
    # layers 4 and 5 attend to keys of layers 3 (local) and 2 (global): patch what layer 2 wrote there too
    _, keys = random_e.run_with_cache(other, ["blocks.5.attn.hook_k_used", "blocks.5.attn.hook_v_used"])
    hooks += [(name, lambda array, site: keys[site.name]) for name in keys]
    np.testing.assert_allclose(random_e.run_with_hooks(prompt, hooks), target, rtol=1e-4, atol=1e-4)


def test_zeroing_a_head(random_e, prompt):
    def zero(array, site):
        array[:, 1] = 0

    with random_e.hooks([("blocks.0.attn.hook_z", zero)]):
        _, cache = random_e.run_with_cache(prompt, ["blocks.0.attn.hook_result", "blocks.0.attn.hook_z"])
    assert not cache["blocks.0.attn.hook_z"][:, 1].any()
    assert not cache["blocks.0.attn.hook_result"][:, 1].any() and cache["blocks.0.attn.hook_result"][:, 0].any()


def test_writing_a_pattern_acts(random_e, prompt):
    def to_first(array, site):
        array[:] = 0
        array[:, :, 0] = 1

    with random_e.hooks([("blocks.2.attn.hook_pattern", to_first)]):
        _, cache = random_e.run_with_cache(prompt, ["blocks.2.attn.hook_z", "blocks.2.attn.hook_v_used"])
    expected = np.broadcast_to(cache["blocks.2.attn.hook_v_used"][0, 0], (12, 4, 32))
    np.testing.assert_allclose(cache["blocks.2.attn.hook_z"], expected, rtol=1e-5, atol=1e-6)


def test_hook_sees_site_and_positions(random_e, prompt):
    seen = []

    def note(array, site):
        seen.append((site.name, site.layer, site.sequence, site.start, site.positions.tolist(), array.shape))

    hook = [("blocks.1.hook_attn_out", note), ("hook_embed", note)]
    random_e.run_with_hooks([prompt[:2], prompt[:3]], hook)
    assert sorted(seen) == [
        ("blocks.1.hook_attn_out", 1, 0, 0, [0, 1], (2, 48)),
        ("blocks.1.hook_attn_out", 1, 1, 0, [0, 1, 2], (3, 48)),
        ("hook_embed", None, 0, 0, [0, 1], (2, 48)),
        ("hook_embed", None, 1, 0, [0, 1, 2], (3, 48)),
    ]
    seen.clear()
    with random_e.new_sequence() as s:
        random_e.forward(prompt[:4], sequence=s)
        random_e.run_with_hooks(prompt[4:6], [("blocks.1.hook_attn_out", note)], sequence=s)
    assert seen == [("blocks.1.hook_attn_out", 1, 0, 4, [4, 5], (2, 48))]


@pytest.mark.parametrize("name", ["hook_logits", "ln_final.hook_out", "blocks.5.hook_mlp_out"])
def test_hooks_see_every_position_whatever_logits_are_asked_for(random_e, prompt, name):
    seen = []
    hook = (name, lambda array, site: seen.append((site.positions.tolist(), len(array))))
    logits = random_e.run_with_hooks(prompt, [hook], logits=[2, 9])
    assert seen == [(list(range(12)), 12)]
    np.testing.assert_array_equal(logits, random_e.forward(prompt)[[2, 9]])


def test_a_hook_gets_all_of_a_long_prompt_at_once(long_e):
    """A step computes 512 positions at a time, but never cuts what a hook is to see."""
    prompts = [np.arange(n, dtype=np.int32) % 300 for n in (20, 600, 530)]
    seen = []
    hook = ("blocks.1.attn.hook_pattern", lambda array, site: seen.append((site.sequence, array.shape[1:])))
    logits = long_e.run_with_hooks(prompts, [hook], logits="last")
    assert sorted(seen) == [(0, (20, 20)), (1, (600, 600)), (2, (530, 530))]
    for ours, ids in zip(logits, prompts, strict=True):
        np.testing.assert_array_equal(ours, long_e.forward(ids, logits="last"))


def test_hooks_nest_in_order(random_e, prompt):
    order = []
    outer = ("blocks.0.hook_resid_post", lambda a, s: order.append("outer"))
    inner = ("blocks.0.hook_resid_post", lambda a, s: order.append("inner"))
    with random_e.hooks([outer]):
        with random_e.hooks([inner]):
            random_e.forward(prompt)
        random_e.forward(prompt)
    random_e.forward(prompt)
    assert order == ["outer", "inner", "outer"]


def test_a_kept_array_is_not_written_later(random_e, prompt):
    kept = []
    hook = ("blocks.0.hook_resid_post", lambda array, site: kept.append((array, array.copy())))
    random_e.run_with_hooks(prompt, [hook])
    random_e.forward(prompt[::-1].copy())
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)


def test_of_equal_experts_the_lower_ones_are_chosen(random_moe, prompt):
    def even(array, site):
        array[:] = 1 / array.shape[-1]

    with random_moe.hooks([("blocks.*.moe.hook_router_probs", even)]):
        _, cache = random_moe.run_with_cache(prompt, "blocks.*.moe.hook_expert_ids")
    for ids in cache.values():
        np.testing.assert_array_equal(ids, [[0, 1]] * 12)


def test_wrong_shape_from_a_hook(random_e, prompt):
    with pytest.raises(
        ValueError, match=r"hook on blocks\.2\.hook_mlp_out returned shape \(48,\), expected \(12, 48\)"
    ):
        random_e.run_with_hooks(prompt, [("blocks.2.hook_mlp_out", lambda array, site: array[0])])
    random_e.forward(prompt)  # still usable


def test_exceptions_of_a_hook_come_through(random_e, prompt):
    class OwnError(Exception):
        pass

    def fail(array, site):
        raise OwnError("mine")

    with random_e.new_sequence() as s:
        with pytest.raises(OwnError, match="mine"):
            random_e.run_with_hooks(prompt, [("blocks.2.hook_mlp_out", fail)], sequence=s)
        s.truncate(0)
        random_e.forward(prompt, sequence=s)


def test_hooks_that_are_none(random_e, prompt):
    with pytest.raises(TypeError, match="a hook is a pair"):
        random_e.run_with_hooks(prompt, [("hook_embed", 3)])
    with pytest.raises(TypeError, match="a hook is a pair"):
        random_e.run_with_hooks(prompt, ["hook_embed"])


def test_nan_is_reported_once(random_dir, prompt):
    model = gemma4.load(random_dir)
    hooks = [("blocks.1.hook_mlp_out", lambda array, site: array * np.nan)]
    with pytest.warns(NaNWarning, match=r"blocks\.1\.hook_mlp_out"):
        logits = model.run_with_hooks(prompt, hooks)
    assert np.isnan(logits).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run_with_hooks(prompt, hooks)  # once per site
    assert model.info().warnings == ["an edit produced NaN at blocks.1.hook_mlp_out"]


def test_nan_is_blamed_on_the_edit_that_made_it(random_dir, prompt):
    model = gemma4.load(random_dir)
    hooks = [
        ("blocks.1.hook_mlp_out", lambda array, site: array * np.nan),
        ("blocks.2.hook_mlp_out", lambda array, site: array * 2),
    ]
    with pytest.warns(NaNWarning):
        model.run_with_hooks(prompt, hooks)
    assert model.nan_log.sites == ["blocks.1.hook_mlp_out"]


def test_every_site_is_documented():
    root = Path(__file__).parents[1]
    names = re.findall(r'^G4_SITE\([A-Z0-9_]+,\s*"([^"]+)"', (root / "csrc/model/sites.inc").read_text(), re.M)
    documented = set(re.findall(r"`([\w.]+)`", (root / "docs/sites.md").read_text()))
    assert len(names) > 60 and not {name.replace("{}", "L") for name in names} - documented


def test_caches_of_consecutive_steps_join(tiny):
    """Two steps' caches are one run's; the keys that the first step did not see yet are 0 for it."""
    ids, names = tiny.to_tokens("Once upon a time"), ["hook_embed", "blocks.0.attn.hook_pattern"]
    whole = tiny.run_with_cache(ids, names, logits=None)[1]
    with tiny.new_sequence() as sequence:
        first = tiny.run_with_cache(ids[:2], names, logits=None, sequence=sequence)[1]
        later = tiny.run_with_cache(ids[2:], names, logits=None, sequence=sequence)[1]
    joined = first.join([later])
    assert first.join([]) is first
    assert (joined.tokens == ids).all() and (joined.positions == np.arange(len(ids))).all()
    for name in names:
        assert np.array_equal(joined[name], whole[name])


def test_names_of_other_libraries_are_explained(tiny, prompt):
    """Each call that has options says what another library's option is called here."""
    cache = tiny.run_with_cache(prompt)[1]
    pair = ("hook_embed", lambda array, site: None)
    for call, complaint in [
        (lambda: tiny.run_with_hooks(prompt, fwd_hooks=[pair]), "fwd_hooks: did you mean hooks?"),
        (lambda: tiny.run_with_hooks(prompt, [pair], return_type="loss"), "return_type: did you mean logits?"),
        (lambda: tiny.run_with_hooks(prompt), "hooks are pairs"),
        (lambda: tiny.forward(prompt, return_type="logits"), "return_type: did you mean logits?"),
        (lambda: tiny.forward(prompt, past_kv_cache=None), "past_kv_cache: did you mean sequence?"),
        (lambda: tiny.forward(prompt, start_at_layer=3), "start_at_layer: did you mean `run_from("),
        (lambda: tiny.run_with_cache(prompt, start_at_layer=3), "start_at_layer: did you mean `run_from("),
        (lambda: tiny.forward(prompt, stop_at_layer=3), "stop_at_layer: did you mean `run_with_cache("),
        (lambda: tiny.forward(prompt, device="cpu"), "device: no such option; logits, sequence are"),
        (lambda: cache.decompose_resid(return_labels=True), "`labels` of the result"),
        (lambda: cache.accumulated_resid(return_labels=True, apply_ln=True), "`gemma4.interp.logit_lens`"),
        (lambda: cache.decompose_resid(per_heads=True), "per_heads: did you mean per_head?"),
    ]:
        with pytest.raises(TypeError, match=re.escape(complaint)):
            call()


def test_pairs_find_what_was_captured_and_name_what_was_not(tiny, prompt):
    cache = tiny.run_with_cache(prompt)[1]
    for pair, name in {
        ("ln2.hook_in", 3): "blocks.3.hook_resid_mid",  # the bridge's name
        ("resid_mid", -1): f"blocks.{tiny.n_layers - 1}.hook_resid_mid",
        ("z", 2): "blocks.2.attn.hook_z",
        ("out", 2): "blocks.2.attn.hook_out",
        ("hook_out", 2): "blocks.2.hook_resid_post",  # the bridge's name again
    }.items():
        assert cache[pair] is cache[name] and pair in cache
    with pytest.raises(SiteError, match=r"^\W*blocks.3.attn.hook_pattern' was not captured"):
        cache["pattern", 3]
    with pytest.raises(SiteError, match="no site 'blocks"):
        cache["nope", 3]
    assert ("pattern", 3) not in cache and ("nope", 3) not in cache and ("z", 99) not in cache and 3 not in cache


def test_globs_of_other_libraries_names(tiny, prompt):
    """A glob in the place of the layer means what a number there means, not all that ends so."""
    for pattern, name in {
        "blocks.*.hook_out": "blocks.*.hook_resid_post",  # not mlp.hook_out, attn.hook_out ...
        "blocks.*.ln2.hook_in": "blocks.*.hook_resid_mid",
        "blocks.[12].attn.q.hook_out": "blocks.[12].attn.hook_q",
        "model.layers.*.output": "blocks.*.hook_resid_post",
        "model.language_model.layers.?.mlp.input": "blocks.?.mlp.hook_in",
        "language_model.model.layers.*.output": "blocks.*.hook_resid_post",
        "language_model.model.layers.3.mlp.output": "blocks.3.mlp.hook_out",
        "language_model.model.norm.output": "ln_final.hook_out",
        "blocks.*.*.hook_out": "*.*.*.hook_out",
    }.items():
        assert [site.name for site in tiny.sites.select(pattern)] == [site.name for site in tiny.sites.select(name)]
    cache = tiny.run_with_cache(prompt)[1]
    assert np.array_equal(cache.stack("ln2.hook_in"), cache.stack("hook_resid_mid"))
    assert cache.norms("hook_out").labels == cache.norms("resid_post").labels


def test_the_heads_output_without_a_softcap(tiny, prompt, tmp_path):
    assert tiny.sites["lm_head.output"].name == "hook_logits_raw"
    path = write_checkpoint(tmp_path / "uncapped", E_LIKE | {"final_logit_softcapping": None})
    with gemma4.load(path) as model:
        logits, cache = model.run_with_cache([2, 3, 4], "lm_head.output")
        assert model.sites["lm_head.output"].name == "hook_logits" and "lm_head.output" in cache
        assert np.array_equal(cache["lm_head.output"], logits)
        with pytest.raises(gemma4.SiteError, match="closest: hook_logits"):
            model.sites["hook_logits_raw"]
        save_edits(Patch("lm_head.output", cache, pos=1), tmp_path / "e.safetensors")
        with model.edit(load_edits(tmp_path / "e.safetensors", model=model)):
            assert np.array_equal(model.forward([2, 5, 4])[1], logits[1])


def test_negative_layers_of_a_cache(tiny, prompt):
    cache = tiny.run_with_cache(prompt, "blocks.*.hook_resid_post", logits=None)[1]
    assert cache["resid_post", -1] is cache["resid_post", tiny.n_layers - 1]
    assert cache["resid_post", np.int64(-tiny.n_layers)] is cache["resid_post", 0]
    with pytest.raises(gemma4.SiteError, match=f"blocks.-{tiny.n_layers + 1}"):
        cache["resid_post", -tiny.n_layers - 1]


def test_one_edit_stands_for_a_list(tiny, prompt):
    edit = Ablate(head=(3, 2))
    with tiny.edit(edit):
        expected = tiny.forward(prompt)
    assert np.array_equal(tiny.run_with_hooks(prompt, edit), expected)
    greedy = {"max_tokens": 2, "temperature": 0}
    texts = [tiny.generate("The capital of France is", hooks=hooks, **greedy).text for hooks in (edit, [edit])]
    assert texts[0] == texts[1]
    with tiny.hooks(edit):
        assert np.array_equal(tiny.forward(prompt), expected)
