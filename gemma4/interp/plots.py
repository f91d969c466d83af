# SPDX-License-Identifier: Apache-2.0
"""Plots of captures. They need matplotlib: pip install "gemma4[plot]". Every function returns the Figure.

Plots over pictures, videos and sound are in gemma4/interp/media_plots.py and are also available here.
"""

# matplotlib leaves its **kwargs untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma4.interp.attribution import LogitAttribution
from gemma4.interp.experiments import Grid
from gemma4.interp.lens import LogitLens
from gemma4.interp.media_plots import frames, picture, pyplot, spectrogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "attention_pattern",
    "attribution_bars",
    "attribution_panels",
    "frames",
    "grid",
    "lens_heatmap",
    "lens_panels",
    "overview",
    "picture",
    "residual_norms",
    "shown",
    "spectrogram",
]


def residual_norms(lens: LogitLens, tokens: Sequence[str], ax: Axes | None = None) -> Figure:
    """Heat map of the residual stream's norm, layer by position."""
    return _heat(lens.norms, lens.labels, tokens, "residual stream, |x|", ax, color="viridis")


def lens_heatmap(lens: LogitLens, tokens: Sequence[str], ax: Axes | None = None) -> Figure:
    """Heat map of the logit lens: the top token in each cell, its probability as colour."""
    words = [[_label(cell[0]) for cell in layer] for layer in lens.tokens]
    return _heat(lens.probs[:, :, 0], lens.labels, tokens, "logit lens, top token and p", ax, words, limits=(0, 1))


def grid(grid: Grid, title: str = "", *, recovered: bool | None = None, ax: Axes | None = None) -> Figure:
    """Heat map of a `Grid`: the share of the clean run's metric that comes back; for ablations the change.

    recovered: None = the share, unless clean and corrupt are the same run.
    """
    values, name = grid.shown(recovered)
    top = float(np.abs(values).max()) or 1.0
    figure = _heat(values, grid.rows, grid.columns, title or name, ax, color="RdBu", limits=(-top, top))
    figure.axes[0].set(xlabel=grid.across, ylabel=grid.down)
    return figure


def attention_pattern(
    pattern: NDArray[np.float32], tokens: Sequence[str], heads: Sequence[int] | None = None
) -> Figure:
    """One panel per head of attn.hook_pattern, float32 [heads, T, S]: a row looks at columns."""
    chosen = list(range(pattern.shape[0])) if heads is None else list(heads)
    side = min(6.0, max(3.0, 0.28 * len(tokens)))
    figure, axes = pyplot().subplots(1, len(chosen), figsize=(side * len(chosen), side), squeeze=False)
    for ax, head in zip(axes[0], chosen, strict=True):
        ax.imshow(pattern[head], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        ax.set_title(f"head {head}")
        _name_positions(ax, tokens, pattern.shape[2])
        ax.set_yticks(range(len(tokens)), [_label(t) for t in tokens], fontsize=7)
    figure.tight_layout()
    return figure


def lens_panels(lenses: Sequence[LogitLens]) -> Figure:
    """The logit lens of several prompts, a panel each, one above the other."""
    width = max(7.0, 0.75 * max(len(lens.prompt) for lens in lenses) + 2)
    heights = [0.3 * len(lens.labels) + 1.6 for lens in lenses]
    figure, axes = _column(width, heights)
    for ax, lens in zip(axes, lenses, strict=True):
        lens_heatmap(lens, lens.prompt, ax)
    figure.tight_layout()
    return figure


def attribution_bars(found: LogitAttribution, *, top: int = 20, ax: Axes | None = None) -> Figure:
    """Bars of the `top` largest contributions to the logit at the last position, the largest on top."""
    values = found.values[:, -1]
    order: list[int] = np.argsort(-np.abs(values), kind="stable")[:top][::-1].tolist()
    if ax is None:
        ax = pyplot().subplots(figsize=(7.0, 0.22 * len(order) + 1.2))[1]
    assert ax is not None
    colours = ["#2670d0" if values[at] >= 0 else "#d0761a" for at in order]
    ax.barh(range(len(order)), values[order], color=colours)
    ax.set_yticks(range(len(order)), [found.labels[at] for at in order], fontsize=8)
    ax.axvline(0, color="gray", linewidth=0.8)
    ax.set_title(f"{found.title}: {found.logits[-1]:.3g}".replace("$", r"\$"), fontsize=10)
    figure: Any = ax.figure
    return figure


def attribution_panels(results: Sequence[LogitAttribution], *, top: int = 20) -> Figure:
    """`attribution_bars` of several prompts, one above the other."""
    figure, axes = _column(7.0, [0.22 * min(top, len(found.labels)) + 1.2 for found in results])
    for ax, found in zip(axes, results, strict=True):
        attribution_bars(found, top=top, ax=ax)
    figure.tight_layout()
    return figure


def _column(width: float, heights: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    figure, axes = pyplot().subplots(
        len(heights), 1, figsize=(width, sum(heights)), height_ratios=heights, squeeze=False
    )
    return figure, axes[:, 0]


def overview(lens: LogitLens, tokens: Sequence[str]) -> Figure:
    """Logit lens above residual norms."""
    width, height = max(7.0, 0.75 * len(tokens) + 2), 0.3 * len(lens.labels) + 1.6
    figure, axes = pyplot().subplots(2, 1, figsize=(width, 2 * height))
    lens_heatmap(lens, tokens, axes[0])
    residual_norms(lens, tokens, axes[1])
    figure.tight_layout()
    return figure


def shown(token: str) -> str:
    """A token as a short label: spaces and newlines visible, long ones cut."""
    text = token.replace(" ", "\u00b7").replace("\n", "\\n")
    return text if len(text) <= 12 else text[:11] + "\u2026"


def _label(token: str) -> str:
    return shown(token).replace("$", r"\$")  # matplotlib reads mathematics between dollars


def _heat(
    values: NDArray[np.float32],
    layers: Sequence[str],
    tokens: Sequence[str],
    title: str,
    ax: Axes | None,
    words: list[list[str]] | None = None,
    color: str = "Blues",
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    if ax is None:
        size = (max(6.0, 0.75 * len(tokens) + 2), 0.3 * len(layers) + 1.5)
        ax = pyplot().subplots(figsize=size)[1]
    assert ax is not None
    image = ax.imshow(values, aspect="auto", cmap=color, origin="lower", vmin=limits[0], vmax=limits[1])
    ax.figure.colorbar(image, ax=ax, pad=0.01)
    ax.set_yticks(range(len(layers)), layers, fontsize=8)
    ax.set_ylabel("after block")
    _name_positions(ax, tokens, values.shape[1])
    ax.set_title(title, fontsize=10)
    if words is not None:
        _write(ax, words, values)
    figure: Any = ax.figure
    return figure


def _name_positions(ax: Axes, tokens: Sequence[str], n: int) -> None:
    labels = [_label(t) for t in tokens] if len(tokens) == n else [str(i) for i in range(n)]
    ax.set_xticks(range(n), labels, rotation=60, ha="right", fontsize=7)


def _write(ax: Axes, words: list[list[str]], values: NDArray[np.float32]) -> None:
    for y, row in enumerate(words):
        for x, word in enumerate(row):
            ax.text(x, y, word, ha="center", va="center", fontsize=6, color="white" if values[y, x] > 0.6 else "black")
