# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments and options. Each raises ValueError that names the value, what was found and what is expected."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeGuard

import numpy as np

from gemma4.narrow import is_integer, is_iterable, is_mapping, is_number

MAX_TOKEN_ID = (1 << 31) - 1
MAX_THREADS = 1024  # of the engine
_MAX_BIAS = 1e38  # logits are float32


def fail(name: str, value: object, expected: str) -> NoReturn:
    raise ValueError(f"{name} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """A short repr() of whatever a caller may have passed."""
    try:
        return f"{value!r:.80}"
    except Exception:  # an integer of more digits than Python prints, or an object whose repr() fails
        return f"a {type(value).__name__}"


def integer(name: str, value: Any, low: int, high: int) -> int:
    """value as an int, in low..high."""
    if not is_integer(value) or not low <= value <= high:
        fail(name, value, f"an integer in {low:,}..{high:,}" if high < 1 << 63 else f"an integer in {low:,}..{high:g}")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """value, a number in low..high, which NaN is never."""
    if not is_number(value) or not low <= value <= high:
        fail(name, value, f"a number in {low:g}..{high:g}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """value as a bool; 0 and 1 are taken, too."""
    if not _is_boolean(value):
        fail(name, value, "True or False")
    return bool(value)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool | np.bool_) or (is_integer(value) and value in (0, 1))


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One token id, or any number of them."""
    ids: Any = (value,) if isinstance(value, bool) or is_integer(value) else value
    if isinstance(ids, str | bytes | Mapping) or not is_iterable(ids):
        fail(name, value, "a token id or several (integers)")
    return tuple(integer(f"each of {name}", token, 0, MAX_TOKEN_ID) for token in ids)


def strings(name: str, value: Any) -> tuple[str, ...]:
    """One string that is not empty, or any number of them."""
    texts: Any = (value,) if isinstance(value, str) else value
    if isinstance(texts, bytes | Mapping) or not is_iterable(texts):
        fail(name, value, "a string or several")
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str) or not text:
            fail(f"{name}: a stop string", text, "a non-empty string")
    return texts


def functions(name: str, value: Any) -> tuple[Any, ...]:
    """One function, or any number of them."""
    found: tuple[Any, ...] | None = (value,) if callable(value) else tuple(value) if is_iterable(value) else None
    if found is None or not all(callable(function) for function in found):
        fail(name, value, "functions (ids, logits) -> logits or None")
    return found


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """Token id -> a number, -inf to ban. Keys may be text, as in JSON."""
    if not is_mapping(value):
        fail(name, value, "a mapping of token ids to numbers")
    out: dict[int, float] = {}
    for key, bias in value.items():
        text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token = integer(f"a token id in {name}", int(key) if text else key, 0, MAX_TOKEN_ID)
        if not is_number(bias) or not bias <= _MAX_BIAS:
            fail(f"{name}[{token}]", bias, f"a number up to {_MAX_BIAS:g}")
        out[token] = float(bias) if bias >= -_MAX_BIAS else -np.inf
    return out


def choice(name: str, value: Any, known: Iterable[str]) -> str:
    """value, one of some words."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        fail(name, value, f"one of {', '.join(known)}")
    return value


def text(name: str, value: Any) -> str:
    """value, a string."""
    if not isinstance(value, str):
        fail(name, value, "a string")
    return value


def texts(name: str, value: Any) -> dict[str, str]:
    """A mapping of strings to strings."""
    if not is_mapping(value) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        fail(name, value, "a mapping of strings to strings")
    return dict(value)


def by_their_names(elsewhere: Mapping[str, str]) -> dict[str, str]:
    """Our name for each of other libraries' names, from our name -> theirs, separated by spaces."""
    return {theirs: ours for ours, names in elsewhere.items() for theirs in names.split()}


def known_names(given: Iterable[str], known: Sequence[str], ours: Mapping[str, str]) -> None:
    """Raise TypeError for options that are not `known`, with the likely intended ones. ours: `by_their_names`."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError("; ".join(_what_is(name, known, ours) for name in unknown))


def _what_is(name: str, known: Sequence[str], ours: Mapping[str, str]) -> str:
    """A sentence on an unknown option: its name here, if a similar one exists."""
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.7)
    meant = [ours[name]] if name in ours else near
    return f"{name}: did you mean {' or '.join(meant)}?" if meant else f"{name}: no such option; {', '.join(known)} are"


def path(name: str, value: Any) -> str | os.PathLike[str]:
    """A path as text or path object."""
    if not _is_path(value):
        fail(name, value, "a path (str or os.PathLike)")
    return value


def _is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)
