# SPDX-License-Identifier: Apache-2.0
"""Harvests: what is stored, readers of corpora, resuming after every kind of end, damage."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from media_files import encoded, picture, tone
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_models import E_LIKE, write_checkpoint
from torch.utils.data import DataLoader

import gemma4
from gemma4 import harvest as H
from gemma4.cli import main
from gemma4.errors import FormatError, SiteError, StateError
from gemma4.harvest import dataset as dataset_module
from gemma4.harvest import export, local, shard, store
from gemma4.harvest.dictionaries import Examples
from gemma4.harvest.moments import Moments
from gemma4.harvest.plan import expand_braces, stop_layer
from gemma4.load.safetensors import SafetensorsFile

RESID = "blocks.{1,3}.hook_resid_post"
TEXTS = [f"Once upon a time there was a cat number {i}. " * (1 + i % 5) for i in range(40)]


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("corpus") / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Token ids, for models without a tokenizer."""
    rng = np.random.default_rng(0)
    rows = [{"tokens": [2, *rng.integers(3, 300, int(n)).tolist()]} for n in rng.integers(5, 90, 60)]
    return write_lines(tmp_path_factory.mktemp("corpus") / "ids.jsonl", rows)


@pytest.fixture(scope="module")
def harvested(tiny, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("harvest") / "acts"
    H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)
    return out


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_rows_are_what_run_with_cache_captures(tiny, harvested):
    with H.open(harvested) as dataset:
        assert dataset.sites == ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
        assert dataset.n_sequences == len(TEXTS) and dataset.n_shards > 3
        for i in (0, 7, 39):
            found = dataset.sequence(i)
            tokens = tiny.to_tokens(TEXTS[i])
            _, cache = tiny.run_with_cache(tokens)
            assert found["tokens"].tolist() == tokens.tolist()
            assert found["pos"].tolist() == list(range(len(tokens))) and set(found["seq_id"].tolist()) == {i}
            assert not found["token_type"].any()
            for site in dataset.sites:
                wanted = cache[site].astype(ml_dtypes.bfloat16)
                assert (found[site].view(np.int16) == wanted.view(np.int16)).all()
        assert dataset.documents[:, 0].tolist() == list(range(len(TEXTS))) and not dataset.documents[:, 1].any()
        assert dataset.n_rows == sum(len(tiny.to_tokens(text)) for text in TEXTS) == len(dataset["tokens"])
        dataset.verify()


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_other_dtypes_and_kinds_of_sites(random_moe, ids, tmp_path, dtype):
    sites = ["blocks.1.attn.hook_z", "blocks.2.attn.hook_k_used", "blocks.0.moe.hook_expert_ids", "hook_embed"]
    H.harvest(random_moe, ids, sites, out=tmp_path / "a", dtype=dtype, shard_tokens=400)
    with H.open(tmp_path / "a") as dataset:
        found = dataset.sequence(3)
        _, cache = random_moe.run_with_cache(found["tokens"], sites)
        for site in sites:
            wanted = cache[site]
            assert (
                found[site] == (wanted.astype(np.float16) if dtype == "f16" and wanted.dtype == np.float32 else wanted)
            ).all()
        assert found["blocks.0.moe.hook_expert_ids"].dtype == np.int32
        with pytest.raises(SiteError, match="integers"):
            dataset.stats("blocks.0.moe.hook_expert_ids")


def test_long_documents_continue_with_bos_in_front(tiny, texts, tmp_path):
    H.harvest(tiny, texts, "blocks.0.hook_resid_pre", out=tmp_path / "a", context=16, shard_tokens=300)
    with H.open(tmp_path / "a") as dataset:
        assert np.diff(dataset.bounds).max() == 16
        for number, text in enumerate(TEXTS):
            wanted = tiny.to_tokens(text).tolist()
            mine = [i for i in range(dataset.n_sequences) if dataset.documents[i, 0] == number]
            pieces = [dataset["tokens"][dataset.bounds[i] : dataset.bounds[i + 1]].tolist() for i in mine]
            assert all(piece[0] == tiny.tokenizer.bos_id for piece in pieces)
            assert wanted == [wanted[0], *(token for piece in pieces for token in piece[1:])]
            starts = dataset.documents[mine, 1].tolist()
            assert [wanted[start or 1] for start in starts] == [piece[1] for piece in pieces]


def test_max_tokens_is_exact_and_the_same_for_any_shards(tiny, texts, tmp_path):
    for shard_tokens in (100, 5000):
        out = tmp_path / str(shard_tokens)
        H.harvest(tiny, texts, "hook_embed", out=out, max_tokens=333, shard_tokens=shard_tokens)
        with H.open(out) as dataset:
            assert dataset.n_rows == 333
            tokens = np.asarray(dataset["tokens"])
        assert tokens.tolist() == np.concatenate([tiny.to_tokens(text) for text in TEXTS])[:333].tolist()


def test_statistics_are_those_of_all_rows(harvested, tiny):
    with H.open(harvested) as dataset:
        site = dataset.sites[1]
        rows = np.concatenate([tiny.run_with_cache(text, site)[1][site] for text in TEXTS]).astype(np.float64)
        found = dataset.stats(site)
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.std, rows.std(axis=0), rtol=1e-9)
        assert found.norm == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-9)


def test_moments_merge_and_far_means_keep_digits():
    rng = np.random.default_rng(1)
    rows = (rng.normal(size=(1000, 3)) + 1e4).astype(np.float32)
    found = Moments.none((3,))
    for begin in range(0, 1000, 77):
        found = found.merged(Moments.of(rows[begin : begin + 77]))
    np.testing.assert_allclose(found.std(), rows.astype(np.float64).std(axis=0), rtol=1e-7)
    assert found.n == 1000


def test_a_run_ends_at_the_last_site_that_is_needed(tiny):
    sites = tiny.sites
    assert stop_layer(sites, [sites["blocks.3.hook_resid_post"], sites["hook_embed"]]) == 4
    assert stop_layer(sites, [sites["hook_embed"]]) == 0
    assert stop_layer(sites, [sites["ln_final.hook_out"]]) is None


