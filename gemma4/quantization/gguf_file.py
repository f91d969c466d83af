# SPDX-License-Identifier: Apache-2.0
"""The bytes of a GGUF file's head, version 3. `gemma4.load.gguf` reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gemma4.load.dtypes import ENGINE_DTYPES, row_bytes
from gemma4.load.gguf import TENSOR_TYPES, GgufArray
from gemma4.load.mapped import TensorInfo
from gemma4.narrow import is_list

ALIGNMENT = 32
_VERSION = 3
_TYPE_NUMBERS = {name: number for number, (name, _) in TENSOR_TYPES.items()}
# value type -> (number, its struct letter)
_UINT32, _INT32, _FLOAT32, _BOOL = (4, "I"), (5, "i"), (6, "f"), (7, "?")
_UINT64, _INT64 = (10, "Q"), (11, "q")
_STRING, _ARRAY = 8, 9


def padding(nbytes: int) -> int:
    """Bytes from here to the next multiple of the alignment."""
    return -nbytes % ALIGNMENT


def laid_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[TensorInfo]:
    """(name, type, shape) of tensors -> where they lie, counted from the start of the data."""
    out: list[TensorInfo] = []
    at = 0
    for name, dtype, shape in tensors:
        nbytes = int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes(dtype, shape[-1])
        out.append(TensorInfo(name, dtype, shape, at, nbytes))
        at += nbytes + padding(nbytes)
    return out


def head(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the data, padded. Values: str, bool, int, float, lists of one of these, GgufArray.

    Raises TypeError for any other value.
    """
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_text(key) + _value(key, value) for key, value in metadata.items()]
    parts += [_tensor(info) for info in tensors]
    out = b"".join(parts)
    return out + bytes(padding(len(out)))


def _tensor(info: TensorInfo) -> bytes:
    assert info.dtype in ENGINE_DTYPES
    sizes = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
    return _text(info.name) + sizes + struct.pack("<IQ", _TYPE_NUMBERS[info.dtype], info.offset)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, GgufArray) and value.is_strings:
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + value.raw()
    if isinstance(value, GgufArray):
        value = value.values()
    if is_list(value):
        return struct.pack("<I", _ARRAY) + _list(key, value)
    number, letter = _number_type(key, [value], _UINT32)
    return struct.pack(f"<I{letter}", number, value)


def _list(key: str, values: list[Any]) -> bytes:
    if values and all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_text, values))
    number, letter = _number_type(key, values, _INT32)
    return struct.pack(f"<IQ{len(values)}{letter}", number, len(values), *values)


def _number_type(key: str, values: list[Any], usual: tuple[int, str]) -> tuple[int, str]:
    """`usual` for integers, as llama.cpp's converter writes and its loader expects; wider where necessary."""
    if all(isinstance(value, bool) for value in values):
        return _BOOL if values else usual
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise TypeError(f"{key!r:.120} is {values[0]!r:.60}: no value that GGUF has a type for")
    if any(isinstance(value, float) for value in values):
        return _FLOAT32
    low, high = min(values), max(values)
    for kind, least, most in ((usual, *_RANGES[usual]), (_UINT32, *_RANGES[_UINT32]), (_INT32, *_RANGES[_INT32])):
        if least <= low and high <= most:
            return kind
    return _INT64 if low < 0 else _UINT64


_RANGES = {_UINT32: (0, 2**32 - 1), _INT32: (-(2**31), 2**31 - 1)}
