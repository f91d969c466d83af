# SPDX-License-Identifier: Apache-2.0
"""The former name of gemma4.text.chat."""

from gemma4.text.chat import ROLES, ChatTemplate, ModelTurn, ToolCall, check_messages, encode_chat, parse_turn

__all__ = ["ROLES", "ChatTemplate", "ModelTurn", "ToolCall", "check_messages", "encode_chat", "parse_turn"]
