# SPDX-License-Identifier: Apache-2.0
"""A harvest in other tools' formats: parquet, zarr, SAELens' cached activations, delphi's cached latents.

Each function writes a new folder, which appears when it is complete. bf16 becomes float32 in parquet, zarr and SAELens,
which have no such type.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.files import StrPath
from gemma4.harvest.dataset import ROW_COLUMNS, Dataset
from gemma4.load.safetensors import write_safetensors
from gemma4.media.source import require

Array: TypeAlias = NDArray[Any]
Names: TypeAlias = str | Iterable[str] | None

_CHUNK_ROWS = 4096  # of a zarr array
_BATCH_NUMBERS = 1 << 26  # of a record batch, whose lists end at 32-bit places


def to_parquet(dataset: Dataset, path: StrPath, names: Names = None) -> Path:
    """A file for each shard, with a column for each of `names` (None = all). Needs gemma4[harvest].

    A site is a column of lists of fixed size, its row's axes flattened; the schema's metadata has their shapes.
    Raises FileExistsError, SiteError, ImportError without pyarrow, OSError.
    """
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    columns = [dataset[name] for name in _names(dataset, names)]
    shapes = {column.name: list(column.shape[1:]) for column in columns if len(column.shape) > 1}
    with _new_folder(path) as (target, folder):
        for shard in range(dataset.n_shards):
            arrays = [_arrow_lists(arrow, column.part(shard)) for column in columns]
            table = arrow.table(arrays, names=[column.name for column in columns])
            table = table.replace_schema_metadata({"gemma4.rows": json.dumps(shapes)})
            parquet.write_table(table, folder / f"part-{shard:06d}.parquet")
            dataset.check(shard)
    return target


def to_zarr(dataset: Dataset, path: StrPath, names: Names = None) -> Path:
    """A zarr group with an array [n_rows, ...] for each of `names` (None = all). Needs gemma4[harvest].

    The group's attributes have the manifest's plan. Raises FileExistsError, SiteError, ImportError, OSError.
    """
    zarr = require("zarr")
    columns = [dataset[name] for name in _names(dataset, names)]
    with _new_folder(path) as (target, folder):
        group = zarr.open_group(str(folder), mode="w", attributes={"gemma4.harvest": dataset.manifest["plan"]})
        for column in columns:
            dtype = _plain(column.part(0)[:0]).dtype if dataset.n_shards else np.dtype(np.float32)
            chunks = (min(_CHUNK_ROWS, max(1, len(column))), *column.shape[1:])
            array = group.create_array(column.name, shape=column.shape, dtype=dtype, chunks=chunks)
            for begin in range(0, len(column), _CHUNK_ROWS):
                array[begin : begin + _CHUNK_ROWS] = _plain(column[begin : begin + _CHUNK_ROWS])
            dataset.check()
    return target


def to_saelens(dataset: Dataset, path: StrPath, site: str, *, context: int | None = None) -> Path:
    """A dataset as SAELens' CacheActivationsRunner writes it, for `cached_activations_path`: a folder that the package
    datasets opens, with the site [context, d_in] and token_ids [context] of each sequence. Needs gemma4[harvest].

    context: tokens of every sequence; None = the harvest's. Sequences are cut into stretches of that length; what is
    left at their ends is not written. Raises ValueError (no sequence is so long), and as `to_parquet`.
    """
    arrow, ipc = require("pyarrow"), require("pyarrow.ipc")
    column, context = dataset[site], _context(dataset, context)
    width = int(np.prod(column.shape[1:], dtype=np.int64))
    if context * width >= 1 << 31:
        raise ValueError(f"{context} tokens of {width} numbers are too many for a list: give a smaller context")
    dtype = _plain(np.empty(0, column.dtype)).dtype.name
    features = {
        column.name: {"shape": [context, width], "dtype": dtype, "_type": "Array2D"},
        "token_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "length": context, "_type": "Sequence"},
    }
    info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    stretch = np.empty((0, context, width), column.dtype)
    fields = [
        arrow.field(
            column.name, _arrow_lists(arrow, stretch, fixed=False).type, metadata=_array_2d(context, width, dtype)
        ),
        arrow.field("token_ids", _arrow_lists(arrow, np.empty((0, context), np.int32)).type),
    ]
    schema = arrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    step = max(1, _BATCH_NUMBERS // (context * width))
    with _new_folder(path) as (target, folder):
        files: list[dict[str, str]] = []
        for shard, rows in _stretches(dataset, context):
            activations, tokens = column.part(shard).reshape(-1, width), dataset["tokens"].part(shard)
            files.append({"filename": f"data-{len(files):05d}.arrow"})
            with ipc.new_stream(str(folder / files[-1]["filename"]), schema) as stream:
                for begin in range(0, len(rows), step):
                    some = rows[begin : begin + step]
                    lists = _arrow_lists(arrow, activations[some], fixed=False)
                    arrays = [lists, _arrow_lists(arrow, tokens[some])]
                    stream.write_batch(arrow.record_batch(arrays, schema=schema))
            dataset.check(shard)
        digest = hashlib.sha256(f"{dataset.manifest['digest']} {column.name} {context}".encode()).hexdigest()
        state: dict[str, Any] = {"_data_files": files, "_fingerprint": digest[:16], "_split": None}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
        (folder / "state.json").write_text(json.dumps(state, indent=2))
    return target


def to_delphi(
    dataset: Dataset, path: StrPath, dictionary: int = 0, *, context: int | None = None, n_splits: int = 5
) -> Path:
    """Latents as delphi's LatentCache writes them: a folder for the site, a file for each range of features.

    dictionary, context: as for `Dataset.features` and `to_saelens`. n_splits: ranges. Raises IndexError (no such
    dictionary), ValueError (no sequence is so long, more ranges than features), and as `to_parquet`.
    """
    context, facts = _context(dataset, context), _dictionary(dataset, dictionary)
    checks.integer("n_splits", n_splits, 1, int(facts["d_sae"]))
    locations, values, tokens = _latents(dataset, dictionary, context)
    edges = np.linspace(0, int(facts["d_sae"]), n_splits + 1).astype(np.int64)
    with _new_folder(path) as (target, folder):
        inside = folder / str(facts["site"])
        inside.mkdir()
        for first, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            mine = (locations[:, 2] >= first) & (locations[:, 2] < end)
            places = locations[mine] - np.array([0, 0, first])
            narrow = np.uint16 if places.max(initial=0) < 1 << 16 else np.uint32
            activations = values[mine].astype(np.float16)
            tensors = {"locations": places.astype(narrow), "activations": activations, "tokens": tokens}
            with open(inside / f"{first}_{end - 1}.safetensors", "xb") as file:
                write_safetensors(file, tensors)
        plan = dataset.manifest["plan"]
        config = {"model_name": plan["model"]["name"], "ctx_len": context, "cache_ctx_len": context, "batch_size": 1}
        config |= {"n_tokens": tokens.size, "n_splits": n_splits, "dataset_repo": ", ".join(plan["corpus"]["files"])}
        config |= {"dataset_split": "", "dataset_name": "", "dataset_column": plan["corpus"]["key"] or "text"}
        (inside / "config.json").write_text(json.dumps(config, indent=4))
    return target


def _latents(dataset: Dataset, dictionary: int, context: int) -> tuple[NDArray[np.int64], Array, NDArray[np.int32]]:
    """(sequence, position, feature) int64 [n, 3] and value float32 [n] of each entry; the tokens int32 [n, context]."""
    locations: list[Array] = [np.empty((0, 3), np.int64)]
    values: list[Array] = [np.empty(0, np.float32)]
    tokens: list[Array] = [np.empty((0, context), np.int32)]
    first = 0
    for shard, rows in _stretches(dataset, context):
        features = dataset.features(shard, dictionary)
        place = np.full(len(features), -1, np.int64)  # of each row, in the stretches
        place[rows.ravel()] = np.arange(rows.size)
        at = place[features.rows]
        kept = at >= 0
        sequence, position = np.divmod(at[kept], context)
        locations.append(np.stack([sequence + first, position, features.ids[kept]], axis=1))
        values.append(features.values[kept])
        tokens.append(dataset["tokens"].part(shard)[rows])
        dataset.check(shard)
        first += len(rows)
    return np.concatenate(locations), np.concatenate(values), np.concatenate(tokens)


def _stretches(dataset: Dataset, context: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(shard, rows int64 [n, context]) of each shard that has stretches of that length inside a sequence."""
    found = False
    for shard in range(dataset.n_shards):
        bounds: list[int] = dataset.sequence_bounds(shard).tolist()
        starts = [row for begin, end in pairwise(bounds) for row in range(begin, end - context + 1, context)]
        if starts:
            found = True
            yield shard, np.array(starts, np.int64)[:, None] + np.arange(context)
    if not found:
        raise ValueError(f"no sequence has {context} tokens: give a smaller context")


