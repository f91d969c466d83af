# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: from files to named, checked views. Nothing here computes."""

import os
from pathlib import Path

from gemma4 import checks
from gemma4.load.checkpoint import Checkpoint, Progress
from gemma4.load.config import TextConfig
from gemma4.load.gguf_checkpoint import open_gguf
from gemma4.load.huggingface import open_directory, resolve, shipped_models

__all__ = ["Checkpoint", "TextConfig", "open_checkpoint", "shipped_models"]


def open_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Open a shipped model by name, a Hugging Face directory, a hub id that is already in the local cache, or a GGUF
    file (any part of a split one), with its encoders from the file `mmproj`.

    Raises ValueError (an mmproj for a model whose encoders are not in one), FileNotFoundError (nothing there, or a part
    is missing: named), FormatError (a file is not what it should be), NotImplementedError (an architecture, dtype or
    file format this engine does not read).
    """
    path = resolve(name_or_path)
    if not path.is_dir():
        encoders = Path(os.path.expanduser(checks.path("mmproj", mmproj))) if mmproj is not None else None
        return open_gguf(path, mmproj=encoders, progress=progress)
    if mmproj is not None:
        raise ValueError(
            f"mmproj {os.fspath(mmproj)!r:.200}: only a .gguf model has its encoders there; {path} is a folder"
        )
    return open_directory(path, progress=progress)
