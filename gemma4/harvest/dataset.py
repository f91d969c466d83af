# SPDX-License-Identifier: Apache-2.0
"""Reading a harvest: its columns as arrays over all shards, batches of rows, sequences, sparse features."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.dictionaries import Features
from gemma4.edits import Edit, load_edits
from gemma4.errors import FormatError, SiteError, StateError
from gemma4.files import StrPath
from gemma4.harvest.hashing import FileFacts, Going, each, facts_of
from gemma4.harvest.plan import FORMAT, VERSION
from gemma4.harvest.store import DATA, EDITS, MANIFEST, STATS, Store
from gemma4.interp.dataset import DIMENSIONS
from gemma4.interp.sites import canonical_name
from gemma4.load.safetensors import SafetensorsFile
from gemma4.media.source import require
from gemma4.narrow import is_dict, is_integer, is_list

if TYPE_CHECKING:
    import xarray

    from gemma4.harvest.torch_data import TorchRows

Array: TypeAlias = NDArray[Any]
Json: TypeAlias = dict[str, Any]
Stamp: TypeAlias = tuple[int, int, int, int]  # `MappedFile.stamp`
Index: TypeAlias = "int | slice | Sequence[int] | NDArray[np.integer[Any]] | NDArray[np.bool_] | tuple[Any, ...]"

ROW_COLUMNS = ("tokens", "pos", "seq_id", "token_type")
_MIXED = 8  # shards whose rows are shuffled together
_OPEN_FILES = 64


@dataclass(frozen=True, slots=True, eq=False)
class SiteStats:
    """Over all rows of a site: mean and std of each number, float64 of a row's shape; the mean L2 norm of a row."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    norm: float


