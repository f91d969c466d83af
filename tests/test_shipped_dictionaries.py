# SPDX-License-Identifier: Apache-2.0
"""The dictionaries that come with the package: what their cards say, and that SAELens reads the same numbers."""

import json
import re
import shutil
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

import gemma4
import gemma4.harvest
from gemma4 import SAE, Transcoder, edits
from gemma4.dictionaries import shipped, shipped_dictionaries
from gemma4.interp import dictionary_loss, evaluate_dictionary
from gemma4.interp.dictionary_loss import DictionaryEvaluation

PRETRAINED = Path(gemma4.__file__).parent / "pretrained"
TOOLS = Path(__file__).parents[1] / "tools"
NAMES = ["tiny-e/blocks.4.hook_resid_post", "tiny-e/blocks.9.mlp.hook_in", "tiny-moe/blocks.2.hook_resid_post"]


def opened(name):
    return (Transcoder if "mlp" in name else SAE).load(name)


def folder(name):
    model, site = name.split("/")
    return PRETRAINED / model / "dictionaries" / site


@pytest.fixture(scope="module")
def trainer():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import train_dictionaries

        yield train_dictionaries


def test_they_are_found_by_name():
    assert shipped_dictionaries() == NAMES
    for name in NAMES:
        with opened(name) as dictionary:
            assert dictionary.path == folder(name) and dictionary.format == "SAELens"
            assert dictionary.site == name.split("/")[1]
            assert dictionary.model_fingerprint == gemma4.load(name.split("/")[0]).fingerprint
        assert sum(file.stat().st_size for file in folder(name).iterdir()) < 2_000_000
    with pytest.raises(FileNotFoundError, match=r"there is no tiny-e/blocks\.5"):
        SAE.load("tiny-e/blocks.5.hook_resid_post")
    with pytest.raises(ValueError, match="is a transcoder"):
        SAE.load("tiny-e/blocks.9.mlp.hook_in")


def test_edits_with_them_are_saved(tmp_path):
    edit = edits_of("tiny-e/blocks.4.hook_resid_post")
    edits.save_edits(edit, tmp_path / "edits")
    (found,) = edits.load_edits(tmp_path / "edits")
    assert found.dictionary.fingerprint == edit[0].dictionary.fingerprint
    data = (tmp_path / "edits").read_bytes()
    assert b"tiny-e/blocks.4.hook_resid_post" in data and b"pretrained" not in data  # the name, no place


def test_saved_edits_find_them_elsewhere(tmp_path, monkeypatch):
    """In another installation; or where the reader says, if that has none."""
    name = "tiny-e/blocks.4.hook_resid_post"
    edits.save_edits(edits_of(name), tmp_path / "edits")
    elsewhere = tmp_path / "installed"
    shutil.copytree(folder(name), elsewhere / "tiny-e" / "dictionaries" / "blocks.4.hook_resid_post")
    monkeypatch.setattr(shipped, "PRETRAINED", elsewhere)
    (found,) = edits.load_edits(tmp_path / "edits")
    assert found.dictionary.path.is_relative_to(elsewhere)
    (elsewhere / "tiny-e" / "dictionaries").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=rf"its dictionary {name} is not there; .*dictionaries={{'{name}'"):
        edits.load_edits(tmp_path / "edits")
    places = {name: tmp_path / "moved" / "blocks.4.hook_resid_post"}
    (found,) = edits.load_edits(tmp_path / "edits", dictionaries=places)
    assert found.dictionary.path == places[name]


def test_a_harvest_takes_them_by_name(tmp_path):
    (tmp_path / "texts.txt").write_text("Once upon a time\n")
    model = gemma4.load("tiny-e")
    gemma4.harvest.harvest(model, tmp_path / "texts.txt", out=tmp_path / "out", sae=NAMES[0])
    with gemma4.harvest.open(tmp_path / "out") as dataset:
        features = dataset.features(0)
    _, cache = model.run_with_cache("Once upon a time", NAMES[0].split("/")[1])
    assert features.ids.tolist() == SAE.load(NAMES[0]).encode(cache).ids.tolist()


def test_another_seed_trains_on_other_documents(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "TOKENS", 300)
    site = "blocks.0.hook_resid_pre"
    rows = [trainer.activations("tiny-e", [site], tmp_path, seed)[site] for seed in (0, 1, 0)]
    assert (rows[0] == rows[2]).all() and (rows[0] != rows[1]).any()


