# SPDX-License-Identifier: Apache-2.0
"""A .gguf file (versions 2 and 3, little-endian) as metadata and named, typed views of one read-only memory map.

Ref: ggml's docs/gguf.md. Magic "GGUF", version, counts of tensors and of key-value pairs, the pairs, then per tensor
a name, its sizes (innermost first), a type and an offset; padding; the data. The file is untrusted: every
number is checked against the bytes actually present before it is used, and nothing is allocated for a count.
Arrays are read only on request (a vocabulary is 800,000 strings).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.dtypes import ENGINE_DTYPES, BlockType
from gemma4.load.mapped import MappedFile, TensorInfo

_MAX_PAIRS = _MAX_TENSORS = 1 << 16
_MAX_KEY, _MAX_NAME, _MAX_RANK = 65_535, 64, 4  # bytes, bytes, dimensions; from the specification
_MAX_STRING = 64 << 20  # bytes of a single value that is read at once, such as a chat template
_MAX_STRINGS = 1 << 24  # in all arrays together: a dozen of the largest vocabularies
_DEFAULT_ALIGNMENT = 32
_BOOL, _STRING, _ARRAY = 7, 8, 9

# value type -> NumPy dtype, of the fixed-size ones
_SCALARS: dict[int, np.dtype[Any]] = {
    i: np.dtype(code)
    for i, code in {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8"}
    .items()
} | {12: np.dtype("<f8")}  # fmt: skip

# tensor type -> (name, block); missing numbers were never types, or were removed before the format was
_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 39: "MXFP4",
}  # fmt: skip
_OTHERS: dict[int, tuple[str, int, int]] = {
    9: ("Q8_1", 32, 36), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 31: ("Q4_0_4_4", 32, 18), 32: ("Q4_0_4_8", 32, 18), 33: ("Q4_0_8_8", 32, 18),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 36: ("IQ4_NL_4_4", 32, 18), 37: ("IQ4_NL_4_8", 32, 18),
    38: ("IQ4_NL_8_8", 32, 18), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
TENSOR_TYPES: dict[int, tuple[str, BlockType]] = {
    **{i: (name, ENGINE_DTYPES[name]) for i, name in _NAMES.items()},
    **{i: (name, BlockType(elements, nbytes)) for i, (name, elements, nbytes) in _OTHERS.items()},
}
_FIRST_OF_IK = 97  # ik_llama.cpp numbers its own types from here on
_NUMPY: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip


class GgufArray:
    """An array value, still in the file: `count` elements in bytes `start` to `end`.

    Every method raises StateError if the file was closed.
    """

    def __init__(self, file: MappedFile, kind: int, count: int, start: int, end: int, what: str) -> None:
        self._file, self._kind, self._what = file, kind, what
        self.count, self.start, self.end = count, start, end

    def __len__(self) -> int:
        return self.count

    @property
    def is_strings(self) -> bool:
        return self._kind == _STRING

    def values(self) -> list[Any]:
        """The elements as a new list of int, float, bool or str. Raises FormatError (a string is not UTF-8)."""
        if not self.is_strings:
            return [_plain(x, self._kind) for x in self.numbers()]
        raw = self.raw()
        try:
            return [raw[start:stop].decode() for start, stop in _spans(raw, self.count)]
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._file.path}: a string in {self._what} is not valid UTF-8: {error}") from None

    def numbers(self) -> NDArray[Any]:
        """A copy of a numeric array."""
        return np.frombuffer(self._file.buffer, _SCALARS[self._kind], self.count, self.start).copy()

    def raw(self) -> bytes:
        """The bytes of the elements, as in the file."""
        return self._file.buffer[self.start : self.end]

    def count_distinct(self) -> int:
        """Number of distinct strings."""
        raw = self.raw()
        return len({raw[start:stop] for start, stop in _spans(raw, self.count)})

    def item(self, index: int) -> str | None:
        """String number `index` without reading the others; None if there is none or it is not UTF-8."""
        if not self.is_strings or not 0 <= index < self.count:
            return None
        at, buffer = self.start, self._file.buffer
        for _ in range(index):
            at += 8 + _U64(buffer, at)[0]
        try:
            return buffer[at + 8 : at + 8 + _U64(buffer, at)[0]].decode()
        except UnicodeDecodeError:
            return None

    def index(self, text: str) -> int | None:
        """Number of the first string that is `text`, None if there is none."""
        if not self.is_strings:
            return None
        data = text.encode()
        pattern = struct.pack("<Q", len(data)) + data
        at, number, buffer = self.start, 0, self._file.buffer
        found = buffer.find(pattern, at, self.end)
        while found >= 0:
            while at < found:
                at += 8 + _U64(buffer, at)[0]
                number += 1
            if at == found:
                return number
            found = buffer.find(pattern, at, self.end)  # the match was inside another string
        return None


_U64 = struct.Struct("<Q").unpack_from


def _spans(raw: bytes, count: int) -> Iterator[tuple[int, int]]:
    at = 0
    for _ in range(count):
        start = at + 8
        at = start + _U64(raw, at)[0]
        yield start, at


def _plain(value: Any, kind: int) -> Any:
    """A NumPy scalar as int, bool, or the shortest float that is this number (a float32 of 1e-6 as 1e-6)."""
    if kind == _BOOL:
        return bool(value)
    return float(str(value)) if value.dtype.kind == "f" else int(value)


class GgufFile(MappedFile):
    """One memory-mapped file.

    metadata    key -> str, int, float, bool or GgufArray
    tensors     name -> TensorInfo, in file order
    Raises FileNotFoundError/OSError (cannot be opened) and FormatError (not a well-formed file).
    """

    kind = "GGUF"
    least = 24

    def _parse(self) -> None:
        reader = _Reader(self)
        self.version, n_tensors, n_pairs = reader.head()
        self.metadata = reader.pairs(n_pairs)
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not reader.alignment_ok(alignment):
            reader.fail(f"general.alignment is {alignment!r:.40}, expected a uint32 that is a power of 2")
        self.tensors = reader.tensors(n_tensors, alignment)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapping: plain types with their dtype (bf16 as ml_dtypes.bfloat16) and
        shape, quantised ones as uint8 [..., bytes per row]."""
        info = self.tensors[name]
        dtype = _NUMPY.get(info.dtype, np.dtype(np.uint8))
        shape = info.shape if info.dtype in _NUMPY else (*info.shape[:-1], info.nbytes // math.prod(info.shape[:-1]))
        return np.frombuffer(memoryview(self.view), dtype, info.nbytes // dtype.itemsize, info.offset).reshape(shape)


class _Reader:
    """A position in the head of the file, checked to stay within it."""

    def __init__(self, file: MappedFile) -> None:
        self._file, self._buffer, self._size = file, file.buffer, file.nbytes
        self._at = 0
        self._strings_left = _MAX_STRINGS
        self._kinds: dict[str, int] = {}

    def fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self._file.path}: {what}")

    def head(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of key-value pairs."""
        if self._buffer[:4] != b"GGUF":
            self.fail(f"not a GGUF file: it starts with {self._buffer[:4]!r}")
        self._at = 4
        version = self._int(4)
        if version and not version & 0xFFFF:
            self.fail("a big-endian GGUF file; only little-endian ones can be read (convert it again)")
        if version not in (2, 3):
            self.fail(f"GGUF version {version}; versions 2 and 3 can be read")
        n_tensors, n_pairs = self._int(8), self._int(8)
        # the shortest tensor entry takes 33 bytes, the shortest pair 14
        self._check_count("tensors", n_tensors, _MAX_TENSORS, 33)
        self._check_count("key-value pairs", n_pairs, _MAX_PAIRS, 14)
        return version, n_tensors, n_pairs

    def pairs(self, count: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for _ in range(count):
            key = self._text("a key", _MAX_KEY)
            if not key:
                self.fail("a key is empty")
            if key in out:
                self.fail(f"duplicate key {key!r:.120}")
            self._kinds[key] = kind = self._int(4)
            out[key] = self._array(key) if kind == _ARRAY else self._value(key, kind)
        return out

    def alignment_ok(self, value: Any) -> bool:
        is_uint32 = self._kinds.get("general.alignment", 4) == 4
        return is_uint32 and isinstance(value, int) and value > 0 and not value & (value - 1)

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text(f"the value of {key!r:.120}", _MAX_STRING)
        dtype = _SCALARS.get(kind)
        if dtype is None:
            self.fail(f"{key!r:.120} has the unknown value type {kind}")
        start = self._skip(dtype.itemsize)
        value = np.frombuffer(self._buffer, dtype, 1, start)[0]
        if kind == _BOOL and value > 1:
            self.fail(f"{key!r:.120} is a bool of value {value}, expected 0 or 1")
        return _plain(value, kind)

    def _array(self, key: str) -> GgufArray:
        kind, count = self._int(4), self._int(8)
        start, what = self._at, f"{key!r:.120}"
        if kind == _ARRAY:
            self.fail(f"{what} is an array of arrays, which no Gemma 4 file has")
        if kind == _STRING:
            self._skip_strings(what, count)
        elif kind in _SCALARS:
            self._skip(count * _SCALARS[kind].itemsize)
        else:
            self.fail(f"{what} has the unknown element type {kind}")
        array = GgufArray(self._file, kind, count, start, self._at, what)
        if kind == _BOOL and count and array.numbers().max() > 1:
            self.fail(f"{what} has a bool that is neither 0 nor 1")
        return array

    def _skip_strings(self, what: str, count: int) -> None:
        if count > self._strings_left:
            self.fail(f"{what} claims {count} strings; at most {_MAX_STRINGS} in a file are read")
        self._strings_left -= count
        buffer, at, last = self._buffer, self._at, self._size - 8
        for i in range(count):
            if at > last:
                self.fail(f"truncated in string {i} of {count} of {what}")
            at += 8 + _U64(buffer, at)[0]
        if at > self._size:
            self.fail(f"truncated in the last string of {what}")
        self._at = at

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """The tensor entries, with offsets from the start of the file and the data checked to lie in it, in order,
        one after the other, each padded to the alignment."""
        entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text("a tensor's name", _MAX_NAME)
            if name in entries:
                self.fail(f"duplicate tensor {name!r:.120}")
            entries[name] = self._tensor(name)
        data = -(-self._at // alignment) * alignment
        out: dict[str, TensorInfo] = {}
        end = 0
        for name, (dtype, shape, offset, nbytes) in entries.items():
            if offset != end:
                self.fail(f"tensor {name!r:.120} is at offset {offset}, expected {end}, right after the one before it")
            if data + offset + nbytes > self._size:
                need = f"tensor {name!r:.120} ends at byte {data + offset + nbytes}"
                self.fail(f"truncated: {need}, the file has {self._size}; copy it again")
            out[name] = TensorInfo(name, dtype, shape, data + offset, nbytes)
            end = -(-(offset + nbytes) // alignment) * alignment
        return out

    def _tensor(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        what = f"tensor {name!r:.120}"
        rank = self._int(4)
        if not 1 <= rank <= _MAX_RANK:
            self.fail(f"{what} has {rank} dimensions, expected 1 to {_MAX_RANK}")
        sizes = [self._int(8) for _ in range(rank)]
        kind, offset = self._int(4), self._int(8)
        if not all(0 < size < 1 << 63 for size in sizes) or math.prod(sizes) >= 1 << 63:
            self.fail(f"{what} has the sizes {sizes}: each must be at least 1, their product below 2^63")
        if kind not in TENSOR_TYPES:
            whose = (
                ", one of ik_llama.cpp's own: convert the model again with llama.cpp" if kind >= _FIRST_OF_IK else ""
            )
            self.fail(f"{what} has the unknown type {kind}{whose}")
        dtype, block = TENSOR_TYPES[kind]
        if sizes[0] % block.elements:
            self.fail(f"{what}: rows of {sizes[0]} elements are no whole number of {dtype} blocks of {block.elements}")
        nbytes = math.prod(sizes) // block.elements * block.nbytes
        if nbytes > self._size:
            self.fail(f"{what} takes {nbytes} bytes, the file has {self._size}: truncated, or damaged")
        return dtype, tuple(reversed(sizes)), offset, nbytes

    def _skip(self, nbytes: int) -> int:
        """The position before the next `nbytes`, which are checked to be present."""
        start = self._at
        if nbytes > self._size - start:
            self.fail(f"truncated: {nbytes} bytes wanted at byte {start}, the file has {self._size}")
        self._at += nbytes
        return start

    def _int(self, nbytes: int) -> int:
        start = self._skip(nbytes)
        return int.from_bytes(self._buffer[start : start + nbytes], "little")

    def _text(self, what: str, limit: int) -> str:
        size = self._int(8)
        if size > limit:
            self.fail(f"{what} claims {size} bytes, the limit is {limit}")
        start = self._skip(size)
        try:
            return self._buffer[start : start + size].decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8: {str(error)[:120]}")

    def _check_count(self, what: str, count: int, limit: int, least: int) -> None:
        if count > limit or count * least > self._size:
            self.fail(f"claims {count} {what}; {self._size} bytes cannot hold them, and {limit} is the limit")
