# SPDX-License-Identifier: Apache-2.0
"""Time of a forward pass, operation by operation.

    with model.profile() as profile:
        model.forward(ids)
    print(profile)

The engine records the time, the arithmetic and the bytes of every operation it runs for this model while the block is
open. The rest of a step (bookkeeping, storing keys and values, captures and hooks) is the row "other", so the seconds
add up to those spent in the engine. Images and sound encoded meanwhile have their own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine

if TYPE_CHECKING:  # rich is imported where a table is made
    from rich.table import Table

F64: TypeAlias = NDArray[np.float64]

# Operations on rows of activations, which seldom leave the caches: their bytes do not count as memory traffic.
ROW_OPS = frozenset(
    {"rope table", "norm", "rope", "add", "gelu", "glu", "multiply", "clamp", "router softmax", "scale", "softcap"}
)
Part: TypeAlias = Literal["text", "vision", "audio"]


@dataclass(frozen=True)
class Limits:
    """Upper limits of a machine for some number of threads.

    read_bytes       bytes per second from memory
    f32_work         float32 operations per second; a multiply-add counts as two
    int8_work        the same for 4-bit or 8-bit weights times bytes: the text model's, with precision="fast"
    int16_work       the same for 16-bit products: the encoders'
    bf16_work        the same for bfloat16 products, 0 if the processor has no instructions for them
    """

    read_bytes: float
    f32_work: float
    int8_work: float
    int16_work: float
    bf16_work: float = 0.0


class OpTotal(NamedTuple):
    """All calls of one operation.

    work, int8_work, bf16_work: arithmetic in float32, in integers (precision="fast": bytes with quantised weights,
    16 bits in encoders), and in bfloat16; a multiply-add counts as two. bytes: weights, cached keys and
    values, and rows of activations, each once per call. part: the part of the model that ran it, text or an encoder.
    """

    name: str
    calls: int
    seconds: float
    work: float
    int8_work: float
    bf16_work: float
    bytes: float
    part: Part = "text"

    @property
    def streamed(self) -> float:
        """Bytes of weights, table rows, keys and values: traffic from memory, not from a cache."""
        return 0.0 if self.name in ROW_OPS else self.bytes

    def least_seconds(self, limits: Limits) -> float:
        """The time at the machine's limit of arithmetic or of reading, whichever is longer."""
        return max(self.arithmetic_seconds(limits), self.streamed / limits.read_bytes)

    def arithmetic_seconds(self, limits: Limits) -> float:
        """The time its arithmetic would take at the machine's limits."""
        whole = limits.int8_work if self.part == "text" else limits.int16_work
        bf16 = self.bf16_work / limits.bf16_work if self.bf16_work else 0.0
        return self.work / limits.f32_work + self.int8_work / whole + bf16


class Profile:
    """Totals for each operation; `print()` it, or take `ops`. One step at a time may add to it."""

    def __init__(self) -> None:
        self.arrays: dict[Part, F64] = {part: np.zeros((len(_engine.profile_ops()), 6)) for part in get_args(Part)}

    @property
    def parts(self) -> list[Part]:
        """The parts that ran."""
        return [part for part, array in self.arrays.items() if array[:, 0].any()]

    @property
    def ops(self) -> list[OpTotal]:
        """Every operation that ran: the text model's, then the encoders', each in the order of a forward pass with
        "other" last."""
        return [op for part in self.arrays for op in self.ops_of(part)]

    def ops_of(self, part: Part) -> list[OpTotal]:
        """The operations of the text model ("text"), or of an encoder."""
        totals = [
            OpTotal(name, int(row[0]), *(float(x) for x in row[1:]), part=part)
            for name, row in zip(_engine.profile_ops(), self.arrays[part], strict=True)
            if row[0]
        ]
        return sorted(totals, key=lambda op: op.name == "other")

    @property
    def total(self) -> OpTotal:
        """All operations together; `calls` is the number of engine steps, `bytes` those from memory only."""
        return _sum(self.ops)

    def table(self, limits: Limits | None = None, title: str | None = None) -> Table:
        """A row for each operation: calls and milliseconds per step, share of the time, giga-operations and gigabytes
        per second and, given the machine's limits, the share reached of the tighter limit."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        heads = ["", "calls", "ms", "share", "Gop/s", "GB/s", *(["of limit"] if limits else [])]
        grid = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
        for i, head in enumerate(heads):
            grid.add_column(head, justify="right" if i else "left", no_wrap=True)
        for part in self.parts:
            ops = self.ops_of(part)
            total = _sum(ops, part)
            for op in ops:
                grid.add_row(*_cells(op, total, limits))
            grid.add_section()
            grid.add_row(*_cells(total, total, limits))
            grid.add_section()
        return grid

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as text:
            console.print(self.table())
        return text.get().strip("\n")


def _sum(ops: list[OpTotal], part: Part = "text") -> OpTotal:
    steps = sum(op.calls for op in ops if op.name == "other")
    seconds, work, int8_work, bf16_work = (
        sum(op.seconds for op in ops),
        sum(op.work for op in ops),
        sum(op.int8_work for op in ops),
        sum(op.bf16_work for op in ops),
    )
    return OpTotal("all", steps, seconds, work, int8_work, bf16_work, sum(op.streamed for op in ops), part)


def _cells(op: OpTotal, total: OpTotal, limits: Limits | None) -> list[str]:
    steps, seconds = max(total.calls, 1), max(op.seconds, 1e-12)
    cells = [
        op.name if op.part == "text" else f"{op.part}: {op.name}",
        f"{op.calls / steps:.4g}",
        f"{1e3 * op.seconds / steps:.3f}",
        f"{op.seconds / max(total.seconds, 1e-12):.1%}",
        _rate(op.work + op.int8_work + op.bf16_work, seconds),
        _rate(op.bytes, seconds),
    ]
    if limits:
        least = op.least_seconds(limits)
        cells.append(f"{least / seconds:.0%}" if least else "")
    return cells


def _rate(amount: float, seconds: float) -> str:
    return f"{amount / seconds / 1e9:.1f}" if amount else ""


# (model, profile) pairs that enclose the current call; context-local, as hooks are
_ACTIVE: ContextVar[tuple[tuple[Any, Profile], ...]] = ContextVar("gemma4_active_profiles", default=())


@contextmanager
def profiling(model: object) -> Iterator[Profile]:
    """While this is open, every step of this model (in this thread or task) adds to the profile it gives."""
    profile = Profile()
    token = _ACTIVE.set((*_ACTIVE.get(), (model, profile)))
    try:
        yield profile
    finally:
        _ACTIVE.reset(token)


@contextmanager
def step_array(model: object, part: Part = "text") -> Iterator[F64 | None]:
    """The array to which the engine's step adds its times; None without an open block. Nested blocks all get them."""
    profiles = [profile for owner, profile in _ACTIVE.get() if owner is model]
    if not profiles:
        yield None
        return
    array = np.zeros_like(profiles[0].arrays[part])
    try:
        yield array
    finally:
        for profile in profiles:
            profile.arrays[part] += array
