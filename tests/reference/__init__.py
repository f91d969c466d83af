# SPDX-License-Identifier: Apache-2.0
"""The text model against transformers in float32, and against itself to the bit."""
