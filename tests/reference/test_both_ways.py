# SPDX-License-Identifier: Apache-2.0
"""Positions that see later ones: stretches that a run gives (`ends`), in layers that look ahead, against transformers
and against the definition of the mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gemma4
from gemma4 import _engine

from . import oracle, steps, variants
from .compare import difference, first_bit_differences, first_failures, same_bits
from .conftest import Checkpoint

Load = Callable[..., gemma4.Model]
WHOLE = 1 << 30  # of a layer's `ahead`


def ends_of(n: int, *stretches: tuple[int, int]) -> steps.Ids:
    """int32 [n]: positions of a stretch (first, end) see to its end, the others to themselves."""
    ends = np.arange(1, n + 1, dtype=np.int32)
    for first, end in stretches:
        ends[first:end] = end
    return ends


def with_layers(model: gemma4.Model, **changes: Callable[[dict[str, Any]], Any]) -> gemma4.Model:
    """The same weights in an engine whose layers differ: name of a field -> its value for a layer."""
    other = copy.copy(model)
    config = copy.deepcopy(model.engine_config)
    for layer in config["layers"]:
        layer.update({name: value(dict(layer)) for name, value in changes.items()})  # type: ignore[typeddict-item]
    options: Any = {"threads": 1, "precision": model.engine.precision}
    other.engine_config, other.engine = config, _engine.Model(config, model.checkpoint.engine_tensors, **options)
    return other


def prompt(model: gemma4.Model, n: int, seed: int = 0) -> steps.Ids:
    return np.random.default_rng(seed).integers(0, model.n_token_ids, n).astype(np.int32)


def whole(model: gemma4.Model, ids: steps.Ids, ends: steps.Ids, max_chunk: int = 0) -> steps.Account:
    return steps.run(model, [(model.engine.new_sequence(), ids)], max_chunk=max_chunk, ends=[ends])[0]


def assert_same(ours: steps.Account, expected: steps.Account) -> None:
    assert first_bit_differences(ours.sites, expected.sites) == []
    assert same_bits(ours.logits, expected.logits)


# ---- images of Gemma 3: all layers, a window that limits the past alone ---------------------------------------------

IMAGES = [((3, 9),), ((0, 4), (6, 20)), ((1, 3), (3, 4), (30, 41))]  # one longer than the window of 5


@pytest.mark.parametrize("name", ["gemma3-mm", "gemma3-mm-old"])
@pytest.mark.parametrize("stretches", IMAGES, ids=str)
def test_images_of_gemma_3(
    name: str, stretches: tuple[tuple[int, int], ...], checkpoint: Callable[[str], Checkpoint], loaded: Load
) -> None:
    model, n = loaded(name), 41
    ids = prompt(model, n)
    types = torch.zeros(1, n, dtype=torch.long)
    joined = [(1, 4), stretches[-1]] if len(stretches) == 3 else stretches  # neighbours are one image to transformers
    for first, end in joined:
        types[:, first:end] = 1
    theirs = checkpoint(name).model
    recording = oracle.record(theirs, torch.from_numpy(ids).long(), token_type_ids=types)
    ours = whole(model, ids, ends_of(n, *joined))
    assert first_failures(ours.sites, oracle.sites_from(theirs, recording)) == []
    for max_chunk in (1, 3, 7):
        assert_same(whole(model, ids, ends_of(n, *joined), max_chunk), ours)


def test_causal_is_what_no_ends_give(loaded: Load) -> None:
    model = loaded("gemma3-mm")
    ids = prompt(model, 33)
    assert_same(whole(model, ids, ends_of(33)), steps.whole(model, ids))


def test_layers_that_do_not_look_ahead_ignore_ends(loaded: Load) -> None:
    model = loaded("gemma3")
    ids = prompt(model, 33)
    assert not any(layer["ahead"] for layer in model.engine_config["layers"])
    for max_chunk in (0, 5):
        assert_same(whole(model, ids, ends_of(33, (2, 30)), max_chunk), steps.whole(model, ids))


# ---- the whole prompt both ways, symmetric windows ------------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 8, 14])
def test_embedding_models_see_both_ways(window: int, loaded: Load) -> None:
    """Gemma 3's use_bidirectional_attention: |q - k| < window in sliding layers, everything in global ones."""
    text = variants.GEMMA3 | {"use_bidirectional_attention": True, "sliding_window": window}
    theirs = variants.build(variants.Variant("both-ways", text, family="gemma3"))
    reach = theirs.config.sliding_window  # halved by the class
    assert reach == window // 2 + 1
    model = with_layers(
        loaded("gemma3"),  # of the same seed, so of the same weights
        window=lambda layer: reach if layer["window"] else 0,
        ahead=lambda layer: reach - 1 if layer["window"] else WHOLE,
    )
    for n in (1, window, 41):
        ids = prompt(model, n)
        sites = oracle.sites_of(theirs, torch.from_numpy(ids).long())
        ours = whole(model, ids, np.full(n, n, np.int32))
        assert first_failures(ours.sites, sites) == []
        assert difference(ours.logits, sites["hook_logits"]) is None
        assert_same(whole(model, ids, np.full(n, n, np.int32), max_chunk=3), ours)


# ---- any ends, by the definition ------------------------------------------------------------------------------------


