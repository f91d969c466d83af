# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.generation.pieces."""

from gemma4.generation.pieces import ContinuationText, Piece, TurnText

__all__ = ["ContinuationText", "Piece", "TurnText"]
