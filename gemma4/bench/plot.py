# SPDX-License-Identifier: Apache-2.0
"""The cost of a step by its rows as a picture, with the machine's limits. It needs matplotlib: the extra `plot`."""

# matplotlib leaves its **kwargs untyped:
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from gemma4 import checks
from gemma4.bench.cost import CostCurve, RowsBenchmark
from gemma4.html import Picture
from gemma4.html.markup import Markup, tag
from gemma4.interp.media_plots import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format: TypeAlias = Literal["png", "svg", "html"]
_LABELS = {"sequences": "one row of each of n sequences", "tokens": "n rows of one sequence"}
_STYLES = {"sequences": ("#1f5fbf", "o"), "tokens": ("#c05a00", "s")}
_ENDINGS = {".png": "image/png", ".svg": "image/svg+xml"}


def plot_rows(result: RowsBenchmark, ax: Axes | None = None) -> Figure:
    """Plot milliseconds of a step over its rows, a line for each curve (shaded: between the medians of the rounds), and
    the limits: the time to read the weights once (level, unless rows choose experts), and the time of the arithmetic at
    the machine's peak. No step can be below the higher of the two; that part is grey.

    ax: where to draw; None = a new figure. Raises ImportError without matplotlib.
    """
    if ax is None:
        ax = pyplot().subplots(figsize=(8.0, 5.0))[1]
    assert ax is not None
    for curve in result.curves:
        _draw(ax, curve)
    _draw_limits(ax, result)
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("rows in a step")
    ax.set_ylabel("ms a step")
    name = Path(result.model).name.replace("$", r"\$")  # matplotlib reads mathematics between dollars
    ax.set_title(f"{name}, after {result.prompt} tokens\n{result.how}", fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="upper left")
    figure: Any = ax.figure
    figure.tight_layout()
    return figure


def _draw(ax: Axes, curve: CostCurve) -> None:
    colour, marker = _STYLES[curve.kind]
    rows = [step.rows for step in curve.steps]
    low, high = ([1e3 * end(step.by_round) for step in curve.steps] for end in (min, max))
    ax.fill_between(rows, low, high, color=colour, alpha=0.15, linewidth=0)
    milliseconds = [1e3 * step.median_s for step in curve.steps]
    ax.plot(rows, milliseconds, color=colour, marker=marker, markersize=4, label=_LABELS[curve.kind])


def _draw_limits(ax: Axes, result: RowsBenchmark) -> None:
    curve, limits = result.curves[0], result.limits
    rows = [step.rows for step in curve.steps]
    weights = [1e3 * curve.weights_seconds(i, limits) for i in range(len(rows))]
    arithmetic = [1e3 * curve.arithmetic_seconds(i, limits) for i in range(len(rows))]
    floor = [max(pair) for pair in zip(weights, arithmetic, strict=True)]
    reading = f"weights read once at {limits.read_bytes / 1e9:.3g} GB/s"
    ax.plot(rows, weights, color="#444444", linestyle="--", linewidth=1.2, label=reading)
    ax.plot(rows, arithmetic, color="#444444", linestyle=":", linewidth=1.6, label="arithmetic at the measured peak")
    ax.fill_between(rows, floor, color="#888888", alpha=0.15, linewidth=0, label="beyond the limits")


def format_of(path: Path) -> Format:
    """The format that a file's name says. Raises ValueError for another ending than .png, .svg and .html."""
    ending = path.suffix.lower().removeprefix(".")
    for known in get_args(Format):
        if ending == known:
            return known
    raise ValueError(f"{path}: expected a name that ends in .png, .svg or .html")


def render_rows(result: RowsBenchmark, format: Format = "png") -> bytes:
    """The picture as a file. "html": a page with the picture, the table and the facts, which opens without a network.

    Raises ValueError (another format), ImportError without matplotlib.
    """
    checks.choice("format", format, get_args(Format))
    figure = plot_rows(result)
    image = io.BytesIO()
    kind = "svg" if format == "html" else format
    figure.savefig(image, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    pyplot().close(figure)
    return _page(result, image.getvalue()).encode() if format == "html" else image.getvalue()


def _page(result: RowsBenchmark, svg: bytes) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    picture = tag(
        "img",
        src=source,
        style="max-width: 100%",
        alt="Milliseconds of a step over its rows, with the machine's limits",
    )
    facts = "\n".join(f"{label}: {text}" for label, text in [*result.facts(), *result.findings()])
    return Picture("The cost of a step by its rows", picture, _table(result), tag("p", facts, class_="g4-text")).page()


def _table(result: RowsBenchmark) -> Markup:
    head = tag("tr", [tag("th", head, scope="col", class_="g4-num") for head in result.heads()])
    rows = [
        tag("tr", tag("th", row[0], scope="row"), [tag("td", cell, class_="g4-num") for cell in row[1:]])
        for row in result.cells()
    ]
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="g4-plain")
    return tag("div", table, class_="g4-scroll", tabindex=0)
