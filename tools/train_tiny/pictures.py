# SPDX-License-Identifier: Apache-2.0
"""Pictures as the vision tower takes them: resized to a budget of soft tokens, cut into patches of 16 × 16 pixels.

The same numbers as transformers' Gemma4ImageProcessorPil (tests/test_train_media.py), for any budget: training starts
with budgets below the smallest that Gemma 4 has (70), where a picture costs a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

PATCH, POOL = 16, 3


class Patches(NamedTuple):
    """values [patches, 768] uint8 (row, column, channel); the picture is `columns` × `rows` patches."""

    values: NDArray[np.uint8]
    columns: int
    rows: int

    @property
    def tokens(self) -> int:
        return self.columns * self.rows // POOL**2


def _resized(width: int, height: int, budget: int) -> tuple[int, int]:
    """(width, height) in pixels that a picture gets."""
    return get_aspect_ratio_preserving_size(height, width, PATCH, budget * POOL**2, POOL)[::-1]


def grid(width: int, height: int, budget: int) -> tuple[int, int]:
    """(columns, rows) of soft tokens of a picture of so many pixels."""
    columns, rows = (side // (PATCH * POOL) for side in _resized(width, height, budget))
    return columns, rows


def patches(image: Image.Image, budget: int) -> Patches:
    """Resize and cut one RGB picture; at most `budget` soft tokens."""
    width, height = _resized(image.width, image.height, budget)
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // PATCH, width // PATCH
    values = resized.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    return Patches(values, columns, rows)


def stack(pictures: Sequence[Patches]) -> tuple[Tensor, Tensor]:
    """(pixel_values [pictures, most, 768] float32 in 0…1, position ids [pictures, most, 2]), padded with 0 and -1."""
    most = max(len(picture.values) for picture in pictures)
    pixels = np.zeros((len(pictures), most, PATCH * PATCH * 3), np.float32)
    positions = np.full((len(pictures), most, 2), -1, np.int64)
    for i, picture in enumerate(pictures):
        n = len(picture.values)
        pixels[i, :n] = picture.values
        positions[i, :n, 0] = np.arange(n) % picture.columns
        positions[i, :n, 1] = np.arange(n) // picture.columns
    return torch.from_numpy(pixels).mul_(1 / 255), torch.from_numpy(positions)
