# SPDX-License-Identifier: Apache-2.0
"""Small pictures of arrays: one colour, as opaque as the number is large, so that they suit any background."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
INK = (58, 130, 235)  # a blue that stands out from white and from black


def png(shares: NDArray[np.floating], ink: tuple[int, int, int] = INK) -> bytes:
    """A PNG of shares [rows, columns], 0 (transparent) to 1 (the full colour). NaN is transparent."""
    levels = np.rint(255 * np.clip(np.nan_to_num(shares), 0, 1)).astype(np.uint8)
    height, width = levels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = levels
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, a palette
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(ink) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_url(shares: NDArray[np.floating]) -> str:
    """The same as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(png(shares)).decode()


def bits(marks: NDArray[np.bool_]) -> str:
    """Marks as base64 of bits, row by row, the highest bit of a byte first."""
    return base64.b64encode(np.packbits(marks).tobytes()).decode()


def packed(shares: NDArray[np.floating]) -> str:
    """Shares from 0 to 1 as base64 of little-endian uint16, row by row; NaN is 0."""
    levels = np.rint(65535 * np.clip(np.nan_to_num(shares), 0, 1)).astype("<u2")
    return base64.b64encode(levels.tobytes()).decode()
