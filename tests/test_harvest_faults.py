# SPDX-License-Identifier: Apache-2.0
"""Harvests whose files, corpora, dictionaries and processes are damaged, changed or mixed up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from media_files import encoded, picture
from PIL import Image
from safetensors.numpy import save_file
from small_models import write_multimodal_checkpoint
from test_harvest import RESID, TEXTS, contents, flip, write_lines
from torch.utils.data import DataLoader

import gemma4
from gemma4 import harvest as H
from gemma4.cli import main
from gemma4.cli.harvest import _Shown
from gemma4.cli.terminal import console
from gemma4.errors import FormatError
from gemma4.harvest import export, local, readers
from gemma4.harvest.corpus import Corpus, Reading
from gemma4.harvest.plan import Options, make_plan
from gemma4.harvest.store import Store
from gemma4.harvest.worker import Spec
from gemma4.load.gguf import GgufFile

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("corpus") / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="module")
def harvested(tiny, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("harvest") / "acts"
    H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)
    return out


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """A dictionary of SAELens' kind with top-k."""
    folder, rng = tmp_path_factory.mktemp("sae") / "one", np.random.default_rng(0)
    folder.mkdir()
    w_enc = rng.standard_normal((128, 96)).astype(np.float32)
    b_enc, b_dec = np.zeros(96, np.float32), np.zeros(128, np.float32)
    tensors = {"W_enc": w_enc, "W_dec": w_enc.T.copy(), "b_enc": b_enc, "b_dec": b_dec}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "topk", "k": 20, "d_in": 128, "d_sae": 96, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {"hook_name": SITE}}))
    return folder


def plan_of(model, corpus, **options):
    defaults = {"dtype": "bf16", "context": None, "max_tokens": None, "shard_tokens": 300, "image_tokens": None}
    chosen = Options(**(defaults | {"skip_damaged": False} | options))
    return make_plan(model, Corpus.open(corpus), RESID, chosen)


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_file_in_a_shards_place_is_named(tiny, texts, harvested, tmp_path):
    out = shutil.copytree(harvested, tmp_path / "a")
    shutil.rmtree(out / "shards/000001")
    (out / "shards/000001").write_text("mine")
    with pytest.raises(FormatError, match=r"000001 is no folder.*move it away"):
        H.harvest(tiny, texts, RESID, out=out, shard_tokens=300)
    (out / "shards/000001").unlink()
    (out / "shards/0").mkdir()  # no shard's name: it does not count as the one that is missing
    assert H.harvest(tiny, texts, RESID, out=out, shard_tokens=300).made == 1
    (out / "shards/0").rmdir()
    assert contents(out) == contents(harvested)


def test_a_folder_without_manifest_keeps_it_so_if_its_shards_are_others(tiny, texts, harvested, tmp_path):
    out = shutil.copytree(harvested, tmp_path / "a")
    (out / "manifest.json").unlink()
    with pytest.raises(FormatError, match="another harvest"):
        H.harvest(tiny, texts, "hook_embed", out=out, shard_tokens=300)
    assert not (out / "manifest.json").exists()
    assert H.harvest(tiny, texts, RESID, out=out, shard_tokens=300).made == 0
    assert contents(out) == contents(harvested)


def test_ctrl_c_ends_hashing_soon(harvested, tmp_path):
    """Of files that take seconds."""
    out = shutil.copytree(harvested, tmp_path / "a")
    with H.open(out) as dataset:
        for number in range(2):
            os.truncate(out / f"shards/{number:06d}/data.safetensors", 16 << 30)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        begin = time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                dataset.verify()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - begin < 2  # both take over 8 s to hash


def test_records_count_the_documents_before_the_end(tiny, texts, tmp_path):
    n_tokens = sum(len(tiny.to_tokens(text)) for text in TEXTS[:7]) + 3
    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=1000, max_tokens=n_tokens)
    with H.open(tmp_path / "a") as dataset:
        assert sum(shard["documents"] for shard in dataset.manifest["shards"]) == 8
        assert dataset.documents[-1, 0] == 7


def test_narrow_integers_as_rows(harvested):
    with H.open(harvested) as dataset:
        tokens = np.asarray(dataset["tokens"])
        for dtype in (np.int8, np.uint8, np.uint64):
            assert (dataset["tokens"][np.array([0, 1, 100], dtype)] == tokens[[0, 1, 100]]).all()
        assert (dataset["tokens"][np.array([-1, -100], np.int8)] == tokens[[-1, -100]]).all()
        with pytest.raises(IndexError):
            dataset["tokens"][np.array([1 << 63], np.uint64)]


