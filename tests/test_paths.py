# SPDX-License-Identifier: Apache-2.0
"""Path patching against explicit runs with hooks, and direct logit attribution against the logits."""

import re

import numpy as np
import pytest

import gemma4
from gemma4.edits import Ablate, Scale, Steer
from gemma4.interp import dla, patching_grid, path_patching, plots
from gemma4.interp.lens import final_norm

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPT = "When Mary and John went to the store, Mary gave a book to"
ANSWERS = (" Mary", " John")
ALL = slice(None)
OUTPUTS = ("hook_attn_out", "hook_mlp_out", "hook_ple_out")


@pytest.fixture(scope="module")
def tiny():
    return gemma4.load("tiny-e")


@pytest.fixture(scope="module", params=["tiny-e", "tiny-moe"])
def model(request):
    return gemma4.load(request.param)


def difference(model, logits):
    mary, john = (model.to_single_token(name) for name in ANSWERS)
    return np.float32(float(logits[-1, mary] - logits[-1, john]))


# ---- path patching --------------------------------------------------------------------------------------------------


def by_hand(model, sender, receivers, pos=ALL):
    """Two runs with functions: the receivers with all outputs behind the sender held, then the metric with them."""
    clean, corrupt = (model.run_with_cache(text)[1] for text in (CLEAN, CORRUPT))
    layer, head = sender if isinstance(sender, tuple) else (0, None)

    def send(array, site):
        at = pos if head is None else (pos, head)
        array[at] = corrupt[site.name][at]

    def hold(array, site):
        array[:] = clean[site.name]

    own = f"blocks.{layer}.hook_attn_out" if head is not None else sender
    sites = list(model.sites)
    held = [name for name in sites if name.endswith(OUTPUTS) and sites.index(name) > sites.index(own)]
    hooks = [(f"blocks.{layer}.attn.hook_z" if head is not None else sender, send), *((name, hold) for name in held)]
    with model.hooks(hooks):
        _, found = model.run_with_cache(CLEAN, [name for name, _ in receivers])

    def receive(array, site):
        for name, head in receivers:
            if name == site.name:
                at = slice(None) if head is None else (slice(None), head)
                array[at] = found[name][at]

    return difference(model, model.run_with_hooks(CLEAN, [(name, receive) for name in {n for n, _ in receivers}]))


