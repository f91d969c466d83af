# SPDX-License-Identifier: Apache-2.0
"""Media that were made to do harm: what never ends, what unpacks to gigabytes, what names other files."""

from __future__ import annotations

import contextlib
import gc
import http.server
import io
import os
import signal
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media_files import sound, tone, video

from gemma4.errors import FormatError
from gemma4.media import audio as sounds
from gemma4.media import video as videos
from gemma4.media.audio import load_audio
from gemma4.media.image import load_image
from gemma4.media.medium import read_audio
from gemma4.media.video import load_video

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("av")
pytest.importorskip("PIL")

LOADERS = pytest.mark.parametrize("load", [load_image, load_audio, load_video])


# -- what never ends -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@LOADERS
def test_a_fifo_is_not_waited_for(tmp_path: Path, load: Callable[[Any], Any]) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(FormatError, match=r"pipe\.wav: a FIFO, socket or device"):
        load(tmp_path / "pipe.wav")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_that_takes_a_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at a path and opening it."""
    path = tmp_path / "sound.wav"
    path.write_bytes(b"RIFF")
    found, look = path.stat(), Path.stat
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self, **kw: found if self == path else look(self, **kw))
    with pytest.raises(FormatError, match="a FIFO, socket or device"):
        load_audio(path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices here")
@LOADERS
def test_a_device_is_not_read(load: Callable[[Any], Any]) -> None:
    with pytest.raises(FormatError, match="/dev/zero: a FIFO, socket or device"):
        load("/dev/zero")


@LOADERS
@pytest.mark.parametrize("path", ["a\0b.wav", "x" * 5000, "file.wav/inside.wav"])
def test_paths_that_are_none(tmp_path: Path, load: Callable[[Any], Any], path: str) -> None:
    (tmp_path / "file.wav").write_bytes(b"RIFF")
    with pytest.raises(OSError) as info:
        load(str(tmp_path / path))
    assert len(str(info.value)) < 500


# -- what unpacks to gigabytes ---------------------------------------------------------------------------------------


def flac(hours: float) -> bytes:
    """Digital silence at 1,000 samples a second: 3 bytes a second."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(hours * 3_600_000) - 10, np.int16), 1000, format="FLAC")
    return buffer.getvalue()


def without_length(data: bytes) -> bytes:
    """The same FLAC, written as to a pipe: its header does not say how many samples there are (36 bits)."""
    assert data[:4] == b"fLaC"
    return data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]


