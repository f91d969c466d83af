# SPDX-License-Identifier: Apache-2.0
"""Pictures, sounds and videos for the tests, made on the spot."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    """uint8 [height, width, channels]: colour ramps with noise on them, so that resizing has edges to get wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ramps = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 127 + 127 * np.sin(x / 5 + y / 3)]
    base = np.stack([*ramps, np.full((height, width), 200.0)][:channels], axis=-1)
    return np.clip(base + rng.normal(0, 40, base.shape), 0, 255).astype(np.uint8)


def encoded(image: Any, form: str, **options: Any) -> bytes:
    """The bytes of a PIL image's file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tone(seconds: float, rate: int = 16_000, seed: int = 0, hertz: float = 220.0) -> NDArray[np.float32]:
    """float32 [n]: a gliding tone with noise."""
    t = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.4 * np.sin(2 * np.pi * (hertz + 60 * t) * t) + noise).astype(np.float32)


def video(frames: NDArray[np.uint8], fps: int = 10, container: str = "mp4", codec: str = "mpeg4") -> bytes:
    """The bytes of a video file of uint8 [n, height, width, 3]."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"  # type: ignore[attr-defined]
        for pixels in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))  # type: ignore[attr-defined]
        out.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()
