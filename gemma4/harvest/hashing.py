# SPDX-License-Identifier: Apache-2.0
"""Digests of large files and tensors, several at once, which end soon after Ctrl-C."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from gemma4.files import open_regular

Item = TypeVar("Item")
Result = TypeVar("Result")
Going: TypeAlias = Callable[[], None]

_CHUNK = 1 << 20  # bytes hashed between two looks at whether to go on


@dataclass(frozen=True, slots=True)
class FileFacts:
    """n_bytes and the sha256 of a file."""

    n_bytes: int
    sha256: str


class _Stopped(Exception):
    """The caller was interrupted and waits for the threads to end."""


def _always() -> None:
    """In the main thread, which Ctrl-C interrupts between two chunks."""


def facts_of(path: Path, going: Going = _always) -> FileFacts:
    """Raises FormatError (no regular file), OSError, and what `going` raises, which is called for every chunk."""
    with open(open_regular(path), "rb") as file:
        return FileFacts(os.fstat(file.fileno()).st_size, _digest(file, going))


def _digest(file: IO[bytes], going: Going) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        going()
        digest.update(chunk)
    return digest.hexdigest()


def update(digest: Any, data: memoryview, going: Going = _always) -> None:
    """Add bytes to a digest of hashlib's. Raises what `going` raises, which is called for every chunk."""
    for begin in range(0, len(data), _CHUNK):
        going()
        digest.update(data[begin : begin + _CHUNK])


def each(work: Callable[[Item, Going], Result], items: Iterable[Item]) -> list[Result]:
    """work(item, going) of every item, by some threads. If one raises, or this thread does (Ctrl-C), all end soon."""
    stopped = threading.Event()

    def going() -> None:
        if stopped.is_set():
            raise _Stopped

    def one(item: Item) -> Result:
        return work(item, going)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(one, items))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
