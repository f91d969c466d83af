# SPDX-License-Identifier: Apache-2.0
"""Files that are slow to make, kept in the user's cache directory. After any failure they are made again.

GEMMA4_CACHE=0 turns it off, GEMMA4_CACHE=DIR puts it elsewhere. Nothing is ever removed; deleting all of it is safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path

from gemma4.errors import FormatError
from gemma4.files import new_file, read_limited

_MAX_BYTES = 128 << 20
_OFF = ("0", "off", "no", "false")


def directory() -> Path | None:
    """Folder of cached files on this system; None if there is none, or the cache is turned off."""
    named = os.environ.get("GEMMA4_CACHE", "")
    if named.lower() in _OFF:
        return None
    if named:
        return Path(os.path.expanduser(named))  # unlike Path.expanduser, leaves "~" of nobody's as it is
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


def read(name: str) -> str | None:
    """The text that `write` kept under that name; None if it is missing or was changed."""
    folder = directory()
    if folder is None:
        return None
    try:
        kept = read_limited(folder / name, _MAX_BYTES).decode()
    except (OSError, FormatError, UnicodeDecodeError):
        return None
    seal, text = kept[:_SEALED], "{" + kept[_SEALED:]
    return text if seal == _seal(text) else None


def write(name: str, text: str) -> None:
    """Keep `text`, a JSON object, under that name atomically, with its digest in front. Failure to write is not
    an error."""
    folder = directory()
    if folder is None:
        return
    with contextlib.suppress(OSError, ValueError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_file(folder / name, force=True) as file:  # which no pipe in its place can block
            file.write((_seal(text) + text[1:]).encode())


def _seal(text: str) -> str:
    """An object's opening, and a member with which a truncated rest is detected."""
    return f'{{"sha256":"{hashlib.sha256(text.encode()).hexdigest()}",'


_SEALED = len(_seal(""))
