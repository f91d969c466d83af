# SPDX-License-Identifier: Apache-2.0
"""Files of FFmpeg's formats (mp4, mov, webm, mkv, …), opened through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from gemma4.media.source import require


@contextmanager
def open_container(file: BinaryIO) -> Iterator[Any]:
    """A PyAV container over this file only.

    Playlists (m3u8, ffconcat, sdp) name further files and addresses: no protocol is allowed, so none is opened.
    Raises ImportError without PyAV, and what PyAV raises; a ValueError where a damaged header needs more memory than
    there is.
    """
    av = require("av")
    try:
        with av.open(file, options={"protocol_whitelist": ""}) as container:
            yield container
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise ValueError("it asks for more memory than there is") from error
        raise


def stream_kinds(container: Any) -> str:
    """The kinds of streams, for an error message: "audio, video"."""
    return ", ".join(sorted({stream.type for stream in container.streams})) or "none"
