# SPDX-License-Identifier: Apache-2.0
"""From samples to medians, ratios, the table, the list of goals and the plot.

python benchmarks/report.py RESULT.json        the tables of an earlier run, in Markdown
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from cost import Cost
from peers import Round

OURS = "gemma4"
WIDE = 3  # engines whose columns fit in a terminal side by side
YARDSTICKS = "yardsticks"
# metric -> title, unit, divisor, is more better?
METRICS: dict[str, tuple[str, str, float, bool]] = {
    "prefill_tps": ("prefill", "tokens/s", 1, True),
    "decode_tps": ("decode", "tokens/s", 1, True),
    "deep_decode_tps": ("decode, long context", "tokens/s", 1, True),
    "batch_decode_tps": ("decode, sequences together", "tokens/s", 1, True),
    "load_s": ("load", "s", 1, False),
    "peak_rss": ("peak RSS", "GB", 1e9, False),
    "capture_s": ("capture", "s", 1, False),
    "capture_rss": ("peak RSS with the capture", "GB", 1e9, False),
}
Summary = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Goals:
    """How many times llama.cpp's rate, and which share of the read bandwidth in decoding."""

    prefill: float
    decode: float
    bandwidth: float


# by the type of most weights; mixtures of experts have their own
GOALS = {
    "Q4_0": Goals(5, 1.4, 0.85),
    "Q8_0": Goals(5, 1.2, 0.90),
    "BF16": Goals(5, 1.2, 0.90),
    "Q4_K": Goals(5, 1.3, 0.80),
}
EXPERT_GOALS = Goals(1.5, 1.3, 0.75)
OWN_GOALS = {"capture_cost": ("capture of all layers over that of the last", 0.03), "idle_cpu": ("idle CPU", 0.01)}
# against either, whatever the type
OTHER_GOALS = (
    ("ik_llama.cpp", "prefill_tps", 2.5),
    ("ik_llama.cpp", "decode_tps", 1.15),
    ("llama.cpp", "deep_decode_tps", 2),
    ("llama.cpp", "batch_decode_tps", 1.5),
    ("transformers", "capture_s", 10),
    ("LiteRT-LM", "prefill_tps", 1.25),
)
Row = tuple[str, str, str, bool]


def summarize(rounds: dict[str, list[Round]]) -> Summary:
    """engine -> metric -> median, min, max over all samples, and ratio: how many times better we are than it.

    The ratio is the median over rounds of (our median of that round : its median of that round), so that a machine that
    slows down in between disturbs both sides.
    """
    summary: Summary = {}
    for engine, engine_rounds in rounds.items():
        if engine == YARDSTICKS:
            continue
        summary[engine] = {}
        for metric in (*METRICS, *OWN_GOALS):
            samples = [x for one in engine_rounds for x in one.get(metric, [])]
            if samples:
                row = {"median": median(samples), "min": min(samples), "max": max(samples)}
                if (
                    engine != OURS
                    and metric in METRICS
                    and (ratio := _ratio(rounds.get(OURS, []), engine_rounds, metric))
                ):
                    row["ratio"] = ratio
                summary[engine][metric] = row
    return summary


def _ratio(ours: list[Round], theirs: list[Round], metric: str) -> float | None:
    pairs = [(a[metric], b[metric]) for a, b in zip(ours, theirs, strict=False) if a.get(metric) and b.get(metric)]
    quotients = [median(a) / median(b) for a, b in pairs]
    if not quotients:
        return None
    return median(quotients) if METRICS[metric][3] else 1 / median(quotients)


def shares(rounds: dict[str, list[Round]], cost: Cost, precision: str) -> dict[str, float]:
    """Our decode as a share of the read bandwidth, our prefill as a share of the peak arithmetic, both measured in the
    same round; the median over rounds. Each part of a prompt counts at the rate of the arithmetic it is done in, the
    fastest there is for it: float32 (our loop's or sgemm's) or, in `fast`, bfloat16, and bytes for quantised
    weights."""
    fast = precision == "fast"
    int8 = cost.prefill_int8 if fast else 0
    decode, prefill = [], []
    for ours, machine in zip(rounds[OURS], rounds[YARDSTICKS], strict=True):
        decode.append(median(ours["decode_tps"]) * cost.bytes_per_token / machine["read_bytes_per_s"][0])
        f32 = max(machine["f32_ops_per_s"][0], machine.get("flops", [0.0])[0])
        bf16 = machine.get("bf16_ops_per_s", [0.0])[0] if fast else 0.0
        least = (cost.prefill_flops - int8) / max(f32, bf16) + int8 / max(machine["int8_ops_per_s"][0], bf16)
        prefill.append(median(ours["prefill_tps"]) / cost.context * least)
    return {"decode_of_bandwidth": median(decode), "prefill_of_arithmetic": median(prefill)}


def goals(summary: Summary, cost: Cost, shared: dict[str, float]) -> list[Row]:
    """(what, goal, measured, reached) for each goal that was measured."""
    return [*_own_goals(summary[OURS], cost), *_share_goals(cost, shared), *_ratio_goals(summary, cost)]


def _goals_of(cost: Cost) -> Goals | None:
    return EXPERT_GOALS if cost.has_experts else GOALS.get(cost.kind)


def _share_goals(cost: Cost, shared: dict[str, float]) -> list[Row]:
    wanted = _goals_of(cost)
    limits = {
        "decode_of_bandwidth": ("decode, share of read bandwidth", wanted.bandwidth if wanted else None),
        "prefill_of_arithmetic": ("prefill, share of peak arithmetic", 0.75),
    }
    return [
        (what, f">= {limit:.0%}", f"{shared[name]:.0%}", shared[name] >= limit)
        for name, (what, limit) in limits.items()
        if limit and name in shared
    ]


