# SPDX-License-Identifier: Apache-2.0
"""Old names of modules' contents, resolved where they live now, so that old imports keep working."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module: names -> "module" where each of them lives now, or "module:" that is it."""

    def look_up(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, colon, _ = names[name].partition(":")
        found = importlib.import_module(place)
        return found if colon else getattr(found, name)

    return look_up
