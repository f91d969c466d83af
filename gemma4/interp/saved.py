# SPDX-License-Identifier: Apache-2.0
"""Captured activations in files: one safetensors file with a tensor for each site, "tokens" and "positions".

Sites inside attached dictionaries are tensors by name, too; features are three, NAME.offsets, NAME.ids, NAME.values.
Its metadata holds format and version, the model's name and fingerprint, and as JSON in "sites" everything that a cache
without its model knows: the captured model's sites, its layers and their scalars.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.dictionaries.features import Features
from gemma4.errors import FormatError
from gemma4.files import StrPath, new_file
from gemma4.interp.sites import Site, SiteRow, SiteTable
from gemma4.load.safetensors import SafetensorsFile, write_safetensors
from gemma4.narrow import is_dict, is_integer, is_list

F32: TypeAlias = NDArray[np.float32]
Stored: TypeAlias = NDArray[Any]  # of a SavedDtype, or integers
SavedDtype: TypeAlias = Literal["f32", "f16", "bf16"]

_FORMAT, _VERSION = "gemma4.cache", "1"
TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_KEYS = ("", "cached", "scores", "pattern")
_PARTS = ("offsets", "ids", "values")  # of features
_FLOATS, _INTEGERS = ("F32", "F16", "BF16"), ("I32",)


class Detached:
    """A pickled or saved cache's description of its model: sites and layer scalars, no weights."""

    name = ""  # the folder or file of the model
    fingerprint = ""  # that of `Core.fingerprint`

    def __init__(
        self, sites: SiteTable, n_layers: int, scalars: list[float], name: str = "", fingerprint: str = ""
    ) -> None:
        self.sites, self.n_layers, self._scalars = sites, n_layers, scalars
        self.name, self.fingerprint = name, fingerprint

    def layer_scalar(self, layer: int) -> float:
        return self._scalars[layer]

    def as_json(self) -> str:
        sites = [
            (s.name, s.id, s.layer or 0, s.dims, s.dtype.name, s.keys, s.pruned, s.writable, s.axes)
            for s in self.sites.values()
        ]
        return json.dumps({"sites": sites, "layers": self.sites.layers, "scalars": self._scalars})

    @classmethod
    def from_json(cls, text: str, name: str, fingerprint: str) -> Detached:
        """Raises ValueError for a text that `as_json` cannot have written."""
        try:
            facts: object = json.loads(text)
        except RecursionError:
            raise ValueError("JSON is nested too deeply") from None
        if not is_dict(facts) or not all(is_list(facts.get(part)) for part in ("sites", "layers", "scalars")):
            raise ValueError("expected lists of sites, layers and scalars")
        layers, scalars = [_layer(one) for one in facts["layers"]], facts["scalars"]
        if len(scalars) != len(layers) or not all(isinstance(one, float) and math.isfinite(one) for one in scalars):
            raise ValueError(f"expected {len(layers)} layer scalars")
        rows = [_row(row, len(layers)) for row in facts["sites"]]
        return cls(SiteTable(rows, layers), len(layers), scalars, name, fingerprint)


class Saved(NamedTuple):
    """The contents of a file."""

    model: Detached
    arrays: dict[str, F32]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int64]
    inside: Mapping[str, F32 | Features] = {}  # of sites inside dictionaries, by name: rows are `positions`


# -- writing -----------------------------------------------------------------------------------------------------------


def write_cache(path: StrPath, saved: Saved, dtype: SavedDtype, *, force: bool) -> Path:
    """Raises ValueError (unknown dtype, a number too large for f16), and as `gemma4.files.new_file`."""
    checks.choice("dtype", dtype, get_args(SavedDtype))
    tensors: dict[str, NDArray[Any]] = {"tokens": saved.tokens, "positions": saved.positions}
    tensors |= {name: narrowed(array, dtype, name) for name, array in saved.arrays.items()}
    tensors |= _inside_tensors(saved.inside, dtype)
    model = saved.model
    metadata = {"format": _FORMAT, "version": _VERSION, "model": model.name, "fingerprint": model.fingerprint}
    metadata["sites"] = model.as_json()
    if saved.inside:
        metadata["inside"] = json.dumps({name: _width(value) for name, value in saved.inside.items()})
    with new_file(path, force=force, n_bytes=sum(array.nbytes for array in tensors.values())) as file:
        write_safetensors(file, tensors, metadata)
    return Path(path)


