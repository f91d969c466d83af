# SPDX-License-Identifier: Apache-2.0
"""Recordings as the audio tower takes them: transformers' own log-mel features, without a batch's padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

TOKEN = 0.04  # seconds


@cache
def _extractor() -> Gemma4AudioFeatureExtractor:
    return Gemma4AudioFeatureExtractor()


def mel(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """[frames, 128] log-mel of one recording at 16 kHz, real frames only."""
    found = _extractor()([samples])
    return found["input_features"][0][found["input_features_mask"][0]]


def tokens(frames: int) -> int:
    """Soft tokens of so many mel frames: two convolutions of stride 2."""
    return ((frames + 1) // 2 + 1) // 2


def stack(features: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """(input_features [recordings, most, 128], mask [recordings, most]), padded with zeros."""
    most = max(map(len, features))
    values = np.zeros((len(features), most, features[0].shape[1]), np.float32)
    mask = np.zeros((len(features), most), bool)
    for i, feature in enumerate(features):
        values[i, : len(feature)] = feature
        mask[i, : len(feature)] = True
    return torch.from_numpy(values), torch.from_numpy(mask)