@pytest.mark.parametrize("header", ["honest", "silent"])
def test_hours_out_of_few_bytes(header: str) -> None:
    data = flac(8) if header == "honest" else without_length(flac(8))
    assert len(data) < 100_000
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(FormatError, match=r"at most 30 s go in at once"):
        read_audio(data)
    with pytest.raises(FormatError, match=r"minutes of sound out of \d+ bytes look like a decompression bomb"):
        load_audio(data)
    with pytest.raises(FormatError, match="decompression bomb"):
        read_audio(data, raw=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20 and time.monotonic() - begin < 20


def test_a_header_that_says_no_length() -> None:
    data = without_length(flac(0.002))
    assert soundfile.info(io.BytesIO(data)).frames > 1 << 60
    assert np.array_equal(load_audio(data), load_audio(flac(0.002)))


def test_half_an_hour_of_silence_is_no_bomb() -> None:
    assert len(load_audio(flac(0.49))) == pytest.approx(0.49 * 3600 * 16_000, rel=1e-3)


def test_no_more_is_decoded_than_the_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 s of which nobody says how long they are: reading stops within the block that passes 30 s."""
    data = sound(tone(40.0), 16_000, "adts", "aac")
    decoded = []
    mono = sounds._mono
    monkeypatch.setattr(sounds, "_mono", lambda block: decoded.append(len(block)) or mono(block))
    with pytest.raises(FormatError, match=r"more than 30 s of audio; at most 30 s"):
        read_audio(data)
    assert 29 * 16_000 < sum(decoded) <= 30 * 16_000
    assert read_audio(sound(tone(29.0), 16_000, "adts", "aac")).run_length > 720


def test_too_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(np.zeros((40, 48, 48, 3), np.uint8))
    assert len(load_video(data).frames) == 32
    monkeypatch.setattr(videos, "MAX_FRAMES", 39)
    with pytest.raises(FormatError, match=r"more than 39 frames\. Cut it"):
        load_video(data)
    monkeypatch.setattr(videos, "_CHECK_EVERY", 8)
    monkeypatch.setattr(videos, "MAX_FRAMES", 7)
    with pytest.raises(FormatError, match="more than 7 frames"):
        load_video(data)


def test_too_many_pixels_out_of_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(np.zeros((40, 640, 640, 3), np.uint8))
    monkeypatch.setattr(videos, "FREE_PIXELS", 40 * 640 * 640 - 1)
    assert load_video(data).frames
    monkeypatch.setattr(videos, "MAX_PIXELS_PER_BYTE", 40 * 640 * 640 // len(data))
    with pytest.raises(FormatError, match=r"40 frames of 640 x 640 out of \d+ bytes look like a decompression bomb"):
        load_video(data)


def test_more_frames_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.zeros((40, 48, 48, 3), np.uint8)
    data = video(frames)
    monkeypatch.setattr(videos, "MAX_KEPT_PIXELS", 39 * 48 * 48)
    for given in (data, frames, list(frames)):
        assert len(load_video(given, num_frames=39).frames) == 39
        with pytest.raises(FormatError, match=r"40 frames of 48 x 48.*num_frames"):
            load_video(given, num_frames=10**12)


def test_a_header_with_an_absurd_number_of_frames() -> None:
    """What is in the file counts."""
    data = bytearray(video(np.stack([np.full((48, 48, 3), i * 6, np.uint8) for i in range(40)]), container="avi"))
    for name, offset in ((b"avih", 24), (b"strh", 40)):
        at = data.index(name) + offset
        assert struct.unpack_from("<I", data, at) == (40,)
        struct.pack_into("<I", data, at, 0x7FFF_FFFF)
    assert load_video(bytes(data), num_frames=8).indices.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]


@pytest.mark.parametrize("load", [load_video, load_audio])
def test_a_header_that_asks_for_all_memory(load: Callable[[Any], Any]) -> None:
    """19 GB for a table of times: a damaged file, and no MemoryError of this process."""
    data = video(np.zeros((4, 48, 48, 3), np.uint8)) if load is load_video else sound(tone(0.5), 16_000, "ipod", "aac")
    table = bytearray(data)
    struct.pack_into(">I", table, table.index(b"stts") + 8, 0x8C00_0001)
    with contextlib.suppress(FormatError):  # where there is so much memory, the table is only cut short
        load(bytes(table))


def test_a_decoder_without_memory_is_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")

    def refuse(*_: Any, **__: Any) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(av, "open", refuse)
    for load in (load_video, load_audio):
        with pytest.raises(FormatError, match="it asks for more memory than there is"):
            load(b"words and words")


# -- what names other files ------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a film, and what was asked of the server."""
    film, asked = video(np.zeros((8, 48, 48, 3), np.uint8), container="mpegts", codec="mpeg2video"), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(film)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/film.ts", asked
        found.shutdown()


def playlist(name: str) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:5,\n{name}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("load", [load_video, load_audio])
def test_playlists_fetch_nothing_and_open_nothing(tmp_path: Path, server: Any, load: Callable[[Any], Any]) -> None:
    address, asked = server
    film = tmp_path / "film.ts"
    film.write_bytes(video(np.zeros((8, 48, 48, 3), np.uint8), container="mpegts", codec="mpeg2video"))
    for ending, text in {
        "m3u8": playlist(address), "M3U8": playlist(film.name), "ffconcat": f"ffconcat version 1.0\nfile {film.name}\n",
    }.items():  # fmt: skip
        path = tmp_path / f"list.{ending}"
        path.write_text(text)
        for given in (path, text.encode()):
            with pytest.raises(FormatError, match="that can be read"):
                load(given)
    assert asked == []


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """What stands for KeyboardInterrupt here."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("form", ["flac", "mp3", "m4a", "mp4"])
def test_an_interrupt_is_never_taken_for_the_end(form: str) -> None:
    """Wherever in the decoding it comes. (PyAV loses one that comes just while it finds the end: then all is there.)

    No garbage is collected meanwhile: Python discards what a signal raises in the callback of another library.
    """
    if form == "mp4":
        data, load = video(np.random.default_rng(0).integers(0, 255, (60, 96, 96, 3), np.uint8)), load_video
    elif form == "m4a":
        data, load = sound(tone(25.0), 16_000, "ipod", "aac"), load_audio
    else:
        buffer = io.BytesIO()
        soundfile.write(buffer, tone(25.0), 16_000, format=form.upper())
        data, load = buffer.getvalue(), load_audio
    load(data)
    begin = time.monotonic()
    whole = load(data)
    seconds = time.monotonic() - begin

    def stop(*_: Any) -> None:
        raise Stop

    lost = 0
    before = signal.signal(signal.SIGALRM, stop)
    gc.disable()
    try:
        for i in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(seconds * (i + 1) / 41, 1e-5))
                while signal.getitimer(signal.ITIMER_REAL)[0]:
                    found = load(data)
                lost += 1
                assert len(found) == len(whole) if load is load_audio else len(found.frames) == len(whole.frames)
            except Stop:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert lost <= (0 if form in ("flac", "mp3") else 13)
