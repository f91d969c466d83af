# SPDX-License-Identifier: Apache-2.0
"""The engine's encoder of dictionaries against its stated arithmetic, to the bit, in every layout of the weights."""

import hashlib
import os
import subprocess
import sys
import threading
import zlib

import ml_dtypes
import numpy as np
import pytest

import gemma4
from gemma4 import FormatError, _engine
from gemma4._engine import testing
from gemma4.dictionaries.features import Features
from gemma4.dictionaries.weights import TopK, Weights

ONE, THREE = _engine.Threads(1), _engine.Threads(3)
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
STEPS = ("before", "scale", "after", "gate", "threshold")


def generator(*key):
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def at_offset(array, offset):
    """The same matrix, `offset` bytes past an aligned address, with a gap after each row."""
    rows, columns = array.shape
    stride = (columns + 3) * array.itemsize
    buffer = np.zeros(rows * stride + 64, np.uint8)
    flat = buffer[offset : offset + rows * stride].view(array.dtype) if offset % array.itemsize == 0 else None
    if flat is not None:
        view = flat.reshape(rows, columns + 3)[:, :columns]
    else:
        view = np.ndarray((rows, columns), array.dtype, buffer.data, offset, (stride, array.itemsize))
    view[...] = array
    return view


def encoder(w, dtype="F32", inputs_first=True, threads=ONE, offset=0, **steps):
    """w: float32 [inputs, features]."""
    typed = w.astype(TYPES[dtype])
    raw = np.ascontiguousarray(typed if inputs_first else typed.T)
    raw = raw.view(np.uint16) if dtype == "BF16" else raw
    return _engine.FeatureEncoder(threads, dtype, at_offset(raw, offset), inputs_first, **steps)


