# SPDX-License-Identifier: Apache-2.0
"""Sources of media: a path or the bytes of a file, its name in errors, and the optional decoders."""

from __future__ import annotations

import errno
import importlib
import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeGuard

from gemma4.errors import FormatError

FileLike: TypeAlias = str | os.PathLike[str] | bytes  # and bytes-like objects
_BYTES = (bytes, bytearray, memoryview)
_FILES = {"audio": "sound"}
_PACKAGES = {"PIL": "Pillow", "av": "PyAV", "pillow_heif": "pillow-heif"}
_EXTRAS = {"pillow_heif": "heic", "xarray": "xarray", "pyarrow": "harvest", "zarr": "harvest", "ray": "ray"}
_LONGEST_NAME = 200  # characters of a path in a message; a file's text given for its path is longer


def require(module: str) -> Any:
    """An optional module.

    Raises ImportError that says which package is missing and the extra that brings it, MemoryError (its library cannot
    be mapped).
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if "failed to map segment" in str(error):
            raise MemoryError(f"{module} cannot be loaded: {error}") from error
        name = module.partition(".")[0]
        package, extra = _PACKAGES.get(name, name), _EXTRAS.get(name, "media")
        raise ImportError(f'this needs {package} ({error}): pip install "gemma4[{extra}]"') from error


def is_file(source: object) -> TypeGuard[FileLike]:
    """Whether source is a path or the bytes of a file, not an array or a decoder's object."""
    return isinstance(source, (str, os.PathLike, *_BYTES))


def _is_path(source: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(source, str | os.PathLike)


def _is_bytes(source: object) -> TypeGuard[bytes]:
    return isinstance(source, _BYTES)


def name_of(source: object, kind: str) -> str:
    """Its name in errors: the path, or "the image" with its size where there is no name."""
    if _is_path(source):
        name = os.fspath(source)
        return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}… ({len(name)} characters)"
    if _is_bytes(source):
        return f"the {kind} ({len(source)} bytes)"
    return f"the {kind}"


def open_source(source: FileLike, kind: str) -> BinaryIO:
    """A file object over a path or bytes.

    Raises OSError (no such file), FormatError (empty, or no regular file: a FIFO or a device may never end), ValueError
    (a URL).
    """
    if isinstance(source, _BYTES):
        if not len(source):
            raise FormatError(f"the {kind} is empty: 0 bytes")
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{source[:80]}: the {kind} must be a file's path or bytes; nothing is fetched from the net")
    path, name = Path(source), name_of(source, kind)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in the path
        raise FileNotFoundError(errno.ENOENT, f"No such {_FILES.get(kind, kind)} file", name) from None
    except OSError as error:
        raise type(error)(error.errno, error.strerror, name) from None
    _check_regular(found, name)
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115 (the caller closes it)
    try:
        _check_regular(os.fstat(file.fileno()), name)
    except BaseException:
        file.close()
        raise
    return file


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a writer, in case a FIFO has replaced the file."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(found: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", name)
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{name}: a FIFO, socket or device, not a regular file. Read it yourself and pass the bytes.")
    if not found.st_size:
        raise FormatError(f"{name}: the file is empty (0 bytes)")


def reason(error: BaseException) -> str:
    """A decoder's message in one line."""
    words = getattr(error, "strerror", None) or str(error)
    return " ".join(words.split())[:200] or type(error).__name__
