# SPDX-License-Identifier: Apache-2.0
"""float32 values -> GGUF's blocks of 32: one scale (and in the _1 formats one offset) for each.

The bytes of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and MXFP4 are those of the gguf package's quantisers and of ggml's reference
(quantize_row_*_ref).
Ref: ggml's ggml-common.h (layouts); OCP Microscaling Formats v1.0 (MXFP4).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_MXFP4_BETWEEN = np.array([1, 3, 5, 7, 10, 14, 20], np.float32) / 2  # halfway between its eight magnitudes


def inverse(scale: F32) -> F32:
    """1 / scale, 0 where that is 0 or too large for a float32."""
    with np.errstate(divide="ignore", over="ignore"):
        out = np.float32(1) / scale
    out[~np.isfinite(out)] = 0
    return out


def half_bytes(values: F32) -> U8:
    """[n, k] -> fp16, as bytes [n, 2 k]. Values too large become infinite: the caller checks the result."""
    with np.errstate(over="ignore"):
        return values.astype("<f2").view(np.uint8)


def stored_half(values: F32) -> F32:
    """The values as fp16 holds them."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def nibbles(q: U8) -> U8:
    """[n, 32] codes below 16 -> [n, 16]: the first half of the block in the low bits."""
    return q[:, :16] | q[:, 16:] << np.uint8(4)


def q8_0(x: F32) -> U8:
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    scaled = x * inverse(scale)
    away = np.abs(scaled)  # halves are rounded away from zero
    whole = np.floor(away)
    q = np.sign(scaled) * (whole + np.floor(2 * (away - whole)))
    return np.concatenate([half_bytes(scale), q.astype(np.int8).view(np.uint8)], 1)


def largest(x: F32) -> F32:
    """The first value of each row whose magnitude is the largest, with its sign, [n, 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)


def _symmetric(x: F32, levels: int) -> tuple[F32, U8]:
    """Scale [n, 1] and codes 0 to 2 levels - 1: the value of largest magnitude is -levels times the scale."""
    scale = largest(x) / np.float32(-levels)
    shifted = x * inverse(scale) + np.float32(levels + 0.5)
    return scale, np.minimum(shifted, np.float32(2 * levels - 1)).astype(np.uint8)


def _affine(x: F32, top: int) -> tuple[F32, F32, U8]:
    """Scale and offset [n, 1] and codes 0 to top: the smallest value is 0, the largest top."""
    low = x.min(1, keepdims=True)
    scale = (x.max(1, keepdims=True) - low) / np.float32(top)
    shifted = (x - low) * inverse(scale) + np.float32(0.5)
    return scale, low, np.minimum(shifted, np.float32(top)).astype(np.uint8)


def _fifth_bits(q: U8) -> U8:
    return np.packbits(q >> np.uint8(4), axis=1, bitorder="little")


def q4_0(x: F32) -> U8:
    scale, q = _symmetric(x, 8)
    return np.concatenate([half_bytes(scale), nibbles(q)], 1)


def q5_0(x: F32) -> U8:
    scale, q = _symmetric(x, 16)
    return np.concatenate([half_bytes(scale), _fifth_bits(q), nibbles(q & np.uint8(15))], 1)


def q4_1(x: F32) -> U8:
    scale, low, q = _affine(x, 15)
    return np.concatenate([half_bytes(scale), half_bytes(low), nibbles(q)], 1)


def q5_1(x: F32) -> U8:
    scale, low, q = _affine(x, 31)
    return np.concatenate([half_bytes(scale), half_bytes(low), _fifth_bits(q), nibbles(q & np.uint8(15))], 1)


def mxfp4(x: F32) -> U8:
    """A power of two for each block, from its largest magnitude; each value to the nearest of e2m1's 15."""
    magnitude = np.abs(x)
    _, exponent = np.frexp(magnitude.max(1, keepdims=True))
    code = np.where(magnitude.any(1, keepdims=True), np.clip(exponent - 3 + 127, 0, 254), 0)
    unit = np.ldexp(np.float32(1), code - 128).astype(np.float32)  # e8m0 represents twice this
    q = np.zeros(x.shape, np.uint8)
    for between in _MXFP4_BETWEEN:
        q += magnitude > between * unit
    q |= ((x < 0) & (q > 0)).astype(np.uint8) << np.uint8(3)
    return np.concatenate([code.astype(np.uint8), nibbles(q)], 1)
