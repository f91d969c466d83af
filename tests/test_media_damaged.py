# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind: what comes of them is a picture, sound, frames, or a FormatError; nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from media_files import encoded, picture, sound, tone, video

from gemma4.errors import FormatError
from gemma4.media.audio import load_audio
from gemma4.media.image import load_image
from gemma4.media.video import load_video

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("av")

PHONES = {"m4a": ("ipod", "aac"), "aac": ("adts", "aac"), "webm sound": ("webm", "libopus"), "3gp": ("3gp", "aac")}
IMAGES = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
SOUNDS = ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")
WIDE = {"int32": lambda a: a.astype(np.int32) << 8, "float": lambda a: (a / 255).astype(np.float32)}
VIDEOS = ("mp4", "matroska", "avi", "webm")


@lru_cache
def whole(form: str) -> bytes:
    if form in IMAGES:
        return encoded(Image.fromarray(picture(40, 56)), form)
    if form == "HEIC":
        buffer = io.BytesIO()
        pytest.importorskip("pillow_heif").from_pillow(Image.fromarray(picture(64, 96))).save(buffer)
        return buffer.getvalue()
    if form in WIDE:
        return encoded(Image.fromarray(WIDE[form](picture(40, 56, channels=1)[:, :, 0])), "TIFF")
    if form in PHONES:
        return sound(tone(0.3), 16_000, *PHONES[form])
    if form in SOUNDS:
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(0.3), 16_000, format=form)
        return buffer.getvalue()
    frames = np.stack([picture(32, 48, seed) for seed in range(6)])
    if form == "uneven":
        return video(frames, container="mov", times=[0, 40, 90, 100, 700, 1500])
    return video(frames, container=form, codec="libvpx" if form == "webm" else "mpeg4")


def loader(form: str) -> Callable[[bytes], Any]:
    if form in VIDEOS:
        return load_video
    if form == "uneven":
        return lambda data: load_video(data, num_frames=4)
    return load_audio if form in (*SOUNDS, *PHONES) else load_image


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut off, taken out or put in; more often in the head, where sizes and counts are."""
    array = bytearray(data)
    where = int(rng.integers(len(array)) if rng.random() < 0.5 else rng.integers(min(len(array), 200)))
    kind = rng.integers(4)
    if kind == 0:
        for at in rng.integers(0, len(array), rng.integers(1, 8)):
            array[at] = int(rng.integers(256))
        array[where] ^= int(rng.integers(1, 256))
    elif kind == 1:
        del array[where:]
    elif kind == 2:
        array[where : where + 4] = bytes([255] * 4) if rng.random() < 0.5 else bytes(4)
    else:
        array[where:where] = rng.bytes(int(rng.integers(1, 40)))
    return bytes(array)


@pytest.mark.filterwarnings("ignore")  # Pillow's words about what it finds
@pytest.mark.parametrize("form", [*IMAGES, *SOUNDS, *VIDEOS, *PHONES, *WIDE, "HEIC", "uneven"])
def test_damaged_files(form: str) -> None:
    load, data = loader(form), whole(form)
    load(data)
    rng = np.random.default_rng(len(form) * 1000 + sum(form.encode()))
    refused = 0
    for _ in range(60):
        try:
            load(damaged(data, rng))
        except FormatError as error:
            refused += 1
            assert "(" in str(error) or ":" in str(error)
    assert refused > 0