class Column:
    """One site, or one of tokens, pos, seq_id and token_type, over all shards: an array that stays in its files.

    `column[i]`, `column[i:j]`, `column[[i, j]]`, `column[mask]` and, as of an array, `column[i:j, 3]` are arrays of the
    stored dtype (bf16 as ml_dtypes.bfloat16). A stretch inside one shard is a read-only view of the mapped file, with
    `Dataset.check` for what happens to the file later; everything else is a copy. `np.asarray(column)` reads all.
    """

    def __init__(self, dataset: Dataset, name: str, dtype: np.dtype[np.generic], row: tuple[int, ...]) -> None:
        self._dataset, self.name, self.dtype = dataset, name, dtype
        self.shape = (len(dataset), *row)

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, shard: int) -> Array:
        """The rows of one shard: a read-only view of its file (seq_id: a copy). Raises FormatError (changed)."""
        rows = self._dataset.tensor(shard, DATA, self.name)
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape[1:]:
            raise FormatError(f"shard {shard}: {self.name} is {rows.dtype} {list(rows.shape)}, not as in the manifest")
        if self.name != "seq_id":
            return rows
        with self._dataset.reading(shard):
            return rows + self._dataset.first_sequence(shard)

    def __getitem__(self, index: Index) -> Array:
        """Raises IndexError, ValueError (what is no index of rows), FormatError (a file changed)."""
        if isinstance(index, tuple):
            return self._part_of_rows(index)
        if is_integer(index):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            return self._rows(np.array([int(index) % len(self)]))[0]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._stretch(start, max(start, stop))
            return self._rows(np.arange(start, stop, step))
        rows = np.asarray(index)
        if rows.dtype.kind == "b" and rows.shape == (len(self),):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
            checks.fail("rows", index, f"an integer, a slice, integers [n], or a mask [{len(self)}]")
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        rows = rows.astype(np.int64)  # a row may be no number of a narrower type
        return self._rows(np.where(rows < 0, rows + len(self), rows))

    def _part_of_rows(self, index: tuple[Any, ...]) -> Array:
        """column[rows, ...]: a part of each row, as of an array."""
        if not index:
            return self[:]
        first, rest = index[0], index[1:]
        if is_integer(first):
            return self[int(first)][rest]
        if not isinstance(first, slice) and not all(is_integer(one) or isinstance(one, slice) for one in rest):
            checks.fail("rows", index, "integers and slices beside a list of rows: take the rows first")
        return self[first][(slice(None), *rest)]

    def _stretch(self, start: int, stop: int) -> Array:
        firsts = self._dataset.first_rows
        first, last = (int(np.searchsorted(firsts, row, side="right")) - 1 for row in (start, max(start, stop - 1)))
        shards = range(first, min(last + 1, self._dataset.n_shards))
        if len(shards) == 1:
            return self.part(first)[start - int(firsts[first]) : stop - int(firsts[first])]
        found = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for shard in shards:
            begin, end = max(start, int(firsts[shard])), min(stop, int(firsts[shard + 1]))
            with self._dataset.reading(shard):
                found[begin - start : end - start] = self.part(shard)[begin - int(firsts[shard]) :][: end - begin]
        return found

    def _rows(self, rows: NDArray[np.int64]) -> Array:
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        shards = np.searchsorted(self._dataset.first_rows, rows, side="right") - 1
        for shard in np.unique(shards):
            at = shards == shard
            with self._dataset.reading(int(shard)):
                found[at] = self.part(int(shard))[rows[at] - self._dataset.first_rows[shard]]
        return found

    def __array__(self, dtype: np.dtype[np.generic] | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a column of several files is an array only as a copy")
        with self._dataset.reading():
            whole = np.array(self[:])
        return whole if dtype is None else whole.astype(dtype)

    def __repr__(self) -> str:
        return f"Column({self.name}, {self.dtype} {list(self.shape)})"


class Dataset(Mapping[str, Column]):
    """A complete harvest: column name -> `Column`. Files are mapped when they are read. `gemma4.harvest.open` makes it.

    path      its folder
    manifest  the description, as stored: model, tokenizer, corpus, sites, dtype, options, shards and their checksums
    sites     names of the stored sites, in forward order
    n_rows, n_sequences, n_shards  their numbers
    """

    def __init__(self, path: Path, manifest: Json) -> None:
        self.path, self.manifest = path, manifest
        self._store = Store(path)
        self._shards: list[dict[str, Any]] = manifest["shards"]
        self._rows = {str(site["name"]): tuple(map(int, site["row"])) for site in manifest["plan"]["sites"]}
        self.sites = tuple(self._rows)
        self._files: OrderedDict[Path, SafetensorsFile] = OrderedDict()
        self._stamps: dict[Path, dict[Path, Stamp]] = {}  # folder -> of every file that was opened
        self.first_rows = _sums(self._shards, "rows")  # int64 [n_shards + 1]
        self._first_sequences = _sums(self._shards, "sequences")

    # -- columns -----------------------------------------------------------------------------------------------------

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    @property
    def n_rows(self) -> int:
        return int(self.first_rows[-1])

    @property
    def n_sequences(self) -> int:
        return int(self._first_sequences[-1])

    def __len__(self) -> int:
        """Rows."""
        return self.n_rows

    def __iter__(self) -> Iterator[str]:
        return iter((*ROW_COLUMNS, *self.sites))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and canonical_name(name) in (*ROW_COLUMNS, *self.sites)

    def __getitem__(self, name: str) -> Column:
        """Raises SiteError with the names that there are."""
        name = canonical_name(name)
        if name not in self:
            raise SiteError(f"{name!r:.80} was not harvested; there are {', '.join(self)}")
        dtype = self.tensor(0, DATA, name).dtype if self.n_shards else np.dtype(np.float32)
        return Column(self, name, dtype, self._rows.get(name, ()))

    def tensor(self, shard: int, file: str, name: str) -> Array:
        """A tensor of a shard's file: a read-only view of the mapping. Raises FormatError (damaged, or changed).

        What a view shows of a file that shrinks later is zeros, and of one that is written to, the new bytes: `check`,
        or `reading` around the work, tells.
        """
        mapped = self._mapped(self._store.folder(shard) / file)
        if name not in mapped.tensors:
            raise FormatError(f"shard {shard}: {file} has no tensor {name!r}: verify() tells what is damaged")
        mapped.check()
        return mapped.array(name)

    def check(self, shard: int | None = None) -> None:
        """Raise FormatError if a file shrank, was overwritten or replaced since it was first read.

        shard: only the files of that shard; None = all that were read. Some system calls for each file. A file that was
        deleted or moved is no error: views keep its contents.
        """
        folders = list(self._stamps) if shard is None else [self._store.folder(shard)]
        for folder in folders:
            self._check_folder(folder)

    def check_summaries(self) -> None:
        """As `check`, for the files beside the shards: statistics and examples."""
        self._check_folder(self.path)

    def _check_folder(self, folder: Path) -> None:
        for path, stamp in self._stamps.get(folder, {}).items():
            if path in self._files:
                self._files[path].check()
            else:
                _check_stamp(path, stamp)

    @contextmanager
    def reading(self, shard: int | None = None) -> Iterator[None]:
        """`with dataset.reading():` around work with views: `check` when the block ends without another error."""
        yield
        self.check(shard)

    def _mapped(self, path: Path) -> SafetensorsFile:
        if path not in self._files:
            file = SafetensorsFile(path)
            if self._stamps.setdefault(path.parent, {}).setdefault(path, file.stamp) != file.stamp:
                file.close()
                raise FormatError(f"{path} changed since it was first read: open the harvest again")
            self._files[path] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()  # views of it stay valid
        self._files.move_to_end(path)
        return self._files[path]

    def first_sequence(self, shard: int) -> int:
        """The number of a shard's first sequence."""
        return int(self._first_sequences[shard])

    # -- sequences and batches ---------------------------------------------------------------------------------------

    def sequence_bounds(self, shard: int) -> NDArray[np.int64]:
        """int64 [sequences + 1]: the first row of each sequence of a shard, counted in the shard, and the end."""
        return self._copied(shard, "cu_seqlens")

    def _copied(self, shard: int, name: str) -> Array:
        with self.reading(shard):
            return np.array(self.tensor(shard, DATA, name))

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """int64 [n_sequences + 1]: sequence i has the rows bounds[i] to bounds[i + 1] - 1."""
        parts = [self.sequence_bounds(shard)[1:] + self.first_rows[shard] for shard in range(self.n_shards)]
        return np.concatenate([np.zeros(1, np.int64), *parts])

    @cached_property
    def documents(self) -> NDArray[np.int64]:
        """int64 [n_sequences, 2]: each sequence's document in the corpus, and the token of it where it begins."""
        parts = [
            np.stack([self._copied(shard, name) for name in ("seq_document", "seq_start")], axis=1)
            for shard in range(self.n_shards)
        ]
        return np.concatenate([np.empty((0, 2), np.int64), *parts])

    def sequence(self, number: int) -> dict[str, Array]:
        """One sequence: column name -> its rows, views where possible. Raises IndexError, FormatError."""
        if not is_integer(number) or not 0 <= number < self.n_sequences:
            raise IndexError(f"sequence {number!r:.60} of {self.n_sequences}")
        begin, end = int(self.bounds[number]), int(self.bounds[number + 1])
        return {name: column[begin:end] for name, column in self.items()}

    def batches(
        self,
        size: int,
        names: str | Iterable[str] | None = None,
        *,
        shuffle: int | None = None,
        shards: Iterable[int] | None = None,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Array]]:
        """Batches of rows: column name -> array [size, ...] of the stored dtype; the last one may be smaller.

        names      columns; None = all
        shuffle    a seed: shards come in random order, and the rows of 8 at a time are mixed. None = in order
        shards     only these
        drop_last  leave out a last batch of fewer rows

        Raises ValueError (size), SiteError, FormatError (a file changed).
        """
        size = checks.integer("size", size, 1, 1 << 40)
        columns = [self[name] for name in self._names(names)]
        order = np.array(list(range(self.n_shards) if shards is None else shards), np.int64)
        random = None if shuffle is None else np.random.default_rng(shuffle)
        if random is not None:
            random.shuffle(order)
        left: dict[str, Array] = {column.name: np.empty((0, *column.shape[1:]), column.dtype) for column in columns}
        for begin in range(0, len(order), 1 if random is None else _MIXED):
            group = order[begin : begin + (1 if random is None else _MIXED)]
            more = {c.name: np.concatenate([left[c.name], *(c.part(int(shard)) for shard in group)]) for c in columns}
            for shard in group:
                self.check(int(shard))
            n_rows = len(next(iter(more.values())))
            if random is not None:
                mixed = random.permutation(n_rows)
                more = {name: rows[mixed] for name, rows in more.items()}
            whole = n_rows - n_rows % size
            for at in range(0, whole, size):
                yield {name: rows[at : at + size] for name, rows in more.items()}
            left = {name: rows[whole:] for name, rows in more.items()}
        if not drop_last and len(next(iter(left.values()))):
            yield left

    def _names(self, names: str | Iterable[str] | None) -> list[str]:
        chosen = list(self) if names is None else [names] if isinstance(names, str) else list(names)
        return chosen or checks.fail("names", names, "at least one column")

    def torch(
        self, names: str | Iterable[str] | None = None, *, batch: int = 1024, shuffle: int | None = None
    ) -> TorchRows:
        """A `torch.utils.data.IterableDataset` of batches: column name -> tensor [batch, ...], bf16 as torch.bfloat16.

            DataLoader(dataset.torch("blocks.5.hook_resid_post", batch=4096, shuffle=0), batch_size=None, num_workers=2)

        Workers of a DataLoader share the shards. Each pass with `shuffle` is in another order, which with workers
        depends on torch's seed besides. Needs torch; raises ImportError without it, and as `batches`.
        """
        from gemma4.harvest.torch_data import TorchRows

        return TorchRows(self, self._names(names), checks.integer("batch", batch, 1, 1 << 40), shuffle)

    def to_xarray(self, names: str | Iterable[str] | None = None, rows: slice | None = None) -> xarray.Dataset:
        """Rows as an `xarray.Dataset` in memory, floats as float32. Needs gemma4[xarray].

        Dimensions: row, and those of `ActivationCache.to_dataset`. Coordinates along row: token, pos, seq_id,
        token_type. Raises ImportError without xarray.
        """
        module = require("xarray")
        rows = slice(None) if rows is None else rows
        axes = {str(site["name"]): str(site["axes"]) for site in self.manifest["plan"]["sites"]}
        variables: dict[str, object] = {}
        columns = [self[name] for name in self._names(self.sites if names is None else names)]
        sizes = {pair for c in columns for pair in zip(axes.get(c.name, ""), c.shape[1:], strict=True)}
        letters = [letter for letter, _ in sizes]
        for column in columns:
            dims = [
                DIMENSIONS[letter][0] + (f"_{size}" if letters.count(letter) > 1 else "")
                for letter, size in zip(axes.get(column.name, ""), column.shape[1:], strict=True)
            ]
            variables[column.name] = (["row", *dims], np.array(as_f32(column[rows])))
        index = range(*rows.indices(len(self)))
        coordinates: dict[str, object] = {"row": np.arange(index.start, index.stop, index.step)}
        coordinates |= {
            ("token" if name == "tokens" else name): ("row", np.array(self[name][rows])) for name in ROW_COLUMNS
        }
        self.check()
        attrs = {"model": str(self.manifest["plan"]["model"]["name"]), "harvest": str(self.path)}
        return cast("xarray.Dataset", module.Dataset(variables, coordinates, attrs))

    # -- statistics and features -------------------------------------------------------------------------------------

    def stats(self, site: str) -> SiteStats:
        """Mean, standard deviation and norm of a site over all rows.

        Raises SiteError, ValueError (there is no row), FormatError.
        """
        if not len(self):
            raise ValueError(f"{self.path} has no rows, as its corpus had no text: there is no mean")
        name, file = self[site].name, self._mapped(self.path / STATS)
        if f"{name}.mean" not in file.tensors:
            raise SiteError(f"{name!r} holds integers: it has no mean")
        with file.reading():
            mean, std, norm = (np.array(file.array(f"{name}.{part}")) for part in ("mean", "std", "norm"))
        return SiteStats(mean, std, float(norm[0]))

    @property
    def dictionaries(self) -> list[dict[str, Any]]:
        """The dictionaries that encoded on the fly: name, fingerprint, site, d_sae, top_k, examples."""
        return list(self.manifest["plan"]["dictionaries"])

    @property
    def edits(self) -> list[Edit]:
        """The edits of the model that ran, loaded from the dataset's folder; [] of a model as it is.

        Raises FormatError (damaged, or a dictionary is another one than the saved one), FileNotFoundError (a dictionary
        is missing: `gemma4.edits.load_edits` can be told where it is).
        """
        return load_edits(self.path / EDITS) if "edits" in self.manifest["plan"] else []

    def features(self, shard: int, dictionary: int = 0) -> Features:
        """Features of every row of a shard, views as of `tensor`. Raises IndexError (no such dictionary or shard),
        FormatError."""
        facts = self._dictionary(dictionary)
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"shard {shard} of {self.n_shards}")
        found = [
            self.tensor(shard, f"features-{dictionary}.safetensors", name) for name in ("offsets", "ids", "values")
        ]
        return Features(found[0], found[1], found[2], int(facts["d_sae"]))

    def examples(self, dictionary: int = 0) -> dict[str, Array]:
        """Each feature's strongest rows, under the names of Gemma Scope 2's examples.safetensors.

        activations float32, seq_ids int64, positions int32: [d_sae, n], strongest first, 0 and -1 where there are no
        more; feature_frequencies float32 [d_sae], the share of rows at which the feature fired. Views as of `tensor`.
        Raises IndexError, FormatError (changed).
        """
        self._dictionary(dictionary)
        file = self._mapped(self.path / f"examples-{dictionary}.safetensors")
        file.check()
        return {name: file.array(name) for name in file.tensors}

    def _dictionary(self, number: int) -> dict[str, Any]:
        if not is_integer(number) or not 0 <= number < len(self.dictionaries):
            raise IndexError(f"dictionary {number!r:.60} of {len(self.dictionaries)}")
        return self.dictionaries[number]

    # -- life --------------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Compare every file with its checksum. Raises FormatError that names those that differ."""
        wanted = [(self.path / name, facts) for name, facts in self.manifest["files"].items()]
        for number, shard in enumerate(self._shards):
            wanted += [(self._store.folder(number) / name, facts) for name, facts in shard["files"].items()]
        problems = [found for found in each(_problem, wanted) if found]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise FormatError(f"{'; '.join(problems[:5])}{more}: run the same harvest again to make them anew")

    def close(self) -> None:
        """Release the files. Arrays that were handed out stay valid."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return open_harvest, (self.path,)

    def __repr__(self) -> str:
        facts = self.manifest["plan"]
        lines = [f"Dataset: {self.n_rows:,} rows, {self.n_sequences:,} sequences, {self.n_shards:,} shards"]
        lines += [f"  {name}  {facts['dtype']} {list(row)}" for name, row in self._rows.items()]
        if "edits" in facts:
            lines.append(f"  of an edited model: {', '.join(edit['kind'] for edit in facts['edits']['edits'])}")
        return "\n".join(lines)


def open_harvest(path: StrPath) -> Dataset:
    """The dataset of a complete harvest.

        dataset = gemma4.harvest.open("acts")
        dataset["blocks.5.hook_resid_post"][:100]

    Checks the manifest and the sizes of files; `Dataset.verify` checks every byte. Raises FileNotFoundError (no
    harvest), StateError (not complete: run it again), FormatError (damaged).
    """
    root = Path(os.path.expanduser(checks.path("path", path)))
    manifest = Store(root).manifest()
    found = manifest.get("format"), manifest.get("version")
    if found != (FORMAT, VERSION):
        raise FormatError(f"{root / MANIFEST} is of {found[0]!r:.40} {found[1]!r:.20}, expected {FORMAT!r} {VERSION}")
    if manifest.get("complete") is not True:
        raise StateError(f"{root} is a harvest that is not complete: run it again, and it resumes")
    try:
        dataset = Dataset(root, manifest)
        _check_sizes(dataset, manifest["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{root / MANIFEST} is damaged: {type(error).__name__} {error}") from None
    return dataset


def _check_sizes(dataset: Dataset, files: Mapping[str, Any]) -> None:
    for number, shard in enumerate(dataset.manifest["shards"]):
        folder = Store(dataset.path).folder(number)
        for name, facts in shard["files"].items():
            _check_size(folder / name, int(facts["n_bytes"]))
    for name, facts in files.items():
        _check_size(dataset.path / name, int(facts["n_bytes"]))


def _check_size(path: Path, wanted: int) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise FormatError(f"{path} is gone: run the same harvest again to make it anew") from None
    if found != wanted:
        raise FormatError(f"{path} has {found:,} bytes, it was written with {wanted:,}: run the same harvest again")


def _check_stamp(path: Path, stamp: Stamp) -> None:
    """As `MappedFile.check`, for a file that is not open any more, of which there may be views."""
    try:
        now = os.stat(path)
    except OSError:
        return
    if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != stamp:
        raise FormatError(f"{path} changed since it was first read: open the harvest again")


def _problem(file: tuple[Path, object], going: Going) -> str | None:
    path, facts = file
    wanted = FileFacts(int(facts["n_bytes"]), str(facts["sha256"])) if is_dict(facts) else None
    try:
        return None if facts_of(path, going) == wanted else f"{path} is damaged"
    except (OSError, FormatError) as error:
        return f"{path} cannot be read ({error})"


def _sums(shards: object, key: str) -> NDArray[np.int64]:
    """int64 [n + 1]: numbers of rows or sequences before each shard, and in all. Raises ValueError."""
    if not is_list(shards) or not all(is_dict(one) and is_integer(one.get(key)) and one[key] >= 0 for one in shards):
        raise ValueError(f"expected shards with {key}")
    return np.concatenate([np.zeros(1, np.int64), np.cumsum([one[key] for one in shards], dtype=np.int64)])


def as_f32(array: Array) -> Array:
    """Floats as float32; integers as they are."""
    return array if array.dtype.kind in "iu" else array.astype(np.float32)