def edits_of(name):
    return [gemma4.dictionaries.ClampFeature(SAE.load(name), 3, 2.0)]


def test_another_model_is_warned_of():
    sae = SAE.load(NAMES[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gemma4.load("tiny-e").attach(sae):
            pass
    with pytest.warns(UserWarning, match="was trained on another model"), gemma4.load("tiny-moe").attach(sae):
        pass


# ---- evaluate_dictionary --------------------------------------------------------------------------------------------


def losses(logits, ids):
    logits = logits[:-1].astype(np.float64)
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    return -np.log(chances[np.arange(len(ids) - 1), ids[1:]])


@pytest.mark.parametrize("name", NAMES[:2])
def test_evaluation_by_its_definition(name):
    model, dictionary = gemma4.load("tiny-e"), opened(name)
    site_out = getattr(dictionary, "site_out", dictionary.site)
    texts = ["Once upon a time", "The capital of France is Paris."]
    found = evaluate_dictionary(model, dictionary, texts)
    runs = [model.run_with_cache(text, [dictionary.site, site_out]) for text in texts]
    x, target = (
        np.concatenate([cache[site] for _, cache in runs]).astype(np.float64) for site in (dictionary.site, site_out)
    )
    features = dictionary.encode(x)
    rebuilt = dictionary.decode(features, x)
    spread = ((target - target.mean(0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - ((target - rebuilt) ** 2).sum() / spread, abs=1e-6)
    assert found.l0 == pytest.approx(features.counts.mean())
    assert found.dead == pytest.approx(1 - len(set(features.ids.tolist())) / dictionary.d_sae)
    assert found.n_tokens == len(x)
    ids = [model.to_tokens(text) for text in texts]
    assert found.loss == pytest.approx(np.concatenate([losses(r[0], i) for r, i in zip(runs, ids, strict=True)]).mean())

    def loss_with(replaced):
        return np.concatenate(
            [losses(model.run_with_hooks(i, [(site_out, fn)]), i) for i, fn in zip(ids, replaced, strict=True)]
        ).mean()

    parts = np.split(rebuilt, [len(ids[0])])
    spliced = loss_with([lambda _, __, part=part: part for part in parts])
    ablated = loss_with([lambda array, _: np.zeros_like(array)] * 2)
    assert found.loss_spliced == pytest.approx(spliced, abs=1e-4) and found.loss_ablated == pytest.approx(ablated)
    assert found.loss_recovered == pytest.approx((ablated - spliced) / (ablated - found.loss), abs=1e-4)


def test_evaluation_with_prompts_that_are_not_replaced():
    """Prompts of skip_positions tokens and fewer count for losses alone."""
    model, dictionary = gemma4.load("tiny-e"), opened(NAMES[0])
    dictionary.skip_positions = 4
    long, short = model.to_tokens("Once upon a time, there was a cat."), model.to_tokens("Once upon a time")[:4]
    alone = evaluate_dictionary(model, dictionary, [long])
    found = evaluate_dictionary(model, dictionary, [short, long, short[:2], short[:1]])
    assert (found.n_tokens, found.l0, found.explained_variance) == (
        alone.n_tokens,
        alone.l0,
        alone.explained_variance,
    )
    rest = np.concatenate([losses(model.forward(ids), ids) for ids in (short, short[:2])])
    n = len(long) - 1
    for name in ("loss", "loss_spliced", "loss_ablated"):
        mean = (getattr(alone, name) * n + rest.sum()) / (n + len(rest))
        assert getattr(found, name) == pytest.approx(mean)
    with pytest.raises(ValueError, match="at least one position from 4 on"):
        evaluate_dictionary(model, dictionary, [short, short[:2]])


def test_loss_recovered_where_zeros_lose_nothing():
    same = DictionaryEvaluation(1.0, 3.0, 0.0, loss=2.0, loss_spliced=2.0, loss_ablated=2.0, n_tokens=5)
    assert np.isnan(same.loss_recovered)


def test_losses_of_long_prompts_take_memory_for_blocks():
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((1000, 5000), dtype=np.float32), rng.integers(0, 5000, 1000, np.int32)
    tracemalloc.start()
    found = dictionary_loss._losses(logits, ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(found, losses(logits, ids), rtol=1e-12)
    assert peak < logits.nbytes


def test_one_text_is_a_prompt():
    model, sae = gemma4.load("tiny-e"), SAE.load(NAMES[0])
    text = "Once upon a time there was a king"
    assert evaluate_dictionary(model, sae, text) == evaluate_dictionary(model, sae, [text])


def test_evaluation_refuses_what_has_no_loss():
    model, sae = gemma4.load("tiny-e"), SAE.load(NAMES[0])
    with pytest.raises(ValueError, match="at least one prompt of two tokens"):
        evaluate_dictionary(model, sae, [[2]])
    with pytest.raises(ValueError, match="at least one prompt of two tokens"):
        evaluate_dictionary(model, sae, [])
    with pytest.raises(gemma4.SiteError):
        evaluate_dictionary(gemma4.load("tiny-moe"), SAE.load(NAMES[0], site="blocks.7.hook_resid_post"), ["Once"])


# ---- cards ----------------------------------------------------------------------------------------------------------


def claims(name):
    rows = re.findall(r"^\| ([\w ]+?) \| ([\d.]+)( %)?[^|]*\|$", (folder(name) / "README.md").read_text(), re.MULTILINE)
    return {what: float(value) / (100 if percent else 1) for what, value, percent in rows}


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_true(trainer, name):
    """On a third of the card's documents, so with some slack; the MLP's own share of the loss is small and varies."""
    card, recipe = claims(name), next(one for one in trainer.RECIPES if one.name == name)
    assert card["explained variance"] > 0.8 and card["loss recovered"] > 0.9 and card["dead features"] < 0.1
    found = trainer.evaluation(recipe, 48)
    assert found.explained_variance == pytest.approx(card["explained variance"], abs=0.03)
    assert found.loss_recovered == pytest.approx(card["loss recovered"], abs=0.08 if recipe.site_out else 0.01)
    assert found.l0 == pytest.approx(card["features at a position"], rel=0.1)
    assert found.loss == pytest.approx(card["loss"], rel=0.4)


# ---- SAELens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers_in_saelens(name):
    sae_lens, torch = pytest.importorskip("sae_lens"), pytest.importorskip("torch")
    ours, theirs = opened(name), sae_lens.SAE.load_from_disk(folder(name))
    target = getattr(ours, "site_out", ours.site)
    _, cache = gemma4.load(name.split("/")[0]).run_with_cache("The capital of France is Paris.", [ours.site, target])
    x = torch.from_numpy(cache[ours.site].copy())
    with torch.no_grad():
        features = theirs.encode(x)
        rebuilt = theirs.decode(features).numpy()
    features = (features.to_dense() if features.is_sparse else features).numpy()
    np.testing.assert_allclose(ours.encode(cache).dense(), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours(cache), rebuilt, rtol=1e-4, atol=1e-4)
    assert theirs.cfg.metadata.hook_name == ours.site


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site_out", [None, "blocks.0.hook_mlp_out"])
def test_training_finds_a_sparse_code(trainer, site_out, tmp_path, monkeypatch):
    """Sums of two of twelve directions, in other scales than training's: explained; and the same each time."""
    import torch
    from safetensors.numpy import save_file

    monkeypatch.setattr(trainer, "BATCH", 256)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 12, 24, generator=generator)
    chosen = torch.rand(3000, 12, generator=generator).topk(2).indices
    code = torch.zeros(3000, 12).scatter(1, chosen, 1 + torch.rand(3000, 2, generator=generator))
    x = 5 * code @ directions[0] + 7
    y = x if site_out is None else 0.1 * code @ directions[1] - 2
    recipe = trainer.Recipe("tiny-e", "blocks.0.hook_resid_post", site_out, d_sae=32, k=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tensors = [found.tensors(*scales) for found, *scales in (trainer.train(recipe, x, y, 300, 0) for _ in range(2))]
    finally:
        torch.set_num_threads(threads)
    for array, again in zip(tensors[0].values(), tensors[1].values(), strict=True):
        assert array.tobytes() == again.tobytes()
    save_file(tensors[0], tmp_path / "sae_weights.safetensors")
    config = trainer.configuration(recipe, 24, 24)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    found = SAE.load(tmp_path).metrics(x) if site_out is None else Transcoder.load(tmp_path).metrics(x, y)
    assert found.explained_variance > 0.8 and 1.5 < found.l0 < 5