# -- names of sites ----------------------------------------------------------------------------------------------------


def test_braces():
    assert expand_braces("a.{1,3}.b") == ["a.1.b", "a.3.b"]
    assert expand_braces("a.{0,2..4}.b") == ["a.0.b", "a.2.b", "a.3.b", "a.4.b"]
    assert sorted(expand_braces("{a,b}.{1,2}")) == ["a.1", "a.2", "b.1", "b.2"]
    assert expand_braces("{a,b{1,2}}") == ["a", "b1", "a", "b2"]
    for wrong in ("a.{1", "a}", "a.{3..1}", "a.{x..y}"):
        with pytest.raises(ValueError, match=r"brace|range"):
            expand_braces(wrong)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ("blocks.{1,99}.hook_resid_post", "10 layers"),
        ("blocks.1.attn.hook_pattern", "a column for each key"),
        ("vision.blocks.0.hook_resid_post", "inside encoders"),
        ((), "nothing to harvest"),
        ("blocks.1.hook_nothing", "no site"),
    ],
)
def test_sites_that_cannot_be_stored(tiny, texts, tmp_path, sites, words):
    with pytest.raises((ValueError, SiteError), match=words):
        H.harvest(tiny, texts, sites, out=tmp_path / "a")


def test_options_out_of_range(tiny, texts, tmp_path):
    with pytest.raises(ValueError, match="top_k is of dictionaries"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", top_k=3)
    for option, value in {
        "workers": 0,
        "context": 1,
        "dtype": "f64",
        "max_tokens": 0,
        "shard_tokens": 0,
        "part": (2, 2),
        "engine": "cloud",
        "sample_by": "word",
        "top_k": -1,
    }.items():
        with pytest.raises(ValueError, match=option.replace("top_k", "top_k|examples")):
            sae = {"sae": tmp_path} if option == "top_k" else {}
            H.harvest(tiny, texts, RESID, out=tmp_path / "a", **{option: value}, **sae)
    with tiny.hooks([("hook_embed", lambda array, site: array)]), pytest.raises(ValueError, match="leave the block"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a")


# -- corpora -----------------------------------------------------------------------------------------------------------


def tokens_of(model, corpus, out, **options):
    H.harvest(model, corpus, "hook_embed", out=out, **options)
    with H.open(out) as dataset:
        bounds = dataset.bounds
        tokens = np.asarray(dataset["tokens"])
        return [tokens[a:b].tolist() for a, b in pairwise(bounds)]


def test_text_files(tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffThe cat.\r\nThe dog.\n\n \nA bird sang.\n".encode())
    for sample_by, wanted in {
        "line": ["The cat.", "The dog.", "A bird sang."],
        "paragraph": ["The cat.\r\nThe dog.", "A bird sang."],
        "document": ["The cat.\r\nThe dog.\n\n \nA bird sang.\n"],
    }.items():
        for shard_tokens in (1, 1000):  # 1: each document is a shard, found again by its place
            out = tmp_path / f"{sample_by}{shard_tokens}"
            found = tokens_of(tiny, path, out, sample_by=sample_by, shard_tokens=shard_tokens)
            assert found == [tiny.to_tokens(text).tolist() for text in wanted]


def test_tables(tiny, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table = pa.table({"text": TEXTS, "other": list(range(len(TEXTS)))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    feather.write_feather(table, tmp_path / "b.feather", chunksize=9)
    with ipc.new_stream(tmp_path / "c.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=11)
    wanted = [tiny.to_tokens(text).tolist() for text in TEXTS]
    for name in ("a.parquet", "b.feather", "c.arrow"):
        assert tokens_of(tiny, tmp_path / name, tmp_path / f"{name}-out", shard_tokens=100) == wanted
    with pytest.raises(FormatError, match=r"no column 'txt'.*text, other"):
        H.harvest(tiny, tmp_path / "a.parquet", RESID, out=tmp_path / "x", key="txt")
    for name in ("a.parquet", "b.feather", "c.arrow"):
        damaged = tmp_path / f"damaged-{name}"
        damaged.write_bytes((tmp_path / name).read_bytes()[:300])
        with pytest.raises(FormatError, match=f"damaged-{name}"):
            H.harvest(tiny, damaged, RESID, out=tmp_path / "x")


def test_tables_without_pyarrow(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"gemma4\[harvest\]"):
        H.harvest(tiny, tmp_path / "a.parquet", RESID, out=tmp_path / "x")


def test_media_are_documents(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(Image.fromarray(picture(64, 48)), "PNG"))
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image", "image": "a.png"}]}]
    write_lines(tmp_path / "in" / "b.jsonl", [{"messages": messages}, {"text": "The cat."}])
    H.harvest(tiny, tmp_path / "in", RESID, out=tmp_path / "out")
    with H.open(tmp_path / "out") as dataset:
        assert dataset.n_sequences == 3
        absolute = [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "in" / "a.png")}]}]
        prompt = tiny.to_prompt(absolute)
        _, cache = tiny.run_with_cache(prompt)
        found = dataset.sequence(0)
        assert (found[dataset.sites[0]] == cache[dataset.sites[0]].astype(ml_dtypes.bfloat16)).all()
        soft = np.zeros(len(prompt), np.uint8)
        soft[prompt.runs[0].start : prompt.runs[0].stop] = 1
        assert found["token_type"].tolist() == soft.tolist() and soft.any()
        assert dataset.sequence(1)["token_type"].any() and not dataset.sequence(2)["token_type"].any()
    (tmp_path / "in" / "a.png").write_bytes(encoded(Image.fromarray(picture(64, 48, seed=1)), "PNG"))
    with pytest.raises(ValueError, match="corpus fingerprint"):
        H.harvest(tiny, tmp_path / "in", RESID, out=tmp_path / "out")


def test_recordings_are_documents(tiny, tmp_path):
    samples = (tone(0.5) * 30000).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
    H.harvest(tiny, tmp_path / "a.wav", RESID, out=tmp_path / "out")
    with H.open(tmp_path / "out") as dataset:
        prompt = tiny.to_prompt([{"role": "user", "content": [{"type": "audio", "audio": str(tmp_path / "a.wav")}]}])
        _, cache = tiny.run_with_cache(prompt)
        found = dataset.sequence(0)
        assert (found[dataset.sites[1]] == cache[dataset.sites[1]].astype(ml_dtypes.bfloat16)).all()
        [run] = prompt.runs
        assert (np.flatnonzero(found["token_type"] == 3) == np.arange(run.start, run.stop)).all()


def test_damaged_documents_can_be_left_out(tiny, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG no picture")
    part = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    corpus = write_lines(tmp_path / "b.jsonl", [{"text": "The cat."}, {"messages": [part]}, {"text": "The dog."}])
    with pytest.raises(FormatError, match=r"b\.jsonl, line 2"):
        H.harvest(tiny, corpus, RESID, out=tmp_path / "out")
    H.harvest(tiny, corpus, RESID, out=tmp_path / "out", skip_damaged=True)
    with H.open(tmp_path / "out") as dataset:
        assert dataset.documents[:, 0].tolist() == [0, 2]
        [[document, reason]] = dataset.manifest["skipped"]
        assert document == 1 and "a.png" in reason


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "line 2 is no JSON"),
        (b"[" * 100_000, "line 2: JSON is nested|line 2 is no JSON"),
        (b'{"txt": "a"}', "line 2: no field text or messages.*txt"),
        (b'{"text": 5}', "line 2: 'text' is int"),
        (b"[1, 2]", "line 2: expected an object"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8"),
        (b'{"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}', "line 2: .*hologram"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}', "gone.png|line 2"),
        (b'{"tokens": [2, 99999]}', "line 2: token id 99999"),
        (b'{"tokens": [2, 1' + b"0" * 40 + b"]}", "line 2: a token id is out of range"),
        (b'{"tokens": [2, true]}', "line 2: 'tokens' is list"),
        (b'{"tokens": [2, 3.5]}', "line 2: 'tokens' is list"),
        (b'{"text": "\\ud800"}', "line 2: the text is not valid Unicode"),
    ],
)
def test_damaged_lines_are_named(tiny, tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "The cat."}\n' + line + b"\n")
    with pytest.raises((FormatError, ValueError, OSError), match=words):
        H.harvest(tiny, tmp_path / "a.jsonl", RESID, out=tmp_path / "out")


def test_corpora_that_are_none(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.doc").write_text("x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for corpus, error in {
        "gone.jsonl": FileNotFoundError,
        "empty": ValueError,
        "a.doc": ValueError,
        "pipe.jsonl": FormatError,
    }.items():
        with pytest.raises(error, match=corpus):
            H.harvest(tiny, tmp_path / corpus, RESID, out=tmp_path / "out")
    with pytest.raises(ValueError, match="corpus is empty"):
        H.harvest(tiny, [], RESID, out=tmp_path / "out")


def test_empty_documents_have_no_sequence(tiny, tmp_path):
    corpus = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "The cat."}, {"tokens": []}])
    assert len(tokens_of(tiny, corpus, tmp_path / "out")) == 1
    nothing = write_lines(tmp_path / "b.jsonl", [{"text": ""}])
    assert tokens_of(tiny, nothing, tmp_path / "none") == []
    (tmp_path / "c.jsonl").write_bytes(b"")
    assert tokens_of(tiny, tmp_path / "c.jsonl", tmp_path / "zero") == []
    with H.open(tmp_path / "zero") as dataset, pytest.raises(ValueError, match="no rows"):
        dataset.stats(dataset.sites[0])


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_any_workers_and_parts_give_the_same_bytes(tiny, texts, harvested, tmp_path):
    done = H.harvest(tiny, texts, RESID, out=tmp_path / "two", shard_tokens=300, workers=2)
    assert done.complete and done.made == done.n_shards and done.tokens == len(H.open(harvested))
    assert contents(tmp_path / "two") == contents(harvested)
    for i in (1, 0):
        done = H.harvest(tiny, texts, RESID, out=tmp_path / "parts", shard_tokens=300, part=(i, 2))
        assert done.complete == (i == 0)
        if i:
            with pytest.raises(StateError, match="not complete"):
                H.open(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(harvested)


def test_run_again_makes_nothing(tiny, texts, harvested):
    before = contents(harvested)
    done = H.harvest(tiny, texts, RESID, out=harvested, shard_tokens=300)
    assert (done.made, done.kept) == (0, done.n_shards) and contents(harvested) == before


def harvest_command(model: Path, corpus: Path, out: Path, *options: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "gemma4", "harvest", "--model", str(model), "--corpus", str(corpus)]
    return [*command, "--sites", RESID, "--out", str(out), "--shard-tokens", "60", "--threads", "1", *options]


def killed_harvest(command: list[str], out: Path, rng: random.Random) -> bool:
    """Run the command and kill it, or one of its workers, after some shards; whether it was still running."""
    shards = out / "shards"
    before = len(list(shards.iterdir())) if shards.is_dir() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = before + rng.randint(0, 6)
    while process.poll() is None and (not shards.is_dir() or len(list(shards.iterdir())) < wanted):
        time.sleep(0.002)
    time.sleep(rng.random() * 0.02)
    running = process.poll() is None
    process.kill()
    process.wait()
    return running


def kill_and_compare(model: Path, corpus: Path, tmp_path: Path, workers: int, kills: int, seed: int) -> int:
    """Kill a harvest again and again, then let it end; it must have the bytes of an undisturbed one."""
    whole, out = tmp_path / "whole", tmp_path / f"killed-{workers}"
    if not whole.is_dir():
        subprocess.run(harvest_command(model, corpus, whole), check=True, capture_output=True)
    rng = random.Random(seed)
    command = harvest_command(model, corpus, out, "--workers", str(workers))
    killed = sum(killed_harvest(command, out, rng) for _ in range(kills))
    subprocess.run(command, check=True, capture_output=True)
    assert contents(out) == contents(whole)
    return killed


@pytest.mark.slow
def test_killed_harvests_end_in_the_same_bytes(random_dir, ids, tmp_path):
    """`python tests/test_harvest.py N` kills more often."""
    assert kill_and_compare(random_dir, ids, tmp_path, workers=1, kills=3, seed=1) > 1
    assert kill_and_compare(random_dir, ids, tmp_path, workers=4, kills=2, seed=4) > 0


def test_a_killed_worker_is_replaced(tiny, texts, harvested, tmp_path, monkeypatch):
    start = local._Crew._start
    started = []

    def watched(crew):
        process = start(crew)
        started.append(process)
        return process

    monkeypatch.setattr(local._Crew, "_start", watched)
    killed = []

    def progress(now):
        if len(killed) < 2:
            killed.append(started[len(killed)].pid)
            os.kill(killed[-1], signal.SIGKILL)

    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300, workers=2, progress=progress)
    assert len(killed) == 2 and len(started) > 2
    assert contents(tmp_path / "a") == contents(harvested)


