# SPDX-License-Identifier: Apache-2.0
"""Layers whose values are their keys' normed projection: the cache holds values and what RoPE turned of the keys."""

import numpy as np
import pytest
from small_models import MOE_LIKE, write_checkpoint

import gemma4

H, TURNED, SLOTS = 256, 32, 64  # a global layer's head, RoPE's pairs of it, positions for which a new cache has room
CONFIG = MOE_LIKE | {"head_dim": 64, "global_head_dim": H, "num_global_key_value_heads": 2}
LAYERS = [2, 5]
TYPES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}  # bytes of an element
EVERY_TYPE = pytest.mark.parametrize("kv_dtype", TYPES)
REST = np.r_[TURNED : H // 2, H // 2 + TURNED : H]  # elements of a head that RoPE leaves alone


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return gemma4.load(write_checkpoint(tmp_path_factory.mktemp("split-keys"), CONFIG), precision="exact", threads=2)


def saved(kv_dtype, n, h=2 * TURNED):
    """Bytes that n slots of one layer do without, of heads that keep h of H key elements."""
    return n * 2 * (H - h) * TYPES[kv_dtype]


def nudge(array, site):
    array[0, 0, -1] += 0.25  # of the first position of the call: an element that RoPE leaves alone


def keys_of(sequence, layer):
    """(keys, values) float32 [pos, K, h]; of f32 caches."""
    _, k, v = sequence._engine.state()["layers"][layer]
    return k, v


@EVERY_TYPE
def test_memory(model, prompt, kv_dtype):
    """Of two equal buffers 5/8 stays of both together; an edit that keys and values do not share brings all back."""
    small, whole = (model.new_sequence(kv_dtype=kv_dtype) for _ in range(2))
    model.forward(prompt, sequence=small)
    with model.hooks([("blocks.*.attn.hook_rot_k", nudge)]):
        model.forward(prompt, sequence=whole)
    assert whole.nbytes - small.nbytes == len(LAYERS) * saved(kv_dtype, SLOTS)
    assert saved(kv_dtype, SLOTS) / (2 * SLOTS * 2 * H * TYPES[kv_dtype]) == 3 / 8


@pytest.mark.parametrize("site", ["hook_k_normed", "hook_v_normed", "hook_rot_k"])
@EVERY_TYPE
def test_edits_that_change_nothing_leave_it_small(model, prompt, kv_dtype, site):
    plain, watched = (model.new_sequence(kv_dtype=kv_dtype) for _ in range(2))
    expected = model.forward(prompt, sequence=plain)
    with model.hooks([(f"blocks.*.attn.{site}", lambda array, site: array.copy())]):
        assert np.array_equal(model.forward(prompt, sequence=watched), expected)
    assert watched.nbytes == plain.nbytes


def test_keys_are_what_the_hooks_see(model, prompt):
    """In float32 to the bit; elsewhere as near as the type allows."""
    names = [f"blocks.{layer}.attn.{site}" for layer in LAYERS for site in ("hook_rot_k", "hook_k_used", "hook_v_used")]
    for kv_dtype, bound in (("f32", 0.0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)):
        sequence = model.new_sequence(kv_dtype=kv_dtype)
        _, cache = model.run_with_cache(prompt, names=names, sequence=sequence)
        for layer in LAYERS:
            made, used = (cache[f"blocks.{layer}.attn.{site}"] for site in ("hook_rot_k", "hook_k_used"))
            assert np.abs(made - used).max() <= bound * np.abs(made).max()
            if kv_dtype == "f32":
                stored, values = keys_of(sequence, layer)
                assert np.array_equal(stored, made)
                gain = model.weight(f"layers.{layer}.self_attn.k_norm.weight").astype(np.float32)
                assert np.array_equal(stored[..., REST], (values * gain)[..., REST])


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_an_edit_of_keys_alone_stays(model, prompt, cut):
    """Made when the key is cached, it is there for later steps: as an edit of the keys in use at every step."""
    once = model.new_sequence()
    with model.hooks([("blocks.*.attn.hook_rot_k", nudge)]):
        model.forward(prompt[:cut], sequence=once)
    rest = model.forward(prompt[cut:], sequence=once)
    always = model.new_sequence()
    with model.hooks([(f"blocks.{layer}.attn.hook_k_used", nudge) for layer in LAYERS] + [
        (f"blocks.{layer}.attn.hook_rot_k", nudge) for layer in range(6) if layer not in LAYERS]):  # fmt: skip
        model.forward(prompt[:cut], sequence=always)
    with model.hooks([(f"blocks.{layer}.attn.hook_k_used", nudge) for layer in LAYERS]):
        assert np.array_equal(model.forward(prompt[cut:], sequence=always), rest)
    untouched = model.forward(prompt)[cut:]
    assert not np.array_equal(rest, untouched)


@EVERY_TYPE
def test_saved_and_restored(model, prompt, tmp_path, kv_dtype):
    """Small ones and edited ones: the same arrays, the same continuation, and as small as before."""
    sizes = []
    for hooks in ([], [("blocks.2.attn.hook_v_normed", nudge)]):
        first = model.new_sequence(kv_dtype=kv_dtype)
        with model.hooks(hooks):
            model.forward(prompt[:8], sequence=first)
        again = model.restore(first.save(tmp_path / "saved.npz"))
        sizes.append(again.nbytes)
        ours, theirs = (s._engine.state()["layers"] for s in (first, again))
        for layer in range(6):
            for a, b in zip(ours[layer][1:], theirs[layer][1:], strict=True):
                assert np.array_equal(a, b)
        rest = [model.forward(prompt[8:], sequence=s) for s in (first, again)]
        assert np.array_equal(*rest)
    assert sizes[1] - sizes[0] == saved(kv_dtype, SLOTS)


@EVERY_TYPE
def test_any_keys_can_be_restored(model, prompt, kv_dtype):
    """Keys of another origin, which values do not give, are kept as they are."""
    first, same, other = (model.new_sequence(kv_dtype=kv_dtype) for _ in range(3))
    model.forward(prompt, sequence=first)
    state = first._engine.state()
    same._engine.load_state(state)
    _, k, _ = state["layers"][2]
    k.view(np.uint8)[7, 1, -1] ^= 1
    other._engine.load_state(state)
    assert np.array_equal(other._engine.state()["layers"][2][1], k)
    assert other.nbytes - same.nbytes == saved(kv_dtype, SLOTS)


def test_forks_and_truncation(model, prompt):
    """A fork that is edited leaves its origin small and as it was; emptied, it is small again."""
    origin = model.new_sequence()
    model.forward(prompt[:6], sequence=origin, logits=None)
    fork, small = origin.fork(), origin.nbytes
    with model.hooks([("blocks.*.attn.hook_rot_k", nudge)]):
        edited = model.forward(prompt[6:], sequence=fork)
    assert fork.nbytes == small + len(LAYERS) * saved("f32", SLOTS) and origin.nbytes == small
    assert np.array_equal(model.forward(prompt[6:], sequence=origin), model.forward(prompt)[6:])
    fork.truncate(6)
    assert not np.array_equal(edited, model.forward(prompt[6:], sequence=fork))
    fork.truncate(6)
    assert np.array_equal(model.forward(prompt[6:], sequence=fork), model.forward(prompt)[6:])
    fork.truncate(0)
    assert np.array_equal(model.forward(prompt, sequence=fork), model.forward(prompt)) and fork.nbytes == small


def test_a_long_context_grows(model):
    """Beyond the first slots; many positions at once, forty, one."""
    ids = np.random.default_rng(0).integers(3, 320, 200).astype(np.int32)
    expected = model.forward(ids)
    sequence = model.new_sequence()
    for first in (0, 40, 80, 120, *range(160, 200)):
        piece = ids[first : first + (40 if first < 160 else 1)]
        assert np.array_equal(model.forward(piece, sequence=sequence), expected[first : first + len(piece)])
