# SPDX-License-Identifier: Apache-2.0
"""The cost of a step by its rows: what was measured, what it says, and its table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from gemma4.bench.machine import machine_text
from gemma4.bench.phases import Speed
from gemma4.profile import Limits, OpTotal
from gemma4.units import size

if TYPE_CHECKING:  # rich is imported where a table is made
    from rich.table import Table

Rows: TypeAlias = Literal["sequences", "tokens"]
NOISE = 0.02  # a fall of tokens/s that is smaller does not count

# Operations that stream no weights: rows of tables, and keys and values.
_TABLES = ("embedding rows", "per-layer rows")
_ATTENTION = ("attention, local", "attention, global")
_EXPERTS = ("experts gate, up", "experts down")


@dataclass(frozen=True)
class StepCost(Speed):
    """A step of a number of rows. tokens: the rows · seconds: of every timed step, round after round, the same number
    in each of `rounds` · profile: of one more step."""

    rounds: int = 1

    @property
    def rows(self) -> int:
        """Rows of the step: positions that it computes, all with logits."""
        return self.tokens

    @property
    def median_s(self) -> float:
        """Seconds of a step, the median of all."""
        return median(self.seconds)

    @property
    def by_round(self) -> tuple[float, ...]:
        """Seconds of a step, the median of each round."""
        n = len(self.seconds) // self.rounds
        return tuple(median(self.seconds[i * n : (i + 1) * n]) for i in range(self.rounds))


class Fall(NamedTuple):
    """A step of `rows` rows makes `ratio` times the tokens/s of the best step with fewer rows, `of`."""

    rows: int
    of: int
    ratio: float


@dataclass(frozen=True)
class CostCurve:
    """The cost of a step by its rows.

    kind   "sequences": one row of each of n sequences, as they decode together; "tokens": n rows of one sequence, all
           with logits, as guessed tokens are verified
    steps  ascending by rows; the first has one row
    """

    kind: Rows
    steps: tuple[StepCost, ...]

    def over_one(self, i: int) -> float:
        """Tokens/s of step i over those of the step of one row."""
        return self.steps[i].rate / self.steps[0].rate

    def row_more(self, i: int) -> float | None:
        """The cost of each row that step i has more than the one before, as a share of a step of one row; None for the
        first."""
        if i == 0:
            return None
        step, before = self.steps[i], self.steps[i - 1]
        return (step.median_s - before.median_s) / (step.rows - before.rows) / self.steps[0].median_s

    def needed(self, i: int) -> list[OpTotal]:
        """The operations of step i without work that it did twice: weights count once, of experts those that a row has,
        and every row counts once (the head's last block of 32 rows overlaps the one before)."""
        once = {op.name: op for op in self.steps[0].profile.ops}
        step = self.steps[i]
        return [_once(op, once.get(op.name, op), step.rows) for op in step.profile.ops]

    def weights_seconds(self, i: int, limits: Limits) -> float:
        """The time to read the weights of step i at the machine's limit."""
        no_weights = (*_TABLES, *_ATTENTION)
        return sum(op.streamed for op in self.needed(i) if op.name not in no_weights) / limits.read_bytes

    def reading_seconds(self, i: int, limits: Limits) -> float:
        """The same with rows of tables, keys and values."""
        return sum(op.streamed for op in self.needed(i)) / limits.read_bytes

    def arithmetic_seconds(self, i: int, limits: Limits) -> float:
        """The time of the arithmetic of step i at the machine's peak of each type."""
        return sum(op.arithmetic_seconds(limits) for op in self.needed(i))

    def floor(self, i: int, limits: Limits) -> float:
        """The longer of the times of weights and arithmetic: step i cannot take less."""
        return max(self.weights_seconds(i, limits), self.arithmetic_seconds(i, limits))

    def falls(self) -> tuple[Fall, ...]:
        """Steps that make fewer tokens/s than the best one with fewer rows, by more than NOISE in every round."""
        best, found = self.steps[0], list[Fall]()
        for step in self.steps[1:]:
            scale = step.rows / best.rows
            ratios = [scale * less / more for less, more in zip(best.by_round, step.by_round, strict=True)]
            if max(ratios) < 1 - NOISE:
                found.append(Fall(step.rows, best.rows, median(ratios)))
            best = max(best, step, key=lambda one: one.rate)
        return tuple(found)


@dataclass(frozen=True)
class RowsBenchmark:
    """Everything that was measured of steps by their rows: `print()` it.

    load_s      seconds of `gemma4.load`
    prompt      tokens in each sequence before the steps
    curves      of sequences that decode together, and for `bench_curve` of tokens of one sequence
    limits      of this machine, with the same number of threads: the median of measurements after each round
    peak_bytes  peak resident memory of the process after every step has run once, mapped weights included
    kv_bytes    keys and values of all sequences; each has its own copy of the prompt's from its first token on
    inputs      the model's files
    """

    model: str
    how: str
    prompt: int
    load_s: float
    curves: tuple[CostCurve, ...]
    limits: Limits
    peak_bytes: int
    kv_bytes: int
    notes: tuple[str, ...] = field(default=())
    inputs: tuple[Path, ...] = ()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as text:
            console.print(self.table())
        return "\n".join([*_aligned(self.facts()), "", text.get().strip("\n"), *_aligned(self.findings())])

    def facts(self) -> list[tuple[str, str]]:
        """(label, text) of the model, the machine and the method."""
        most = max(step.rows for step in self.curves[0].steps)
        numbers = sorted({len(step.seconds) for curve in self.curves for step in curve.steps})
        number = " to ".join(str(n) for n in numbers[:1] + numbers[1:][-1:])
        rounds = self.curves[0].steps[0].rounds
        method = f"median of {number} steps in {rounds} rounds, in turns; no sampling"
        after = f"after a prompt of {self.prompt} tokens, computed once; every row gets its logits"
        return [
            ("model", self.model),
            ("arithmetic", self.how),
            ("machine", machine_text(self.limits)),
            ("load", f"{self.load_s:.2f} s"),
            ("measured", method),
            ("steps", after),
            ("peak memory", f"{size(self.peak_bytes)} resident, mapped weights included"),
            ("keys, values", f"{size(self.kv_bytes)} of {most} sequences, each with a copy of the prompt's"),
        ]

    def findings(self) -> list[tuple[str, str]]:
        """(label, text) of where tokens/s fall as rows are added, and the notes."""
        return [*(("tokens/s", _falls(curve)) for curve in self.curves), *(("note", note) for note in self.notes)]

    def heads(self) -> list[str]:
        """The columns of the table."""
        if len(self.curves) == 1:
            return ["sequences", "ms", "tokens/s", "of one", "a row more", "read bandwidth", "peak arithmetic"]
        ends = ["weights\nms", "arithmetic\nms"]
        names = [_NAMES[curve.kind] for curve in self.curves]
        return ["\nrows", *(head for name in names for head in (f"{name}\nms", "\na row more", "\nof limit")), *ends]

    def cells(self) -> list[list[str]]:
        """The rows of the table, without spaces around the texts."""
        if len(self.curves) == 1:
            return [_batch_cells(self.curves[0], i, self.limits) for i in range(len(self.curves[0].steps))]
        return [list(self._curve_cells(i)) for i in range(len(self.curves[0].steps))]

    def _curve_cells(self, i: int) -> Iterator[str]:
        first = self.curves[0]
        yield str(first.steps[i].rows)
        for curve in self.curves:
            seconds = curve.steps[i].median_s
            yield from (_ms(seconds), _row_more(curve, i), f"{curve.floor(i, self.limits) / seconds:.0%}")
        yield from (_ms(first.weights_seconds(i, self.limits)), _ms(first.arithmetic_seconds(i, self.limits)))

    def table(self) -> Table:
        """A row for each number of rows.

        Of one curve: milliseconds, tokens/s and these over those of one sequence, the cost of each more row as a share
        of a step of one row, and the shares reached of read bandwidth and peak arithmetic. Of two curves, for each:
        milliseconds, the cost of each more row, and the share reached of the nearer limit; then the limits, the time to
        read the weights once and the time of the arithmetic.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in self.heads():
            grid.add_column(head, justify="right", no_wrap=True)
        for row in self.cells():
            grid.add_row(*row)
        return grid

    def as_dict(self) -> dict[str, object]:
        """Plain numbers, for JSON."""
        record: dict[str, object] = {"model": self.model, "how": self.how, "prompt": self.prompt, "load_s": self.load_s}
        record |= {"peak_bytes": self.peak_bytes, "kv_bytes": self.kv_bytes, "limits": self.limits.__dict__}
        record["curves"] = {curve.kind: _curve_record(curve, self.limits) for curve in self.curves}
        return record | {"notes": list(self.notes)}


_NAMES: dict[Rows, str] = {"sequences": "n sequences", "tokens": "one sequence"}
_MOST_FALLS = 6  # in the text


def _once(op: OpTotal, first: OpTotal, rows: int) -> OpTotal:
    """An operation of a step of `rows` rows without what it did twice. first: the same of one row. Attention and
    experts do more for each row than one row alone does."""
    if op.name in _ATTENTION or op.name in _EXPERTS:
        return op
    done = op.work + op.int8_work + op.bf16_work
    part = min(1.0, rows * (first.work + first.int8_work + first.bf16_work) / done) if done else 1.0
    n_bytes = op.bytes if op.name in _TABLES else min(op.bytes, first.bytes)
    return op._replace(work=part * op.work, int8_work=part * op.int8_work, bf16_work=part * op.bf16_work, bytes=n_bytes)


def _aligned(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    return (f"{label:<12} {text}" for label, text in facts)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def _row_more(curve: CostCurve, i: int) -> str:
    more = curve.row_more(i)
    return "" if more is None else f"{more:.2f}"


def _batch_cells(curve: CostCurve, i: int, limits: Limits) -> list[str]:
    step = curve.steps[i]
    reading, arithmetic = (
        seconds / step.median_s for seconds in (curve.reading_seconds(i, limits), curve.arithmetic_seconds(i, limits))
    )
    speed = [f"{step.rate:.4g}", f"{curve.over_one(i):.2f} x", _row_more(curve, i)]
    return [str(step.rows), _ms(step.median_s), *speed, f"{reading:.0%}", f"{arithmetic:.0%}"]


def _falls(curve: CostCurve) -> str:
    what = "sequences" if curve.kind == "sequences" else "tokens of one sequence"
    falls = [f"{fall.ratio:.2f} x from {fall.of} to {fall.rows}" for fall in curve.falls()]
    if not falls:
        return f"never fall as the number of {what} grows (by more than {NOISE:.0%} in every round)"
    more = f", and {len(falls) - _MOST_FALLS} more" if len(falls) > _MOST_FALLS else ""
    return f"FALL as the number of {what} grows: {', '.join(falls[:_MOST_FALLS])}{more}"


def _curve_record(curve: CostCurve, limits: Limits) -> dict[str, object]:
    steps = [
        {
            "rows": step.rows,
            "ms": 1e3 * step.median_s,
            "seconds": list(step.seconds),
            "rounds": step.rounds,
            "tokens_per_s": step.rate,
            "over_one": curve.over_one(i),
            "row_more": curve.row_more(i),
            "share_of_arithmetic": curve.arithmetic_seconds(i, limits) / step.median_s,
            "share_of_bandwidth": curve.reading_seconds(i, limits) / step.median_s,
            "weights_ms": 1e3 * curve.weights_seconds(i, limits),
            "arithmetic_ms": 1e3 * curve.arithmetic_seconds(i, limits),
            "ops": [op._asdict() for op in step.profile.ops],
        }
        for i, step in enumerate(curve.steps)
    ]
    return {"steps": steps, "falls": [fall._asdict() for fall in curve.falls()]}
