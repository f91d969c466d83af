# SPDX-License-Identifier: Apache-2.0
"""Measure steps by their rows: `gemma4 bench MODEL --batch 1,2,4,8,16` and `--curve`.

All numbers of rows take turns, round after round, so that a change of the machine meets all of them alike. Every other
round runs them in descending order. The two ways to run a number of rows are next to each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from statistics import median
from typing import TypeAlias, TypedDict, Unpack

from gemma4 import checks
from gemma4.bench.cost import CostCurve, Rows, RowsBenchmark, StepCost
from gemma4.bench.machine import how_text, measure_limits, opened, random_ids, timed
from gemma4.info import peak_bytes
from gemma4.memory import available_bytes
from gemma4.model import Model, Precision
from gemma4.narrow import is_sequence
from gemma4.profile import Limits, Profile
from gemma4.sequence import KVDtype
from gemma4.units import size

BATCH = (1, 2, 4, 8, 16)
# Every number up to 10, then the multiples at which kernels work, and one more than some of them.
CURVE_ROWS = (*range(1, 11), 12, 16, 17, 20, 24, 28, 32, 33, 40, 48, 56, 64)
MAX_ROWS = 1024
Point: TypeAlias = tuple[Rows, int]
_BATCH_STEPS, _CURVE_STEPS = 4, 2  # timed in each round, at least
_MAX_STEPS, _ROUND_SECONDS = 16, 0.05  # more of short ones, for about this long


class RowsOptions(TypedDict, total=False):
    """Options of `bench_batch` and `bench_curve`.

    mmproj, threads, precision, kv_dtype  as for `gemma4.load`
    prompt    tokens in each sequence before the steps [512]; fewer, with a note, where the context is too small
    repeats   rounds [5]
    progress  called with (round, rounds) before each
    """

    mmproj: str | os.PathLike[str] | None
    threads: int
    precision: Precision | None
    kv_dtype: KVDtype | None
    prompt: int
    repeats: int
    progress: Callable[[int, int], None]


def bench_batch(
    name_or_path: str | os.PathLike[str], batch: Sequence[int] = BATCH, **options: Unpack[RowsOptions]
) -> RowsBenchmark:
    """Load a model and measure how fast sequences decode together: one row of each in a step, for each number in
    `batch` (1 is always measured, too). The prompt is computed once, and all sequences are forks of it.

    batch: numbers of sequences, 1..MAX_ROWS, in any order. options: see `RowsOptions`.
    Raises ValueError (a number outside that, rows that the context has no room for), MemoryError (keys and values that
    the system has no memory for), and what `gemma4.load` raises.
    """
    return _bench(name_or_path, {"sequences": _ascending("batch", batch)}, _BATCH_STEPS, options)


def bench_curve(
    name_or_path: str | os.PathLike[str], rows: Sequence[int] = CURVE_ROWS, **options: Unpack[RowsOptions]
) -> RowsBenchmark:
    """Load a model and measure a step of n rows for each n in `rows` (1 is always measured, too), in two ways: one row
    of each of n sequences, as in decoding; and n rows of one sequence, all with logits, as in verifying guessed tokens.

    rows: numbers of rows, 1..MAX_ROWS, in any order. options: see `RowsOptions`.
    Raises as `bench_batch`.
    """
    counts = _ascending("rows", rows)
    return _bench(name_or_path, {"sequences": counts, "tokens": counts}, _CURVE_STEPS, options)


def _ascending(name: str, counts: Sequence[int]) -> list[int]:
    if not is_sequence(counts) or isinstance(counts, str) or not counts:
        checks.fail(name, counts, f"a list of numbers of rows, 1..{MAX_ROWS}")
    return sorted({1, *(checks.integer(f"each of {name}", n, 1, MAX_ROWS) for n in counts)})


def _bench(
    name_or_path: str | os.PathLike[str], counts: Mapping[Rows, list[int]], min_steps: int, options: RowsOptions
) -> RowsBenchmark:
    prompt = checks.integer("prompt", options.get("prompt", 512), 1, 1 << 31)
    rounds = checks.integer("repeats", options.get("repeats", 5), 1, 1 << 31)
    model, load_s = opened(
        name_or_path,
        mmproj=options.get("mmproj"),
        threads=options.get("threads", 0),
        precision=options.get("precision"),
        kv_dtype=options.get("kv_dtype"),
    )
    with model:
        room, notes = _room(model, counts), list[str]()
        if prompt > room:
            notes.append(f"the prompt is {room} tokens, not {prompt}: the context is {model.context_length} positions")
            prompt = room
        steps = _Steps(model, prompt, counts["sequences"][-1], _new_positions(counts))
        points: list[Point] = [(kind, n) for n in counts["sequences"] for kind in counts]
        n_steps = {point: _steps_of(steps.seconds(*point, 1)[0], min_steps) for point in points}
        sizes = (peak_bytes(), steps.kv_bytes)  # before measure_limits, whose array would count
        seconds, limits = _take_turns(model, steps, n_steps, rounds, options.get("progress"))
        curves = tuple(
            CostCurve(kind, tuple(StepCost(n, tuple(seconds[kind, n]), steps.profile(kind, n), rounds) for n in ns))
            for kind, ns in counts.items()
        )
        path, inputs = str(model.checkpoint.path), model.checkpoint.inputs
        return RowsBenchmark(path, how_text(model), prompt, load_s, curves, limits, *sizes, tuple(notes), inputs)


def _take_turns(
    model: Model, steps: _Steps, n_steps: Mapping[Point, int], rounds: int, progress: Callable[[int, int], None] | None
) -> tuple[dict[Point, list[float]], Limits]:
    """Seconds of each step, round after round, and the machine's limits, measured after each round. n_steps: in one."""
    seconds: dict[Point, list[float]] = {point: [] for point in n_steps}
    limits: list[Limits] = []
    for i in range(rounds):
        if progress is not None:
            progress(i + 1, rounds)
        for point in reversed(list(n_steps)) if i % 2 else n_steps:
            seconds[point] += steps.seconds(*point, n_steps[point])
        limits.append(measure_limits(model.engine.threads))
    return seconds, _middle(limits)


