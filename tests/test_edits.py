# SPDX-License-Identifier: Apache-2.0
"""Edits as data: each does what a Python function does, to the bit, wherever a hook can stand."""

import json
import re
import warnings
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFWriter
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4.edits import (
    Ablate,
    Add,
    Clamp,
    ForbidExperts,
    ForceExperts,
    FromPrompt,
    KnockOut,
    Patch,
    ProjectOut,
    Scale,
    ScalePerLayerEmbedding,
    Set,
    Steer,
    load_control_vector,
    load_edits,
    save_edits,
)
from gemma4.edits.files import SavedCache
from gemma4.errors import FormatError
from gemma4.interp.hooks import NaNWarning
from gemma4.load.safetensors import SafetensorsFile

TEXT = "Once upon a time there was a little girl named Lily who liked to play"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module", params=["tiny-e", "tiny-moe"])
def model(request):
    return gemma4.load(request.param)


@pytest.fixture(scope="module")
def tiny():
    return gemma4.load("tiny-e")


@pytest.fixture(scope="module")
def moe():
    return gemma4.load("tiny-moe")


def vector(n):
    return RNG.standard_normal(n).astype(np.float32)


ALL = slice(None)
ONE_RESID, LENGTH = "blocks.1.hook_resid_post", 17  # of TEXT
RESID, Z, SCORES = "blocks.2.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.attn.hook_attn_scores"


def hook(names, new, at=ALL):
    """A hook that replaces array[at]."""

    def fn(array, site):
        array[at] = new(array[at])

    return [(names, fn)]


def times(factor):
    return lambda x: x * np.float32(factor)


def plus(v, factor=1.0):
    return lambda x: x + np.float32(factor) * v


def fill(value):
    return lambda x: np.broadcast_to(value, x.shape)


def outside(low, high):
    return lambda x: np.clip(x, np.float32(low), np.float32(high))


def without(v, factor):
    """x - factor * (x.v)/(v.v) * v in the engine's order: products are summed in double, one after the other."""

    def new(x):
        dot = np.add.accumulate(x.astype(np.float64) * v.astype(np.float64), axis=-1)[..., -1:]
        norm = np.add.accumulate(v.astype(np.float64) ** 2)[-1]
        return x - (factor * dot / norm).astype(np.float32) * v

    return new


def mean_of(array):
    return array.mean(0, dtype=np.float64).astype(np.float32)


def cases(model):
    """name -> (edit, hooks that do the same)."""
    d, other = model.config.d_model, model.run_with_cache("Two cats sat on a mat and looked at a dog")[1]
    v, rows, held = vector(d), vector(3 * d).reshape(3, d), slice(0, len(other.positions))
    resid, z = other[RESID], other[Z]
    steered = [one for i in (1, 3) for one in hook(f"blocks.{i}.hook_resid_post", plus(v, 4))]
    return {
        "add": (Add(RESID, v, 1.5), hook(RESID, plus(v, 1.5))),
        "add rows": (Add(RESID, rows, pos=[5, 0, 2]), hook(RESID, plus(rows), [5, 0, 2])),
        "scale": (Scale("blocks.*.hook_attn_out", 0.3), hook("blocks.*.hook_attn_out", times(0.3))),
        "neurons": (
            Scale("blocks.1.mlp.hook_post", 0.25, index=slice(3, 7)),
            hook("blocks.1.mlp.hook_post", times(0.25), (ALL, slice(3, 7))),
        ),
        "set": (Set("blocks.0.hook_mlp_out", 0), hook("blocks.0.hook_mlp_out", fill(0))),
        "set last": (Set(RESID, v, pos=-1), hook(RESID, fill(v), [-1])),
        "clamp": (Clamp(RESID, -1, 2, pos=slice(1, -2)), hook(RESID, outside(-1, 2), slice(1, -2))),
        "project out": (ProjectOut(RESID, v), hook(RESID, without(v, 1))),
        "reflect": (ProjectOut(RESID, v, 2), hook(RESID, without(v, 2))),
        "steer": (Steer(v, [1, 3], 4), steered),
        "steer elsewhere": (Steer(v, 0, -2, at="hook_resid_mid"), hook("blocks.0.hook_resid_mid", plus(v, -2))),
        "patch": (Patch(RESID, other, pos=[1, 4]), hook(RESID, fill(resid[[1, 4]]), [1, 4])),
        "patch all": (Patch(Z, other), hook(Z, fill(z), held)),
        "patch from elsewhere": (Patch(RESID, other, pos=-1, source_pos=-2), hook(RESID, fill(resid[-2]), [-1])),
        "patch an array": (Patch(Z, z[:2, :1], pos=[3, 1], head=0), hook(Z, fill(z[:2, 0]), ([3, 1], 0))),
        "ablate head": (Ablate(head=(1, 2), pos=[1, 5]), hook(Z, fill(0), ([1, 5], 2))),
        "ablate to mean": (Ablate(RESID, mean=other), hook(RESID, fill(mean_of(resid)))),
        "ablate head to mean": (Ablate(head=(1, 1), mean=[other]), hook(Z, fill(mean_of(z)[1]), (ALL, 1))),
        "resample": (Ablate(RESID, resample=other), hook(RESID, fill(resid), held)),
        "knock out": (KnockOut((slice(4, None), "pos 1-2"), 0), hook(SCORES, fill(-np.inf), np.s_[:, 4:, 1:3])),
        "knock out of a head": (KnockOut(("pos 6", 2), 0, heads=1), hook(SCORES, fill(-np.inf), np.s_[1, 6, 2])),
    }


NAMES = ["add", "add rows", "scale", "neurons", "set", "set last", "clamp", "project out", "reflect", "steer"]
NAMES += ["steer elsewhere", "patch", "patch all", "patch from elsewhere", "patch an array", "ablate head"]
NAMES += ["ablate to mean", "ablate head to mean", "resample", "knock out", "knock out of a head"]


