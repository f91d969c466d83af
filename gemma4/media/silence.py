# SPDX-License-Identifier: Apache-2.0
"""Long recordings cut at pauses: an encoder takes 30 seconds at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma4.media.audio import MAX_SAMPLES, RATE, check_samples

_STEP = RATE // 50  # 20 ms: the interval of loudness
_PAUSE = 15  # steps: a cut needs 300 ms of quiet around it, a breath between sentences
_QUIET_DB, _SILENT_DB = 25.0, -60.0  # below the loud parts: a pause; of full scale: silence
_EARLIEST = 0.4  # share of a piece's longest length: no cut before this, to limit the number of pieces


@dataclass(frozen=True, slots=True)
class Segment:
    """Samples start to stop (exclusive) at 16 kHz.

    in_pause: whether it ends in a pause (or with the recording); silent: whether nothing is audible in it.
    """

    start: int
    stop: int
    in_pause: bool = True
    silent: bool = False

    @property
    def seconds(self) -> tuple[float, float]:
        return self.start / RATE, self.stop / RATE


def split(samples: NDArray[np.floating], max_samples: int = MAX_SAMPLES) -> list[Segment]:
    """Segments of at most max_samples that cover a recording, cut in the quietest 300 ms near each one's end.

    samples: float [n] at 16 kHz. Raises ValueError if they are not, or max_samples is under one second.
    """
    samples = check_samples(samples)
    if max_samples < RATE:
        raise ValueError(f"max_samples must be at least {RATE} (one second), got {max_samples}")
    level = _loudness(samples)
    loud = float(np.percentile(level, 95))
    segments: list[Segment] = []
    start = 0
    while len(samples) - start > max_samples:
        stop, pause = _cut(level, start, max_samples, loud - _QUIET_DB)
        segments.append(_segment(level, start, stop, pause))
        start = stop
    return [*segments, _segment(level, start, len(samples), True)]


def _segment(level: NDArray[np.float64], start: int, stop: int, in_pause: bool) -> Segment:
    heard = level[start // _STEP : max(start // _STEP + 1, -(-stop // _STEP))]
    return Segment(start, stop, in_pause, bool(heard.max() < _SILENT_DB))


def _cut(level: NDArray[np.float64], start: int, max_samples: int, quiet: float) -> tuple[int, bool]:
    """The sample to cut at, and whether it is quiet there; of equally quiet places the last."""
    first = (start + int(max_samples * _EARLIEST)) // _STEP
    last = (start + max_samples) // _STEP - _PAUSE
    around = np.lib.stride_tricks.sliding_window_view(level[first : last + _PAUSE], _PAUSE).max(axis=1)
    around = np.maximum(around, quiet)  # all sufficiently quiet places count equally
    best = len(around) - 1 - int(np.argmin(around[::-1]))
    return (first + best + _PAUSE // 2) * _STEP, bool(around[best] <= quiet)


def _loudness(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 [n // 320 rounded up]: decibels of full scale, of every 20 ms."""
    padded = np.pad(samples, (0, -len(samples) % _STEP)).reshape(-1, _STEP)
    power = np.einsum("ij,ij->i", padded, padded, dtype=np.float64) / _STEP
    return 10 * np.log10(power + 1e-12)
