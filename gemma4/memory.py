# SPDX-License-Identifier: Apache-2.0
"""Memory that libraries take, and without which they end the process."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

_BLAS_BUFFERS = 64 << 20  # bytes; 32 MiB were measured


def need_memory(n_bytes: int, what: str) -> None:
    """Raise MemoryError unless the process may have that much more."""
    n_bytes += 1 << 20
    try:
        mmap.mmap(-1, n_bytes).close()
    except (OSError, OverflowError, ValueError):
        raise MemoryError(f"{what} needs up to {n_bytes:,} bytes, which this process cannot have") from None


@lru_cache(maxsize=1)
def ready_blas() -> None:
    """Let NumPy's BLAS take its buffers, which the first matmul of a process does. Raises MemoryError."""
    need_memory(_BLAS_BUFFERS, "NumPy's matmul")
    np.matmul(np.ones((2, 2)), np.ones((2, 2)))


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that processes can still take without swapping, also within this one's cgroup (version 2); None where the
    system does not say. root: where proc and sys are.
    """
    free = _field(root / "proc/meminfo", "MemAvailable:")
    return None if free is None else max(0, min(1024 * free, *_left_in_cgroups(root)))


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that the limits of the process's cgroup and of those around it leave; the cache of files can be dropped."""
    group = root / "sys/fs/cgroup" / _text(root / "proc/self/cgroup").rpartition("0::/")[2].strip()
    while (group / "memory.current").is_file():
        most, used = _text(group / "memory.max"), _text(group / "memory.current")
        if most.strip().isdigit():
            yield int(most) - int(used) + (_field(group / "memory.stat", "file") or 0)
        group = group.parent
    yield 1 << 62


def _field(path: Path, name: str) -> int | None:
    """The number after a name at the start of a line; None if there is none."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