def test_each_pass_of_a_loader_with_workers_has_another_order(harvested):
    with H.open(harvested) as dataset:
        loader = DataLoader(dataset.torch("seq_id", batch=50, shuffle=1), batch_size=None, num_workers=2)
        passes = [[row for batch in loader for row in batch["seq_id"].tolist()] for _ in range(2)]
        assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])


# -- corpora -----------------------------------------------------------------------------------------------------------


def save_picture(path: Path, seed: int = 0) -> None:
    path.write_bytes(encoded(Image.fromarray(picture(64, 48, seed=seed)), "PNG"))


def part_of(name: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}]}


@pytest.mark.parametrize("change", [lambda path: save_picture(path, seed=5), lambda path: path.unlink(missing_ok=True)])
@pytest.mark.parametrize("skip_damaged", [False, True])
def test_a_picture_that_changes_meanwhile(tiny, tmp_path, change, skip_damaged):
    for number in range(3):
        save_picture(tmp_path / f"{number}.png", number)
    corpus = write_lines(tmp_path / "a.jsonl", [part_of(f"{number}.png") for number in range(3)])

    def progress(now):
        if now.shards == 1:
            change(tmp_path / "2.png")

    options = {"shard_tokens": 1, "skip_damaged": skip_damaged, "progress": progress}
    with pytest.raises(FormatError, match=r"line 3: .*2\.png changed since the harvest began"):
        H.harvest(tiny, corpus, RESID, out=tmp_path / "out", **options)


def test_a_picture_that_changes_while_it_is_read(tiny, tmp_path):
    save_picture(tmp_path / "a.png")
    corpus = write_lines(tmp_path / "a.jsonl", [part_of("a.png")])
    plan = plan_of(tiny, corpus)
    documents = Reading(plan.corpus).documents(plan.slices[0])
    next(documents)
    save_picture(tmp_path / "a.png", seed=3)
    with pytest.raises(FormatError, match=r"a\.png changed"):
        next(documents)


DAMAGED_LINES = [
    b'{"text": "a"',
    b"[" * 100_000,
    b'{"txt": "a"}',
    b'{"text": 5}',
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b'{"tokens": [2, 99999]}',
    b'{"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "pipe.png"}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "a\\u0000.png"}]}]}',
    b'{"text": "' + b"a" * 300 + b'"}',  # longer than the limit of this test
]


def test_documents_that_cannot_be_read_are_left_out(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 250)
    os.mkfifo(tmp_path / "pipe.png")
    lines = [line[:240] if line.startswith(b"[[") else line for line in DAMAGED_LINES]
    good = b'{"text": "The cat."}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b"\n".join(lines) + b"\n" + good)
    for number, line in enumerate(lines):
        (tmp_path / "one.jsonl").write_bytes(good + line + b"\n")
        with pytest.raises((ValueError, OSError), match="line 2"):
            H.harvest(tiny, tmp_path / "one.jsonl", RESID, out=tmp_path / f"out{number}")
    for shard_tokens in (1, 1000):  # 1: found again by their places
        out = tmp_path / f"out-{shard_tokens}"
        H.harvest(tiny, tmp_path / "a.jsonl", RESID, out=out, skip_damaged=True, shard_tokens=shard_tokens)
        with H.open(out) as dataset:
            assert dataset.documents[:, 0].tolist() == [0, len(lines) + 1]
            skipped = dataset.manifest["skipped"]
            assert [document for document, _ in skipped] == list(range(1, len(lines) + 1))
            for document, reason in skipped:
                assert f"a.jsonl, line {document + 1}" in reason


