# SPDX-License-Identifier: Apache-2.0
"""Which member of the family a model is: its architecture's name and size, and what it was trained to do.

Models trained for one purpose have the configuration of their base. Their chat template tells them apart, or a name
that the files carry: the hub's, a GGUF file's, or that of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gemma4.core import Core
from gemma4.errors import FormatError

# Released sizes of each architecture, by number of layers and d_model.
_SIZES = {
    "Gemma 2": {(26, 2304): "2B", (42, 3584): "9B", (46, 4608): "27B"},
    "Gemma 3": {(18, 640): "270M", (26, 1152): "1B", (34, 2560): "4B", (48, 3840): "12B", (62, 5376): "27B"},
    "Gemma 4": {(35, 1536): "E2B", (42, 2560): "E4B", (48, 3840): "12B", (30, 2816): "26B-A4B", (60, 5376): "31B"},
}
_BASES = {"gemma2": "Gemma 2", "gemma3": "Gemma 3", "vaultgemma": "VaultGemma", "gemma4": "Gemma 4"}


class _Derived(NamedTuple):
    """A model trained from another: how names spell it, and text that only its chat template holds."""

    name: str
    bases: tuple[str, ...]
    spelling: re.Pattern[str]
    template: str | None = None


def _derived(name: str, *bases: str, spelling: str, template: str | None = None) -> _Derived:
    return _Derived(name, bases, re.compile(spelling, re.IGNORECASE), template)


_DERIVED = (
    _derived("ShieldGemma", "Gemma 2", spelling=r"shield[-_ ]?gemma", template="policy expert"),
    _derived("FunctionGemma", "Gemma 3", spelling=r"function[-_ ]?gemma", template="<start_function_declaration>"),
    _derived("TranslateGemma", "Gemma 3", spelling=r"translate[-_ ]?gemma", template="source_lang_code"),
    _derived("MedGemma", "Gemma 3", spelling=r"med[-_ ]?gemma"),
    _derived("SEA-LION", "Gemma 2", "Gemma 3", spelling=r"sea[-_ ]?lion"),
    _derived("Sarvam-Translate", "Gemma 3", spelling=r"sarvam[-_ ]?translate"),
)


@dataclass(frozen=True)
class Member:
    """base: the architecture, such as "Gemma 3" · size: the released size of these shapes, "" for any other ·
    derived: the name of a model trained from the base, "" if nothing names one."""

    base: str
    size: str = ""
    derived: str = ""

    def __str__(self) -> str:
        name = f"{self.derived or self.base} {self.size}".strip()
        return f"{name} (architecture of {self.base})" if self.derived else name


def member_of(model: Core) -> Member:
    """Name, size and base of a loaded model. A template counts before a name, and a stored name before a folder's."""
    config = model.config
    base = next(name for kind, name in _BASES.items() if config.model_type.startswith(kind))
    size = _SIZES.get(base, {}).get((config.n_layers, config.d_model), "")
    candidates = [derived for derived in _DERIVED if base in derived.bases]
    template = _template(model)
    found = next((d.name for d in candidates if d.template and d.template in template), None)
    named = (d.name for name in _names(model) for d in candidates if d.spelling.search(name))
    return Member(base, size, found or next(named, ""))


def _template(model: Core) -> str:
    """The source of the chat template, "" if there is none that can be read."""
    try:
        return model.chat_template.source if model.chat_template else ""
    except FormatError:
        return ""


def _names(model: Core) -> Iterator[str]:
    """Names that the files carry, then their folder in the hub's cache, then the file or folder itself."""
    for key in ("general.name", "general.basename", "_name_or_path"):
        name = model.checkpoint.hf_config.get(key)
        if isinstance(name, str):
            yield name
    path = model.checkpoint.path
    yield from (part for part in path.parts if part.startswith("models--"))
    yield path.name
