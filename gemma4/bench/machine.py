# SPDX-License-Identifier: Apache-2.0
"""The ground of every measurement: the clock, the machine's limits, a model that is opened, token ids."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine
from gemma4.model import Model, Precision, load
from gemma4.profile import Limits
from gemma4.sequence import KVDtype

READ_FLOATS = 1 << 26  # 256 MiB: more than any last-level cache of a desktop
LIMIT_SECONDS, MAX_PASSES = 0.25, 30

I32: TypeAlias = NDArray[np.int32]


def machine_text(limits: Limits) -> str:
    """The limits as text."""
    return (
        f"reads {limits.read_bytes / 1e9:.1f} GB/s, computes {limits.f32_work / 1e9:.0f} GFLOP/s in float32, "
        f"{limits.int8_work / 1e9:.0f} Gop/s in bytes, {limits.int16_work / 1e9:.0f} in 16 bits"
        f"{f', {limits.bf16_work / 1e9:.0f} in bfloat16' if limits.bf16_work else ''} (measured)"
    )


def measure_limits(threads: int) -> Limits:
    """Read bandwidth and peak arithmetic of `threads` threads, each the best of a quarter of a second's passes."""
    array = np.ones(READ_FLOATS, np.float32)
    reading = _best(lambda: _engine.read_rate(array, threads)[0])
    kinds = ("f32", "int8", "int16", "bf16")
    return Limits(reading, *(_best(lambda kind=kind: _engine.arithmetic_rate(kind, threads)) for kind in kinds))


def _best(rate: Callable[[], float]) -> float:
    end, best = time.perf_counter() + LIMIT_SECONDS, 0.0
    for _ in range(MAX_PASSES):
        best = max(best, rate())
        if time.perf_counter() > end:
            break
    return best


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def opened(
    name_or_path: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    threads: int = 0,
    precision: Precision | None = None,
    kv_dtype: KVDtype | None = None,
) -> tuple[Model, float]:
    """A model and the seconds that `gemma4.load` took. Raises what that raises."""
    start = time.perf_counter()
    model = load(name_or_path, mmproj=mmproj, threads=threads, precision=precision, kv_dtype=kv_dtype)
    return model, time.perf_counter() - start


def how_text(model: Model) -> str:
    """The arithmetic that a model was loaded for, as text."""
    engine = model.engine
    return f"{engine.isa}, {engine.threads} threads, precision {engine.precision}, KV {model.kv_dtype}"


def random_ids(model: Model, n: int) -> I32:
    """Token ids from the middle of the vocabulary; the timings do not depend on them."""
    return np.random.default_rng(0).integers(model.n_token_ids // 4, model.n_token_ids, n).astype(np.int32)
