# SPDX-License-Identifier: Apache-2.0
"""What the command writes: nothing of a stranger's that a terminal would obey, one line for an error, any encoding."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import gemma4
from gemma4.cli.main import _ERRORS, main
from gemma4.cli.terminal import shown
from gemma4.generation.pieces import Piece

TINY = Path(gemma4.__file__).parent / "pretrained" / "tiny-e"
HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\re\x08f\x7fg\u202eh"
STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")  # what the command's own styles are made of
pty = pytest.importorskip("pty")


def on_a_terminal(monkeypatch, argv, stdin=""):
    """(exit code, what a terminal got) of the command."""
    master, slave = os.openpty()
    got = bytearray()

    def read():
        try:
            while data := os.read(master, 4096):
                got.extend(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(slave, "w", encoding="utf-8", newline="") as terminal:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, terminal)
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setenv("TERM", "xterm-256color")
        code = main(argv)
    reader.join(30)
    os.close(master)
    return code, got.decode()


def only_styles(text):
    """Nothing but the command's own styles would be obeyed."""
    rest = STYLE.sub("", text).replace("\r\n", "\n").replace("\r\x1b[K", "").replace("\r", "")
    return shown(rest) == rest and "[2J" not in "".join(STYLE.findall(text))


class Stream:
    """Stands for `Model.stream`: writes whatever it is told."""

    def __init__(self, text):
        self.pieces = [Piece(char) for char in text]
        call = SimpleNamespace(name=HOSTILE, arguments={"a": "\x1b[2J"})
        timings = SimpleNamespace(prefill_rate=1.0, decode_rate=1.0)
        self.result = SimpleNamespace(
            text=text, tool_calls=(call,), malformed=(HOSTILE,), timings=timings, prompt_tokens=1, tokens=[1]
        )

    def __iter__(self):
        return iter(self.pieces)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def hostile_model(monkeypatch):
    monkeypatch.setattr("gemma4.model.Model.stream", lambda self, *args, **options: Stream(HOSTILE))


@pytest.fixture
def hostile_folder(tmp_path):
    folder = tmp_path / "m\x1b[2Jodel[red]"
    shutil.copytree(TINY, folder)
    return folder


@pytest.mark.parametrize("argv", [["generate", "x"], ["generate", "--chat", "x"], ["chat"]])
def test_model_output_is_shown_not_sent(hostile_model, monkeypatch, capsys, argv):
    code, text = on_a_terminal(monkeypatch, argv, "hello\n")
    assert code == 0 and only_styles(text) and r"\x1b]0;owned\x07b\x1b[2Jc\x9b31md\re\x08f\x7fg\u202eh" in text
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(argv) == 0
    assert "a\x1b]0;owned" in capsys.readouterr().out  # a pipe gets the text