CASES = {
    "a head to a query": ((1, 2), [("blocks.3.attn.hook_q", 1)]),
    "a head to the mlp of its own layer": ((2, 0), [("blocks.2.mlp.hook_in", None)]),
    "an mlp to keys and values": ("blocks.0.hook_mlp_out", [(f"blocks.1.attn.hook_{x}", None) for x in "kv"]),
    "a head to the logits": ((3, 1), [("ln_final.hook_normalized", None)]),
    "the embedding to a residual stream": ("hook_embed", [("blocks.2.hook_resid_pre", None)]),
    "attention to a residual stream": ("blocks.1.hook_attn_out", [("blocks.4.hook_resid_pre", None)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_path_is_two_runs(model, name):
    sender, receivers = CASES[name]
    receivers = [one for one in receivers if one[0] in model.sites]
    given = [name if head is None else (name, head) for name, head in receivers]
    found = path_patching(model, CLEAN, CORRUPT, sender, given if len(given) > 1 else given[0], ANSWERS)
    assert found.values.tolist() == [by_hand(model, sender, receivers)]
    assert found.clean == difference(model, model.forward(CLEAN))
    assert found.corrupt == difference(model, model.forward(CORRUPT))
    assert found.values[0] != np.float32(found.clean)


def test_positions_of_the_sender(model):
    receiver = "blocks.4.hook_resid_pre"
    found = path_patching(model, CLEAN, CORRUPT, (1, 0), receiver, ANSWERS, pos=[10, -1])
    assert found.values[0] == by_hand(model, (1, 0), [(receiver, None)], pos=[10, -1])
    assert found.values[0] != path_patching(model, CLEAN, CORRUPT, (1, 0), receiver, ANSWERS).values[0]


def test_every_sender(model):
    """To the final residual stream: what each adds reaches it multiplied by the layer scalars."""
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    found = path_patching(model, CLEAN, CORRUPT, None, last, lambda logits: logits[77])
    has_ple = "blocks.0.hook_ple_out" in model.sites
    assert len(found.senders) == model.n_layers * (model.config.n_heads + 1 + has_ple)
    clean, corrupt = (model.run_with_cache(text)[1] for text in (CLEAN, CORRUPT))
    for i, name in enumerate(found.senders):
        if name.endswith("_out"):
            factor = np.prod([model.layer_scalar(j) for j in range(int(name.split(".")[1]), model.n_layers)])
            resid = clean[last][-1] + factor * (corrupt[name][-1] - clean[name][-1])
            raw = float(final_norm(model, resid.astype(np.float32)) @ model.unembed(np.array([77]))[0])
            cap = model.engine_config["logit_softcap"]
            assert found.values[i] == pytest.approx(cap * np.tanh(raw / cap) if cap else raw, abs=2e-4), name
    one = found.senders.index("2.1")
    assert found.values[one] == path_patching(model, CLEAN, CORRUPT, (2, 1), last, lambda x: x[77]).values[0]
    both = path_patching(model, CLEAN, CORRUPT, [(2, 1), "blocks.0.hook_mlp_out"], last, lambda x: x[77])
    assert both.senders == ["2.1", "blocks.0.hook_mlp_out"] and both.values[0] == found.values[one]
    assert np.allclose(found.change, found.values - np.float32(found.clean))
    assert np.allclose(found.share, found.change / np.float32(found.corrupt - found.clean))


def test_long_prompts_take_several_steps(tiny):
    text, other = " ".join([CLEAN] * 60), " ".join([CORRUPT] * 60)
    receivers = ["blocks.3.attn.hook_q", "blocks.2.mlp.hook_in"]
    found = path_patching(tiny, text, other, [(0, 0), (0, 1), (1, 0), (1, 2)], receivers, ANSWERS)
    alone = [path_patching(tiny, text, other, (i, j), receivers, ANSWERS).values[0] for i, j in ((0, 1), (1, 2))]
    assert [found.values[1], found.values[3]] == alone


@pytest.mark.parametrize("kind", ["edit", "function", "dictionary"])
def test_paths_run_inside_open_hooks(tiny, kind):
    """Several senders at once, as by hand in the same block; hooks behind the receivers act in the second run."""
    sender, receiver = (3, 2), "blocks.6.hook_resid_pre"
    plain = path_patching(tiny, CLEAN, CORRUPT, sender, receiver, ANSWERS)
    opened = {
        "edit": lambda: tiny.edit([Scale("blocks.2.hook_resid_post", 1.3), Ablate(head=(8, 1))]),
        "function": lambda: tiny.hooks([("blocks.[27].hook_mlp_out", lambda array, site: array * 0.5)]),
        "dictionary": lambda: tiny.attach(gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post"), error=False),
    }
    with opened[kind]():
        senders = [(2, 1), sender, (1, 0)]
        found = path_patching(tiny, CLEAN, CORRUPT, senders, receiver, ANSWERS)
        assert found.values.tolist() == [by_hand(tiny, one, [(receiver, None)]) for one in senders]
        assert found.clean == difference(tiny, tiny.forward(CLEAN)) != plain.clean
        assert found.corrupt == difference(tiny, tiny.forward(CORRUPT))
    assert found.values[1] != plain.values[0]


def test_pairs_and_positions_of_numpy(tiny):
    """The result of np.argwhere names senders, pairs of NumPy's integers are pairs, and a generator serves them all."""
    chosen = np.zeros((tiny.n_layers, 4), bool)
    chosen[1, 2] = chosen[3, 2] = True

    def values(sender, receiver=("blocks.5.attn.hook_q", 1), pos=None):
        return path_patching(tiny, CLEAN, CORRUPT, sender, receiver, ANSWERS, pos=pos).values.tolist()

    expected = values([(1, 2), (3, 2)])
    assert values(np.argwhere(chosen)) == expected and expected[0] != expected[1]
    assert values((np.int64(1), np.int64(2))) == values(np.array([1, 2])) == expected[:1]
    assert values((1, 2), ("blocks.5.attn.hook_q", np.int64(1))) == expected[:1]
    positions = [10, 14]
    assert values([(1, 2), (3, 2)], pos=(p for p in positions)) == values([(1, 2), (3, 2)], pos=positions)


def test_equal_runs_have_no_share(tiny):
    same = path_patching(tiny, CLEAN, CLEAN, (1, 2), "blocks.3.attn.hook_q", ANSWERS)
    with pytest.raises(ValueError, match="take `change`"):
        _ = same.share
    assert same.change.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"sender": np.array([[1.5, 2]])}, TypeError, "senders are (layer, head) or sites"),
        ({"sender": [(1, 2, 3)]}, TypeError, "senders are (layer, head) or sites"),
        ({"receivers": "blocks.5.hook_mlp_out"}, ValueError, "name what the component reads"),
        ({"receivers": "blocks.0.attn.hook_q"}, ValueError, "no receiver comes after the sender (1, 2)"),
        ({"receivers": ("blocks.3.hook_resid_pre", 1)}, ValueError, "has no heads"),
        ({"receivers": []}, ValueError, "no receivers"),
        ({"receivers": 3}, TypeError, "receivers sites or (site, head)"),
        ({"receivers": "blocks.3.hook_nothing"}, gemma4.SiteError, "hook_nothing"),
        ({"sender": "blocks.1.hook_resid_mid"}, ValueError, "a sender is (layer, head) or the site of an output"),
        ({"sender": (1, 99)}, ValueError, "has heads 0 to"),
        ({"sender": (99, 1)}, gemma4.SiteError, "layers"),
        ({"sender": 5}, TypeError, "senders are (layer, head) or sites"),
        ({"corrupt": CORRUPT + " Mary"}, ValueError, "equal lengths"),
        ({"metric": (" Mary",)}, TypeError, "pair of tokens"),
        ({"pos": 99}, ValueError, "no position 99"),
    ],
)
def test_paths_that_make_no_sense(tiny, arguments, error, complaint):
    given = {"clean": CLEAN, "corrupt": CORRUPT, "sender": (1, 2), "receivers": "blocks.3.attn.hook_q"}
    given |= {"metric": ANSWERS} | arguments
    with pytest.raises(error, match=re.escape(complaint)):
        path_patching(tiny, **given)


