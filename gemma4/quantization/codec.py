# SPDX-License-Identifier: Apache-2.0
"""Rows of float32 -> rows of any writable type, and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma4 import _engine
from gemma4.load.dtypes import ENGINE_DTYPES, PLAIN, row_bytes
from gemma4.quantization import blocks, iquants, kquants
from gemma4.quantization.blocks import F32, U8

# type -> [n, elements of a block] to [n, bytes of a block]
_PACK: dict[str, Callable[[F32], U8]] = {
    "Q8_0": blocks.q8_0,
    "Q4_0": blocks.q4_0,
    "Q4_1": blocks.q4_1,
    "Q5_0": blocks.q5_0,
    "Q5_1": blocks.q5_1,
    "Q2_K": kquants.q2_k,
    "Q3_K": kquants.q3_k,
    "Q4_K": kquants.q4_k,
    "Q5_K": kquants.q5_k,
    "Q6_K": kquants.q6_k,
    "IQ4_NL": iquants.iq4_nl,
    "IQ4_XS": iquants.iq4_xs,
    "MXFP4": blocks.mxfp4,
}
CAN_WRITE = (*PLAIN, *_PACK)


def pack_rows(dtype: str, rows: F32) -> U8:
    """float32 [n, width] -> uint8 [n, bytes per row]. Raises FormatError (width not a multiple of the block size).

    Values outside the type's range become infinite or NaN; `unpack_rows` shows it.
    """
    nbytes = row_bytes(dtype, rows.shape[1])
    if dtype in PLAIN:
        with np.errstate(over="ignore"):
            packed = rows.astype(PLAIN[dtype]).view(np.uint8)
    else:
        with np.errstate(invalid="ignore", over="ignore"):
            packed = _PACK[dtype](rows.reshape(-1, ENGINE_DTYPES[dtype].elements))
    return packed.reshape(len(rows), nbytes)


def unpack_rows(dtype: str, packed: U8, width: int) -> F32:
    """The values that the engine will read, float32 [n, width]."""
    return _engine.dequantize(dtype, (len(packed), width), np.ascontiguousarray(packed), 0)
