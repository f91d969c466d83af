# SPDX-License-Identifier: Apache-2.0
"""Patching grids, head ablations and induction scores: each cell is the run that a function hook would give."""

import re

import numpy as np
import pytest

import gemma4
from gemma4.edits import Ablate, Patch, Scale
from gemma4.interp import (
    dla,
    head_ablations,
    head_patching,
    induction_scores,
    logit_lens,
    patching_grid,
    path_patching,
    plots,
)

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPT = "When Mary and John went to the store, Mary gave a book to"
ANSWERS = (" Mary", " John")


@pytest.fixture(scope="module")
def tiny():
    return gemma4.load("tiny-e")


@pytest.fixture(scope="module", params=["tiny-e", "tiny-moe"])
def model(request):
    return gemma4.load(request.param)


def difference(model, logits):
    mary, john = (model.to_single_token(name) for name in ANSWERS)
    return np.float32(float(logits[-1, mary] - logits[-1, john]))


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_ple_in"])
def test_a_cell_is_a_patched_run(model, site):
    if site == "hook_ple_in" and not model.config.d_ple:
        pytest.skip("no per-layer embeddings")
    _, cache = model.run_with_cache(CLEAN)
    layers, positions = [0, 2, model.n_layers - 1], [0, 3, -1, 9]
    grid = patching_grid(model, CLEAN, CORRUPT, ANSWERS, site=site, layers=layers, positions=positions)
    assert grid.values.shape == (3, 4) and grid.rows == [str(i) for i in layers]
    tokens = model.to_str_tokens(CORRUPT)
    assert grid.columns == [tokens[p] for p in positions]
    for i, layer in enumerate(layers):
        for j, position in enumerate(positions):

            def patch(array, site, layer=layer, position=position):
                array[position] = cache[site.name][position]

            logits = model.run_with_hooks(CORRUPT, [(f"blocks.{layer}.{site}", patch)])
            assert grid.values[i, j] == difference(model, logits), (layer, position)
    assert grid.clean == difference(model, model.forward(CLEAN))
    assert grid.corrupt == difference(model, model.forward(CORRUPT))


def test_the_whole_grid_tells_the_story(tiny):
    """At first the names at the second mention decide, at last the final position does."""
    grid = patching_grid(tiny, CLEAN, CORRUPT, ANSWERS)
    n = len(tiny.to_tokens(CLEAN))
    assert grid.values.shape == (tiny.n_layers, n)
    second = next(p for p in range(n) if tiny.to_tokens(CLEAN)[p] != tiny.to_tokens(CORRUPT)[p])
    assert grid.recovered[0, second] > 0.8 and grid.recovered[-1, -1] > 0.8
    assert np.allclose(grid.recovered[:, :second], 0, atol=1e-4)
    assert np.allclose(grid.change, grid.values - np.float32(grid.corrupt))


def test_long_prompts_take_several_steps(tiny):
    """More rows than run together, and more than sliding windows hold: the cells are the same."""
    n = 50  # 701 tokens: positions before about 200 have left the sliding layers' caches
    text, other = " ".join([CLEAN] * n), " ".join([CLEAN] * (n - 1) + [CORRUPT])
    name = "blocks.5.hook_resid_pre"
    _, cache = tiny.run_with_cache(text, name)
    grid = patching_grid(tiny, text, other, ANSWERS, layers=range(4, 6), positions=[1, 20, -5, -1])
    for column, position in enumerate((1, 20, -5, -1)):

        def patch(array, site, position=position):
            array[position] = cache[name][position]

        logits = tiny.run_with_hooks(other, [(name, patch)])
        assert grid.values[1, column] == difference(tiny, logits), position


def test_heads(model):
    _, cache = model.run_with_cache(CLEAN, "blocks.*.attn.hook_z")
    patched = head_patching(model, CLEAN, CORRUPT, ANSWERS, layers=[1, 3])
    ablated = head_ablations(model, CLEAN, ANSWERS, layers=3)
    at_mean = head_ablations(model, CLEAN, ANSWERS, layers=[3], mean=[cache])
    n_heads = model.config.n_heads
    assert patched.values.shape == (2, n_heads) and ablated.values.shape == at_mean.values.shape == (1, n_heads)
    mean = cache["blocks.3.attn.hook_z"].mean(0, dtype=np.float64).astype(np.float32)
    for head in range(n_heads):

        def patch(z, site, head=head):
            z[:, head] = cache[site.name][:, head]

        def zero(z, site, head=head):
            z[:, head] = 0

        def to_mean(z, site, head=head):
            z[:, head] = mean[head]

        site = "blocks.3.attn.hook_z"
        assert patched.values[1, head] == difference(model, model.run_with_hooks(CORRUPT, [(site, patch)]))
        assert ablated.values[0, head] == difference(model, model.run_with_hooks(CLEAN, [(site, zero)]))
        assert at_mean.values[0, head] == difference(model, model.run_with_hooks(CLEAN, [(site, to_mean)]))


