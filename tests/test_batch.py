# SPDX-License-Identifier: Apache-2.0
"""Prompts of one step that want different things, batches that are joined and left, tokens that are guessed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gemma4.generation import Batch, Continuation, Options
from gemma4.interp.hooks import bind_hooks
from gemma4.step import Prompt, run_step

PROMPTS = [[2, 5, 9, 17, 5, 33, 64, 129, 7, 300, 11, 12], [2, 8], [2, 77, 31, 4, 5, 6, 200], [2, 9, 9, 9, 9]]
FORCED = {"stop_ids": (), "stop": ()}  # random models stop where they like


@pytest.fixture(params=["random_e", "random_moe"])
def model(request):
    """Windows of 8: prompts and what follows are longer."""
    return request.getfixturevalue(request.param)


def double(array, site):
    return array * 2


def zero_last(array, site):
    array[-1] = 0


def wants(model):
    """One set of wishes for each of PROMPTS, no two alike."""
    return [
        {"logits": "all", "capture": model.sites.select("blocks.*.hook_resid_post"), "pos": [1, 4]},
        {"logits": None},
        {"logits": [0, 6, -2], "hooks": bind_hooks(model.sites, [("blocks.1.hook_mlp_out", double)])},
        {
            "logits": slice(-2, None),
            "capture": model.sites.select(["blocks.2.attn.hook_pattern", "blocks.*.hook_attn_out"]),
            "hooks": bind_hooks(model.sites, [("blocks.4.hook_resid_pre", zero_last)]),
        },
    ]


def run(model, which):
    """The outputs of a step of these prompts, and the logits that a step of one more token gives each of them after."""
    sequences = [model.new_sequence(capacity=20) for _ in which]
    prompts = [
        Prompt(s, np.array(PROMPTS[i], np.int32), number=i, **wants(model)[i])
        for i, s in zip(which, sequences, strict=True)
    ]
    outputs = run_step(model, prompts)
    after = [model.forward([7], sequence=s) for s in sequences]
    return list(zip(outputs, after, strict=True))


def test_prompts_of_one_step_want_different_things(model):
    for i, (together, after) in enumerate(run(model, range(len(PROMPTS)))):
        [(alone, alone_after)] = run(model, [i])
        np.testing.assert_array_equal(after, alone_after)
        assert (together.logits is None) == (wants(model)[i]["logits"] is None)
        if together.logits is not None:
            np.testing.assert_array_equal(together.logits, alone.logits)
        assert (together.cache is None) == ("capture" not in wants(model)[i])
        if together.cache is not None:
            assert list(together.cache) == list(alone.cache) == [site.name for site in wants(model)[i]["capture"]]
            np.testing.assert_array_equal(together.cache.positions, alone.cache.positions)
            for name in together.cache:
                np.testing.assert_array_equal(together.cache[name], alone.cache[name])


def test_hooks_of_one_prompt_edit_no_other(model):
    plain = [model.forward(ids) for ids in PROMPTS]
    seen = []
    watch = ("blocks.[01].hook_resid_post", lambda array, site: seen.append((site.layer, site.sequence)))
    hooks = bind_hooks(model.sites, [watch])
    edit = bind_hooks(model.sites, [("blocks.0.hook_resid_post", double)])
    prompts = [
        Prompt(model.new_sequence(capacity=12), np.array(ids, np.int32), i, hooks={1: hooks, 2: edit}.get(i, []))
        for i, ids in enumerate(PROMPTS)
    ]
    outputs = run_step(model, prompts)
    assert seen == [(0, 1), (1, 1)]
    assert [np.array_equal(out.logits, one) for out, one in zip(outputs, plain, strict=True)] == [
        True,
        True,
        False,
        True,
    ]


def alone(model, prompt, options, number):
    with Batch(model) as batch:
        one = batch.join(prompt, options, number=number)
        while batch.running:
            batch.step()
    return one


def same(one: Continuation, other: Continuation) -> None:
    a, b = one.result(), other.result()
    assert a.tokens.tolist() == b.tokens.tolist() and a.finish_reason == b.finish_reason and a.text == b.text
    assert a.logprobs == b.logprobs  # to the bit
    assert (a.cache is None) == (b.cache is None)
    for name in a.cache or ():
        np.testing.assert_array_equal(a.cache[name], b.cache[name])


OPTIONS = [
    Options(max_tokens=20, temperature=0.0, logprobs=2, **FORCED),
    Options(max_tokens=9, temperature=1.3, seed=4, top_k=40, logprobs=0, **FORCED),
    Options(max_tokens=14, temperature=0.9, seed=4, top_p=0.8, repetition_penalty=1.4, logprobs=3, **FORCED),
    Options(max_tokens=12, temperature=2.0, seed=9, capture="blocks.3.hook_resid_post", logprobs=1, **FORCED),
]


def test_a_sequence_joins_while_others_run_and_another_leaves(model):
    with Batch(model) as batch:
        first = batch.join(PROMPTS[0], OPTIONS[0])
        for _ in range(3):
            batch.step()
        second, third = batch.join(PROMPTS[1], OPTIONS[1]), batch.join(PROMPTS[2], OPTIONS[2])
        for _ in range(4):
            batch.step()
        batch.leave(third)
        assert third.finish == "cancelled" and third.sequence.closed and len(third.result().tokens) == 4
        fourth = batch.join(PROMPTS[3], OPTIONS[3])
        while batch.running:
            assert all(not one.finish for one in batch.running)
            batch.step()
        assert second.sequence.closed and second.finish == "length"
    for one, i in ((first, 0), (second, 1), (fourth, 3)):
        same(one, alone(model, PROMPTS[i], OPTIONS[i], i))
    whole = alone(model, PROMPTS[2], OPTIONS[2], 2).result()
    assert third.result().tokens.tolist() == whole.tokens[:4].tolist()


def test_options_belong_to_a_prompt(model):
    with Batch(model) as batch:
        joined = [batch.join(ids, options) for ids, options in zip(PROMPTS, OPTIONS, strict=True)]
        while batch.running:
            batch.step()
    for i, one in enumerate(joined):
        same(one, alone(model, PROMPTS[i], OPTIONS[i], i))
    assert [len(one.result().tokens) for one in joined] == [20, 9, 14, 12]


def test_generate_draws_as_a_batch_does(model):
    options = {"max_tokens": 10, "temperature": 1.0, "seed": 3, **FORCED}
    batch = model.generate(PROMPTS, **options)
    for i, out in enumerate(batch):
        assert out.tokens.tolist() == alone(model, PROMPTS[i], Options(**options), i).result().tokens.tolist()
    assert len({tuple(out.tokens.tolist()) for out in batch}) == len(PROMPTS)


def test_hooks_of_a_block_stay_with_who_joined_inside(model):
    with Batch(model) as batch:
        with model.hooks([("blocks.2.hook_resid_post", double)]):
            edited = batch.join(PROMPTS[0], OPTIONS[0])
        plain = batch.join(PROMPTS[0], OPTIONS[0], number=0)
        while batch.running:
            batch.step()
    same(plain, alone(model, PROMPTS[0], OPTIONS[0], 0))
    with model.hooks([("blocks.2.hook_resid_post", double)]):
        same(edited, alone(model, PROMPTS[0], OPTIONS[0], 0))
    assert edited.samples != plain.samples


def test_who_fails_leaves_and_the_others_go_on(model):
    def fail(ids, logits):
        if len(ids) == 6:
            raise ZeroDivisionError("of the processor")

    failing = dataclasses.replace(OPTIONS[2], processors=(fail,))
    with Batch(model) as batch:
        joined = [
            batch.join(PROMPTS[0], OPTIONS[0]),
            batch.join(PROMPTS[3], failing),
            batch.join(PROMPTS[2], OPTIONS[2]),
        ]
        batch.step()
        with pytest.raises(ZeroDivisionError, match="of the processor"):
            batch.step()
        assert batch.running == [joined[0], joined[2]] and joined[1].finish == "cancelled"
        assert len(joined[1].samples) == 1 and len(joined[0].samples) == len(joined[2].samples) == 2
        while batch.running:
            batch.step()
    same(joined[0], alone(model, PROMPTS[0], OPTIONS[0], 0))
    same(joined[2], alone(model, PROMPTS[2], OPTIONS[2], 2))


def test_a_step_that_fails_can_be_made_again(model):
    calls = []

    def fail_once(array, site):
        calls.append(site.start)
        if len(calls) == 3:
            raise KeyboardInterrupt

    options = dataclasses.replace(OPTIONS[0], hooks=[("blocks.1.hook_resid_post", fail_once)])
    with Batch(model) as batch:
        joined = [batch.join(PROMPTS[0], options), batch.join(PROMPTS[2], OPTIONS[2], number=2)]
        batch.step()
        batch.step()
        with pytest.raises(KeyboardInterrupt):
            batch.step()
        assert [len(one.samples) for one in joined] == [2, 2]
        while batch.running:
            batch.step()
    same(joined[0], alone(model, PROMPTS[0], OPTIONS[0], 0))
    same(joined[1], alone(model, PROMPTS[2], OPTIONS[2], 2))


def test_one_sequence_is_not_continued_twice(model):
    with Batch(model) as batch, model.new_sequence(capacity=40) as sequence:
        options = dataclasses.replace(OPTIONS[0], sequence=sequence)
        one = batch.join(PROMPTS[0], options)
        with pytest.raises(ValueError, match=r"in this batch already; fork\(\) it"):
            batch.join(PROMPTS[0], options)
        batch.step()
        batch.leave(one)
        assert not sequence.closed and sequence.tokens.tolist() == PROMPTS[0]
        assert batch.join(PROMPTS[0], options).reused == len(PROMPTS[0]) - 1


def test_an_empty_batch_has_nothing_to_do(model):
    with Batch(model) as batch:
        batch.step()
        assert batch.running == []


# ---- guesses ----------------------------------------------------------------------------------------------------


def guessed(model, prompt, options, number, guess):
    """Continued with guess(the tokens that will come, step) proposed before each step; also the number of steps."""
    truth = alone(model, prompt, options, number).result().tokens
    steps = 0
    with Batch(model) as batch:
        one = batch.join(prompt, options, number=number)
        while batch.running:
            one.propose(guess(truth[len(one.samples) :], steps))
            batch.step()
            steps += 1
            assert one.sequence.closed or one.sequence.length == one.n_ids - 1
    return one, steps


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize(
    ("guess", "most_steps"),
    [
        (lambda truth, step: truth, 1),
        (lambda truth, step: truth[:3], 6),
        (lambda truth, step: np.append(truth[:2], (truth[2:3] + 1) % 300), 8),  # two right ones, then a wrong one
        (lambda truth, step: (truth[:6] + 1) % 300, 20),
        (lambda truth, step: truth[: step % 4] if step % 3 else [5] * 12, 20),
        (lambda truth, step: [], 20),
    ],
    ids=["all", "three", "two of three", "wrong", "mixed", "none"],
)
def test_guessed_tokens_are_those_of_one_by_one(model, i, guess, most_steps):
    one, steps = guessed(model, PROMPTS[i], OPTIONS[i], i, guess)
    same(one, alone(model, PROMPTS[i], OPTIONS[i], i))
    assert steps <= most_steps


def test_guesses_beside_who_has_none(model):
    truth = alone(model, PROMPTS[0], OPTIONS[0], 0).result().tokens
    with Batch(model) as batch:
        joined = [batch.join(ids, options) for ids, options in zip(PROMPTS, OPTIONS, strict=True)]
        while batch.running:
            joined[0].propose(np.append(truth[len(joined[0].samples) :][:4], 3))
            batch.step()
    for i, one in enumerate(joined):
        same(one, alone(model, PROMPTS[i], OPTIONS[i], i))


def test_a_stop_among_the_guesses(model):
    truth = alone(model, PROMPTS[0], OPTIONS[0], 0).result().tokens
    stop = int(truth[7])
    first = truth.tolist().index(stop)
    options = dataclasses.replace(OPTIONS[0], stop_ids=[stop])
    with model.new_sequence(capacity=60) as sequence, Batch(model) as batch:
        one = batch.join(PROMPTS[0], dataclasses.replace(options, sequence=sequence))
        one.propose(truth)
        batch.step()
        assert one.finish == "stop" and one.result().tokens.tolist() == truth[: first + 1].tolist()
        assert sequence.tokens.tolist() == [*PROMPTS[0], *truth[:first].tolist()]  # no guess stays behind
        alike = model.forward([*PROMPTS[0], *truth[: first + 1].tolist()], logits="last")
        np.testing.assert_array_equal(model.forward(truth[first : first + 1], sequence=sequence), alike)


def test_no_guess_is_run_where_somebody_looks(model):
    truth = alone(model, PROMPTS[0], OPTIONS[0], 0).result().tokens
    for looking in ({"capture": "blocks.1.hook_mlp_out"}, {"hooks": [("blocks.1.hook_mlp_out", lambda a, s: None)]}):
        options = dataclasses.replace(OPTIONS[0], **looking)
        one, steps = guessed(model, PROMPTS[0], options, 0, lambda truth, step: truth)
        assert steps == len(truth)
        same(one, alone(model, PROMPTS[0], options, 0))


def test_guesses_end_where_the_room_ends(model):
    options = dataclasses.replace(OPTIONS[0], max_tokens=4)
    one, steps = guessed(model, PROMPTS[1], options, 0, lambda truth, step: [*truth, 5, 6, 7])
    assert steps == 1 and one.finish == "length" and len(one.result().tokens) == 4


def test_bad_guesses_are_refused(model):
    with Batch(model) as batch:
        one = batch.join(PROMPTS[0], OPTIONS[0])
        with pytest.raises(ValueError, match="token id 320 at position 1 is out of range"):
            one.propose([5, 320])
        with pytest.raises(TypeError, match="whole numbers"):
            one.propose(np.array([1.5]))
        while batch.running:
            batch.step()
    same(one, alone(model, PROMPTS[0], OPTIONS[0], 0))
