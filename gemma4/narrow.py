# SPDX-License-Identifier: Apache-2.0
"""isinstance() for values of unknown type, from callers and from JSON, with what they hold typed as Any.

After `isinstance(value, list)` a type checker takes the items for Unknown, and in strict mode refuses every use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_list_or_tuple(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence)


def is_iterable(value: object) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, Iterable)


def is_array(value: object) -> TypeGuard[NDArray[Any]]:
    return isinstance(value, np.ndarray)


def is_integer(value: object) -> TypeGuard[int | np.integer[Any]]:
    """Python's or NumPy's; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float | np.integer[Any] | np.floating[Any]]:
    return is_integer(value) or isinstance(value, float | np.floating)
