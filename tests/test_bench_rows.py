# SPDX-License-Identifier: Apache-2.0
"""`gemma4 bench --batch` and `--curve`: the cost of a step by its rows, its table, its record and its picture."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from small_models import E_LIKE, write_checkpoint

import gemma4
from gemma4.bench import BATCH, CURVE_ROWS, CostCurve, RowsBenchmark, StepCost, bench_batch, bench_curve, rows
from gemma4.cli import main
from gemma4.memory import available_bytes
from gemma4.profile import Limits, OpTotal, Profile

LIMITS = Limits(read_bytes=10e9, f32_work=100e9, int8_work=400e9, int16_work=200e9, bf16_work=1000e9)
WEIGHTS = {"q", "k, v", "o", "gate, up", "down", "head", "per-layer gate", "per-layer projection", "per-layer context"}


@pytest.fixture(scope="module")
def curve(random_dir) -> RowsBenchmark:
    """Also more rows than the local layers' window of 8, and than the 32 that the head computes at once."""
    return bench_curve(random_dir, [33, 2, 5, 2], prompt=20, repeats=2, threads=1)


def of_seconds(*by_rows: tuple[int, list[float]]) -> CostCurve:
    """A curve of one timed step in each round."""
    return CostCurve(
        "sequences", tuple(StepCost(n, tuple(times), Profile(), rounds=len(times)) for n, times in by_rows)
    )


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_batch(random_dir):
    result = bench_batch(random_dir, [4, 2], prompt=16, repeats=2, threads=1)
    [found] = result.curves
    assert found.kind == "sequences" and [step.rows for step in found.steps] == [1, 2, 4]
    for step in found.steps:
        assert step.rounds == 2 and len(step.seconds) % 2 == 0 and len(step.seconds) >= 8
        assert min(step.seconds) > 0 and len(step.by_round) == 2
        assert step.rate == pytest.approx(step.rows / step.median_s)
        assert step.profile.total.calls == 1
    assert found.over_one(0) == 1 and found.row_more(0) is None
    assert result.prompt == 16 and "1 threads" in result.how and result.notes == ()
    assert result.kv_bytes > 0 and result.peak_bytes > result.kv_bytes and result.load_s < 60


def test_curve_has_two_kinds_with_the_same_rows(curve):
    assert [one.kind for one in curve.curves] == ["sequences", "tokens"]
    for one in curve.curves:
        assert [step.rows for step in one.steps] == [1, 2, 5, 33]
        assert all(len(step.seconds) >= 4 for step in one.steps)


def test_steps_compute_the_rows_that_they_are_said_to(curve, random_dir):
    """From the profiles: every row has logits, and weights are streamed once; only n sequences read n caches."""
    with gemma4.load(random_dir) as model:
        d_vocab, d_model = model.d_vocab, model.config.d_model
    for one in curve.curves:
        for i, step in enumerate(one.steps):
            ops = {op.name: op for op in one.needed(i)}
            first = {op.name: op for op in one.needed(0)}
            assert ops["head"].work == 2 * step.rows * d_vocab * d_model
            for name in WEIGHTS:
                assert ops[name].bytes == first[name].bytes > 0
                assert ops[name].work == step.rows * first[name].work
    together, alone = ({op.name: op for op in one.needed(2)} for one in curve.curves)
    one_row = {op.name: op for op in curve.curves[0].needed(0)}
    assert together["attention, global"].bytes == 5 * one_row["attention, global"].bytes
    assert one_row["attention, global"].bytes < alone["attention, global"].bytes < together["attention, global"].bytes


