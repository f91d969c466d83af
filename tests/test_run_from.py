# SPDX-License-Identifier: Apache-2.0
"""The rest of the model from a given residual stream: the bits of the whole run, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import E_LIKE, MOE_LIKE, write_checkpoint

import gemma4
from gemma4 import SiteError
from gemma4.edits import Set, Steer

PROMPT = "When Mary and John went to the store"
CONFIGS = {"e": E_LIKE, "moe": MOE_LIKE}


@pytest.fixture(scope="module", params=["tiny-e", "tiny-moe", "e", "moe"])
def model(request, tmp_path_factory):
    if request.param not in CONFIGS:
        return gemma4.load(request.param)
    return gemma4.load(write_checkpoint(tmp_path_factory.mktemp("random") / request.param, CONFIGS[request.param]))


def ids_of(model, n=24):
    return np.random.default_rng(n).integers(3, 300, n).astype(np.int32)


def last_start(model):
    """The last layer at which a run can start: later ones read keys and values of it, or of none before it."""
    sources = [layer["kv_source"] for layer in model.engine_config["layers"]]
    return max(layer for layer in range(len(sources)) if min(sources[layer:]) >= layer)


def same(caches, wanted):
    for name, array in caches.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_every_layer(model):
    """Logits and every later site, to the bit; hook_embed and what it feeds are those of the tokens."""
    ids = ids_of(model)
    logits, cache = model.run_with_cache(ids, "*")
    n_starts = 0
    for layer in range(last_start(model) + 1):
        found, later = model.run_from(cache["resid_pre", layer], layer, ids, "*")
        np.testing.assert_array_equal(found, logits)
        same(later, cache)
        reached = [site.name for site in model.sites.values() if site.layer is None or site.layer >= layer]
        assert list(later) == reached
        n_starts += 1
    assert n_starts > 2


def test_defaults_are_those_of_run_with_cache(model):
    ids = ids_of(model)
    _, cache = model.run_with_cache(ids)
    found, later = model.run_from(cache["resid_pre", 1], 1, ids, logits="last")
    np.testing.assert_array_equal(found, model.forward(ids, logits="last"))
    assert list(later) == [name for name in cache if not name.startswith("blocks.0.")]


def test_a_changed_stream_is_an_edit(model):
    ids, layer = ids_of(model), 1
    resid = model.run_with_cache(ids, "blocks.1.hook_resid_pre")[1]["resid_pre", 1]
    resid[7] += 1
    with model.edit(Set("blocks.1.hook_resid_pre", resid, pos=range(len(ids)))):
        wanted, cache = model.run_with_cache(ids, "*")
    found, later = model.run_from(resid.astype(np.float64)[:, ::-1][:, ::-1], layer, ids, "*")
    np.testing.assert_array_equal(found, wanted)
    same(later, cache)
    assert not np.array_equal(found, model.forward(ids))


def test_after_a_cached_prefix(model):
    """Longer than the sliding window, so that its ring is full; the sequence goes on as if nothing had run."""
    ids, layer = ids_of(model, 60), last_start(model)
    for n in (1, 20):
        with model.new_sequence(capacity=200) as sequence, model.new_sequence(capacity=200) as other:
            for one in (sequence, other):
                model.forward(ids[:-n], logits=None, sequence=one)
            wanted, cache = model.run_with_cache(ids[-n:], "*", sequence=other)
            found, later = model.run_from(cache["resid_pre", layer], layer, ids[-n:], "*", sequence=sequence)
            np.testing.assert_array_equal(found, wanted)
            same(later, cache)
            assert later.positions.tolist() == list(range(60 - n, 60))
            assert len(sequence) == 60 - n and sequence.tokens.tolist() == ids[:-n].tolist()
            np.testing.assert_array_equal(model.forward(ids[-n:], sequence=sequence), wanted)


def test_chunks(tiny):
    """A prompt of several chunks: each attends to the chunks before it."""
    ids = ids_of(tiny, 1000)
    logits, cache = tiny.run_with_cache(ids, "blocks.3.hook_resid_pre", logits=[0, 600, -1])
    found, _ = tiny.run_from(cache["resid_pre", 3], 3, ids, "hook_embed", logits=[0, 600, -1])
    np.testing.assert_array_equal(found, logits)


def test_a_batch(model):
    prompts = [ids_of(model, n) for n in (5, 30, 1, 12)]
    logits, caches = model.run_with_cache(prompts, "*")
    found, later = model.run_from([cache["resid_pre", 2] for cache in caches], 2, prompts, "*")
    for one, wanted in zip(found, logits, strict=True):
        np.testing.assert_array_equal(one, wanted)
    for one, wanted in zip(later, caches, strict=True):
        same(one, wanted)
    for wrong in (5, None, iter([])):
        with pytest.raises(TypeError, match="a list of prompts needs a list of arrays"):
            model.run_from(wrong, 2, prompts)
    equal = np.stack([caches[1]["resid_pre", 2]] * 2)  # one array for all is a list of them, too
    np.testing.assert_array_equal(model.run_from(equal, 2, [prompts[1]] * 2)[0][1], logits[1])
    with pytest.raises(ValueError, match="4 prompts need 4 arrays, got 1"):
        model.run_from([caches[0]["resid_pre", 2]], 2, prompts)


def test_a_part_of_the_model(model):
    ids = ids_of(model)
    _, cache = model.run_with_cache(ids, "*")
    names = "blocks.*.hook_resid_post"
    logits, some = model.run_from(cache["resid_pre", 1], 1, ids, names, stop_at_layer=3, pos=[-1, 4])
    assert logits is None and list(some) == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    np.testing.assert_array_equal(some["resid_post", 2], cache["resid_post", 2][[4, len(ids) - 1]])
    _, none = model.run_from(cache["resid_pre", 2], 2, ids, stop_at_layer=2)
    assert "hook_embed" in none and not any(name.startswith("blocks") for name in none)
    with pytest.raises(ValueError, match="start_at_layer 3: expected 0 to 2"):
        model.run_from(cache["resid_pre", 3], 3, ids, stop_at_layer=2)


def test_a_prompt_with_an_image(tiny):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": "What?"}]
    prompt = tiny.to_prompt([{"role": "user", "content": content}])
    logits, cache = tiny.run_with_cache(prompt, "*")
    found, later = tiny.run_from(cache["resid_pre", 2], 2, prompt, "*")
    np.testing.assert_array_equal(found, logits)
    same(later, cache)


def test_quantised_and_fast(tmp_path):
    gemma4.quantize("tiny-e", tmp_path / "q.gguf", type="Q4_0")
    with gemma4.load(tmp_path / "q.gguf") as model:
        assert model.engine.precision == "fast"
        logits, cache = model.run_with_cache(PROMPT, "blocks.3.hook_resid_pre")
        found, _ = model.run_from(cache["resid_pre", 3], 3, PROMPT)
        np.testing.assert_array_equal(found, logits)


def test_hooks_and_edits(tiny):
    ids = tiny.to_tokens(PROMPT)
    resid = tiny.run_with_cache(ids, "blocks.2.hook_resid_pre")[1]["resid_pre", 2]
    seen = []
    direction = np.ones(resid.shape[1], np.float32)
    hooks = [("*.hook_resid_pre", lambda array, site: seen.append(site.name)), Steer(direction, 3)]
    with tiny.hooks(hooks):
        wanted = tiny.forward(ids)
        del seen[:]
        np.testing.assert_array_equal(tiny.run_from(resid, 2, ids)[0], wanted)
    assert seen == [f"blocks.{i}.hook_resid_pre" for i in range(2, tiny.n_layers)]
    for earlier in (("blocks.1.hook_mlp_out", lambda array, site: None), Steer(direction, 1)):
        with tiny.hooks([earlier]), pytest.raises(SiteError, match="not reached with start_at_layer=2"):
            tiny.run_from(resid, 2, ids)
    with pytest.raises(SiteError, match=r"blocks.1.hook_mlp_out' is not reached with start_at_layer=2"):
        tiny.run_from(resid, 2, ids, "blocks.1.hook_mlp_out")
    with pytest.raises(SiteError, match="not reached with stop_at_layer=3"):
        tiny.run_from(resid, 2, ids, "blocks.3.hook_mlp_out", stop_at_layer=3)
    with pytest.raises(SiteError, match=r"no site of this model matches 'blocks.\[01\].hook_mlp_out'"):
        tiny.run_from(resid, 2, ids, "blocks.[01].hook_mlp_out")
    assert tiny.run_with_cache(ids, "blocks.1.hook_mlp_out")[1]  # the model's own table is as before


def test_layers_that_share_keys(tiny):
    ids = tiny.to_tokens(PROMPT)
    sources = [layer["kv_source"] for layer in tiny.engine_config["layers"]]
    assert last_start(tiny) == 3 and sources[-1] == 4
    cache = tiny.run_with_cache(ids)[1]
    for layer in range(4, tiny.n_layers):
        source = min(sources[layer:])
        with pytest.raises(ValueError, match=rf"keys and values of layer {source}, .*start at layer {source}"):
            tiny.run_from(cache["resid_pre", layer], layer, ids)
    _, some = tiny.run_from(cache["resid_pre", 4], 4, ids, stop_at_layer=5)  # layer 4 makes its own
    np.testing.assert_array_equal(some["resid_post", 4], cache["resid_post", 4])


@pytest.mark.parametrize(("resid", "error", "words"), [
    (np.zeros((4, 8), np.float32), ValueError, r"resid must be \[4, 48\], a row for each token of ids, got \[4, 8\]"),
    (np.zeros((3, 48), np.float32), ValueError, r"got \[3, 48\]"),
    (np.zeros((1, 4, 48), np.float32), ValueError, r"got \[1, 4, 48\]"),
    (np.zeros(48, np.float32), ValueError, r"got \[48\]"),
    ([[1, 2], [3]], ValueError, r"resid must be an array \[4, 48\]"),
    (None, TypeError, "resid must hold numbers, got object"),
    ("text", TypeError, "resid must hold numbers"),
    (np.zeros((4, 48), complex), TypeError, "resid must hold numbers, got complex"),
    (np.zeros((4, 48), bool), TypeError, "resid must hold numbers, got bool"),
])  # fmt: skip
def test_wrong_streams(tmp_path, resid, error, words):
    model = gemma4.load(write_checkpoint(tmp_path / "e", E_LIKE))
    with model.new_sequence() as sequence:
        model.forward([2, 5], sequence=sequence)
        with pytest.raises(error, match=words):
            model.run_from(resid, 1, [6, 7, 8, 9], sequence=sequence)
        assert len(sequence) == 2


def test_calls_of_the_engine(tmp_path):
    """The engine checks for itself."""
    model = gemma4.load(write_checkpoint(tmp_path / "e", E_LIKE))
    ids, good = np.array([2, 5, 6], np.int32), np.zeros((3, 48), np.float32)

    def step(*resids, **options):
        sequences = [model.new_sequence() for _ in resids]
        model.engine.step([(s.engine, ids, None, None, None, None, r) for s, r in zip(sequences, resids, strict=True)],
                          **options)  # fmt: skip
        assert all(len(s) == 0 or not options for s in sequences)

    step(good, good, start_at_layer=2)
    step(None, None)
    for resids, options in (((None,), {"start_at_layer": 2}), ((good, None), {"start_at_layer": 2}),
                            ((None, good), {}), ((good, None), {})):  # fmt: skip
        with pytest.raises(ValueError, match=r"run \d has (no|alone a) residual stream"):
            step(*resids, **options)
    for layer in (-1, 6, 2**31 - 1):
        with pytest.raises(ValueError, match="start_at_layer"):
            step(good, start_at_layer=layer)
    for wrong in (good[:2], good.astype(np.float64), good[:, :-1], good.T, good[::-1], 5, "x"):
        with pytest.raises((ValueError, TypeError), match="resid"):
            step(wrong, start_at_layer=2)
