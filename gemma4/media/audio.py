# SPDX-License-Identifier: Apache-2.0
"""Sound to inputs of the audio encoders, number for number as in transformers' feature extractors.

The Conformer of the effective models reads a log-mel spectrogram (a frame of 20 ms every 10 ms) and makes a soft token
of every 40 ms; the unified model reads 640 raw samples, 40 ms as well, per soft token.

Ref: transformers audio_utils.py (loading), models/gemma4/feature_extraction_gemma4.py,
models/gemma4_unified/feature_extraction_gemma4_unified.py
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy import fft
from numpy.typing import ArrayLike, NDArray

from gemma4.errors import FormatError
from gemma4.media.container import open_container, stream_kinds
from gemma4.media.source import FileLike, is_file, name_of, open_source, reason, require
from gemma4.memory import ready_blas
from gemma4.narrow import is_integer

RATE = 16_000  # samples per second of the encoders' input
MAX_SAMPLES = 30 * RATE  # limit of one log_mel: 750 soft tokens
N_MELS, FRAME, HOP, FFT = 128, 320, 160, 512
MEL_FLOOR = 1e-3
UNIFIED_FRAME = 640
MS_PER_TOKEN = 40
MIN_RATE, MAX_RATE, MAX_CHANNELS, MAX_SECONDS = 1_000, 384_000, 64, 8 * 3600
MAX_PEAK = 32.0  # floats beyond are not samples of full scale 1: decoders and mixes exceed it slightly, never that far
# The smallest real sound, digital silence in FLAC at 8 kHz, has 23 bytes a second; a file made to exhaust memory has 3.
FREE_SECONDS, MIN_BYTES_PER_SECOND = 1800, 16
_UNKNOWN = 1 << 60  # libsndfile's number of samples for FLAC from a pipe, whose last block it cannot read
_BLOCK = 1 << 18  # samples decoded at once

AudioLike: TypeAlias = str | os.PathLike[str] | bytes | NDArray[np.generic]
F32: TypeAlias = NDArray[np.float32]


def load_audio(audio: AudioLike, rate: int | None = None, *, max_seconds: float | None = None) -> F32:
    """float32 [n]: mono samples at 16 kHz, in -1..1 for ordinary files.

    audio: path or bytes, or an array [n] or [n, channels] of floats in -1..1 or of integers of full scale. libsndfile
    reads wav, flac, ogg, mp3 and more; PyAV other formats (m4a, aac, webm, 3gp, the sound track of films).
    Signed samples of 32 and 64 bits may hold 16-bit values; silence of unsigned ones is in the middle.
    rate: samples per second of an array, None = 16,000; files state their own. Channels are averaged, then soxr
    resamples ("HQ"). max_seconds: no more is decoded; None = 8 hours.

    Raises FormatError (damaged, empty, NaN, too long, too long for its bytes), ValueError (array, rate), OSError,
    ImportError.
    """
    most = MAX_SECONDS if max_seconds is None else max_seconds
    if is_file(audio):
        if rate is not None:
            raise ValueError("rate= goes with an array of samples; a file says its own")
        name = name_of(audio, "audio")
        samples = _read_file(audio, name, most)
    else:
        name = "the audio"
        samples = _from_array(np.asarray(audio), RATE if rate is None else rate, name, most)
    if not len(samples):
        raise FormatError(f"{name}: there is no sound in it (0 samples)")
    return samples


def log_mel(samples: NDArray[np.floating]) -> F32:
    """float32 [frames, 128]: ln(mel + 0.001) of magnitudes, mono 16 kHz samples, at most 30 s.

    Frame i covers samples 160 i - 160 to 160 i + 160 (zeros before the start) under a periodic Hann window; 128 HTK mel
    filters from 0 to 8 kHz. Only frames whose window, and one sample more, lies in the sound: (n - 1) // 160 of them.
    Raises ValueError if samples are not [n], too few for a frame, or more than 30 s.
    """
    samples = check_samples(samples)
    if len(samples) > MAX_SAMPLES:
        raise ValueError(too_long(f"{len(samples) / RATE:.1f} s of audio", MAX_SAMPLES / RATE))
    if n_frames(len(samples)) < 1:
        raise ValueError(too_short(len(samples)))
    padded = np.concatenate([np.zeros(FRAME // 2, np.float32), samples])
    # The reference cuts frames of 321 samples and drops the last: a frame needs that sample to exist.
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME + 1)[::HOP, :-1]
    magnitudes = np.abs(fft.rfft(frames * _window(), n=FFT, axis=-1))
    ready_blas()
    return np.log(magnitudes @ _filters() + MEL_FLOOR).astype(np.float32)


def too_long(length: str, most: float) -> str:
    """Message that refuses a sound longer than a limit in seconds. length: "31.0 s of audio"."""
    if most >= MAX_SECONDS:
        return f"more than {most / 3600:g} hours of sound. Cut it first."
    return (
        f"{length}; at most {most:g} s go in at once. "
        "Cut it (`gemma4 transcribe` and gemma4.media.silence.split do that at silences)."
    )


def too_short(n_samples: int) -> str:
    """Message that refuses too few samples."""
    return f"{n_samples} samples of audio at 16 kHz are too few: at least {HOP + 1} ({HOP / RATE * 1000:.0f} ms)"


def n_frames(n_samples: int) -> int:
    """Rows of the log-mel spectrogram of n_samples at 16 kHz."""
    return max(0, (n_samples - 1) // HOP)


def n_soft_tokens(n_samples: int) -> int:
    """Soft tokens that the Conformer makes of n_samples at 16 kHz: two convolutions halve the frames."""
    frames = n_frames(n_samples)
    return math.ceil(math.ceil(frames / 2) / 2)


def raw_frames(samples: NDArray[np.floating]) -> F32:
    """float32 [ceil(n / 640), 640]: the unified model's input, the last frame padded with zeros."""
    samples = check_samples(samples)
    frames = np.zeros((math.ceil(len(samples) / UNIFIED_FRAME), UNIFIED_FRAME), np.float32)
    frames.reshape(-1)[: len(samples)] = samples
    return frames


