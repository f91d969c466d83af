# SPDX-License-Identifier: Apache-2.0
"""A read-only memory mapping of a whole file that detects changes of the file.

Reading a mapping beyond the end of a file that shrank would kill the process. `check` detects that before reading. If
the file shrinks in between, the guarded mapping (csrc/base/guard.h) gives zeros, and the check after reading detects
it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gemma4 import _engine
from gemma4.errors import FormatError, StateError
from gemma4.files import check_no_pointer, open_regular


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: `offset` in bytes from the start of the file, `nbytes` long; `shape` in NumPy's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _map_of(fd: int, path: Path) -> mmap.mmap:
    """The whole file, mapped. Raises MemoryError if the process may not have that much address space, OSError."""
    try:
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{path} cannot be mapped: {error.strerror}") from None
        raise


class MappedFile(ABC):
    """One mapped file of a format known to subclasses: `_parse`, called once it is mapped, fills `tensors`.

    `kind` and `least` (bytes of the smallest such file) are for the message on files that are too short.
    Raises FileNotFoundError/OSError (cannot be opened), FormatError (a pipe, a device, too short, or whatever `_parse`
    finds).
    """

    kind = "data"
    least = 1
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if sys.byteorder != "little":
            raise NotImplementedError(
                f"{self.kind} data is little-endian and used in place; this machine is big-endian"
            )
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._guarded: _engine.GuardedMap | None = None
        self._fd = open_regular(self.path)
        try:
            self._stat = os.fstat(self._fd)
            check_no_pointer(os.pread(self._fd, 64, 0) if hasattr(os, "pread") else b"", self.path)
            if self.nbytes < self.least:
                need = f"{self.nbytes} bytes, at least {self.least} are needed"
                raise FormatError(f"{self.path} is not a {self.kind} file: {need}")
            self._map = _map_of(self._fd, self.path)
            self._guarded = _engine.GuardedMap(self._map)
            self._advise("MADV_HUGEPAGE", 0, self.nbytes)
            self._parse()
            self._check_same("while it was being opened")
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _parse(self) -> None: ...

    @abstractmethod
    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapping."""

    @property
    def buffer(self) -> mmap.mmap:
        """The whole file, to read from at once. Raises StateError if it is closed."""
        if self._map is None:
            raise StateError(f"{self.path} is closed")
        return self._map

    @property
    def view(self) -> _engine.GuardedMap:
        """The whole file as a read-only buffer that arrays may keep; it stays guarded as long as one does. Raises
        StateError if it is closed."""
        if self._guarded is None:
            raise StateError(f"{self.path} is closed")
        return self._guarded

    @property
    def nbytes(self) -> int:
        return self._stat.st_size

    @property
    def stamp(self) -> tuple[int, int, int, int]:
        """Which file was opened, and in which state: device, inode, size and time of its last change."""
        return self._stat.st_dev, self._stat.st_ino, self._stat.st_size, self._stat.st_mtime_ns

    def advise_random(self, name: str) -> None:
        """Advise the system that this tensor is read row by row in random order, so that it does not read ahead."""
        info = self.tensors[name]
        for advice in ("MADV_RANDOM", "MADV_NOHUGEPAGE"):
            self._advise(advice, info.offset, info.offset + info.nbytes)

    def advise_whole(self, name: str) -> None:
        """Undo `advise_random`: all of this tensor is read now."""
        info = self.tensors[name]
        for advice in ("MADV_NORMAL", "MADV_HUGEPAGE"):
            self._advise(advice, info.offset, info.offset + info.nbytes)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        """Advise the system about the whole pages in [start, stop), where such advice exists; without it reading is
        slower."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        n_bytes = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if n_bytes > 0 and hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # EINVAL: a kernel built without
                self.buffer.madvise(getattr(mmap, advice), first, n_bytes)

    def check(self) -> None:
        """Raise FormatError if the file has shrunk, been overwritten or replaced since it was opened (reading the
        mapping past the file's end gives zeros), StateError if it is closed. Three system calls."""
        if self._map is None:
            raise StateError(f"{self.path} is closed")
        self._check_same("since it was loaded")
        try:
            now = os.stat(self.path)
        except OSError:
            return  # deleted or moved: the mapping keeps the old file alive
        if (now.st_dev, now.st_ino) != (self._stat.st_dev, self._stat.st_ino):
            raise FormatError(f"{self.path} was replaced by another file since it was loaded; load it again")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """`with file.reading():` around code that reads: `check` before and after it, so that nothing of a file that
        changed meanwhile is used."""
        self.check()
        yield
        self.check()

    def _check_same(self, when: str) -> None:
        now = os.fstat(self._fd)
        if now.st_size != self._stat.st_size:
            size = f"from {self._stat.st_size} to {now.st_size} bytes"
            raise FormatError(f"{self.path} changed size {when}, {size}; load it again")
        if now.st_mtime_ns != self._stat.st_mtime_ns:
            raise FormatError(f"{self.path} was written to {when}; load it again")
        if self.view.is_torn():
            raise FormatError(f"{self.path} lost a part {when}, which it may have again; load it again")

    def close(self) -> None:
        """Release the file. Arrays still held keep the mapping alive until they are freed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        mapped, self._map, self._guarded = self._map, None, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # views exist: the file is unmapped when the last one is freed
                mapped.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
