# SPDX-License-Identifier: Apache-2.0
"""A model's image and audio encoders, their soft tokens, and hooks and captures inside them."""

from gemma4.encoders.encoder import Encoder, MediumLike
from gemma4.encoders.soft_tokens import encode_audio, encode_image, encode_video, inputs_of

__all__ = ["Encoder", "MediumLike", "encode_audio", "encode_image", "encode_video", "inputs_of"]