def test_two_harvests_at_once(ids, random_dir, tmp_path):
    """Of one dataset: both end well, and its bytes are those of one."""
    command = harvest_command(random_dir, ids, tmp_path / "a")
    both = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode)[1] for process in both] == [0, 0]
    with gemma4.load(random_dir, threads=1) as model:
        H.harvest(model, ids, RESID, out=tmp_path / "b", shard_tokens=60)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_shard_that_another_process_completed_meanwhile(tiny, texts, harvested, tmp_path, monkeypatch):
    def finished_elsewhere(*_):
        shutil.copytree(harvested / "shards", tmp_path / "a" / "shards", dirs_exist_ok=True)
        store.Store(tmp_path / "a").clean(everything=True)
        return facts(*_)

    facts = shard.facts_of
    monkeypatch.setattr(shard, "facts_of", finished_elsewhere)
    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300)
    assert contents(tmp_path / "a") == contents(harvested)


def test_a_shard_that_kills_every_worker_ends_the_harvest(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_COMMAND", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeError, match=r"died 3 times at shard \d+ \(SIGKILL"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300, workers=2)


def test_workers_hand_on_their_errors(tiny, tmp_path):
    corpus = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS] + [{"tokens": [1, 2, -7]}])
    with pytest.raises(ValueError, match="line 41: token id -7"):
        H.harvest(tiny, corpus, RESID, out=tmp_path / "a", shard_tokens=300, workers=2)
    assert not list((tmp_path / "a" / "shards").glob(".*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_shards(tiny, texts, harvested, tmp_path, workers):
    def progress(now):
        if now.shards == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300, workers=workers, progress=progress)
    assert len(list((tmp_path / "a" / "shards").iterdir())) >= 2 and not list((tmp_path / "a" / "shards").glob(".*"))
    done = H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300)
    assert done.kept >= 2 and contents(tmp_path / "a") == contents(harvested)


