# SPDX-License-Identifier: Apache-2.0
"""Videos to frames with their times, sampled as in transformers' processor; each frame is then a small picture.

Ref: transformers video_utils.py (sampling, metadata), models/gemma4/video_processing_gemma4.py, processing_gemma4.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.errors import FormatError
from gemma4.media import image as images
from gemma4.media.container import open_container, stream_kinds
from gemma4.media.source import FileLike, is_file, name_of, open_source, reason, require
from gemma4.narrow import is_array, is_integer, is_sequence

Sampling: TypeAlias = Literal["time", "index"]
NUM_FRAMES, FRAME_TOKENS = 32, 70  # defaults: frames per video, soft tokens per frame
MIN_FPS, MAX_FPS = 1e-6, 1e6  # of frames given one by one
DEFAULT_FPS = 24.0  # if unknown: the basis of the prompt's times

# To decode: nine hours at 30 frames a second, and a byte of the file for 131,072 pixels (a film of a slide has one
# for 25,000, a malicious file one for a million). To keep: 32 frames of 8K are 1,062.
MAX_FRAMES, FREE_PIXELS, MAX_PIXELS_PER_BYTE = 1 << 20, 10**10, 1 << 17
MAX_KEPT_PIXELS = 2_000_000_000
_CHECK_EVERY = 1 << 12  # packets
_NO_TIME = np.iinfo(np.int64).min

VideoLike: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[np.generic] | Seq[images.ImageLike] | VideoFrames"


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """frames: n pictures uint8 [height, width, 3] · indices: int [n] of them in the video · fps: average of the
    video · times: of each, in seconds from the first frame of all; None = index / fps.
    """

    frames: list[NDArray[np.uint8]]
    indices: NDArray[np.int64]
    fps: float
    times: tuple[float, ...] | None = None

    @property
    def seconds(self) -> list[float]:
        """The time of each frame, in seconds."""
        return [int(index) / self.fps for index in self.indices] if self.times is None else list(self.times)

    @property
    def timestamps(self) -> list[str]:
        """The times in the prompt's form: "MM:SS"."""
        return [timestamp(second) for second in self.seconds]


def load_video(
    video: VideoLike, *, num_frames: int = NUM_FRAMES, fps: float | None = None, sampling: Sampling = "time"
) -> VideoFrames:
    """Frames spread evenly over a video, or all of a shorter one; upright according to the file.

    video: path, bytes of a file, or frames (an array [n, height, width, 3], or a list of inputs of `load_image`). A
    result of this function is returned unchanged.
    sampling: "time": number i of n is the frame shown at i / n of the length, with the file's time; at a constant
    frame rate this is frame i * total // n. "index": that frame and index / fps whatever the file's times
    are, as in transformers.
    fps: of frames given one by one, None = 24; files state their own. The sound track is not read.
    Raises FormatError (damaged, no video stream, too large, too many frames), ValueError, OSError, ImportError.
    """
    if not _is_count(num_frames):
        raise ValueError(f"num_frames must be a whole number of at least 1, got {num_frames!r}")
    if sampling not in get_args(Sampling):
        raise ValueError(f'sampling must be "time" or "index", got {sampling!r}')
    if isinstance(video, VideoFrames):
        return video
    if is_file(video):
        if fps is not None:
            raise ValueError("fps= goes with frames given one by one; a file says its own")
        return _read_file(video, num_frames, sampling)
    if fps is not None:
        checks.number("fps", fps, MIN_FPS, MAX_FPS)
    return _from_frames(video, num_frames, float(fps or DEFAULT_FPS))


def preprocess(video: VideoFrames, image_tokens: int = FRAME_TOKENS) -> list[images.ImagePatches]:
    """Patches of each frame, as `gemma4.media.image.preprocess` gives them."""
    return [images.preprocess(frame, image_tokens) for frame in video.frames]