def test_every_timed_step_begins_after_the_prompt(random_dir, monkeypatch):
    """Decoding goes on from step to step; n tokens of one sequence always follow the prompt, also where the window has
    moved on, and the rows of a step have tokens of their own."""
    lengths: dict[tuple[int, int], set[int]] = {}
    forward = gemma4.Model.forward

    def spy(model, ids, *, logits, sequence):
        if logits == "last":
            assert len(ids) == len(sequence) and len({one.item() for one in ids}) > len(ids) // 2
            lengths.setdefault((len(ids), 1), set()).update(one.length for one in sequence)
        elif logits == "all":
            lengths.setdefault((1, len(ids)), set()).add(sequence.length)
            assert len(set(ids.tolist())) > len(ids) // 2
        return forward(model, ids, logits=logits, sequence=sequence)

    monkeypatch.setattr(gemma4.Model, "forward", spy)
    bench_curve(random_dir, [3, 40], prompt=20, repeats=1, threads=1)
    for n in (3, 40):
        assert lengths[1, n] == {20}
        assert min(lengths[n, 1]) == 20 and lengths[n, 1] == set(range(20, max(lengths[n, 1]) + 1))


def test_experts_stream_what_rows_choose(random_moe):
    result = bench_batch(random_moe.checkpoint.path, [8], prompt=8, repeats=1, threads=1)
    [found] = result.curves
    one, many = ({op.name: op for op in found.needed(i)} for i in range(2))
    assert one["experts down"].bytes < many["experts down"].bytes <= 4 * one["experts down"].bytes  # 2 of 8 to all
    assert many["router"].bytes == one["router"].bytes
    assert found.weights_seconds(1, LIMITS) > found.weights_seconds(0, LIMITS)


def test_limits_of_a_curve(curve):
    for one in curve.curves:
        steps = range(len(one.steps))
        weights = [one.weights_seconds(i, LIMITS) for i in steps]
        arithmetic = [one.arithmetic_seconds(i, LIMITS) for i in steps]
        assert weights[0] > 0 and max(weights) == pytest.approx(min(weights))
        assert arithmetic == sorted(arithmetic) and arithmetic[-1] > 30 * arithmetic[0]
        assert [one.floor(i, LIMITS) for i in steps] == [max(pair) for pair in zip(weights, arithmetic, strict=True)]
        assert all(one.reading_seconds(i, LIMITS) > weights[i] for i in steps)


def test_work_done_twice_does_not_count():
    """33 rows in blocks of 32 compute 64 rows of the head."""
    profiles = [Profile(), Profile()]
    profiles[0].ops_of = lambda part: [OpTotal("head", 1, 1.0, 10.0, 0.0, 0.0, 7.0)] if part == "text" else []
    profiles[1].ops_of = lambda part: [OpTotal("head", 2, 1.0, 64.0, 320.0, 256.0, 14.0)] if part == "text" else []
    found = CostCurve("tokens", tuple(StepCost(n, (1.0,), profiles[n > 1], 1) for n in (1, 33)))
    [head] = found.needed(1)
    assert head.work + head.int8_work + head.bf16_work == pytest.approx(330) and head.bytes == 7
    assert head.int8_work == 5 * head.work  # by type as it was


def test_the_prompt_is_shortened_to_the_context(random_dir):
    result = bench_batch(random_dir, [2], prompt=10_000, repeats=1, threads=1)
    assert 200 < result.prompt < 256 and f"{result.prompt} tokens, not 10000" in str(result)


def test_default_rows():
    assert list(BATCH) == [1, 2, 4, 8, 16]
    assert list(CURVE_ROWS) == sorted(set(CURVE_ROWS)) and (CURVE_ROWS[0], CURVE_ROWS[-1]) == (1, 64)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_costs_of_more_rows():
    found = of_seconds((1, [2.0]), (2, [2.2]), (4, [3.0]))
    assert [found.over_one(i) for i in range(3)] == pytest.approx([1, 2 * 2 / 2.2, 4 * 2 / 3])
    assert found.row_more(0) is None
    assert [found.row_more(i) for i in (1, 2)] == pytest.approx([0.1, 0.2])


def test_by_round_takes_each_rounds_median():
    step = StepCost(2, (1.0, 2.0, 9.0, 3.0, 4.0, 5.0), Profile(), rounds=2)
    assert step.by_round == (2.0, 4.0) and step.median_s == 3.5