def test_every_case_is_tried(model):
    assert sorted(cases(model)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_edit_equals_the_function(model, name):
    edit, hooks = cases(model)[name]
    ids = model.to_tokens(TEXT)
    plain = model.forward(ids)
    with model.edit(edit):
        logits, cache = model.run_with_cache(ids, "*")
        last = model.forward(ids, logits="last")
    with model.hooks(hooks):
        expected, by_hooks = model.run_with_cache(ids, "*")
    assert not np.array_equal(logits, plain)
    assert np.array_equal(logits, expected)
    assert np.array_equal(last, expected[-1:])
    for site in cache:
        assert np.array_equal(cache[site], by_hooks[site], equal_nan=True), site


@pytest.mark.parametrize("name", ["add", "clamp", "ablate head to mean", "knock out"])
def test_edit_equals_the_function_while_generating(model, name):
    edit, hooks = cases(model)[name]
    if name == "clamp":  # the function's slice would count from the end of each step
        edit, hooks = (
            Clamp("blocks.*.hook_mlp_out", -0.1, 0.1),
            [("blocks.*.hook_mlp_out", lambda x, site: np.clip(x, np.float32(-0.1), np.float32(0.1)))],
        )
    if name == "knock out":

        def cut(scores, site):
            scores[:, site.positions >= 4, 1:3] = -np.inf

        hooks = [("blocks.0.attn.hook_attn_scores", cut)]
    options = {"max_tokens": 8, "temperature": 0, "capture": "blocks.*.hook_resid_post"}
    by_data, by_function = (model.generate(TEXT, hooks=given, **options) for given in ([edit], hooks))
    assert by_data.text == by_function.text
    for site in by_data.cache:
        assert np.array_equal(by_data.cache[site], by_function.cache[site]), site


def test_a_long_prompt_is_edited_in_chunks(tiny):
    ids = np.resize(tiny.to_tokens(TEXT), 700)
    v, pos = vector(tiny.config.d_model), [3, 511, 512, 699]

    def add(x, site):
        x[pos] += v

    with tiny.edit(Add("blocks.2.hook_resid_post", v, pos=pos)):
        by_data = tiny.forward(ids, logits="last")
    assert np.array_equal(by_data, tiny.run_with_hooks(ids, [("blocks.2.hook_resid_post", add)], logits="last"))


def test_order_is_the_given_one(tiny):
    v = vector(tiny.config.d_model)
    name = "blocks.2.hook_resid_post"

    def halve(x, site):
        x *= np.float32(0.5)

    for hooks, expected in (
        ([Add(name, v), (name, halve)], lambda x: (x + v) * np.float32(0.5)),
        ([(name, halve), Add(name, v)], lambda x: x * np.float32(0.5) + v),
        ([Add(name, v), Scale(name, 0.5), (name, halve)], lambda x: (x + v) * np.float32(0.25)),
    ):
        before = tiny.run_with_cache(TEXT, name)[1][name]
        with tiny.hooks(hooks):
            assert np.array_equal(tiny.run_with_cache(TEXT, name)[1][name], expected(before))
    with tiny.edit(Scale(name, 0.5)), tiny.edit(Add(name, v)):  # outer blocks first
        assert np.array_equal(tiny.run_with_cache(TEXT, name)[1][name], before * np.float32(0.5) + v)


def test_scope_by_prompt(tiny):
    v = vector(tiny.config.d_model)
    texts = [TEXT, "A dog", "The sun was"]
    plain = tiny.forward(texts)
    edit = Steer(v, 1, 3, prompts=[1])
    with tiny.edit(edit):
        logits = tiny.forward(texts)
    with tiny.edit(Steer(v, 1, 3)):
        alone = tiny.forward(texts[1])
    assert np.array_equal(logits[0], plain[0]) and np.array_equal(logits[2], plain[2])
    assert np.array_equal(logits[1], alone)
    together = tiny.generate(texts, max_tokens=5, temperature=0, hooks=[edit])
    one = tiny.generate(texts[1], max_tokens=5, temperature=0, hooks=[Steer(v, 1, 3)])
    assert [x.text for x in together] == [
        tiny.generate(texts[0], max_tokens=5, temperature=0).text,
        one.text,
        tiny.generate(texts[2], max_tokens=5, temperature=0).text,
    ]


def test_scope_by_step_and_position(tiny):
    """Step n runs the n-th generated token, which stands at position n_prompt + n - 1."""
    v, name = vector(tiny.config.d_model), "blocks.1.hook_resid_post"
    options = {"max_tokens": 6, "temperature": 0, "capture": name}
    n = len(tiny.to_tokens(TEXT))
    plain = tiny.generate(TEXT, **options).cache[name]
    by_step = tiny.generate(TEXT, hooks=[Add(name, v, steps=2)], **options).cache[name]
    by_pos = tiny.generate(TEXT, hooks=[Add(name, v, pos=n + 1)], **options).cache[name]
    assert np.array_equal(by_step, by_pos)
    assert np.array_equal(by_step[: n + 1], plain[: n + 1]) and not np.array_equal(by_step[n + 1], plain[n + 1])
    last = tiny.generate(TEXT, hooks=[Add(name, v, pos=-1)], **options).cache[name]
    assert np.array_equal(last[: n - 1], plain[: n - 1]) and np.array_equal(last[n - 1], plain[n - 1] + v)


def test_negative_positions_count_from_the_prompt_while_generating(tiny):
    v, name = vector(tiny.config.d_model), "blocks.1.hook_resid_post"
    options = {"max_tokens": 6, "temperature": 0, "capture": name}
    n = len(tiny.to_tokens(TEXT))
    by_end = tiny.generate(TEXT, hooks=[Add(name, v, pos=[-1, -3])], **options)
    by_place = tiny.generate(TEXT, hooks=[Add(name, v, pos=[n - 1, n - 3])], **options)
    assert np.array_equal(by_end.cache[name], by_place.cache[name])


def test_positions_are_those_of_the_sequence(tiny):
    """A continued sequence goes on counting; there, -1 is the last new token."""
    v, name = vector(tiny.config.d_model), "blocks.1.hook_resid_post"
    ids = tiny.to_tokens(TEXT)
    for pos, rows in (
        (8, [3]),
        (-1, [-1]),
        (len(ids) - 2, [-2]),
        ([5, 7], [0, 2]),
        (slice(6, None, 2), slice(1, None, 2)),
    ):
        sequence = tiny.new_sequence()
        tiny.forward(ids[:5], sequence=sequence)
        plain = tiny.run_with_cache(ids[5:], name, sequence=sequence.fork())[1][name]
        with tiny.edit(Add(name, v, pos=pos)):
            edited = tiny.run_with_cache(ids[5:], name, sequence=sequence)[1][name]
        plain[rows] += v
        assert np.array_equal(edited, plain), pos


def test_slices_of_positions(tiny):
    v, name = vector(tiny.config.d_model), "blocks.1.hook_resid_post"
    plain = tiny.run_with_cache(TEXT, name)[1][name]
    for where in (
        slice(0, None, 2),
        slice(-99, None, 2),
        slice(-98, None, 2),
        slice(1, -2, 3),
        slice(None, 4),
        slice(3, 99),
    ):
        with tiny.edit(Add(name, v, pos=where)):
            edited = tiny.run_with_cache(TEXT, name)[1][name]
        expected = plain.copy()
        expected[where] += v
        assert np.array_equal(edited, expected), where


def test_a_value_of_one_row_is_for_all(tiny):
    v, name = vector(tiny.config.d_model), "blocks.1.hook_resid_post"
    for value in (v, v[None], np.broadcast_to(v, (1, len(v)))):
        with tiny.edit(Set(name, value)):
            assert (tiny.run_with_cache(TEXT, name)[1][name] == v).all()


def test_the_end_of_a_cache_of_some_positions(tiny):
    name = "blocks.1.hook_resid_post"
    _, cache = tiny.run_with_cache(TEXT, name, pos=[2, 3, 6])
    with tiny.edit(Patch(name, cache, pos=0, source_pos=-1)):
        assert np.array_equal(tiny.run_with_cache(TEXT, name)[1][name][0], cache[name][2])
    with pytest.raises(ValueError, match="no position"), tiny.edit(Patch(name, cache, pos=0, source_pos=-2)):
        pass


def test_edits_that_differ_somewhere_do_not_contradict(tiny):
    d = tiny.config.d_model
    name, z, used = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.attn.hook_v_used"
    n_heads = tiny.config.n_heads
    compatible = [
        [Ablate(head=(1, 0)), Ablate(head=(1, 1))],
        [Set(name, 0, index=slice(0, 4)), Set(name, 1, index=slice(4, 8))],
        [Set(name, 0, pos=1), Set(name, 1, pos=2)],
        [Set(name, 0, steps=0), Set(name, 1, steps=[1, 2])],
        [Set(name, 0, prompts=0), Set(name, 1, prompts=1)],
        [Set(name, 0), Add(name, np.ones(d))],
        [Set(name, 0), Set("blocks.2.hook_resid_post", 0)],
        # the first keeps a part: channels, a position, a step, a head, a prompt, a layer
        [Set(name, 0, index=slice(0, 5)), Set(name, 1, index=4)],
        [Set(name, 0, pos=[1, 2]), Set(name, 1, pos=slice(2, 4))],
        [Set(name, 0, steps=[0, 1]), Set(name, 1, steps=1)],
        [Ablate(z), Set(z, 1, head=2)],
        [Ablate(z, pos=[0, 1]), Set(z, 1, head=[0, 1, 2, 3], pos=1), Set(z, 1, head=[0, 1], pos=0)],
        [Set(z, 0, index=slice(0, 8)), Set(z, 1, index=slice(0, 4)), Set(z, 1, head=0)],
        [Ablate(name), Set(name, 1, prompts=1)],
        [Ablate("blocks.*.hook_resid_post"), Set(name, 1)],
        [Set(used, 0), Set(used, 1, steps=1)],
        [Set(used, 0, pos=[0, 1]), Set(used, 1, pos=1)],
    ]
    for edits in compatible:
        tiny.generate([TEXT, "A dog"], max_tokens=4, hooks=edits)
    for edits in (
        [Set(name, 0, index=4), Set(name, 1, index=slice(0, 5))],
        [Set(name, 0, pos=[1, 2]), Set(name, 1, pos=slice(1, 4))],
        [Set(name, 0, steps=1), Set(name, 1, steps=[0, 1])],
        [Set(z, 0, head=1), Ablate(head=(1, 1))],
        [Ablate(z), Set(z, 1, head=range(n_heads))],  # together
        [Ablate(z), *(Set(z, 1, head=head) for head in range(n_heads))],
        [Ablate(z), Set(z, 1, index=slice(0, 7)), Set(z, 1, index=slice(7, None))],
        [Set(name, 0, pos=[1, 2]), Set(name, 1, pos=2), Set(name, 1, pos=1)],
        [Set(name, 0, prompts=0), Set(name, 1)],
        [Set(name, 0), Set(name, 1, prompts=[0, 1])],
        [Set(used, 0, steps=1), Set(used, 1)],
        [Set(name, 0), Set("blocks.*.hook_resid_post", 1)],
    ):
        with pytest.raises(ValueError, match="both set"):
            tiny.generate([TEXT, "A dog"], max_tokens=4, hooks=edits)


def test_edits_of_which_something_is_left_act(tiny):
    """A later edit sets a part of what an earlier one changes, or goes on from it."""
    v, z = vector(tiny.config.d_model), Z
    for edits in (
        [Steer(v, 1), Set(ONE_RESID, 0, pos=3)],
        [Steer(v, [1, 2]), Set(ONE_RESID, 0)],
        [Set(ONE_RESID, 0), Steer(v, 1)],
        [Scale(z, 2), Ablate(head=(1, 2))],
        [Steer(v, 1), Set(ONE_RESID, 0, prompts=0)],
        [Steer(v, 1), Set(ONE_RESID, 0, steps=0)],
        [Set(SCORES, 1, pos=3), KnockOut((3, 1), 0)],
        [KnockOut((slice(2, 5), 1), 0), Set(SCORES, 1, pos=3)],
        [Steer(v, 1), Patch(ONE_RESID, FromPrompt(0), pos=-1)],
        [Add("hook_logits", -np.inf, index=7)],
    ):
        assert tiny.generate([TEXT, "A dog"], max_tokens=3, temperature=0, hooks=edits)


def test_masked_keys_stay_masked(tiny):
    """Edits of scores and patterns change the keys that a query sees; a function may change all."""
    pattern = SCORES.replace("attn_scores", "pattern")
    with tiny.edit([Clamp(SCORES, -1, 1), Set(pattern, 0.25, pos=slice(2, 4))]):
        _, cache = tiny.run_with_cache(TEXT, [SCORES, pattern])
    later = np.triu(np.ones(cache[SCORES].shape[1:], np.bool_), 1)
    assert np.isneginf(cache[SCORES][:, later]).all() and (np.abs(cache[SCORES][:, ~later]) <= 1).all()
    assert not cache[pattern][:, later].any() and (cache[pattern][:, 2:4][:, ~later[2:4]] == 0.25).all()


def test_logits_that_an_edit_made_nan_are_reported(tmp_path):
    model = gemma4.load(write_checkpoint(tmp_path / "m", E_LIKE))
    with model.edit(Scale("hook_embed", 1e38)), pytest.warns(NaNWarning, match="NaN at hook_logits"):
        assert np.isnan(model.forward([2, 5, 6])).any()
    with model.edit(Steer(vector(48), 1)), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward([2, 5, 6])


def test_blocks_open_again_and_close_in_any_order(tiny):
    plain, v = tiny.forward(TEXT, logits="last"), vector(tiny.config.d_model)

    def with_edit(*blocks):
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block)
            return tiny.forward(TEXT, logits="last")

    first, second = tiny.edit(Steer(v, 1)), tiny.edit(Scale(RESID, 2))
    once, alone, both = with_edit(first), with_edit(second), with_edit(first, second)
    assert np.array_equal(with_edit(first), once) and np.array_equal(with_edit(first, second), both)
    assert not np.array_equal(with_edit(first, first), once)
    steps = []
    for block in (first, second):  # as generators do that are read in turn

        def opened(block=block):
            with block:
                yield

        steps.append(opened())
        next(steps[-1])
    assert np.array_equal(tiny.forward(TEXT, logits="last"), both)
    steps[0].close()
    assert np.array_equal(tiny.forward(TEXT, logits="last"), alone) and not np.array_equal(alone, plain)
    steps[1].close()
    assert np.array_equal(tiny.forward(TEXT, logits="last"), plain)
    attached = tiny.attach(gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post"))
    for n in (1, 2):
        with attached as record:
            tiny.forward(TEXT)
        assert len(record.passes) == n


def test_queries_without_keys_are_found(tiny):
    """Any knock-outs together, key by key: the first query that sees none of those that are left is named."""
    rng, n, window = np.random.default_rng(0), 12, tiny.sites.window(0)
    ids, found = rng.integers(8, 99, n), set[int | None]()
    for _ in range(60):
        cut = np.zeros((n, n), np.bool_)
        edits = []
        for _ in range(rng.integers(1, 4)):
            last, ends = int(rng.integers(0, n)), sorted(rng.integers(0, n + 1, 2).tolist())
            queries = [last, slice(last, None), slice(None)][rng.integers(3)]
            keys = slice(ends[0], ends[1] + 1)
            edits.append(KnockOut((queries, keys), 0) if rng.random() < 0.9 else KnockOut((last, last), 0))
            cut[edits[-1].edge[0], edits[-1].edge[1]] = True
        blind = [q for q in range(n) if cut[q, max(0, q - window + 1) : q + 1].all()]
        found.add(blind[0] if blind else None)
        with tiny.edit(edits):
            if blind:
                with pytest.raises(ValueError, match=rf"position {blind[0]} would keep no key"):
                    tiny.forward(ids)
            else:
                assert np.isfinite(tiny.forward(ids)).all()
    assert None in found and len(found) > 4


def test_a_window_counts_when_keys_are_cut(tiny):
    """Layer 0 sees the last keys alone: without those a query has none, though earlier ones are left."""
    window = tiny.sites.window(0)
    ids = np.resize(tiny.to_tokens(TEXT), window + 9)
    seen = slice(len(ids) - window, None)
    with pytest.raises(ValueError, match="would keep no key"), tiny.edit(KnockOut((-1, seen), 0)):
        tiny.forward(ids, logits=None)
    with tiny.edit(KnockOut((-1, slice(len(ids) - window + 1, None)), 0)):
        assert np.isfinite(tiny.forward(ids, logits="last")).all()


def test_rows_for_cached_values(tiny):
    name = "blocks.0.attn.hook_v_used"
    _, cache = tiny.run_with_cache("A small dog ran up the hill", name)
    rows = cache[name][[4, 0, 2]]

    def put(values, site):
        values[[5, 1, 2]] = rows

    with tiny.edit(Set(name, rows, pos=[5, 1, 2])):
        by_data = tiny.forward(TEXT)
    assert np.array_equal(by_data, tiny.run_with_hooks(TEXT, [(name, put)]))


def test_edits_of_cached_keys(tiny):
    name = "blocks.0.attn.hook_v_used"

    def zero(values, site):
        values[[1, 2, 5]] = 0

    with tiny.edit(Set(name, 0, pos=[5, 1, 2])):
        by_data = tiny.forward(TEXT)
    assert np.array_equal(by_data, tiny.run_with_hooks(TEXT, [(name, zero)]))
    assert not np.array_equal(by_data, tiny.forward(TEXT))


def test_per_layer_embeddings_can_be_taken_away(tiny):
    def none(x, site):
        x *= np.float32(0)

    with tiny.edit(ScalePerLayerEmbedding(0, [1, 2])):
        by_data = tiny.forward(TEXT)
    hooks = [(f"blocks.{i}.hook_ple_in", none) for i in (1, 2)]
    assert np.array_equal(by_data, tiny.run_with_hooks(TEXT, hooks))


def test_forbidden_experts_are_not_chosen(moe):
    ids = "blocks.*.moe.hook_expert_ids"
    chosen = moe.run_with_cache(TEXT, ids)[1]
    layer = next(iter(chosen)).split(".")[1]
    favourite = int(np.bincount(chosen[f"blocks.{layer}.moe.hook_expert_ids"].ravel()).argmax())
    with moe.edit(ForbidExperts(favourite)):
        now = moe.run_with_cache(TEXT, ids)[1]
    assert all((now[name] != favourite).all() for name in now)
    assert any((chosen[name] == favourite).any() for name in chosen)


def only(experts):
    """A hook on the logits that leaves these experts."""

    def fn(logits, site):
        logits[:, [i for i in range(logits.shape[-1]) if i not in experts]] = -np.inf

    return fn


def test_forced_experts_are_chosen(moe):
    """Exactly these, with the router's probabilities divided by their sum; with fewer, the others weigh nothing."""
    k, n = moe.config.top_k_experts, moe.config.n_experts
    names = ["blocks.1.moe.hook_expert_ids", "blocks.1.moe.hook_expert_weights", "blocks.1.moe.hook_router_logits"]
    logits = moe.run_with_cache(TEXT, names)[1][names[2]].astype(np.float64)
    scale = moe.weight("layers.1.router.per_expert_scale")
    for forced in (range(n - k, n), [n - 1, 0][:k], [-1]):
        chosen = sorted(expert % n for expert in forced)
        with moe.edit(ForceExperts(forced, 1)):
            by_data, cache = moe.run_with_cache(TEXT, names)
        assert np.array_equal(by_data, moe.run_with_hooks(TEXT, [(names[2], only(chosen))]))
        ids, weights = cache[names[0]], cache[names[1]]
        assert (np.sort(ids[:, : len(chosen)]) == chosen).all() and (weights[:, len(chosen) :] == 0).all()
        share = np.exp(logits) / np.exp(logits[:, chosen]).sum(-1, keepdims=True)
        expected = np.take_along_axis(share, ids, 1) * scale[ids]
        np.testing.assert_allclose(weights[:, : len(chosen)], expected[:, : len(chosen)], rtol=1e-5)


def test_forced_experts_have_a_scope(moe, tmp_path):
    name = "blocks.1.moe.hook_expert_ids"
    options = {"max_tokens": 5, "temperature": 0, "capture": name}
    plain = moe.generate(TEXT, **options).cache[name]
    n = len(moe.to_tokens(TEXT))
    edits = [ForceExperts([0, 1], 1, pos=2), ForceExperts([2], 1, pos=-1), ForbidExperts([0, 1], 1, steps=2)]
    edits.append(ForceExperts([3], 1, steps=3))
    edits = load_edits(save_edits(edits, tmp_path / "e.safetensors"))
    forced = moe.generate(TEXT, hooks=edits, **options).cache[name]
    assert np.array_equal(forced[:2], plain[:2]) and np.array_equal(forced[3 : n - 1], plain[3 : n - 1])
    assert sorted(forced[2]) == [0, 1] and forced[n - 1, 0] == 2
    assert not {0, 1} & set(forced[n + 1]) and forced[n + 2, 0] == 3


def test_saved_edits_do_the_same(model, tmp_path):
    ids = model.to_tokens(TEXT)
    for name, (edit, _) in cases(model).items():
        path = tmp_path / f"{name}.safetensors"
        assert save_edits([edit, Steer(np.zeros(model.config.d_model), 0)], path) == path
        again = load_edits(path)
        assert [type(one) for one in again] == [type(edit), Steer]
        with model.edit(edit):
            expected = model.forward(ids)
        with model.edit(again):
            assert np.array_equal(model.forward(ids), expected), name


def test_saved_edits_name_the_model_of_their_caches(random_e, tmp_path):
    name = "blocks.2.hook_resid_post"
    caches = [random_e.run_with_cache(ids, name)[1] for ids in ([2, 5, 6], [2, 7, 8])]
    edits = [Patch(name, caches[0]), Ablate(name, mean=caches)]
    first = save_edits(edits, tmp_path / "e.safetensors")
    again = save_edits(load_edits(first, model=random_e), tmp_path / "again.safetensors")
    with gemma4.load(write_checkpoint(tmp_path / "m", E_LIKE, seed=1)) as other:
        for path in (first, again):
            assert len(load_edits(path)) == len(load_edits(path, model=random_e)) == 2
            words = f"edit 0: its cache is of another model .*{random_e.fingerprint}.*{other.fingerprint}"
            with pytest.raises(FormatError, match=words):
                load_edits(path, model=other)
        unnamed = changed(first, tmp_path / "u.safetensors", f', "model": "{random_e.fingerprint}"', "")
        assert len(load_edits(unnamed, model=other)) == 2
    for wrong in ("3", "null", "[]"):
        path = changed(first, tmp_path / "w.safetensors", f'"{random_e.fingerprint}"', wrong)
        with pytest.raises(FormatError, match="named by its fingerprint"):
            load_edits(path)


def changed(source, path, old, new):
    """The file with other text in its list of edits."""
    from safetensors.numpy import save_file

    file = SafetensorsFile(source)
    assert old in file.metadata["edits"]
    edits = file.metadata["edits"].replace(old, new)
    save_file({name: file.array(name) for name in file.tensors}, path, file.metadata | {"edits": edits})
    file.close()
    return path


def test_saved_scope(tmp_path, tiny):
    edit = Clamp("blocks.1.hook_mlp_out", high=0.5, pos=slice(-4, None, 2), steps=[0, 2], prompts=1)
    save_edits(edit, tmp_path / "e.safetensors")
    (again,) = load_edits(tmp_path / "e.safetensors")
    assert (again.pos, again.steps, again.prompts, again.low, again.high) == (
        slice(-4, None, 2), (0, 2), 1, -np.inf, 0.5,
    )  # fmt: skip
    with pytest.raises(FileExistsError):
        save_edits(edit, tmp_path / "e.safetensors")
    with pytest.raises(TypeError, match="predicate"):
        save_edits(Scale(lambda name: True, 2), tmp_path / "f.safetensors")


def test_numbers_of_numpy_are_saved(tmp_path):
    one, two = np.int64(1), np.int64(2)
    edits = [
        Scale("blocks.1.hook_mlp_out", np.float32(0.5), pos=slice(one, None, two), index=slice(one, two), steps=one),
        Scale("blocks.1.hook_mlp_out", 0, pos=slice(0, 1 << 80), index=np.int32(3)),
        Patch("blocks.1.hook_mlp_out", FromPrompt(one), pos=np.array([1, 2]), source_pos=[two, one]),
        KnockOut((slice(two, None), one), layers=one, heads=np.array([1])),
    ]
    again = load_edits(save_edits(edits, tmp_path / "e.safetensors"))
    assert [edit.pos for edit in again] == [slice(1, None, 2), edits[1].pos, (1, 2), slice(2, None)]
    assert again[0].index == slice(1, 2) and again[2].value == FromPrompt(1) and again[3].edge == edits[3].edge


def test_an_edge_as_text_has_either_order(tiny):
    """As an edge of a graph: only the later position can be the query."""
    for given, queries, keys in (
        (("pos 5", "pos 9"), 9, 5),
        (("pos 9", "pos 5"), 9, 5),
        (("pos 2-3", "pos 7-8"), (7, 8), (2, 3)),
        (("pos -1", "pos 4"), -1, 4),
        (("pos 5", "pos 5"), 5, 5),
    ):
        assert KnockOut(edge=given).edge == (queries, keys)
    with tiny.edit(KnockOut(edge=("pos 5", "pos 9"), layers=range(4))):
        _, cache = tiny.run_with_cache(TEXT, "blocks.2.attn.hook_pattern")
    assert not cache["pattern", 2][:, 9, 5].any() and cache["pattern", 2][:, 9, 4].all()


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"kind": "KnockOut", "edge": ["pos 1-999999999", 0]}, "positions, more than any model"),
        ({"kind": "KnockOut", "edge": ["pos 1-" + "9" * 5000, 0]}, "text like"),
        ({"kind": "Scale", "site": "hook_embed", "factor": 2, "pos": {"slice": ["a", None]}}, "ends of a slice"),
        ({"kind": "Scale", "site": "hook_embed", "factor": 2, "pos": {"slice": [0.5, None]}}, "ends of a slice"),
        ({"kind": "Scale", "site": "hook_embed", "factor": 2, "index": {"slice": [[], None]}}, "ends of a slice"),
        ({"kind": "Scale", "site": "hook_embed", "factor": 2, "index": [1, 2]}, "index must be"),
        ({"kind": "Scale", "site": "hook_embed", "factor": 2, "pos": 1 << 70}, "whole numbers"),
        ({"kind": "Patch", "site": "hook_embed", "value": {"cache": "c", "sites": ["hook_embed"]}}, "integers [pos]"),
    ],
)
def test_hostile_files_of_edits(tmp_path, row, complaint):
    from safetensors.numpy import save_file

    tensors = {"c.hook_embed": np.zeros((2, 128), np.float32), "c.positions": np.zeros((2, 1), np.int64)}
    metadata = {"format": "gemma4.edits", "version": "1", "edits": json.dumps([row])}
    save_file(tensors, tmp_path / "e.safetensors", metadata)
    with pytest.raises(gemma4.FormatError, match=re.escape(complaint)):
        load_edits(tmp_path / "e.safetensors")


