# SPDX-License-Identifier: Apache-2.0
"""Pictures, sounds and videos for the tests, made on the spot."""

from __future__ import annotations

import hashlib
import io
import struct
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gemma4
from gemma4.media.medium import Medium, read_audio, read_image, read_video


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


def video(
    frames: NDArray[np.uint8], fps: int = 10, container: str = "mp4", codec: str = "mpeg4", times: Any = None
) -> bytes:
    """The bytes of a video file of uint8 [n, height, width, 3]. times: when each shows, in whole milliseconds."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"  # type: ignore[attr-defined]
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))  # type: ignore[attr-defined]
        out.mux(stream.encode())  # type: ignore[attr-defined]
    return buffer.getvalue()


def turned(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The same film with another display matrix in its track header: (x, y) goes to (a x + c y, b x + d y)."""
    data, (a, b, c, d) = bytearray(mp4), matrix
    at = data.index(b"tkhd") + 44
    assert data[at : at + 4] == struct.pack(">i", 1 << 16), "the identity matrix begins here"
    data[at : at + 36] = struct.pack(">9i", *(value << 16 for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    return bytes(data)


def sound(samples: NDArray[np.float32], rate: int, container: str, codec: str) -> bytes:
    """The bytes of a file of mono sound, float32 [n], as FFmpeg writes them."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.layout = "mono"  # type: ignore[attr-defined]
        resampler = av.AudioResampler(stream.format, "mono", rate, stream.codec_context.frame_size or None)  # type: ignore[attr-defined]
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="flt", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for piece in (*resampler.resample(frame), *resampler.resample(None), None):
            out.mux(stream.encode(piece))  # type: ignore[attr-defined]
    return buffer.getvalue()


class Encoders:
    """Stands where a model's encoders stand, and counts."""

    def __init__(self, model: gemma4.Model, monkeypatch: Any) -> None:
        self.model, self.calls = model, []
        model.checkpoint.hf_config = {**model.checkpoint.hf_config, "vision_config": {}, "audio_config": {}}
        monkeypatch.setattr("gemma4.encoders.soft_tokens.encode", self.encode)

    def encode(self, model: gemma4.Model, medium: Medium) -> tuple[np.ndarray, list]:
        assert model is self.model
        options = (medium.image_tokens,) if medium.image_tokens else ()
        made = getattr(self, medium.kind)(medium.content, *options)
        made.flags.writeable = False
        return made, []

    def _rows(self, kind: str, n: int, content: bytes) -> np.ndarray:
        self.calls.append(kind)
        seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "little")
        return np.random.default_rng(seed).normal(0, 1, (n, self.model.engine_config["d_model"])).astype(np.float32)

    def image(self, pixels, image_tokens):
        return self._rows("image", read_image(pixels, image_tokens).run_length, pixels.tobytes())

    def audio(self, samples):
        return self._rows("audio", read_audio(samples).run_length, samples.tobytes())

    def video(self, frames, image_tokens):
        n = read_video(frames, image_tokens=image_tokens).run_length
        return np.concatenate([self._rows("frame", n, frame.tobytes()) for frame in frames.frames])