# ---- direct logit attribution ---------------------------------------------------------------------------------------


def raw_logits(model, text):
    name = "hook_logits_raw" if "hook_logits_raw" in model.sites else "hook_logits"
    return model.run_with_cache(text, name)[1][name]


def shares_add_up(model, text, token):
    raw = raw_logits(model, text)
    found = dla(model, text, of=token, pos="all")
    assert found.values.shape == (len(found.labels), len(raw)) and len(set(found.labels)) == len(found.labels)
    scale = np.abs(raw).max()
    np.testing.assert_allclose(found.values.sum(0, dtype=np.float64), raw[:, token], atol=1e-5 * scale)
    np.testing.assert_allclose(found.logits, raw[:, token], atol=1e-5 * scale)
    return found


def test_shares_are_the_logit(model):
    found = shares_add_up(model, CLEAN, model.to_single_token(" Mary"))
    kinds = {re.sub(r"\d+", "#", label) for label in found.labels}
    ple, experts = {"#_ple_out"}, {"#_mlp_dense", "#_expert_#"}
    expected = {"embed", "#_head_#"} | (experts if model.config.n_experts else {"#_mlp_out"})
    assert kinds == expected | (ple if "hook_ple_token" in model.sites else set())


@pytest.mark.parametrize("name", ["random_e", "random_moe"])
def test_shares_are_the_logit_of_random_models(name, prompt, request):
    shares_add_up(request.getfixturevalue(name), prompt, 17)