def check_samples(samples: ArrayLike) -> F32:
    """float32 [n], n > 0. Raises ValueError."""
    array: NDArray[Any] = np.asarray(samples)
    if array.ndim != 1 or not len(array) or array.dtype.kind != "f":
        raise ValueError(f"samples must be floats [n] at 16 kHz, got {array.dtype} {array.shape}; see load_audio")
    return array.astype(np.float32, copy=False)


@lru_cache(maxsize=1)
def _window() -> F32:
    return np.hanning(FRAME + 1)[:-1].astype(np.float32)


@lru_cache(maxsize=1)
def _filters() -> NDArray[np.float64]:
    """float64 [257, 128]: triangles whose corners are evenly spaced in mel = 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, N_MELS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE // 2, FFT // 2 + 1)
    rising = (bins[:, None] - corners[:-2]) / np.diff(corners)[:-1]
    falling = (corners[2:] - bins[:, None]) / np.diff(corners)[1:]
    return np.maximum(0, np.minimum(rising, falling))


# -- files and arrays ------------------------------------------------------------------------------------------------


def _from_array(array: NDArray[Any], rate: int, name: str, most: float) -> F32:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be floats or integers, got {array.dtype}")
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= MAX_CHANNELS):
        raise ValueError(f"{name} must be an array [n], or [n, channels], got {array.shape}")
    return _Track(name, rate, iter([_full_scale(array, name)]), len(array)).join(most)


def _full_scale(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Samples as floats, full scale 1, where a wide type may hold the values of a narrow one."""
    bits = array.dtype.itemsize * 8
    if array.dtype.kind == "f" or bits == 8 or not array.size:
        return _scaled(array)
    low, high, middle = int(array.min()), int(array.max()), 2 ** (bits - 1)
    if array.dtype.kind == "i":
        return array / 2.0 ** (_bits_used(array, low, high, name) - 1)
    if not low <= middle <= high:
        raise ValueError(
            f"{name}: {array.dtype} samples from {low} to {high} never cross the middle of their type, {middle}: no "
            "sound of full scale. Subtract their middle, divide by their full scale, and pass floats in -1..1."
        )
    return _scaled(array)