def _steps_of(seconds: float, least: int) -> int:
    """Steps to be timed in each round, from the time of one."""
    return max(least, min(_MAX_STEPS, int(_ROUND_SECONDS / seconds)))


def _new_positions(counts: Mapping[Rows, list[int]]) -> int:
    """The most positions that a sequence gets after the prompt: by decoding, or in one step."""
    return max(1 + _MAX_STEPS, *(ns[-1] for kind, ns in counts.items() if kind == "tokens"), 0)


def _room(model: Model, counts: Mapping[Rows, list[int]]) -> int:
    """Positions left for the prompt. Raises ValueError if there are none."""
    new = _new_positions(counts)
    if new >= model.context_length:
        raise ValueError(f"{new} rows after a prompt: the model's context is {model.context_length} positions")
    return model.context_length - new


def _middle(limits: Sequence[Limits]) -> Limits:
    return Limits(*(median(getattr(one, item.name) for one in limits) for item in fields(Limits)))


class _Steps:
    """Sequences that continue the same prompt, and the steps that run them.

    Each row has a random token of its own: rows with equal tokens would choose the same experts.
    """

    def __init__(self, model: Model, n_prompt: int, n_sequences: int, n_new: int) -> None:
        self._model = model
        self._prompt = random_ids(model, n_prompt)
        self._ids = random_ids(model, n_prompt + MAX_ROWS)[n_prompt:]
        first = model.new_sequence(capacity=n_prompt + n_new)
        model.forward(self._prompt, sequence=first, logits=None)
        _check_memory(model, n_sequences, n_prompt, first.nbytes)
        self._sequences = [first, *(first.fork() for _ in range(n_sequences - 1))]

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences, once each has a token of its own."""
        return sum(sequence.nbytes for sequence in self._sequences)

    def seconds(self, kind: Rows, n: int, n_steps: int) -> list[float]:
        """Seconds of `n_steps` steps of n rows, after one that is not timed."""
        return [timed(run) for run in self._ready(kind, n, 1 + n_steps)][1:]

    def profile(self, kind: Rows, n: int) -> Profile:
        """The profile of one step of n rows, after one that is not in it."""
        steps = self._ready(kind, n, 2)
        next(steps)()
        run = next(steps)
        with self._model.profile() as profile:
            run()
        return profile

    def _ready(self, kind: Rows, n: int, n_steps: int) -> Iterator[Callable[[], object]]:
        """Steps, each to be run before the next is taken. Decoding goes on from step to step; tokens of one sequence
        are taken back, as rejected guesses are."""
        for i in range(n_steps):
            if i == 0 or kind == "tokens":
                self._rewind(n if kind == "sequences" else 1)
            yield (lambda: self._decode(n)) if kind == "sequences" else (lambda: self._verify(n))

    def _decode(self, n: int) -> object:
        ids = [self._ids[row : row + 1] for row in range(n)]
        return self._model.forward(ids, sequence=self._sequences[:n], logits="last")

    def _verify(self, n: int) -> object:
        return self._model.forward(self._ids[:n], sequence=self._sequences[0], logits="all")

    def _rewind(self, n: int) -> None:
        """Bring the first n sequences back to the prompt's end; where sliding layers have evicted it, run it again."""
        for sequence in self._sequences[:n]:
            sequence.rewind(len(self._prompt))
            if not sequence.length:
                self._model.forward(self._prompt, sequence=sequence, logits=None)


def _check_memory(model: Model, n_sequences: int, n_prompt: int, kv_bytes: int) -> None:
    """Raise MemoryError unless there is room for the keys and values of the other sequences, and for all logits."""
    need, free = (n_sequences - 1) * kv_bytes + n_sequences * model.d_vocab * 4, available_bytes()
    if free is not None and need > free:
        raise MemoryError(
            f"{n_sequences} sequences of {n_prompt} tokens need {size(need)} more for keys, values and logits, and "
            f"{size(free)} are free: take fewer, or a shorter prompt"
        )
