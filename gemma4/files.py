# SPDX-License-Identifier: Apache-2.0
"""Bounded reading of untrusted files, and all files that the package writes.

An output appears under its name only when complete: it is written to a temporary of a unique name beside the target,
synced, and renamed. If the work ends before that, the temporary is removed, and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from gemma4.errors import FormatError

StrPath = str | os.PathLike[str]
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_partials: set[str] = set()  # temporaries of this process


# -- reading -----------------------------------------------------------------------------------------------------------


def open_regular(path: StrPath) -> int:
    """A descriptor to read a regular file with. Raises FormatError for pipes and devices, which could block
    indefinitely (opening does not wait for a pipe's other end), and what `os.open` raises."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    fd = os.open(path, flags)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise FormatError(f"{os.fspath(path)} is no regular file (a folder, a pipe or a device); give a file")


def read_limited(path: StrPath, limit: int) -> bytes:
    """A whole file of at most `limit` bytes. Raises FormatError (larger, or no regular file), OSError."""
    with open(open_regular(path), "rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes > limit:
            raise FormatError(f"{os.fspath(path)} has {n_bytes:,} bytes, the limit is {limit:,}")
        return file.read(limit)


def check_no_pointer(start: bytes, path: StrPath) -> None:
    """Raise FormatError if a file begins like a Git LFS pointer, which stands in for a file that was not fetched."""
    if start.startswith(b"version https://git-lfs"):
        raise FormatError(
            f"{os.fspath(path)} is a Git LFS pointer, not the file itself: fetch it (git lfs pull) or download it"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def check_output(path: StrPath, *, force: bool, inputs: Iterable[StrPath] = (), devices: bool = False) -> None:
    """Raise unless a file may be written there: IsADirectoryError, FileNotFoundError (its folder), ValueError (no
    regular file, or one of `inputs` under any name), FileExistsError (there is one, and `force` is not given).

    devices: also accept pipes and devices such as /dev/stdout.
    """
    target = Path(path)
    if devices and _is_device(target):
        return
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; name the file to write", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such file, as there is no such folder", str(target))
    if not os.path.lexists(target):
        return
    if _is_device(target):
        raise ValueError(f"{target} is no regular file; name the file to write")
    if any(_same_file(target, source) for source in inputs):
        raise ValueError(f"{target} is the source itself; write to another name")
    if not force:
        raise FileExistsError(errno.EEXIST, "exists already; --force (force=True) replaces it", str(target))


@contextlib.contextmanager
def new_file(path: StrPath, *, force: bool, inputs: Iterable[StrPath] = (), n_bytes: int = 0) -> Iterator[IO[bytes]]:
    """`with new_file(path, force=False) as file:` a binary file that gets its name when the block ends without error.

    force: replace a file that exists, and keep its permissions. inputs: files that are never replaced. n_bytes: room
    that the disk must have. Raises what `check_output` raises, FileExistsError (a file appeared there meanwhile),
    OSError. In the main thread a second Ctrl-C waits until the temporary is gone, and SIGTERM and SIGHUP remove it.
    """
    check_output(path, force=force, inputs=inputs)
    target = Path(path)
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise OSError(errno.ENOSPC, f"the file needs {n_bytes:,} bytes, the disk has {free:,} left", str(target))
    own: set[str] = set()
    with _signals_kept_out():
        try:
            with _create(target, own) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _publish(own, target, force)
        except OSError as error:
            if error.errno is not None and (error.filename is None or error.filename in own):  # names no file, or ours
                raise OSError(error.errno, error.strerror, str(target)) from error
            raise
        finally:
            for partial in own:
                _remove(partial)


def write_file(path: StrPath, data: bytes, *, force: bool, inputs: Iterable[StrPath] = ()) -> None:
    """All of `data` under that name, as `new_file` does it; pipes and devices that exist are written to directly."""
    target = Path(path)
    if _is_device(target):
        _write_device(target, data)
        return
    with new_file(target, force=force, inputs=inputs) as file:
        file.write(data)


def _write_device(target: Path, data: bytes) -> None:
    """Raises OSError, also for a pipe that nobody reads, which would be waited for."""
    fd = os.open(target, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    with open(fd, "wb") as device:
        if hasattr(os, "set_blocking"):
            os.set_blocking(fd, True)
        device.write(data)


def free_name(path: StrPath) -> Path:
    """`path`, or the first of "name-2.ext", "name-3.ext", … that does not exist: for default names."""
    target = Path(path)
    name, number = target, 1
    while os.path.lexists(name):
        number += 1
        name = target.with_name(f"{target.stem}-{number}{target.suffix}")
    return name


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _same_file(a: Path, b: StrPath) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b)
    return False


def _create(target: Path, own: set[str]) -> IO[bytes]:
    """The temporary; its name is in `own` and `_partials` before it exists, so it always has an owner."""
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    while True:
        partial = str(target.with_name(f".{target.name[:40]}.{os.urandom(8).hex()}.partial"))
        own.add(partial)
        _partials.add(partial)
        try:
            file = open(partial, "xb")  # noqa: SIM115  the caller closes it
        except FileExistsError:  # another process's
            own.discard(partial)
            _partials.discard(partial)
            continue
        if mode is not None:
            os.chmod(partial, mode)
        return file


def _publish(own: set[str], target: Path, force: bool) -> None:
    [partial] = own
    if force:
        os.replace(partial, target)
    else:
        _link(partial, target)
    with contextlib.suppress(OSError):  # syncing the folder makes the name durable; some systems cannot
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _link(partial: str, target: Path) -> None:
    """Rename atomically unless the name exists by now: with a hard link where the file system has links."""
    taken = FileExistsError(errno.EEXIST, "appeared while its replacement was written", str(target))
    try:
        os.link(partial, target)
    except FileExistsError:
        raise taken from None
    except (OSError, NotImplementedError):
        if os.path.lexists(target):
            raise taken from None
        os.replace(partial, target)


def _remove(partial: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(partial)
    _partials.discard(partial)


@contextlib.contextmanager
def _signals_kept_out() -> Iterator[None]:
    """In the main thread: after one KeyboardInterrupt suppress others until the block is left, and remove temporaries
    before a signal that would end the process at once. Handlers installed by other code stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Any] = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = _interrupt_once()
    handlers |= {number: _end for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt_once() -> Callable[[int, FrameType | None], None]:
    interrupted = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    return handler


def _end(number: int, frame: FrameType | None) -> None:
    for partial in tuple(_partials):
        _remove(partial)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