def test_edits_have_a_share_of_their_own(tiny):
    """What steering adds, multiplied by the scalars of later blocks; the shares are the logit again."""
    token, layer = tiny.to_single_token(" Mary"), 3
    direction = np.random.default_rng(0).standard_normal(tiny.config.d_model).astype(np.float32)
    with tiny.edit(Steer(direction, layer, 2.0)):
        found = shares_add_up(tiny, CLEAN, token)
        scales = tiny.run_with_cache(CLEAN, "ln_final.hook_scale")[1]["ln_final.hook_scale"]
    added = 2.0 * direction * np.prod([tiny.layer_scalars[i] for i in range(layer + 1, tiny.n_layers)])
    towards = tiny.unembed(token).ravel() * tiny.gain("norm")
    assert found.labels[-1] == "edits"
    np.testing.assert_allclose(found.values[-1], (added @ towards) / scales[:, 0], rtol=1e-4)


@pytest.mark.parametrize("name", ["blocks.4.hook_attn_out", "blocks.4.attn.hook_out", "blocks.9.hook_resid_post"])
def test_shares_are_the_logit_inside_edits(tiny, name):
    with tiny.edit(Scale(name, 0.5)):
        found = shares_add_up(tiny, CLEAN, tiny.to_single_token(" Mary"))
    assert np.abs(found.values[-1]).max() > 1e-3
    with tiny.edit(Ablate(head=(4, 2))):  # what the head writes is its share
        assert np.abs(shares_add_up(tiny, CLEAN, tiny.to_single_token(" Mary")).values[-1]).max() < 1e-4
    with tiny.attach(gemma4.SAE.load("tiny-e/blocks.4.hook_resid_post"), error=False):
        assert shares_add_up(tiny, CLEAN, tiny.to_single_token(" Mary")).labels[-1] == "edits"
    assert "edits" not in dla(tiny, CLEAN).labels


@pytest.mark.parametrize("pos", [[12, 3, 12], slice(12, 2, -9), (p for p in (12, -12)), np.array([12, 3]), "all", None])
def test_predicted_tokens_stand_at_their_positions(tiny, pos):
    whole = tiny.forward(CLEAN)
    every = pos is None or (isinstance(pos, str) and pos == "all")
    found = dla(tiny, CLEAN, pos=pos)
    assert found.positions.tolist() == (list(range(len(whole))) if every else [3, 12])
    assert found.tokens.tolist() == whole[found.positions].argmax(-1).tolist()
    assert found.values.shape[1] == len(found.names) == len(found.prompt) == len(found.positions)
    np.testing.assert_allclose(found.values.sum(0), found.logits, rtol=1e-4, atol=1e-4)


def test_targets(tiny):
    mary, john = (tiny.to_single_token(name) for name in ANSWERS)
    both, first, second = dla(tiny, CLEAN, ANSWERS), dla(tiny, CLEAN, mary), dla(tiny, CLEAN, " John")
    assert both.tokens.tolist() == [[mary], [john]] and first.tokens.tolist() == [mary]
    np.testing.assert_allclose(both.values, first.values - second.values, atol=1e-5)
    predicted = dla(tiny, CLEAN, pos=[3, -1])
    assert predicted.tokens.tolist() == tiny.forward(CLEAN).argmax(-1)[[3, -1]].tolist()
    assert predicted.positions.tolist() == [3, len(tiny.to_tokens(CLEAN)) - 1]
    assert np.array_equal(predicted.values[:, 1], dla(tiny, CLEAN, int(predicted.tokens[1])).values[:, 0])
    top = both.top(3)
    assert [abs(value) for _, value in top] == sorted(np.abs(both.values[:, -1]), reverse=True)[:3]
    assert dict(top)[both.labels[np.abs(both.values[:, -1]).argmax()]] == top[0][1]


