# SPDX-License-Identifier: Apache-2.0
"""Every kernel on every instruction set: the scalar table's bits, and float64's values within a stated bound.

Sizes are no multiples of any tile, rows start at any element and lie any distance apart, values are of several kinds.
"""

from __future__ import annotations

import zlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import gemma4
from gemma4._engine import testing

from .compare import same_bits
from .test_block_formats import FORMATS

F32 = NDArray[np.float32]
ISAS: list[str] = gemma4.cpu_info()["available"]
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
KINDS = ["normal", "wide", "tiny", "zeros", "nonfinite"]
FINITE = KINDS[:-1]
ULP = 2.0**-23  # of 1
SMALLEST = 2.0**-149

EVERY_ISA = pytest.mark.parametrize("isa", ISAS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(DTYPES))
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def generator(*key: Any) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def values(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> F32:
    """float32 of one size, of sizes 2^-20 to 2^20, around the subnormals, half signed zeros, or with inf and NaN."""
    x = rng.standard_normal(shape, dtype=np.float32)
    if kind == "wide":
        return x * np.exp2(rng.integers(-20, 21, shape)).astype(np.float32)
    if kind == "tiny":
        return x * np.float32(1e-38)
    if kind == "zeros":
        return np.where(rng.random(shape) < 0.5, np.copysign(np.float32(0), x), x)
    if kind == "nonfinite":
        odd = rng.choice(np.array([np.inf, -np.inf, np.nan], np.float32), shape)
        return np.where(rng.random(shape) < 0.02, odd, x)
    return x


def placed(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    """The same values, starting at any element of a buffer and with any gap between rows."""
    rows, columns = array.shape if array.ndim == 2 else (1, len(array))
    offset, stride = int(rng.integers(0, 17)), columns + int(rng.integers(0, 6))
    buffer = np.zeros(offset + rows * stride, array.dtype)
    view = buffer[offset:].reshape(rows, stride)[:, :columns]
    view[...] = array
    return view if array.ndim == 2 else view[0]


def stored(rng: np.random.Generator, array: F32, dtype: str) -> tuple[NDArray[Any], F32]:
    """As weights of that type lie in memory (16-bit types as their bits), and the float32 values they stand for."""
    with np.errstate(over="ignore"):
        typed = array.astype(DTYPES[dtype])
    raw = typed if dtype == "F32" else typed.view(np.uint16)
    return placed(rng, raw), typed.astype(np.float32)


def same(a: F32, b: F32) -> bool:
    """The same bits; which NaN a NaN is may differ."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and same_bits(np.where(nan, 0, a), np.where(nan, 0, b))


def test_every_kernel_is_swept_here() -> None:
    rows = set(ROW_KERNELS)
    plain, packed = ("matmul", "matmul_packed", "weighted_sum", "widen", "narrow"), ("matmul_packed", "matmul_int8")
    by_type = {f"{name}_{dtype.lower()}" for name in plain for dtype in DTYPES}
    in_blocks = {f"{name}_{dtype.lower()}" for name in ("matmul", *packed, "widen") for dtype in FORMATS}
    limits = {"spin_f32", "spin_int8", "spin_int16", "spin_bf16", "read_sum"}  # in test_bench.py
    in_blocks |= {"quantize_rows", "weighted_sum_q8_0", "narrow_q8_0"}  # these in test_block_formats.py
    others = {"sum_squares", "pack_rows", "matmul_panel", "pack_panel", "fire"}
    others |= {"block_maxima", "list_within", "block_sums", "sum_exp"}
    others |= {"quantize_rows16", "softmax_rows16", "pack_panel16", "matmul_panel16"}
    others |= {"tiles_of_x", "bf16_row_bf16", "matmul_tiles"}  # also, emulated, in csrc/tests, as are
    others |= {"matmul_by_tiles", "tiles_of_values"}  # these two (csrc/tests/kernels_test_attention.c)
    others |= {"tiles_of_pieces"}  # csrc/tests/kernels_test_products.c
    others |= {f"bf16_row_{dtype.lower()}" for dtype in FORMATS}
    assert set(testing.names()) == rows | by_type | in_blocks | limits | others
    assert ISAS[0] == "scalar"


# ---- matmul -------------------------------------------------------------------------------------------------------

MATMUL_SIZES = [
    (m, n, k)
    for m in (1, 2, 3, 5, 24, 49)
    for n, k in [(1, 1), (3, 15), (4, 16), (5, 17), (31, 33), (33, 100), (65, 31), (7, 1040), (34, 2100), (2, 3071)]
] + [(m, n, k) for m in (5, 6, 7, 8) for n, k in [(1, 16), (2, 512), (33, 256), (31, 512)]]  # heads of a token


@EVERY_DTYPE
@EVERY_KIND
def test_matmul(dtype: str, kind: str) -> None:
    rng = generator("matmul", dtype, kind)
    for m, n, k in MATMUL_SIZES:
        x = placed(rng, values(rng, kind, (m, k)))
        raw, w = stored(rng, values(rng, "zeros" if kind == "zeros" else "normal", (n, k)), dtype)
        expected = testing.matmul("scalar", dtype, x, raw)
        for isa in ISAS[1:]:
            assert same(testing.matmul(isa, dtype, x, raw), expected), (isa, m, n, k)
        for isa in ISAS:
            assert same(testing.matmul_packed(isa, dtype, x, raw), expected), (isa, m, n, k)
        if kind in FINITE:
            bound = (k / 16 + 6) * ULP / 2  # roundings on a lane, and of the halvings
            assert_near(expected, _product(x, w), bound * _product(np.abs(x), np.abs(w)), (m, n, k))


def _product(x: F32, w: F32) -> NDArray[np.float64]:
    return x.astype(np.float64) @ w.T.astype(np.float64)


def assert_near(ours: F32, exact: NDArray[np.float64], bound: NDArray[np.float64], where: object) -> None:
    error = np.abs(ours - exact)
    assert (error <= bound + SMALLEST * 16).all(), (where, (error / (bound + SMALLEST)).max())


@pytest.mark.parametrize("kind", FINITE)
def test_matmul_tiles(kind: str) -> None:
    """Products of both sides rounded to bf16, in an order of the instructions' own."""
    isas = [isa for isa in ISAS if isa in ("avx512_bf16", "amx")]
    if not isas:
        with pytest.raises(NotImplementedError, match="no products of bf16"):
            testing.matmul_tiles("scalar", np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
        pytest.skip("no instructions for bf16 here; csrc/tests checks them emulated (make simde)")
    rng = generator("tiles", kind)
    for m, n, k in MATMUL_SIZES:
        x, w = placed(rng, values(rng, kind, (m, k))), placed(rng, values(rng, "normal", (n, k)))
        rounded = [array.astype(ml_dtypes.bfloat16).astype(np.float32) for array in (x, w)]
        sizes = _product(*map(np.abs, rounded))
        bound = (k + 3) * ULP / 2 * sizes + (k + 3) * 2.0**-126  # subnormal numbers count as zero
        for isa in isas:
            assert_near(testing.matmul_tiles(isa, x, w), _product(*rounded), bound, (isa, m, n, k))


@EVERY_ISA
@EVERY_DTYPE
def test_matmul_adds_in_the_stated_order(isa: str, dtype: str) -> None:
    """Lane l sums inputs l, l + 16, ...; then lanes by halving. Short mantissas make float64 an exact fma."""
    rng = generator("order", dtype)
    for m, n, k in [(1, 3, 47), (4, 5, 200), (3, 33, 2075)]:
        x, w = (rng.integers(-127, 128, (rows, k)).astype(np.float32) * 2.0**-5 for rows in (m, n))
        w *= np.exp2(rng.integers(-9, 10, (n, k))) if dtype != "F16" else 1
        raw, w = stored(rng, w.astype(np.float32), dtype)
        assert same_bits(testing.matmul(isa, dtype, x.astype(np.float32), raw), _on_lanes(x, w))


def _on_lanes(x: NDArray[Any], w: NDArray[Any]) -> F32:
    padding = [(0, 0), (0, -x.shape[1] % 16)]
    blocks_x, blocks_w = (np.pad(a, padding).astype(np.float64).reshape(len(a), -1, 16) for a in (x, w))
    lanes = np.zeros((len(x), len(w), 16), np.float32)
    for b in range(blocks_x.shape[1]):
        lanes = (blocks_x[:, None, b] * blocks_w[None, :, b] + lanes).astype(np.float32)
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


@EVERY_ISA
@EVERY_DTYPE
def test_matmul_rows_do_not_depend_on_their_company(isa: str, dtype: str) -> None:
    """Each output alone has the bits that it has in any block: what batching and chunking rest on."""
    rng = generator("company", dtype)
    x = values(rng, "wide", (53, 1100))
    raw, _ = stored(rng, values(rng, "normal", (67, 1100)), dtype)
    whole = testing.matmul(isa, dtype, x, raw)
    assert same_bits(testing.matmul_packed(isa, dtype, np.tile(x, (3, 1)), raw)[106:], whole)
    for rows, columns in [(slice(5, 6), slice(0, 67)), (slice(2, 31), slice(3, 40)), (slice(50, 53), slice(66, 67))]:
        assert same_bits(testing.matmul(isa, dtype, x[rows], raw[columns]), np.ascontiguousarray(whole[rows, columns]))


# ---- weighted_sum -------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@EVERY_KIND
def test_weighted_sum(dtype: str, kind: str) -> None:
    rng = generator("weighted_sum", dtype, kind)
    for m in (1, 2, 3, 4, 6, 7, 9):
        for n, d in [(1, 1), (2, 15), (3, 16), (63, 17), (64, 32), (65, 40), (130, 129), (200, 5), (1000, 31)]:
            p = placed(rng, values(rng, kind, (m, n)))
            raw, v = stored(rng, values(rng, "normal", (n, d)), dtype)
            start = values(rng, "normal", (m, d))
            expected = testing.weighted_sum("scalar", dtype, p, raw, start)
            for isa in ISAS[1:]:
                assert same(testing.weighted_sum(isa, dtype, p, raw, start), expected), (isa, m, n, d)
            if kind in FINITE:
                exact = start + _product(p, v.T)
                bound = (n + 1) * ULP / 2 * (np.abs(start) + _product(np.abs(p), np.abs(v.T)))
                assert_near(expected, exact, bound, (m, n, d))


@EVERY_ISA
@EVERY_DTYPE
def test_weighted_sum_goes_on_where_it_stopped(isa: str, dtype: str) -> None:
    """Keys in one call or in several, rows together or alone: the same bits."""
    rng = generator("pieces", dtype)
    p, start = values(rng, "normal", (7, 150)), values(rng, "normal", (7, 37))
    raw, _ = stored(rng, values(rng, "normal", (150, 37)), dtype)
    whole = testing.weighted_sum(isa, dtype, p, raw, start)
    acc = start
    for first, last in ((0, 1), (1, 70), (70, 150)):
        acc = testing.weighted_sum(isa, dtype, p[:, first:last], raw[first:last], acc)
    assert same_bits(acc, whole)
    alone = [testing.weighted_sum(isa, dtype, p[i : i + 1], raw, start[i : i + 1]) for i in range(7)]
    assert same_bits(np.concatenate(alone), whole)


@EVERY_ISA
@EVERY_DTYPE
def test_weighted_sum_of_rows_apart(isa: str, dtype: str) -> None:
    """Keys side by side, or of one head of several: other blocks of keys, the same bits."""
    rng = generator("apart", dtype)
    for m in (1, 4, 5, 8, 9):
        for n, d in [(3, 17), (70, 48), (40, 512), (9, 1040)]:
            p, start = values(rng, "normal", (m, n)), values(rng, "normal", (m, d))
            raw, v = stored(rng, values(rng, "normal", (n, 2 * d + 3)), dtype)
            apart, beside = raw[:, d : 2 * d], np.ascontiguousarray(raw[:, d : 2 * d])
            got = testing.weighted_sum(isa, dtype, p, apart, start)
            assert same_bits(got, testing.weighted_sum(isa, dtype, p, beside, start)), (m, n, d)
            bound = (n + 1) * ULP / 2 * (np.abs(start) + _product(np.abs(p), np.abs(v[:, d : 2 * d].T)))
            assert_near(got, start + _product(p, v[:, d : 2 * d].T), bound, (m, n, d))


# ---- panels of 16 columns -----------------------------------------------------------------------------------------


@EVERY_KIND
def test_matmul_panel(kind: str) -> None:
    rng = generator("panel", kind)
    for m in (1, 2, 3, 5, 6, 7, 12, 23):
        for n, k in [(16, 1), (1, 7), (15, 64), (16, 72), (16, 300), (3, 1031)]:
            x, w = placed(rng, values(rng, kind, (m, k))), values(rng, "normal", (k, 16))
            start = values(rng, "normal", (m, n))
            for out in (None, start):
                expected = testing.matmul_panel("scalar", x, w, n, out)
                for isa in ISAS[1:]:
                    assert same(testing.matmul_panel(isa, x, w, n, out), expected), (isa, m, n, k)
                if kind in FINITE:
                    first = 0 if out is None else start
                    size = np.abs(first) + _product(np.abs(x), np.abs(w.T[:n]))
                    assert_near(expected, first + _product(x, w.T[:n]), (k + 1) * ULP / 2 * size, (m, n, k))


@EVERY_ISA
def test_panels_go_on_where_they_stopped(isa: str) -> None:
    """Inputs in one call or in several, rows together or alone: the same bits."""
    rng = generator("panels")
    x, w = values(rng, "wide", (13, 200)), values(rng, "normal", (200, 16))
    whole = testing.matmul_panel(isa, x, w, 16, None)
    part = testing.matmul_panel(isa, x[:, :70], w[:70], 16, None)
    assert same_bits(testing.matmul_panel(isa, x[:, 70:], w[70:], 16, part), whole)
    assert same_bits(np.concatenate([testing.matmul_panel(isa, row[None], w, 16, None) for row in x]), whole)


@EVERY_ISA
def test_pack_panel(isa: str) -> None:
    rng = generator("pack")
    for n, k in [(16, 1), (16, 31), (16, 64), (5, 33), (1, 100)]:
        w = placed(rng, values(rng, "nonfinite", (n, k)))
        assert same_bits(np.ascontiguousarray(testing.pack_panel(isa, w)[:, :n]), np.ascontiguousarray(w.T))


# ---- sampling -----------------------------------------------------------------------------------------------------

PICK_SIZES = [1, 15, 16, 17, 48, 63, 64, 65, 130, 1000, 4099]


@EVERY_KIND
def test_block_maxima(kind: str) -> None:
    rng = generator("block_maxima", kind)
    for n in PICK_SIZES:
        for block in (16, 48, 512):
            x = placed(rng, values(rng, kind, (n,)))
            exact = np.array([x[i : i + block].max() for i in range(0, n, block)])  # NaN if one is
            scalar = testing.block_maxima("scalar", x, block)
            assert np.array_equal(scalar, exact, equal_nan=True), (n, block)
            for isa in ISAS[1:]:
                assert same(testing.block_maxima(isa, x, block), scalar), (isa, n, block)


@pytest.mark.parametrize("kind", FINITE)
def test_list_within(kind: str) -> None:
    rng = generator("list_within", kind)
    for n in PICK_SIZES:
        x = placed(rng, values(rng, kind, (n,)))
        x[rng.random(n) < 0.1] = -np.inf
        some = rng.choice(x, 2)
        for least, most in [(-np.inf, np.inf), (0, np.inf), (np.inf, np.inf), (min(some), max(some)), (some[0], 1)]:
            exact = np.flatnonzero((x >= np.float32(least)) & (x <= np.float32(most)))
            for isa in ISAS:
                assert np.array_equal(testing.list_within(isa, x, least, most), exact), (isa, n, least, most)


@pytest.mark.parametrize("kind", FINITE)
def test_block_sums(kind: str) -> None:
    """The stated order: lane l adds entries l, l + 16, ..., and the lanes are added by halving."""
    rng = generator("block_sums", kind)
    for n in PICK_SIZES:
        for block in (16, 48, 512):
            for least in (-np.inf, 0, np.float32(0.3)):
                x = placed(rng, values(rng, kind, (n,)))
                kept = np.where(x >= np.float32(least), x, 0).astype(np.float64)
                exact = []
                for first in range(0, n, block):
                    part = kept[first : first + block]
                    lanes = np.add.accumulate(np.pad(part, (0, -len(part) % 16)).reshape(-1, 16), axis=0)[-1]
                    for half in (8, 4, 2, 1):
                        lanes = lanes[:half] + lanes[half:]
                    exact.append(lanes[0])
                for isa in ISAS:
                    assert testing.block_sums(isa, x, block, least).tolist() == exact, (isa, n, block, least)


@pytest.mark.parametrize("spread", [0.1, 5.0, 60.0])
def test_sum_exp(spread: float) -> None:
    rng = generator("sum_exp", spread)
    for n in PICK_SIZES:
        x = placed(rng, rng.standard_normal(n, dtype=np.float32) * np.float32(spread))
        x[1::3] = -np.inf
        top = float(x.max())
        exact = np.exp(x.astype(np.float64) - top)
        # e^d is exact in d to half an ulp of d's largest rounding; 16 float32 additions by lane, 4 across
        error = ((24 + np.abs(np.where(np.isfinite(x), x - top, 0))) * ULP / 2 * exact).sum() + n * 2.0**-126
        scalar = testing.sum_exp("scalar", x, top)
        assert abs(scalar - exact.sum()) <= error, (n, scalar, exact.sum())
        assert all(testing.sum_exp(isa, x, top) == scalar for isa in ISAS), n


# ---- features of a dictionary -------------------------------------------------------------------------------------


@EVERY_KIND
def test_fire(kind: str) -> None:
    """Every combination of steps, sizes around 16 and 64, vectors that begin at any feature."""
    rng = generator("fire", kind)
    for used in range(32):
        for n, first in [(1, 0), (15, 3), (16, 0), (63, 1), (64, 64), (65, 5), (200, 2)]:
            x = placed(rng, values(rng, kind, (n,)))
            steps = [values(rng, "normal", (first + n,)) if used >> i & 1 else None for i in range(5)]
            before, scale, after, gate, threshold = [None if step is None else step[first:] for step in steps]
            if steps[4] is not None and threshold is not None:
                np.abs(steps[4], out=steps[4])
                threshold[n // 2 :] = np.inf if n > 1 else 0.1
            least = float(np.float32(rng.choice([0, 0.2])))
            value = x if before is None else x + before
            value = value if scale is None else value * scale
            value = value if after is None else value + after
            fires = value > np.maximum(least if threshold is None else threshold, np.float32(least))
            fires &= True if gate is None else x + gate > 0
            for isa in ISAS:
                found, ids = testing.fire(isa, x, *steps, first, least)
                if not np.isfinite(value).all():
                    assert ids is None, (isa, used, n)
                else:
                    assert same(found, value) and np.array_equal(ids, np.flatnonzero(fires)), (isa, used, n)


# ---- panels of whole numbers --------------------------------------------------------------------------------------

SIZES16 = [(16, 1), (1, 7), (15, 64), (16, 72), (16, 255), (16, 300), (3, 1031)]


@EVERY_ISA
@EVERY_KIND
def test_quantize_rows16(isa: str, kind: str) -> None:
    """Within half a step of 256 values' largest / 2047, or a NaN scale; zeros up to a multiple of 4."""
    rng = generator("rows16", kind)
    for m, k in [(1, 1), (3, 20), (2, 256), (3, 1031)]:
        x = placed(rng, values(rng, kind, (m, k)))
        q, scale = testing.quantize_rows16(isa, x, -np.inf, np.inf)
        assert same(scale, testing.quantize_rows16("scalar", x, -np.inf, np.inf)[1])
        padded = np.pad(x.astype(np.float64), [(0, 0), (0, -k % 256)]).reshape(m, -1, 256)
        finite = np.isfinite(padded).all(-1)
        assert np.array_equal(np.isnan(scale), ~finite)
        assert not q[:, k:].any() and q.shape[1] == (k + 3) // 4 * 4
        if kind in FINITE:
            assert np.array_equal(q, testing.quantize_rows16("scalar", x, -np.inf, np.inf)[0])
            steps = np.pad(q.astype(np.float64), [(0, 0), (0, -q.shape[1] % 256)]).reshape(m, -1, 256)
            assert np.abs(steps).max() <= 2047
            tiny = 2047 / np.finfo(np.float32).max  # groups without anything larger are zero: 2047 / x overflows
            bound = np.abs(padded).max(-1, keepdims=True) / 2047 * (0.5 + 2047 * 3 * ULP) + tiny
            assert (np.abs(steps * scale[..., None] - padded) <= bound).all()
        clamped = testing.quantize_rows16(isa, x, -0.5, 0.25)
        for ours, theirs in zip(clamped, testing.quantize_rows16(isa, np.clip(x, -0.5, 0.25), -9, 9), strict=True):
            assert same(ours.astype(np.float32), theirs.astype(np.float32)) or kind == "nonfinite"


@EVERY_ISA
@EVERY_KIND
def test_softmax_rows16(isa: str, kind: str) -> None:
    """The bits of a softmax that is rounded afterwards."""
    rng = generator("softmax16", kind)
    for m, n in [(1, 1), (3, 20), (2, 256), (3, 1031)]:
        x = placed(rng, values(rng, kind, (m, n)))
        pattern = np.stack([testing.row("scalar", "softmax", row.copy()) for row in x])
        q, scale = testing.quantize_rows16("scalar", pattern, -np.inf, np.inf)
        ours, our_scale = testing.softmax_rows16(isa, placed(rng, x))
        assert same(our_scale, scale)
        assert np.array_equal(ours, q)


@EVERY_KIND
def test_matmul_panel16(kind: str) -> None:
    rng = generator("panel16", kind)
    for m in (1, 3, 4, 5, 11):
        for n, k in SIZES16:
            x, w = placed(rng, values(rng, kind, (m, k))), placed(rng, values(rng, "normal", (n, k)))
            results = []
            for isa in ISAS:
                rows, panel = testing.quantize_rows16(isa, x, -np.inf, np.inf), testing.pack_panel16(isa, w)
                results.append(testing.matmul_panel16(isa, rows, panel, n, 9))
                alone = [(rows[0][i : i + 1], rows[1][i : i + 1]) for i in range(m)]  # and the inputs group by group
                parts = [testing.matmul_panel16(isa, row, panel, n, 1) for row in alone]
                assert same(np.concatenate(parts), results[-1])
            assert all(same(result, results[0]) for result in results[1:])
            if kind in FINITE:
                (q, scale), (w_q, w_scale) = rows, panel
                x_values = q * np.repeat(scale, 256, axis=1)[:, : q.shape[1]].astype(np.float64)
                w_values = w_q.transpose(1, 0, 2).reshape(16, -1) * np.repeat(w_scale.T, 256, axis=1)[:, : q.shape[1]]
                bound = (k / 256 + 4) * ULP * _product(np.abs(x_values), np.abs(w_values[:n]))
                assert_near(results[0], x_values @ w_values[:n].T.astype(np.float64), bound, (m, n, k))


@EVERY_ISA
def test_pack_panel16(isa: str) -> None:
    """As rows of x are rounded; rows that are not there are zero."""
    rng = generator("pack16")
    for n, k in SIZES16:
        w = placed(rng, values(rng, "wide", (n, k)))
        q, scale = testing.pack_panel16(isa, w)
        rows, row_scales = testing.quantize_rows16(isa, w, -np.inf, np.inf)
        assert np.array_equal(q.transpose(1, 0, 2).reshape(16, -1), np.pad(rows, [(0, 16 - n), (0, 0)]))
        assert same_bits(scale, np.ascontiguousarray(np.pad(row_scales, [(0, 16 - n), (0, 0)]).T))


@EVERY_ISA
def test_layer_norm(isa: str) -> None:
    rng = generator("layer_norm")
    for n in ROW_SIZES:
        x, gain = values(rng, "normal", (n,)) + 3, values(rng, "normal", (n,))
        wide = x.astype(np.float64)
        for eps in (0.0, 0.5):
            exact = (wide - wide.mean()) / np.sqrt(wide.var() + (eps or 1e-6)) * gain + (gain if eps else 0)
            if n > 1:
                bound = 64 * ULP * (np.abs(gain) * (np.abs(exact).max() + 3 / np.sqrt(wide.var() + 1e-6)) + 1)
                assert_near(testing.row(isa, "layer_norm", x, gain, eps), exact, bound, (n, eps))


# ---- rows ---------------------------------------------------------------------------------------------------------

ROW_SIZES = [*range(1, 35), 47, 48, 49, 64, 100, 257, 1000]
SCALE = 1.7
ROW_KERNELS = [
    *("scale_mul", "add", "mul", "axpy", "gelu", "glu", "clamp", "mul_add", "layer_norm", "softmax", "softcap", "rope")
]
# name -> float64 of (x, y), and the bound on the error in float32 ulps of the value
EXACT = {
    "scale_mul": (lambda x, y: x * np.float32(SCALE) * y, 1),
    "add": (lambda x, y: x + y, 0.5),
    "mul": (lambda x, y: x * y, 0.5),
    "clamp": (lambda x, y: np.clip(x, -np.float32(SCALE), np.float32(SCALE) / 2), 0),
    "glu": (lambda x, y: x / (1 + np.exp(-y)), 4),
}


@EVERY_KIND
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_row_kernels_agree(name: str, kind: str) -> None:
    rng = generator("row", name, kind)
    for n in ROW_SIZES:
        size = 2 * n if name == "rope" else n
        x, y = placed(rng, values(rng, kind, (size,))), placed(rng, values(rng, "normal", (size,)))
        expected = testing.row("scalar", name, x, y, SCALE)
        for isa in ISAS[1:]:
            assert same(testing.row(isa, name, x, y, SCALE), expected), (isa, n)
        if name in EXACT and kind in FINITE:
            function, ulps = EXACT[name]
            exact = function(x.astype(np.float64), y.astype(np.float64))
            assert_near(expected, exact, ulps * ULP * np.abs(exact), n)


@EVERY_ISA
def test_scale_without_a_gain(isa: str) -> None:
    x = values(generator("plain"), "wide", (77,))
    assert same_bits(testing.row(isa, "scale_mul", x, None, SCALE), x * np.float32(SCALE))


@EVERY_ISA
def test_axpy_rounds_once(isa: str) -> None:
    rng = generator("axpy")
    x, y = values(rng, "normal", (333,)), values(rng, "normal", (333,))
    exact = x.astype(np.float64) + np.float64(np.float32(SCALE)) * y
    assert_near(testing.row(isa, "axpy", x, y, SCALE), exact, 0.5001 * ULP * np.abs(exact), isa)


@EVERY_KIND
def test_sum_squares(kind: str) -> None:
    rng = generator("sum_squares", kind)
    for n in ROW_SIZES:
        x = placed(rng, values(rng, kind, (n,)))
        expected = np.float32(testing.sum_squares("scalar", x))
        for isa in ISAS[1:]:
            assert same(np.array([testing.sum_squares(isa, x)], np.float32), np.array([expected])), (isa, n)
        if kind in FINITE:
            exact = np.square(x.astype(np.float64)).sum(keepdims=True)
            assert_near(np.array([expected]), exact, (n / 16 + 6) * ULP / 2 * exact, n)


@EVERY_ISA
def test_rope_turns_pairs(isa: str) -> None:
    rng = generator("rope")
    for half in (1, 3, 8, 16, 21, 64):
        x, angle = values(rng, "normal", (2 * half,)), rng.uniform(0, 100, half)
        turn = np.concatenate([np.cos(angle), np.sin(angle)]).astype(np.float32)
        a, b, c, s = (part.astype(np.float64) for part in (x[:half], x[half:], turn[:half], turn[half:]))
        exact = np.concatenate([a * c - b * s, b * c + a * s])
        size = np.tile(np.abs(a * c) + np.abs(b * s) + np.abs(b * c) + np.abs(a * s), 2)
        assert_near(testing.row(isa, "rope", x, turn), exact, 1.01 * ULP * size, half)


@EVERY_ISA
def test_softmax(isa: str) -> None:
    rng = generator("softmax")
    for n in ROW_SIZES:
        for spread in (0.1, 5.0, 60.0):
            x = rng.standard_normal(n, dtype=np.float32) * np.float32(spread)
            masked = x.copy()
            masked[1::3] = -np.inf
            for row in (x, masked):
                e = np.exp(row.astype(np.float64) - row.max())
                exact = e / e.sum()
                # e^d is exact in d to half an ulp of d's largest rounding: |d| * 2^-24, plus exp, sum and quotient
                bound = (n / 16 + 12 + np.abs(np.where(np.isfinite(row), row - row.max(), 0))) * ULP / 2 * exact
                ours = testing.row(isa, "softmax", row)
                assert_near(ours, exact, bound + 2.0**-126, (n, spread))
                assert (ours[np.isneginf(row)] == 0).all()


# ---- functions of one variable, over floats of every exponent -----------------------------------------------------


def all_over() -> F32:
    """Every 4099th float32 there is, NaNs left out: a million values of all exponents and both signs."""
    x = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.ascontiguousarray(x[~np.isnan(x)])


@EVERY_ISA
def test_gelu(isa: str) -> None:
    x = all_over()
    wide = x.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    with np.errstate(over="ignore"):
        exact = wide / (1 + np.exp(-2 * inner))
    # a relative error of 2^-24 in u changes e^-2u by |2u| * 2^-24 of itself: 2 ulp near 0, 16 at -5, where gelu is
    # 1e-6, 88 at -10; beyond, where it is below 3e-38, zero
    bound = 1.5 * (1 + np.minimum(2 * np.abs(inner), 200)) * ULP * np.abs(exact) + 2.0**-124
    ours = testing.row(isa, "gelu", x)
    assert_near(ours, exact, bound, isa)
    assert same_bits(ours, testing.row("scalar", "gelu", x))
    assert np.array_equal(
        testing.row(isa, "gelu", np.array([0, 100, np.inf, 3e38, -50, -3e38], np.float32))[:4],
        np.array([0, 100, np.inf, 3e38], np.float32),
    )


@EVERY_ISA
@pytest.mark.parametrize("cap", [1.0, 30.0, 4.5])
def test_softcap(isa: str, cap: float) -> None:
    x = all_over()
    exact = cap * np.tanh(x.astype(np.float64) / cap)
    ours = testing.row(isa, "softcap", x, None, cap)
    assert_near(ours, exact, 4 * ULP * np.abs(exact), isa)
    assert (np.abs(ours) <= cap).all()
    assert same_bits(ours, testing.row("scalar", "softcap", x, None, cap))


@EVERY_ISA
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_widen_is_exact_for_every_value(isa: str, dtype: str) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    assert same(testing.widen(isa, dtype, bits), bits.view(DTYPES[dtype]).astype(np.float32))
    for n in ROW_SIZES:
        assert same(testing.widen(isa, dtype, bits[n : 2 * n]), bits[n : 2 * n].view(DTYPES[dtype]).astype(np.float32))


@EVERY_ISA
def test_widen_f32_copies(isa: str) -> None:
    x = values(generator("copy"), "nonfinite", (99,))
    assert same_bits(testing.widen(isa, "F32", x[3:]), x[3:])


@EVERY_ISA
@EVERY_DTYPE
def test_narrow_rounds_to_nearest_even(isa: str, dtype: str) -> None:
    upper = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    half_ways = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0xFFF, 0x1000, 0x1001, 0x2000, 0x3000], np.uint32)
    x = np.concatenate([(upper | half_ways).reshape(-1).view(np.float32), all_over()])
    ours = testing.narrow(isa, dtype, x).view(DTYPES[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(DTYPES[dtype])
    assert same(ours.astype(np.float32), expected.astype(np.float32))
    for n in ROW_SIZES:
        part = x[n * 7 : n * 8]
        assert np.array_equal(testing.narrow(isa, dtype, part), testing.narrow("scalar", dtype, part))


def test_unknown_names_are_errors() -> None:
    x = np.ones(4, np.float32)
    for call in (
        lambda: testing.row("sse9", "gelu", x),
        lambda: testing.row("scalar", "gelo", x),
        lambda: testing.matmul("scalar", "F8", x[None], x[None]),
    ):
        with pytest.raises(ValueError):
            call()