def _inside_tensors(inside: Mapping[str, F32 | Features], dtype: SavedDtype) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for name, value in inside.items():
        if isinstance(value, Features):
            parts = (value.offsets, value.ids, narrowed(value.values, dtype, name))
            tensors |= {f"{name}.{part}": array for part, array in zip(_PARTS, parts, strict=True)}
        else:
            tensors[name] = narrowed(value, dtype, name)
    return tensors


def _width(value: F32 | Features) -> int:
    return value.d_sae if isinstance(value, Features) else value.shape[1]


def narrowed(array: F32, dtype: SavedDtype, name: str) -> Stored:
    """Floats as that type, rounded to nearest; integers as they are. Raises ValueError for f16 beyond 65504."""
    if array.dtype != np.float32 or dtype == "f32":
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(TYPES[dtype])
    if dtype == "f16" and (np.isinf(narrow) & ~np.isinf(array)).any():
        raise ValueError(f"{name} holds numbers beyond 65504, the largest f16: save with dtype='bf16' or 'f32'")
    return narrow


# -- reading -----------------------------------------------------------------------------------------------------------


def read_cache(path: StrPath) -> Saved:
    """The contents, in memory of their own; floats as float32. Raises FormatError (damaged, no cache), OSError."""
    file = SafetensorsFile(Path(path))
    try:
        found = tuple(file.metadata.get(key, "") for key in ("format", "version"))
        if found != (_FORMAT, _VERSION):
            raise FormatError(
                f"{path} holds no activations: format {found[0]!r:.40}, version {found[1]!r:.20}, expected "
                f"{_FORMAT!r}, {_VERSION!r}, as ActivationCache.save writes"
            )
        saved = _contents(file, str(path))
        file.check()
        return saved
    finally:
        file.close()


def _contents(file: SafetensorsFile, where: str) -> Saved:
    meta = file.metadata
    try:
        model = Detached.from_json(meta.get("sites", ""), meta.get("model", ""), meta.get("fingerprint", ""))
    except ValueError as error:
        raise FormatError(f"{where}: its description of the model's sites is damaged: {str(error)[:200]}") from None
    positions = _indices(file, "positions", "I64", where)
    tokens = _indices(file, "tokens", "I32", where)
    if tokens.shape != positions.shape:
        raise FormatError(f"{where} has {len(tokens)} tokens and {len(positions)} positions")
    inside, within = _inside(file, len(positions), where)
    names = set(file.tensors) - {"tokens", "positions"} - within
    unknown = sorted(names - set(model.sites))
    if unknown:
        raise FormatError(f"{where}: tensor {unknown[0]!r:.80} is none of the sites that the file describes")
    arrays = {
        site.name: _activation(file, site, len(positions), where) for site in model.sites.values() if site.name in names
    }
    return Saved(model, arrays, tokens.astype(np.int32), positions.astype(np.int64), inside)


def _inside(file: SafetensorsFile, n_rows: int, where: str) -> tuple[dict[str, F32 | Features], set[str]]:
    """The values of sites inside dictionaries, and the names of their tensors."""
    found: dict[str, F32 | Features] = {}
    names = set[str]()
    for name, width in _widths(file.metadata.get("inside", "{}"), where).items():
        parts = [f"{name}.{part}" for part in _PARTS]
        if name in file.tensors:
            found[name] = _floats(file, name, (n_rows, width), where)
            names.add(name)
        else:
            found[name] = _features(file, parts, n_rows, width, where)
            names |= set(parts)
    return found, names


def _widths(text: str, where: str) -> dict[str, int]:
    try:
        facts: object = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not is_dict(facts) or not all(is_integer(width) and 0 < width < 1 << 31 for width in facts.values()):
        raise FormatError(f"{where}: its description of sites inside dictionaries is damaged: {text[:60]!r}")
    return {str(name): int(cast(int, width)) for name, width in facts.items()}