@pytest.mark.parametrize("given", ["folder", "files"])
def test_what_is_left_out_is_named_as_in_the_corpus(tiny, tmp_path, monkeypatch, given):
    """A copy elsewhere, read from another working directory, gives the same bytes."""
    part = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    lines = ['{"text": "The cat."}', "{", json.dumps({"messages": [part]}), '{"tokens": [2, 99999]}']
    lines.append(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "image": "../gone.png"}]}]}))
    places = [tmp_path / "here", tmp_path / "it's" / "far é" / "away"]
    names = ["b.jsonl", "sub/c.jsonl", "sub/broken.png"]
    for place in places:
        (place / "sub").mkdir(parents=True)
        for name in names[:2]:
            (place / name).write_text("\n".join(lines) + "\n")
        for name in ("a.png", "sub/a.png", names[2]):
            (place / name).write_bytes(b"\x89PNG no picture")
    found = []
    for number, (place, cwd) in enumerate(zip(places, (tmp_path, places[1] / "sub"), strict=True)):
        monkeypatch.chdir(cwd)
        corpus = os.path.relpath(place) if given == "folder" else [os.path.relpath(place / name) for name in names]
        out = tmp_path / f"out{number}"
        H.harvest(tiny, corpus, RESID, out=out, skip_damaged=True)
        found.append({file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()})
    assert found[0] == found[1]
    with H.open(out) as dataset:
        reasons = [reason for _, reason in dataset.manifest["skipped"]]
    sub = "sub/" if given == "folder" else ""
    assert len(reasons) == (11 if given == "folder" else 9) and not any(str(tmp_path) in reason for reason in reasons)
    for name in ("b.jsonl, line 2", f"{sub}c.jsonl, line 3", f"{sub}../gone.png", f"{sub}broken.png"):
        assert any(name in reason for reason in reasons), name


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
def test_texts_that_cannot_be_read_are_left_out(tiny, tmp_path, monkeypatch, sample_by):
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 100)
    (tmp_path / "a.txt").write_bytes(b"The cat.\n\n\xff\nmore\n\n" + b"long " * 50 + b"\n\nThe dog.\n")
    (tmp_path / "b.txt").write_bytes(b"A bird.\n")
    H.harvest(tiny, tmp_path, RESID, out=tmp_path / "out", skip_damaged=True, sample_by=sample_by)
    with H.open(tmp_path / "out") as dataset:
        found = [tiny.to_string(dataset.sequence(i)["tokens"][1:]) for i in range(dataset.n_sequences)]
        reasons = [reason for _, reason in dataset.manifest["skipped"]]
    if sample_by == "document":
        assert found == ["A bird.\n"] and "longer than" in reasons[0]
    else:
        assert found == ["The cat.", *(["more"] if sample_by == "line" else []), "The dog.", "A bird."]
        assert "line 3 is not UTF-8" in reasons[0] and "line 6" in reasons[1]


def test_errors_name_the_line_in_later_slices(tiny, tmp_path):
    """What the model refuses is found when a slice is run, which begins in the middle of its file."""
    rows = [{"text": text} for text in TEXTS] + [{"tokens": [2, 99999]}]
    (tmp_path / "a.txt").write_text("\n\nThe cat.\n\n\nThe dog.\n")
    write_lines(tmp_path / "b.jsonl", rows)
    H.harvest(tiny, tmp_path, RESID, out=tmp_path / "out", shard_tokens=300, skip_damaged=True)
    with H.open(tmp_path / "out") as dataset:
        [[document, reason]] = dataset.manifest["skipped"]
        assert document == 42 and "b.jsonl, line 41: token id 99999" in reason


# -- tables ------------------------------------------------------------------------------------------------------------


def save_tables(folder: Path, table, *names: str) -> list[Path]:
    """In each format, or those named."""
    from pyarrow import ipc, parquet

    names = names or ("a.parquet", "b.feather", "c.arrow")
    if "a.parquet" in names:
        parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    for kind, name, rows in ((ipc.new_file, "b.feather", 9), (ipc.new_stream, "c.arrow", 11)):
        with kind(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=rows)
    return [folder / name for name in names]


def test_rows_of_tables_have_their_numbers(tiny, tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows = [[2, 10, 11, 12]] * 30 + [[2, 99999]] + [[2, 10]] * 3
    for path in save_tables(tmp_path, pa.table({"tokens": rows})):
        for shard_tokens in (16, 1000):
            out = tmp_path / f"out-{path.stem}-{shard_tokens}"
            H.harvest(tiny, path, RESID, out=out, shard_tokens=shard_tokens, skip_damaged=True)
            with H.open(out) as dataset:
                [[document, reason]] = dataset.manifest["skipped"]
                assert document == 30 and f"{path.name}, row 31: token id 99999" in reason


def test_texts_of_tables_that_are_not_utf8(tiny, tmp_path):
    pa = pytest.importorskip("pyarrow")
    column = pa.array([*(text.encode() for text in TEXTS[:20]), b"\xff\xfe", b"The dog."]).view(pa.string())
    for path in save_tables(tmp_path, pa.table({"text": column})):
        with pytest.raises(FormatError, match=rf"{path.name}, row 21 cannot be read: .*(?i:utf)"):
            H.harvest(tiny, path, RESID, out=tmp_path / f"x-{path.stem}")
        H.harvest(tiny, path, RESID, out=tmp_path / f"out-{path.stem}", skip_damaged=True, shard_tokens=50)
        with H.open(tmp_path / f"out-{path.stem}") as dataset:
            assert dataset.documents[:, 0].tolist() == [*range(20), 21]


def test_tables_whose_rows_lie_outside_of_the_file(tiny, tmp_path):
    pa = pytest.importorskip("pyarrow")
    offsets = pa.py_buffer(np.array([0, 3, 1 << 30, 5, 9], np.int32).tobytes())
    column = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"abcdefghi")])
    for path in save_tables(tmp_path, pa.table({"text": column}), "b.feather", "c.arrow"):
        with pytest.raises(FormatError, match=rf"{path.name}, row 2 cannot be read"):
            H.harvest(tiny, path, RESID, out=tmp_path / f"x-{path.stem}")
        H.harvest(tiny, path, RESID, out=tmp_path / f"out-{path.stem}", skip_damaged=True)
        with H.open(tmp_path / f"out-{path.stem}") as dataset:
            assert dataset.documents[:, 0].tolist() == [0, 3]


