# SPDX-License-Identifier: Apache-2.0
"""Plots of numbers per soft token over a picture, the frames of a video, or a recording's spectrogram.

Any number per soft token can be plotted: attention from an answer, a feature's activation, a norm. Call them as
`gemma4.interp.plots.picture`, `.frames` and `.spectrogram`.
"""

# matplotlib leaves its **kwargs untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma4.media import audio as sounds
from gemma4.media import image as images
from gemma4.media import video as videos
from gemma4.media.prompt import SoftRun
from gemma4.narrow import is_sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

F32: TypeAlias = NDArray[np.float32]
Limits: TypeAlias = tuple[float | None, float | None]
_SECONDS = sounds.MS_PER_TOKEN / 1000
_HOP = sounds.HOP / sounds.RATE  # seconds from one spectrogram frame to the next
_HERTZ = (250, 500, 1000, 2000, 4000)  # ticks


def pyplot() -> Any:
    """matplotlib.pyplot. Raises ImportError with the package to install."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "gemma4[plot]"') from error
    return plt


def picture(
    values: ArrayLike,
    image: images.ImageLike | SoftRun,
    *,
    image_tokens: int = 280,
    titles: Sequence[str] | None = None,
    limits: Limits = (None, None),
) -> Figure:
    """Plot the picture, and beside it one panel for each row of values, drawn over it.

    values: numbers [n] or [panels, n] (heads, layers, features); n soft tokens (`pattern[:, -1, run.start:run.stop]`),
        or n patches, nine to a soft token, as the sites before the pooling have them; row after row of the picture.
    image: a run of soft tokens of a prompt (`prompt.runs[i]`: a picture, or a frame of a video); or what `encode_image`
        takes, with its image_tokens.
    titles: of the panels. limits: the colours' ends, shared by all panels; None = the values' own, from 0 where none
        is negative, else the same on both sides of 0.
    Raises ValueError if the numbers of values or titles do not fit, besides what `load_image` raises.
    """
    if isinstance(image, SoftRun):
        pixels, grid = _of_run(image)
    else:
        pixels = images.load_image(image)
        grid = _grid(pixels, image_tokens)
    rows = _rows(values, grid, "the picture")
    names = _titles(titles, len(rows))
    figure, axes = _panels(1 + len(rows), pixels.shape[1] / pixels.shape[0])
    axes[0].imshow(pixels, extent=_extent(pixels))
    colours = _Colours.of(rows, limits)
    for ax, row, name in zip(axes[1:], rows, names, strict=False):
        _over(ax, pixels, row, grid, colours)
        ax.set_title(name, fontsize=9)
    _finish(figure, axes, 1 + len(rows))
    return figure


def frames(
    values: ArrayLike,
    video: videos.VideoLike | Sequence[SoftRun],
    *,
    image_tokens: int = videos.FRAME_TOKENS,
    limits: Limits = (None, None),
) -> Figure:
    """One panel for each frame of a video, with its time, under one scale of colours.

    values: numbers [frames, n], or [frames * n] as `encode_video` gives rows; n soft tokens or patches of a frame.
    video: the runs of one video in a prompt; or what `encode_video` takes, with its image_tokens (files and frames
        given one by one with the defaults of `load_video`: pass a VideoFrames for others).
    limits: as for `picture`. Raises ValueError if the numbers do not fit, besides what `load_video` raises.
    """
    seen, times, grid = _of_video(video, image_tokens)
    n, array = grid[0] * grid[1], _numbers(values)
    if array.ndim == 1 and array.size % len(seen) == 0:
        array = array.reshape(len(seen), -1)
    if array.ndim != 2 or len(array) != len(seen):
        raise ValueError(
            f"values are {list(np.shape(values))}, expected [{len(seen)}, {n}] or [{len(seen) * n}]: {len(seen)} "
            f"frames of {grid[0]} x {grid[1]} soft tokens"
        )
    rows = _rows(array, grid, "a frame")
    figure, axes = _panels(len(rows), seen[0].shape[1] / seen[0].shape[0])
    colours = _Colours.of(rows, limits)
    for ax, row, pixels, time in zip(axes, rows, seen, times, strict=False):
        _over(ax, pixels, row, grid, colours)
        ax.set_title(f"{time:.2f} s", fontsize=9)
    _finish(figure, axes, len(rows))
    return figure


def spectrogram(
    values: ArrayLike,
    audio: sounds.AudioLike | SoftRun,
    rate: int | None = None,
    *,
    titles: Sequence[str] | None = None,
    limits: Limits = (None, None),
) -> Figure:
    """Values over the log-mel spectrogram, time in seconds; several rows of them in a panel below it.

    values: numbers [n], or [rows, n] (heads, layers, features); n soft tokens of 40 ms, or twice as many frames of
        20 ms as `audio.hook_conv0` has.
    audio: the run of a recording in a prompt; or what `encode_audio` takes, with its rate.
    titles: of the rows. limits: as for `picture`.
    Raises ValueError if the numbers of values or titles do not fit, besides what `load_audio` and `log_mel` raise.
    """
    samples, n = _of_recording(audio, rate)
    mel = sounds.log_mel(samples).T
    rows, step = _over_time(values, n, math.ceil(mel.shape[1] / 2), len(samples))
    names, colours = _titles(titles, len(rows)), _Colours.of(rows, limits)
    end = rows.shape[1] * step
    if len(rows) == 1:
        figure, ax = pyplot().subplots(figsize=(9, 3), layout="constrained")
        _mel(ax, mel)
        heat = ax.imshow(rows, extent=(0, end, 0, len(mel)), **colours.options(over=True))
        ax.set_title(names[0], fontsize=9)
    else:
        below = max(0.8, 0.22 * len(rows))
        figure, (top, ax) = pyplot().subplots(
            2, 1, figsize=(9, 3 + below), sharex=True, height_ratios=(2.2, below), layout="constrained"
        )
        _mel(top, mel)
        heat = ax.imshow(rows, extent=(0, end, len(rows), 0), **colours.options(over=False))
        ax.set_yticks(np.arange(len(rows)) + 0.5, [name or str(i) for i, name in enumerate(names)], fontsize=7)
    ax.set_xlim(0, max(end, mel.shape[1] * _HOP))
    ax.set_xlabel("seconds")
    figure.colorbar(heat, ax=ax, pad=0.01)
    return figure


# -- drawing ---------------------------------------------------------------------------------------------------------


class _Colours(NamedTuple):
    """One scale for all panels."""

    cmap: str
    low: float
    high: float

    @classmethod
    def of(cls, rows: F32, limits: Limits) -> _Colours:
        finite = rows[np.isfinite(rows)]
        least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        if least < 0:
            most = max(-least, most)
        low, high = min(-most, 0.0) if least < 0 else 0.0, most
        low, high = (own if given is None else float(given) for own, given in zip((low, high), limits, strict=True))
        return cls("coolwarm" if low < 0 < high else "inferno", low, high if high > low else low + 1.0)

    def options(self, *, over: bool) -> dict[str, Any]:
        """Options of imshow; over: draw translucent."""
        shade: dict[str, Any] = {"cmap": self.cmap, "vmin": self.low, "vmax": self.high, "alpha": 0.6 if over else 1.0}
        return shade | {"aspect": "auto", "interpolation": "nearest"}


def _over(ax: Axes, pixels: NDArray[np.uint8], row: F32, grid: tuple[int, int], colours: _Colours) -> None:
    """Squares of colour over the picture. They lie where `SoftRun.boxes` says: the picture, cut evenly."""
    ax.imshow(pixels, extent=_extent(pixels))
    scale = math.isqrt(row.size // (grid[0] * grid[1]))  # 3 for patches
    heat = row.reshape(scale * grid[0], scale * grid[1])
    ax.imshow(heat, extent=_extent(pixels), **colours.options(over=True) | {"aspect": "equal"})


def _mel(ax: Axes, mel: F32) -> None:
    """The spectrogram in grey, the lowest sounds at the bottom; frame i is about the time i * 10 ms."""
    ends = (-_HOP / 2, (mel.shape[1] - 0.5) * _HOP)
    ax.imshow(mel, cmap="gray_r", aspect="auto", origin="lower", extent=(*ends, 0, len(mel)))
    # filter i (from 0) is the one about (i + 1) / 129 of the way up in mel; its row's middle is at i + 0.5
    places = [_mels(hertz) / _mels(sounds.RATE / 2) * (len(mel) + 1) - 0.5 for hertz in _HERTZ]
    ax.set_yticks(places, [f"{hertz / 1000:g} kHz" for hertz in _HERTZ], fontsize=7)
    ax.set_ylim(0, len(mel))


def _mels(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def _panels(n: int, aspect: float) -> tuple[Figure, NDArray[Any]]:
    """n axes, and some that stay empty, at most eight in a row. aspect: a picture's width by its height."""
    across = min(n, 8)
    down = math.ceil(n / across)
    width, height = (2.6, 2.6 / aspect) if aspect > 1 else (2.6 * aspect, 2.6)
    size = (max(width, 1.0) * across + 1.0, (max(height, 0.6) + 0.3) * down)
    figure, axes = pyplot().subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    return figure, axes.reshape(-1)


