# SPDX-License-Identifier: Apache-2.0
"""The result of quantising a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gemma4.units import size

if TYPE_CHECKING:  # rich is imported where a table is made
    from rich.table import Table


class WrittenTensor(NamedTuple):
    """A tensor of the file: `square_error` and `square_sum` are sums over its `n_values` in the source's units."""

    name: str
    dtype: str
    n_values: int
    nbytes: int
    square_error: float
    square_sum: float

    @property
    def rmse(self) -> float:
        """Root mean square of the written minus the source values."""
        return math.sqrt(self.square_error / self.n_values)


class TypeSummary(NamedTuple):
    """All tensors of one type together. `relative_error`: RMSE over the root mean square of the values."""

    dtype: str
    n_tensors: int
    n_values: int
    nbytes: int
    rmse: float
    relative_error: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.n_values


@dataclass(frozen=True)
class QuantizationResult:
    """A file that was written: `print()` it.

    path, nbytes   the file and its size
    tensors        every tensor in it, in order
    notes          a line for each type that fell back to another because of a row's width
    """

    path: Path
    nbytes: int
    tensors: tuple[WrittenTensor, ...]
    notes: tuple[str, ...]

    def by_type(self) -> list[TypeSummary]:
        """The types in the file, the largest first."""
        types: dict[str, list[WrittenTensor]] = {}
        for tensor in self.tensors:
            types.setdefault(tensor.dtype, []).append(tensor)
        return sorted((_summary(*item) for item in types.items()), key=lambda row: -row.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(t.nbytes for t in self.tensors) / sum(t.n_values for t in self.tensors)

    def table(self) -> Table:
        """For a `rich` console: per type, tensors, bytes, bits per weight, errors."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(header_style="bold", box=SIMPLE_HEAD)
        for i, title in enumerate(_TITLES):
            table.add_column(title, justify="right" if i else "left", no_wrap=True)
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [
            (t.dtype, f"{t.n_tensors}", size(t.nbytes), f"{t.bits_per_weight:.2f}", f"{t.rmse:.3g}",
             f"{100 * t.relative_error:.2f} %")
            for t in self.by_type()
        ]  # fmt: skip
        return [*rows, ("file", f"{len(self.tensors)}", size(self.nbytes), f"{self.bits_per_weight:.2f}", "", "")]

    def __str__(self) -> str:
        rows = [_TITLES, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([str(self.path), *lines, *self.notes])

    __repr__ = __str__


_TITLES = ("type", "tensors", "size", "bits per weight", "RMSE", "RMSE / RMS")


def _summary(dtype: str, tensors: Iterable[WrittenTensor]) -> TypeSummary:
    tensors = list(tensors)
    n_values, nbytes = sum(t.n_values for t in tensors), sum(t.nbytes for t in tensors)
    error, square = sum(t.square_error for t in tensors), sum(t.square_sum for t in tensors)
    relative = math.sqrt(error / square) if square else 0.0
    return TypeSummary(dtype, len(tensors), n_values, nbytes, math.sqrt(error / n_values), relative)
