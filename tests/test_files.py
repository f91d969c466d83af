# SPDX-License-Identifier: Apache-2.0
"""Every output of the package: whole or not there, never over an input, never over a file that nobody gave up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image, ImageDraw

import gemma4
from gemma4.cli import main
from gemma4.errors import FormatError
from gemma4.files import check_output, free_name, new_file, open_regular, read_limited, write_file

SLOW = """
import os, signal, sys
import gemma4
def progress(done, total, name):
    {action}
gemma4.quantize("tiny-e", sys.argv[1], type="Q8_0", progress=progress)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_quantize(folder, action):
    code = SLOW.format(action=action)
    return subprocess.run([sys.executable, "-P", "-c", code, str(folder / "x.gguf")], timeout=120, capture_output=True)


def test_new_file_is_whole_or_not_there(tmp_path):
    target = tmp_path / "a.bin"
    with new_file(target, force=False) as file:
        file.write(b"whole")
        assert not target.exists() and len(names(tmp_path)) == 1
    assert target.read_bytes() == b"whole" and names(tmp_path) == ["a.bin"]
    with pytest.raises(ZeroDivisionError), new_file(target, force=True) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert target.read_bytes() == b"whole" and names(tmp_path) == ["a.bin"]


def test_permissions_are_those_of_any_file_or_of_the_one_replaced(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a", b"1", force=False)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    (tmp_path / "a").chmod(0o604)
    write_file(tmp_path / "a", b"2", force=True)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o604


def test_existing_files_and_inputs(tmp_path):
    target, other = tmp_path / "a", tmp_path / "link"
    target.write_bytes(b"mine")
    other.symlink_to(target)
    with pytest.raises(FileExistsError, match="--force"):
        write_file(target, b"", force=False)
    for name in (target, other, tmp_path / ".." / tmp_path.name / "a"):
        with pytest.raises(ValueError, match="the source itself"):
            write_file(name, b"", force=True, inputs=[tmp_path / "nothing", target])
    with pytest.raises(FileExistsError), new_file(tmp_path / "b", force=False):
        (tmp_path / "b").write_bytes(b"came first")
    assert target.read_bytes() == b"mine" and (tmp_path / "b").read_bytes() == b"came first"
    assert free_name(target) == tmp_path / "a-2" and free_name(tmp_path / "c.png") == tmp_path / "c.png"
    assert names(tmp_path) == ["a", "b", "link"]


def test_a_dangling_link_is_a_file_that_exists(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        check_output(tmp_path / "a", force=False)


def test_file_systems_without_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    write_file(tmp_path / "a", b"1", force=False)
    with pytest.raises(FileExistsError), new_file(tmp_path / "b", force=False):
        (tmp_path / "b").write_bytes(b"came first")
    assert names(tmp_path) == ["a", "b"] and (tmp_path / "b").read_bytes() == b"came first"


def test_two_writers_of_one_name(tmp_path):
    """Each has a temporary of its own; one of them gets the name."""
    at_once, results = threading.Barrier(4), []

    def write(i):
        try:
            with new_file(tmp_path / "a", force=False) as file:
                file.write(bytes([i]) * 100_000)
                at_once.wait()
            results.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1 and (tmp_path / "a").read_bytes() == bytes(results) * 100_000
    assert names(tmp_path) == ["a"]


def test_another_process_s_temporary_is_left_alone(tmp_path):
    theirs = tmp_path / f".x.gguf.{os.getpid()}.partial"
    theirs.write_bytes(b"theirs")
    gemma4.quantize("tiny-e", tmp_path / "x.gguf", type="Q8_0")
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGHUP)", -signal.SIGHUP),
        ("[os.kill(os.getpid(), signal.SIGINT) for _ in range(5)]", -signal.SIGINT),
    ],
)
def test_signals_leave_nothing(tmp_path, action, status):
    assert run_quantize(tmp_path, action).returncode == status
    assert names(tmp_path) == []


