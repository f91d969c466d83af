# SPDX-License-Identifier: Apache-2.0
"""Pictures, sound and video as the encoders want them, to the numbers of transformers' processors.

The decoders (Pillow, soundfile, soxr, PyAV) are the extra `media` and are imported where they are first needed; arrays
of samples go through NumPy alone.
"""