def sample_indices(total: int, num_frames: int) -> NDArray[np.int64]:
    """int64 [min(total, num_frames)]: frames spread evenly from the first on."""
    n = min(total, num_frames)
    return np.arange(n, dtype=np.int64) * total // n


def timestamp(seconds: float) -> str:
    """ "MM:SS", rounded down; an hour is "60:00"."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def _is_count(value: object) -> bool:
    return bool(is_integer(value) and value >= 1)


def _check_frames(video: object) -> None:
    if not (is_sequence(video) or is_array(video)):
        raise ValueError(f"a video must be a path, bytes or frames, got {type(video).__name__}")
    if is_array(video) and video.ndim != 4:
        raise ValueError(f"a video array must be [frames, height, width, channels], got {video.shape}")


def _from_frames(video: Any, num_frames: int, fps: float) -> VideoFrames:
    _check_frames(video)
    if not len(video):
        raise FormatError("the video has no frames")
    indices = sample_indices(len(video), num_frames)
    first = _load_frame(video[0])
    check_kept(len(indices), first.shape[0], first.shape[1], "the video")
    frames = [first, *(_load_frame(video[index]) for index in indices[1:])]
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"the frames of a video must have one size, got {sorted(sizes)}")
    return VideoFrames(frames, indices, fps)


def _load_frame(frame: images.ImageLike) -> NDArray[np.uint8]:
    """A frame given by itself; unlike a picture it may be almost black."""
    return images.from_array(frame) if isinstance(frame, np.ndarray) else images.load_image(frame)


def _read_file(video: FileLike, num_frames: int, sampling: Sampling) -> VideoFrames:
    name = name_of(video, "video")
    require("av")
    with open_source(video, "video") as file:
        n_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with open_container(file) as container:
                stream = _video_stream(container, name)
                fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
                shown, length = _display_times(container, stream, n_bytes, name)
                total = _n_frames(stream.frames, len(shown))
                check_kept(min(total, num_frames), stream.height, stream.width, name)
                chosen = sample_indices(total, num_frames)
                if sampling == "time" and total > num_frames and not _is_even(shown):
                    chosen = _sample_times(shown, length, num_frames)
                found = _decode(container, stream, chosen, name)
        except (FormatError, MemoryError):
            raise
        except Exception as error:  # FFmpegError, and any error of PyAV on a wrong header
            raise FormatError(f"{name}: not a video that can be read ({reason(error)})") from error
    frames, indices = [pixels for pixels, _, _ in found], np.array([index for _, index, _ in found], np.int64)
    times = tuple(time for _, _, time in found if time is not None)
    return VideoFrames(frames, indices, fps, times if sampling == "time" and len(times) == len(found) else None)


def _video_stream(container: Any, name: str) -> Any:
    for stream in container.streams.video:
        width, height = getattr(stream, "width", 0), getattr(stream, "height", 0)  # none without a decoder
        if width and height:
            images.check_pixels(height, width, None, name)
            stream.thread_type = "AUTO"
            return stream
    what = "no video stream that can be decoded" if container.streams.video else "no video stream"
    raise FormatError(f"{name}: there is {what} in it (streams: {stream_kinds(container)})")


def _display_times(container: Any, stream: Any, n_bytes: int, name: str) -> tuple[NDArray[np.int64], int]:
    """The time of each frame, int64 [frames] in order, and the length of all, in the stream's units.

    One packet holds one frame; nothing is decoded. _NO_TIME marks unknown times, which come first.
    Raises FormatError if there are too many to decode.
    """
    spans: list[tuple[int, int]] = []
    for packet in container.demux(stream):
        if packet.size:
            spans.append((_NO_TIME if packet.pts is None else packet.pts, packet.duration or 0))
            if len(spans) % _CHECK_EVERY == 0:
                _check_work(len(spans), stream, n_bytes, name)
    container.seek(0)
    _check_work(len(spans), stream, n_bytes, name)
    spans.sort()
    shown = np.array([time for time, _ in spans], np.int64)
    if len(shown) < 2 or shown[0] == _NO_TIME:
        return shown, 0
    last = spans[-1][1] or int(np.median(np.diff(shown)))
    return shown, int(shown[-1] - shown[0]) + last


def _n_frames(promised: int, found: int) -> int:
    """Frames of the whole video: the file may be truncated, or its header wrong or silent."""
    return promised if found <= promised <= 2 * found else max(found, 1)


def _check_work(n_frames: int, stream: Any, n_bytes: int, name: str) -> None:
    """Raise FormatError for a video that would take hours to decode, or whose size is implausible for the file's."""
    pixels = n_frames * stream.width * stream.height
    if n_frames > MAX_FRAMES:
        raise FormatError(f"{name}: more than {MAX_FRAMES} frames. Cut it, or lower its frame rate.")
    if pixels > max(FREE_PIXELS, n_bytes * MAX_PIXELS_PER_BYTE):
        raise FormatError(
            f"{name}: {n_frames} frames of {stream.width} x {stream.height} out of {n_bytes} bytes look like a "
            f"decompression bomb (expected at least one byte for {MAX_PIXELS_PER_BYTE} pixels). Scale it down first."
        )