def test_induction_scores(tiny):
    scores = induction_scores(tiny, n_prompts=2)
    assert scores.shape == (tiny.n_layers, tiny.config.n_heads)
    assert scores.max() > 0.5 and scores.min() >= 0 and scores.max() <= 1.001
    assert np.array_equal(scores, induction_scores(tiny, n_prompts=2))
    assert not np.array_equal(scores, induction_scores(tiny, n_prompts=2, seed=1))
    # by hand, for one prompt
    rng = np.random.default_rng(5)
    block = rng.choice(np.arange(8, tiny.n_token_ids), 10, replace=False)
    ids = np.concatenate([[tiny.tokenizer.bos_id], block, block]).astype(np.int32)
    _, cache = tiny.run_with_cache(ids, "blocks.*.attn.hook_pattern")
    layer = int(scores.max(axis=1).argmax())
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
    by_hand = np.mean([pattern[:, 11 + i, 2 + i] for i in range(9)], axis=0)
    assert np.allclose(induction_scores(tiny, period=10, n_prompts=1, seed=5)[layer], by_hand, atol=1e-6)


def test_a_metric_may_be_a_function(tiny):
    mary = tiny.to_single_token(" Mary")
    grid = patching_grid(tiny, CLEAN, CORRUPT, lambda logits: logits[mary], layers=0, positions=2)
    by_pair = patching_grid(tiny, CLEAN, CORRUPT, (mary, tiny.to_single_token(" John")), layers=0, positions=2)
    assert grid.values.shape == (1, 1) and grid.clean != by_pair.clean


@pytest.mark.parametrize("metric", [lambda logits: None, lambda logits: logits, lambda logits: "1x"])
def test_a_metric_that_is_no_number(tiny, metric):
    with pytest.raises(TypeError, match="a metric returns one number"):
        head_ablations(tiny, CLEAN, metric, layers=0)


def test_grids_are_drawn(tiny):
    pytest.importorskip("matplotlib")
    grid = patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, layers=[0, 1], positions=[0, 1, 2])
    axes = plots.grid(grid).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert np.array_equal(axes.images[0].get_array(), grid.recovered)
    ablated = head_ablations(tiny, CLEAN, ANSWERS, layers=[0])
    assert axes.get_xlabel() == "position" and plots.grid(ablated).axes[0].get_xlabel() == "head"
    assert np.array_equal(plots.grid(ablated).axes[0].images[0].get_array(), ablated.change)


def opened(model, kind):
    """An open edit, a function, or a dictionary whose reconstruction replaces the site; each changes the metric."""
    if kind == "edit":
        return model.edit([Ablate(head=(6, 1)), Scale("blocks.1.hook_resid_post", 1.1)])
    if kind == "function":
        return model.hooks([("blocks.2.hook_mlp_out", lambda array, site: array * 0.5)])
    return model.attach(gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post"), error=False)


@pytest.mark.parametrize("kind", ["edit", "function", "dictionary"])
def test_variants_run_inside_open_hooks(tiny, kind):
    plain = difference(tiny, tiny.forward(CLEAN))
    with opened(tiny, kind):
        ablated = head_ablations(tiny, CLEAN, ANSWERS, layers=[3])
        assert ablated.clean == difference(tiny, tiny.forward(CLEAN)) != plain
        for head in range(4):
            with tiny.edit(Ablate(head=(3, head))):
                assert ablated.values[0, head] == difference(tiny, tiny.forward(CLEAN))
        cache = tiny.run_with_cache(CLEAN)[1]
        grid = patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, layers=[2, 5], positions=[10, -1])
        heads = head_patching(tiny, CLEAN, CORRUPT, ANSWERS, layers=[2])
        for i, layer in enumerate((2, 5)):
            for j, position in enumerate((10, -1)):
                with tiny.edit(Patch(f"blocks.{layer}.hook_resid_pre", cache, pos=position)):
                    assert grid.values[i, j] == difference(tiny, tiny.forward(CORRUPT))
        for head in range(4):
            with tiny.edit(Patch("blocks.2.attn.hook_z", cache, head=head)):
                assert heads.values[0, head] == difference(tiny, tiny.forward(CORRUPT))
    assert head_ablations(tiny, CLEAN, ANSWERS, layers=[3]).clean == plain  # the block is left


def test_variants_are_not_recorded(tiny):
    """The plain runs are; features of all variants would be one unordered heap, as large as all of them."""
    with tiny.attach(gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post")) as record:
        patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, layers=[2, 5], positions=slice(4, None))
        head_patching(tiny, CLEAN, CORRUPT, ANSWERS, layers=[2])
        n, length = len(record.passes), len(tiny.to_tokens(CLEAN))
        head_ablations(tiny, CLEAN, ANSWERS)
        assert len(record.passes) == n + 1  # that of the plain run
        assert all(len(one.positions) == length for one in record.passes)
        record.clear()
        tiny.forward(CLEAN)
    np.testing.assert_array_equal(record.positions(), np.arange(length))