def test_a_second_interrupt_waits_for_the_cleanup(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a", force=False):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_own_signal_handlers_stay(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with new_file(tmp_path / "a", force=False):
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM] and names(tmp_path) == ["a"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_reading_only_regular_files_of_bounded_size(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_limited(tmp_path / "a", 5) == b"12345"
    with pytest.raises(FormatError, match="has 5 bytes, the limit is 4"):
        read_limited(tmp_path / "a", 4)
    with pytest.raises(FormatError, match="no regular file"):
        read_limited(tmp_path, 10)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FormatError, match="no regular file"):
            open_regular(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_pipe_that_nobody_reads_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"No such device or address.*pipe"):
        write_file(tmp_path / "pipe", b"x", force=True)
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    data = bytes(range(256)) * 1000  # more than a pipe holds: the writer waits for the reader
    thread = threading.Thread(target=write_file, args=(tmp_path / "pipe", data), kwargs={"force": True})
    thread.start()
    found = b""
    os.set_blocking(reader, True)
    while len(found) < len(data):
        found += os.read(reader, 1 << 16)
    thread.join()
    os.close(reader)
    assert found == data
    write_file(os.devnull, b"x", force=True)


# -- the commands ------------------------------------------------------------------------------------------------------


def test_bench_replaces_neither_the_model_nor_a_file(tmp_path, capsys):
    model = tmp_path / "m.gguf"
    gemma4.quantize("tiny-e", model, type="Q4_0")
    bytes_before = model.read_bytes()
    command = ["bench", str(model), "--prompt", "8", "--decode", "4", "--repeats", "1", "--json", str(model)]
    assert main(command) != 0 and "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) != 0 and "source itself" in capsys.readouterr().err
    assert model.read_bytes() == bytes_before and names(tmp_path) == ["m.gguf"]


def test_detect_replaces_neither_the_photo_nor_a_file(tmp_path, capsys, monkeypatch):
    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).ellipse((20, 20, 60, 60), fill="red")
    photo, boxes = tmp_path / "p.png", tmp_path / "p-boxes.png"
    picture.save(photo)
    boxes.write_text("precious")
    before = photo.read_bytes()
    monkeypatch.chdir(tmp_path)
    command = ["detect", "--model", "tiny-e", str(photo), "the red circle"]
    assert main([*command, "--output", str(photo), "--force"]) != 0
    assert "source itself" in capsys.readouterr().err
    assert main([*command, "--output", str(boxes)]) != 0
    assert main(command) == 0 and "p-boxes-2.png" in capsys.readouterr().err
    assert photo.read_bytes() == before and boxes.read_text() == "precious"
    assert Image.open(tmp_path / "p-boxes-2.png").size == (96, 96)
    assert main([*command, "--output", str(boxes), "--force"]) == 0
    assert boxes.read_bytes().startswith(b"\x89PNG")


def test_demo_takes_a_free_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma4-demo.png").write_text("precious")
    assert main(["demo"]) == 0
    assert (tmp_path / "gemma4-demo.png").read_text() == "precious"
    assert (tmp_path / "gemma4-demo-2.png").read_bytes().startswith(b"\x89PNG")
    assert main(["demo", "--output", "gemma4-demo.png"]) != 0
    assert (tmp_path / "gemma4-demo.png").read_text() == "precious"
    assert main(["demo", "--output", "plain"]) == 0 and (tmp_path / "plain.png").is_file()
    assert main(["demo", "--output", os.devnull]) == 0 and not os.path.exists(os.devnull + ".png")
    capsys.readouterr()
    for output, words in (("", "is a folder"), ("nowhere/x.png", "no such folder"), ("plain", "exists already")):
        assert main(["demo", "--output", output]) == 2  # before the work, and not beside the name that was given
        captured = capsys.readouterr()
        assert words in captured.err and not captured.out


def test_saving_a_sequence_replaces_no_weights(tmp_path):
    gemma4.quantize("tiny-e", tmp_path / "m.gguf", type="Q8_0")
    with gemma4.load(tmp_path / "m.gguf") as model, model.new_sequence() as sequence:
        model.forward(np.array([2, 5, 6], np.int32), sequence=sequence)
        with pytest.raises(ValueError, match="the source itself"):
            sequence.save(tmp_path / "m.gguf")
        sequence.save(tmp_path / "s.npz")
        sequence.save(tmp_path / "s.npz")
        model.forward(np.array([7], np.int32), sequence=sequence)


def test_quantising_replaces_no_part_of_its_folder(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    with gemma4.load("tiny-e") as model:
        for file in model.checkpoint.path.iterdir():
            if file.is_file():
                (folder / file.name).write_bytes(file.read_bytes())
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        with pytest.raises(ValueError, match="the source itself"):
            gemma4.quantize(folder, folder / name, type="Q8_0", force=True)
    gemma4.quantize(folder, folder / "m.gguf", type="Q8_0")
    gemma4.quantize(folder, folder / "m.gguf", type="Q4_0", force=True)
