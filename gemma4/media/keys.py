# SPDX-License-Identifier: Apache-2.0
"""The cache's keys of positions: token ids, and numbers made from the content where soft tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_SOFT_KEY = 1 << 62  # soft tokens' keys have this bit; below it 42 bits of the digest and 20 for the row


def content_key(digest: bytes) -> int:
    """The key of a medium's first soft token; the keys of the rest follow it."""
    return _SOFT_KEY | (int.from_bytes(digest[:8], "little") >> 22) << 20


def is_soft(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the keys are of soft tokens."""
    return (keys & _SOFT_KEY) != 0


def run_start(keys: Sequence[int] | NDArray[np.int64], position: int) -> int:
    """The first position of the run of soft tokens that continues at `position`; position itself without such a run."""
    while 0 < position < len(keys) and keys[position] & _SOFT_KEY and keys[position - 1] + 1 == keys[position]:
        position -= 1
    return position
