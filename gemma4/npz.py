# SPDX-License-Identifier: Apache-2.0
"""Arrays of an untrusted .npz file, each checked by name, size, type and byte order before it is read.

Only the format of `np.savez` is read: a ZIP file without a comment, whose entries are stored uncompressed. So nothing
can unpack to more than the file's size, and unread entries cost nothing.
"""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gemma4.errors import FormatError
from gemma4.files import StrPath, open_regular

_MAX_DIRECTORY = 1 << 20  # bytes of the list of entries: a sequence of 1,000 layers has 150,000
_END = struct.Struct("<4s4H2IH")  # a ZIP file's end: signature, disks, entries, size and place of their list, comment
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_LOCAL = struct.Struct("<4s5H3I2H")  # the header before an entry's data: …, lengths of its name and extra field
# the exceptions of the standard library's reader for a damaged file
_DAMAGED = (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, OSError, RuntimeError, MemoryError,
            SyntaxError, OverflowError, struct.error, tokenize.TokenError)  # fmt: skip


class Located(NamedTuple):
    """An array in the file: `n_bytes` from `offset` on; in_columns: the order is Fortran's."""

    offset: int
    n_bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    in_columns: bool


class NpzFile:
    """An open .npz file; a context manager. `names` are those of its arrays.

    Raises FormatError (no such file, or damaged), OSError (it cannot be opened).
    """

    def __init__(self, path: StrPath) -> None:
        self._file = open(open_regular(path), "rb")  # noqa: SIM115  closed by close()
        try:
            _check_directory(self._file)
            self._zip = zipfile.ZipFile(self._file)
            entries = [info.filename for info in self._zip.infolist()]
        except _DAMAGED as error:
            self._file.close()
            raise FormatError(f"no .npz file, or damaged: {error}") from None
        self.names = [entry.removesuffix(".npy") for entry in entries]

    def read(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """A read-only array. Raises FormatError unless it is there, little-endian, of this type and shape."""
        expected = np.dtype(dtype).newbyteorder("<")
        try:
            info = self._info(name)
            with self._zip.open(info) as entry:
                found_shape, in_columns, found = _read_header(entry)
                if found != expected or in_columns or found_shape != shape:
                    order = " in columns" if in_columns else ""
                    raise FormatError(f"{name} is {found.str} {found_shape}{order}, expected {expected.str} {shape}")
                n_data = expected.itemsize * int(np.prod(shape, dtype=object))
                if info.file_size - entry.tell() != n_data:
                    raise FormatError(f"{name} has {info.file_size - entry.tell()} bytes of data, expected {n_data}")
                return np.frombuffer(_read_all(entry, n_data), expected).reshape(shape)
        except FormatError:
            raise
        except _DAMAGED as error:
            raise FormatError(f"{name} is damaged: {error}") from None

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The bytes of an array of uint8 [n], n <= limit. Raises FormatError as `read`."""
        info = self._info(name)
        if info.file_size > limit:
            raise FormatError(f"{name} has {info.file_size:,} bytes, the limit is {limit:,}")
        try:
            with self._zip.open(info) as entry:
                shape, _, found = _read_header(entry)
        except FormatError:
            raise
        except _DAMAGED as error:
            raise FormatError(f"{name} is damaged: {error}") from None
        if len(shape) != 1 or found != np.uint8:
            raise FormatError(f"{name} is {found.str} {shape}, expected bytes")
        return self.read(name, np.uint8, shape).tobytes()

    def locate(self, name: str) -> Located:
        """The place of an array in the file, to be mapped; its bytes are not read. Raises FormatError as `read`."""
        info = self._info(name)
        try:
            self._file.seek(info.header_offset)
            *_, n_name, n_extra = _LOCAL.unpack(self._file.read(_LOCAL.size))
            with self._zip.open(info) as entry:
                shape, in_columns, dtype = _read_header(entry)
                n_header = entry.tell()
        except FormatError:
            raise
        except _DAMAGED as error:
            raise FormatError(f"{name} is damaged: {error}") from None
        if dtype.kind not in "biuf" or min(shape, default=0) < 0:
            raise FormatError(f"{name} is {dtype.str} {str(shape)[:80]}, expected numbers")
        n_data = dtype.itemsize * int(np.prod(shape, dtype=object))
        if info.file_size - n_header != n_data:
            found = f"{info.file_size - n_header} bytes of {dtype.str} {shape}"
            raise FormatError(f"{name} has {found}, expected {n_data} bytes")
        offset = info.header_offset + _LOCAL.size + n_name + n_extra + n_header
        return Located(offset, n_data, dtype, shape, in_columns)

    def close(self) -> None:
        self._zip.close()
        self._file.close()

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, name: str) -> zipfile.ZipInfo:
        try:
            info = self._zip.getinfo(f"{name}.npy")
        except KeyError:
            raise FormatError(f"there is no {name}") from None
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise FormatError(f"{name} is compressed, which no array of such a file is")
        return info


def _read_header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, type."""
    if np.lib.format.read_magic(entry) != (1, 0):
        raise FormatError("an array of another version than 1.0")
    return np.lib.format.read_array_header_1_0(entry)


def _read_all(entry: IO[bytes], n_bytes: int) -> bytes:
    """To the end, where the checksum is compared. Raises EOFError."""
    data = entry.read(n_bytes)
    if len(data) != n_bytes or entry.read(1):
        raise EOFError(f"{len(data)} bytes, expected {n_bytes}")
    return data


def _check_directory(file: IO[bytes]) -> None:
    """Raise FormatError if the list of entries is too long to be read."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _END.size - _LOCATOR.size - _END64.size))
    tail = file.read()
    if len(tail) < _END.size:
        raise FormatError(f"it has {size} bytes")
    signature, *_, n_bytes, _, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\x05\x06" or comment:
        raise FormatError("it does not end as a ZIP file without a comment")
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator.startswith(b"PK\x06\x07"):
        wide = tail[: _END64.size]
        if len(tail) < _END.size + _LOCATOR.size + _END64.size or not wide.startswith(b"PK\x06\x06"):
            raise FormatError("its end is damaged")
        n_bytes = _END64.unpack(wide)[-2]
    if n_bytes > _MAX_DIRECTORY:
        raise FormatError(f"its list of entries has {n_bytes:,} bytes, the limit is {_MAX_DIRECTORY:,}")
