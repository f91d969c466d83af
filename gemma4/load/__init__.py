# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: files in, named and checked views out. Nothing here computes."""

import os

from gemma4.load.checkpoint import Checkpoint, Progress
from gemma4.load.config import TextConfig
from gemma4.load.gguf_checkpoint import open_gguf
from gemma4.load.huggingface import open_directory, resolve, shipped_models

__all__ = ["Checkpoint", "TextConfig", "open_checkpoint", "shipped_models"]


def open_checkpoint(name_or_path: str | os.PathLike[str], *, progress: Progress | None = None) -> Checkpoint:
    """Open a shipped model by name, a Hugging Face directory, a hub id that is already in the local cache, or a GGUF
    file (any part of a split one).

    Raises FileNotFoundError (nothing there, or a part is missing: named), FormatError (a file is not what it should
    be), NotImplementedError (an architecture, dtype or file format this engine does not read).
    """
    path = resolve(name_or_path)
    return open_directory(path, progress=progress) if path.is_dir() else open_gguf(path, progress=progress)