def test_disk_full(tiny, texts, harvested, tmp_path, monkeypatch):
    writes, put = [], store.TensorWriter.put

    def failing(writer, *args):
        writes.append(1)
        if len(writes) == 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(writer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(store.TensorWriter, "put", failing)
        with pytest.raises(OSError, match=f"No space left.*{tmp_path}"):
            H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300)
    with monkeypatch.context() as patch:
        patch.setattr(shard.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
        with pytest.raises(OSError, match=r"the next shard needs .* 100 left"):
            H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300)
    kept = [path.name for path in (tmp_path / "a" / "shards").iterdir()]
    assert kept and all(name.isdigit() for name in kept)
    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300)
    assert contents(tmp_path / "a") == contents(harvested)


def test_a_full_disk_in_a_worker(ids, random_dir, tmp_path):
    """Files that cannot grow, as on a full disk: the command says so, and resumes."""
    command = harvest_command(random_dir, ids, tmp_path / "a", "--shard-tokens", "2000")
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *command, "--workers", "2"]
    found = subprocess.run(limited, capture_output=True, text=True)
    assert found.returncode == 2 and "File too large" in found.stderr and "resumes" in found.stderr
    with gemma4.load(random_dir) as model:
        H.harvest(model, ids, RESID, out=tmp_path / "a", shard_tokens=2000)
    H.open(tmp_path / "a").verify()


def test_ray_is_an_extra(tiny, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"gemma4\[ray\]"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "a", engine="ray")


# -- damage and changes ------------------------------------------------------------------------------------------------


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_record(path: Path, key: str, by: int) -> None:
    facts = json.loads(path.read_text())
    facts[key] += by
    path.write_text(json.dumps(facts))


def copy_shard(out: Path, source: str, target: str) -> None:
    shutil.rmtree(out / "shards" / target)
    shutil.copytree(out / "shards" / source, out / "shards" / target)


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: flip(out / "shards/000001/data.safetensors"),
        lambda out: flip(out / "shards/000001/data.safetensors", 20),
        lambda out: os.truncate(out / "shards/000001/data.safetensors", 500),
        lambda out: os.truncate(out / "shards/000001/data.safetensors", 0),
        lambda out: (out / "shards/000001/data.safetensors").unlink(),
        lambda out: flip(out / "shards/000001/stats.safetensors"),
        lambda out: (out / "shards/000001/record.json").write_text("{"),
        lambda out: (out / "shards/000001/record.json").write_text('{"rows": 3}'),
        lambda out: (out / "shards/000001/record.json").unlink(),
        lambda out: change_record(out / "shards/000001/record.json", "rows", -1),
        lambda out: change_record(out / "shards/000001/record.json", "documents", 1),
        lambda out: copy_shard(out, "000001", "000002"),
        lambda out: shutil.rmtree(out / "shards/000001"),
        lambda out: flip(out / "stats.safetensors"),
        lambda out: (out / "stats.safetensors").unlink(),
        lambda out: (out / "manifest.json").write_text("[]"),
        lambda out: (out / "manifest.json").write_text('{"format"'),
        lambda out: (out / "manifest.json").unlink(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*made again", "ignore:.*written again")
def test_damage_is_found_and_mended(tiny, texts, harvested, tmp_path, damage):
    out = shutil.copytree(harvested, tmp_path / "a")
    damage(out)
    with pytest.raises((FormatError, FileNotFoundError)):
        H.open(out).verify()
    H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)
    assert contents(out) == contents(harvested)