def _context(dataset: Dataset, context: int | None) -> int:
    stored = int(dataset.manifest["plan"]["context"])
    return stored if context is None else checks.integer("context", context, 1, stored)


def _dictionary(dataset: Dataset, number: int) -> dict[str, Any]:
    dataset.examples(number)  # raises IndexError
    return dataset.dictionaries[number]


def _names(dataset: Dataset, names: Names) -> list[str]:
    return [*ROW_COLUMNS, *dataset.sites] if names is None else [names] if isinstance(names, str) else list(names)


def _plain(array: Array) -> Array:
    """The array in a type that every library has."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _arrow_lists(arrow: Any, array: Array, *, fixed: bool = True) -> Any:
    """An array [n, ...] as n values, or lists: of fixed size and flat, or else nested, an axis each."""
    flat = arrow.array(np.ascontiguousarray(_plain(array)).reshape(-1))
    if array.ndim == 1:
        return flat
    if fixed:
        return arrow.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:], dtype=np.int64)))
    for axis in range(array.ndim - 1, 0, -1):
        n_lists = int(np.prod(array.shape[:axis], dtype=np.int64))
        flat = arrow.ListArray.from_arrays(np.arange(n_lists + 1, dtype=np.int32) * array.shape[axis], flat)
    return flat


def _array_2d(rows: int, columns: int, dtype: str) -> dict[str, str]:
    """A field's metadata: the extension type that the package datasets has for its Array2D."""
    facts = json.dumps(((rows, columns), dtype))
    name = "datasets.features.features.Array2DExtensionType"
    return {"ARROW:extension:name": name, "ARROW:extension:metadata": facts}


@contextlib.contextmanager
def _new_folder(path: StrPath) -> Iterator[tuple[Path, Path]]:
    """The place of a folder, and the folder to fill, which gets its place when the block ends without error.

    Raises FileExistsError, OSError.
    """
    target = Path(os.path.expanduser(checks.path("path", path)))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "exists already; name a new folder", str(target))
    partial = target.with_name(f".{target.name[:40]}.{os.urandom(8).hex()}.partial")
    partial.mkdir()
    try:
        yield target, partial
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
