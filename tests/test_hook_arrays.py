# SPDX-License-Identifier: Apache-2.0
"""A hook may change the numbers of the array it is given, and nothing else of it: shape, dtype, strides and memory are
what the engine copies back by. What it changes must raise, naming the site, and leave the model usable."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import gemma4
from gemma4 import _engine

IDS = np.arange(4, 40, dtype=np.int32)


def retype(z):
    z.dtype = np.float64 if z.shape[-1] % 2 == 0 else np.int32


def as_integers(z):
    z.dtype = np.int32


def swap_bytes(z):
    z.dtype = z.dtype.newbyteorder()


def shrink(z):
    z.resize((1,), refcheck=False)


def grow(z):
    z.resize((z.shape[0] * 4, *z.shape[1:]), refcheck=False)


def empty(z):
    z.resize((0,) * z.ndim, refcheck=False)


def flatten(z):
    z.shape = (z.size,)


def transposed_shape(z):
    z.shape = z.shape[::-1] if z.shape[0] != z.shape[-1] else (1, *z.shape)


def add_axis(z):
    z.shape = (1, *z.shape)


def no_strides(z):
    z.strides = (0,) * z.ndim


def repeat_first(z):
    z.strides = (0, *z.strides[1:])


def freeze(z):
    z.flags.writeable = False


MUTATIONS = [
    *((fn, "dtype|shape") for fn in (retype, as_integers, swap_bytes)),
    *((fn, "shape") for fn in (shrink, grow, empty, flatten, transposed_shape, add_axis)),
    *((fn, "strides") for fn in (no_strides, repeat_first)),
    (freeze, "writeable flag"),
]
NAMES = [fn.__name__ for fn, _ in MUTATIONS]


def ignore_return(fn):
    def hook(z, site):
        fn(z)

    return hook


def return_it(fn):
    def hook(z, site):
        fn(z)
        return z

    return hook


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("answer", [ignore_return, return_it])
@pytest.mark.parametrize(("mutate", "what"), MUTATIONS, ids=NAMES)
def test_changing_the_array_itself_raises_and_names_the_site(random_e, mutate, what, answer):
    before = random_e.forward(IDS)
    for site in ("blocks.0.hook_resid_pre", "blocks.3.attn.hook_z"):
        with pytest.raises(ValueError, match=rf"hook on {site} changed the ({what}) of the array it was given"):
            random_e.run_with_hooks(IDS, [(site, answer(mutate))])
    assert np.array_equal(random_e.forward(IDS), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("mutate", "what"), MUTATIONS, ids=NAMES)
def test_the_next_hook_never_sees_such_an_array(random_e, mutate, what):
    """Nor does a second one change what a first one returned."""
    seen = []
    hooks = [
        ("blocks.1.hook_mlp_out", lambda z, site: z * 2),
        ("blocks.1.hook_mlp_out", ignore_return(mutate)),
        ("blocks.1.hook_mlp_out", lambda z, site: seen.append(z.shape)),
    ]
    with pytest.raises(ValueError, match=rf"blocks\.1\.hook_mlp_out changed the ({what})"):
        random_e.run_with_hooks(IDS, hooks)
    assert not seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_integer_sites_key_sites_and_logits(random_moe):
    for site in (
        "blocks.0.moe.hook_expert_ids",
        "blocks.1.attn.hook_pattern",
        "blocks.0.attn.hook_k_used",
        "hook_logits",
    ):
        with pytest.raises(ValueError, match=f"hook on {site} changed the shape"):
            random_moe.run_with_hooks(IDS, [(site, ignore_return(shrink))])
    with pytest.raises(ValueError, match=r"hook_expert_ids changed the dtype .* from int32 to float32"):
        random_moe.run_with_hooks(
            IDS, [("blocks.0.moe.hook_expert_ids", lambda z, site: setattr(z, "dtype", np.float32))]
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("mutate", "what"), MUTATIONS, ids=NAMES)
def test_hooks_of_an_encoder(tiny, mutate, what):
    vision = tiny.vision
    pool = vision.config.pool
    side = 2 * pool
    positions = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2).astype(np.int32)
    image = (np.full((side * side, vision.config.d_in), 0.5, np.float32), positions)
    before = vision.encode([image])[0]
    with (
        tiny.hooks([("vision.blocks.0.hook_resid_mid", ignore_return(mutate))]),
        pytest.raises(ValueError, match=rf"vision\.blocks\.0\.hook_resid_mid changed the ({what})"),
    ):
        vision.encode([image])
    assert np.array_equal(vision.encode([image])[0], before)


def test_a_failed_hook_leaves_the_sequence_as_it_was(random_e):
    sequence = random_e.new_sequence()
    random_e.forward(IDS[:10], sequence=sequence)
    with random_e.hooks([("blocks.2.hook_resid_mid", ignore_return(shrink))]), pytest.raises(ValueError, match="shape"):
        random_e.forward(IDS[10:], sequence=sequence)
    assert len(sequence) == 10
    assert np.array_equal(random_e.forward(IDS[10:], sequence=sequence), random_e.forward(IDS)[10:])


def test_arrays_that_hooks_keep_are_theirs(random_e):
    """Kept arrays stay what they were, and may be changed in every way once the hook has returned."""
    kept, copies = [], []

    def keep(z, site):
        kept.append(z)
        copies.append(z.copy())
        if len(kept) > 1:  # the one before, whose hook returned long ago
            kept[-2].resize((1,), refcheck=False)

    logits = random_e.run_with_hooks(IDS, [("blocks.*.hook_resid_post", keep)])
    gc.collect()
    assert np.array_equal(logits, random_e.forward(IDS))
    assert np.array_equal(kept[-1], copies[-1])


class ShrinksWhenRead:
    """Becomes an array of the shape that the given one has by then: its own doing."""

    def __init__(self, given):
        self.given = given

    def __array__(self, dtype=None, copy=None):
        self.given.resize((1,), refcheck=False)
        return np.ones((1,), np.float32)


def engine_step(model, edit):
    sequence = model.engine.new_sequence()
    site = model.sites["blocks.0.hook_resid_mid"]
    model.engine.step([(sequence, IDS, None, None, None)], [(site.id, site.layer, 0, edit, None)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("mutate", "what"), MUTATIONS, ids=NAMES)
def test_the_engine_checks_without_python_help(random_e, mutate, what):
    """What gemma4/interp/hooks.py refuses first, csrc/python/callbacks.c refuses as well."""
    with pytest.raises(ValueError, match=rf"hook on blocks\.0\.hook_resid_mid changed the ({what})"):
        engine_step(random_e, mutate)
    with pytest.raises(ValueError, match=r"blocks\.0\.hook_resid_mid returned an array of shape \(1,\)"):
        engine_step(random_e, ShrinksWhenRead)
    assert isinstance(random_e.engine, _engine.Model)


def test_changing_numbers_and_returning_arrays_still_work(random_e):
    def double(z, site):
        z *= 2

    in_place = random_e.run_with_hooks(IDS, [("blocks.1.hook_mlp_out", double)])
    returned = random_e.run_with_hooks(IDS, [("blocks.1.hook_mlp_out", lambda z, site: 2 * z)])
    view = random_e.run_with_hooks(IDS, [("blocks.1.hook_mlp_out", lambda z, site: (2 * z).T.copy().T)])
    assert np.array_equal(in_place, returned) and np.array_equal(in_place, view)
    assert not np.array_equal(in_place, random_e.forward(IDS))
    assert isinstance(random_e, gemma4.Model)