def test_damage_is_said(tiny, texts, harvested, tmp_path):
    out = shutil.copytree(harvested, tmp_path / "a")
    flip(out / "shards/000001/data.safetensors")
    with pytest.warns(UserWarning, match=r"shard 1: data.safetensors is damaged.*made again"):
        H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)


def test_other_peoples_files_stay(tiny, texts, harvested, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        H.harvest(tiny, texts, RESID, out=tmp_path / "file")
    out = shutil.copytree(harvested, tmp_path / "a")
    flip(out / "shards/000001/data.safetensors")
    (out / "shards/000001/notes.md").write_text("mine")
    (out / "notes.md").write_text("mine")
    with pytest.raises(FormatError, match=r"notes\.md"):
        H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)
    assert (out / "shards/000001/notes.md").read_text() == (out / "notes.md").read_text() == "mine"


def test_changes_are_refused_and_named(tiny, texts, harvested, tmp_path):
    before = contents(harvested)
    other = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in [*TEXTS[:-1], "Another one."]])
    same = {"shard_tokens": 300, "out": harvested}
    for (corpus, sites, options), words in {
        (other, RESID, ()): "corpus fingerprint",
        (texts, "blocks.1.hook_resid_post", ()): "sites: blocks.1.hook_resid_post, .* before",
        (texts, RESID, (("dtype", "f32"),)): "dtype: bf16 before, f32 now",
        (texts, RESID, (("context", 64),)): "context: 1024 before, 64 now",
        (texts, RESID, (("max_tokens", 64),)): "max_tokens: null before, 64 now",
        (texts, RESID, (("shard_tokens", 200),)): "shard_tokens: 300 before, 200 now",
    }.items():
        with pytest.raises(ValueError, match=f"another harvest: {words}"):
            H.harvest(tiny, corpus, sites, **(same | dict(options)))
    with gemma4.load("tiny-e", kv_dtype="f16") as model, pytest.raises(ValueError, match="model kv_dtype: f32 before"):
        H.harvest(model, texts, RESID, **same)
    assert contents(harvested) == before


def test_one_changed_weight_is_another_model(random_dir, ids, tmp_path):
    """In the middle of a tensor, where a sampled fingerprint does not look."""
    model = write_checkpoint(tmp_path / "m", E_LIKE)
    with gemma4.load(model) as opened:
        H.harvest(opened, ids, RESID, out=tmp_path / "a", shard_tokens=2000)
    opened = SafetensorsFile(model / "model.safetensors")
    largest = max(opened.tensors.values(), key=lambda info: info.nbytes)
    opened.close()
    flip(model / "model.safetensors", largest.offset + largest.nbytes // 2)
    with gemma4.load(model) as opened, pytest.raises(ValueError, match="model fingerprint"):
        H.harvest(opened, ids, RESID, out=tmp_path / "a", shard_tokens=2000)


def test_a_corpus_that_changes_meanwhile(tiny, tmp_path):
    corpus = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])

    def progress(now):
        if now.shards == 2:
            write_lines(corpus, [{"text": text} for text in [TEXTS[0], *TEXTS]])

    with pytest.raises(FormatError, match=r"a\.jsonl changed since the harvest began"):
        H.harvest(tiny, corpus, RESID, out=tmp_path / "out", shard_tokens=300, progress=progress)
    with pytest.raises(ValueError, match="corpus fingerprint"):
        H.harvest(tiny, corpus, RESID, out=tmp_path / "out", shard_tokens=300)


def test_a_moved_corpus_and_model_are_the_same(tiny, texts, harvested, tmp_path):
    moved = shutil.copy(texts, tmp_path / "renamed.jsonl")
    assert H.harvest(tiny, moved, RESID, out=harvested, shard_tokens=300).made == 0
    H.harvest(tiny, texts, RESID, out=harvested, shard_tokens=300)


def test_shards_of_another_harvest_are_refused(tiny, texts, harvested, tmp_path):
    H.harvest(tiny, texts, "hook_embed", out=tmp_path / "b", shard_tokens=300)
    (tmp_path / "b" / "manifest.json").unlink()
    with pytest.raises(FormatError, match="another harvest"):
        H.harvest(tiny, texts, RESID, out=tmp_path / "b", shard_tokens=300)


def test_leftovers_of_dead_processes_are_removed(tiny, texts, harvested, tmp_path):
    out = shutil.copytree(harvested, tmp_path / "a")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone = out / "shards" / f".000001.{store.socket.gethostname()}-{process.pid}-{'0' * 16}.partial"
    gone.mkdir()
    (gone / "data.safetensors").write_bytes(b"half")
    H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)
    assert not gone.exists()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_columns_are_arrays(harvested):
    with H.open(harvested) as dataset:
        column = dataset["blocks.1.hook_resid_post"]
        whole = np.asarray(column)
        assert column.shape == whole.shape == (len(dataset), 128) and whole.dtype == ml_dtypes.bfloat16
        cut = int(dataset.first_rows[1])
        for index in (
            0,
            -1,
            cut,
            slice(cut - 2, cut + 2),
            slice(3, 9),
            slice(None, None, 50),
            slice(5, 2),
            [3, -1, cut, 3],
            np.arange(len(dataset)) % 7 == 3,
            (0, 3),
            (slice(3, 9), 5),
            (slice(3, 9), [5, 0]),
            ([3, cut], slice(2, 9, 3)),
        ):
            assert (column[index] == whole[index]).all(), index
        assert not column[0:5].flags.owndata and not column[0:5].flags.writeable
        for wrong in (len(dataset), [len(dataset)], [[1]], "a", [True], (0, 999), ([1, 2], [3, 4]), (..., 3)):
            with pytest.raises((IndexError, ValueError)):
                column[wrong]
        assert dataset["model.layers.1.output"].name == column.name
        with pytest.raises(SiteError, match=r"hook_embed.*was not harvested; there are tokens"):
            dataset["hook_embed"]


