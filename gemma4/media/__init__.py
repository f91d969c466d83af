# SPDX-License-Identifier: Apache-2.0
"""Pictures, sound and video as inputs of the encoders, with the numbers of transformers' processors.

The decoders (Pillow, soundfile, soxr, PyAV) are the extra `media` and are imported at first use; arrays
of samples need NumPy only.
"""

from typing import TYPE_CHECKING

from gemma4._moved import moved

if not TYPE_CHECKING:  # modules under their old names; each is imported at first use
    __getattr__ = moved(__name__, {name: f"{__name__}.{name}:" for name in ("cache", "taps")})
