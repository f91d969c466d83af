# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: files in, named and checked views out. Nothing here computes."""

from gemma4.load.config import TextConfig
from gemma4.load.huggingface import Checkpoint, open_checkpoint, shipped_models

__all__ = ["Checkpoint", "TextConfig", "open_checkpoint", "shipped_models"]
