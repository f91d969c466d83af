# SPDX-License-Identifier: Apache-2.0
"""`gemma4 lens` and `gemma4 attribute`, and the attribution that they show."""

from __future__ import annotations

import io
import json
import re
import sys

import numpy as np
import pytest
from test_html import CORRUPT, HOSTILE, PROMPT, Page

from gemma4.cli import main
from gemma4.html.markup import number, visible
from gemma4.interp import dla, logit_lens

PNG = b"\x89PNG"


def unwrapped(text):
    return " ".join(text.split())


# ---- attribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "random_e", "random_moe"])
def test_contributions_as_a_whole_are_those_of_the_parts(request, name):
    model = request.getfixturevalue(name)
    ids = [5, 6, 7, 8]
    parts = dla(model, ids, 9, pos="all")
    whole = dla(model, ids, 9, pos="all", per_head=False, per_expert=False)
    assert np.allclose(whole.values.sum(axis=0), whole.logits, rtol=1e-4, atol=1e-4)
    assert whole.logits.tolist() == parts.logits.tolist()
    assert "0_attn_out" in whole.labels and not [
        label for label in whole.labels if "head" in label or "expert" in label
    ]
    for kind, layer in (("attn_out", 0), ("attn_out", 2), ("mlp_out", 1)):
        inside = ("head",) if kind == "attn_out" else ("mlp", "expert")
        split = [i for i, label in enumerate(parts.labels) if label.startswith(tuple(f"{layer}_{x}" for x in inside))]
        expected = parts.values[split].sum(axis=0)
        assert split and np.allclose(
            whole.values[whole.labels.index(f"{layer}_{kind}")], expected, rtol=1e-3, atol=1e-4
        )


def test_attribution_names_its_tokens(tiny, random_e):
    found = dla(tiny, PROMPT, (" Mary", " John"))
    assert found.title == "Logit of ·Mary less ·John, by component" and found.prompt == [" to"]
    assert dla(random_e, [5, 6], 7).names == ["7"]  # it has no tokenizer
    several = dla(tiny, PROMPT, pos="all")
    assert several.title == "Logit of the predicted tokens, by component"
    assert several.prompt == tiny.to_str_tokens(PROMPT) and several.names[-1] == "·Mary"


def test_attribution_shows_bars_or_a_table(tiny):
    one = dla(tiny, PROMPT)
    page = Page(one._repr_html_())
    assert len(page.named("table", "g4-bars")) == 1 and len(page.named("tr")) == len(one.labels)
    assert f"they sum to {one.logits[0]:.4g}" in one._repr_html_()
    several = dla(tiny, PROMPT, pos="all")
    page = Page(several._repr_html_())
    assert len(page.named("td")) == (len(several.labels) + 1) * len(several.prompt)
    assert page.texts[page.texts.index("sum") + 1] == number(several.logits[0])
    for label in ("embed", several.labels[-1]):
        assert page.texts[page.texts.index(label) + 1] == number(several.values[several.labels.index(label), 0])
    with pytest.raises(ValueError, match="last"):
        several.to_html(0)


def test_attribution_of_random_weights(random_e):
    """Layer scalars are not near 1 there, and per-layer embeddings not near 0."""
    found = dla(random_e, [5, 6, 7], pos="all")
    raw = random_e.run_with_cache([5, 6, 7], "hook_logits_raw")[1]["hook_logits_raw"]
    assert np.allclose(found.values.sum(axis=0), raw.max(axis=-1), rtol=1e-4, atol=1e-4)
    assert found.prompt == ["5", "6", "7"]  # it has no tokenizer


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_lens(tiny, capsys, tmp_path):
    page, picture = tmp_path / "lens.html", tmp_path / "lens.png"
    assert main(["lens", PROMPT, "--target", " Mary", "--html", str(page), "--png", str(picture)]) == 0
    captured = capsys.readouterr()
    lens = logit_lens(tiny, PROMPT, target=" Mary")
    rows = [line.split() for line in captured.out.splitlines() if line.split()]
    last = next(row for row in rows if row[0] == str(tiny.n_layers - 1))
    assert last[-3:] == ["·Mary", f"{lens.probs[-1, -1, 0]:.3f}", f"{lens.target_probs[-1, -1]:.3f}"]
    assert rows[0][0] == "block" and rows[-2][0] == "embed"
    assert re.search(r"the last \d+ of 15 positions; --html FILE", captured.out)
    assert picture.read_bytes().startswith(PNG)
    found = Page(page.read_text(encoding="utf-8"))
    assert len(found.named("td")) == 15 * (tiny.n_layers + 1) and PROMPT in found.texts
    assert str(page) in captured.err and str(picture) in captured.err


