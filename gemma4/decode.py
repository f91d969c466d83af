# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.generation.loop."""

from gemma4.generation.loop import Generation, Timings

__all__ = ["Generation", "Timings"]
