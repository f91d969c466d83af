# SPDX-License-Identifier: Apache-2.0
"""float32 values -> GGUF's K-quants: blocks of 256 whose 8 or 16 parts have their own small scales.

Several scales are tried for each part, and the one of least weighted squares error is taken. These scales are rounded
to the few bits they are stored in, the values rounded again by them, and the block's own scale fitted once more.
Ref: ggml's ggml-common.h (layouts) and ggml-quants.c (the weights, and the idea of trying several scales).
"""

from __future__ import annotations

from typing import cast

import numpy as np

from gemma4.quantization.blocks import F32, U8, half_bytes, inverse, stored_half

_AFFINE_STEPS = (-0.9, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 0.9)  # added to the number of steps over a part's range
_SYMMETRIC_STEPS = (0.0, -0.8, -0.5, -0.3, -0.15, 0.15, 0.3, 0.5, 0.8)


def _parts(x: F32, size: int) -> F32:
    """[n, 256] -> [size, n * 256 / size]: sums over the first axis are the quick ones."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _blocks(q: F32) -> U8:
    """The inverse of `_parts`, as bytes [n, 256]."""
    return q.T.astype(np.uint8).reshape(-1, 256)


# -- scale and offset: Q2_K, Q4_K, Q5_K --------------------------------------------------------------------------------


def _affine_search(x: F32, weight: F32, top: int) -> tuple[F32, F32]:
    """Scale and offset (to be subtracted) of each part, both >= 0: x ~ scale * (0 … top) - offset."""
    low = np.minimum(x.min(0), np.float32(0))
    span = inverse(x.max(0) - low)
    above = x - low
    sum_w, sum_x = weight.sum(0), (weight * x).sum(0)
    scale, offset = np.zeros_like(sum_x), np.maximum(-sum_x * inverse(sum_w), np.float32(0))  # all values the same
    best = -offset * sum_x  # the reduction of the error relative to all zeros
    for step in _AFFINE_STEPS:
        q = np.minimum(np.rint(above * ((top + step) * span)), np.float32(top))
        weighted = weight * q
        sum_q, sum_qq, sum_qx = weighted.sum(0), (weighted * q).sum(0), (weighted * x).sum(0)
        det = inverse(sum_w * sum_qq - sum_q * sum_q)
        base = np.minimum((sum_qq * sum_x - sum_q * sum_qx) * det, np.float32(0))
        slope = cast("F32", np.where(base < 0, (sum_w * sum_qx - sum_x * sum_q) * det, sum_qx * inverse(sum_qq)))
        gain = slope * sum_qx + base * sum_x
        better = gain > best
        best[better], scale[better], offset[better] = gain[better], slope[better], -base[better]
    return np.maximum(scale, np.float32(0)), offset


def _affine_fit(x: F32, weight: F32, top: int, size: int, small: int) -> tuple[F32, F32, U8, U8, U8]:
    """d, dmin [n, 1] as stored, the parts' scales and offsets (0 … small) [n, parts], codes [n, 256]."""
    scale, offset = (v.reshape(-1, 256 // size) for v in _affine_search(x, weight, top))
    d, dmin = (stored_half(v.max(1, keepdims=True) / np.float32(small)) for v in (scale, offset))
    sc, m = (np.minimum(np.rint(v * inverse(unit)), np.float32(small)) for v, unit in ((scale, d), (offset, dmin)))
    q = _affine_codes(x, d * sc, dmin * m, top)
    d, dmin = _affine_refit(x, weight, q, (sc, m), (d, dmin))
    q = _affine_codes(x, d * sc, dmin * m, top)
    return d, dmin, sc.astype(np.uint8), m.astype(np.uint8), _blocks(q)


def _affine_codes(x: F32, scale: F32, offset: F32, top: int) -> F32:
    q = np.rint((x + offset.reshape(-1)) * inverse(scale.reshape(-1)))
    return np.clip(q, np.float32(0), np.float32(top))


def _affine_refit(x: F32, weight: F32, q: F32, small: tuple[F32, F32], units: tuple[F32, F32]) -> tuple[F32, F32]:
    """The best d and dmin for codes and small scales that stay as they are; the old ones where there is none."""
    sc, m = small
    weighted = weight * q
    sum_w, sum_x, sum_q, sum_qq, sum_qx = (
        v.sum(0).reshape(sc.shape) for v in (weight, weight * x, weighted, weighted * q, weighted * x)
    )
    aa, ab, bb, ax, bx = (
        v.sum(1, keepdims=True) for v in (sc * sc * sum_qq, -sc * m * sum_q, m * m * sum_w, sc * sum_qx, -m * sum_x)
    )
    det = aa * bb - ab * ab
    usable = det > np.float32(1e-4) * aa * bb
    inv = inverse(np.where(usable, det, np.float32(1)))
    alone = np.where(aa > 0, ax * inverse(aa), units[0])  # without offsets
    d = np.where(usable, (ax * bb - bx * ab) * inv, np.where(bb > 0, units[0], alone))
    dmin = np.where(usable, (bx * aa - ax * ab) * inv, units[1])
    fine = (d > 0) & (dmin >= 0)
    return stored_half(np.where(fine, d, units[0])), stored_half(np.where(fine, dmin, units[1]))


def _pairs_of_bits(q: U8) -> U8:
    """[n, 256] codes below 4 -> [n, 64]: byte l of a half holds its values l, l + 32, l + 64, l + 96."""
    parts = q.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64)


def _nibble_pairs(q: U8) -> U8:
    """[n, 256] codes below 16 -> [n, 128]: each 64 values in 32 bytes, the first 32 in the low bits."""
    parts = q.reshape(-1, 4, 2, 32)
    return (parts[:, :, 0] | parts[:, :, 1] << np.uint8(4)).reshape(-1, 128)


def _bit_planes(bits: U8) -> U8:
    """[n, 256] of 0 or 1 -> [n, 32]: bit i of byte l is value 32 i + l."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _six_bits(sc: U8, m: U8) -> U8:
    """Eight scales and offsets below 64 -> [n, 12]."""
    low, high = np.uint8(15), np.uint8(4)
    return np.concatenate(
        [
            sc[:, :4] | sc[:, 4:] >> high << np.uint8(6),
            m[:, :4] | m[:, 4:] >> high << np.uint8(6),
            sc[:, 4:] & low | (m[:, 4:] & low) << high,
        ],
        1,
    )


def _spread(x: F32) -> F32:
    """Larger values count more, by as much as they stand out."""
    magnitude = np.abs(x)
    return magnitude + np.sqrt((x * x).mean(0))


def q2_k(x: F32) -> U8:
    parts = _parts(x, 16)
    d, dmin, sc, m, q = _affine_fit(parts, _spread(parts), 3, 16, 15)
    return np.concatenate([sc | m << np.uint8(4), _pairs_of_bits(q), half_bytes(d), half_bytes(dmin)], 1)


def q4_k(x: F32) -> U8:
    parts = _parts(x, 32)
    d, dmin, sc, m, q = _affine_fit(parts, _spread(parts), 15, 32, 63)
    return np.concatenate([half_bytes(d), half_bytes(dmin), _six_bits(sc, m), _nibble_pairs(q)], 1)


def q5_k(x: F32) -> U8:
    parts = _parts(x, 32)
    d, dmin, sc, m, q = _affine_fit(parts, _spread(parts), 31, 32, 63)
    high = _bit_planes(q >> np.uint8(4))
    low = _nibble_pairs(q & np.uint8(15))
    return np.concatenate([half_bytes(d), half_bytes(dmin), _six_bits(sc, m), high, low], 1)


# -- scale only: Q3_K, Q6_K --------------------------------------------------------------------------------------------


def _symmetric_search(x: F32, weight: F32, levels: int) -> F32:
    """The scale of each part: x ~ scale * (-levels … levels - 1). Negative where the largest value is positive."""
    largest = inverse(np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0])
    best, scale = (np.zeros(x.shape[1], np.float32) for _ in range(2))
    for step in _SYMMETRIC_STEPS:
        q = np.clip(np.rint(x * (-(levels + step) * largest)), -levels, levels - 1)
        weighted = weight * q
        along, square = (weighted * x).sum(0), (weighted * q).sum(0)
        found = along * inverse(square)
        gain = found * along
        better = gain > best
        best[better], scale[better] = gain[better], found[better]
    return scale


def _symmetric_fit(x: F32, weight: F32, levels: int, small: int) -> tuple[F32, F32, U8]:
    """d [n, 1] as stored, the parts' scales (-small … small - 1) [n, 16], codes (0 … 2 levels - 1) [n, 256]."""
    scale = _symmetric_search(x, weight, levels).reshape(-1, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], 1)
    d = stored_half(largest / np.float32(-small))
    sc = np.clip(np.rint(scale * inverse(d)), -small, small - 1)
    q = _symmetric_codes(x, d * sc, levels)
    weighted = weight * q
    along, square = ((weighted * v).sum(0).reshape(-1, 16) for v in (x, q))
    square = (sc * sc * square).sum(1, keepdims=True)
    d = np.where(square > 0, stored_half((sc * along).sum(1, keepdims=True) * inverse(square)), d)
    return d, sc, _blocks(_symmetric_codes(x, d * sc, levels) + np.float32(levels))