def mask(layer: dict[str, Any], ends: steps.Ids) -> np.ndarray:
    """[T, T]: what each position sees of a prompt from its start."""
    query, key = np.mgrid[: len(ends), : len(ends)]
    seen = (key < ends[:, None]) & (key - query <= layer["ahead"])
    return seen & (query - key < layer["window"]) if layer["window"] else seen


@pytest.mark.parametrize("name", ["gemma2", "gemma3-odd", "odd-e", "everything"])
@pytest.mark.parametrize("ahead", [1, 4, WHOLE])
def test_masks_are_what_ends_and_layers_say(name: str, ahead: int, loaded: Load) -> None:
    model, n = with_layers(loaded(name), ahead=lambda _: ahead), 37
    random = np.random.default_rng(ahead)
    steps_ahead = np.minimum(np.arange(1, n + 1) + random.integers(0, 6, n), n)
    for ends in (ends_of(n, (5, 19), (25, 37)), np.maximum.accumulate(steps_ahead).astype(np.int32)):
        ids = prompt(model, n)
        ours = whole(model, ids, ends)
        for i, layer in enumerate(model.engine_config["layers"]):
            seen = mask(dict(layer), ends)
            scores, pattern = (ours.sites[f"blocks.{i}.attn.hook_{part}"] for part in ("attn_scores", "pattern"))
            assert np.array_equal(np.isneginf(scores), np.broadcast_to(~seen, scores.shape))
            soft = torch.softmax(torch.from_numpy(scores).double(), -1).numpy()
            assert np.abs(soft - pattern).max() < 1e-6
            values = ours.sites[f"blocks.{i}.attn.hook_v_used"]
            z = np.einsum("hts,shd->thd", pattern, values.repeat(pattern.shape[0] // values.shape[1], 1))
            assert difference(ours.sites[f"blocks.{i}.attn.hook_z"], z) is None
        assert_same(whole(model, ids, ends, max_chunk=4), ours)
        quiet = np.zeros_like(ours.logits)  # nobody looks: the methods that keep no scores
        run = (model.engine.new_sequence(), ids, None, np.arange(n, dtype=np.int32), quiet, ends)
        model.engine.step([run])
        assert same_bits(quiet, ours.logits)


@pytest.mark.parametrize("name", ["gemma3-mm", "everything"])
def test_company_threads_and_a_cached_beginning(name: str, loaded: Load) -> None:
    model = with_layers(loaded(name), ahead=lambda _: WHOLE)
    ids, ends = prompt(model, 40), ends_of(40, (4, 11), (20, 34))
    expected = whole(model, ids, ends)
    cut = 15
    sequence, other = model.engine.new_sequence(), model.engine.new_sequence()
    steps.run(model, [(sequence, ids[:cut])], ends=[ends[:cut]])
    late, causal = steps.run(model, [(sequence, ids[cut:]), (other, ids[:9])], ends=[ends[cut:] - cut, ends_of(9)])
    assert same_bits(late.logits, expected.logits[cut:])
    assert_same(causal, steps.whole(model, ids[:9]))
    threaded = copy.copy(model)
    threaded.engine = _engine.Model(model.engine_config, model.checkpoint.engine_tensors, threads=3)
    assert_same(whole(threaded, ids, ends), expected)


@pytest.mark.parametrize("name", ["gemma2-bf16", "gemma3-bf16", "gemma2-wide-bf16"])  # heads of 64 go by tiles
@pytest.mark.parametrize("n", [9, 41, 70])
def test_fast(name: str, n: int, loaded: Load, checkpoint: Callable[[str], Checkpoint]) -> None:
    """Near exact, whatever method the processor has, and looking changes no bit."""
    exact = with_layers(loaded(name), ahead=lambda _: 4)
    with gemma4.load(checkpoint(name).directory, precision="fast", threads=1) as model:
        fast = with_layers(model, ahead=lambda _: 4)
        ids, ends = prompt(exact, n), ends_of(n, (2, n - 3))
        found, expected = whole(fast, ids, ends), whole(exact, ids, ends)
        assert np.abs(found.logits - expected.logits).max() < 0.05 * np.abs(expected.logits).max()
        quiet = np.zeros_like(found.logits)
        run = (fast.engine.new_sequence(), ids, None, np.arange(n, dtype=np.int32), quiet, ends)
        fast.engine.step([run])
        assert same_bits(quiet, found.logits)


@pytest.mark.parametrize(
    "ends", [[0, 2, 3], [1, 2, 4], [3, 2, 3], [1, 1, 3], [-1, 2, 3], [2**31 - 1, 2, 3]], ids=lambda ends: str(ends)
)
def test_bad_ends(ends: list[int], loaded: Load) -> None:
    model = loaded("gemma3-mm")
    run = (model.engine.new_sequence(), prompt(model, 3), None, None, None)
    with pytest.raises(ValueError, match="ascending ends"):
        model.engine.step([(*run, np.array(ends, np.int32))])
    with pytest.raises(ValueError, match="2 of them for 3 rows"):
        model.engine.step([(*run, np.array([2, 2], np.int32))])
    with pytest.raises((TypeError, ValueError)):
        model.engine.step([(*run, np.array([1.0, 2.0, 3.0]))])
    assert run[0].length == 0
