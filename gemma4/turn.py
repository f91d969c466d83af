# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.text.turn."""

from gemma4.text.turn import ModelTurn, ToolCall, parse_arguments, parse_turn

__all__ = ["ModelTurn", "ToolCall", "parse_arguments", "parse_turn"]
