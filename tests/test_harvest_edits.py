# SPDX-License-Identifier: Apache-2.0
"""Harvests of an edited model: what is stored, what the manifest says, which edits are refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from media_files import encoded, picture
from PIL import Image
from safetensors.numpy import save_file
from test_harvest import RESID, TEXTS, contents, write_lines

import gemma4
from gemma4 import harvest as H
from gemma4.cli import main
from gemma4.edits import (
    Ablate,
    Add,
    Edit,
    FromPrompt,
    KnockOut,
    Patch,
    Scale,
    Set,
    Steer,
    load_edits,
    save_edits,
)
from gemma4.edits.files import SavedCache
from gemma4.errors import FormatError
from gemma4.harvest.ray_data import Actor
from gemma4.harvest.worker import Ended

SITES = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
DIRECTION = np.linspace(-1, 1, 128, dtype=np.float32)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sequences of 2 to some 60 tokens."""
    rows = [{"text": text} for text in ["The", *TEXTS[:9], "A cat."]]
    return write_lines(tmp_path_factory.mktemp("corpus") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def edits(tiny) -> list[Edit]:
    """Of each kind one: all positions, some that short sequences lack, from the end, keys, rows of a cache."""
    _, cache = tiny.run_with_cache(TEXTS[3], "blocks.2.hook_mlp_out")
    return [
        Steer(DIRECTION, layer=1, scale=4),
        Scale("blocks.0.attn.hook_z", 0, head=1, pos=[1, 9, 30]),
        Patch("blocks.2.hook_mlp_out", cache, pos=(3, 12), source_pos=(5, 6)),
        KnockOut(edge=(slice(4, None), 2), layers=[0, 3]),
        Ablate("blocks.3.hook_mlp_out", pos=-5),
        Add("blocks.*.hook_attn_out", DIRECTION, pos=slice(-2, None)),
    ]


@pytest.fixture(scope="module")
def edited(tiny, texts, edits, tmp_path_factory):
    out = tmp_path_factory.mktemp("harvest") / "edited"
    H.harvest(tiny, texts, RESID, out=out, shard_tokens=100, edits=edits)
    return out


def of_length(edits: list[Edit], n: int) -> list[Edit]:
    """The edits that act in a sequence of n tokens, written out by hand."""
    steer, _, patch, knock, ablate, add = edits
    found = [steer, add] if n >= 2 else [steer]
    found += [Scale("blocks.0.attn.hook_z", 0, head=1, pos=[p for p in (1, 9, 30) if p < n])]
    pairs = [(p, s) for p, s in zip(patch.pos, patch.source_pos, strict=True) if p < n]
    if pairs:
        pos, source = zip(*pairs, strict=True)
        found.append(Patch(patch.site, patch.value, pos=pos, source_pos=source))
    found += [knock] if n > 4 else []
    return found + ([ablate] if n >= 5 else [])


def test_rows_are_those_of_the_edited_model(tiny, texts, edits, edited, tmp_path):
    H.harvest(tiny, texts, RESID, out=tmp_path / "plain", shard_tokens=100)
    lengths = set()
    with H.open(edited) as dataset, H.open(tmp_path / "plain") as plain:
        assert plain.edits == [] and "edited" not in repr(plain) and "Steer" in repr(dataset)
        for number in range(dataset.n_sequences):
            found = dataset.sequence(number)
            lengths.add(len(found["tokens"]))
            with tiny.edit(of_length(edits, len(found["tokens"]))):
                _, cache = tiny.run_with_cache(found["tokens"])
            for site in SITES:
                wanted = cache[site].astype(ml_dtypes.bfloat16)
                assert (found[site].view(np.int16) == wanted.view(np.int16)).all(), (number, site)
                assert (found[site] != plain.sequence(number)[site]).any()
    assert min(lengths) < 4 and max(lengths) > 31


def test_the_dataset_names_its_edits(tiny, texts, edits, edited):
    with H.open(edited) as dataset:
        dataset.verify()
        assert [type(edit) for edit in dataset.edits] == [type(edit) for edit in edits]
        assert (dataset.edits[0].direction == DIRECTION).all() and dataset.edits[3].edge == edits[3].edge
        named, at = dataset.manifest["plan"]["edits"], {"at": "hook_resid_post"}
        assert (
            named["edits"][0]
            == {"kind": "Steer", "direction": {"tensor": "0.direction"}, "layer": 1, "scale": 4.0} | at
        )
        assert named["tensors"]["0.direction"]["shape"] == [128]
        assert dataset.manifest["files"]["edits.safetensors"]["n_bytes"]
        with tiny.edit(dataset.edits[0]):
            tiny.forward("The cat")


def test_any_workers_files_and_ends_give_the_same_bytes(tiny, texts, edits, edited, tmp_path):
    before = contents(edited)
    file = save_edits(edits, tmp_path / "e.safetensors")
    H.harvest(tiny, texts, RESID, out=tmp_path / "two", shard_tokens=100, edits=file, workers=2)
    assert contents(tmp_path / "two") == before
    out = shutil.copytree(edited, tmp_path / "again")
    shutil.rmtree(out / "shards" / "000001")
    (out / "edits.safetensors").unlink()
    done = H.harvest(tiny, texts, RESID, out=out, shard_tokens=100, edits=load_edits(file))
    assert (done.made, done.kept) == (1, done.n_shards - 1) and contents(out) == before
    for i in (1, 0):
        H.harvest(tiny, texts, RESID, out=tmp_path / "parts", shard_tokens=100, edits=edits, part=(i, 2))
    assert contents(tmp_path / "parts") == before


def test_actors_of_ray_edit_as_workers_do(tiny, texts, edits, edited, tmp_path, monkeypatch):
    """The actor itself, without Ray, which hands it the pickled spec and numbers of shards."""

    def run(spec, shards, workers, note):
        actor = Actor(pickle.loads(pickle.dumps(spec)))
        for shard in shards:
            row = actor({"shard": np.array([shard])})
            assert row["error"][0] == b""
            note(Ended(shard, int(row["rows"][0])))

    monkeypatch.setattr("gemma4.harvest.run.run_ray", run)
    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=100, edits=edits, engine="ray")
    assert contents(tmp_path / "a") == contents(edited)