def test_open_edits_that_cannot_act_are_refused(tiny):
    edit = Scale("blocks.1.hook_resid_post", 2, pos=99)
    with tiny.edit(edit), pytest.raises(ValueError, match="position 99 cannot be edited"):
        head_ablations(tiny, CLEAN, ANSWERS, layers=[3])


def test_slices_of_layers_and_positions(tiny):
    """They choose what a list of the same numbers chooses; negative numbers count from the end."""
    n = len(tiny.to_tokens(CLEAN))

    def grid(layers, positions):
        return patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, layers=layers, positions=positions)

    for layers, positions, same in [
        (slice(-2, None), slice(9, 14, 4), ([8, 9], [9, 13])),
        ([-1, 0], slice(-1, None), ([9, 0], [n - 1])),
        (slice(1, 2), np.int64(-1), ([1], [n - 1])),
    ]:
        found, listed = grid(layers, positions), grid(*same)
        assert np.array_equal(found.values, listed.values) and found.values.size
        assert (found.rows, found.columns) == (listed.rows, listed.columns)
    assert head_ablations(tiny, CLEAN, ANSWERS, layers=slice(3, 5)).rows == ["3", "4"]


def test_equal_runs_have_no_share(tiny):
    ablated = head_ablations(tiny, CLEAN, ANSWERS, layers=[3])
    for share in (lambda: ablated.recovered, lambda: ablated.to_html(recovered=True)):
        with pytest.raises(ValueError, match="take `change`"):
            share()
    assert "change of the metric" in ablated.to_html().title.lower()


def test_the_longest_period(tiny):
    """Two stretches and BOS fill the context."""
    longest = (tiny.context_length - 1) // 2
    with pytest.raises(ValueError, match=f"period must be an integer in 2..{longest}, got {longest + 1}"):
        induction_scores(tiny, period=longest + 1)
    assert induction_scores(tiny, period=longest, n_prompts=1).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        (lambda: (CLEAN, CORRUPT, ANSWERS, {"positions": slice(99, None)}), ValueError, "holds none of 0 to 14"),
        (
            lambda: (CLEAN, CORRUPT, ANSWERS, {"layers": slice(4, 4)}),
            ValueError,
            "layers: slice(4, 4, None) holds",
        ),
        (lambda: (CLEAN, CORRUPT, ANSWERS, {"positions": -99}), ValueError, "there is no -99"),
        (lambda: (CLEAN, CORRUPT + " Mary", ANSWERS, {}), ValueError, "equal lengths"),
        (lambda: (CLEAN, CORRUPT, (" Mary",), {}), TypeError, "pair of tokens"),
        (lambda: (CLEAN, CORRUPT, 3, {}), TypeError, "pair of tokens"),
        (lambda: (CLEAN, CORRUPT, (1, 10**9), {}), ValueError, "a token"),
        (lambda: (CLEAN, CORRUPT, ANSWERS, {"positions": 99}), ValueError, "there is no 99"),
        (lambda: (CLEAN, CORRUPT, ANSWERS, {"layers": 99}), gemma4.SiteError, "layers"),
        (lambda: (CLEAN, CORRUPT, ANSWERS, {"site": "hook_nothing"}), gemma4.SiteError, "hook_nothing"),
        (lambda: (CLEAN, "", ANSWERS, {}), ValueError, "tokens"),
        (lambda: (CLEAN, CORRUPT, ANSWERS, {"site": "hook_*"}), ValueError, "one site of each layer"),
    ],
)
def test_experiments_that_make_no_sense(tiny, arguments, error, complaint):
    clean, corrupt, metric, options = arguments()
    with pytest.raises(error, match=re.escape(complaint)):
        patching_grid(tiny, clean, corrupt, metric, **options)


def test_results_say_what_they_are(tiny):
    """In one line: a prompt of a shell shows no arrays."""
    grid = patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, layers=[0, 2], positions=[3, -1])
    assert repr(grid).startswith("Grid: 2 x 2 (layer by position), values ")
    assert repr(grid).endswith(f"clean {grid.clean:.4g}, corrupt {grid.corrupt:.4g}")
    shares = dla(tiny, CLEAN)
    name, share = shares.top(1)[0]
    assert f"{len(shares.labels)} components, 1 positions; logit {shares.logits[0]:.4g}" in repr(shares)
    assert f": {name} {share:+.4g}, " in repr(shares)
    lens = logit_lens(tiny, CLEAN)
    assert repr(lens) == (
        f"LogitLens: {tiny.n_layers + 1} rows, {len(lens.positions)} positions, the best {lens.ids.shape[2]}; "
        f"last of all: {lens.tokens[-1][-1][0]!r} ({lens.probs[-1, -1, 0]:.3f})"
    )
    paths = path_patching(tiny, CLEAN, CORRUPT, [(3, 2), (4, 1)], ("blocks.9.attn.hook_q", 1), ANSWERS)
    assert repr(paths).startswith("PathEffects: 2 senders; clean ") and "4.1 " in repr(paths)
    assert all("\n" not in repr(one) for one in (grid, shares, lens, paths))
