# SPDX-License-Identifier: Apache-2.0
"""Kernels on GGUF's block formats: values against the gguf package's dequantiser, products against float64 and against
the scalar instruction set, to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma4 import FormatError, _engine

from .compare import same_bits

testing = _engine.testing
ISAS = _engine.cpu_info()["available"]
# format -> where its f16 factors lie in a block (MXFP4 has an exponent instead)
FACTORS = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "IQ4_NL": (0,),
    "MXFP4": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
}
FORMATS = tuple(FACTORS)


def block_of(name: str) -> tuple[int, int]:
    return gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def random_rows(name: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    """Any bytes at all, with factors of a weight's size: uint8 [n, bytes of k values]."""
    rng = np.random.default_rng(seed)
    values, size = block_of(name)
    blocks = rng.integers(0, 256, (n, k // values, size), dtype=np.uint8)
    for at in FACTORS[name]:
        factor = rng.normal(0, 0.01, (n, k // values, 1)).astype(np.float16)
        blocks[..., at : at + 2] = factor.view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(115, 126, blocks.shape[:2])
    return blocks.reshape(n, -1)


def reference(name: str, rows: np.ndarray) -> np.ndarray:
    return quants.dequantize(rows, GGMLQuantizationType[name])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_values_have_the_bits_of_the_gguf_package(name: str, isa: str) -> None:
    rows = random_rows(name, 5, 2048)
    assert same_bits(np.stack([testing.widen(isa, name, row) for row in rows]), reference(name, rows))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_scale_and_factor(name: str, isa: str) -> None:
    """Blocks of entirely random bytes: zero, subnormal and infinite factors, NaN included."""
    rows = np.random.default_rng(3).integers(0, 256, (1, 400 * block_of(name)[1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        wanted = reference(name, rows)[0]
    got = testing.widen(isa, name, rows[0])
    nan = np.isnan(wanted)
    assert (np.isnan(got) == nan).all()
    assert same_bits(got[~nan], wanted[~nan])


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize(name: str) -> None:
    rows = random_rows(name, 6, 512)
    padded = b"abc" + rows.tobytes()  # blocks need no alignment
    got = _engine.dequantize(name, (2, 3, 512), padded, 3)
    assert same_bits(got.reshape(6, 512), reference(name, rows))


def test_dequantize_refuses() -> None:
    rows = random_rows("Q4_K", 2, 512).tobytes()
    for dtype, shape, offset in (
        ("Q4_K", (2, 512), 1),  # past the end
        ("Q4_K", (3, 512), 0),
        ("Q4_K", (4, 128), 0),  # half a block in each row
        ("Q4_X", (2, 512), 0),
        ("Q4_0", (1 << 40, 1 << 40), 0),
    ):
        with pytest.raises((FormatError, ValueError)):
            _engine.dequantize(dtype, shape, rows, offset)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 23, 75])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_matmul_is_that_of_the_float32_rows(name: str, isa: str, m: int) -> None:
    for n, k in ((1, 256), (5, 768), (37, 1280)):
        rows = random_rows(name, n, k, seed=n)
        x = np.random.default_rng(m).normal(size=(m, k)).astype(np.float32)
        plain = testing.matmul(isa, "F32", x, reference(name, rows))
        assert same_bits(testing.matmul(isa, name, x, rows), plain)
        assert same_bits(testing.matmul_packed(isa, name, x, rows), plain)


@pytest.mark.parametrize("name", FORMATS)
def test_matmul_of_a_slice(name: str) -> None:
    """Rows that are part of longer ones, at any address."""
    rows = random_rows(name, 9, 1024)
    size = block_of(name)[1] * (512 // block_of(name)[0])
    shifted = np.empty(rows.size + 1, np.uint8)
    shifted[1:] = rows.ravel()
    part = shifted[1:].reshape(rows.shape)[:, size:]
    x = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    for isa in ISAS:
        plain = testing.matmul(isa, "F32", x, np.ascontiguousarray(reference(name, rows)[:, 512:]))
        assert same_bits(testing.matmul(isa, name, x, part), plain)


FEW = 6  # rows of x; more lie by fours


def in_order(q: np.ndarray, m: int) -> np.ndarray:
    """[m, blocks, 32]. A few rows keep first and last halves of blocks b and b + 4 of every 8; of more, 8 inputs of
    each of 4 rows lie together."""
    if m <= FEW:
        return q.reshape(m, -1, 4, 2, 2, 16).transpose(0, 1, 4, 2, 3, 5).reshape(m, -1, 32)
    return q.reshape(len(q) // 4, -1, 4, 8).transpose(0, 2, 1, 3).reshape(len(q), -1, 32)[:m]


def by_row(values: np.ndarray, m: int) -> np.ndarray:
    """Scales or sums as [m, of each row]."""
    if m <= FEW:
        return values
    return values.reshape(len(values) // 4, -1, 4).transpose(0, 2, 1).reshape(len(values), -1)[:m]


def rounded(x: np.ndarray, isa: str) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(what quantize_rows gives, the values it stands for in float64)."""
    bytes_of_x, m = testing.quantize_rows(isa, x), len(x)
    q, scale = bytes_of_x[:2]
    values = (in_order(q, m) * by_row(scale, m)[..., None].astype(np.float64)).reshape(m, -1)
    return bytes_of_x, values[:, : x.shape[1]]


@pytest.mark.parametrize("m", [4, 6, 7, 17, 20])
@pytest.mark.parametrize("isa", ISAS)
def test_quantize_rows(isa: str, m: int) -> None:
    x = np.random.default_rng(0).normal(size=(m, 96)).astype(np.float32)
    x[1, :32] = 0
    x[2, 32:64] *= 1e-30
    x[3, 5] = 1e30
    (q, scale, sum16, sum32, minus_4, minus_8), values = rounded(x, isa)
    assert q.shape == (m if m <= FEW else (m + 3) // 4 * 4, 256)
    q, scale, sum16, sum32 = in_order(q, m), by_row(scale, m), by_row(sum16, m), by_row(sum32, m)
    blocks = np.zeros((m, 8, 32), np.float32)
    blocks[:, :3] = x.reshape(m, 3, 32)
    assert same_bits(scale, np.abs(blocks).max(-1) / np.float32(127))
    half_step = np.repeat(scale[:, :3], 32, axis=1) * (0.5 + 1e-4)
    assert (np.abs(values - x) <= half_step).all()
    assert np.abs(q).max() <= 127
    assert same_bits(sum16, np.repeat(scale, 2, axis=1) * q.reshape(m, 16, 16).sum(-1).astype(np.float32))
    assert same_bits(sum32, scale * q.sum(-1).astype(np.float32))
    if m > FEW:
        for lane in range(2):
            assert np.array_equal(by_row(minus_4[:, lane::2], m), -4 * q.sum(-1, dtype=np.int32))
        assert np.array_equal(by_row(minus_8, m), -8 * q.sum(-1, dtype=np.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_not_lost(isa: str, bad: float) -> None:
    for m in (4, 6, 7):
        x = np.ones((m, 64), np.float32)
        x[2, 40] = bad
        out = testing.matmul_int8(isa, "Q4_0", testing.quantize_rows(isa, x), m, random_rows("Q4_0", 3, 64))
        assert np.isnan(out[2]).all()
        assert np.isfinite(np.delete(out, 2, axis=0)).all()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 23, 64, 259])
@pytest.mark.parametrize("name", FORMATS)
def test_int8_products(name: str, m: int) -> None:
    """Whole-number products are exact, so only one fma per group rounds: within 1e-6 of float64 on the rounded x; and
    every instruction set gives the same bits."""
    odd = ((3, 32), (17, 352)) if block_of(name)[0] == 32 else ()
    for n, k in ((1, 256), (19, 768), (40, 1280), *odd):
        rows = random_rows(name, n, k, seed=n)
        x = np.random.default_rng(m).normal(size=(m, k)).astype(np.float32)
        bytes_of_x, values = rounded(x, ISAS[0])
        wanted = values @ reference(name, rows).T.astype(np.float64)
        got = [testing.matmul_int8(isa, name, bytes_of_x, m, rows) for isa in ISAS]
        assert np.abs(got[0] - wanted).max() <= 1e-6 * np.abs(wanted).max()
        assert all(same_bits(got[0], other) for other in got[1:])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_int8_at_the_ends_of_the_range(name: str, isa: str) -> None:
    """The largest products of one sign: nothing may saturate 16 bits."""
    values, size = block_of(name)
    for fill in (0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F):
        blocks = np.full((20, 512 // values, size), fill, np.uint8)
        for at in FACTORS[name]:
            blocks[..., at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        if name == "MXFP4":
            blocks[..., 0] = 120
        rows = blocks.reshape(20, -1)
        for sign in (1, -1):
            for m in (1, 4, 7):
                bytes_of_x, x = rounded(np.full((m, 512), sign, np.float32), isa)
                wanted = x @ reference(name, rows).T.astype(np.float64)
                got = testing.matmul_int8(isa, name, bytes_of_x, m, rows)
                assert np.abs(got - wanted).max() <= 2e-6 * np.abs(wanted).max() + 1e-30


@pytest.mark.parametrize("isa", ISAS)
def test_narrow_to_q8_0(isa: str) -> None:
    """A cache's rows: as close as the type allows, and what the kernels read is what gguf reads."""
    x = (
        np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
        * np.logspace(-6, 3, 40, dtype=np.float32)[:, None]
    )
    x[3, :32] = 0
    x[4, 5] = np.nan
    rows = testing.narrow(isa, "Q8_0", x.reshape(-1)).reshape(40, -1)
    assert np.array_equal(rows, testing.narrow("scalar", "Q8_0", x.reshape(-1)).reshape(40, -1))
    back = reference("Q8_0", rows)
    assert np.isnan(back[4, :32]).all() and np.isfinite(np.delete(back, 4, axis=0)).all()
    largest = np.repeat(np.abs(x).reshape(40, 8, 32).max(-1), 32, axis=1)
    normal = (largest / 127 > 2**-14) & ~np.isnan(largest) & ~np.isnan(back)
    assert (np.abs(back - x)[normal] <= largest[normal] / 127 * (0.5 + 127 * 2**-11)).all()
    with pytest.raises(ValueError, match="Q4_0"):
        testing.narrow(isa, "Q4_0", x.reshape(-1))


@pytest.mark.parametrize("isa", ISAS)
def test_weighted_sum_of_q8_0(isa: str) -> None:
    """The bits of the same sum over the rows widened."""
    rng = np.random.default_rng(1)
    for m, n, d in ((1, 1, 32), (3, 70, 64), (9, 33, 512), (8, 5, 2080)):
        p = rng.normal(size=(m, n)).astype(np.float32)
        rows, start = random_rows("Q8_0", n, d), rng.normal(size=(m, d)).astype(np.float32)
        plain = testing.weighted_sum(isa, "F32", p, reference("Q8_0", rows), start)
        assert same_bits(testing.weighted_sum(isa, "Q8_0", p, rows, start), plain)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", [name for name in FORMATS if block_of(name)[0] == 32])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_hear_its_neighbour(name: str, isa: str, m: int) -> None:
    """Decode reads the end of a row together with the next one's beginning: what is infinite there must not matter."""
    rows = random_rows(name, 17, 96, seed=2)
    x = testing.quantize_rows(isa, np.random.default_rng(m).normal(size=(m, 96)).astype(np.float32))
    plain = testing.matmul_int8(isa, name, x, m, rows)
    rows[[2, 12], :2] = 0xFF if name == "MXFP4" else [0x00, 0x7C]  # the scale's bytes: 2^127, infinity
    loud = testing.matmul_int8(isa, name, x, m, rows)
    quiet = np.delete(np.arange(17), [2, 12])
    assert same_bits(loud[:, quiet], plain[:, quiet])
    assert not same_bits(loud[:, 2], plain[:, 2])
