# SPDX-License-Identifier: Apache-2.0
"""An unquantised checkpoint -> a GGUF file."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemma4 import _engine, checks
from gemma4.errors import FormatError
from gemma4.files import check_output, new_file
from gemma4.load import open_checkpoint
from gemma4.load.checkpoint import Checkpoint, EngineTensor
from gemma4.load.dtypes import is_quantised, stored_rows
from gemma4.load.gguf_config import architecture_of
from gemma4.load.mapped import TensorInfo
from gemma4.quantization.codec import pack_rows, unpack_rows
from gemma4.quantization.gguf_file import head, laid_out
from gemma4.quantization.metadata import check, made_tensors, metadata
from gemma4.quantization.plan import KINDS, Planned, checked_type, plan
from gemma4.quantization.result import QuantizationResult, WrittenTensor

Progress = Callable[[int, int, str], None]  # bytes written, bytes in all, tensor
_SLICE = 1 << 18  # elements that a thread packs at a time: its working set stays in its caches


class _Packed(NamedTuple):
    data: bytes
    square_error: float
    square_sum: float


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    type: str,
    overrides: Mapping[str, str] | None = None,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Write the text decoder of an unquantised checkpoint as a GGUF file that this package and llama.cpp read.

        result = gemma4.quantize("/models/gemma-4-E2B-it", "e2b-Q4_K_M.gguf", type="Q4_K_M")
        print(result)  # per type: tensors, size, bits per weight, error

    source     anything `gemma4.load` takes
    out        path of the file; it appears under this name only when complete, and after an error nothing is left
    type       one for all matrices (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4)
               or a mix of llama-quantize (Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M). Norms, scales and the router are F32.
               Tensors whose rows are not a multiple of a type's block size get another type: see the result's `notes`
    overrides  {tensor: type}, e.g. {"per_layer_token_embd": "Q8_0", "blk.0.*": "Q6_K"}: GGUF names or globs, with or
               without "blk.N." and ".weight"; of several that apply, the last [none]
    force      replace a file that exists [False]
    threads    0 = the CPUs this process may use
    progress   function (bytes written, bytes in all, tensor), called during the work [none]

    Memory stays within some tens of MB besides the source's mapped pages.

    Raises ValueError (unknown type, threads below 0, an override that applies to nothing, a source that is quantised
    already), FileExistsError, FileNotFoundError (source, or the folder of `out`), FormatError (a damaged source, or
    values that the type cannot hold), NotImplementedError (what GGUF cannot say), OSError (the disk is full, …).
    """
    kind, path = checked_type(type, KINDS), Path(checks.path("out", out))
    overrides = checks.texts("overrides", overrides or {})
    threads = checks.integer("threads", threads, 0, checks.MAX_THREADS)
    with open_checkpoint(source) as checkpoint:
        check_output(path, force=force, inputs=checkpoint.inputs)
        _check_source(checkpoint)
        planned, notes = plan(checkpoint, kind, overrides)
        made = made_tensors(checkpoint.config)
        entries = [(t.name, t.dtype, t.shape) for t in planned]
        infos = laid_out([*entries, *((name, "F32", values.shape) for name, values in made.items())])
        with checkpoint.reading():
            table = metadata(checkpoint, kind)
            check(table, infos, checkpoint.config, str(checkpoint.path))
            start = head(table, infos)
        total = len(start) + infos[-1].offset + infos[-1].nbytes
        with new_file(path, force=force, inputs=checkpoint.inputs, n_bytes=total) as file:
            file.write(start)
            written = _write_tensors(file, checkpoint, planned, infos, threads, _scaled(progress, len(start), total))
    return QuantizationResult(path, total, tuple(written), tuple(notes))


def _check_source(checkpoint: Checkpoint) -> None:
    if architecture_of(checkpoint.config) is None:
        found = checkpoint.config.model_type
        raise NotImplementedError(f"{checkpoint.path} is a {found}: only Gemma 2, 3 and 4 can be written as GGUF")
    found = sorted(filter(is_quantised, checkpoint.dtypes))
    if found:
        raise ValueError(
            f"{checkpoint.path} is quantised already ({', '.join(found)}): start from the unquantised model, as errors "
            "would add up"
        )


def _scaled(progress: Progress | None, start: int, total: int) -> Progress:
    """From bytes of data to bytes of the file."""

    def report(done: int, _: int, name: str) -> None:
        if progress:
            progress(start + done, total, name)

    return report


def _write_tensors(
    file: IO[bytes],
    checkpoint: Checkpoint,
    planned: list[Planned],
    infos: list[TensorInfo],
    threads: int,
    progress: Progress,
) -> list[WrittenTensor]:
    written: list[WrittenTensor] = []
    end = 0  # of the last tensor
    total, n_threads = infos[-1].offset + infos[-1].nbytes, threads or _engine.cpu_info()["threads"]
    pool = ThreadPoolExecutor(n_threads, "quantize")
    try:
        for tensor, info in zip(planned, infos, strict=False):
            file.write(bytes(info.offset - end))
            error, square, done = 0.0, 0.0, 0
            with checkpoint.reading():
                for packed in _packed(pool, 2 * n_threads, tensor, checkpoint.engine_tensors[tensor.source]):
                    file.write(packed.data)
                    error, square = error + packed.square_error, square + packed.square_sum
                    done += len(packed.data)
                    progress(info.offset + done, total, tensor.name)
            end = info.offset + info.nbytes
            written.append(WrittenTensor(info.name, info.dtype, math.prod(info.shape), info.nbytes, error, square))
    finally:
        pool.shutdown(cancel_futures=True)
    for (name, values), info in zip(made_tensors(checkpoint.config).items(), infos[len(planned) :], strict=True):
        file.write(bytes(info.offset - end) + values.tobytes())
        end = info.offset + info.nbytes
        written.append(WrittenTensor(name, "F32", values.size, values.nbytes, 0.0, 0.0))
        progress(total, total, name)
    return written


def _packed(pool: ThreadPoolExecutor, ahead: int, tensor: Planned, stored: EngineTensor) -> Iterator[_Packed]:
    """A tensor's bytes in order, a slice of rows at a time, at most `ahead` slices in flight."""
    width = tensor.shape[-1]
    rows = stored_rows(*stored).reshape(-1, width)
    step = max(1, _SLICE // width)
    jobs = (lambda at=at: _pack(rows[at : at + step], stored[0], tensor) for at in range(0, len(rows), step))
    yield from _in_order(pool, ahead, jobs)


def _in_order(pool: ThreadPoolExecutor, ahead: int, jobs: Iterable[Callable[[], _Packed]]) -> Iterator[_Packed]:
    waiting: deque[Future[_Packed]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pack(rows: NDArray[Any], source: str, tensor: Planned) -> _Packed:
    values = rows.astype(np.float32)
    if tensor.plus_one:
        values = values + np.float32(1)
    elif source == tensor.dtype:
        return _Packed(rows.tobytes(), 0.0, _square_sum(values))
    packed = pack_rows(tensor.dtype, values)
    with np.errstate(invalid="ignore", over="ignore"):
        error = _square_sum(unpack_rows(tensor.dtype, packed, values.shape[1]) - values)
    if not math.isfinite(error):
        raise FormatError(f"{tensor.name} holds values that {tensor.dtype} has no room for{_extreme(values)}")
    return _Packed(packed.tobytes(), error, _square_sum(values))


def _square_sum(values: NDArray[np.float32]) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _extreme(values: NDArray[np.float32]) -> str:
    return f", up to {np.abs(values).max():g}" if np.isfinite(values).all() else ": infinite ones, or NaN"
