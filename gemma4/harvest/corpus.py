# SPDX-License-Identifier: Apache-2.0
"""A corpus: the documents of some files in a fixed order, cut into slices of similar size, one for each shard."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias, get_args

from gemma4 import checks
from gemma4.errors import FormatError
from gemma4.files import StrPath, open_regular
from gemma4.harvest.readers import SUFFIXES, Content, Reader, SampleBy, media_files, reader_of
from gemma4.narrow import is_list_or_tuple, is_mapping

Scanning: TypeAlias = Callable[[int, str], None]

WEIGHT_OF_TOKEN = 4  # bytes of text; documents are weighed before they are tokenized
_MEDIUM_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Document:
    """number: in the corpus, from 0 on; where: its name in errors."""

    number: int
    where: str
    content: Content


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive documents of one file, from a reader's place `start` on; `number`: of the first, for errors."""

    file: int
    start: int
    number: int
    count: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive documents, from number `first` on. weight: about their bytes of text."""

    first: int
    count: int
    weight: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Scan:
    """A corpus that was read once. corpus: it, with its files' stamps; fingerprint: of all its bytes, 64 hex digits."""

    corpus: Corpus
    fingerprint: str
    n_documents: int
    weight: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """files: in order; key, sample_by: see `gemma4.harvest.harvest`; stamps: the files' sizes and times."""

    files: tuple[str, ...]
    key: str | None = None
    sample_by: SampleBy = "line"
    stamps: tuple[tuple[int, int], ...] = ()

    @classmethod
    def open(cls, paths: StrPath | Iterable[StrPath], key: str | None = None, sample_by: SampleBy = "line") -> Corpus:
        """The files, and for folders the files below them that a reader is for, by name.

        Raises FileNotFoundError, ValueError (a file of an unknown kind, a folder without any, nothing at all).
        """
        checks.choice("sample_by", sample_by, get_args(SampleBy))
        if key is not None:
            checks.text("key", key)
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        files = [str(file) for path in given for file in _files(Path(os.path.expanduser(checks.path("corpus", path))))]
        if not files:
            raise ValueError("the corpus is empty: name at least one file")
        return cls(tuple(os.path.abspath(file) for file in files), key, sample_by)

    def scan(self, slice_weight: int, progress: Scanning = lambda weight, name: None) -> Scan:
        """Read everything once: check it, take its fingerprint, and cut it into slices.

        slice_weight: a slice ends with the document that brings it to that weight. Raises FormatError naming file and
        line, FileNotFoundError (a medium), OSError.
        """
        scanned = replace(self, stamps=tuple(_stamp(file) for file in self.files))
        cutter, digest = _Cutter(slice_weight), hashlib.sha256(json.dumps([self.key, self.sample_by]).encode())
        for index in range(len(self.files)):
            reader = scanned._reader(index)
            for raw in reader.documents():
                for medium in media_files(raw.content):
                    digest.update(_digest_of_medium(medium, reader.where(raw.number)))
                cutter.add(index, raw.start, raw.number, _weight(raw.content))
                progress(cutter.weight, reader.path.name)
            digest.update(f"{reader.path.suffix.lower()} ".encode() + _digest_of(reader.path))
        return Scan(scanned, digest.hexdigest(), cutter.count, cutter.weight, cutter.finish())

    def read(self, part: Slice) -> Iterator[Document]:
        """The documents of a slice. Raises FormatError (a file changed since it was scanned), OSError."""
        number = part.first
        for span in part.spans:
            reader = self._reader(span.file)
            for raw in islice(reader.documents(span.start), span.count):
                yield Document(
                    number, reader.where(span.number + raw.number - 1 if span.start else raw.number), raw.content
                )
                number += 1

    def _reader(self, file: int) -> Reader:
        if self.stamps and _stamp(self.files[file]) != self.stamps[file]:
            raise FormatError(f"{self.files[file]} changed since the harvest began")
        return reader_of(Path(self.files[file]), self.key, self.sample_by)


@dataclass
class _Cutter:
    """Slices under construction."""

    slice_weight: int
    count: int = 0
    weight: int = 0
    _done: list[Slice] = field(default_factory=list[Slice])
    _spans: list[Span] = field(default_factory=list[Span])
    _first: int = 0
    _before: int = 0  # the weight of slices that are done

    def add(self, file: int, start: int, number: int, weight: int) -> None:
        last = self._spans[-1] if self._spans else None
        if last is not None and last.file == file:
            self._spans[-1] = Span(file, last.start, last.number, last.count + 1)
        else:
            self._spans.append(Span(file, start, number, 1))
        self.count += 1
        self.weight += weight
        if self.weight - self._before >= self.slice_weight:
            self._end()

    def finish(self) -> tuple[Slice, ...]:
        if self._spans:
            self._end()
        return tuple(self._done)

    def _end(self) -> None:
        n, weight = self.count - self._first, self.weight - self._before
        self._done.append(Slice(self._first, n, weight, tuple(self._spans)))
        self._spans, self._first, self._before = [], self.count, self.weight


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file of the corpus", str(path))
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"{path} holds no file of a corpus: {' '.join(SUFFIXES)}")
    return found


def _weight(content: Content) -> int:
    """About 4 for each token."""
    if isinstance(content, str):
        return len(content) if content.isascii() else len(content.encode("utf-8", "surrogatepass"))
    texts = [item for item in content if not isinstance(item, int)]
    n_tokens = len(content) - len(texts) + _MEDIUM_TOKENS * len(media_files(content))
    return WEIGHT_OF_TOKEN * n_tokens + sum(_text_length(message.get("content")) for message in texts)


def _text_length(content: object) -> int:
    """Characters of a message, or of all texts in its parts."""
    if isinstance(content, str):
        return len(content)
    if is_list_or_tuple(content):
        return sum(_text_length(part) for part in content)
    return _text_length(content.get("text")) if is_mapping(content) else 0


def _stamp(file: str) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _digest_of(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _digest_of_medium(path: str, where: str) -> bytes:
    try:
        return _digest_of(Path(path))
    except OSError as error:
        raise type(error)(error.errno, f"{where}: {error.strerror}", path) from None
