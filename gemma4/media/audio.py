# SPDX-License-Identifier: Apache-2.0
"""Sound to what the audio encoders read, number for number as transformers' feature extractors do.

The Conformer of the effective models reads a log-mel spectrogram (a frame of 20 ms every 10 ms) and makes a soft token
of every 40 ms; the unified model reads 640 raw samples, 40 ms as well, per soft token.

Ref: transformers audio_utils.py (loading), models/gemma4/feature_extraction_gemma4.py,
models/gemma4_unified/feature_extraction_gemma4_unified.py
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.media.source import FileLike, is_file, name_of, open_source, reason, require

RATE = 16_000  # samples per second that the encoders are made for
MAX_SAMPLES = 30 * RATE  # what one log_mel takes: 750 soft tokens
N_MELS, FRAME, HOP, FFT = 128, 320, 160, 512
MEL_FLOOR = 1e-3
UNIFIED_FRAME = 640
MS_PER_TOKEN = 40
MIN_RATE, MAX_RATE, MAX_CHANNELS, MAX_SECONDS = 1_000, 384_000, 64, 8 * 3600
_BLOCK = 1 << 18  # samples decoded at once

AudioLike: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any]
F32: TypeAlias = NDArray[np.float32]


def load_audio(audio: AudioLike, rate: int | None = None) -> F32:
    """float32 [n]: mono samples at 16 kHz, in -1..1 for ordinary files.

    audio: path or bytes (wav, flac, ogg, mp3, and what else libsndfile reads), or an array [n] or [n, channels] of
    floats in -1..1 or of integers (full scale = 1). rate: samples per second of an array, None = 16,000; a file knows
    its own. Channels are averaged, then soxr resamples ("HQ").

    Raises FormatError (damaged, empty, NaN, over 8 hours), ValueError (array, rate), OSError, ImportError.
    """
    if is_file(audio):
        if rate is not None:
            raise ValueError("rate= goes with an array of samples; a file says its own")
        name = name_of(audio, "audio")
        samples = _read_file(audio, name)
    else:
        name = "the audio"
        samples = _from_array(np.asarray(audio), RATE if rate is None else rate, name)
    if not len(samples):
        raise FormatError(f"{name}: there is no sound in it (0 samples)")
    if not np.isfinite(samples).all():
        first = int(np.argmin(np.isfinite(samples)))
        raise FormatError(f"{name}: sample {first} (at {first / RATE:.2f} s) is {samples[first]}, not a number")
    return samples


def log_mel(samples: NDArray[np.floating[Any]]) -> F32:
    """float32 [frames, 128]: ln(mel + 0.001) of magnitudes, mono 16 kHz samples, at most 30 s.

    Frame i covers samples 160 i - 160 to 160 i + 160 (zeros before the start) under a periodic Hann window; 128 HTK mel
    filters from 0 to 8 kHz. Only frames whose window, and one sample more, lies in the sound: (n - 1) // 160 of them.
    Raises ValueError if samples are not [n], too few for a frame, or more than 30 s.
    """
    samples = check_samples(samples)
    if len(samples) > MAX_SAMPLES:
        raise ValueError(too_long(len(samples)))
    if n_frames(len(samples)) < 1:
        raise ValueError(too_short(len(samples)))
    padded = np.concatenate([np.zeros(FRAME // 2, np.float32), samples])
    # The reference cuts frames of 321 samples and drops the last: there is no frame without that sample.
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME + 1)[::HOP, :-1]
    magnitudes = np.abs(np.fft.rfft(frames * _window(), n=FFT, axis=-1))
    return np.log(magnitudes @ _filters() + MEL_FLOOR).astype(np.float32)


def too_long(n_samples: int) -> str:
    """Why a spectrogram of so many samples is refused."""
    return (
        f"{n_samples / RATE:.1f} s of audio; at most {MAX_SAMPLES // RATE} s go in at once. "
        "Cut it (`gemma4 transcribe` and gemma4.media.silence.split do that at silences)."
    )


def too_short(n_samples: int) -> str:
    """Why so few samples are refused."""
    return f"{n_samples} samples of audio at 16 kHz are too few: at least {HOP + 1} ({HOP / RATE * 1000:.0f} ms)"


def n_frames(n_samples: int) -> int:
    """Rows of the log-mel spectrogram of so many samples at 16 kHz."""
    return max(0, (n_samples - 1) // HOP)


def n_soft_tokens(n_samples: int) -> int:
    """Soft tokens that the Conformer makes of so many samples at 16 kHz: two convolutions halve the frames."""
    frames = n_frames(n_samples)
    return math.ceil(math.ceil(frames / 2) / 2)


def raw_frames(samples: NDArray[np.floating[Any]]) -> F32:
    """float32 [ceil(n / 640), 640]: what the unified model reads, the last frame filled with zeros."""
    samples = check_samples(samples)
    frames = np.zeros((math.ceil(len(samples) / UNIFIED_FRAME), UNIFIED_FRAME), np.float32)
    frames.reshape(-1)[: len(samples)] = samples
    return frames


def check_samples(samples: NDArray[Any]) -> F32:
    """float32 [n], n > 0. Raises ValueError."""
    samples = np.asarray(samples)
    if samples.ndim != 1 or not len(samples) or samples.dtype.kind != "f":
        raise ValueError(f"samples must be floats [n] at 16 kHz, got {samples.dtype} {samples.shape}; see load_audio")
    return samples.astype(np.float32, copy=False)


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


def _from_array(array: NDArray[Any], rate: int, name: str) -> F32:
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > MAX_CHANNELS):
        raise ValueError(f"{name} must be an array [n], or [n, channels], got {array.shape}")
    if array.dtype.kind in "iu":
        # 8-bit sound is unsigned, as in wav files
        middle = 128.0 if array.dtype == np.uint8 else 0.0
        array = (array - middle) / (2.0 ** (array.dtype.itemsize * 8 - 1))
    elif array.dtype.kind != "f":
        raise ValueError(f"{name} must be floats or integers, got {array.dtype}")
    resampler = _Resampler(rate, name)
    blocks = [array.astype(np.float32, copy=False)]
    return resampler.join(blocks)


def _read_file(source: FileLike, name: str) -> F32:
    with open_source(source, "audio") as file:
        soundfile = require("soundfile")
        try:
            with soundfile.SoundFile(file) as sound:
                if sound.frames > MAX_SECONDS * sound.samplerate:
                    raise FormatError(f"{name}: more than {MAX_SECONDS // 3600} hours of sound. Cut it first.")
                if not MIN_RATE <= sound.samplerate <= MAX_RATE:
                    raise FormatError(f"{name}: {_wrong_rate(sound.samplerate)}")
                return _Resampler(sound.samplerate, name).join(_blocks(sound, name))
        except (soundfile.SoundFileError, RuntimeError) as error:
            words = reason(error).partition(": ")[2] or reason(error)  # "Error opening <_io.BytesIO …>: words"
            raise FormatError(f"{name}: not audio that can be read ({words})") from error


def _wrong_rate(rate: Any) -> str:
    return f"a rate of {rate} samples per second; expected {MIN_RATE} to {MAX_RATE}"


def _blocks(sound: Any, name: str) -> Any:
    """Blocks of samples [n, channels], however many the header promised."""
    total = 0
    while len(block := sound.read(_BLOCK, dtype="float32", always_2d=True)):
        total += len(block)
        if total > MAX_SECONDS * sound.samplerate:
            raise FormatError(f"{name}: more than {MAX_SECONDS // 3600} hours of sound. Cut it first.")
        yield block


class _Resampler:
    """Averages channels and brings the rate to 16 kHz, block by block: an hour of 96 kHz stereo is 2.8 GB at once."""

    def __init__(self, rate: int, name: str) -> None:
        if not isinstance(rate, int | np.integer) or not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"{name}: {_wrong_rate(rate)}")
        self.rate = int(rate)

    def join(self, blocks: Any) -> F32:
        if self.rate == RATE:
            return np.concatenate([np.zeros(0, np.float32), *(_mono(block) for block in blocks)])
        soxr = require("soxr")
        stream = soxr.ResampleStream(self.rate, RATE, 1, dtype="float32", quality="HQ")
        total, out = 0, []
        for block in blocks:
            total += len(block)
            out.append(stream.resample_chunk(_mono(block)))
        out.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
        samples, wanted = np.concatenate(out), math.ceil(total * RATE / self.rate)
        return np.pad(samples, (0, max(0, wanted - len(samples))))[:wanted]


def _mono(block: F32) -> F32:
    if block.ndim == 1 or block.shape[1] == 1:
        return np.ascontiguousarray(block.reshape(-1))
    return np.ascontiguousarray(block.T.mean(axis=0))
