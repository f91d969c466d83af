# SPDX-License-Identifier: Apache-2.0
"""Plots over pictures, videos and recordings: every value stands where its soft token looks or listens."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from media_files import picture, tone

from gemma4.interp import plots
from gemma4.media import image as images
from gemma4.media.medium import Medium, read_audio, read_image, read_video
from gemma4.media.prompt import SoftRun
from gemma4.media.video import load_video

plt = pytest.importorskip("matplotlib.pyplot")
pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    plt.switch_backend("agg")
    yield
    plt.close("all")


def runs_of(medium: Medium, start: int = 7) -> list[SoftRun]:
    """As `TokenizedPrompt.runs` has them."""
    n = medium.run_length
    return [SoftRun(medium, start + i * (n + 3), start + i * (n + 3) + n, i * n) for i in range(medium.n_runs)]


def value_at(artist, x: float, y: float) -> float:
    """What an image shows at a place of its axes."""
    left, right, bottom, top = artist.get_extent()
    array = artist.get_array()
    column = int((x - left) / (right - left) * array.shape[1])
    row = int((y - top) / (bottom - top) * array.shape[0])
    return float(array[row, column])


def numbers(*shape: int) -> np.ndarray:
    """Different everywhere, none negative."""
    return np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape).astype(np.float32)


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(90, 60), (61, 200), (500, 500)])
def test_each_value_lies_in_its_box(height, width):
    pixels = picture(height, width)
    [run] = runs_of(read_image(pixels, 70))
    values = numbers(2, run.stop - run.start)
    figure = plots.picture(values, run, titles=["one", "two"])
    plain, *panels = figure.axes[:3]
    assert np.array_equal(plain.images[0].get_array(), pixels) and len(plain.images) == 1
    for panel, row in zip(panels, values, strict=True):
        below, heat = panel.images
        assert np.array_equal(below.get_array(), pixels) and 0 < heat.get_alpha() < 1
        assert below.get_extent() == heat.get_extent() == [0, width, height, 0]
        for value, (top, left, bottom, right) in zip(row, run.boxes(), strict=True):
            assert value_at(heat, width * (left + right) / 2, height * (top + bottom) / 2) == value
    assert [panel.get_title() for panel in panels] == ["one", "two"]
    assert {panel.images[1].get_clim() for panel in panels} == {(0.0, values.max())}


def test_patches_and_soft_tokens_of_a_file(tmp_path):
    pixels = picture(100, 150)
    images.require("PIL.Image").fromarray(pixels).save(tmp_path / "a.png")
    found = images.preprocess(tmp_path / "a.png", 140)
    values = numbers(len(found.patches))
    heat = plots.picture(values, tmp_path / "a.png", image_tokens=140).axes[1].images[1]
    scale = np.array([150, 100]) / (found.positions.max(axis=0) + 1)
    for value, position in zip(values, found.positions, strict=True):
        assert value_at(heat, *((position + 0.5) * scale)) == value
    values = numbers(found.n_soft_tokens)
    heat = plots.picture(values, pixels, image_tokens=140).axes[1].images[1]
    for value, (top, left, bottom, right) in zip(values, found.boxes(), strict=True):
        assert value_at(heat, (left + right) / 2, (top + bottom) / 2) == value


def test_colours_are_the_same_on_both_sides_of_nought():
    pixels = picture(48, 96)
    [run] = runs_of(read_image(pixels, 70))
    values = np.linspace(-1, 3, run.stop - run.start)
    assert plots.picture(values, run).axes[1].images[1].get_clim() == (-3, 3)
    assert plots.picture(values, run, limits=(None, 0.5)).axes[1].images[1].get_clim() == (-3, 0.5)
    values[3] = np.nan
    assert plots.picture(np.abs(values), run).axes[1].images[1].get_clim() == (0, 3)
    assert plots.picture(np.zeros_like(values), run).axes[1].images[1].get_clim() == (0, 1)


def test_what_does_not_fit_is_said():
    pixels = picture(90, 60)
    rows, cols = (n // 48 for n in images.target_size(90, 60, 280))
    words = rf"values are \[5\], expected .* n = {rows * cols} \(soft tokens\) or {9 * rows * cols} \(patches\): .*"
    with pytest.raises(ValueError, match=words + rf"{rows} x {cols}"):
        plots.picture(np.zeros(5), pixels)
    with pytest.raises(ValueError, match=r"values are \[2, 3, 5\]"):
        plots.picture(np.zeros((2, 3, 5)), pixels)
    with pytest.raises(ValueError, match=r"values are \[0, "):
        plots.picture(np.zeros((0, rows * cols)), pixels)
    with pytest.raises(ValueError, match=r"got \['a'\] as titles, expected a list of 2"):
        plots.picture(np.zeros((2, rows * cols)), pixels, titles=["a"])
    with pytest.raises(TypeError, match="real numbers, got complex64"):
        plots.picture(np.zeros(rows * cols, np.complex64), pixels)
    with pytest.raises(ValueError, match="of a recording"):
        plots.picture(np.zeros(25), runs_of(read_audio(tone(1.0)))[0])
    with pytest.raises(ValueError, match=r"run is of a image.*plots\.picture"):
        plots.spectrogram(np.zeros(25), runs_of(read_image(pixels, 70))[0])


# -- videos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["runs", "frames"])
def test_every_frame_has_its_values(given):
    shots = [picture(60, 90, seed) for seed in range(10)]
    found = load_video(shots, fps=2.0, num_frames=10)
    medium = read_video(found)
    runs = runs_of(medium)
    values = numbers(10, medium.run_length)
    figure = plots.frames(values.reshape(-1), runs if given == "runs" else found)
    panels = figure.axes[:10]
    for panel, row, shot, run in zip(panels, values, shots, runs, strict=True):
        assert np.array_equal(panel.images[0].get_array(), shot)
        top, left, bottom, right = run.boxes()[4]
        assert value_at(panel.images[1], 90 * (left + right) / 2, 60 * (top + bottom) / 2) == row[4]
    assert [panel.get_title() for panel in panels] == [f"{i / 2:.2f} s" for i in range(10)]
    assert len({panel.images[1].get_clim() for panel in panels}) == 1
    one = plots.picture(values[3], runs[3])  # a frame is a picture, too
    assert np.array_equal(one.axes[0].images[0].get_array(), shots[3])
    with pytest.raises(ValueError, match=rf"values are \[9, {medium.run_length}\], expected \[10, "):
        plots.frames(values[:9], found)
    with pytest.raises(ValueError, match=r"values are \[10, 3\]"):
        plots.frames(values[:, :3], found)


# -- recordings --------------------------------------------------------------------------------------------------------


def test_values_over_time():
    samples = tone(1.3)
    [run] = runs_of(read_audio(samples))
    values = numbers(run.stop - run.start)
    ax = plots.spectrogram(values, run).axes[0]
    mel, heat = ax.images
    assert mel.get_array().shape == (128, 129)  # 129 frames of 10 ms: their middles are at 0, 10, 20 … ms
    assert mel.get_extent()[:2] == pytest.approx([-0.005, 1.285]) and mel.origin == "lower"
    for value, (start, end) in zip(values, run.seconds(), strict=True):
        assert value_at(heat, (start + end) / 2, 64) == value
    assert ax.get_xlim() == pytest.approx((0, 1.32)) and ax.get_xlabel() == "seconds"


def test_a_tone_lies_at_its_frequency():
    t = np.arange(16_000) / 16_000
    samples = (0.5 * np.sin(2 * np.pi * 1000 * t)).astype(np.float32)
    ax = plots.spectrogram(np.zeros(25), samples).axes[0]
    loudest = int(ax.images[0].get_array().mean(axis=1).argmax()) + 0.5
    places = dict(zip((label.get_text() for label in ax.get_yticklabels()), ax.get_yticks(), strict=True))
    assert places["1 kHz"] == pytest.approx(loudest, abs=1)
    assert places["2 kHz"] > loudest + 15


def test_rows_below_the_spectrogram():
    samples = tone(0.8)
    rows = numbers(4, 20)
    top, below = plots.spectrogram(rows, samples, titles=list("abcd")).axes[:2]
    assert top.images[0].get_array().shape == (128, 79) and top.get_xlim() == below.get_xlim()
    [heat] = below.images
    for i in range(4):
        assert [value_at(heat, 0.04 * k + 0.02, i + 0.5) for k in range(20)] == rows[i].tolist()
    assert [label.get_text() for label in below.get_yticklabels()] == list("abcd")
    halves = plots.spectrogram(numbers(40), samples).axes[0].images[1]
    assert halves.get_extent()[:2] == pytest.approx([0, 0.8])
    stereo = np.stack([samples] * 2, axis=1)
    assert plots.spectrogram(numbers(20), stereo, 16_000).axes[0].images[1].get_extent()[1] == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"values are \[4, 19\], .* n = 20 .* or 40 .* 0\.80 s long"):
        plots.spectrogram(rows[:, 1:], samples)
    with pytest.raises(ValueError, match=r"values are \[\], expected"):
        plots.spectrogram(3.0, samples)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'plots need matplotlib: pip install "gemma4\[plot\]"'):
        plots.spectrogram(np.zeros(25), tone(1.0))