def _finish(figure: Figure, axes: NDArray[Any], used: int) -> None:
    for ax in axes:
        ax.set_axis_off()
    figure.colorbar(axes[used - 1].images[-1], ax=list(axes), pad=0.01)


def _extent(pixels: NDArray[np.uint8]) -> tuple[float, float, float, float]:
    return 0.0, float(pixels.shape[1]), float(pixels.shape[0]), 0.0


# -- inputs ----------------------------------------------------------------------------------------------------------


def _of_run(run: SoftRun) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels and grid of a picture, or of a video's frame."""
    medium = run.medium
    if medium.kind == "audio":
        raise ValueError("this run is of a recording, expected one of a picture or video: see plots.spectrogram")
    pixels = medium.content if medium.kind == "image" else medium.content.frames[run.first // medium.run_length]
    return pixels, medium.grid


def _are_runs(video: object) -> TypeGuard[Sequence[SoftRun]]:
    return is_sequence(video) and len(video) > 0 and isinstance(video[0], SoftRun)


def _of_video(
    video: videos.VideoLike | Sequence[SoftRun], image_tokens: int
) -> tuple[list[NDArray[np.uint8]], list[float], tuple[int, int]]:
    """Frames, their seconds, and the grid of each."""
    if _are_runs(video):
        return [_of_run(run)[0] for run in video], [float(run.seconds()[0, 0]) for run in video], video[0].medium.grid
    found = videos.load_video(cast("videos.VideoLike", video))
    return found.frames, found.seconds, _grid(found.frames[0], image_tokens)


def _of_recording(audio: sounds.AudioLike | SoftRun, rate: int | None) -> tuple[F32, int]:
    """Samples, and how many soft tokens they are."""
    if isinstance(audio, SoftRun):
        if audio.medium.kind != "audio":
            raise ValueError(f"this run is of a {audio.medium.kind}, expected one of a recording: see plots.picture")
        return audio.medium.content, audio.stop - audio.start
    samples = sounds.load_audio(audio, rate)
    return samples, sounds.n_soft_tokens(len(samples))


def _grid(pixels: NDArray[np.uint8], image_tokens: int) -> tuple[int, int]:
    height, width = images.target_size(pixels.shape[0], pixels.shape[1], image_tokens)
    return height // images.SIDE, width // images.SIDE


def _numbers(values: ArrayLike) -> F32:
    array = np.asarray(values)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"values must be real numbers, got {array.dtype}")
    return array.astype(np.float32)


