# SPDX-License-Identifier: Apache-2.0
"""From media to soft tokens, cached by content: a follow-up question does not encode the picture again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.core import Core
from gemma4.encoders.encoder import Encoder, encoder_of
from gemma4.interp.cache import EncoderCache
from gemma4.interp.hooks import SiteHooks
from gemma4.interp.sites import Site
from gemma4.media import audio as sounds
from gemma4.media import image as images
from gemma4.media import video as videos
from gemma4.media.medium import Kind, Medium

F32: TypeAlias = NDArray[np.float32]
I32: TypeAlias = NDArray[np.int32]

# Token id in the engine's run of a position that takes an embedding. The engine does not distinguish kinds of media.
SOFT_ID: dict[Kind, int] = {"audio": -1, "image": -2, "video": -3}
BOTH_WAYS: tuple[Kind, ...] = ("image", "video")  # their soft tokens see each other, in models that do so
MAX_BYTES = 256 << 20  # a picture of 280 soft tokens is 1.7 MB for E2B, a video of 32 frames 48 MB for 31B


class SoftRows(NamedTuple):
    """The soft tokens among T positions, in the form a step takes."""

    ids: NDArray[np.int32]  # int32 [T]: the token's id, or below 0 where the position is an embedding (SOFT_ID)
    embeddings: NDArray[np.float32]  # float32 [T, d_model]; rows of tokens are not read
    keys: NDArray[np.int64]  # int64 [T]: the cache's keys of positions: token ids, or numbers from the content
    ends: NDArray[np.int32] | None = None  # int32 [T]: end of what each sees (images: the image's end); None: itself
    caches: tuple[EncoderCache, ...] = ()  # captures inside the encoders


def stretch_ends(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """int32 [T]: end (exclusive) of the stretch of True that contains a position; the position + 1 for False."""
    stops = np.flatnonzero(~np.append(inside[:-1] & inside[1:], False)) + 1
    return stops[np.searchsorted(stops, np.arange(len(inside)), side="right")].astype(np.int32)


class EncodedMedia:
    """Soft tokens by the digest of their medium; the least recently used go first. Threads may share it."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._kept.values())

    def get(self, model: Core, medium: Medium) -> NDArray[np.float32]:
        """float32 [n_runs * run_length, d_model], read-only: cached, or else from the model's encoder, unedited."""
        with self._lock:
            found = self._kept.get(medium.digest)
            if found is not None:
                self._kept.move_to_end(medium.digest)
                return found
        [made, _] = encode(model, medium)
        with self._lock:
            self._kept[medium.digest] = made
            while self.nbytes > self.max_bytes and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return made

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


def encode(
    model: Core, medium: Medium, hooks: SiteHooks | None = None, capture: Iterable[Site] = (), **place: int
) -> tuple[NDArray[np.float32], list[dict[str, NDArray[np.float32]]]]:
    """Soft tokens float32 [n_runs * run_length, d_model], read-only, and the captures of each run.

    hooks, capture, place: as `Encoder.run` takes them. Raises as the model's encoder does.
    """
    encoder = encoder_of(model, "audio" if medium.kind == "audio" else "vision")
    soft, caches = encoder.run(inputs_of(encoder, medium), hooks or [], capture, **place)
    made, expected = np.concatenate(soft), (medium.n_runs * medium.run_length, model.engine_config["d_model"])
    if made.shape != expected:
        raise RuntimeError(f"{medium.name}: the encoder gave {made.shape} where {expected} soft tokens were announced")
    made.flags.writeable = False
    return made, caches


def encode_image(model: Core, image: images.ImageLike, image_tokens: int) -> F32:
    """See `Model.encode_image`."""
    encoder = encoder_of(model, "vision")
    [soft] = encoder.encode([_patches(encoder, images.load_image(image), image_tokens)])
    return soft


def encode_video(
    model: Core,
    video: videos.VideoLike,
    image_tokens: int = videos.FRAME_TOKENS,
    *,
    num_frames: int = videos.NUM_FRAMES,
    fps: float | None = None,
    sampling: videos.Sampling = "time",
) -> F32:
    """See `Model.encode_video`."""
    encoder = encoder_of(model, "vision")
    if not isinstance(video, videos.VideoFrames):
        video = videos.load_video(video, num_frames=num_frames, fps=fps, sampling=sampling)
    return np.concatenate(encoder.encode([_patches(encoder, frame, image_tokens) for frame in video.frames]))


def encode_audio(model: Core, audio: sounds.AudioLike, rate: int | None = None) -> F32:
    """See `Model.encode_audio`."""
    encoder, samples = encoder_of(model, "audio"), sounds.load_audio(audio, rate)
    raw = encoder.config.kind == "audio_embedder"
    [soft] = encoder.encode([sounds.raw_frames(samples) if raw else sounds.log_mel(samples)])
    return soft


def inputs_of(encoder: Encoder, medium: Medium) -> list[tuple[F32, I32 | None]]:
    """The encoder's input for a part of a message: a picture, a recording, or every frame of a video."""
    if medium.kind == "audio":
        raw = encoder.config.kind == "audio_embedder"
        return [(sounds.raw_frames(medium.content) if raw else sounds.log_mel(medium.content), None)]
    frames = [medium.content] if medium.kind == "image" else medium.content.frames
    return [_patches(encoder, frame, medium.image_tokens) for frame in frames]


def _patches(encoder: Encoder, pixels: Any, image_tokens: int) -> tuple[F32, I32]:
    unified = encoder.config.kind == "vision_embedder"
    found = (images.preprocess_unified if unified else images.preprocess)(pixels, image_tokens)
    return found.patches, found.positions
