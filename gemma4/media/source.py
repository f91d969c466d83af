# SPDX-License-Identifier: Apache-2.0
"""Where media come from: a path or the bytes of a file, how errors call it, and the optional decoders."""

from __future__ import annotations

import errno
import importlib
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeGuard

from gemma4.errors import FormatError

FileLike: TypeAlias = str | os.PathLike[str] | bytes  # and what is like bytes
_BYTES = (bytes, bytearray, memoryview)
_FILES = {"audio": "sound"}
_PACKAGES = {"PIL": "Pillow", "soundfile": "soundfile", "soxr": "soxr", "av": "PyAV"}


def require(module: str) -> Any:
    """An optional module. Raises ImportError that says which package is missing and the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = _PACKAGES.get(module.partition(".")[0], module)
        raise ImportError(f'this needs {package} ({error}): pip install "gemma4[media]"') from error


def is_file(source: object) -> TypeGuard[FileLike]:
    """Whether source is a path or the bytes of a file, not an array or a decoder's object."""
    return isinstance(source, (str, os.PathLike, *_BYTES))


def name_of(source: object, kind: str) -> str:
    """What errors call it: the path, or "the image" with its size where there is no name."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, _BYTES):
        return f"the {kind} ({len(source)} bytes)"
    return f"the {kind}"


def open_source(source: FileLike, kind: str) -> BinaryIO:
    """A file object over a path or bytes. Raises OSError (no such file), FormatError (empty), ValueError (a URL)."""
    if isinstance(source, _BYTES):
        if not len(source):
            raise FormatError(f"the {kind} is empty: 0 bytes")
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{source[:80]}: the {kind} must be a file's path or bytes; nothing is fetched from the net")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, f"No such {_FILES.get(kind, kind)} file", str(path))
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    file = path.open("rb")
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise FormatError(f"{path}: the file is empty (0 bytes)")
    return file


def reason(error: BaseException) -> str:
    """One line of a decoder's words."""
    words = getattr(error, "strerror", None) or str(error)
    return " ".join(words.split())[:200] or type(error).__name__