def _rows(values: ArrayLike, grid: tuple[int, int], what: str) -> F32:
    """float32 [rows, n or 9 n]. Raises ValueError."""
    array, n = _numbers(values), grid[0] * grid[1]
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or not len(rows) or rows.shape[1] not in (n, n * images.POOL**2):
        raise ValueError(
            f"values are {list(array.shape)}, expected [n] or [rows, n] with n = {n} (soft tokens) or "
            f"{n * images.POOL**2} (patches): {what} is {grid[0]} x {grid[1]} soft tokens with this image_tokens"
        )
    return rows


def _over_time(values: ArrayLike, n: int, n_halves: int, n_samples: int) -> tuple[F32, float]:
    """float32 [rows, n or n_halves], and the seconds that each value stands for. Raises ValueError."""
    array = _numbers(values)
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or not len(rows) or rows.shape[1] not in (n, n_halves):
        raise ValueError(
            f"values are {list(array.shape)}, expected [n] or [rows, n] with n = {n} (soft tokens of 40 ms) or "
            f"{n_halves} (frames of 20 ms): the recording is {n_samples / sounds.RATE:.2f} s long"
        )
    return rows, _SECONDS if rows.shape[1] == n else _SECONDS / 2


def _titles(titles: Sequence[str] | None, n: int) -> list[str]:
    if titles is None:
        return [""] * n
    if isinstance(titles, str) or len(titles) != n:
        raise ValueError(f"got {titles!r} as titles, expected a list of {n}, one for each row of values")
    return list(titles)