def test_batches(harvested):
    with H.open(harvested) as dataset:
        whole = np.asarray(dataset["tokens"])
        found = list(dataset.batches(100, ["tokens", "seq_id"]))
        assert [len(batch["tokens"]) for batch in found[:-1]] == [100] * (len(found) - 1)
        assert (np.concatenate([batch["tokens"] for batch in found]) == whole).all()
        shuffled = [np.concatenate([b["seq_id"] for b in dataset.batches(100, shuffle=seed)]) for seed in (1, 1, 2)]
        assert (shuffled[0] == shuffled[1]).all() and (shuffled[0] != shuffled[2]).any()
        assert sorted(shuffled[0]) == sorted(np.asarray(dataset["seq_id"]))
        assert all(len(batch["tokens"]) == 100 for batch in dataset.batches(100, drop_last=True))


def test_torch(harvested):
    with H.open(harvested) as dataset:
        loader = DataLoader(dataset.torch(["tokens", dataset.sites[0]], batch=64), batch_size=None, num_workers=2)
        rows = [(int(t), a) for batch in loader for t, a in zip(batch["tokens"], batch[dataset.sites[0]], strict=True)]
        assert sorted(token for token, _ in rows) == sorted(np.asarray(dataset["tokens"]).tolist())
        assert rows[0][1].dtype.is_floating_point and rows[0][1].element_size() == 2
        assert rows[0][1].float().tolist() == dataset[dataset.sites[0]][0].astype(np.float32).tolist()
        one = dataset.torch("seq_id", batch=50, shuffle=1)
        passes = [[row for batch in one for row in batch["seq_id"].tolist()] for _ in range(2)]
        assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])


def test_xarray(harvested):
    pytest.importorskip("xarray")
    with H.open(harvested) as dataset:
        found = dataset.to_xarray(rows=slice(10, 20))
        site = dataset.sites[0]
        assert found[site].dims == ("row", "d_model") and found[site].dtype == np.float32
        assert (found[site].values == dataset[site][10:20].astype(np.float32)).all()
        assert found.coords["token"].values.tolist() == dataset["tokens"][10:20].tolist()


def test_a_shard_that_shrinks_while_it_is_read(harvested, tmp_path):
    out = shutil.copytree(harvested, tmp_path / "a")
    with H.open(out) as dataset:
        column = dataset["blocks.1.hook_resid_post"]
        column[0]
        os.truncate(out / "shards/000000/data.safetensors", 100)
        with pytest.raises(FormatError):
            column[0]
    with pytest.raises(FormatError, match="has 100 bytes"):
        H.open(out)


