# SPDX-License-Identifier: Apache-2.0
"""Pictures, sound and video as the encoders want them, to the numbers of transformers' processors.

The decoders (Pillow, soundfile, soxr, PyAV) are the extra `media` and are imported where they are first needed; arrays
of samples go through NumPy alone.
"""

from typing import TYPE_CHECKING

from gemma4._moved import moved

if not TYPE_CHECKING:  # modules by the names that they had before; each is imported where it is first used
    __getattr__ = moved(__name__, {name: f"{__name__}.{name}:" for name in ("cache", "taps")})
