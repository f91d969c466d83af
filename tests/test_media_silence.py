# SPDX-License-Identifier: Apache-2.0
"""Long recordings, cut at pauses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from media_files import tone

from gemma4.media.audio import MAX_SAMPLES, RATE, load_audio
from gemma4.media.silence import split


def speech(*parts: tuple[float, float]) -> np.ndarray:
    """Float32 samples: (seconds of sound, seconds of pause) after each other; the pauses hold faint noise."""
    rng = np.random.default_rng(0)
    out = []
    for i, (sound, pause) in enumerate(parts):
        out += [tone(sound, seed=i), rng.normal(0, 1e-3, int(pause * RATE))]
    return np.concatenate(out).astype(np.float32)


def test_short_recordings_stay_whole():
    for seconds in (0.1, 12.0, 30.0):
        samples = tone(seconds)
        assert [(s.start, s.stop) for s in split(samples)] == [(0, len(samples))]


def test_cuts_lie_in_pauses():
    samples = speech((9, 0.5), (9, 0.6), (9, 0.5), (9, 0.7), (9, 0.5), (9, 0.5), (9, 0))
    segments = split(samples)
    assert [s.start for s in segments[1:]] == [s.stop for s in segments[:-1]]
    assert segments[0].start == 0 and segments[-1].stop == len(samples)
    assert all(s.stop - s.start <= MAX_SAMPLES and s.in_pause and not s.silent for s in segments)
    # the last pause that fits each time, cut with room on both sides
    pauses = np.cumsum([9.5, 9.6, 9.5, 9.7, 9.5, 9.5])
    for segment in segments[:-1]:
        at = segment.stop / RATE
        end = pauses[np.argmin(np.abs(pauses - 0.25 - at))]
        assert end - 0.5 + 0.1 <= at <= end - 0.1
    assert len(segments) == 3


def test_speech_without_pauses_is_cut_and_says_so():
    samples = tone(75.0)
    segments = split(samples)
    assert not any(s.in_pause for s in segments[:-1]) and segments[-1].in_pause
    assert all(0.4 * MAX_SAMPLES <= s.stop - s.start <= MAX_SAMPLES for s in segments[:-1])
    joined = np.concatenate([samples[s.start : s.stop] for s in segments])
    assert np.array_equal(joined, samples)


def test_silence_is_told():
    samples = np.concatenate([speech((20, 2)), np.zeros(70 * RATE, np.float32), tone(10)])
    segments = split(samples)
    assert [s.silent for s in segments[:1]] == [False] and any(s.silent for s in segments) and not segments[-1].silent
    assert split(np.zeros(RATE, np.float32))[0].silent


@pytest.mark.parametrize("seed", range(4))
def test_any_recording_is_covered(seed):
    rng = np.random.default_rng(seed)
    parts = [(float(rng.uniform(0.2, 14)), float(rng.uniform(0, 2))) for _ in range(rng.integers(4, 14))]
    samples = load_audio(speech(*parts))
    for longest in (RATE, 5 * RATE, MAX_SAMPLES):
        segments = split(samples, longest)
        assert segments[0].start == 0 and segments[-1].stop == len(samples)
        assert all(a.stop == b.start for a, b in pairwise(segments))
        assert all(0 < s.stop - s.start <= longest for s in segments)


def test_refused():
    with pytest.raises(ValueError, match="one second"):
        split(tone(2.0), RATE - 1)
    with pytest.raises(ValueError, match="16 kHz"):
        split(np.zeros((3, 3), np.float32))
