# SPDX-License-Identifier: Apache-2.0
"""Memory that libraries take, and without which they end the process."""

from __future__ import annotations

import mmap
from functools import lru_cache

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
