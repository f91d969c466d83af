# SPDX-License-Identifier: Apache-2.0
"""gemma4 chat with attachments, gemma4 detect, gemma4 transcribe, with encoders and answers of our own."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from media_files import Encoders, encoded, picture, tone

import gemma4
from gemma4.cli import main
from gemma4.media.boxes import Found
from gemma4.media.tasks import detect, transcribe

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
ANSWER = (
    'It is here:\n```json\n[{"box_2d": [100, 200, 500, 600], "label": "car"}, {"point": [500, 500], "label": "nose"}]'
)


class Scripted:
    """A model that is asked and answers what the test wrote."""

    def __init__(self, model: gemma4.Model, monkeypatch, answers: list[str]) -> None:
        self.asked, self.answers = [], answers
        monkeypatch.setattr(model, "generate", self.generate)

    def generate(self, messages, **options):
        self.asked.append((messages, options))
        return SimpleNamespace(text=self.answers[(len(self.asked) - 1) % len(self.answers)])

    @property
    def questions(self) -> list[str]:
        return [part["text"] for (message,), _ in self.asked for part in message["content"] if part["type"] == "text"]


@pytest.fixture
def model(monkeypatch):
    with gemma4.load("tiny-e") as model:
        model.encoders = Encoders(model, monkeypatch)
        monkeypatch.setattr("gemma4.model.load", lambda *args, **kwargs: model)
        yield model


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(picture(90, 120)), "PNG"))
    soundfile.write(tmp_path / "b.wav", tone(1.0), 16_000)
    soundfile.write(tmp_path / "talk.wav", np.concatenate([tone(20), np.zeros(16_000), tone(20, seed=1)]), 16_000)
    return tmp_path


# -- chat --------------------------------------------------------------------------------------------------------------


def chat(monkeypatch, lines: str, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", "--max-tokens", "4", "--temperature", "0", *options])


def test_chat_attaches_to_the_first_message(model, files, capsys, monkeypatch):
    seen = []
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda messages, **kw: seen.append(messages) or stream(messages, **kw))
    options = ("--image", f"{files}/a.png", "--audio", f"{files}/b.wav", "--image-tokens", "70")
    assert chat(monkeypatch, "What is this?\nAnd?\n/reset\nWhat is this?\n", *options) == 0
    kinds = [[part["type"] for part in messages[0]["content"]] for messages in seen]
    assert kinds == [["image", "text", "audio"]] * 3
    assert [len(messages) for messages in seen] == [1, 3, 1] and seen[1][2]["content"] == "And?"
    assert sorted(model.encoders.calls) == ["audio", "image"]  # for three turns
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1]
    assert seen[0][0]["content"][0]["image"].image_tokens == 70


def test_chat_attaches_on_the_way(model, files, capsys, monkeypatch):
    assert (
        chat(monkeypatch, f"Hello\n/image {files}/a.png\n/image {files}/nowhere.png\n/audio {files}/a.png\nAnd?\n") == 0
    )
    captured = capsys.readouterr()
    assert model.encoders.calls == ["image"]
    assert "nowhere.png" in captured.err and "not audio that can be read" in captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--image", "nowhere.png"], "nowhere.png"), (["--audio", "a.png"], "a.png: not audio that can be read")],
)
def test_chat_checks_files_first(model, files, capsys, monkeypatch, options, words):
    monkeypatch.chdir(files)
    assert chat(monkeypatch, "Hello\n", *options) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and captured.err.count("\n") == 1


def test_chat_of_a_model_that_sees_nothing(files, capsys, monkeypatch):
    monkeypatch.setattr("gemma4.model.Model.modalities", gemma4.media.medium.Modalities())
    assert chat(monkeypatch, "Hello\n", "--image", f"{files}/a.png") == 2
    assert "a.png: this model has no vision encoder, it takes text" in capsys.readouterr().err


def test_wrong_budget_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as info:
        main(["chat", "--image-tokens", "100"])
    assert info.value.code == 2 and "1120" in capsys.readouterr().err


# -- detect ------------------------------------------------------------------------------------------------------------


def test_detect_prints_and_draws(model, files, capsys, monkeypatch, tmp_path):
    scripted = Scripted(model, monkeypatch, [ANSWER, "There is none."])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert main(["detect", f"{files}/a.png", "a car", "the dog"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "box\t9 24 45 72\tcar\npoint\t45 60\tnose\n"
    assert "the dog: no box or point in the answer: 'There is none.'" in captured.err
    assert "a-boxes.png" in captured.err
    drawn = np.asarray(Image.open(here / "a-boxes.png"))
    assert not (files / "a-boxes.png").exists()
    assert drawn.shape == (90, 120, 3)
    different = (drawn != picture(90, 120)).any(axis=-1)
    assert different[9, 24:72].all() and different[44, 24:72].all() and not different[30:42, 30:50].any()
    assert scripted.questions == ["Where is the car?", "Where is the dog?"]


def test_detect_that_cannot_draw_has_answered(model, files, capsys, monkeypatch):
    Scripted(model, monkeypatch, [ANSWER])
    assert main(["detect", f"{files}/a.png", "a car", "--output", f"{files}/nowhere/out.png"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "box\t9 24 45 72\tcar\npoint\t45 60\tnose\n"
    assert "cannot write" in captured.err and "nowhere/out.png: No such file" in captured.err
    assert "--output" in captured.err and captured.err.count("\n") == 1


def test_detect_writes_nothing_where_nothing_is(model, files, capsys, monkeypatch):
    Scripted(model, monkeypatch, ["No."])
    assert main(["detect", f"{files}/a.png", "a car", "--output", f"{files}/out.png"]) == 0
    assert not (files / "out.png").exists() and capsys.readouterr().out == ""


def test_detect_wordings(model, files, monkeypatch):
    scripted = Scripted(model, monkeypatch, [ANSWER])
    found, _ = detect(model, files / "a.png", "a car", prompt="Show {}!", image_tokens=1120)
    assert found == [Found("car", box=(0.1, 0.2, 0.5, 0.6)), Found("nose", point=(0.5, 0.5))]
    monkeypatch.setattr("gemma4.media.tasks.is_shipped", lambda model: False)
    detect(model, files / "a.png", "a car")
    assert scripted.questions == ["Show a car!", "Detect a car, output only ```json"]
    assert [options.get("image_tokens") for _, options in scripted.asked] == [1120, None]
    assert all(options["temperature"] == 0 for _, options in scripted.asked)
    for what, prompt, words in ((" ", None, "what to look for"), ("a car", "Where?", r"\{\}")):
        with pytest.raises(ValueError, match=words):
            detect(model, files / "a.png", what, prompt=prompt)


# -- transcribe --------------------------------------------------------------------------------------------------------


def test_transcribe(model, files, capsys, monkeypatch):
    scripted = Scripted(model, monkeypatch, [" one two \n"])
    assert main(["transcribe", f"{files}/b.wav"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "one two\n" and captured.err == ""
    assert scripted.questions == ["Transcribe the following speech segment in English into English text."]
    assert [part["type"] for part in scripted.asked[0][0][0]["content"]] == ["text", "audio"]


def test_transcribe_a_long_recording(model, files, capsys, monkeypatch):
    scripted = Scripted(model, monkeypatch, ["one", "two"])
    assert main(["transcribe", f"{files}/talk.wav"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\n"
    assert "talk.wav: longer than 30 s, cut at pauses into 2 parts" in captured.err
    lengths = [len(part["audio"]) for (message,), _ in scripted.asked for part in message["content"][1:]]
    assert sum(lengths) == 41 * 16_000 and max(lengths) <= 30 * 16_000


def test_transcribe_into_another_language(model, files, capsys, monkeypatch):
    scripted = Scripted(model, monkeypatch, ["one two\nFrench: un deux", "three"])
    assert main(["transcribe", f"{files}/talk.wav", "--to", "French"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "un deux\nthree\n" and "the model gave no translation" in captured.err
    wanted = "Transcribe the following speech segment in English, then translate it into French."
    assert scripted.questions == [wanted] * 2
    monkeypatch.setattr("gemma4.media.tasks.is_shipped", lambda model: False)
    first, _ = transcribe(model, files / "talk.wav", source="German", target="French")
    assert (first.text, first.translation) == ("one two", "un deux")
    assert (
        scripted.questions[-1].startswith(wanted.replace("English", "German"))
        and "'French: '" in scripted.questions[-1]
    )


def test_transcribe_skips_silence_and_tells_torn_words(model, files, capsys, monkeypatch):
    scripted = Scripted(model, monkeypatch, ["words"])
    soundfile.write(files / "odd.wav", np.concatenate([tone(45), np.zeros(60 * 16_000)]), 16_000)
    assert main(["transcribe", f"{files}/odd.wav"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "words\n" * len(scripted.asked) and 2 <= len(scripted.asked) <= 3
    assert "no pause to cut at" in captured.err and ": silence" in captured.err


@pytest.mark.parametrize("command", ["detect", "transcribe"])
def test_errors_are_one_line(model, files, capsys, command):
    (files / "words.txt").write_text("not a picture, not a sound\n")
    assert main([command, f"{files}/words.txt", *(["a car"] if command == "detect" else [])]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gemma4: error: ") and "words.txt" in err and err.count("\n") == 1


def test_with_the_shipped_model_as_it_is(model, files, capsys):
    """Encoders that give noise: whatever the model answers, the commands end well."""
    assert main(["detect", f"{files}/a.png", "the red circle", "--max-tokens", "8"]) == 0
    assert main(["transcribe", f"{files}/b.wav", "--max-tokens", "8"]) == 0
    assert sorted(model.encoders.calls) == ["audio", "image"]
