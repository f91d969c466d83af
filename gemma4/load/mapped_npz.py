# SPDX-License-Identifier: Apache-2.0
"""A .npz file of uncompressed arrays as views of one read-only memory mapping. Nothing is copied."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.mapped import MappedFile, TensorInfo
from gemma4.npz import Located, NpzFile


class MappedNpz(MappedFile):
    """One memory-mapped file. `tensors` maps each name to its TensorInfo, whose dtype is NumPy's string.

    Raises FileNotFoundError/OSError (cannot be opened), FormatError (no such file, compressed, or damaged).
    """

    kind = "npz"
    least = 22  # an empty ZIP file

    def _parse(self) -> None:
        try:
            with NpzFile(self.path) as file:
                self._located = {name: file.locate(name) for name in file.names}
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}; write it with numpy.savez") from None
        self.tensors = {name: self._info(name, place) for name, place in self._located.items()}

    def _info(self, name: str, place: Located) -> TensorInfo:
        if place.offset + place.n_bytes > self.nbytes:
            raise FormatError(f"{self.path}: {name} ends after the file's {self.nbytes} bytes; copy the file again")
        return TensorInfo(name, place.dtype.str, place.shape, place.offset, place.n_bytes)

    def array(self, name: str) -> NDArray[Any]:
        place = self._located[name]
        count = math.prod(place.shape)
        if not count:
            return np.empty(place.shape, place.dtype)
        flat = np.frombuffer(memoryview(self.view), place.dtype, count, place.offset)
        return flat.reshape(place.shape[::-1]).T if place.in_columns else flat.reshape(place.shape)
