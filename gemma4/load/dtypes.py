# SPDX-License-Identifier: Apache-2.0
"""Storage of weights in blocks of consecutive elements of a row. A plain type is a block of one element.

Ref: ggml's block structures (ggml-common.h) and the gguf package's GGML_QUANT_SIZES.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError


class BlockType(NamedTuple):
    """`elements` values of a row take `nbytes` bytes."""

    elements: int
    nbytes: int


# Types that the engine computes with, under the names of its tensor entries.
ENGINE_DTYPES: dict[str, BlockType] = {
    "F32": BlockType(1, 4),
    "F16": BlockType(1, 2),
    "BF16": BlockType(1, 2),
    "Q8_0": BlockType(32, 34),
    "Q4_0": BlockType(32, 18),
    "Q4_1": BlockType(32, 20),
    "Q5_0": BlockType(32, 22),
    "Q5_1": BlockType(32, 24),
    "Q2_K": BlockType(256, 84),
    "Q3_K": BlockType(256, 110),
    "Q4_K": BlockType(256, 144),
    "Q5_K": BlockType(256, 176),
    "Q6_K": BlockType(256, 210),
    "IQ4_NL": BlockType(32, 18),
    "IQ4_XS": BlockType(256, 136),
    "MXFP4": BlockType(32, 17),
}
PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def is_quantised(dtype: str) -> bool:
    """Whether values of this engine dtype have to be unpacked from blocks."""
    return dtype not in PLAIN


def alignment(dtype: str) -> int:
    """Alignment in bytes that the engine needs to read a tensor in place."""
    return PLAIN[dtype].itemsize if dtype in PLAIN else 4


def row_bytes(dtype: str, width: int) -> int:
    """Bytes of a row of `width` elements. Raises FormatError if width is not a multiple of the block size."""
    block = ENGINE_DTYPES[dtype]
    if width % block.elements:
        raise FormatError(f"a row of {width} elements is not a whole number of {dtype} blocks of {block.elements}")
    return width // block.elements * block.nbytes


def stored_rows(dtype: str, shape: tuple[int, ...], buffer: Any, offset: int) -> NDArray[Any]:
    """The tensor as stored in `buffer`: plain types with their NumPy dtype and shape, quantised ones as uint8
    [..., bytes per row]. Read-only views if the buffer is."""
    plain = PLAIN.get(dtype)
    if plain is not None:
        return np.frombuffer(buffer, plain, math.prod(shape), offset).reshape(shape)
    packed = (*shape[:-1], row_bytes(dtype, shape[-1]))
    return np.frombuffer(buffer, np.uint8, math.prod(packed), offset).reshape(packed)