def _scaled(array: NDArray[Any]) -> NDArray[Any]:
    """Floats unchanged, integers divided by their type's full scale; silence of unsigned ones is in the middle."""
    if array.dtype.kind == "f":
        return array
    full = 2.0 ** (array.dtype.itemsize * 8 - 1)
    return (array - full) / full if array.dtype.kind == "u" else array / full


def _bits_used(array: NDArray[Any], low: int, high: int, name: str) -> int:
    """Bits of the full scale that these signed samples have: a wide type may hold the values of a narrow one.

    Values of 32 bits are taken as such if they are loud (-48 dB and up) or left-justified, as decoders give them.
    """
    bits, peak = array.dtype.itemsize * 8, max(high, -1 - low)
    if bits <= 16:
        return bits
    are_bytes = 0 < peak < 1 << 7 or (low >= 0 and 0 < peak < 1 << 8)  # samples of 8 bits, signed or not
    if peak < 1 << 15 and not are_bytes:
        return 16
    for wide in (32, 64):
        if wide <= bits and peak < 1 << (wide - 1) and (peak >> (wide - 9) or not (array & 0xFF).any()):
            return wide
    raise ValueError(
        f"{name}: {array.dtype} samples of up to {peak}: neither 16 bits nor the full scale of a wider type. "
        "Divide them by their full scale (2**23 for 24 bits), and pass floats in -1..1."
    )


def _read_file(source: FileLike, name: str, most: float) -> F32:
    with open_source(source, "audio") as file, _with_descriptor(file) as plain:
        n_bytes = os.fstat(plain.fileno()).st_size
        soundfile = require("soundfile")
        try:
            sound = soundfile.SoundFile(plain.fileno(), closefd=False)
        except (soundfile.SoundFileError, RuntimeError) as error:
            words = reason(error).partition(": ")[2] or reason(error)  # "Error opening 5: words"
            return _read_container(plain, name, n_bytes, most, words)
        with sound:
            if sound.frames >= _UNKNOWN:
                return _read_container(plain, name, n_bytes, most, "its header does not say how long it is.")
            try:
                return _Track(name, sound.samplerate, _blocks(sound), sound.frames, n_bytes).join(most)
            except (soundfile.SoundFileError, RuntimeError) as error:
                raise FormatError(f"{name}: not audio that can be read ({reason(error)})") from error


@contextmanager
def _with_descriptor(file: BinaryIO) -> Iterator[BinaryIO]:
    """A copy as a file of the system: libsndfile's callbacks into Python would lose a Ctrl-C."""
    if not isinstance(file, io.BytesIO):
        yield file
        return
    in_memory = getattr(os, "memfd_create", None)
    with os.fdopen(in_memory("sound"), "w+b") if in_memory else tempfile.TemporaryFile() as copy:
        copy.write(file.getbuffer())
        copy.seek(0)  # flushes, too
        yield copy


def _blocks(sound: Any) -> Iterator[F32]:
    """Blocks of samples [n, channels], whatever number the header states."""
    while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
        yield block


def _read_container(file: BinaryIO, name: str, n_bytes: int, most: float, words: str) -> F32:
    """The first sound track of a file for FFmpeg: m4a, aac, webm, 3gp, films. words: why libsndfile did not read it."""
    file.seek(0)
    try:
        with open_container(file) as container:
            if not container.streams.audio:
                kinds = stream_kinds(container)
                raise FormatError(f"{name}: not audio that can be read: no sound track in it (streams: {kinds})")
            frames = container.decode(audio=0)
            first = next(frames, None)
            if first is None:
                raise FormatError(f"{name}: there is no sound in it (0 samples)")
            blocks = (_frame_samples(frame, first.sample_rate, name) for frame in chain([first], frames))
            return _Track(name, first.sample_rate, blocks, 0, n_bytes).join(most)
    except ImportError as error:
        raise FormatError(f"{name}: not audio that can be read ({words}); {error}, which reads more kinds") from error
    except (FormatError, MemoryError):
        raise
    except Exception as error:  # FFmpegError, and any error of PyAV on a wrong header
        why = f"libsndfile: {words} FFmpeg: {reason(error)}"
        raise FormatError(f"{name}: not audio that can be read ({why})") from error


