# SPDX-License-Identifier: Apache-2.0
"""Typed, range-checked access to a JSON object that may be hostile."""

from __future__ import annotations

from typing import Any, NoReturn

from gemma4 import checks
from gemma4.errors import FormatError
from gemma4.narrow import is_list


class Fields:
    """A JSON object whose values are read with their type and range checked.

    `where` names the object in messages. JSON's true is not a number here, 512.0 is not an integer, and NaN is not in
    any range. A default of None means that the value is required.
    """

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self._raw, self.where = raw, where

    def __contains__(self, name: str) -> bool:
        return name in self._raw

    def get(self, name: str, default: Any) -> Any:
        return self._raw.get(name, default)

    def fail(self, name: str, found: Any, expected: str) -> NoReturn:
        shown = found[:120] if isinstance(found, str) else checks.shown(found)
        raise FormatError(f"{self.where}: {name} is {shown}, expected {expected}")

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        value = self._raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(name, value, f"an integer in {low}..{high}")
        return value

    def optional_integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        return None if self._raw.get(name, default) is None else self.integer(name, default, low, high)

    def token_id(self, name: str, default: int | None, high: int) -> int | None:
        """A special token's id, or None if there is none; files encode that as null, -1 or 2^32 - 1."""
        return None if is_unset(self._raw.get(name, default)) else self.integer(name, default, 0, high)

    def token_ids(self, name: str, default: tuple[int, ...], high: int) -> tuple[int, ...]:
        """As `integers`, without those that are unset."""
        value = self._raw.get(name)
        items = value if is_list(value) else [value]
        found = [item for item in items if not is_unset(item)]
        return Fields({name: found}, self.where).integers(name, (), 0, high) if found or value == [] else default

    def integers(self, name: str, default: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
        """One integer or a list of at most 64 (as eos_token_id); absent or null gives the default."""
        value = self._raw.get(name)
        if value is None:
            return default
        items = value if is_list(value) else [value]
        if len(items) > 64:
            self.fail(name, f"a list of {len(items)}", "at most 64 integers")
        return tuple(Fields({name: item}, self.where).integer(name, None, low, high) for item in items)

    def number(self, name: str, default: float | None, low: float, high: float) -> float:
        value = self._raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.fail(name, value, f"a number in {low}..{high}")
        return float(value)

    def optional_number(self, name: str, default: float | None, low: float, high: float) -> float | None:
        return None if self._raw.get(name, default) is None else self.number(name, default, low, high)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._raw.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, value, "true or false")
        return value


def is_unset(token_id: Any) -> bool:
    """Whether a special token's id means that there is none."""
    return token_id is None or (type(token_id) is int and token_id in (-1, 0xFFFFFFFF))
