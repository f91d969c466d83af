# SPDX-License-Identifier: Apache-2.0
"""Results travel between processes: caches and generations are pickled and copied without the model."""

from __future__ import annotations

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4 import ActivationCache, SiteError, StateError

PROMPT = "When Mary and John went to the store"


def stem_of(cache):
    return cache["resid_post", 2].copy()


@pytest.fixture(scope="module")
def cache(tiny):
    return tiny.run_with_cache(PROMPT, ["hook_embed", "blocks.*"])[1]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_cache_holds_arrays_not_the_model(cache, protocol):
    data = pickle.dumps(cache, protocol)
    assert len(data) < 2 * cache.nbytes + 200_000  # protocol 2 writes a byte as up to two; the model has 8.8 MB
    again = pickle.loads(data)
    assert list(again) == list(cache) and again.nbytes == cache.nbytes
    for name in cache:
        np.testing.assert_array_equal(again[name], cache[name], err_msg=name)
    np.testing.assert_array_equal(again.tokens, cache.tokens)
    np.testing.assert_array_equal(again.positions, cache.positions)
    assert repr(again) == repr(cache)
    assert np.array_equal(pickle.loads(pickle.dumps(again))["hook_embed"], cache["hook_embed"])


def test_what_an_unpickled_cache_can_do(tiny, cache):
    again = pickle.loads(pickle.dumps(cache))
    for method in ("accumulated_resid", "decompose_resid"):
        ours, theirs = getattr(again, method)(), getattr(cache, method)()
        assert ours.labels == theirs.labels
        np.testing.assert_array_equal(ours.values, theirs.values)
    np.testing.assert_array_equal(again.stack("hook_resid_pre"), cache.stack("hook_resid_pre"))
    with pytest.raises(SiteError, match="not captured"):
        again["hook_logits"]
    with pytest.raises(SiteError, match="resid_post"):
        again["blocks.0.hook_resid_pots"]
    stack = again.decompose_resid()
    for needs_weights in (lambda: again.logit_attrs(stack, " Mary"), lambda: again.decompose_resid(per_head=True)):
        with pytest.raises(StateError, match=r"attach\(model\)"):
            needs_weights()
    again.attach(tiny)
    np.testing.assert_array_equal(again.logit_attrs(stack, " Mary"), cache.logit_attrs(stack, " Mary"))


def test_a_cache_takes_no_other_model(cache):
    again = pickle.loads(pickle.dumps(cache))
    with gemma4.load("tiny-moe") as other, pytest.raises(ValueError, match="other sites"):
        again.attach(other)


def test_a_cache_takes_other_weights_only_by_force(random_e, tmp_path):
    """Its sites are the same, its unembedding is not."""
    cache = random_e.run_with_cache([2, 5, 6], ["hook_embed", "blocks.*", "ln_final.*"])[1]
    saved = ActivationCache.load(cache.save(tmp_path / "c.safetensors"))
    with gemma4.load(write_checkpoint(tmp_path / "m", E_LIKE, seed=1)) as other:
        for again in (saved, pickle.loads(pickle.dumps(cache))):
            names = f"{random_e.checkpoint.path.name}.*{random_e.fingerprint}.*{other.fingerprint}.*force=True"
            with pytest.raises(ValueError, match=names):
                again.attach(other)
            with pytest.raises(ValueError, match="force must be"):
                again.attach(other, force="yes")
            with pytest.raises(StateError, match=r"attach\(model\)"):  # nothing was attached
                again.logit_attrs(again.accumulated_resid(), 7)
            again.attach(other, force=True)
            stack = again.accumulated_resid()
            assert not np.array_equal(again.logit_attrs(stack, 7), cache.logit_attrs(stack, 7))
            assert again.fingerprint == random_e.fingerprint and again.model_name == cache.model_name
            parts = again.decompose_resid(layer=2).values  # by the scalars of the model that ran
            np.testing.assert_array_equal(parts, cache.decompose_resid(layer=2).values)
            again.attach(random_e)
            np.testing.assert_array_equal(again.logit_attrs(stack, 7), cache.logit_attrs(stack, 7))


def test_copies_share_the_model(tiny, cache):
    deep, shallow = copy.deepcopy(cache), copy.copy(cache)
    assert shallow["hook_embed"] is cache["hook_embed"] and deep["hook_embed"] is not cache["hook_embed"]
    deep["hook_embed"][:] = 0
    assert cache["hook_embed"].any()
    stack = cache.decompose_resid()
    for one in (deep, shallow):
        np.testing.assert_array_equal(one.logit_attrs(stack, " Mary"), cache.logit_attrs(stack, " Mary"))


def test_generations(tiny):
    out = tiny.generate(PROMPT, max_tokens=3, temperature=0, logprobs=2, capture="blocks.0.hook_resid_post")
    for again in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out)):
        assert (again.text, again.finish_reason, again.timings) == (out.text, out.finish_reason, out.timings)
        assert again.logprobs == out.logprobs and np.array_equal(again.tokens, out.tokens)
        np.testing.assert_array_equal(again.cache["resid_post", 0], out.cache["resid_post", 0])
    chat = tiny.generate([{"role": "user", "content": "Hi"}], max_tokens=3)
    assert pickle.loads(pickle.dumps(chat)).tool_calls == chat.tool_calls


def test_caches_of_media(tiny):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    content = [{"type": "image", "image": pixels}, {"type": "text", "text": "What?"}]
    prompt = tiny.to_prompt([{"role": "user", "content": content}])
    cache = tiny.run_with_cache(prompt, ["hook_embed", "vision.blocks.0.hook_resid_post"])[1]
    for again in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        (one,) = again.media
        np.testing.assert_array_equal(
            one["vision.blocks.0.hook_resid_post"], cache.media[0]["vision.blocks.0.hook_resid_post"]
        )
        assert one.run.start == cache.media[0].run.start and repr(again) == repr(cache)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_caches_pass_between_processes(cache, method):
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(stem_of, (cache,)), cache["resid_post", 2])
