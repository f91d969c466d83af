# SPDX-License-Identifier: Apache-2.0
"""The gemma4 command."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from gemma4.cli import main


def test_demo(tmp_path, capsys):
    output = tmp_path / "demo.png"
    assert main(["demo", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "tokens/s" in text
    assert re.search(r"memory [\d.]+ [MG]iB", " ".join(text.split()))
    for column in ("block", "|resid|", "logit lens"):
        assert column in text
    assert output.read_bytes().startswith(b"\x89PNG") and str(output) in text.replace("\n", "")


def test_demo_with_a_prompt(tmp_path, capsys):
    assert main(["demo", "The cat", "--output", str(tmp_path / "x.png")]) == 0
    assert "The cat" in capsys.readouterr().out


def test_demo_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert main(["demo", "--output", str(tmp_path / "x.png")]) == 0
    assert 'pip install "gemma4[plot]"' in capsys.readouterr().out


def test_generate(capsys):
    assert main(["generate", "--max-tokens", "8", "--temperature", "0", "Once upon a time"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "tokens/s" in captured.err and "memory" in captured.err


def test_generate_from_standard_input_with_seed(capsys, monkeypatch):
    texts = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time"))
        assert main(["generate", "--max-tokens", "8", "--temperature", "1", "--seed", "3", "-"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "sites" in out


def test_info_without_a_tokenizer(capsys, random_dir):
    assert main(["info", "--model", str(random_dir)]) == 0
    assert "6 layers" in capsys.readouterr().out


def test_chat_reads_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/reset\n/info\n/what\nHello\n/exit\nnever\n"))
    assert main(["chat", "--max-tokens", "8", "--temperature", "0", "--system", "Be kind."]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "/reset forgets" in out
    lines = out.splitlines()
    assert lines[0] == lines[-1]  # the same answer to the same words after /reset


def test_chat_ends_with_its_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat"]) == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["info", "--model", "/nowhere/model"], "/nowhere/model"),
        (["generate", ""], "empty prompt"),
        (["generate", "--temperature", "-3", "a"], "temperature"),
        (["generate", "--max-tokens", "0", "a"], "max_tokens"),
    ],
)
def test_errors_are_one_line(capsys, argv, words):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("gemma4: error: ") and words in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_wrong_usage_is_exit_2(capsys):
    with pytest.raises(SystemExit) as info:
        main(["generate"])
    assert info.value.code == 2
    assert "prompt" in capsys.readouterr().err


def test_module_and_help():
    done = subprocess.run([sys.executable, "-P", "-m", "gemma4", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("demo", "generate", "chat", "info"):
        assert command in done.stdout
