# SPDX-License-Identifier: Apache-2.0
"""What encoders gave, kept by content: a question that follows does not encode the picture again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemma4.encoders.encoder import inputs_of
from gemma4.interp.hooks import SiteHooks
from gemma4.interp.sites import Site
from gemma4.media.medium import Medium

if TYPE_CHECKING:
    from gemma4.model import Model

MAX_BYTES = 256 << 20  # a picture of 280 soft tokens is 1.7 MB for E2B, a video of 32 frames 48 MB for 31B


class EncodedMedia:
    """Soft tokens by the digest of their medium; the least recently used go first. Threads may share it."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._kept.values())

    def get(self, model: Model, medium: Medium) -> NDArray[np.float32]:
        """float32 [n_runs * run_length, d_model], read-only: from here, or else from the model's encoder, unedited."""
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
    model: Model, medium: Medium, hooks: SiteHooks | None = None, capture: Iterable[Site] = (), **place: int
) -> tuple[NDArray[np.float32], list[dict[str, NDArray[np.float32]]]]:
    """Soft tokens float32 [n_runs * run_length, d_model], read-only, and what was captured of each run.

    hooks, capture, place: as `Encoder.run` takes them. Raises as the model's encoder does.
    """
    encoder = model.audio if medium.kind == "audio" else model.vision
    soft, caches = encoder.run(inputs_of(encoder, medium), hooks or [], capture, **place)
    made, expected = np.concatenate(soft), (medium.n_runs * medium.run_length, model.engine_config["d_model"])
    if made.shape != expected:
        raise RuntimeError(f"{medium.name}: the encoder gave {made.shape} where {expected} soft tokens were announced")
    made.flags.writeable = False
    return made, caches
