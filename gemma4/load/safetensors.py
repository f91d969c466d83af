# SPDX-License-Identifier: Apache-2.0
"""A .safetensors file as named, typed, shaped views of one read-only mapping, without copies; and its writer.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object
{name: {"dtype", "shape", "data_offsets": [begin, end)}, "__metadata__": {str: str}}, then the data. The header is
untrusted: `parse_header` accepts exactly the files in which every tensor's span has the size its dtype and shape
give and the spans tile the data, without holes or overlaps, to its last byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.mapped import MappedFile, TensorInfo
from gemma4.narrow import is_dict, is_list

MAX_HEADER = 16 << 20  # bytes: three times that of 35,000 tensors. More would take minutes and gigabytes to parse
_MAX_RANK, _MAX_NAME = 8, 1024

# dtype -> (bits per element, NumPy dtype; None: no NumPy type, shown as raw bytes)
DTYPES: dict[str, tuple[int, Any]] = {
    "F64": (64, np.dtype("<f8")),
    "F32": (32, np.dtype("<f4")),
    "F16": (16, np.dtype("<f2")),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "I64": (64, np.dtype("<i8")),
    "I32": (32, np.dtype("<i4")),
    "I16": (16, np.dtype("<i2")),
    "I8": (8, np.dtype("i1")),
    "U64": (64, np.dtype("<u8")),
    "U32": (32, np.dtype("<u4")),
    "U16": (16, np.dtype("<u2")),
    "U8": (8, np.dtype("u1")),
    "BOOL": (8, np.dtype("?")),
    "C64": (64, np.dtype("<c8")),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E8M0": (8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


def write_safetensors(
    file: IO[bytes], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a whole file, tensor by tensor, the widest types first, so that each is aligned.

    Raises TypeError for a dtype that the format lacks, ValueError for tables that `parse_header` would refuse.
    """
    head, offsets = layout({name: (array.dtype, array.shape) for name, array in tensors.items()}, metadata)
    file.write(head)
    for name in offsets:
        file.write(stored_bytes(tensors[name]))


def layout(
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file of tensors of these types and shapes, and the byte at which each begins, in file order.

    Raises as `write_safetensors`.
    """
    for name, (dtype, _) in tensors.items():
        if dtype.newbyteorder("<") not in _NAMES:
            raise TypeError(f"{name}: a safetensors file cannot hold {dtype}")
    ordered = sorted(tensors.items(), key=lambda item: -item[1][0].itemsize)
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in ordered:
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype.newbyteorder("<")], "shape": shape, "data_offsets": [begins[name], end]}
    head = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER:
        raise ValueError(f"names and metadata take {len(head):,} bytes, a safetensors file has {MAX_HEADER:,} for them")
    head = len(head).to_bytes(8, "little") + head
    return head, {name: len(head) + begin for name, begin in begins.items()}


def stored_bytes(array: NDArray[Any]) -> memoryview:
    """The bytes that the format holds for an array, whole or a part of its rows; not copied where they are so."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


def parse_header(head: bytes, file_size: int, where: str = "file") -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and metadata from the JSON header `head` of a file of `file_size` bytes.

    Raises FormatError on anything that is not a well-formed header of exactly this file; `where` names it in messages.
    """
    table = _parse_json(head, where)
    metadata = table.pop("__metadata__", {})
    if not is_dict(metadata) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__ must map strings to strings")
    data_start = 8 + len(head)
    found = (_tensor_info(name, entry, data_start, where) for name, entry in table.items())
    infos = sorted(found, key=lambda info: (info.offset, info.nbytes))
    _check_tiling(infos, data_start, file_size, where)
    return {info.name: info for info in infos}, metadata


def _parse_json(head: bytes, where: str) -> dict[str, Any]:
    try:
        table = json.loads(head.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except RecursionError:
        raise FormatError(f"{where}: the header's JSON is nested too deeply") from None
    except ValueError as error:  # JSON and UTF-8 errors, duplicate keys, numbers of thousands of digits
        raise FormatError(f"{where}: the header is not valid JSON: {str(error)[:200]}") from None
    if not is_dict(table):
        raise FormatError(f"{where}: the header must be a JSON object, found {type(table).__name__}")
    return table


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"duplicate key {twice!r:.120}")
    return table


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _tensor_info(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    what = f"{where}: tensor {name!r:.120}"
    if not name or len(name) > _MAX_NAME:
        raise FormatError(f"{what}: a name must have 1 to {_MAX_NAME} characters")
    if not is_dict(entry) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what}: expected exactly dtype, shape and data_offsets, found {_brief(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{what}: unknown dtype {_brief(dtype)}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise FormatError(f"{what}: shape must be a list of at most {_MAX_RANK} sizes >= 0, found {_brief(shape)}")
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise FormatError(f"{what}: data_offsets must be [begin, end], begin <= end, found {_brief(span)}")
    bits = math.prod(shape) * DTYPES[dtype][0]
    nbytes = span[1] - span[0]
    if bits != nbytes * 8:
        raise FormatError(f"{what}: {dtype} {_brief(shape)} takes {bits / 8:g} bytes, data_offsets give {nbytes}")
    return TensorInfo(name, dtype, tuple(shape), data_start + span[0], nbytes)


def _naturals(value: Any) -> bool:
    """Whether value is a list of integers in 0..2^63-1 (JSON true is not one). Python's products cannot overflow."""
    return is_list(value) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _brief(value: Any) -> str:
    try:
        return repr(value)[:120]
    except (ValueError, RecursionError):  # integers of thousands of digits
        return f"a {type(value).__name__}"


def _check_tiling(infos: list[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    end = data_start
    for info in infos:
        if info.offset != end:
            kind = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise FormatError(f"{where}: tensor {info.name!r:.120} starts at byte {info.offset}, which {kind} ({end})")
        end += info.nbytes
    if end != file_size:
        kind = "is truncated" if end > file_size else "has bytes after the last tensor"
        raise FormatError(f"{where} {kind}: {file_size} bytes, the header describes {end}; copy the file again")


class SafetensorsFile(MappedFile):
    """One memory-mapped file. `tensors` maps each name to its TensorInfo; `buffer` is the whole file, read-only.

    Raises FileNotFoundError/OSError (cannot be opened) and FormatError (not a well-formed file).
    """

    kind = "safetensors"
    least = 8

    def _parse(self) -> None:
        where = str(self.path)
        length = int.from_bytes(self.buffer[:8], "little")
        if length > MAX_HEADER:
            raise FormatError(f"{where}: the header claims {length} bytes, over {MAX_HEADER}; not a safetensors file?")
        if length > self.nbytes - 8:
            raise FormatError(f"{where} is truncated: the header claims {length} bytes, {self.nbytes - 8} follow")
        self.tensors, self.metadata = parse_header(self.buffer[8 : 8 + length], self.nbytes, where)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapping: its dtype (bf16 as ml_dtypes.bfloat16) and shape.

        Types without a NumPy dtype (F4, F6) come as raw bytes, uint8 [nbytes].
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype][1]
        if dtype is None:
            return np.frombuffer(memoryview(self.view), np.uint8, info.nbytes, info.offset)
        count = math.prod(info.shape)
        if count == 0:  # frombuffer refuses an empty span at the end of the file
            empty = np.empty(info.shape, dtype)
            empty.flags.writeable = False
            return empty
        return np.frombuffer(memoryview(self.view), dtype, count, info.offset).reshape(info.shape)