def expected(x, w, k=0, **steps):
    """The stated order: a sum over the inputs, one fma each, by the scalar kernel; then float32 steps."""
    n = w.shape[1]
    padded = np.zeros((len(w), -(-n // 16) * 16), np.float32)
    padded[:, :n] = w
    panels = (np.ascontiguousarray(padded[:, j : j + 16]) for j in range(0, padded.shape[1], 16))
    raw = np.concatenate([testing.matmul_panel("scalar", x, panel, 16, None) for panel in panels], axis=1)[:, :n]
    value = raw
    if "before" in steps:
        value = value + steps["before"]
    if "scale" in steps:
        value = value * steps["scale"]
    if "after" in steps:
        value = value + steps["after"]
    fires = value > np.maximum(steps.get("threshold", np.float32(0)), 0)
    if "gate" in steps:
        fires &= raw + steps["gate"] > 0
    dense = np.where(fires, value, 0)
    if k:
        order = np.lexsort((np.broadcast_to(np.arange(n), dense.shape), -dense), axis=1)
        kept = np.zeros_like(dense)
        np.put_along_axis(kept, order[:, :k], np.take_along_axis(dense, order[:, :k], axis=1), axis=1)
        dense = kept
    return dense


def dense_of(found, n):
    features = Features(*found, n)
    assert features.offsets.dtype == np.int64 and features.ids.dtype == np.int32
    for ids, values in features:
        assert (np.diff(ids) > 0).all() and (values > 0).all()
    return features.dense()


def same(a, b):
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


SIZES = [(1, 1, 1), (1, 7, 3), (3, 24, 130), (8, 33, 1027), (9, 33, 1027), (25, 300, 70), (2, 1153, 65), (60, 2400, 80)]


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("inputs_first", [True, False])
def test_every_layout(dtype, inputs_first):
    """Odd sizes, any address, gaps between rows, one thread or three."""
    for m, d, n in SIZES:
        rng = generator("layout", m, d, n)
        x = rng.standard_normal((m, d), dtype=np.float32)
        w = rng.standard_normal((d, n), dtype=np.float32).astype(TYPES[dtype]).astype(np.float32)
        steps = {"before": rng.standard_normal(n, dtype=np.float32)}
        wanted = expected(x, w, **steps)
        for offset, threads in ((0, ONE), (0, THREE), (4, THREE), (1, ONE), (3, THREE)):
            found = encoder(w, dtype, inputs_first, threads, offset, **steps).encode(x)
            same(dense_of(found, n), wanted)


@pytest.mark.parametrize("used", [(), ("before", "threshold"), ("before", "scale"), ("scale", "after", "gate"), STEPS])
@pytest.mark.parametrize("k", [0, 1, 5, 200])
def test_steps(used, k):
    rng = generator(used, k)
    x, w = rng.standard_normal((19, 40), dtype=np.float32), rng.standard_normal((40, 200), dtype=np.float32)
    steps = {name: rng.standard_normal(200, dtype=np.float32) * 3 for name in used}
    if "threshold" in steps:
        steps["threshold"] = np.abs(steps["threshold"])
        steps["threshold"][:5] = np.inf
    wanted = expected(x, w, k, **steps)
    for inputs_first in (True, False):
        made = encoder(w, "F32", inputs_first, THREE, k=k, **steps)
        same(dense_of(made.encode(x), 200), wanted)
        same(dense_of(made.encode(x[:2]), 200), wanted[:2])
        if not k:
            same(dense_of(made.encode(x, 70, 90), 200)[:, 70:160], wanted[:, 70:160])


def test_equal_values_go_to_the_lowest_ids():
    """Thousands of ties over all tasks and threads; the same k each time."""
    w = np.tile(np.float32([[3, 1, 2, 3]]), (1, 500))
    made = encoder(w, threads=THREE, k=700)
    for m in (1, 30):
        for _ in range(5):
            offsets, ids, values = made.encode(np.ones((m, 1), np.float32))
            best = np.sort(np.concatenate([np.arange(0, 700 * 2, 4), np.arange(3, 700 * 2, 4)]))[:700]
            np.testing.assert_array_equal(ids.reshape(m, 700), np.broadcast_to(best, (m, 700)))
            assert (values == 3).all() and (np.diff(offsets) == 700).all()


def test_rows_where_nothing_fires():
    x = np.float32([[1], [-1], [0], [2]])
    for k in (0, 2):
        offsets, ids, values = encoder(np.ones((1, 3), np.float32), threads=THREE, k=k).encode(x)
        n = k or 3
        assert offsets.tolist() == [0, n, n, n, 2 * n] and ids.tolist() == [*range(n)] * 2 and len(values) == 2 * n
    offsets, ids, _ = encoder(np.ones((1, 3), np.float32)).encode(x[:0])
    assert offsets.tolist() == [0] and not len(ids)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("k", [0, 3])
def test_numbers_that_are_not_finite(bad, k):
    rng = generator("bad")
    w = rng.standard_normal((20, 2000), dtype=np.float32)
    w[3, 1500] = bad
    for inputs_first, m, first, last in ((True, 30, 1472, 1535), (False, 2, 1472, 1535), (True, 2, 1024, 1999)):
        made = encoder(w, inputs_first=inputs_first, threads=THREE, k=k)
        with pytest.raises(FormatError, match=f"features {first} to {last}$"):
            made.encode(rng.standard_normal((m, 20), dtype=np.float32))
        assert made.encode(rng.standard_normal((m, 20), dtype=np.float32), 0, 1000)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize(
    ("raw", "steps"),
    [
        (2e38, {"before": 3e38}),
        (-2e38, {"before": -3e38}),
        (2e38, {"scale": 2}),
        (2e38, {"before": 1, "scale": -2}),
        (2e38, {"scale": 1, "after": 3e38}),
        (2e38, {"scale": 4, "gate": -3e38}),
        (1, {"scale": np.inf}),
        (1, {"scale": np.nan}),
    ],
)
def test_values_that_are_not_finite(raw, steps, k):
    """The pre-activation is finite, the value is not: whether it would fire or not, it is refused."""
    n = 200
    vectors = {name: np.full(n, name == "scale", np.float32) for name in steps}  # steps that change nothing
    for name, value in steps.items():
        vectors[name][70] = value
    w = np.ones((1, n), np.float32)
    w[0, 70] = raw
    for m in (2, 30):
        made = encoder(w, threads=THREE, k=k, **vectors)
        with pytest.raises(FormatError, match="NaN or infinities for features"):
            made.encode(np.ones((m, 1), np.float32))
        made.encode(np.ones((m, 1), np.float32), 71, 100)


PROBE = """
import hashlib, numpy as np
from gemma4 import _engine
rng = np.random.default_rng(5)
digest = hashlib.sha256()
for k in (0, 4):
    for m, d, n in ((3, 50, 1100), (31, 77, 300)):
        x, w = rng.standard_normal((m, d), dtype=np.float32), rng.standard_normal((d, n), dtype=np.float32)
        b = rng.standard_normal(n, dtype=np.float32)
        steps = {"before": b, "scale": abs(b), "gate": b, "threshold": abs(b)}
        made = _engine.FeatureEncoder(_engine.Threads(2), "F32", w, True, **steps, k=k)
        for array in made.encode(x):
            digest.update(array.tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    found = {}
    for isa in gemma4.cpu_info()["available"]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE],
            env=os.environ | {"GEMMA4_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        found[isa] = done.stdout
    assert len(set(found.values())) == 1 and len(found["scalar"]) > 60, found


def test_a_row_does_not_depend_on_the_others():
    rng = generator("rows")
    x, w = rng.standard_normal((600, 30), dtype=np.float32), rng.standard_normal((30, 900), dtype=np.float32)
    for k in (0, 7):
        made = encoder(w, threads=THREE, k=k)
        whole = dense_of(made.encode(x), 900)
        for part in (slice(0, 1), slice(17, 25), slice(30, 300)):
            same(dense_of(made.encode(x[part]), 900), whole[part])


def test_threads_share_an_encoder():
    rng = generator("share")
    x, w = rng.standard_normal((40, 60), dtype=np.float32), rng.standard_normal((60, 3000), dtype=np.float32)
    made, found = encoder(w, threads=THREE, k=9), []
    wanted = hashlib.sha256(b"".join(array.tobytes() for array in made.encode(x))).hexdigest()

    def work():
        for _ in range(10):
            found.append(hashlib.sha256(b"".join(array.tobytes() for array in made.encode(x))).hexdigest())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 40 and set(found) == {wanted}


def test_a_large_k_takes_rows_in_parts():
    """So that what all workers keep of them stays small; and weights of float64 are converted."""
    rng = generator("large")
    n, d = 150_000, 2
    w = rng.standard_normal((d, n))
    weights = Weights(w, np.zeros((n, d), np.float32), np.zeros(d, np.float32), TopK(np.zeros(n, np.float32), n))
    x = rng.standard_normal((30, d), dtype=np.float32)
    features = weights.encode(x)
    same(features.dense(), expected(x, w.astype(np.float32)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dtype": "Q8_0"}, ValueError),
        ({"dtype": "BF16"}, ValueError),
        ({"weights": np.zeros((3, 4, 5), np.float32)}, ValueError),
        ({"weights": np.zeros((3, 8), np.float32)[:, ::2]}, ValueError),
        ({"weights": np.zeros((0, 8), np.float32)}, ValueError),
        ({"weights": np.broadcast_to(np.float32(1), (3, 8))}, ValueError),
        ({"threads": None}, TypeError),
        ({"before": np.zeros(7, np.float32)}, ValueError),
        ({"gate": np.zeros(8)}, ValueError),
        ({"k": -1}, ValueError),
        ({"k": 9}, ValueError),
    ],
)
def test_bad_arguments(change, error):
    good = {"threads": ONE, "dtype": "F32", "weights": np.ones((3, 8), np.float32), "inputs_first": True}
    _engine.FeatureEncoder(**good)
    with pytest.raises(error):
        _engine.FeatureEncoder(**(good | change))


@pytest.mark.parametrize(
    "arguments",
    [
        (np.ones((2, 4), np.float32),),
        (np.ones((2, 3)),),
        (np.ones((2, 6), np.float32)[:, ::2],),
        (np.ones((2, 3), np.float32), -1),
        (np.ones((2, 3), np.float32), 9),
        (np.ones((2, 3), np.float32), 3, 6),
        (np.ones((2, 3), np.float32), 2**31 - 1, 5),
    ],
)
def test_bad_input(arguments):
    made = encoder(np.ones((3, 8), np.float32))
    with pytest.raises((ValueError, TypeError)):
        made.encode(*arguments)


def test_bad_threads():
    for n in (-1, 5000):
        with pytest.raises(ValueError, match="threads"):
            _engine.Threads(n)
    assert _engine.Threads(2).n == 2 and _engine.Threads().n >= 1