def test_detect_and_transcribe(monkeypatch, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    answer = json.dumps([{"box_2d": [1, 2, 300, 400], "label": HOSTILE}])
    found = SimpleNamespace(text=answer)
    monkeypatch.setattr("gemma4.model.Model.generate", lambda self, *args, **options: found)
    monkeypatch.chdir(tmp_path)
    code, text = on_a_terminal(monkeypatch, ["detect", "a.png", HOSTILE])
    assert code == 0 and only_styles(text) and r"\x1b]0;owned" in text


@pytest.mark.parametrize("name", ["demo", "info", "generate", "bench"])
def test_paths_of_models_are_shown_not_sent(monkeypatch, tmp_path, hostile_folder, name):
    monkeypatch.chdir(tmp_path)
    rest = {"generate": ["x", "--max-tokens", "2"], "bench": ["--prompt", "8", "--decode", "4", "--repeats", "1"]}
    where = [str(hostile_folder)] if name == "bench" else ["--model", str(hostile_folder)]
    code, text = on_a_terminal(monkeypatch, [name, *rest.get(name, []), *where])
    assert code == 0 and only_styles(text)
    assert name == "generate" or r"m\x1b[2Jodel[red]" in text


@pytest.mark.parametrize("argv", [["info", "--model", HOSTILE], ["demo", "--output", f"/none/{HOSTILE}"],
                                  ["detect", f"{HOSTILE}.png", "x"], ["quantize", HOSTILE, "x", "--type", "Q4_0"],
                                  ["chat", "--image", HOSTILE],
                                  ["quantize", "tiny-e", "x", "--type", HOSTILE]])  # fmt: skip
def test_errors_are_shown_not_sent(monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    code, text = on_a_terminal(monkeypatch, argv)
    assert code == 2 and only_styles(text) and r"\x1b]0;owned" in text


def test_usage_is_shown_not_sent(monkeypatch):
    with pytest.raises(SystemExit) as info:
        main(["info", HOSTILE])
    assert info.value.code == 2
    master, slave = os.openpty()
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit):
            main(["info", HOSTILE])
        assert only_styles(os.read(master, 4096).decode())
    os.close(master)


def test_a_template_s_words_are_shown_not_sent(monkeypatch, hostile_folder):
    (hostile_folder / "chat_template.jinja").write_text("{{ raise_exception('\x1b[2Jno') }}")
    code, text = on_a_terminal(monkeypatch, ["generate", "--chat", "x", "--model", str(hostile_folder)])
    assert code == 2 and only_styles(text) and r"\x1b[2Jno" in text


def test_warnings_are_one_line(capsys, hostile_folder):
    (hostile_folder / "generation_config.json").write_text('{"top_k": "\\u001b[2J"}')
    assert main(["generate", "x", "--max-tokens", "2", "--model", str(hostile_folder)]) == 0
    err = capsys.readouterr().err
    assert "gemma4: warning: generation_config.json: top_k is" in err and "\x1b" not in err and ".py" not in err


def test_the_conversation_goes_on_after_an_error(monkeypatch, capsys, hostile_folder):
    source = (hostile_folder / "chat_template.jinja").read_text()
    refusing = "{% if messages[-1].content == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
    (hostile_folder / "chat_template.jinja").write_text(refusing + source)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nbad\n/reset\nHello\n"))
    assert main(["chat", "--temperature", "0", "--max-tokens", "8", "--model", str(hostile_folder)]) == 0
    captured = capsys.readouterr()
    first, *_, last = captured.out.splitlines()
    assert first == last and "error: the chat template failed: not this" in captured.err


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_traceback_only_with_debug(capsys):
    assert main(["info", "--model", "/nowhere/model"]) == 2
    plain = capsys.readouterr().err
    assert plain.count("\n") == 1 and "Traceback" not in plain
    assert main(["info", "--model", "/nowhere/model", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith(plain)


@pytest.mark.parametrize(
    "error", [TypeError("x"), IndexError("x"), AttributeError("x"), AssertionError(), ZeroDivisionError("x")]
)
def test_a_fault_of_our_own_is_one_line(monkeypatch, capsys, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("gemma4.model.load", fail)
    assert main(["info"]) == (2 if isinstance(error, _ERRORS) else 1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert main(["info", "--debug"]) != 0 and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["generate", "--temperature", "nan", "a"], ["generate", "--top-k", "-7", "a"],
                                  ["generate", "--stop", "", "a"], ["generate", "--seed", "-1", "a"],
                                  ["generate", "--max-tokens", "-1", "a"], ["generate", "--top-p", "inf", "a"],
                                  ["bench", "--repeats", "-1"], ["info", "--threads", "-1"],
                                  ["generate", "\udcff"]])  # fmt: skip
def test_odd_options_are_errors_of_one_line(capsys, argv):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("gemma4: error: ") and err.count("\n") == 1


# -- encodings ---------------------------------------------------------------------------------------------------------


def run(*argv, env=None, **options):
    return subprocess.run(
        [sys.executable, "-P", "-m", "gemma4", *argv], capture_output=True, timeout=120,
        env={**os.environ, **(env or {})}, **options,
    )  # fmt: skip


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
                                 {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str)  # fmt: skip
def test_no_character_stops_the_command(tmp_path, env):
    done = run("demo", "caf\u00e9 \u2603 \U0001f600", "--output", str(tmp_path / "x.png"), env=env)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"caf" in done.stdout and b"\\u2603" in done.stdout
    done = run("info", "--model", "n\u00f6wh\u00e9re", env=env)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    done = run("generate", "-", "--max-tokens", "2", env=env, input="caf\u00e9".encode())
    assert done.returncode == 0 and b"Traceback" not in done.stderr


# -- signals -----------------------------------------------------------------------------------------------------------


def started(*argv):
    """A command that waits for its next line, past loading."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gemma4", *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    process.stdin.write(b"Hello\n")
    process.stdout.read(1)
    time.sleep(0.3)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [("SIGINT", 130), ("SIGTERM", -signal.SIGTERM), ("SIGHUP", -signal.SIGHUP)]
)
def test_signals_end_the_command_without_a_traceback(number, code):
    process = started("chat", "--max-tokens", "4")
    process.send_signal(getattr(signal, number))
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and b"Traceback" not in err
    assert err.endswith(b"gemma4: interrupted\n") == (number == "SIGINT")


def test_repeated_ctrl_c():
    process = started("chat", "--max-tokens", "4")
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
        if process.poll() is not None:
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err and b"KeyboardInterrupt" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX descriptors")
@pytest.mark.parametrize(
    ("closed", "argv", "code", "words"),
    [
        (0, ["generate", "-"], 2, "empty prompt"),
        (0, ["chat"], 0, ""),
        (1, ["info"], 0, "standard output is closed"),
        (2, ["generate", "x", "--max-tokens", "2"], 0, ""),
        (2, ["info", "--model", "nowhere"], 2, ""),
    ],
)
def test_closed_streams(closed, argv, code, words):
    """As a shell's <&-, >&- and 2>&-: no traceback, and no message in the place of the answer."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "gemma4", *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, preexec_fn=lambda: os.close(closed),
    )  # fmt: skip
    assert done.returncode == code and words in done.stderr and "Error" not in done.stdout + done.stderr
    assert "gemma4:" not in done.stdout
