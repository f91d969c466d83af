# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM905  word lists read better as one string
"""Spoken digits, commands and words: what is said, and espeak-ng's voice saying it, with the time of every word.

Needs espeak-ng's library (`apt-get install espeak-ng`), for making data only. The same `Said` gives the same words at
the same times; the samples differ a little each time, because espeak-ng's voices waver at random.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .example import is_held_out
from .lexicon import WORDS

RATE = 16_000
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland")
VARIANTS = ("", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+f5")
DIGITS = "zero one two three four five six seven eight nine".split()
ROOMS = "kitchen garden office bedroom garage hall".split()
CALLED = "Anna Tom Ben Lucy Max Mary Peter Olga".split()
SPOKEN_WORDS = tuple(
    "dog cat house water bread milk apple tree sun moon star book school friend king queen fish bird horse mouse fire"
    " snow key door".split()
)
_OTHERS = "turn on off the lights in set a timer for minutes call open close door play music stop and please"
SPOKEN = tuple(dict.fromkeys([*DIGITS, *ROOMS, *(n.lower() for n in CALLED), *SPOKEN_WORDS, *_OTHERS.split()]))


@dataclass(frozen=True)
class Said:
    """`spoken` is what the voice gets (lower-case words), `written` how it is transcribed."""

    skill: str
    spoken: str
    written: str
    translations: dict[str, str]
    voice: str
    speed: int
    pitch: int
    seed: int

    @property
    def key(self) -> str:
        return self.spoken if self.skill == "digits" else f"{self.spoken}|{self.voice}"


@dataclass(frozen=True)
class Sound:
    """samples [n] float32 at 16 kHz; words: (word, start, end) in seconds; phonemes: (name, start, end)."""

    samples: NDArray[np.float32]
    words: tuple[tuple[str, float, float], ...]
    phonemes: tuple[tuple[str, float, float], ...]


# --- what is said -------------------------------------------------------------------------------------------------


def _digits(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    chosen = [rng.randrange(10) for _ in range(rng.choice((1, 2, 3, 3, 4, 5)))]
    return " ".join(DIGITS[d] for d in chosen), " ".join(map(str, chosen)), {}


def _command(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    n = rng.randint(2, 9)
    thing, name, state = rng.choice(ROOMS), rng.choice(CALLED), rng.choice(("on", "off"))
    spoken, written = rng.choice(
        (
            (f"turn {state} the lights in the {thing}", f"Turn {state} the lights in the {thing}."),
            (f"turn {state} the lights in the {thing}", f"Turn {state} the lights in the {thing}."),
            (f"set a timer for {DIGITS[n]} minutes", f"Set a timer for {n} minutes."),
            (f"call {name.lower()}", f"Call {name}."),
            (f"call {name.lower()} please", f"Call {name}, please."),
            rng.choice((("open the door", "Open the door."), ("close the door", "Close the door."))),
            rng.choice((("play music", "Play music."), ("stop the music", "Stop the music."))),
        )
    )
    return spoken, written, {}


def _words(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    chosen = rng.sample(SPOKEN_WORDS, rng.choice((1, 1, 2)))
    rows = {row[0]: row for row in WORDS}
    french = " et ".join(rows[word][1] for word in chosen)
    german = " und ".join(rows[word][2] for word in chosen)
    return " and ".join(chosen), " and ".join(chosen), {"French": french, "German": german}


_KINDS = {"digits": _digits, "command": _command, "words": _words}


def sample(rng: random.Random, *, held_out: bool, skill: str | None = None) -> Said:
    """Something to say, from the wanted side of the split: digits by the string, the rest by (text, voice)."""
    while True:
        kind = skill or rng.choice(list(_KINDS))
        spoken, written, translations = _KINDS[kind](rng)
        voice = rng.choice(ACCENTS) + rng.choice(VARIANTS)
        said = Said(
            kind, spoken, written, translations, voice, rng.randint(130, 190), rng.randint(35, 65), rng.getrandbits(30)
        )
        if is_held_out("speech", said.key) == held_out:
            return said


# --- saying it ----------------------------------------------------------------------------------------------------


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("string", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_LIST_END, _WORD, _PHONEME = 0, 1, 7  # event types
_RETRIEVAL, _PHONEME_EVENTS, _UTF8, _SPEED, _PITCH = 1, 1, 1, 1, 3


class _Voice:
    """espeak-ng in this process; `collect` is kept alive as long as the library may call it."""

    def __init__(self) -> None:
        path = ctypes.util.find_library("espeak-ng")
        if path is None:
            raise RuntimeError("speech is made with espeak-ng, which is not installed: apt-get install espeak-ng")
        self.library = ctypes.CDLL(path)
        self.rate: int = self.library.espeak_Initialize(_RETRIEVAL, 0, None, _PHONEME_EVENTS)
        self.samples: list[NDArray[np.int16]] = []
        self.events: list[tuple[int, int, int, str]] = []
        self.collect = _CALLBACK(self._collect)
        self.library.espeak_SetSynthCallback(self.collect)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if count > 0:
            self.samples.append(np.ctypeslib.as_array(samples, (count,)).astype(np.int16))
        at = 0
        while events[at].type != _LIST_END:
            event = events[at]
            name = event.string.decode("utf-8", "replace") if event.type == _PHONEME else ""
            self.events.append((event.type, event.text_position, event.audio_position, name))
            at += 1
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> tuple[NDArray[np.float32], list]:
        """(samples at `rate`, events: (type, text position from 1, milliseconds, phoneme))."""
        self.samples, self.events = [], []
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}")
        self.library.espeak_SetParameter(_SPEED, speed, 0)
        self.library.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, 0, 0, _UTF8, None, None)
        self.library.espeak_Synchronize()
        return np.concatenate(self.samples).astype(np.float32) / 32768, self.events


@cache
def _voice() -> _Voice:
    return _Voice()


def resample(samples: NDArray[np.float32], source: int, target: int) -> NDArray[np.float32]:
    """Band-limited, by its spectrum (`target` below `source`)."""
    count = round(len(samples) * target / source)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (target / source)).astype(np.float32)


def say(said: Said) -> Sound:
    """The recording: some silence, the voice, more silence; loud or soft; clean or in white noise of 12 to 35 dB."""
    rng = np.random.default_rng(said.seed)
    voice = _voice()
    raw, events = voice.say(said.spoken, said.voice, said.speed, said.pitch)
    clean = resample(raw, voice.rate, RATE)
    before, after = rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.5)
    samples = np.concatenate([np.zeros(int(before * RATE)), clean, np.zeros(int(after * RATE))])
    samples *= rng.uniform(0.15, 0.9) / max(1e-6, float(np.abs(clean).max()))
    if rng.random() < 0.8:
        power = float(np.sqrt(np.mean(samples**2))) * 10 ** (-rng.uniform(12, 35) / 20)
        samples = samples + rng.normal(0, power, len(samples))
    phonemes = _phonemes(events, before, before + len(clean) / RATE)
    end = max(stop for name, _, stop in phonemes if not name.startswith("_"))
    return Sound(samples.astype(np.float32), _words_said(said, events, before, end), phonemes)


def _words_said(said: Said, events: list, offset: float, end: float) -> tuple[tuple[str, float, float], ...]:
    starts = {}
    for kind, position, milliseconds, _ in events:
        if kind == _WORD:
            starts[position - 1] = offset + milliseconds / 1000
    found, at = [], 0
    for word in said.spoken.split():
        found.append((word, starts.get(at)))
        at += len(word) + 1
    # Where espeak-ng speaks two words as one (`in the`), the second has no time of its own: it shares the span.
    times = [start for _, start in found] + [end]
    spans = []
    for i, (word, start) in enumerate(found):
        begin = start if start is not None else spans[-1][1] if spans else offset
        stop = next(time for time in times[i + 1 :] if time is not None)
        spans.append((word, begin, stop))
    return tuple(spans)


def _phonemes(events: list, offset: float, end: float) -> tuple[tuple[str, float, float], ...]:
    marks = [(name, offset + ms / 1000) for kind, _, ms, name in events if kind == _PHONEME]
    stops = [start for _, start in marks[1:]] + [end]
    return tuple((name, start, stop) for (name, start), stop in zip(marks, stops, strict=True))
