# SPDX-License-Identifier: Apache-2.0
"""`gemma4 features`: cards, tables and Neuronpedia's JSON of Gemma Scope 2's examples and of a harvest."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_feature_examples import LENGTH, SEQUENCES, N, grid, tensors
from test_html import HOSTILE, Page

import gemma4
from gemma4 import harvest, html
from gemma4.cli import main
from gemma4.dictionaries import Examples, Features
from gemma4.harvest.cards import HarvestedFeatures
from gemma4.html.markup import number, visible
from gemma4.interp import dashboard
from gemma4.interp.dashboard import direct_logits, feature_card, holding, neuronpedia
from gemma4.load.safetensors import SafetensorsFile

TEXTS = [
    "When Mary and John went to the store, John gave a book to Mary.",
    "Once upon a time there was a little girl who lived near the forest.",
    "The 😀 مرحبا <b> $x$ </script> cat",
]


@pytest.fixture(scope="module")
def data():
    """Tokens that tiny-e has; feature 4, which never fires, has the places of feature 5 with the value 0."""
    made = tensors(np.random.default_rng(0))
    for name in ("seq_ids", "positions"):
        made[name][4] = made[name][5]
    return made | {"tokens": np.arange(8, 8 + SEQUENCES * LENGTH, dtype=np.int32).reshape(SEQUENCES, LENGTH)}


@pytest.fixture(scope="module")
def scope(data, tmp_path_factory):
    """A folder of Gemma Scope 2 with examples."""
    folder = tmp_path_factory.mktemp("scope")
    save_file(data, folder / "examples.safetensors")
    return folder


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("sae"), np.random.default_rng(0)
    w_enc = rng.standard_normal((128, 48)).astype(np.float32)
    stored = {"W_enc": w_enc, "W_dec": w_enc.T.copy(), "b_enc": np.full(48, -9, np.float32)}
    save_file(stored | {"b_dec": np.zeros(128, np.float32)}, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": 128, "d_sae": 48, "dtype": "float32", "note": "<b>" + "x" * 500}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"hook_name": "blocks.1.hook_resid_post"}}))
    return folder


@pytest.fixture(scope="module")
def acts(tiny, sae, tmp_path_factory):
    """A harvest of sparse features alone."""
    folder = tmp_path_factory.mktemp("acts")
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    harvest.harvest(tiny, corpus, [], out=folder / "out", sae=sae)
    return folder / "out"


def words(ids):
    return [f"w{i}" for i in ids]


# ---- examples --------------------------------------------------------------------------------------------------------


def test_peaks_are_the_strongest_places(data, scope):
    with Examples.load(scope) as examples:
        values, tokens = examples.peaks()
    for feature in range(N):
        whole = grid(data, feature)
        assert values[feature] == whole.max()
        assert tokens[feature] == (data["tokens"].ravel()[whole.argmax()] if whole.max() else -1)


def test_features_that_are_strong_at_the_same_tokens(data, scope):
    fired = np.stack([grid(data, feature).ravel() > 0 for feature in range(N)])
    with Examples.load(scope) as examples:
        found = examples.together(range(N), N)
        assert examples.together([5], 2) == [found[5][:2]]
        assert examples.together([], 2) == []
    for feature in range(N):
        shares = (fired & fired[feature]).sum(axis=1) / max(1, fired[feature].sum())
        expected = {i: share for i, share in enumerate(shares) if share > 0 and i != feature}
        assert dict(found[feature]) == pytest.approx(expected)
        assert [share for _, share in found[feature]] == sorted(expected.values(), reverse=True)
    assert found[4] == []  # it never fires


@pytest.mark.parametrize(
    ("change", "words"), [({"seq_ids": SEQUENCES}, "seq_ids of feature"), ({"positions": LENGTH}, "position 20 of")]
)
def test_places_that_do_not_exist_are_said(data, tmp_path, change, words):
    [(name, value)] = change.items()
    save_file(data | {name: np.full_like(data[name], value)}, tmp_path / "examples.safetensors")
    with Examples.load(tmp_path) as examples, pytest.raises(gemma4.FormatError, match=words):
        examples.peaks()


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_a_card_holds_everything(data, scope):
    with Examples.load(scope) as examples:
        card = feature_card(examples, 2, words, n_examples=3, context=2, near=[(5, 0.25), (1, 0.125)])
        silent = feature_card(examples, 4, words)
    assert card.feature == 2 and card.facts[0] == (
        "fires at",
        f"{100 * data['feature_frequencies'][2]:.3g} % of tokens",
    )
    assert card.facts[1] == ("largest value", number(grid(data, 2).max()))
    assert len(card.examples) == 3 and card.histogram[0].sum() == 30 and len(card.up) == len(card.down) == 10
    best = card.examples[0]
    assert best.values.max() == grid(data, 2).max() and len(best.texts) <= 5
    assert silent.examples == [] and silent.histogram is None
    page = Page(html.cards([card, silent]).page())
    assert len(page.named("div", "g4-example")) == 3 and "0.250" in page.texts and "w8" not in page.texts[:0]


def test_cards_of_hostile_tokens(scope):
    with Examples.load(scope) as examples:
        cards = [feature_card(examples, i, lambda ids: [HOSTILE[j % len(HOSTILE)] for j in ids]) for i in range(N)]
    text = html.cards(cards, title=HOSTILE[0]).page()
    text.encode()
    assert len(Page(text).named("script")) == 1 and not Page(text).named("img")


def test_neuronpedias_json(data, scope):
    with Examples.load(scope) as examples:
        made = neuronpedia(
            examples, 2, words, model_id="gemma-3-1b", source_id="13-gemmascope-2-res-16k", near=[(7, 0.5)]
        )
        again = json.loads(json.dumps(made))
    assert again == made
    assert (made["modelId"], made["layer"], made["index"]) == ("gemma-3-1b", "13-gemmascope-2-res-16k", "2")
    assert made["sourceSetName"] == "gemmascope-2-res-16k" and made["correlated_features_indices"] == [7]
    assert len(made["freq_hist_data_bar_heights"]) == len(made["freq_hist_data_bar_values"]) == 40
    assert sum(made["freq_hist_data_bar_heights"]) == 30
    assert made["maxActApprox"] == float(grid(data, 2).max()) and made["frac_nonzero"] == float(
        data["feature_frequencies"][2]
    )
    assert made["pos_values"] == sorted(made["pos_values"], reverse=True) and made["neg_values"] == sorted(
        made["neg_values"]
    )
    for one in made["activations"]:
        assert len(one["tokens"]) == len(one["values"]) and one["values"][one["maxValueTokenIndex"]] == one["maxValue"]


def test_direct_logits(tiny, sae):
    with gemma4.SAE.load(sae) as dictionary:
        [(up, down)] = direct_logits(tiny, dictionary, [3], k=5)
        logits = tiny.unembed(slice(None)) @ (dictionary.direction(3) * tiny.gain("norm"))
        assert direct_logits(tiny, dictionary, []) == []
    assert np.allclose(up.logits, np.sort(logits)[::-1][:5], rtol=1e-4) and up.tokens[0] == logits.argmax()
    assert np.allclose(down.logits, np.sort(logits)[:5], rtol=1e-4) and down.tokens[0] == logits.argmin()
    with pytest.raises(ValueError, match="the residual stream has 128"):
        direct_logits(tiny, SimpleNamespace(d_out=64), [0])


def test_direct_logits_of_many_features(tiny, sae, monkeypatch):
    """The blocks change nothing, nor more tokens than there are."""
    with gemma4.SAE.load(sae) as dictionary:
        directions = np.stack([dictionary.direction(i) for i in range(48)]) * tiny.gain("norm")
        logits = directions @ tiny.unembed(slice(None)).T
        monkeypatch.setattr(dashboard, "_ROWS", 37)
        monkeypatch.setattr(dashboard, "_DIRECTIONS", 5)
        for k in (6, tiny.d_vocab + 9):
            found = direct_logits(tiny, dictionary, range(48), k=k)
            for (up, down), row in zip(found, logits, strict=True):
                assert len(up.tokens) == len(down.tokens) == min(k, tiny.d_vocab)
                np.testing.assert_allclose(up.logits, np.sort(row)[::-1][:k], rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(down.logits, np.sort(row)[:k], rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(row[up.tokens], up.logits, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(row[down.tokens], down.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "fits"),
    [("hook_attn_out", True), ("hook_mlp_out", True), ("hook_resid_mid", True)]
    + [(site, False) for site in ("ln2.hook_normalized", "mlp.hook_in", "mlp.hook_out", "attn.hook_out")],
)
def test_direct_logits_need_the_residual_stream(tiny, sae, site, fits):
    with gemma4.SAE.load(sae, site=f"blocks.1.{site}") as dictionary:
        if fits:
            assert direct_logits(tiny, dictionary, [3])
        else:
            with pytest.raises(ValueError, match=f"writes blocks.1.{site}, which is not in the space of the residual"):
                direct_logits(tiny, dictionary, [3])


def test_holding():
    assert holding("mary", [" Mary", "Ros\nemary", "Mar y"]).tolist() == [True, True, False]
    assert holding("·M", [" Mary", "Mary"]).tolist() == [True, False]


# ---- what notebooks show ---------------------------------------------------------------------------------------------


def test_features_show_the_strongest(sae):
    features = Features(
        np.array([0, 2, 2, 5]), np.array([1, 4, 0, 2, 3], np.int32), np.array([1, 2, 5, 3, 4], np.float32), 9
    )
    page = Page(features._repr_html_())
    titles = page.texts
    assert "0 (2 fired)" in titles and "1 (0 fired)" in titles and "3 positions" in titles[0]
    cells = [text for text in titles[titles.index("2 (3 fired)") + 1 :] if text.strip()]
    assert cells[:4] == ["0", "3", "2", "-"]
    looks = [cell["style"] for cell in page.named("td")]
    assert looks[:3] == ["--v:0.4", "--v:0.2", "--v:0"] and looks[16:20] == ["--v:1", "--v:0.8", "--v:0.6", "--v:0"]
    assert len(Page(features.to_html(1, 2).fragment()).named("td")) == 2
    assert "The last 1 of 3 positions" in features.to_html(1)._repr_html_()
    for wrong in ({"last": 0}, {"k": 0}):
        with pytest.raises(ValueError, match="from 1 on"):
            features.to_html(**wrong)
    with gemma4.SAE.load(sae) as dictionary:
        text = dictionary._repr_html_()
    assert "blocks.1.hook_resid_post" in Page(text).texts and "<b>" not in text and "x" * 200 not in text


# ---- the command -----------------------------------------------------------------------------------------------------


def rows_of(out):
    return [line.split() for line in out.splitlines() if line.split() and line.split()[0].isdigit()]


def test_features_of_gemma_scope(data, scope, capsys, tmp_path):
    page, file = tmp_path / "f.html", tmp_path / "f.json"
    argv = ["features", str(scope), "--count", "4", "--html", str(page), "--json", str(file), "--source-id", "1-x"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    peaks = np.array([grid(data, feature).max() for feature in range(N)])
    order = np.argsort(-peaks, kind="stable")[:4].tolist()
    assert [int(row[0]) for row in rows_of(out)] == order and "11 of them fire" in out and "tokens are ids" in out
    assert [row[3] for row in rows_of(out)] == [number(peaks[feature]) for feature in order]
    found = Page(page.read_text(encoding="utf-8"))
    assert [card["data-feature"] for card in found.named("article")] == [str(feature) for feature in order]
    made = json.loads(file.read_text())
    assert [one["index"] for one in made] == [str(feature) for feature in order] and made[0]["layer"] == "1-x"
    assert made[0]["pos_str"][0].startswith("<") and len(made[0]["activations"]) == 8


def test_order_choice_and_search(data, scope, capsys):
    assert main(["features", str(scope), "--sort", "density", "--count", "20"]) == 0
    alive = [feature for feature in range(N) if feature != 4]
    expected = sorted(alive, key=lambda feature: -data["feature_frequencies"][feature])
    assert [int(row[0]) for row in rows_of(capsys.readouterr().out)] == expected
    assert main(["features", str(scope), "--feature", "4", "--feature", "2", "--feature", "4"]) == 0
    assert [int(row[0]) for row in rows_of(capsys.readouterr().out)] == [4, 2]
    peak = data["tokens"].ravel()[grid(data, 7).argmax()]
    assert main(["features", str(scope), "--search", f"<{peak}>", "--sort", "index"]) == 0
    assert 7 in [int(row[0]) for row in rows_of(capsys.readouterr().out)]
    raised = data["top_tokens"][9][0]
    assert main(["features", str(scope), "--search", f"<{raised}>"]) == 0
    assert 9 in [int(row[0]) for row in rows_of(capsys.readouterr().out)]


def test_features_of_a_harvest(tiny, acts, sae, capsys, tmp_path):
    page, file = tmp_path / "f.html", tmp_path / "f.json"
    argv = ["features", str(acts), "--sae", str(sae), "--count", "3", "--html", str(page), "--json", str(file)]
    assert main(argv) == 0
    dataset = harvest.open(acts)
    stored = dataset.examples()
    order = np.argsort(-stored["activations"].max(axis=1), kind="stable")[:3]
    rows = rows_of(capsys.readouterr().out)
    assert [int(row[0]) for row in rows] == order.tolist()
    place = int(dataset.bounds[stored["seq_ids"][order[0], 0]] + stored["positions"][order[0], 0])
    assert rows[0][4] == visible(tiny.to_str_tokens([int(dataset["tokens"][place])])[0])
    made = json.loads(file.read_text(encoding="utf-8"))
    assert len(made[0]["pos_str"]) == 10 and made[0]["correlated_features_indices"]
    text = page.read_text(encoding="utf-8")
    assert len(Page(text).named("article")) == 3 and len(Page(text).named("script")) == 1
    with gemma4.SAE.load(sae) as dictionary:
        up = direct_logits(tiny, dictionary, order[:1].tolist())[0][0]
    assert made[0]["pos_str"] == tiny.to_str_tokens(up.tokens)


def test_search_finds_what_features_of_a_harvest_raise(tiny, acts, sae, capsys, monkeypatch):
    """A text that no strongest token holds; also where features are searched in several blocks."""
    monkeypatch.setattr("gemma4.cli.features._SEARCHED", 7)
    with HarvestedFeatures(harvest.open(acts)) as source, gemma4.SAE.load(sae) as dictionary:
        peaks, tokens = source.peaks()
        alive = np.flatnonzero(peaks > 0)
        there = tiny.to_str_tokens(tokens[alive])
        raised = [tiny.to_str_tokens(up.tokens) for up, _ in direct_logits(tiny, dictionary, alive.tolist())]
    wanted = next(text for texts in raised for text in texts if len(text) > 3 and not holding(text, there).any())
    expected = [int(i) for i, texts in zip(alive, raised, strict=True) if holding(wanted, texts).any()]
    argv = ["features", str(acts), "--search", visible(wanted), "--sort", "index", "--count", "48"]
    assert main([*argv, "--sae", str(sae)]) == 0
    assert [int(row[0]) for row in rows_of(capsys.readouterr().out)] == expected
    assert main(argv) == 2 and "no feature fires with" in capsys.readouterr().err


def test_cards_of_a_harvest_count_every_value(tiny, sae, tmp_path):
    """With one example of each feature, and several shards."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"{i} {text[i:]} {text[:i]}" for i in range(3) for text in TEXTS), encoding="utf-8")
    harvest.harvest(tiny, corpus, [], out=tmp_path / "out", sae=sae, examples=1, shard_tokens=40)
    dataset = harvest.open(tmp_path / "out")
    assert dataset.n_shards > 1
    dense = np.concatenate([dataset.features(shard).dense() for shard in range(dataset.n_shards)])
    with HarvestedFeatures(dataset) as source:
        for feature in range(48):
            values = dense[:, feature][dense[:, feature] > 0]
            counts, edges = source.histogram(feature, 7)
            np.testing.assert_allclose(edges, np.linspace(0, values.max(initial=0) or 1, 8), rtol=1e-6)
            wanted = np.histogram(values, np.linspace(0, values.max(initial=0) or 1, 8))[0]
            assert counts.sum() == len(values) and np.abs(counts - wanted).sum() <= 2  # at edges, float32 rounds
            for context in (None, 3):
                for example in source.top(feature, context=context):
                    first = int(dataset.bounds[example.sequence]) + example.start
                    rows = slice(first, first + len(example.tokens))
                    np.testing.assert_array_equal(example.values, dense[rows, feature])
                    np.testing.assert_array_equal(example.tokens, dataset["tokens"][rows])
        busy = int((dense > 0).sum(axis=0).argmax())
        assert (dense[:, busy] > 0).sum() > 1 and (source.top(busy, context=None)[0].values > 0).sum() > 1
        for wrong in (-1, 48):
            with pytest.raises(IndexError, match="no feature"):
                source.histogram(wrong)
        with pytest.raises(ValueError, match="bins must be"):
            source.histogram(0, 0)