def test_other_edits_are_another_harvest(tiny, texts, edits, edited, tmp_path):
    before = contents(edited)
    others = [Steer(DIRECTION, layer=1, scale=5), *edits[1:]], [Steer(-DIRECTION, layer=1, scale=4), *edits[1:]]
    for other in (*others, edits[:1]):
        with pytest.raises(ValueError, match=r"another harvest: edits: Steer, Scale, .* before, Steer.* \([0-9a-f]+\)"):
            H.harvest(tiny, texts, RESID, out=edited, shard_tokens=100, edits=other)
    with pytest.raises(ValueError, match=r"another harvest: edits: Steer, .* before, none now"):
        H.harvest(tiny, texts, RESID, out=edited, shard_tokens=100)
    assert contents(edited) == before
    H.harvest(tiny, texts, RESID, out=tmp_path / "plain", shard_tokens=100)
    with pytest.raises(ValueError, match="another harvest: edits: none before, Steer"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "plain", shard_tokens=100, edits=edits[0])


def test_a_worker_compares_the_file_with_the_plan(tiny, texts, edits, tmp_path, monkeypatch):
    def other(self, name, data):
        if name == "edits.safetensors":
            save_edits(edits[0], self.root / name, force=True)
        else:
            (self.root / name).write_bytes(data)

    monkeypatch.setattr("gemma4.harvest.store.Store.write", other)
    with pytest.raises(FormatError, match="changed since the harvest began"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=edits)


