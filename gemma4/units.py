# SPDX-License-Identifier: Apache-2.0
"""Numbers in readable units."""

from __future__ import annotations


def count(number: int) -> str:
    """1234567 -> "1.23 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)


def size(n_bytes: int) -> str:
    """Bytes in a readable unit: 1536 -> "1.5 KiB"."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
