# SPDX-License-Identifier: Apache-2.0
"""From a prompt to sampled text: options, the loop, sampling, pieces of text, streams."""

from gemma4.generation.loop import Batch, Continuation, Generation, Timings
from gemma4.generation.options import GenerateOptions, Options
from gemma4.generation.stream import TextStream

__all__ = ["Batch", "Continuation", "GenerateOptions", "Generation", "Options", "TextStream", "Timings"]
