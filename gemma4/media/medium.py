# SPDX-License-Identifier: Apache-2.0
"""One picture, recording or video of a conversation: read, counted in soft tokens, identified by its content.

Ref: transformers models/gemma4/processing_gemma4.py (the prompt text of each)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.encoder_config import EncoderConfig, Modality
from gemma4.media import audio as sounds
from gemma4.media import image as images
from gemma4.media import video as videos
from gemma4.media.source import is_file, name_of
from gemma4.narrow import is_list_or_tuple, is_mapping
from gemma4.text.parts import canonical

Kind: TypeAlias = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = ("image", "audio", "video")
# the template's placeholder for such a part; the soft token itself
PLACEHOLDER: dict[Kind, str] = {"image": "<|image|>", "audio": "<|audio|>", "video": "<|video|>"}
_BEGIN, _END = {"image": "<|image>", "audio": "<|audio>"}, {"image": "<image|>", "audio": "<audio|>"}
_OPTIONS: dict[str, set[str]] = {
    "image": {"image_tokens"},
    "audio": {"rate"},
    "video": {"image_tokens", "fps", "num_frames", "sampling"},
}


@dataclass(frozen=True, slots=True)
class Modalities:
    """A model's inputs besides text. raw_audio: raw samples (the unified model), not a spectrogram. advice: text for
    messages on a missing encoder."""

    image: bool = False
    audio: bool = False
    raw_audio: bool = False
    advice: str = ""

    @classmethod
    def of(cls, encoders: Mapping[Modality, EncoderConfig], advice: str = "") -> Modalities:
        """The modalities of a checkpoint with these encoders."""
        audio = encoders.get("audio")
        return cls(
            "vision" in encoders, audio is not None, audio is not None and audio.kind == "audio_embedder", advice
        )

    def check(self, kind: Kind, name: str) -> None:
        """Raises NotImplementedError if the model has no encoder for it."""
        if not (self.audio if kind == "audio" else self.image):
            known = ["text", *(["images", "video"] if self.image else []), *(["audio"] if self.audio else [])]
            encoder = "audio" if kind == "audio" else "vision"
            raise NotImplementedError(
                f"{name}: this model has no {encoder} encoder, it takes {', '.join(known)}{self.advice}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Medium:
    """A part of a message that is not text.

    content:      uint8 [height, width, 3] · float32 samples [n] at 16 kHz · VideoFrames
    image_tokens: budget of a picture, or of each frame; 0 for sound
    grid:         rows and columns of soft tokens of a picture or of every frame; (1, n) for sound
    n_runs:       contiguous runs of soft tokens: 1, or the frames of a video
    digest:       16 bytes that identify the content and the budget
    """

    kind: Kind
    name: str
    content: Any
    image_tokens: int
    grid: tuple[int, int]
    n_runs: int
    digest: bytes

    @property
    def run_length(self) -> int:
        """Soft tokens of one run."""
        return self.grid[0] * self.grid[1]

    def expansion(self) -> str:
        """The text that replaces the placeholder: a soft token for every row that the encoder gives."""
        soft = PLACEHOLDER[self.kind] * self.run_length
        if self.kind == "audio":
            return f"{_BEGIN['audio']}{soft}{_END['audio']}"
        run = f"{_BEGIN['image']}{soft}{_END['image']}"
        if self.kind == "image":
            return run
        return " ".join(f"{time} {run}" for time in self.content.timestamps)


def read_media(
    messages: Sequence[Mapping[str, object]], *, modalities: Modalities, image_tokens: int = 280
) -> list[Medium]:
    """Every medium of a conversation, in order: parts {"type": "image" | "audio" | "video", that type: the medium, …},
    or in other clients' formats (gemma4/text/parts.py).

    image: path, bytes, PIL image, array · image_tokens   audio: path, bytes, array · rate (of an array)
    video: path, bytes, frames · fps (of frames), num_frames (32), image_tokens (70 a frame), sampling ("time")
    Raises what `load_image`, `load_audio`, `load_video` raise, ValueError for invalid parts, and
    NotImplementedError for a kind that the model has no encoder for.
    """
    found: list[Medium] = []
    for i, message in enumerate(canonical(messages)):
        content = message.get("content")
        for j, part in enumerate(content if is_list_or_tuple(content) else ()):
            if is_mapping(part) and part.get("type") in KINDS:
                found.append(_read_part(part, f"message {i}, part {j}", image_tokens, modalities))
    return found


def _read_part(part: Mapping[str, Any], where: str, image_tokens: int, modalities: Modalities) -> Medium:
    kind: Kind = part["type"]
    source = part.get(kind)
    if source is None:
        keys = ", ".join(map(str, part))
        raise ValueError(f'{where}: a part of type "{kind}" needs "{kind}": a path, bytes or an array; it has {keys}')
    modalities.check(kind, name_of(source, kind) if is_file(source) else f"{where} ({kind})")
    if isinstance(source, Medium):
        return source
    unknown = set(part) - _OPTIONS[kind] - {"type", kind}
    if unknown:
        known = ", ".join(sorted(_OPTIONS[kind]))
        raise ValueError(f"{where}: no option {min(map(str, unknown))!r} for {kind}; there are {known}")
    options = {name: part[name] for name in _OPTIONS[kind] if part.get(name) is not None}
    if kind == "image":
        return read_image(source, **{"image_tokens": image_tokens, **options})
    if kind == "audio":
        return read_audio(source, raw=modalities.raw_audio, **options)
    return read_video(source, **options)


def read_image(image: images.ImageLike, image_tokens: int = 280) -> Medium:
    """A picture as a part of a message."""
    pixels = images.load_image(image)
    height, width = images.target_size(pixels.shape[0], pixels.shape[1], image_tokens)
    grid = (height // images.SIDE, width // images.SIDE)
    return Medium("image", name_of(image, "image"), pixels, image_tokens, grid, 1, _digest(image_tokens, pixels))


def read_audio(audio: sounds.AudioLike, rate: int | None = None, *, raw: bool = False) -> Medium:
    """A recording as a part of a message. Raises FormatError if it is too short, or over 30 s for a spectrogram."""
    most = None if raw else sounds.MAX_SAMPLES / sounds.RATE
    samples, name = sounds.load_audio(audio, rate, max_seconds=most), name_of(audio, "audio")
    n = -(-len(samples) // sounds.UNIFIED_FRAME) if raw else sounds.n_soft_tokens(len(samples))
    if n < 1:
        raise FormatError(f"{name}: {sounds.too_short(len(samples))}")
    return Medium("audio", name, samples, 0, (1, n), 1, _digest(int(raw), samples))


def read_video(
    video: videos.VideoLike,
    *,
    fps: float | None = None,
    num_frames: int = videos.NUM_FRAMES,
    image_tokens: int = videos.FRAME_TOKENS,
    sampling: videos.Sampling = "time",
) -> Medium:
    """A video as a part of a message."""
    found = videos.load_video(video, fps=fps, num_frames=num_frames, sampling=sampling)
    frame = found.frames[0]
    height, width = images.target_size(frame.shape[0], frame.shape[1], image_tokens)
    grid = (height // images.SIDE, width // images.SIDE)
    name = name_of(video, "video") if is_file(video) else "the video"
    digest = _digest(image_tokens, *found.frames)
    return Medium("video", name, found, image_tokens, grid, len(found.frames), digest)


def _digest(option: int, *arrays: NDArray[Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{option} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