RESID_1 = "blocks.1.hook_resid_post"
CLASH = [Set(RESID_1, 1.0, pos=2), Set(RESID_1, 2.0, pos=slice(1, 5))]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Steer(DIRECTION, 1, prompts=0), "leave prompts= out"),
        (Steer(DIRECTION, 1, steps=[0, 2]), "leave steps= out"),
        (Patch(RESID_1, FromPrompt(0), pos=1), "no document takes from another"),
        (Steer(DIRECTION, 5), r"nothing that is stored: Steer acts at blocks.5.hook_resid_post, after blocks.3"),
        (Steer(DIRECTION, 1, pos=5000), "the context is 1024"),
        (Steer(DIRECTION, 1, pos=[-5000, 6000]), "the context is 1024"),
        (Steer(DIRECTION, 1, pos=700), "none of the 11 sequences has position 700"),
        (Steer(DIRECTION, 1, pos=slice(700, None)), "would never act"),
        (Set(RESID_1, np.zeros((2, 128)), pos=(3, -2)), "count all from one side"),
        (CLASH, "would have no effect"),
        (Scale("vision.blocks.0.hook_resid_post", 2), "none of the 11 sequences has media for the encoder of vision"),
        (Steer(DIRECTION[:5], 1), "do not fit"),
    ],
)
def test_edits_that_cannot_act_are_refused_before_the_work(tiny, texts, tmp_path, given, words):
    with pytest.raises(ValueError, match=words):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=given)
    assert not list((tmp_path / "a").iterdir())


def test_edits_that_are_no_data(tiny, texts, tmp_path):
    with pytest.raises(TypeError, match="a predicate is no data"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=Scale(lambda name: "mlp_out" in name, 0))
    with pytest.raises(TypeError, match=r"one of gemma4\.edits"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=[("hook_embed", lambda array, site: array)])
    (tmp_path / "e.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"e\.safetensors"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=tmp_path / "e.safetensors")


def test_values_of_another_model(tiny, texts, tmp_path):
    cache = SavedCache(np.arange(3), {RESID_1: np.ones((3, 128), np.float32)}, "0123456789abcdef")
    with pytest.raises(ValueError, match="another model"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=Patch(RESID_1, cache))
    assert not list((tmp_path / "a").iterdir())


def test_edits_behind_the_last_site_need_not_run(tiny, texts, tmp_path):
    steers = [Steer(DIRECTION, layer) for layer in (1, 9)]  # as control vectors have one for each layer
    H.harvest(tiny, texts, RESID_1, out=tmp_path / "a", edits=steers)
    H.harvest(tiny, texts, RESID_1, out=tmp_path / "b", edits=Steer(DIRECTION, [1, 9]))
    with H.open(tmp_path / "a") as a, H.open(tmp_path / "b") as b:
        assert len(a.edits) == 2 and (np.asarray(a[RESID_1]) == np.asarray(b[RESID_1])).all()


def test_sequences_too_short_for_an_edge_are_named(tiny, tmp_path):
    corpus = write_lines(tmp_path / "ids.jsonl", [{"tokens": [2, 5, 6]}, {"tokens": [7]}])
    with pytest.raises(ValueError, match=r"document 1 of the corpus \(from 0\): KnockOut.* would keep no key"):
        H.harvest(tiny, corpus, RESID, out=tmp_path / "a", edits=KnockOut(edge=(-1, 0)))


def test_short_sequences_where_two_edits_meet(tiny, tmp_path):
    corpus = write_lines(tmp_path / "ids.jsonl", [{"tokens": [2, 5, 6]}, {"tokens": [2, 7, 5, 9, 8]}])
    both = [Set(RESID_1, 1.0, pos=2), Set(RESID_1, 2.0, pos=-1)]
    H.harvest(tiny, corpus, RESID_1, out=tmp_path / "a", edits=both)
    with H.open(tmp_path / "a") as dataset:
        assert dataset[RESID_1][:, 0].astype(int)[[2, 5, 7]].tolist() == [2, 1, 2]


def test_edits_inside_encoders_act_where_there_are_media(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(Image.fromarray(picture(64, 48)), "PNG"))
    write_lines(tmp_path / "in" / "b.jsonl", [{"text": text} for text in TEXTS])  # further batches without pictures
    edit = Scale("vision.blocks.0.hook_resid_post", 0.5)
    H.harvest(tiny, tmp_path / "in", RESID, out=tmp_path / "out", edits=edit, shard_tokens=200)
    with H.open(tmp_path / "out") as dataset:
        prompt = tiny.to_prompt([{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "in/a.png")}]}])
        with tiny.edit(edit):
            _, cache = tiny.run_with_cache(prompt)
        _, plain = tiny.run_with_cache(prompt)
        found = dataset.sequence(0)[SITES[0]]
        assert (found == cache[SITES[0]].astype(ml_dtypes.bfloat16)).all()
        assert (found != plain[SITES[0]].astype(ml_dtypes.bfloat16)).any()