def _frame_samples(frame: Any, rate: int, name: str) -> NDArray[Any]:
    """float [n, channels] of a frame decoded by FFmpeg. (Its resampler would work, but loses a Ctrl-C.)"""
    if frame.sample_rate != rate:
        raise FormatError(
            f"{name}: its rate changes from {rate} to {frame.sample_rate} samples per second. Convert it."
        )
    samples = _scaled(frame.to_ndarray())
    return samples.T if frame.format.is_planar else samples.reshape(frame.samples, -1)


@dataclass(slots=True)
class _Track:
    """Sound to be read block by block: an hour of 96 kHz stereo is 2.8 GB at once.

    blocks: float [n] or [n, channels] · promised: samples stated by a header, 0 = unknown · n_bytes: of the file, None
    for an array
    """

    name: str
    rate: Any
    blocks: Iterator[NDArray[Any]]
    promised: int = 0
    n_bytes: int | None = None

    def join(self, most: float) -> F32:
        """Mono at 16 kHz, up to a limit in seconds. Raises FormatError, ValueError for the rate of an array."""
        if not is_integer(self.rate) or not MIN_RATE <= self.rate <= MAX_RATE:
            words = f"{self.name}: a rate of {self.rate} samples per second; expected {MIN_RATE} to {MAX_RATE}"
            raise ValueError(words) if self.n_bytes is None else FormatError(words)
        self._check_length(self.promised, most, f"{self.promised / self.rate:.1f} s of audio")
        if self.rate == RATE:
            return np.concatenate([np.zeros(0, np.float32), *map(_mono, self._checked(most))])
        stream = require("soxr").ResampleStream(int(self.rate), RATE, 1, dtype="float32", quality="HQ")
        total, out = 0, list[F32]()
        for block in self._checked(most):
            total += len(block)
            out.append(stream.resample_chunk(_mono(block)))
        out.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
        samples, wanted = np.concatenate(out), math.ceil(total * RATE / self.rate)
        return np.pad(samples, (0, max(0, wanted - len(samples))))[:wanted]

    def _checked(self, most: float) -> Iterator[F32]:
        """The blocks, while values have a sensible size and the limits are not exceeded."""
        total = 0
        for block in self.blocks:
            self._check_values(block, total)
            total += len(block)
            self._check_length(total, most, f"more than {most:g} s of audio")
            yield block.astype(np.float32, copy=False)

    def _check_values(self, block: NDArray[Any], start: int) -> None:
        loudest = np.abs(block).max(initial=0)
        if loudest <= MAX_PEAK:  # false for NaN too
            return
        rows = np.abs(block.reshape(len(block), -1)).max(axis=1)
        at = int(np.argmax(~(rows <= MAX_PEAK)))
        where = f"{self.name}: sample {start + at} (at {(start + at) / self.rate:.2f} s) is {rows[at]:g}"
        if not np.isfinite(rows[at]):
            raise FormatError(f"{where}, not a number")
        raise FormatError(f"{where}: floats must be in -1..1. Divide them by their full scale (32768 for 16 bits).")

    def _check_length(self, total: int, most: float, length: str) -> None:
        seconds = total / self.rate
        if seconds > most:
            raise FormatError(f"{self.name}: {too_long(length, most)}")
        if self.n_bytes is not None and seconds > max(FREE_SECONDS, self.n_bytes / MIN_BYTES_PER_SECOND):
            raise FormatError(
                f"{self.name}: {seconds / 60:.0f} minutes of sound out of {self.n_bytes} bytes look like a "
                f"decompression bomb (expected at least {MIN_BYTES_PER_SECOND} bytes a second beyond "
                f"{FREE_SECONDS / 60:.0f} minutes). Cut it first."
            )


def _mono(block: F32) -> F32:
    if block.ndim == 1 or block.shape[1] == 1:
        return np.ascontiguousarray(block.reshape(-1))
    return np.ascontiguousarray(block.T.mean(axis=0))
