# SPDX-License-Identifier: Apache-2.0
"""Patches from another prompt of the same step: equal to the bit to a patch from a cache of that prompt."""

import copy
import re

import numpy as np
import pytest

import gemma4
from gemma4.edits import Add, FromPrompt, Patch, Scale, Set, load_edits, save_edits
from gemma4.generation import Batch, Options

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPT = "Then Lily and Tom ran to the park, Tom took a ball to"  # as many tokens
SHORT = "Once upon a time there"
RESID, Z = "blocks.2.hook_resid_post", "blocks.3.attn.hook_z"


@pytest.fixture(scope="module", params=["tiny-e", "tiny-moe"])
def model(request):
    return gemma4.load(request.param)


@pytest.fixture(scope="module")
def tiny():
    return gemma4.load("tiny-e")


def by_cache(model, source, target, site, **options):
    """The logits and activations of `target` with what `source` has, in two runs."""
    _, cache = model.run_with_cache(source, "*")
    with model.edit(Patch(site, cache, **options)):
        return model.run_with_cache(target, "*")


def in_one_step(model, source, target, edits):
    with model.edit(edits):
        return model.run_with_cache([source, target], "*")[0][1], model.run_with_cache([source, target], "*")[1][1]


CASES = {
    "all": (RESID, {}),
    "one": (RESID, {"pos": 5}),
    "from elsewhere": (RESID, {"pos": [7, 2, -1], "source_pos": [1, 1, -3]}),
    "a head": (Z, {"pos": [3, 9], "head": 1}),
    "neurons": ("blocks.1.mlp.hook_post", {"pos": [4], "index": slice(3, 40)}),
    "pattern": ("blocks.1.attn.hook_pattern", {"pos": [5, 11], "head": [0, 2]}),
    "scores of another position": ("blocks.2.attn.hook_attn_scores", {"pos": [9], "source_pos": [8]}),
    "values in use": ("blocks.0.attn.hook_v_used", {"pos": [6, 7, 2], "source_pos": [1, 2, 3]}),
    "keys in use": ("blocks.*.attn.hook_k_used", {"pos": [-1, 0]}),
    "several sites": ("blocks.*.hook_mlp_out", {"pos": [8, -2]}),
    "the last layer": ("blocks.*.hook_resid_mid", {"pos": -1}),
    "logits": ("hook_logits", {"pos": 3}),
    "head results": ("blocks.1.attn.hook_result", {"pos": 4, "head": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_patch_from_a_cache(model, name):
    site, options = CASES[name]
    expected, cache = by_cache(model, CLEAN, CORRUPT, site, **options)
    logits, activations = in_one_step(model, CLEAN, CORRUPT, Patch(site, FromPrompt(0), **options))
    assert np.array_equal(logits, expected) and not np.array_equal(logits, model.forward(CORRUPT))
    for one in cache:
        assert np.array_equal(activations[one], cache[one], equal_nan=True), one


def test_the_source_may_come_later_and_stays_as_it_is(tiny):
    """The source runs first whatever its number; lengths may differ where positions are named."""
    batch, plain = [CORRUPT, SHORT, CLEAN], tiny.forward([CORRUPT, SHORT, CLEAN])
    with tiny.edit(Patch(RESID, FromPrompt(2), pos=[-1, 1])):
        logits = tiny.forward(batch)
    assert np.array_equal(logits[2], plain[2])
    for i in (0, 1):
        n = len(tiny.to_tokens(batch[i]))
        expected, _ = by_cache(tiny, CLEAN, batch[i], RESID, pos=[n - 1, 1], source_pos=[-1, 1])
        assert np.array_equal(logits[i], expected), i
    with tiny.edit(Patch(RESID, FromPrompt(2), pos=1, prompts=[1])):
        logits = tiny.forward(batch)
    assert np.array_equal(logits[0], plain[0]) and not np.array_equal(logits[1], plain[1])


def test_values_are_those_after_the_source_s_own_edits(tiny):
    """As in a cache, after its edits and functions. Of the target's own edits those after the patch stay."""

    def halve(array, site):
        if site.sequence == 0:
            array *= np.float32(0.5)

    edits = [(RESID, halve), Add(RESID, 1.0), Patch(RESID, FromPrompt(0), pos=4), Scale(RESID, 3, prompts=1)]
    with tiny.hooks(edits):
        _, (source, target) = tiny.run_with_cache([CLEAN, CORRUPT], RESID)
    _, cache = tiny.run_with_cache(CLEAN, RESID)
    expected = (cache[RESID] * np.float32(0.5) + np.float32(1)) * np.float32(1)
    assert np.array_equal(source[RESID], expected)
    assert np.array_equal(target[RESID][4], expected[4] * np.float32(3))


def test_a_chain_of_prompts(tiny):
    """2 takes from 1, which takes from 0 elsewhere."""
    with tiny.edit([Patch(RESID, FromPrompt(0), pos=3, prompts=1), Patch(Z, FromPrompt(1), pos=8, prompts=[2])]):
        logits = tiny.forward([CLEAN, CORRUPT, CORRUPT])
    first = by_cache(tiny, CLEAN, CORRUPT, RESID, pos=3)
    with tiny.edit(Patch(Z, first[1], pos=8)):
        second = tiny.forward(CORRUPT)
    assert np.array_equal(logits[1], first[0]) and np.array_equal(logits[2], second)


def test_long_prompts_run_in_chunks(tiny):
    """More rows than a chunk has, and a source that a function keeps in one piece, which fits into no first chunk."""
    clean, corrupt = (np.resize(tiny.to_tokens(text), 700) for text in (CLEAN, CORRUPT))
    edit, calls = Patch(RESID, FromPrompt(1), pos=[0, 3, 600, -1], prompts=0), []
    expected, _ = by_cache(tiny, clean, corrupt, RESID, pos=[0, 3, 600, -1])
    with tiny.edit(edit):
        assert np.array_equal(tiny.forward([corrupt, clean], logits="last")[0], expected[-1:])

    def note(array, site):
        calls.append(array.shape)

    edit = Patch(RESID, FromPrompt(2), pos=[0, 3, 600, -1], prompts=1)
    with tiny.hooks([edit, (RESID, note)]):
        logits = tiny.forward([SHORT, corrupt, clean], logits="last")
    assert np.array_equal(logits[1], expected[-1:]) and len(calls) == 3


def test_the_engine_is_told_to_keep_the_order(tiny):
    """A call keeps a run in one piece (csrc/tests/taps_test.c): it must not be overtaken by one that takes from it."""
    seen, engine = [], tiny.engine

    class Spy:
        def __getattr__(self, name):
            return getattr(engine, name)

        def step(self, runs, taps, **options):
            seen.append(options["in_order"])
            engine.step(runs, taps, **options)

    watched = copy.copy(tiny)
    watched.engine = Spy()
    with watched.edit(Patch(RESID, FromPrompt(0), pos=1)):
        watched.generate([CLEAN, CORRUPT], max_tokens=2)
    assert seen == [True, False]  # the second step takes nothing


def test_while_generating(model):
    """Step by step, as a cache of the source's whole text would give."""
    options = {"max_tokens": 6, "temperature": 0, "capture": [RESID, Z]}
    texts = ["Once upon a time there was a little girl", "Once upon a time there lived a big bear"]
    n, other = (len(model.to_tokens(text)) for text in texts)
    source = model.generate(texts[0], **options)
    assert n == other and len(source.tokens) == 6
    for edit, pos in (
        (Patch(Z, FromPrompt(0)), None),
        (Patch(Z, FromPrompt(0), pos=[2, -1]), [2, n - 1]),
        (Patch(Z, FromPrompt(0), steps=[2, 4]), [n + 1, n + 3]),
        (Patch(Z, FromPrompt(0), pos=slice(n, None)), range(n, n + 5)),
    ):
        expected = model.generate(texts[1], hooks=[Patch(Z, source.cache, pos=pos)], **options)
        together = model.generate(texts, hooks=[edit], **options)
        assert [one.text for one in together] == [source.text, expected.text]
        for name in expected.cache:
            assert np.array_equal(together[0].cache[name], source.cache[name]), name
            assert np.array_equal(together[1].cache[name], expected.cache[name]), name


def test_prompts_that_join_later(tiny):
    """In an open batch prompts are known by their number; a source that is not in the step is said."""
    options = Options(max_tokens=3, temperature=0, hooks=[Patch(RESID, FromPrompt(7), pos=-1)])
    with Batch(tiny) as batch:
        target = batch.join(CORRUPT, options, number=3)
        with pytest.raises(ValueError, match=r"prompt 7 is not in step 0: .*never was in the batch"):
            batch.step()
        batch.join(CLEAN, Options(max_tokens=3, temperature=0), number=7)
        while batch.running:
            batch.step()
    assert target.result().text == tiny.generate([CLEAN, CORRUPT], max_tokens=3, temperature=0, hooks=[
        Patch(RESID, FromPrompt(0), pos=-1)
    ])[1].text  # fmt: skip


def test_a_source_that_ends_first(tiny):
    edits = [Patch(RESID, FromPrompt(0))]
    with Batch(tiny) as batch:
        batch.join(CLEAN, Options(max_tokens=2, temperature=0))
        target = batch.join(CORRUPT, Options(max_tokens=4, temperature=0, hooks=edits))
        batch.step(), batch.step()
        with pytest.raises(ValueError, match=r"prompt 0 is not in step 2: it has ended.*limit the edit with steps="):
            batch.step()
        assert len(target.result().tokens) == 2


def test_slices_count_from_each_prompt_s_end(tiny):
    """As named negative positions do."""
    plain = tiny.forward(SHORT)
    for site in (RESID, Z, "blocks.1.attn.hook_v_used"):
        for pos, named in ((slice(-1, None), [-1]), (slice(-3, -1), [-3, -2]), (slice(-4, None, 2), [-4, -2])):
            with tiny.edit(Patch(site, FromPrompt(0), pos=pos)):
                sliced = tiny.forward([CLEAN, SHORT])[1]
            with tiny.edit(Patch(site, FromPrompt(0), pos=named)):
                assert np.array_equal(sliced, tiny.forward([CLEAN, SHORT])[1]), (site, pos)
            assert not np.array_equal(sliced, plain)
    with (
        pytest.raises(ValueError, match=r"is 5 positions of prompt 1 in this step, but 14 of prompt 0"),
        tiny.edit(Patch(RESID, FromPrompt(0), pos=slice(0, -1))),
    ):
        tiny.forward([CLEAN, SHORT])


def test_slices_from_the_end_while_generating(tiny):
    options = {"max_tokens": 4, "temperature": 0, "capture": RESID}
    source, target = tiny.generate([CLEAN, SHORT], hooks=[Patch(RESID, FromPrompt(0), pos=slice(-2, None))], **options)
    n = min(len(source.tokens), len(target.tokens)) + 1  # the last two of the prompt, and one for each step after it
    taken = (one.cache[RESID][one.prompt_tokens - 2 :][:n] for one in (source, target))
    assert np.array_equal(*taken) and n > 2


@pytest.mark.parametrize("site", ["blocks.4.attn.hook_k_used", "blocks.4.attn.hook_v_used"])
@pytest.mark.parametrize("pos", [None, [1, 3], slice(-2, None)])
def test_cached_keys_while_generating(tiny, site, pos):
    """Of both prompts as many positions are in use in each step."""
    options = {"max_tokens": 4, "temperature": 0, "capture": site}
    texts = ["Once upon a time there was a little girl", "Once upon a time there lived a big bear"]
    source, target = tiny.generate(texts, hooks=[Patch(site, FromPrompt(0), pos=pos)], **options)
    n = len(source.cache[site])
    at = slice(None) if pos is None else pos if isinstance(pos, list) else slice(source.prompt_tokens - 2, n)
    assert len(source.tokens) == 4 and np.array_equal(source.cache[site][at], target.cache[site][at])
    assert np.array_equal(source.cache[site], tiny.generate(texts[0], **options).cache[site])


def test_a_source_that_ends_before_others(tiny):
    """An edit that does nothing in the steps without its source is no reason to stop."""
    options = {"max_tokens": 8, "temperature": 0}
    for edit in (Patch(RESID, FromPrompt(0), pos=5), Patch(RESID, FromPrompt(0), pos=slice(3, 5))):
        clean, long = tiny.generate([CLEAN, SHORT + " was a"], hooks=[edit], **options)
        assert len(clean.tokens) < len(long.tokens) == 8
        _, cache = tiny.run_with_cache(CLEAN, RESID)
        named = range(3, 5) if isinstance(edit.pos, slice) else edit.pos
        assert long.text == tiny.generate(SHORT + " was a", hooks=[Patch(RESID, cache, pos=named)], **options).text


def test_a_step_in_which_nothing_can_be_taken_loses_no_text(tiny):
    """The prompt ends there and says why; the others go on."""
    options = {"max_tokens": 8, "temperature": 0}
    texts = [CLEAN, SHORT + " was a", SHORT + " was a little"]
    plain = tiny.generate(texts, **options)
    ended = len(plain[0].tokens)
    assert ended < 8 == len(plain[2].tokens)
    for source, scope, why, n in (
        (0, {"pos": slice(-1, None)}, f"prompt 0 is not in step {ended}: it has ended", ended),
        (0, {"pos": slice(-1, None), "steps": [1, 5]}, "prompt 0 is not in step 5: it has ended", 5),
        (2, {"pos": 9}, "cannot take position 9 of .* from prompt 2", 2),
        (2, {"steps": 1}, "cannot take position 8 of .* from prompt 2", 1),
    ):
        with pytest.warns(UserWarning, match=f"{why}.*; prompt 1 ends here, with {n} tokens"):
            given = tiny.generate(texts, hooks=[Patch(Z, FromPrompt(source), prompts=1, **scope)], **options)
        assert [one.text for one in given[::2]] == [one.text for one in plain[::2]]
        assert given[1].finish_reason == "cancelled" and len(given[1].tokens) == n
    with pytest.raises(ValueError, match="only at equal lengths"):  # before there is a text
        tiny.generate(texts, hooks=[Patch(Z, FromPrompt(2), prompts=1)], **options)


def test_prompts_that_take_from_each_other_in_a_later_step(tiny):
    options = {"max_tokens": 4, "temperature": 0}
    plain = tiny.generate(SHORT, **options)
    edits = [Patch(Z, FromPrompt(1 - i), prompts=i, steps=2) for i in (0, 1)]
    with pytest.warns(UserWarning) as caught:
        given = tiny.generate([CORRUPT, SHORT, SHORT], hooks=edits, **options)
    assert [len(one.tokens) for one in given] == [2, 2, 4] and given[2].text == plain.text
    assert re.search("take activations from each other in one step", str(caught[0].message))
    assert re.search("is not in step 2: it has ended", str(caught[1].message)) and len(caught) == 2


def test_prompts_may_take_from_each_other_in_different_steps(tiny):
    """In a step in which nothing of an edit is computed it takes nothing."""
    n = len(tiny.to_tokens(SHORT))
    texts, options = [SHORT, "Then Lily and Tom ran"], {"max_tokens": 4, "temperature": 0, "capture": RESID}
    edits = [Patch(RESID, FromPrompt(1), prompts=0, pos=2), Patch(RESID, FromPrompt(0), prompts=1, pos=n + 1)]
    first, second = tiny.generate(texts, hooks=edits, **options)
    assert first.prompt_tokens == second.prompt_tokens == n
    assert np.array_equal(first.cache[RESID][[2, n + 1]], second.cache[RESID][[2, n + 1]])
    assert not np.array_equal(first.cache[RESID][n], second.cache[RESID][n])


def test_saved(tiny, tmp_path):
    edit = Patch(Z, FromPrompt(1), pos=[3, -1], source_pos=[-1, 3], head=1, prompts=0)
    (again,) = load_edits(save_edits(edit, tmp_path / "e.safetensors"))
    assert again.value == FromPrompt(1) and again.source_pos == (-1, 3) and again.pos == (3, -1)
    for given in (edit, again):
        with tiny.edit(given):
            logits = tiny.forward([CORRUPT, CLEAN])[0]
    with tiny.edit(edit):
        assert np.array_equal(logits, tiny.forward([CORRUPT, CLEAN])[0])


@pytest.mark.parametrize(
    ("batch", "edits", "complaint"),
    [
        ([CLEAN], [Patch(RESID, FromPrompt(0))], "no other prompt"),
        ([CLEAN, CORRUPT], [Patch(RESID, FromPrompt(2), pos=1)], "no prompt 2 to take from, only 0 to 1"),
        ([CLEAN, CORRUPT], [Patch(RESID, FromPrompt(0), prompts=2)], "no prompt 2"),
        ([CLEAN, SHORT], [Patch(RESID, FromPrompt(0))], "ends at position 5 in this step, prompt 0 at"),
        ([SHORT, CLEAN], [Patch(RESID, FromPrompt(0))], "cannot take position"),
        ([SHORT, CLEAN], [Patch(RESID, FromPrompt(0), pos=[2, 9])], "cannot take position 9 of"),
        ([SHORT, CLEAN], [Patch(RESID, FromPrompt(0), pos=2, source_pos=9)], "cannot take position 9 of"),
        ([SHORT, CLEAN], [Patch(RESID, FromPrompt(0), pos=[99], source_pos=[1])], "there is none"),
        ([CLEAN, SHORT], [Patch("blocks.0.attn.hook_pattern", FromPrompt(0), pos=2)], "of a site without keys"),
        ([CLEAN, CORRUPT], [Patch(RESID, FromPrompt(0), pos=1, steps=1)], "step 0 alone"),
        (
            [CLEAN, CORRUPT],
            [Patch(RESID, FromPrompt(0), prompts=1), Patch(RESID, FromPrompt(1), prompts=0)],
            "take activations from each other",
        ),
        (
            [CLEAN, CORRUPT, CORRUPT],
            [Patch(RESID, FromPrompt(i), pos=1, prompts=(i + 1) % 3) for i in range(3)],
            "take activations from each other",
        ),
        ([CLEAN, CORRUPT], [Patch(RESID, FromPrompt(0), pos=1), Set(RESID, 0, pos=[0, 1])], "both set"),
        ([CLEAN, CORRUPT], [Patch("blocks.1.*", FromPrompt(0), index=99_999)], "last axis"),
    ],
)
def test_what_cannot_be_taken(tiny, batch, edits, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)), tiny.edit(edits):
        tiny.forward(batch)
    if "step" not in complaint:
        with pytest.raises(ValueError, match=re.escape(complaint)):
            tiny.generate(batch, max_tokens=2, hooks=edits)


def test_ids_of_experts_are_no_numbers(model):
    if not model.config.n_experts:
        pytest.skip("no experts")
    with pytest.raises(ValueError, match="holds ids"), model.edit(Patch("blocks.1.moe.hook_expert_ids", FromPrompt(0))):
        pass


@pytest.mark.parametrize(
    ("make", "error", "complaint"),
    [
        (lambda: FromPrompt(-1), ValueError, "from 0 on"),
        (lambda: FromPrompt(1.5), ValueError, "from 0 on"),
        (lambda: FromPrompt(True), ValueError, "from 0 on"),
        (lambda: Patch(RESID, FromPrompt(1), prompts=1), ValueError, "take from itself"),
        (lambda: Patch(RESID, FromPrompt(1), pos=[1, 2], source_pos=3), ValueError, "source_pos names 1 positions"),
        (lambda: Patch(RESID, FromPrompt(1), source_pos=slice(3)), TypeError, "not slices"),
    ],
)
def test_patches_that_make_no_sense(make, error, complaint):
    with pytest.raises(error, match=re.escape(complaint)):
        make()


def test_prompts_that_a_list_lacks(tiny):
    """Also while generating, where a batch may be open."""
    edit = Add(RESID, 1.0, prompts=2)
    for run in (
        lambda: tiny.generate([CLEAN, CORRUPT], hooks=[edit], max_tokens=2),
        lambda: tiny.stream(CLEAN, hooks=[edit]),
    ):
        with pytest.raises(ValueError, match="no prompt 2"):
            run()