def test_lens_of_the_last_positions(capsys, tmp_path):
    page = tmp_path / "lens.html"
    assert main(["lens", PROMPT, "--last", "2", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "the last 2 of 15 positions; --last 0 shows more" in out
    assert next(line.split() for line in out.splitlines() if "block" in line) == ["block", "·book", "·to", "p"]
    assert "The last 2 of 15 positions; --last 0 shows all." in page.read_text(encoding="utf-8")
    assert main(["lens", "Once upon a time", "--last", "0"]) == 0
    assert "positions" not in capsys.readouterr().out


def test_lens_of_standard_input_as_a_chat(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the capital of France?"))
    assert main(["lens", "-", "--chat", "--last", "3"]) == 0
    assert "<|turn>" in capsys.readouterr().out


def test_attribute(tiny, capsys, tmp_path):
    page, picture = tmp_path / "a.html", tmp_path / "a.png"
    argv = ["attribute", PROMPT, "--per-head", "--top", "4", "--html", str(page), "--png", str(picture)]
    assert main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    found = dla(tiny, PROMPT)
    values = found.values[:, 0]
    order = np.argsort(-np.abs(values), kind="stable")
    assert " ".join(rows[0]) == "Logit of ·Mary, by component, at ·to"
    assert [row[:2] for row in rows[3:7]] == [[found.labels[i], f"{values[i]:+.3f}"] for i in order[:4]]
    assert rows[7] == [str(len(order) - 4), "others", f"{values[order[4:]].sum():+.3f}"]
    assert rows[8] == ["sum", f"{found.logits[0]:+.3f}"]
    assert picture.read_bytes().startswith(PNG)
    assert len(Page(page.read_text(encoding="utf-8")).named("tr")) == len(found.labels)


def test_attribute_at_another_position(tiny, capsys):
    assert main(["attribute", PROMPT, "--pos", "2", "--target", " and", "--against", " gave"]) == 0
    out = unwrapped(capsys.readouterr().out)
    found = dla(tiny, PROMPT, (" and", " gave"), pos=2, per_head=False)
    assert f"sum {found.logits[0]:+.3f}" in out and "less ·gave, by component, at ·Mary" in out


@pytest.mark.parametrize("command", ["lens", "attribute"])
def test_prompts_of_files(capsys, tmp_path, command):
    lines = tmp_path / "prompts.txt"
    lines.write_bytes("\ufeffOnce upon a time\r\n\n  \nThe 😀 مرحبا <b>bold</b> $x$\n".encode())
    page, picture = tmp_path / "p.html", tmp_path / "p.png"
    assert main([command, "--prompts", str(lines), "--html", str(page), "--png", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "\nOnce upon a time\n" in out and "\nThe 😀 مرحبا <b>bold</b> $x$\n" in out
    found = Page(page.read_text(encoding="utf-8"))
    assert "Once upon a time" in found.texts and "The 😀 مرحبا <b>bold</b> $x$" in found.texts
    assert "<b>bold" not in page.read_text(encoding="utf-8") and picture.read_bytes().startswith(PNG)
    objects = tmp_path / "prompts.jsonl"
    rows = [{"text": "Once upon"}, {"prompt": "The king", "id": 3}, "A dog"]
    names = ["Once upon", "The king", "A dog"]
    objects.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert main([command, "--prompts", str(objects)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in names] == names


def test_hostile_prompts_make_harmless_pages(tmp_path):
    texts = [text for text in HOSTILE if text.strip() and "\ud800" not in text and "\n" not in text]
    lines, page = tmp_path / "evil.jsonl", tmp_path / "evil.html"
    lines.write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
    assert main(["lens", "--prompts", str(lines), "--last", "0", "--html", str(page)]) == 0
    found = Page(page.read_text(encoding="utf-8"))
    assert len(found.named("script")) == 1 and not found.named("img")
    assert set(texts[:3]) <= set(found.texts) and visible(texts[6]) not in texts


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give a prompt, or --prompts FILE"),
        (["x", "--prompts", "y"], "one of the two"),
        (["--prompts", "no-such-file"], "No such file or directory: no-such-file"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--prompts", "latin.txt"], "is not UTF-8"),
        (["--prompts", "bad.jsonl"], "line 2 is no JSON"),
        (["--prompts", "list.jsonl"], 'line 1: expected an object with "text" or "prompt"'),
        (["--prompts", "both.jsonl"], 'line 1: expected an object with "text" or "prompt"'),
        (["--prompts", "."], "no regular file"),
        (["x", "--html", "empty.txt"], "exists already"),
        (["x", "--html", "none/x.html"], "no such folder"),
        (["x", "--html", "same", "--png", "same"], "both name same"),
        (["--prompts", "many.txt", "--png", "x.png"], "at most 16 prompts"),
        (["--prompts", "many.txt", "--html", "many.txt", "--force"], "source itself"),
        (["x", "--target", "two tokens"], "tokens, not one"),
        (["\x00" + "\ud800"], "not valid Unicode"),
    ],
)
@pytest.mark.parametrize("command", ["lens", "attribute"])
def test_errors_are_one_line_before_any_file(capsys, tmp_path, monkeypatch, command, argv, words):
    monkeypatch.chdir(tmp_path)
    for name, data in {
        "empty.txt": b"\n \n",
        "latin.txt": b"caf\xe9",
        "bad.jsonl": b'"a"\n{',
        "list.jsonl": b"[1]",
        "both.jsonl": b'{"text": "a", "prompt": "b"}',
        "many.txt": b"a\n" * 17,
    }.items():
        (tmp_path / name).write_bytes(data)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([command, *argv]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["attribute", "--pos", "10"], "--pos 10: the prompt 'short' has"),
        (["attribute", "--pos", "-11"], "--pos -11: the prompt 'short' has"),
        (["attribute", "--target", "", "--against", " time"], "'' is 0 tokens, not one"),
        (["attribute", "--target", ""], "'' is 0 tokens, not one"),
        (["lens", "--target", ""], "'' is 0 tokens, not one"),
        (["attribute"], "the prompt 'long long long"),
        (["lens"], "the prompt 'long long long"),
    ],
)
def test_a_later_prompt_is_checked_before_the_first_one_runs(capsys, tmp_path, options, words):
    """Nothing is printed, no page is written, and the error says which prompt it is about."""
    lines, page = tmp_path / "prompts.txt", tmp_path / "p.html"
    last = "long " * 2000 if len(options) == 1 else "short"
    lines.write_text(f"{PROMPT}\n{last}\n", encoding="utf-8")
    assert main([*options, "--prompts", str(lines), "--html", str(page)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == "" and not page.exists()


def test_bad_numbers(capsys):
    assert main(["lens", "x", "--last", "-1"]) == 2 and main(["attribute", "x", "--top", "0"]) == 2
    assert main(["lens", "x", "--top-k", "0"]) == 2 and main(["attribute", "x", "--pos", "9"]) == 2
    assert capsys.readouterr().err.count("\n") == 4


def test_png_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert main(["lens", "x", "--png", str(tmp_path / "x.png")]) == 2
    assert 'pip install "gemma4[plot]"' in capsys.readouterr().err
    assert main(["lens", "x", "--html", str(tmp_path / "x.html")]) == 0


def test_grids_and_attributions_are_plotted(tiny):
    plots = pytest.importorskip("gemma4.interp.plots")
    found = dla(tiny, CORRUPT)
    figure = plots.attribution_bars(found, top=3)
    widths = sorted(abs(bar.get_width()) for bar in figure.axes[0].patches)
    assert np.allclose(widths, np.sort(np.abs(found.values[:, 0]))[-3:], rtol=1e-5)
    assert len(plots.lens_panels([logit_lens(tiny, "Once"), logit_lens(tiny, "Once upon")]).axes) == 4