def test_falls_are_of_every_round_and_beyond_noise():
    ones = [1.0, 1.1, 0.9]
    assert of_seconds((1, ones), (2, [2.2, 2.5, 1.9])).falls()[0][:2] == (2, 1)
    assert of_seconds((1, ones), (2, [2.2, 2.5, 1.79])).falls() == ()  # one round does not show it
    assert of_seconds((1, ones), (2, [2.01, 2.21, 1.81])).falls() == ()  # noise
    assert of_seconds((1, ones), (2, ones)).falls() == ()


def test_falls_compare_with_the_best_before():
    found = of_seconds((1, [1.0]), (4, [1.0]), (5, [2.0]), (6, [2.0]), (16, [3.0])).falls()
    assert [(fall.rows, fall.of) for fall in found] == [(5, 4), (6, 4)]
    assert [fall.ratio for fall in found] == pytest.approx([2.5 / 4, 3 / 4])


def test_text_says_where_tokens_fall():
    def text_of(found: CostCurve) -> str:
        return str(RowsBenchmark("m", "how", 8, 0.1, (found,), LIMITS, 1 << 20, 1 << 10))

    falling = text_of(of_seconds((1, [1.0]), (4, [1.0]), (5, [2.0])))
    assert "FALL as the number of sequences grows: 0.62 x from 4 to 5" in falling
    assert "never fall" in text_of(of_seconds((1, [1.0]), (4, [1.0])))
    many = text_of(of_seconds((1, [1.0]), *((n, [1.1 * n]) for n in range(2, 10))))
    assert many.count(" x from 1 to ") == 6 and many.rstrip().endswith("and 2 more")


def test_text_of_a_curve(curve):
    text = str(curve)
    for words in ("n sequences", "one sequence", "weights", "arithmetic", "of limit", "rounds", "GB/s"):
        assert words in text
    table = [line.split() for line in text.splitlines() if re.match(r" *\d+ +[\d.]", line)]
    assert [int(line[0]) for line in table] == [1, 2, 5, 33]
    assert {len(line) for line in table[1:]} == {9} and "…" not in text
    assert text.count("as the number of") == 2


def test_record(curve):
    record = json.loads(json.dumps(curve.as_dict()))
    assert record["limits"]["read_bytes"] > 1e8 and record["prompt"] == 20 and record["kv_bytes"] > 0
    assert set(record["curves"]) == {"sequences", "tokens"}
    for one in record["curves"].values():
        assert [step["rows"] for step in one["steps"]] == [1, 2, 5, 33]
        for step in one["steps"]:
            assert len(step["seconds"]) % step["rounds"] == 0
            assert step["ms"] == pytest.approx(1e3 * float(np.median(step["seconds"])))
            assert step["tokens_per_s"] == pytest.approx(1e3 * step["rows"] / step["ms"])
            assert step["weights_ms"] > 0 and step["arithmetic_ms"] > 0
            assert {op["name"] for op in step["ops"]} >= WEIGHTS
            assert step["share_of_bandwidth"] > 0 and step["share_of_arithmetic"] > 0
        assert [one["steps"][0][name] for name in ("over_one", "row_more")] == [1, None]
        assert isinstance(one["falls"], list)


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_plot_has_both_curves_and_the_limits(curve):
    plt = pytest.importorskip("matplotlib.pyplot")
    from gemma4.bench.plot import plot_rows

    figure = plot_rows(curve)
    [ax] = figure.axes
    lines = {line.get_label(): line for line in ax.lines}
    first, second = curve.curves
    for one, label in ((first, "one row of each of n sequences"), (second, "n rows of one sequence")):
        np.testing.assert_array_equal(lines[label].get_xdata(), [1, 2, 5, 33])
        np.testing.assert_allclose(lines[label].get_ydata(), [1e3 * step.median_s for step in one.steps])
    [reading] = [line for label, line in lines.items() if label.startswith("weights read once at")]
    assert f"{curve.limits.read_bytes / 1e9:.3g} GB/s" in reading.get_label()
    np.testing.assert_allclose(reading.get_ydata(), 1e3 * first.weights_seconds(0, curve.limits))  # level
    arithmetic = lines["arithmetic at the measured peak"].get_ydata()
    np.testing.assert_allclose(arithmetic, [1e3 * first.arithmetic_seconds(i, curve.limits) for i in range(4)])
    assert ax.get_ylim()[0] == 0 and "rows" in ax.get_xlabel() and len(ax.get_legend().get_texts()) == 5
    plt.close(figure)


