# SPDX-License-Identifier: Apache-2.0
"""Edits in files: one safetensors file, whose metadata holds them as JSON; and control vectors of GGUF files."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4.edits import arithmetic, recipes
from gemma4.edits.base import Edit, checked_edits
from gemma4.edits.recipes import Cache, Steer
from gemma4.edits.scope import checked_where, listed
from gemma4.errors import FormatError
from gemma4.files import StrPath, write_file
from gemma4.interp.sites import canonical_name
from gemma4.load.gguf import GgufFile
from gemma4.load.safetensors import SafetensorsFile, write_safetensors

F32: TypeAlias = NDArray[np.float32]
Tensors: TypeAlias = dict[str, NDArray[Any]]
_FORMAT, _VERSION = "gemma4.edits", "1"
_KINDS: dict[str, Callable[..., Edit]] = {
    kind.__name__: kind
    for kind in (
        *(arithmetic.Add, arithmetic.Clamp, arithmetic.ProjectOut, arithmetic.Scale, arithmetic.Set),
        *(recipes.Ablate, recipes.ForbidExperts, recipes.ForceExperts, recipes.KnockOut, recipes.Patch),
        *(recipes.ScalePerLayerEmbedding, Steer),
    )
}


@dataclass(frozen=True)
class Reference:
    """How an object of another part of the package is saved: by naming it, not with its contents.

    of    its type
    save  the object and the folder of the file -> JSON
    load  that, the folder, and the places that the reader of the file gave -> the object. Raises FormatError,
          ValueError (another object than the saved one), FileNotFoundError
    """

    of: type
    save: Callable[[Any, Path], dict[str, Any]]
    load: Callable[[dict[str, Any], Path, Mapping[str, StrPath]], object]


_REFERENCES: dict[str, Reference] = {}


def register(kinds: Iterable[type[Edit]], name: str, reference: Reference) -> None:
    """Let edits of these kinds be saved, which hold objects of that type. name: of the type, in the file."""
    _KINDS.update({kind.__name__: kind for kind in kinds})
    _REFERENCES[name] = reference


class Fingerprinted(Protocol):
    """A loaded model, as far as files of edits know one."""

    @cached_property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class _Source:
    """A file that is read. opened: the objects that it names, by their JSON, so that several edits share them."""

    file: SafetensorsFile
    places: Mapping[str, StrPath]
    model: Fingerprinted | None
    opened: dict[str, object] = dataclasses.field(default_factory=dict[str, object])

    def tensor(self, name: Any) -> NDArray[Any]:
        if name not in self.file.tensors:
            raise ValueError(f"the file has no tensor {name!r:.80}")
        return self.file.array(name).copy()

    def cache(self, name: Any, sites: Any, fingerprint: Any) -> SavedCache:
        if not isinstance(fingerprint, str):
            raise ValueError(f"a model must be named by its fingerprint, got {fingerprint!r:.60}")
        if self.model is not None and fingerprint not in ("", self.model.fingerprint):
            found = f"{fingerprint!r:.40}, this one is {self.model.fingerprint!r}"
            raise ValueError(f"its cache is of another model (fingerprint {found}): make the edit again")
        arrays = {site: self.tensor(f"{name}.{site}") for site in sites}
        positions = self.tensor(f"{name}.positions")
        if positions.ndim != 1 or positions.dtype.kind not in "iu":
            raise ValueError(f"positions of a cache are integers [pos], got {positions.dtype} {list(positions.shape)}")
        return SavedCache(positions.astype(np.int64), arrays, fingerprint)

    def object_of(self, kind: str, entry: Any) -> object:
        if not isinstance(entry, dict):
            raise ValueError(f"{kind} must be an object of JSON, got {entry!r:.60}")
        key = json.dumps([kind, entry], sort_keys=True)
        if key not in self.opened:
            named = cast("dict[str, Any]", entry)
            self.opened[key] = _REFERENCES[kind].load(named, self.file.path.parent, self.places)
        return self.opened[key]


class SavedCache(Mapping[str, F32]):
    """The part of a cache that a saved edit uses: its positions, the arrays of the edited sites, and the fingerprint of
    the model that ran, "" if nothing names it."""

    def __init__(self, positions: NDArray[np.int64], arrays: Mapping[str, F32], fingerprint: str) -> None:
        self.positions, self._arrays, self.fingerprint = positions, dict(arrays), fingerprint

    def __getitem__(self, name: str) -> F32:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


# -- writing -----------------------------------------------------------------------------------------------------------


def save_edits(edits: Edit | Iterable[Edit], path: StrPath, *, force: bool = False) -> Path:
    """Write edits to one .safetensors file, which `load_edits` reads. Returns the path.

    Of a cache only the arrays of edited sites are written, and the fingerprint of its model; of a dictionary its path
    and its fingerprint. Raises TypeError (a site chosen by a predicate, which is not data), FileExistsError unless
    force.
    """
    write_file(path, file_of(*parts_of(edits, Path(path).parent)), force=force)
    return Path(path)


def parts_of(edits: Edit | Iterable[Edit], folder: Path) -> tuple[list[dict[str, Any]], Tensors]:
    """The JSON of edits for a file in that folder, and the tensors that it names. Raises as `save_edits`."""
    tensors: Tensors = {}
    rows = [_as_json(edit, f"{i}", tensors, folder) for i, edit in enumerate(checked_edits(edits))]
    return rows, tensors


def file_of(rows: Seq[Mapping[str, object]], tensors: Tensors) -> bytes:
    """The file of `parts_of`."""
    data = io.BytesIO()
    metadata = {"format": _FORMAT, "version": _VERSION, "edits": json.dumps(rows, allow_nan=False)}
    write_safetensors(data, tensors, metadata)
    return data.getvalue()


def _as_json(edit: Edit, number: str, tensors: Tensors, folder: Path) -> dict[str, Any]:
    kind = type(edit).__name__
    if _KINDS.get(kind) is not type(edit):
        raise TypeError(f"only edits of gemma4.edits can be saved, got {kind}")
    row: dict[str, Any] = {"kind": kind}
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if kind == "KnockOut" and field.name == "pos":  # it is in the edge
            continue
        if value is not None:
            named = _named(value, folder)
            row[field.name] = named or _plain(value, f"{number}.{field.name}", edit, tensors)
    return row


def _named(value: Any, folder: Path) -> dict[str, Any] | None:
    """The JSON of a value that is saved by reference."""
    for name, reference in _REFERENCES.items():
        if isinstance(value, reference.of):
            return {name: reference.save(value, folder)}
    return None


def _plain(value: Any, name: str, edit: Edit, tensors: Tensors) -> Any:
    if isinstance(value, np.ndarray):
        tensors[name] = np.ascontiguousarray(cast("NDArray[Any]", value))
        return {"tensor": name}
    if isinstance(value, recipes.FromPrompt):
        return {"prompt": int(value.prompt)}
    if isinstance(value, Cache):
        sites = _save_cache(value, name, edit, tensors)
        return {"cache": name, "sites": sites, "model": getattr(value, "fingerprint", "")}
    if isinstance(value, slice):
        ends = cast("slice[int | None, int | None, int | None]", value)
        return {"slice": [ends.start, ends.stop, ends.step]}
    if isinstance(value, list | tuple):
        many = cast("Seq[Any]", value)
        return [_plain(one, f"{name}.{i}", edit, tensors) for i, one in enumerate(many)]
    if callable(value):
        raise TypeError(f"{edit}: a predicate is no data; name the sites, and it can be saved")
    if isinstance(value, float | np.floating):
        number = float(cast(float, value))
        return number if np.isfinite(number) else {"number": str(number)}
    return value


def _save_cache(cache: Cache, name: str, edit: Edit, tensors: Tensors) -> list[str]:
    head, site = cast("tuple[int, int] | None", getattr(edit, "head", None)), getattr(edit, "site", None)
    names: Any = f"blocks.{head[0]}.attn.hook_z" if site is None and head else site
    if callable(names):
        raise TypeError(f"{edit}: a predicate is no data; name the sites, and it can be saved")
    patterns = [canonical_name(one) for one in ([names] if isinstance(names, str) else names)]
    patterns += ["hook_logits"] if "hook_logits_raw" in patterns else []  # the head's output without a softcap
    held = cast("Mapping[str, F32]", cache)
    chosen = [one for one in held if any(fnmatch.fnmatchcase(one, pattern) for pattern in patterns)]
    tensors[f"{name}.positions"] = np.asarray(cache.positions, np.int64)
    for one in chosen:
        tensors[f"{name}.{one}"] = np.ascontiguousarray(held[one])
    return chosen


# -- reading -----------------------------------------------------------------------------------------------------------


def load_edits(
    path: StrPath, *, dictionaries: Mapping[str, StrPath] | None = None, model: Fingerprinted | None = None
) -> list[Edit]:
    """The edits of a file that `save_edits` wrote.

    dictionaries: where a dictionary is now, by its saved path, if it moved. Else it is looked for at that path, and at
    the same place relative to the file of edits.
    model: the loaded model that the edits are for: caches that name another one are refused. None = they are not
    compared.

    Raises FormatError (no such file, damaged, another dictionary or model than the saved one), FileNotFoundError (a
    dictionary is missing), OSError.
    """
    file = SafetensorsFile(Path(path))
    try:
        if file.metadata.get("format") != _FORMAT or file.metadata.get("version") != _VERSION:
            found = f"format {file.metadata.get('format')!r:.40}, version {file.metadata.get('version')!r:.20}"
            raise FormatError(f"{path} holds no edits: {found}, expected {_FORMAT!r}, {_VERSION!r}")
        source = _Source(file, dictionaries or {}, model)
        return [_edit(row, source, f"{path}: edit {i}") for i, row in enumerate(_rows(file, str(path)))]
    finally:
        file.close()


def _rows(file: SafetensorsFile, where: str) -> list[dict[str, Any]]:
    try:
        rows: Any = json.loads(file.metadata.get("edits", ""))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: the list of edits is no JSON: {str(error)[:120]}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in cast("list[Any]", rows)):
        raise FormatError(f"{where}: the list of edits must hold JSON objects")
    return cast("list[dict[str, Any]]", rows)


def _edit(row: dict[str, Any], source: _Source, where: str) -> Edit:
    kind = row.get("kind")
    make = _KINDS.get(kind) if isinstance(kind, str) else None
    if make is None:
        raise FormatError(f"{where} is of the unknown kind {kind!r:.60}; known: {', '.join(_KINDS)}")
    fields = {field.name for field in dataclasses.fields(cast(Any, make))}
    unknown = [name for name in row if name not in fields | {"kind"}]
    if unknown:
        raise FormatError(f"{where}: {kind} has no {unknown[0]!r:.60}; it has {', '.join(sorted(fields))}")
    try:
        return make(**{name: _value(value, source) for name, value in row.items() if name != "kind"})
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise FormatError(f"{where}: {error}") from None
    except RecursionError:
        raise FormatError(f"{where}: its values are nested too deeply") from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from None


def _value(value: Any, source: _Source) -> Any:
    if isinstance(value, list):
        return tuple(_value(one, source) for one in cast("list[Any]", value))
    if not isinstance(value, dict):
        return value
    entry = cast("dict[str, Any]", value)
    if set(entry) == {"tensor"}:
        return source.tensor(entry["tensor"])
    if set(entry) == {"slice"}:
        return slice(*entry["slice"])
    if set(entry) == {"prompt"}:
        return recipes.FromPrompt(entry["prompt"])
    if set(entry) == {"number"}:
        return float(entry["number"])
    if set(entry) - {"model"} == {"cache", "sites"}:
        return source.cache(entry["cache"], entry["sites"], entry.get("model", ""))
    if len(entry) == 1 and (name := next(iter(entry))) in _REFERENCES:
        return source.object_of(name, entry[name])
    raise ValueError(f"a value of the unknown form {str(entry)[:60]}")


# -- control vectors ---------------------------------------------------------------------------------------------------

_DIRECTION = re.compile(r"direction\.(\d+)")


def load_control_vector(
    path: StrPath, scale: float = 1.0, *, layers: int | Iterable[int] | None = None, shift: int = 0
) -> list[Steer]:
    """The directions of a GGUF control vector (llama.cpp's --control-vector, repeng), a `Steer` for each layer.

    direction.N is added to the output of block N (0-based), as llama.cpp does. layers: only these blocks; None = all in
    the file. shift: add direction.N to block N + shift instead: llama.cpp's cvector-generator measures it one block
    earlier than it is applied, so shift=-1 applies its vectors where they were measured.
    Raises FormatError (no control vector, or damaged), ValueError (the file has no direction for a layer), OSError.
    """
    file = GgufFile(Path(path))
    try:
        kind = file.metadata.get("general.architecture")
        if kind != "controlvector":
            raise FormatError(f"{path} is of the architecture {kind!r:.60}, expected 'controlvector'")
        found: dict[int, F32] = {}
        for name, info in file.tensors.items():
            match = _DIRECTION.fullmatch(name)
            if not match or info.dtype not in ("F32", "F16") or len(info.shape) != 1:
                found_here = f"{name!r:.60} is {info.dtype} {list(info.shape)}"
                raise FormatError(f"{path}: {found_here}, expected direction.N, F32 or F16 [d_model]")
            found[int(match[1]) + shift] = file.array(name).astype(np.float32)
    finally:
        file.close()
    chosen = sorted(found) if layers is None else listed(checked_where(layers, "layers")) or ()
    missing = [layer for layer in chosen if layer not in found]
    if missing or not chosen:
        raise ValueError(f"{path} has no direction for layer {missing or ''}; it has {sorted(found)}")
    return [Steer(found[layer], layer, scale) for layer in chosen]
