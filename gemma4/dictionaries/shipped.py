# SPDX-License-Identifier: Apache-2.0
"""The dictionaries that come with the package, by name: MODEL/SITE that it reads."""

from __future__ import annotations

import os
from pathlib import Path

from gemma4.load.huggingface import PRETRAINED

_FOLDER = "dictionaries"  # of a shipped model; each dictionary is a folder below it, named after its site


def shipped_dictionaries() -> list[str]:
    """Names of the dictionaries that come with the package: "tiny-e/blocks.4.hook_resid_post", ….

    `gemma4.SAE.load` and `gemma4.Transcoder.load` take them in place of a path.
    """
    found = PRETRAINED.glob(f"*/{_FOLDER}/*/cfg.json")
    return sorted(f"{config.parents[2].name}/{config.parent.name}" for config in found)


def shipped_name(path: Path) -> str | None:
    """The name of the shipped dictionary at this place; None if it is another one."""
    return next((name for name in shipped_dictionaries() if locate(name) == path), None)


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The place of a dictionary: a shipped name first (write "./name" for a folder), else the path as given."""
    if os.fspath(name_or_path) in shipped_dictionaries():
        model, site = os.fspath(name_or_path).split("/")
        return PRETRAINED / model / _FOLDER / site
    return Path(name_or_path)
