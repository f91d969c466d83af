# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.text.tokenizer."""

from gemma4.text.tokenizer import CONTROL, DecodeStream, Tokenizer

__all__ = ["CONTROL", "DecodeStream", "Tokenizer"]
