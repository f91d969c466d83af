# SPDX-License-Identifier: Apache-2.0
"""The folder of a harvest: shards that appear whole or not at all, and the check that they still are.

    manifest.json            what was harvested; "complete" and the shards' checksums once all are there
    stats.safetensors        mean, std and norm of each site; examples-N.safetensors: of each dictionary
    edits.safetensors        the edits of the model, if it had some
    shards/000000/           data.safetensors, stats.safetensors, features-N.safetensors, record.json

A shard is written to a hidden folder beside its place, synced, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.files import read_limited, write_file
from gemma4.harvest.hashing import FileFacts, Going, facts_of
from gemma4.load.safetensors import layout, stored_bytes
from gemma4.narrow import is_dict, is_integer, is_list

Tensors: TypeAlias = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

DATA, STATS, RECORD, MANIFEST = "data.safetensors", "stats.safetensors", "record.json", "manifest.json"
EDITS = "edits.safetensors"
_MAX_JSON = 1 << 30
_OURS = re.compile(r"data\.safetensors|stats\.safetensors|features-\d+\.safetensors|record\.json")
_SHARD = re.compile(r"[0-9]{6,18}")
_PARTIAL = re.compile(r"\.\d{6,}\.(?P<host>.*)-(?P<pid>\d+)-[0-9a-f]{16}\.partial")


@dataclass(frozen=True, slots=True)
class Record:
    """A shard's contents. plan: digest of its plan; skipped: [document, reason] of documents left out.

    The file has a digest of all this besides, so a record that was changed is damaged.
    """

    plan: str
    shard: int
    rows: int
    sequences: int
    documents: int
    files: dict[str, FileFacts]
    skipped: list[list[Any]]

    def as_json(self) -> dict[str, Any]:
        facts = asdict(self)
        return facts | {"digest": _digest(facts)}

    @classmethod
    def from_json(cls, facts: object) -> Record:
        """Raises ValueError for what `as_json` cannot have written."""
        keys = {field.name for field in fields(cls)} | {"digest"}
        if not is_dict(facts) or set(facts) != keys:
            raise ValueError(f"expected {', '.join(sorted(keys))}")
        if facts["digest"] != _digest({key: value for key, value in facts.items() if key != "digest"}):
            raise ValueError("its digest is not the one of its contents: it was changed")
        counts: list[Any] = [facts[key] for key in ("shard", "rows", "sequences", "documents")]
        shard, rows, sequences, documents = counts
        if not all(is_integer(count) and count >= 0 for count in counts) or not isinstance(facts["plan"], str):
            raise ValueError("expected counts and the digest of a plan")
        if not is_dict(facts["files"]) or not is_list(facts["skipped"]):
            raise ValueError("expected files and skipped documents")
        files = {str(name): _file_facts(entry) for name, entry in facts["files"].items()}
        if DATA not in files or not all(_OURS.fullmatch(name) for name in files):
            raise ValueError(f"files of a shard are {DATA} and others of known names, found {sorted(files)}")
        return cls(facts["plan"], shard, rows, sequences, documents, files, facts["skipped"])


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _file_facts(entry: object) -> FileFacts:
    if not is_dict(entry) or set(entry) != {"n_bytes", "sha256"}:
        raise ValueError("expected n_bytes and sha256 of each file")
    if not is_integer(entry["n_bytes"]) or not isinstance(entry["sha256"], str):
        raise ValueError("expected n_bytes and sha256 of each file")
    return FileFacts(int(entry["n_bytes"]), entry["sha256"])


class TensorWriter:
    """A safetensors file of known shapes, filled by rows in any order."""

    def __init__(self, file: IO[bytes], tensors: Tensors) -> None:
        head, self._offsets = layout(tensors)
        self._file, self._tensors = file, tensors
        file.write(head)
        file.truncate(max(_end(tensors, self._offsets), len(head)))

    def put(self, name: str, rows: NDArray[Any], at: int = 0) -> None:
        """Rows from number `at` on."""
        dtype, shape = self._tensors[name]
        self._file.seek(self._offsets[name] + at * int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize)
        self._file.write(stored_bytes(rows.astype(dtype, copy=False)))


def _end(tensors: Tensors, offsets: Mapping[str, int]) -> int:
    sizes = (
        offsets[name] + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (dtype, shape) in tensors.items()
    )
    return max(sizes, default=0)


class Store:
    """The folder of one harvest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shards = root / "shards"

    # -- shards ------------------------------------------------------------------------------------------------------

    def folder(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}"

    @contextlib.contextmanager
    def new_shard(self, shard: int) -> Iterator[Path]:
        """A folder for a shard's files, each synced by its writer; at the end of the block it becomes the shard.

        If the block raises, the folder is removed. If another process was faster with the same shard, that one stays,
        also if it completed the dataset and removed this folder.
        """
        partial = self.shards / f".{shard:06d}.{socket.gethostname()}-{os.getpid()}-{os.urandom(8).hex()}.partial"
        partial.mkdir(parents=True)
        try:
            yield partial
            sync_folder(partial)
            try:
                os.rename(partial, self.folder(shard))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES) or not self.folder(shard).is_dir():
                    raise
            sync_folder(self.shards)
        except FileNotFoundError:
            if partial.is_dir() or not self.folder(shard).is_dir():
                raise
        finally:
            remove_shard(partial)

    def record(self, shard: int) -> Record | None:
        """A shard's record; None if the shard is not there. Raises FormatError (damaged)."""
        folder = self.folder(shard)
        if not folder.is_dir():
            return None
        try:
            record = Record.from_json(read_json(folder / RECORD))
        except (ValueError, OSError) as error:
            raise FormatError(f"shard {shard}: {RECORD}: {error}") from None
        if record.shard != shard:
            raise FormatError(f"shard {shard}: {RECORD} is the one of shard {record.shard}: the folder was copied here")
        return record

    def check(self, shard: int, record: Record, going: Going) -> None:
        """Compare a shard's files with its record. Raises FormatError naming the first that differs, and what `going`
        raises."""
        for name, wanted in sorted(record.files.items()):
            path = self.folder(shard) / name
            try:
                found = facts_of(path, going)
            except (OSError, FormatError) as error:
                raise FormatError(f"shard {shard}: {name} cannot be read: {error}") from None
            if found.n_bytes != wanted.n_bytes:
                raise FormatError(
                    f"shard {shard}: {name} has {found.n_bytes:,} bytes, it was written with {wanted.n_bytes:,}"
                )
            if found.sha256 != wanted.sha256:
                raise FormatError(f"shard {shard}: {name} is damaged: its sha256 is not the one that was written")

    def discard(self, shard: int) -> None:
        """Remove a damaged shard. Raises FormatError if its folder holds other files."""
        folder = self.folder(shard)
        others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
        if others:
            raise FormatError(
                f"{folder} is damaged, and holds {others[0]!r}, which is no file of a harvest: move it away"
            )
        remove_shard(folder)

    def found(self) -> list[int]:
        """Numbers of the shards that are there. Raises FormatError for another file in a shard's place."""
        paths = list(self.shards.iterdir()) if self.shards.is_dir() else []
        shards = {path: int(path.name) for path in paths if _SHARD.fullmatch(path.name)}
        for path, shard in shards.items():
            if path == self.folder(shard) and not path.is_dir():
                raise FormatError(f"{path} is no folder, and a shard has its place there: move it away")
        return sorted(shard for path, shard in shards.items() if path == self.folder(shard))

    def clean(self, *, everything: bool = False) -> None:
        """Remove what killed processes left: of processes of this machine that ended, or everything."""
        for path in list(self.shards.iterdir()) if self.shards.is_dir() else []:
            match = _PARTIAL.fullmatch(path.name)
            if match and (everything or (match["host"] == socket.gethostname() and not _lives(int(match["pid"])))):
                remove_shard(path)

    # -- manifest ----------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any]:
        """Raises FileNotFoundError, FormatError (no JSON object), OSError."""
        return read_json(self.root / MANIFEST)

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        self.write(MANIFEST, json.dumps(facts, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")

    def write(self, name: str, data: bytes) -> None:
        """Write a file beside the shards, unless it is there with these bytes."""
        path = self.root / name
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data, force=True)


def read_json(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, FormatError, OSError."""
    try:
        facts: object = json.loads(read_limited(path, _MAX_JSON))
    except RecursionError:
        raise FormatError(f"{path} is damaged: its JSON is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {str(error)[:200]}") from None
    if not is_dict(facts):
        raise FormatError(f"{path} is damaged: expected a JSON object, found {type(facts).__name__}")
    return facts


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file, on the disk when the block ends. Raises OSError that names the folder's final disk use."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make the names inside durable; some systems cannot."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_shard(folder: Path) -> None:
    """Remove our files in a folder, and the folder if it is empty then. A folder that is not there is no error."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder.rmdir()


def _lives(pid: int) -> bool:
    if os.name != "posix":  # there os.kill ends processes
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
