# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.encoders.soft_tokens."""

from gemma4.encoders.soft_tokens import MAX_BYTES, EncodedMedia, encode

__all__ = ["MAX_BYTES", "EncodedMedia", "encode"]