@pytest.fixture
def sae(tmp_path) -> Path:
    folder, rng = tmp_path / "sae", np.random.default_rng(0)
    folder.mkdir()
    w_enc = rng.standard_normal((128, 16)).astype(np.float32)
    tensors = {"W_enc": w_enc, "W_dec": w_enc.T.copy(), "b_enc": np.zeros(16, np.float32)}
    save_file(tensors | {"b_dec": np.zeros(128, np.float32)}, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": 128, "d_sae": 16, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"hook_name": RESID_1}}))
    return folder


def test_edits_of_features(tiny, texts, sae, tmp_path):
    with gemma4.SAE.load(sae) as dictionary:
        edit = gemma4.dictionaries.ClampFeature(dictionary, 3, 8.0, pos=[2, 9])
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=edit, workers=2)
        with H.open(tmp_path / "a") as dataset, tiny.edit(edit):
            found = dataset.sequence(4)
            _, cache = tiny.run_with_cache(found["tokens"])
            assert (found[SITES[1]] == cache[SITES[1]].astype(ml_dtypes.bfloat16)).all()
            [loaded] = dataset.edits
            assert loaded.feature == 3 and loaded.dictionary.fingerprint == dictionary.fingerprint
    moved = shutil.move(sae, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="dictionaries="), H.open(tmp_path / "a") as dataset:
        _ = dataset.edits
    with gemma4.SAE.load(moved) as dictionary:  # the same dictionary in another place is the same harvest
        edit = gemma4.dictionaries.ClampFeature(dictionary, 3, 8.0, pos=[2, 9])
        assert H.harvest(tiny, texts, RESID, out=tmp_path / "a", edits=edit).made == 0
    with H.open(tmp_path / "a") as dataset:
        dataset.verify()
        assert dataset.edits


def test_command(texts, edits, edited, tmp_path, capsys):
    file = save_edits(edits, tmp_path / "e.safetensors")
    command = ["harvest", "--corpus", str(texts), "--sites", RESID, "--shard-tokens", "100", "--edits", str(file)]
    assert main([*command, "--out", str(tmp_path / "a")]) == 0
    assert contents(tmp_path / "a") == contents(edited)
    assert main([*command[:-2], "--out", str(tmp_path / "a")]) == 2
    assert "edits: Steer" in capsys.readouterr().err


def test_an_empty_corpus_or_list(tiny, texts, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    done = H.harvest(tiny, tmp_path / "empty.jsonl", RESID, out=tmp_path / "a", edits=Steer(DIRECTION, 1, pos=3))
    assert done.complete and len(H.open(tmp_path / "a").edits) == 1
    H.harvest(tiny, texts, RESID, out=tmp_path / "b", edits=[])
    assert "edits" not in H.open(tmp_path / "b").manifest["plan"]