def test_tables_are_read_once_for_all_slices(tiny, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    opened, rows = [], []
    for kind in (readers._Parquet, readers._Arrow):
        monkeypatch.setattr(kind, "_stretches", watched(kind._stretches, opened, rows))
    for path in save_tables(tmp_path, pa.table({"text": TEXTS})):
        opened.clear()
        rows.clear()
        plan = plan_of(tiny, path, shard_tokens=20)
        assert len(plan.slices) > 10
        reading = Reading(plan.corpus)
        for every in (1, 3):  # 3: one worker of several
            found = [one.content for part in plan.slices[::every] for one in reading.documents(part)]
            wanted = [TEXTS[i] for part in plan.slices[::every] for i in range(part.first, part.first + part.count)]
            assert found == wanted
        reading.close()
        assert len(opened) == 3 and sum(rows) <= 3 * len(TEXTS)  # the scan, and each pass
        rows.clear()
        assert [one.content for one in Reading(plan.corpus).documents(plan.slices[-1])][-1] == TEXTS[-1]
        assert sum(rows) < 20  # row groups and batches before the slice are not converted


def watched(stretches, opened: list[int], rows: list[int]):
    def found(reader, file):
        opened.append(1)
        for stretch in stretches(reader, file):
            yield stretch._replace(read=lambda stretch=stretch: (rows.append(stretch.n_rows), stretch.read())[1])

    return found


# -- dictionaries ------------------------------------------------------------------------------------------------------


def test_a_dictionary_is_its_weights_and_configuration(tiny, texts, sae, tmp_path):
    options = {"out": tmp_path / "a", "shard_tokens": 1000}
    H.harvest(tiny, texts, (), sae=sae / "sae_weights.safetensors", **options)
    before = contents(tmp_path / "a")
    moved = shutil.copytree(sae, tmp_path / "renamed")
    (moved / "examples.safetensors").write_bytes(b"which it is not read from")
    for same in (moved, moved / "sae_weights.safetensors", sae):
        assert H.harvest(tiny, texts, (), sae=same, **options).made == 0
    assert contents(tmp_path / "a").keys() == before.keys()
    (moved / "cfg.json").write_text((moved / "cfg.json").read_text().replace('"k": 20', '"k": 3'))
    for other in (moved, moved / "sae_weights.safetensors"):
        with pytest.raises(ValueError, match="another harvest: dictionaries"):
            H.harvest(tiny, texts, (), sae=other, **options)


def test_one_dictionary_at_two_sites(tiny, texts, sae, tmp_path):
    command = ["harvest", "--corpus", str(texts), "--out", str(tmp_path / "a"), "--max-tokens", "100"]
    assert main([*command, "--sae", f"{sae}=blocks.2.hook_resid_post", "--sae", f"{sae}=blocks.3.hook_resid_post"]) == 0
    with H.open(tmp_path / "a") as dataset:
        sites = [one["site"] for one in dataset.dictionaries]
        assert sites == ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"]
        assert dataset.features(0, 0).ids.tolist() != dataset.features(0, 1).ids.tolist()
    for wrong in ([(sae, 5)], [5], [(sae,)]):
        with pytest.raises((ValueError, TypeError), match=r"sae|site"):
            H.harvest(tiny, texts, (), out=tmp_path / "b", sae=wrong)


# -- workers -----------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_between_two_shards_is_replaced(tiny, texts, harvested, tmp_path, monkeypatch):
    """Its next shard then meets a closed pipe."""
    get, dead = local._Crew._get, []

    def killing(crew, process):
        event = get(crew, process)
        if ("ready" in event or "shard" in event) and len(dead) < 2:
            dead.append(process.pid)
            process.kill()
            process.wait()
        return event

    monkeypatch.setattr(local._Crew, "_get", killing)
    H.harvest(tiny, texts, RESID, out=tmp_path / "a", shard_tokens=300, workers=2)
    assert len(dead) == 2 and contents(tmp_path / "a") == contents(harvested)


def test_ends_of_processes_have_names():
    assert "SIGKILL" in local._how(-signal.SIGKILL) and local._how(3) == "exit status 3"
    assert local._how(-40) == "signal 40"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """(text model, the file of its encoders in another folder)"""
    pytest.importorskip("gguf")
    from gguf_files import convert, convert_mmproj

    root = tmp_path_factory.mktemp("gguf")
    (root / "apart").mkdir()
    source = write_multimodal_checkpoint(root / "source", "effective")
    return convert(source, root / "model.gguf"), convert_mmproj(source, root / "apart" / "encoders.gguf")


def test_workers_have_the_models_own_encoders(gguf, texts, tmp_path):
    text, encoders = gguf
    encoders = Path(shutil.copy(encoders, tmp_path / "encoders.gguf"))
    corpus = write_lines(tmp_path / "ids.jsonl", [{"tokens": [2, 5, 6, 7]}])
    with gemma4.load(text, mmproj=encoders, precision="exact") as model, gemma4.load(text) as other:
        spec = Spec.of(model, plan_of(model, corpus), Store(tmp_path / "out"), 2)
        with spec.load() as loaded:
            assert loaded.modalities.image and loaded.checkpoint.mmproj_path == encoders
        assert Spec.of(other, spec.plan, spec.store, 2).mmproj is None
    file = GgufFile(encoders)
    place = max(file.tensors.values(), key=lambda info: info.nbytes).offset
    file.close()
    flip(encoders, place)
    with pytest.raises(FormatError, match="encoders, changed since"):
        spec.load()


# -- exports -----------------------------------------------------------------------------------------------------------


def test_saelens_in_several_batches(harvested, tmp_path, monkeypatch):
    """Lists of one batch end at 32-bit places."""
    pytest.importorskip("pyarrow")
    from pyarrow import ipc

    with H.open(harvested) as dataset:
        found = []
        for number, size in enumerate((5000, 1 << 26)):
            monkeypatch.setattr(export, "_BATCH_NUMBERS", size)
            path = H.to_saelens(dataset, tmp_path / str(number), SITE, context=16)
            tables = [ipc.open_stream(one).read_all() for one in sorted(path.glob("data-*.arrow"))]
            assert all((table[SITE].num_chunks > 1) == (number == 0) for table in tables)
            found.append([table.to_pydict() for table in tables])
        assert found[0] == found[1]


def test_exports_return_the_folder_that_they_wrote(harvested, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    pytest.importorskip("zarr")
    monkeypatch.setenv("HOME", str(tmp_path))
    with H.open(harvested) as dataset:
        for number, write in enumerate((H.to_parquet, H.to_zarr, lambda *args: H.to_saelens(*args, SITE, context=16))):
            assert write(dataset, f"~/{number}") == tmp_path / str(number) and (tmp_path / str(number)).is_dir()


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_what_bits_depend_on_is_in_the_plan(gguf, tmp_path):
    corpus = write_lines(tmp_path / "ids.jsonl", [{"tokens": [2, 5, 6, 7]}])
    with gemma4.load(gguf[0], precision="exact") as exact, gemma4.load(gguf[0], precision="fast") as fast:
        assert plan_of(exact, corpus).facts["arithmetic"].keys() == {"version"}
        plan = plan_of(fast, corpus)
        assert plan.facts["arithmetic"]["isa"] == fast.engine.isa
        spec = Spec.of(fast, plan, Store(tmp_path / "out"), 2)
        plan.facts["arithmetic"]["isa"] = "another"
        with pytest.raises(ValueError, match="precision='exact'"):
            spec.load()


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_progress_of_reading_is_drawn_now_and_then(monkeypatch):
    drawn = []
    with _Shown(console(stderr=True)) as shown:
        monkeypatch.setattr(shown._bars, "update", lambda *args, **facts: drawn.append(facts))
        begin = time.monotonic()
        for weight in range(5000):
            shown.scanning(weight, "a.jsonl")
    assert 1 <= len(drawn) <= 2 + (time.monotonic() - begin) / 0.1
