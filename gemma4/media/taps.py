# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.encoders.hooks."""

from gemma4.encoders.hooks import EncoderTaps

__all__ = ["EncoderTaps"]