def test_deep_nesting_in_files_of_edits(tmp_path):
    from safetensors.numpy import save_file

    row = '{"kind": "Scale", "site": ' + "[" * 900 + "]" * 900 + "}"
    save_file({}, tmp_path / "e.safetensors", {"format": "gemma4.edits", "version": "1", "edits": f"[{row}]"})
    with pytest.raises(gemma4.FormatError, match="nested too deeply"):
        load_edits(tmp_path / "e.safetensors")


@pytest.mark.parametrize("kind", [Patch, lambda site, cache: Ablate(site, mean=cache)])
def test_caches_whose_arrays_do_not_fit(tiny, kind):
    """As a damaged file may hold them."""
    name, d = "blocks.1.hook_resid_post", tiny.config.d_model
    for shape in ((2, d), (4, d), (3, d + 1), (3, 1, d), ()):
        cache = SavedCache(np.arange(3), {name: np.zeros(shape, np.float32)}, "")
        with (
            pytest.raises(ValueError, match=r"has shape .* at 3 positions, expected \[3, 128\]"),
            tiny.edit(kind(name, cache)),
        ):
            pass


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace('"Clamp"', '"Clomp"'), "unknown kind 'Clomp'"),
        (lambda text: text.replace('"high"', '"hihg"'), "no 'hihg'"),
        (lambda text: text.replace("0.5", '"much"'), "edit 0"),
        (lambda text: text[:-3], "no JSON"),
        (lambda text: '{"a": 1}', "JSON objects"),
        (lambda text: text.replace("0.5", '{"tensor": "gone"}'), "no tensor 'gone'"),
    ],
)
def test_damaged_files_of_edits(tmp_path, change, complaint):
    from safetensors.numpy import save_file

    text = '[{"kind": "Clamp", "site": "blocks.1.hook_mlp_out", "high": 0.5}]'
    metadata = {"format": "gemma4.edits", "version": "1", "edits": text}
    path = tmp_path / "e.safetensors"
    save_file({}, path, metadata)
    assert len(load_edits(path)) == 1
    save_file({}, path, metadata | {"edits": change(text)})
    with pytest.raises(gemma4.FormatError, match=re.escape(complaint)):
        load_edits(path)


