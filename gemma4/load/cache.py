# SPDX-License-Identifier: Apache-2.0
"""Files that are slow to make, kept in the user's cache directory. Whatever goes wrong, they are made again.

GEMMA4_CACHE=0 turns it off, GEMMA4_CACHE=DIR puts it elsewhere. Nothing is ever removed; deleting all of it is safe.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

_OFF = ("0", "off", "no", "false")


def directory() -> Path | None:
    """Where cached files go on this system; None if there is no such place, or the cache is turned off."""
    named = os.environ.get("GEMMA4_CACHE", "")
    if named.lower() in _OFF:
        return None
    if named:
        return Path(named)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return base / "gemma4" if base.is_absolute() else None


def read(name: str) -> Path | None:
    """The cached file of that name, None if there is none."""
    folder = directory()
    file = folder / name if folder else None
    with contextlib.suppress(OSError):
        if file is not None and file.is_file():
            return file
    return None


def write(name: str, text: str) -> None:
    """Keep `text` under that name, all of it or nothing. A place that cannot be written to is no error."""
    folder = directory()
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd, partial = tempfile.mkstemp(dir=folder, prefix=name, suffix=".partial")
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(partial, folder / name)
        except BaseException:
            os.unlink(partial)
            raise