def _symmetric_codes(x: F32, scale: F32, levels: int) -> F32:
    return np.clip(np.rint(x * inverse(scale.reshape(-1))), np.float32(-levels), np.float32(levels - 1))


def q3_k(x: F32) -> U8:
    parts = _parts(x, 16)
    d, sc, q = _symmetric_fit(parts, _spread(parts), 4, 32)
    code = (sc + 32).astype(np.uint8)
    low = code[:, :8] & np.uint8(15) | (code[:, 8:] & np.uint8(15)) << np.uint8(4)
    high = code.reshape(-1, 4, 4) >> np.uint8(4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    scales = np.concatenate([low, np.bitwise_or.reduce(high, axis=1)], 1)
    return np.concatenate([_bit_planes(q >> np.uint8(2)), _pairs_of_bits(q & np.uint8(3)), scales, half_bytes(d)], 1)


def q6_k(x: F32) -> U8:
    parts = _parts(x, 16)
    d, sc, q = _symmetric_fit(parts, _spread(parts), 32, 128)
    four = (q & np.uint8(15)).reshape(-1, 2, 2, 64)
    low = (four[:, :, 0] | four[:, :, 1] << np.uint8(4)).reshape(-1, 128)
    return np.concatenate([low, _pairs_of_bits(q >> np.uint8(4)), sc.astype(np.int8).view(np.uint8), half_bytes(d)], 1)