def control_vector(path, d, layers, arch="controlvector", name="direction"):
    writer = GGUFWriter(path, arch)
    for layer in layers:
        writer.add_tensor(f"{name}.{layer}", np.full(d, layer, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_control_vectors(tiny, tmp_path):
    path, d = tmp_path / "v.gguf", tiny.config.d_model
    control_vector(path, d, [1, 2, 3])
    edits = load_control_vector(path, 0.1)
    assert [(edit.layer, edit.scale, edit.direction[0]) for edit in edits] == [(1, 0.1, 1), (2, 0.1, 2), (3, 0.1, 3)]
    assert [edit.layer for edit in load_control_vector(path, shift=-1)] == [0, 1, 2]
    with tiny.edit(load_control_vector(path, 0.1, layers=[2])):
        by_file = tiny.forward(TEXT)
    with tiny.edit(Steer(np.full(d, 2), 2, 0.1)):
        assert np.array_equal(by_file, tiny.forward(TEXT))
    with pytest.raises(ValueError, match="no direction for layer"):
        load_control_vector(path, layers=9)
    control_vector(tmp_path / "w.gguf", d, [1], arch="gemma4")
    with pytest.raises(gemma4.FormatError, match="controlvector"):
        load_control_vector(tmp_path / "w.gguf")
    control_vector(tmp_path / "x.gguf", d, [1], name="weight")
    with pytest.raises(gemma4.FormatError, match="direction"):
        load_control_vector(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("edits", "error", "complaint"),
    [
        (lambda d: [Steer(np.zeros(d), 1, pos=99)], ValueError, "position 99 cannot be edited: there is none"),
        (lambda d: [Steer(np.zeros(d), 1, pos=-99)], ValueError, "position -99"),
        (lambda d: [Steer(np.zeros(d), 1, pos=slice(90, 99))], ValueError, "no position"),
        (lambda d: [Steer(np.zeros(d), 1, steps=1)], ValueError, "a forward pass is step 0"),
        (lambda d: [Steer(np.zeros(d), 1, prompts=2)], ValueError, "no prompt 2"),
        (lambda d: [Steer(np.zeros(d + 1), 1)], ValueError, "do not fit blocks.1.hook_resid_post"),
        (lambda d: [Steer(np.zeros(d), 99)], gemma4.SiteError, "layers"),
        (lambda d: [Add("blocks.1.hook_mlp_out", np.zeros((2, d)))], ValueError, "pos must list as many"),
        (lambda d: [Add("blocks.1.hook_mlp_out", np.zeros((2, d)), pos=[1, 2, 3])], ValueError, "pos must list"),
        (lambda d: [Scale("blocks.1.hook_mlp_out", 2, head=1)], ValueError, "no heads"),
        (lambda d: [Scale("blocks.1.attn.hook_z", 2, head=44)], ValueError, "heads 0 to"),
        (lambda d: [Scale("blocks.1.hook_mlp_out", 2, index=d)], ValueError, "last axis"),
        (lambda d: [Set("blocks.1.hook_mlp_out", 0), Ablate("blocks.*.hook_mlp_out")], ValueError, "both set"),
        (lambda d: [KnockOut((3, slice(None)), 0)], ValueError, "would keep no key"),
        (lambda d: [KnockOut((1, 0), 0), KnockOut((1, 1), 0)], ValueError, "would keep no key"),
        (lambda d: [KnockOut((3, slice(0, 2)), 0), KnockOut((3, slice(2, 4)), 0, 0)], ValueError, "keep no key"),
        (lambda d: [KnockOut((1, 0), 0, [0, 2]), KnockOut((1, 1), [0, 1])], ValueError, "would keep no key"),
        (lambda d: [("blocks.1.hook_mlp_out", abs)], TypeError, "functions go to Model.hooks"),
        (lambda d: [Steer(np.ones(d), 1), Set(ONE_RESID, 0)], ValueError, "Set('blocks.1.hook_resid_post') sets all"),
        (lambda d: [Scale(ONE_RESID, 2, pos=3), Ablate(ONE_RESID, pos=[3, 4])], ValueError, "sets all that Scale"),
        (lambda d: [KnockOut((3, 1), 0), Set(SCORES, 1, pos=3)], ValueError, "sets all that KnockOut(edge=(3, 1))"),
        (lambda d: [Add(ONE_RESID, np.ones((2, d)), pos=[3, 3])], ValueError, "pos names position 3 twice"),
        (lambda d: [Set(ONE_RESID, np.ones((2, d)), pos=[0, -LENGTH])], ValueError, "pos names position 0 twice"),
        (lambda d: [Steer(np.full(d, np.inf), 1)], ValueError, "hold inf, which would become NaN"),
        (lambda d: [Add(ONE_RESID, -np.inf, pos=3)], ValueError, "hold -inf, which would become NaN"),
        (lambda d: [Set(SCORES, np.inf)], ValueError, "hold inf, which would become NaN"),
    ],
)
def test_edits_that_cannot_act(tiny, edits, error, complaint):
    sequence = tiny.new_sequence()
    with pytest.raises(error, match=re.escape(complaint)), tiny.edit(edits(tiny.config.d_model)):
        tiny.forward(TEXT, sequence=sequence)
    assert sequence.length == 0


@pytest.mark.parametrize(
    ("make", "error", "complaint"),
    [
        (lambda: Steer([1, np.nan], 0), ValueError, "NaN"),
        (lambda: Steer([[1, 2]], 0), ValueError, "[d_model]"),
        (lambda: Steer([1], 0, np.inf), ValueError, "finite"),
        (lambda: Steer(["a"], 0), TypeError, "numbers"),
        (lambda: Steer([1], 0, pos=[]), ValueError, "empty"),
        (lambda: Steer([1], 0, pos=1.5), TypeError, "whole numbers"),
        (lambda: Steer([1], 0, steps=-1), ValueError, "steps"),
        (lambda: Steer([1], -1), ValueError, "layers"),
        (lambda: Scale(None, 2), TypeError, "site name"),
        (lambda: Ablate(), TypeError, "either a site or head"),
        (lambda: Ablate("x", head=(1, 2)), TypeError, "either a site or head"),
        (lambda: Ablate(head=3), TypeError, "pair"),
        (lambda: Ablate("x", resample=3), TypeError, "ActivationCache"),
        (lambda: KnockOut((1, 5)), ValueError, "no query sees a later key"),
        (lambda: KnockOut("pos 1"), TypeError, "pair"),
        (lambda: KnockOut(("row 1", 0)), ValueError, "pos 5"),
        (lambda: KnockOut(("pos 1-999999999999", 0)), ValueError, "pos 5-9"),
        (lambda: KnockOut(("pos 1-99999999", 0)), ValueError, "names 99999999 positions"),
        (lambda: Scale([], 0), ValueError, "the list of sites is empty"),
        (lambda: Ablate(iter(())), ValueError, "the list of sites is empty"),
        (lambda: Scale("x", 0, index=[1, 2]), TypeError, "index must be one number or a slice"),
        (lambda: Scale("x", 0, index=slice("a", None)), TypeError, "the ends of a slice must be whole numbers"),
        (lambda: Scale("x", 0, pos=slice("a", None)), TypeError, "the ends of a slice must be whole numbers"),
        (lambda: Scale("x", 0, pos=slice(0.5, None)), TypeError, "the ends of a slice must be whole numbers"),
        (lambda: Scale("x", 0, pos=1 << 63), ValueError, "beyond every model"),
        (lambda: Scale("x", 0, head=[0, -(1 << 62)]), ValueError, "beyond every model"),
        (lambda: KnockOut((1, 0), pos=3), TypeError, "edge"),
        (lambda: ForbidExperts([]), ValueError, "empty"),
        (lambda: ForceExperts(slice(3)), TypeError, "several"),
        (lambda: Patch("x", 3.0, source_pos=1), ValueError, "source_pos needs a cache"),
        (lambda: Patch("x"), TypeError, "'value'"),
        (lambda: Scale("blocks.1.hook_resid_post.hook_sae_acts_post", 0), ValueError, "ClampFeature, ScaleFeature"),
        (lambda: Set("x"), TypeError, "'value'"),
        (lambda: Scale("x"), TypeError, "'factor'"),
        (lambda: Clamp("x"), ValueError, "nothing would change"),
        (lambda: ProjectOut("x", [0, 0]), ValueError, "no direction to project out"),
        (lambda: ProjectOut("x", [[0, 1], [0, 0]], pos=[1, 2]), ValueError, "no direction to project out"),
    ],
)
def test_edits_that_make_no_sense(make, error, complaint):
    with pytest.raises(error, match=re.escape(complaint)):
        make()


def test_a_cached_prefix_cannot_be_edited(tiny):
    sequence = tiny.new_sequence()
    tiny.forward(TEXT, sequence=sequence, logits=None)
    edit = Steer(np.ones(tiny.config.d_model), 1, pos=2)
    with pytest.raises(ValueError, match="cached prefix"), tiny.edit(edit):
        tiny.forward([5, 6], sequence=sequence)
    with pytest.raises(ValueError, match="cached prefix"):
        tiny.generate(TEXT + " a", sequence=sequence, hooks=[edit], max_tokens=3)


def test_too_many_forbidden_experts(moe):
    n = moe.config.n_experts
    with pytest.raises(ValueError, match="are forbidden, but a token needs"), moe.edit(ForbidExperts(range(n - 1))):
        pass


@pytest.mark.parametrize(
    ("edits", "complaint"),
    [
        (lambda n, k: [ForceExperts(range(k + 1))], "forbid the others with ForbidExperts"),
        (lambda n, k: [ForceExperts([n])], "experts 0 to"),
        (lambda n, k: [ForceExperts([0]), ForbidExperts([0])], "contradict: one forces expert 0"),
        (lambda n, k: [ForbidExperts([3, 0], 1), ForceExperts([0], [1, 2], pos=-1)], "contradict"),
        (lambda n, k: [ForceExperts([0]), ForceExperts([0, 1])], "contradict: one forces expert 1"),
        (lambda n, k: [ForbidExperts(range(n - k)), ForbidExperts(n - 1)], "are forbidden, but a token needs"),
        (
            lambda n, k: [ForbidExperts(range(n - k)), ForbidExperts(n - k), ForceExperts([n - 1], pos=1)],
            "are forbidden, but a token needs 2",
        ),
        (lambda n, k: [Steer([1], 1, pos=3, steps=2)], "computed in the steps [2]"),
    ],
)
def test_choices_of_experts_that_contradict(moe, edits, complaint):
    n, k = moe.config.n_experts, moe.config.top_k_experts
    with pytest.raises(ValueError, match=re.escape(complaint)):
        moe.generate(TEXT, max_tokens=5, hooks=[replaced(edit, moe) for edit in edits(n, k)])


def replaced(edit, model):
    """A Steer of the model's width."""
    return replace(edit, direction=np.ones(model.config.d_model)) if isinstance(edit, Steer) else edit


def test_choices_of_experts_that_agree(moe):
    n, k = moe.config.n_experts, moe.config.top_k_experts
    for edits in (
        [ForceExperts([0, 1]), ForceExperts([1, 0])],
        [ForceExperts([0]), ForbidExperts([1])],
        [ForceExperts([0], pos=1), ForceExperts([1], pos=2)],
        [ForceExperts([0], steps=0), ForceExperts([1], steps=[1, 2])],
        [ForceExperts([0], 1), ForceExperts([1], 2)],
        [ForbidExperts(range(n - k), pos=0), ForbidExperts(n - 1, pos=1)],
        [ForbidExperts(range(n - k)), ForceExperts([n - 1], pos=2), ForbidExperts([n - 2], pos=2)],
    ):
        moe.generate(TEXT, max_tokens=4, hooks=edits)


def test_a_cache_is_asked_for_what_it_holds(tiny):
    _, cache = tiny.run_with_cache(TEXT, "blocks.1.hook_resid_post", pos=[2, 3])
    with (
        pytest.raises(ValueError, match=r"holds no blocks\.2\.hook_resid_post"),
        tiny.edit(Patch("blocks.2.hook_resid_post", cache)),
    ):
        pass
    with pytest.raises(ValueError, match="no position 5"), tiny.edit(Patch("blocks.1.hook_resid_post", cache, pos=5)):
        pass
    with tiny.edit(Patch("blocks.1.hook_resid_post", cache)):
        assert np.array_equal(tiny.forward(TEXT), tiny.forward(TEXT))
