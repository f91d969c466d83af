# SPDX-License-Identifier: Apache-2.0
"""Videos to frames with their times, chosen as transformers' processor does; each frame is then a small picture.

Ref: transformers video_utils.py (sampling, metadata), models/gemma4/video_processing_gemma4.py, processing_gemma4.py
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.media import image as images
from gemma4.media.source import FileLike, is_file, name_of, open_source, reason, require

NUM_FRAMES, FRAME_TOKENS = 32, 70  # frames per video, soft tokens per frame, where nothing else is asked for
DEFAULT_FPS = 24.0  # where nobody knows: what the prompt's times are then reckoned with

VideoLike: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any] | Seq[Any] | VideoFrames"


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """frames: n pictures uint8 [height, width, 3] · indices: int [n] of them in the video · fps: of the video."""

    frames: list[NDArray[np.uint8]]
    indices: NDArray[np.int64]
    fps: float

    @property
    def seconds(self) -> list[float]:
        """When each frame is shown, in seconds: index / fps."""
        return [int(index) / self.fps for index in self.indices]

    @property
    def timestamps(self) -> list[str]:
        """The same as the prompt says it: "MM:SS"."""
        return [timestamp(second) for second in self.seconds]


def load_video(video: VideoLike, *, num_frames: int = NUM_FRAMES, fps: float | None = None) -> VideoFrames:
    """Frames spread evenly over a video: number i of n is frame i * total // n; all of them if there are fewer.

    video: path, bytes of a file, or frames (an array [n, height, width, 3], or a list of what `load_image` takes). What
    this function returned is returned again.
    fps: of frames given one by one, None = 24; a file knows its own. The sound track is not read.
    Raises FormatError (damaged, no video stream, too large), ValueError, OSError, ImportError.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if isinstance(video, VideoFrames):
        return video
    if is_file(video):
        if fps is not None:
            raise ValueError("fps= goes with frames given one by one; a file says its own")
        return _read_file(video, num_frames)
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a number above 0, got {fps}")
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


def _from_frames(video: Any, num_frames: int, fps: float) -> VideoFrames:
    if not isinstance(video, Seq | np.ndarray):
        raise ValueError(f"a video must be a path, bytes or frames, got {type(video).__name__}")
    if isinstance(video, np.ndarray) and video.ndim != 4:
        raise ValueError(f"a video array must be [frames, height, width, channels], got {video.shape}")
    if not len(video):
        raise FormatError("the video has no frames")
    indices = sample_indices(len(video), num_frames)
    frames = [images.load_image(video[index]) for index in indices]
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"the frames of a video must have one size, got {sorted(sizes)}")
    return VideoFrames(frames, indices, fps)


def _read_file(video: FileLike, num_frames: int) -> VideoFrames:
    av = require("av")
    name = name_of(video, "video")
    with open_source(video, "video") as file:
        try:
            with av.open(file) as container:
                stream = _video_stream(container, name)
                fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
                total = stream.frames or _count(container, stream)
                frames, indices = _decode(container, stream, sample_indices(max(total, 1), num_frames), name)
        except (FormatError, MemoryError):
            raise
        except Exception as error:  # FFmpegError, and whatever a header that lies makes of PyAV
            raise FormatError(f"{name}: not a video that can be read ({reason(error)})") from error
    return VideoFrames(frames, indices, fps)


def _video_stream(container: Any, name: str) -> Any:
    for stream in container.streams.video:
        width, height = getattr(stream, "width", 0), getattr(stream, "height", 0)  # none without a decoder for it
        if width and height:
            images.check_pixels(height, width, None, name)
            stream.thread_type = "AUTO"
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    what = "no video stream that can be decoded" if "video" in kinds else "no video stream"
    raise FormatError(f"{name}: there is {what} in it (streams: {', '.join(kinds) or 'none'})")


def _count(container: Any, stream: Any) -> int:
    """Frames of a file whose header does not say (Matroska): one packet holds one."""
    total = sum(packet.size > 0 for packet in container.demux(stream))
    container.seek(0)
    return total


def _decode(
    container: Any, stream: Any, indices: NDArray[np.int64], name: str
) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """The frames of these indices; those that the file does not hold, whatever its header says, are left out."""
    wanted, last = set(indices.tolist()), int(indices[-1])
    frames: list[NDArray[np.uint8]] = []
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            images.check_pixels(frame.height, frame.width, None, name)
            pixels = frame.to_ndarray(format="rgb24")
            frames.append(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))
        if number >= last:
            break
    if not frames:
        raise FormatError(f"{name}: there is no frame in its video stream")
    return frames, indices[: len(frames)]