COPIES = {
    "one row": lambda dataset, column: column[1],
    "several rows": lambda dataset, column: column[[1, 5, 300]],
    "every second row": lambda dataset, column: column[::2],
    "all shards": lambda dataset, column: column[:],
    "array": lambda dataset, column: np.asarray(column),
    "seq_id": lambda dataset, column: dataset["seq_id"].part(0),
    "bounds": lambda dataset, column: dataset.bounds,
    "documents": lambda dataset, column: dataset.documents,
    "batches": lambda dataset, column: list(dataset.batches(32, column.name)),
    "shuffled batches": lambda dataset, column: list(dataset.batches(32, shuffle=0)),
    "torch": lambda dataset, column: list(dataset.torch(column.name)),
    "xarray": lambda dataset, column: dataset.to_xarray(rows=slice(0, 3)),
    "parquet": lambda dataset, column: export.to_parquet(dataset, dataset.path / "new", column.name),
    "zarr": lambda dataset, column: export.to_zarr(dataset, dataset.path / "new", column.name),
    "saelens": lambda dataset, column: export.to_saelens(dataset, dataset.path / "new", column.name, context=8),
    "view and check": lambda dataset, column: (column[3:5].sum(), dataset.check()),
    "view and check of the shard": lambda dataset, column: (column.part(0).sum(), dataset.check(0)),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows does not shrink mapped files")
@pytest.mark.parametrize("how", ["shrinks", "is written to"])
@pytest.mark.parametrize("what", COPIES)
def test_a_file_that_changes_between_its_check_and_its_use(harvested, tmp_path, monkeypatch, what, how):
    """No SIGBUS, and none of the zeros or new bytes that were read: the file is checked afterwards, too."""
    for needed in {"xarray": ["xarray"], "parquet": ["pyarrow"], "saelens": ["pyarrow"], "zarr": ["zarr"]}.get(
        what, ()
    ):
        pytest.importorskip(needed)
    out = shutil.copytree(harvested, tmp_path / "a")
    file = out / "shards/000000/data.safetensors"
    with H.open(out) as dataset:
        column = dataset["blocks.1.hook_resid_post"]
        assert column.shape[0] > 300 and dataset.n_shards > 1
        tensor = dataset.tensor

        def tensor_and_change(shard, name, key):
            found = tensor(shard, name, key)
            if shard == 0 and how == "shrinks":
                os.truncate(file, 4096)
            elif shard == 0:
                with file.open("r+b") as opened:
                    opened.seek(-8, os.SEEK_END)
                    opened.write(bytes(8))
            return found

        monkeypatch.setattr(dataset, "tensor", tensor_and_change)
        with pytest.raises(FormatError, match=r"changed size|lost a part|was written to"):
            COPIES[what](dataset, column)
        assert not (out / "new").exists()


def test_files_that_are_closed_meanwhile_are_checked(harvested, tmp_path, monkeypatch):
    """Only some stay open; of the others, views remain."""
    monkeypatch.setattr(dataset_module, "_OPEN_FILES", 1)
    out = shutil.copytree(harvested, tmp_path / "a")
    with H.open(out) as dataset:
        column = dataset["blocks.1.hook_resid_post"]
        view = column.part(0)
        whole = np.asarray(column)
        dataset.check()
        np.testing.assert_array_equal(whole[: len(view)].view(np.uint16), view.view(np.uint16))
        with (out / "shards/000000/data.safetensors").open("r+b") as opened:
            opened.seek(-8, os.SEEK_END)
            opened.write(bytes(8))
        dataset.check(1)
        for act in (dataset.check, lambda: dataset.check(0), lambda: column.part(0)):
            with pytest.raises(FormatError, match=r"000000.*changed since it was first read"):
                act()


def test_open_what_is_none(tmp_path, harvested):
    with pytest.raises(FileNotFoundError):
        H.open(tmp_path / "gone")
    manifest = json.loads((harvested / "manifest.json").read_text())
    for change in (
        {"format": "other"},
        {"version": 99},
        {"shards": "none"},
        {"shards": [{"rows": -1}]},
        {"plan": {}},
        {"files": None},
        {"plan": {"sites": [{"name": "a", "row": ["b"]}]}},
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(FormatError):
            H.open(tmp_path)


# -- features ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """A dictionary of SAELens' kind for blocks.1.hook_resid_post of tiny-e."""
    folder, rng = tmp_path_factory.mktemp("sae"), np.random.default_rng(0)
    w_enc = rng.standard_normal((128, 96)).astype(np.float32)
    tensors = {
        "W_enc": w_enc,
        "W_dec": w_enc.T.copy(),
        "b_enc": np.zeros(96, np.float32),
        "b_dec": np.zeros(128, np.float32),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": 128, "d_sae": 96, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"hook_name": "blocks.1.hook_resid_post"}}))
    return folder


@pytest.fixture(scope="module")
def coded(tiny, texts, sae, tmp_path_factory):
    out = tmp_path_factory.mktemp("harvest") / "coded"
    H.harvest(tiny, texts, "blocks.3.hook_resid_post", out=out, shard_tokens=300, sae=sae, top_k=8, examples=4)
    return out


def test_features_are_those_of_encode(tiny, sae, coded):
    with H.open(coded) as dataset, gemma4.SAE.load(sae) as dictionary:
        assert dataset.sites == ("blocks.3.hook_resid_post",)
        for number in (0, 17, 39):
            rows = range(int(dataset.bounds[number]), int(dataset.bounds[number + 1]))
            shard = int(np.searchsorted(dataset.first_rows, rows.start, side="right")) - 1
            first = rows.start - int(dataset.first_rows[shard])
            found = dataset.features(shard)[first : first + len(rows)]
            _, cache = tiny.run_with_cache(TEXTS[number], dictionary.site)
            wanted = dictionary.encode(cache).top(8)
            assert found.ids.tolist() == wanted.ids.tolist() and found.offsets.tolist() == wanted.offsets.tolist()
            np.testing.assert_allclose(found.values, wanted.values, rtol=1e-6)
        with pytest.raises(IndexError):
            dataset.features(0, 1)
        with pytest.raises(IndexError):
            dataset.examples(1)


def test_examples_of_a_dataset(coded):
    with H.open(coded) as dataset:
        dense = np.concatenate([dataset.features(shard).dense() for shard in range(dataset.n_shards)])
        found = dataset.examples()
        assert found["activations"].shape == (96, 4)
        for feature in range(96):
            order = np.lexsort((np.arange(len(dense)), -dense[:, feature]))[:4]
            order = order[dense[order, feature] > 0]
            n = len(order)
            assert found["activations"][feature, :n].tolist() == dense[order, feature].tolist()
            assert (found["activations"][feature, n:] == 0).all() and (found["seq_ids"][feature, n:] == -1).all()
            assert (dataset.bounds[found["seq_ids"][feature, :n]] + found["positions"][feature, :n] == order).all()
        np.testing.assert_allclose(found["feature_frequencies"], (dense > 0).mean(axis=0), rtol=1e-6)


def test_features_do_not_depend_on_workers(tiny, texts, sae, coded, tmp_path):
    options = {"shard_tokens": 300, "sae": {sae: None}, "top_k": 8, "examples": 4, "workers": 2}
    H.harvest(tiny, texts, "blocks.3.hook_resid_post", out=tmp_path / "a", **options)
    assert contents(tmp_path / "a") == contents(coded)


def test_features_alone(tiny, texts, sae, tmp_path, capsys):
    command = [
        "harvest",
        "--corpus",
        str(texts),
        "--out",
        str(tmp_path / "a"),
        "--sae",
        f"{sae}=blocks.2.hook_resid_post",
    ]
    assert main(command) == 0
    with H.open(tmp_path / "a") as dataset:
        assert dataset.sites == () and dataset.dictionaries[0]["site"] == "blocks.2.hook_resid_post"
        assert len(dataset.features(0)) == len(dataset)


def test_dictionaries_that_do_not_fit(tiny, random_e, texts, ids, sae, coded, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        H.harvest(random_e, ids, (), out=tmp_path / "a", sae=sae)
    with pytest.raises(FileNotFoundError):
        H.harvest(tiny, texts, (), out=tmp_path / "a", sae=tmp_path / "gone")
    other = shutil.copytree(sae, tmp_path / "other")
    flip(other / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="another harvest: dictionaries"):
        H.harvest(tiny, texts, "blocks.3.hook_resid_post", out=coded, shard_tokens=300, sae=other, top_k=8)


# -- exports -----------------------------------------------------------------------------------------------------------


def test_parquet(harvested, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    with H.open(harvested) as dataset:
        H.to_parquet(dataset, tmp_path / "p")
        table = parquet.read_table(tmp_path / "p")
        assert table["tokens"].to_pylist() == np.asarray(dataset["tokens"]).tolist()
        rows = np.array(table[dataset.sites[0]].to_pylist(), np.float32)
        assert (rows == np.asarray(dataset[dataset.sites[0]]).astype(np.float32)).all()
        with pytest.raises(FileExistsError):
            H.to_parquet(dataset, tmp_path / "p")
        with pytest.raises(SiteError):
            H.to_parquet(dataset, tmp_path / "q", "hook_embed")
        assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_zarr(harvested, tmp_path):
    zarr = pytest.importorskip("zarr")
    with H.open(harvested) as dataset:
        group = zarr.open_group(str(H.to_zarr(dataset, tmp_path / "z")), mode="r")
        for name in ("seq_id", dataset.sites[1]):
            whole = np.asarray(dataset[name])
            assert (group[name][:] == (whole.astype(np.float32) if name == dataset.sites[1] else whole)).all()
        assert group.attrs["gemma4.harvest"]["dtype"] == "bf16"


def stretches(dataset, context):
    """The first row of each, by hand."""
    return [row for begin, end in pairwise(dataset.bounds.tolist()) for row in range(begin, end - context + 1, context)]


def test_saelens(harvested, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import ipc

    with H.open(harvested) as dataset:
        site, context = dataset.sites[0], 16
        H.to_saelens(dataset, tmp_path / "s", site, context=context)
        starts = stretches(dataset, context)
        tokens, acts = np.asarray(dataset["tokens"]), np.asarray(dataset[site]).astype(np.float32)
        files = [one["filename"] for one in json.loads((tmp_path / "s" / "state.json").read_text())["_data_files"]]
        tables = [ipc.open_stream(tmp_path / "s" / name).read_all() for name in files]
        found = [
            (t, a)
            for table in tables
            for t, a in zip(*(table[c].to_pylist() for c in ("token_ids", site)), strict=True)
        ]
        assert [t for t, _ in found] == [tokens[row : row + context].tolist() for row in starts]
        assert all((np.array(a) == acts[row : row + context]).all() for (_, a), row in zip(found, starts, strict=True))
        with pytest.raises(ValueError, match="no sequence has 1000 tokens"):
            H.to_saelens(dataset, tmp_path / "t", site, context=1000)
        datasets = pytest.importorskip("datasets")
        loaded = datasets.load_from_disk(str(tmp_path / "s")).with_format("numpy")
        assert loaded.features[site].shape == (context, 128) and len(loaded) == len(starts)
        assert (loaded[3][site] == acts[starts[3] : starts[3] + context]).all()


def test_delphi(coded, tmp_path):
    with H.open(coded) as dataset:
        H.to_delphi(dataset, tmp_path / "d", context=16, n_splits=3)
        starts, tokens = stretches(dataset, 16), np.asarray(dataset["tokens"])
        dense = np.concatenate([dataset.features(shard).dense() for shard in range(dataset.n_shards)])
        folder = tmp_path / "d" / "blocks.1.hook_resid_post"
        assert sorted(path.name for path in folder.glob("*.safetensors")) == [
            "0_31.safetensors",
            "32_63.safetensors",
            "64_95.safetensors",
        ]
        found = np.zeros((len(starts), 16, 96), np.float32)
        for path in folder.glob("*.safetensors"):
            part = load_file(path)
            places = part["locations"].astype(np.int64) + np.array([0, 0, int(path.stem.split("_")[0])])
            found[tuple(places.T)] = part["activations"]
            assert part["tokens"].tolist() == [tokens[row : row + 16].tolist() for row in starts]
        wanted = np.stack([dense[row : row + 16] for row in starts]).astype(np.float16)
        assert (found == wanted).all()
        assert json.loads((folder / "config.json").read_text())["ctx_len"] == 16


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(texts, harvested, tmp_path, capsys):
    out = tmp_path / "a"
    command = ["harvest", "--corpus", str(texts), "--sites", RESID, "--out", str(out), "--shard-tokens", "300"]
    assert main([*command, "--part", "1/2"]) == 0
    assert "not complete" in capsys.readouterr().err
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out) and "tokens/s" in said.err and "that were there" in said.err
    assert contents(out) == contents(harvested)
    assert main([*command, "--dtype", "f32"]) == 2
    said = capsys.readouterr().err
    assert "dtype: bf16 before, f32 now" in said and "resumes" not in said
    with pytest.raises(SystemExit):
        main([*command, "--part", "x"])
    assert "such as 0/16" in capsys.readouterr().err


def test_progress_ends_at_all_tokens(tiny, texts, tmp_path):
    seen = []
    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300, progress=seen.append)
    last = seen[-1]
    assert last.tokens == last.total == sum(len(tiny.to_tokens(text)) for text in TEXTS)
    assert last.shards == last.n_shards and last.rate > 0 and last.eta == 0
    assert all(a.tokens <= b.tokens for a, b in pairwise(seen))


def test_examples_are_the_strongest_rows():
    rng = np.random.default_rng(0)
    dense = np.where(rng.random((200, 7)) < 0.3, rng.integers(1, 5, (200, 7)), 0).astype(np.float32)
    found = Examples(7, 5)
    for begin in range(0, 200, 40):
        rows, ids = np.nonzero(dense[begin : begin + 40])
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=40))])
        values = dense[begin : begin + 40][rows, ids]
        found.add(gemma4.Features(offsets, ids.astype(np.int32), values, 7), begin)
    for feature in range(7):
        order = np.lexsort((np.arange(200), -dense[:, feature]))[:5]
        assert found.rows[feature].tolist() == order.tolist()
        assert found.activations[feature].tolist() == dense[order, feature].tolist()
    assert found.counts.tolist() == (dense > 0).sum(axis=0).tolist()


if __name__ == "__main__":  # kills a harvest of one worker, and one of four, as often as asked
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rng = np.random.default_rng(0)
        rows = [{"tokens": [2, *rng.integers(3, 300, int(n)).tolist()]} for n in rng.integers(5, 90, 400)]
        model, corpus = write_checkpoint(root / "model", E_LIKE), write_lines(root / "ids.jsonl", rows)
        for n_workers in (1, 4):
            n_killed = kill_and_compare(model, corpus, root, n_workers, kills=int(sys.argv[1]), seed=n_workers)
            print(f"{n_workers} workers: {n_killed} kills of {sys.argv[1]} met a running harvest; the same bytes")