def _floats(file: SafetensorsFile, name: str, shape: tuple[int, ...], where: str) -> F32:
    info = file.tensors.get(name)
    if info is None or info.dtype not in _FLOATS or info.shape != shape:
        found = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        raise FormatError(f"{where}: expected {name!r}, {' or '.join(_FLOATS)} {list(shape)}, found {found}")
    return np.array(file.array(name), np.float32)


def _features(file: SafetensorsFile, parts: list[str], n_rows: int, d_sae: int, where: str) -> Features:
    offsets = np.array(_indices(file, parts[0], "I64", where), np.int64)
    ids = np.array(_indices(file, parts[1], "I32", where), np.int32)
    if len(offsets) != n_rows + 1 or offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
        raise FormatError(f"{where}: {parts[0]!r} does not divide {len(ids)} entries among {n_rows} positions")
    same_row = np.diff(np.repeat(np.arange(n_rows), np.diff(offsets))) == 0
    if len(ids) and not (ids.min() >= 0 and ids.max() < d_sae and (np.diff(ids)[same_row] > 0).all()):
        raise FormatError(f"{where}: {parts[1]!r} are not ascending numbers of {d_sae} features")
    return Features(offsets, ids, _floats(file, parts[2], (len(ids),), where), d_sae)


def _indices(file: SafetensorsFile, name: str, dtype: str, where: str) -> NDArray[Any]:
    info = file.tensors.get(name)
    if info is None or info.dtype != dtype or len(info.shape) != 1:
        found = "none" if info is None else f"{info.dtype} {list(info.shape)}"
        raise FormatError(f"{where}: expected a tensor {name!r}, {dtype} [pos], found {found}")
    return file.array(name)


def _activation(file: SafetensorsFile, site: Site, n_rows: int, where: str) -> F32:
    info = file.tensors[site.name]
    keys = {size for size, dim in zip(info.shape, site.dims, strict=False) if dim == "S"}
    types = _FLOATS if site.dtype == np.float32 else _INTEGERS
    if info.dtype not in types or info.shape != site.shape(n_rows, keys.pop() if keys else 0):
        axes = ", ".join(str(n_rows) if dim == "T" else str(dim) for dim in site.dims)
        raise FormatError(
            f"{where}: {site.name} is {info.dtype} {list(info.shape)}, expected {' or '.join(types)} [{axes}]"
        )
    return np.array(file.array(site.name), site.dtype)


def _layer(entry: object) -> Mapping[str, object]:
    """A layer's entry with what messages about absent sites need."""
    if not is_dict(entry) or not all(is_integer(entry.get(key)) for key in ("window", "kv_source")):
        raise ValueError("expected window and kv_source of each layer")
    if not isinstance(entry.get("k_eq_v"), bool):
        raise ValueError("expected k_eq_v of each layer")
    return entry


def _row(row: object, n_layers: int) -> SiteRow:
    if not is_list(row) or len(row) != 9:
        raise ValueError(f"expected 9 facts on each site, found {row!r:.80}")
    name, number, layer, dims, dtype, keys, pruned, writable, axes = row
    if not isinstance(name, str) or not is_integer(number) or not is_integer(layer) or not 0 <= layer < n_layers:
        raise ValueError(f"a site of a layer that does not exist: {row!r:.80}")
    if dtype not in ("float32", "int32") or keys not in _KEYS or not isinstance(axes, str):
        raise ValueError(f"a site of an unknown type: {row!r:.80}")
    if not is_list(dims) or len(dims) != len(axes) or not all(_is_dim(dim) for dim in cast("Sequence[object]", dims)):
        raise ValueError(f"a site of unknown axes: {row!r:.80}")
    if not isinstance(pruned, bool) or not isinstance(writable, bool):
        raise ValueError(f"a site that is neither read-only nor writable: {row!r:.80}")
    return name, int(number), int(layer), tuple(dims), dtype, keys, pruned, writable, axes


def _is_dim(dim: object) -> bool:
    return dim in ("T", "S") or (is_integer(dim) and bool(dim >= 0))