def test_shares_are_those_of_a_cache(model):
    """Of components that are all in memory at once."""
    found = dla(model, CLEAN, " Mary")
    names = [name for name in model.sites if name.split(".")[-1] != "hook_pattern"]
    _, cache = model.run_with_cache(CLEAN, names, pos=-1, logits=None)
    stack = cache.decompose_resid(per_head=True, per_expert=True)
    assert stack.labels == found.labels
    np.testing.assert_allclose(cache.logit_attrs(stack, " Mary"), found.values, atol=2e-4)
    if model.config.n_experts:
        chosen = cache["blocks.1.moe.hook_expert_ids"][0]
        assert [label for label in found.labels if "1_expert" in label] == [f"1_expert_{e}" for e in sorted(chosen)]


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"of": 10**9}, ValueError, "of"),
        ({"of": (1, 2, 3)}, TypeError, "pair of tokens"),
        ({"of": 2.5}, ValueError, "of"),
        ({"pos": 99, "of": 5}, ValueError, "out of range"),
    ],
)
def test_attributions_that_make_no_sense(tiny, options, error, complaint):
    with pytest.raises(error, match=complaint):
        dla(tiny, CLEAN, **options)


# ---- rows of a patching grid ----------------------------------------------------------------------------------------


def test_heads_by_position(tiny):
    _, cache = tiny.run_with_cache(CLEAN, "blocks.*.attn.hook_z")
    grid = patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, what="heads", layers=[3, 5], positions=[10, -1])
    n_heads = tiny.config.n_heads
    assert grid.rows == [f"{layer}.{head}" for layer in (3, 5) for head in range(n_heads)] and grid.down == "layer.head"
    for row, head, column, position in ((1, 1, 0, 10), (n_heads, 0, 1, -1)):

        def patch(z, site, head=head, position=position):
            z[position, head] = cache[site.name][position, head]

        layer = grid.rows[row].split(".")[0]
        logits = tiny.run_with_hooks(CORRUPT, [(f"blocks.{layer}.attn.hook_z", patch)])
        assert grid.values[row, column] == difference(tiny, logits)


def test_experts_by_position():
    """A patched expert has the clean run's output, through the weighted outputs where both runs chose it."""
    moe = gemma4.load("tiny-moe")
    names = ["blocks.2.moe.hook_expert_ids", "blocks.2.moe.hook_expert_out", "blocks.2.moe.hook_out"]
    clean, corrupt = (moe.run_with_cache(text, names)[1] for text in (CLEAN, CORRUPT))
    positions = [3, 10, 11, -1]
    grid = patching_grid(moe, CLEAN, CORRUPT, ANSWERS, what="experts", layers=2, positions=positions)
    used = np.unique([clean[names[0]], corrupt[names[0]]])
    assert grid.rows == [f"2.{expert}" for expert in used] and grid.down == "layer.expert"
    n_changed = 0
    for i, expert in enumerate(used):
        for j, position in enumerate(positions):
            new, old = ((cache[names[0]][position] == expert).nonzero()[0] for cache in (clean, corrupt))

            def patch(array, site, position=position, new=new, old=old):
                if site.name == names[1]:
                    array[position, old] = clean[names[1]][position, new].sum(0) if len(new) else 0
                elif not len(old):
                    array[position] += clean[names[1]][position, new].sum(0)

            logits = moe.run_with_hooks(CORRUPT, [(names[1], patch), (names[2], patch)])
            assert grid.values[i, j] == pytest.approx(difference(moe, logits), abs=1e-4), (expert, position)
            n_changed += grid.values[i, j] != np.float32(grid.corrupt)
    assert n_changed > 4 and plots.grid(grid).axes[0].get_ylabel() == "layer.expert"


def test_kinds_of_rows(tiny):
    for what, site in (("residual", "hook_resid_pre"), ("mlp", "hook_mlp_out"), ("ple", "hook_ple_in")):
        options = {"layers": [0, 4], "positions": [10]}
        by_name = patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, site=site, **options)
        assert np.array_equal(patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, what=what, **options).values, by_name.values)
    for options in ({"what": "everything"}, {"what": "mlp", "site": "hook_mlp_out"}):
        with pytest.raises(ValueError, match="site= or what= of residual, attention"):
            patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, **options)
    with pytest.raises(gemma4.SiteError, match=r"moe\.hook_out"):
        patching_grid(tiny, CLEAN, CORRUPT, ANSWERS, what="experts")
