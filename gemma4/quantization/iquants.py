# SPDX-License-Identifier: Apache-2.0
"""float32 values -> IQ4_NL and IQ4_XS: four bits that encode 16 uneven values, times a scale for every 32.

IQ4_NL stores each scale as fp16; IQ4_XS, in blocks of 256, as six bits times an fp16 of the block's. Scales are
searched as K-quants' are.
Ref: ggml's ggml-common.h (layouts, the 16 values).
"""

from __future__ import annotations

import numpy as np

from gemma4.quantization.blocks import F32, U8, half_bytes, inverse, largest, nibbles, stored_half

_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_STEPS = (0, -7, -5, -3, -1, 1, 3, 5, 7)  # added to the table's value of largest magnitude
_PARTS = 8  # of an IQ4_XS block
_SMALL = 32  # its scales are integers from -32 to 31


def _nearest_codes() -> U8:
    """Code of the value nearest to each interval of 0.5 from -128 to 128; midpoints of values are interval bounds."""
    halves = (np.arange(512, dtype=np.float32) + 0.5) / 2 - 128
    return np.abs(halves[:, None] - _VALUES).argmin(1).astype(np.uint8)


_NEAREST = _nearest_codes()


def _codes(scaled: F32) -> U8:
    return _NEAREST[np.clip(np.floor(2 * scaled) + 256, 0, 511).astype(np.int16)]


def _search(x: F32) -> F32:
    """[n, 32] -> [n] scales of least squares error, weighted by x², among those that put the largest value near the
    table's."""
    t = np.ascontiguousarray(x.T)  # sums over the first axis are the quick ones
    weight = t * t
    per_step = inverse(largest(x)[:, 0])
    best = np.zeros(len(x), np.float32)
    scale = np.zeros(len(x), np.float32)
    for step in _STEPS:
        values = _VALUES[_codes(t * ((_VALUES[0] + step) * per_step))]
        weighted = weight * values
        along, square = (weighted * t).sum(0), (weighted * values).sum(0)
        found = along * inverse(square)
        gain = found * along
        better = gain > best
        best[better], scale[better] = gain[better], found[better]
    return scale


def iq4_nl(x: F32) -> U8:
    scale = _search(x)[:, None]
    return np.concatenate([half_bytes(scale), nibbles(_codes(x * inverse(stored_half(scale))))], 1)


def iq4_xs(x: F32) -> U8:
    parts = x.reshape(-1, 32)
    scale = _search(parts).reshape(-1, _PARTS)
    d = stored_half(largest(scale) / np.float32(-_SMALL))
    small = np.clip(np.rint(scale * inverse(d)), -_SMALL, _SMALL - 1)
    d = _refit(parts, small, d)
    q = _codes(parts * inverse(d * small).reshape(-1, 1))
    return np.concatenate([half_bytes(d), _six_bits(small), nibbles(q).reshape(len(x), -1)], 1)


def _refit(parts: F32, small: F32, d: F32) -> F32:
    """The blocks' scales [n, 1] that suit the codes best, which go with `d`; the old ones of blocks of zeros."""
    step = small.reshape(-1, 1)
    values = step * _VALUES[_codes(parts * inverse(d * small).reshape(-1, 1))]
    weighted = parts * parts * values
    along, square = ((weighted * v).reshape(len(d), -1).sum(1, keepdims=True) for v in (parts, values))
    return np.where(square > 0, stored_half(along * inverse(square)), d)


def _six_bits(small: F32) -> U8:
    """Eight scales of -32 to 31 -> [n, 6]: their upper two bits in two bytes, then the lower four in four."""
    code = (small + _SMALL).astype(np.uint8)
    low, high = code & np.uint8(15), code >> np.uint8(4)
    shifts = np.array([0, 2, 4, 6], np.uint8)
    upper = np.bitwise_or.reduce(high.reshape(-1, 2, 4) << shifts, axis=2)
    return np.concatenate([upper, low[:, 0::2] | low[:, 1::2] << np.uint8(4)], 1)
