# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.generation.stream."""

from gemma4.generation.stream import Generation, Options, TextStream, Timings, default_stop_ids, generate, stream

__all__ = ["Generation", "Options", "TextStream", "Timings", "default_stop_ids", "generate", "stream"]