@pytest.mark.parametrize(("name", "value"), [("ids", 48), ("ids", -1), ("values", np.nan), ("values", np.inf)])
def test_damaged_features_of_a_harvest_are_said(acts, monkeypatch, name, value):
    dataset = harvest.open(acts)
    whole = dataset.features(0)
    broken = getattr(whole, name).copy()
    broken[len(broken) // 2] = value
    monkeypatch.setattr(dataset, "features", lambda shard, dictionary: dataclasses.replace(whole, **{name: broken}))
    with pytest.raises(gemma4.FormatError, match="the features of shard 0 are damaged"):
        HarvestedFeatures(dataset).histogram(0)


@pytest.mark.parametrize("file", ["shards/000000/features-0.safetensors", "examples-0.safetensors"])
def test_cards_of_a_harvest_that_changes_are_refused(acts, tmp_path, monkeypatch, file):
    """Between the first use and the next, or while it is used."""
    out = shutil.copytree(acts, tmp_path / "acts")
    source = HarvestedFeatures(harvest.open(out))
    source.histogram(0)
    features = source._dataset.features

    def features_and_cut(shard, dictionary):
        found = features(shard, dictionary)
        os.truncate(out / file, 4096)
        return found

    monkeypatch.setattr(source._dataset, "features", features_and_cut)
    with pytest.raises(gemma4.FormatError, match=r"changed size"):
        source.histogram(0, 9)
    with pytest.raises(gemma4.FormatError, match=r"changed size"):
        source.top(int(source._dataset.features(0, 0).ids[0]))


def twin(sae, folder):
    """A dictionary of the same widths."""
    shutil.copytree(sae, folder)
    stored = load_file(folder / "sae_weights.safetensors")
    save_file(stored | {"b_dec": stored["b_dec"] + 1}, folder / "sae_weights.safetensors")


def near(folder):
    """tiny-e after a step of training: the same tokenizer, other weights."""
    shutil.copytree(gemma4.load("tiny-e").checkpoint.path, folder, ignore=shutil.ignore_patterns("dictionaries"))
    file = folder / "model.safetensors"
    stored = SafetensorsFile(file)
    info = next(info for name, info in stored.tensors.items() if name.endswith("norm.weight"))
    stored.close()
    raw = bytearray(file.read_bytes())
    raw[info.offset] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["none"], "examples.safetensors"),
        (["scope", "--feature", "99"], "there is no feature 99"),
        (["scope", "--search", "nowhere"], "no feature fires with 'nowhere'"),
        (["scope", "--count", "0"], "--count 0"),
        (["scope", "--examples", "0"], "--examples 0"),
        (["scope", "--context", "-1"], "context"),
        (["scope", "--sae", "sae"], "--sae needs --model"),
        (["scope", "--sae", "sae", "--model", "tiny-e"], "has 48 features"),
        (["scope", "--html", "x", "--json", "x"], "both name x"),
        (["scope", "--html", "none/x.html"], "no such folder"),
        (["acts", "--dictionary", "3"], "has 1, counted from 0"),
        (["acts", "--model", "random"], "another tokenizer"),
        (["plain"], "harvest with --sae"),
        (["acts", "--sae", "twin"], "is another dictionary than sae"),
        (["acts", "--sae", "sae", "--model", "near"], "was made with another model"),
    ],
)
def test_errors_are_one_line(tiny, scope, acts, sae, random_dir, tmp_path, monkeypatch, capsys, argv, words):
    for name, path in (("scope", scope), ("acts", acts), ("sae", sae), ("random", random_dir)):
        (tmp_path / name).symlink_to(path)
    if "twin" in argv:
        twin(sae, tmp_path / "twin")
    if "near" in argv:
        near(tmp_path / "near")
    if "plain" in argv:
        corpus = tmp_path / "c.txt"
        corpus.write_text("one two", encoding="utf-8")
        harvest.harvest(tiny, corpus, "blocks.1.hook_resid_post", out=tmp_path / "plain")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    extra = ["--html", "out.html"] if "--html" not in argv and "--json" not in argv else []
    assert main(["features", *argv, *extra]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before