def test_plot_takes_axes_and_odd_names(curve):
    plt = pytest.importorskip("matplotlib.pyplot")
    from gemma4.bench.plot import plot_rows

    figure, ax = plt.subplots()
    odd = RowsBenchmark("a$b$c", "how", 8, 0.1, curve.curves[:1], LIMITS, 1, 1)
    assert plot_rows(odd, ax) is figure and len(ax.lines) == 3
    figure.canvas.draw()
    plt.close(figure)


@pytest.mark.parametrize("format", ["png", "svg", "html"])
def test_rendered_files_stand_alone(curve, format):
    plt = pytest.importorskip("matplotlib.pyplot")
    from gemma4.bench.plot import render_rows

    before = plt.get_fignums()
    data = render_rows(curve, format)
    assert plt.get_fignums() == before
    if format == "png":
        assert data.startswith(b"\x89PNG\r\n")
        return
    text = data.decode()
    if format == "svg":
        assert "<svg" in text and "<image" not in text and "rows in a step" in text
        return
    assert text.startswith("<!doctype html>") and text.count("<img") == 1
    picture = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert picture and b"<svg" in base64.b64decode(picture[1])
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert text.count("<tr>") == 1 + 4 and "as the number of sequences grows" in text


def test_other_formats_are_refused(curve):
    pytest.importorskip("matplotlib")
    from gemma4.bench.plot import format_of, render_rows

    with pytest.raises(ValueError, match="format must be one of png, svg, html"):
        render_rows(curve, "gif")
    assert [format_of(Path(name)) for name in ("a.png", "b.SVG", "c.d.html")] == ["png", "svg", "html"]
    for name in ("a.gif", "png", "a"):
        with pytest.raises(ValueError, match=r"ends in \.png, \.svg or \.html"):
            format_of(Path(name))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_batch_command(random_dir, tmp_path, capsys):
    out = tmp_path / "b.json"
    options = ["--batch", "1,3", "--prompt", "8", "--repeats", "1", "--threads", "1", "--profile", "--json", str(out)]
    assert main(["bench", str(random_dir), *options]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +3 +[\d.]+ +[\d.e+]+ +[\d.]+ x +-?[\d.]+ +\d+% +\d+%", text, re.MULTILINE)
    assert text.count("gate, up") == 2 and "3 sequences" in text
    steps = json.loads(out.read_text())["curves"]["sequences"]["steps"]
    assert [step["rows"] for step in steps] == [1, 3]


def test_curve_command(random_dir, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "c.json", tmp_path / "c.svg"
    options = ["--curve", "--rows", "1-3,6", "--prompt", "8", "--repeats", "1", "--threads", "1"]
    options += ["--json", str(out), "--plot", str(picture)]
    assert main(["bench", str(random_dir), *options]) == 0
    assert f"picture: {picture}" in capsys.readouterr().err and "<svg" in picture.read_text()
    for one in json.loads(out.read_text())["curves"].values():
        assert [step["rows"] for step in one["steps"]] == [1, 2, 3, 6]
    assert main(["bench", str(random_dir), *options]) == 2  # both are there, and nothing runs
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch 0", "--batch '0': expected numbers from 1 to 1024"),
        ("--batch 4,,", "--batch '4,,': expected numbers from 1 to 1024, such as 1,2,4,8,16; found ''"),
        ("--batch 1025", "found '1025'"),
        ("--batch=-3", "found '-3'"),
        ("--batch 1.5", "found '1.5'"),
        ("--batch ²", "expected numbers"),
        ("--batch 1-99999999999999999999", "expected numbers"),
        ("--curve --rows 5-3", "--rows '5-3': expected numbers from 1 to 1024, such as 1-16,24,32; found '5-3'"),
        ("--curve --rows 256", "256 rows after a prompt: the model's context is 256"),
        ("--rows 3", "--rows goes with --curve"),
        ("--plot x.png", "--plot goes with --batch or --curve"),
        ("--batch 2 --curve", "one of the two"),
        ("--batch 2 --decode 8", "--decode goes neither with --batch nor with --curve"),
        ("--curve --image-tokens 70", "--image-tokens goes neither"),
        ("--curve --plot x.gif", "ends in .png, .svg or .html"),
        ("--batch 2 --plot x.svg --json x.svg", "both name x.svg"),
        ("--batch 2 --prompt 0", "prompt must be an integer in 1.."),
        ("--batch 2 --repeats 0", "repeats must be an integer in 1.."),
    ],
)
def test_wrong_options_are_one_line(random_dir, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", str(random_dir), *options.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_runs(random_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setattr("gemma4.bench.bench_curve", lambda *_, **__: pytest.fail("it ran"))
    assert main(["bench", str(random_dir), "--curve", "--plot", str(tmp_path / "c.png")]) == 2
    assert 'pip install "gemma4[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("batch", [[], "1,2", [0], [1025], [1.5], [True], 3, None, ["2"]])
def test_wrong_numbers_in_python(batch):
    for function, name in ((bench_batch, "batch"), (bench_curve, "rows")):
        with pytest.raises(ValueError, match=name):
            function("tiny-e", batch)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_sequences_that_do_not_fit(random_dir, capsys, monkeypatch):
    monkeypatch.setattr(rows, "available_bytes", lambda: 100 << 10)
    with pytest.raises(MemoryError, match=r"64 sequences of 32 tokens need .* more .*, and 100\.0 KiB are free"):
        bench_batch(random_dir, [64], prompt=32)
    assert main(["bench", str(random_dir), "--batch", "64", "--prompt", "32"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(rows, "available_bytes", lambda: None)  # unknown: it tries
    assert bench_batch(random_dir, [2], prompt=8, repeats=1, threads=1).curves


def system(root: Path, available: str | None, groups: dict[str, tuple[str, int, int]], own: str) -> Path:
    """A root with /proc and /sys of a process in the cgroup `own`. groups: path -> limit, use, cached files."""
    (root / "proc/self").mkdir(parents=True)
    if available is not None:
        (root / "proc/meminfo").write_text(f"MemTotal:  999999 kB\nMemAvailable:   {available} kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{own}\n")
    for name, (limit, used, cached) in groups.items():
        folder = root / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\nfile {cached}\nfile_mapped 3\n")
    return root


def test_available_memory(tmp_path):
    assert available_bytes(system(tmp_path / "none", None, {}, "/")) is None
    assert available_bytes(system(tmp_path / "free", "100", {}, "/")) == 100 * 1024
    groups = {"a": ("70000", 50000, 10000), "a/b": ("max", 40000, 0)}
    assert available_bytes(system(tmp_path / "outer", "100", groups, "/a/b")) == 30000
    assert available_bytes(system(tmp_path / "wide", "10", groups, "/a/b")) == 10240
    groups = {"a": ("max", 50000, 0), "a/b": ("40000", 45000, 0)}
    assert available_bytes(system(tmp_path / "full", "100", groups, "/a/b")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_available_memory_here():
    free = available_bytes()
    assert free is not None and 1 << 20 < free < 1 << 50


def test_quantised_models_have_bytes_as_limit(tmp_path):
    """fast counts int8 work: the arithmetic line is drawn at that rate."""
    source = write_checkpoint(tmp_path / "m", E_LIKE | {"hidden_size": 64})
    gemma4.quantize(source, tmp_path / "m.gguf", type="Q8_0")
    [found] = bench_batch(tmp_path / "m.gguf", [4], prompt=8, repeats=1, threads=1, precision="fast").curves
    ops = {op.name: op for op in found.needed(1)}
    assert ops["q"].int8_work > 0 == ops["q"].work
