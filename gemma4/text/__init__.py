# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, chat messages to a prompt, a model's turn to its parts."""