def check_kept(n_frames: int, height: int, width: int, name: str) -> None:
    """Raise FormatError for more pixels than are kept of one video."""
    if n_frames * height * width > MAX_KEPT_PIXELS:
        raise FormatError(
            f"{name}: {n_frames} frames of {width} x {height}; the limit is {MAX_KEPT_PIXELS // 1_000_000} megapixels "
            "together. Take fewer frames (num_frames), or scale them down."
        )


def _is_even(shown: NDArray[np.int64]) -> bool:
    """Whether the frame rate is constant up to a unit of the times; true if times are unknown."""
    if len(shown) < 3 or shown[0] == _NO_TIME:
        return True
    even: NDArray[np.float64] = np.linspace(int(shown[0]), int(shown[-1]), len(shown))
    return bool(np.abs(shown - even).max() <= 1)


def _sample_times(shown: NDArray[np.int64], length: int, num_frames: int) -> NDArray[np.int64]:
    """int64 [at most num_frames]: the frames shown at i / n of the length, each once."""
    wanted: NDArray[np.int64] = shown[0] + np.arange(num_frames) * length // num_frames
    return np.unique(np.searchsorted(shown, wanted, side="right") - 1)


def _decode(
    container: Any, stream: Any, indices: NDArray[np.int64], name: str
) -> list[tuple[NDArray[np.uint8], int, float | None]]:
    """(pixels, index, seconds) of these frames; frames missing from the file, whatever its header says, are left
    out. Seconds count from the first frame; None where the file has no times.
    """
    wanted, last = set(indices.tolist()), int(indices[-1])
    found: list[tuple[NDArray[np.uint8], int, float | None]] = []
    first: Any = None
    for number, frame in enumerate(container.decode(stream)):
        first = first or frame
        if number in wanted:
            images.check_pixels(frame.height, frame.width, None, name)
            time = None if None in (frame.pts, first.pts) else float((frame.pts - first.pts) * stream.time_base)
            found.append((_upright(frame, (first.width, first.height)), number, time))
        if number >= last:
            break
    if not found:
        raise FormatError(f"{name}: there is no frame in its video stream")
    return found


def _upright(frame: Any, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: rotated and mirrored according to the file's display matrix.

    size: common width and height of all frames, since a stream may change its own.
    """
    if (frame.width, frame.height) != size:
        frame = frame.reformat(*size)
    pixels = frame.to_ndarray(format="rgb24")
    # side_data.get() raises internally if there is none, and a Ctrl-C at that moment is lost with that
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return pixels
    # A pixel (x, y) moves to (a x + c y, b x + d y); of (a, c) and of (b, d) one is 1 or -1 and one is 0.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.int64).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