def _ratio_goals(summary: Summary, cost: Cost) -> list[Row]:
    wanted = _goals_of(cost)
    own = (("llama.cpp", "prefill_tps", wanted.prefill), ("llama.cpp", "decode_tps", wanted.decode)) if wanted else ()
    rows = []
    for engine, metric, factor in (*own, *OTHER_GOALS):
        if ratio := summary.get(engine, {}).get(metric, {}).get("ratio"):
            what = f"{METRICS[metric][0]} against {engine}"
            rows.append((what, f">= {factor:g}x", f"{ratio:.2f}x", ratio >= factor))
    return rows


def _own_goals(ours: dict[str, dict[str, float]], cost: Cost) -> list[Row]:
    limit = cost.bytes_resident + cost.kv_bytes + 300e6
    rows = [
        ("load, file in page cache", "< 1 s", f"{ours['load_s']['median']:.2f} s", ours["load_s"]["median"] < 1),
        (
            "peak RSS: weights touched + KV + 300 MB",
            f"<= {limit / 1e9:.2f} GB",
            f"{ours['peak_rss']['median'] / 1e9:.2f} GB",
            ours["peak_rss"]["median"] <= limit,
        ),
    ]
    for metric, (what, most) in OWN_GOALS.items():
        if metric in ours:
            value = ours[metric]["median"]
            rows.append((what, f"<= {most:.0%}", f"{value:.1%}", value <= most))
    return rows


def _cell(row: dict[str, float] | None, metric: str) -> str:
    if not row:
        return "-"
    scale = METRICS[metric][2]
    middle, low, high = (row[key] / scale for key in ("median", "min", "max"))
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a column for each engine, and one with our ratio to each peer."""
    heads = ["", *(name for engine in summary for name in ([engine] if engine == OURS else [engine, "ratio"]))]
    rows = []
    for metric, (title, unit, _, _) in METRICS.items():
        if not any(metric in metrics for metrics in summary.values()):
            continue
        row = [f"{title}, {unit}"]
        for engine, metrics in summary.items():
            row.append(_cell(metrics.get(metric), metric))
            if engine != OURS:
                ratio = metrics.get(metric, {}).get("ratio")
                row.append(f"{ratio:.2f}x" if ratio else "-")
        rows.append(row)
    return heads, rows


def long_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """The same as `table` with a row for each engine of each metric, for more engines than a terminal has room for."""
    rows = []
    for metric, (title, unit, _, _) in METRICS.items():
        named = f"{title}, {unit}"
        for engine, metrics in summary.items():
            if metric in metrics:
                ratio = metrics[metric].get("ratio")
                rows.append([named, engine, _cell(metrics[metric], metric), f"{ratio:.2f}x" if ratio else ""])
                named = ""  # once for all its engines
    return ["", "engine", "median (min-max)", "ratio"], rows


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def show(result: dict[str, Any], cost: Cost) -> None:
    """Print the table, the goals and the shares to the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None)
    heads, rows = (table if len(result["summary"]) <= WIDE else long_table)(result["summary"])
    for title, columns, lines in (
        (f"{result['model']['name']}, {result['settings']['threads']} threads: median (min-max)", heads, rows),
        (
            "goals",
            ["", "goal", "measured", "reached"],
            [[*row[:3], "yes" if row[3] else "NO"] for row in goals(result["summary"], cost, result["shares"])],
        ),
    ):
        grid = Table(*columns, title=title)
        for line in lines:
            grid.add_row(*line)
        console.print(grid)
    for name, value in result["shares"].items():
        console.print(f"{name.replace('_', ' ')}: {value:.0%}")


def plot(summary: Summary, path: Path) -> None:
    """One small bar chart for each metric, engines side by side, whiskers from the worst to the best sample."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = [metric for metric in METRICS if metric in summary[OURS]]
    figure, axes = plt.subplots(1, len(metrics), figsize=(2.6 * len(metrics), 3.2), layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
        title, unit, scale, more = METRICS[metric]
        rows = {engine: m[metric] for engine, m in summary.items() if metric in m}
        middle = [row["median"] / scale for row in rows.values()]
        spread = [
            [row["median"] / scale - row["min"] / scale for row in rows.values()],
            [row["max"] / scale - row["median"] / scale for row in rows.values()],
        ]
        colors = ["#1a73e8" if engine == OURS else "#9aa0a6" for engine in rows]
        bars = axis.bar(list(rows), middle, yerr=spread, color=colors, capsize=3)
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.margins(y=0.15)
        axis.set_title(f"{title}, {unit}\n({'more' if more else 'less'} is better)", fontsize=10)
        axis.tick_params(axis="x", rotation=30)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def heading(record: dict[str, Any]) -> str:
    """One line on the machine, the commit and the date of a result file; files of earlier versions say less."""
    level, date, commit = (record.get(key) or "not recorded" for key in ("level", "date", "commit"))
    return f"{record['cpu']}, {record['cores']} cores, level {level}; commit {commit}; {date}"


def main() -> None:
    result = json.loads(Path(sys.argv[1]).read_text())
    print(f"{heading(result['machine'])}\n")
    known = {field.name for field in fields(Cost)}  # files of earlier versions have fewer
    cost = Cost(**{name: value for name, value in result["model"].items() if name in known})
    print(markdown(*table(result["summary"])))
    print()
    rows = [
        [what, goal, value, "yes" if reached else "**no**"]
        for what, goal, value, reached in goals(result["summary"], cost, result["shares"])
    ]
    print(markdown(["", "goal", "measured", "reached"], rows))
    print()
    for name, value in result["shares"].items():
        print(f"{name.replace('_', ' ')}: {value:.0%}")


if __name__ == "__main__":
    main()
