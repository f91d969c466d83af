# SPDX-License-Identifier: Apache-2.0
"""A corpus: the documents of some files in a fixed order, cut into slices of similar size, one for each shard."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
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
_STAMP = struct.Struct("<qq")  # a medium's size and time: there may be millions


@dataclass(frozen=True, slots=True)
class Document:
    """number: in the corpus, from 0 on; where: its name in errors; content: an error if it cannot be read; folders: of
    its file, as it is on this machine, and in the corpus."""

    number: int
    where: str
    content: Content | FormatError
    folders: tuple[str, str] = ("", "")

    def in_corpus(self, text: str) -> str:
        """A text with paths in the document's folder as they are in the corpus, the same wherever that lies."""
        here, there = (os.path.join(folder, "") for folder in self.folders)
        if here in ("", os.sep):
            return text
        quoted = repr(here)[1:-1]  # as the messages of the system have it
        return text.replace(here, there).replace(quoted, there)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive documents of one file, from a reader's place `start` on, which is line or row `number`."""

    file: int
    start: int
    number: int
    count: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive documents, from number `first` on. weight: about their bytes of text; media: the stamps of all their
    pictures and recordings, in order."""

    first: int
    count: int
    weight: int
    spans: tuple[Span, ...]
    media: bytes = b""


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
    """files: in order; key, sample_by: see `gemma4.harvest.harvest`; stamps: the files' sizes and times; names: of the
    files, relative to the folder that was given, without it for a file that was given itself."""

    files: tuple[str, ...]
    key: str | None = None
    sample_by: SampleBy = "line"
    stamps: tuple[tuple[int, int], ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def open(cls, paths: StrPath | Iterable[StrPath], key: str | None = None, sample_by: SampleBy = "line") -> Corpus:
        """The files, and for folders the files below them that a reader is for, by name.

        Raises FileNotFoundError, ValueError (a file of an unknown kind, a folder without any, nothing at all).
        """
        checks.choice("sample_by", sample_by, get_args(SampleBy))
        if key is not None:
            checks.text("key", key)
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        named = [
            (os.path.abspath(file), str(file.name if file == path else file.relative_to(path)))
            for path in (Path(os.path.expanduser(checks.path("corpus", one))) for one in given)
            for file in _files(path)
        ]
        if not named:
            raise ValueError("the corpus is empty: name at least one file")
        files, names = zip(*named, strict=True)
        return cls(files, key, sample_by, names=names)

    def scan(
        self, slice_weight: int, skip_damaged: bool = False, progress: Scanning = lambda weight, name: None
    ) -> Scan:
        """Read everything once: check it, take its fingerprint, and cut it into slices.

        slice_weight: a slice ends with the document that brings it to that weight. skip_damaged: go on after documents
        that cannot be read. Raises FormatError naming file and line, FileNotFoundError (a medium), OSError.
        """
        scanned = replace(self, stamps=tuple(_stamp(file) for file in self.files))
        cutter, digest = _Cutter(slice_weight), hashlib.sha256(json.dumps([self.key, self.sample_by]).encode())
        for index in range(len(self.files)):
            with closing(scanned.reader(index)) as reader:
                for raw in reader.documents():
                    if isinstance(raw.content, FormatError) and not skip_damaged:
                        raise raw.content
                    media = media_of(raw.content)
                    stamps = b"".join(_STAMP.pack(*_stamp_of_medium(one)) for one in media)  # before they are read
                    for medium in media:
                        digest.update(_digest_of_medium(medium, reader.where(raw.number), skip_damaged))
                    cutter.add(Span(index, raw.start, raw.number, 1), _weight(raw.content), stamps)
                    progress(cutter.weight, reader.path.name)
                digest.update(f"{reader.path.suffix.lower()} ".encode() + _digest_of(reader.path))
        return Scan(scanned, digest.hexdigest(), cutter.count, cutter.weight, cutter.finish())

    def reader(self, file: int) -> Reader:
        """A reader of that file. Raises FormatError (it changed since it was scanned), OSError."""
        self.check(file)
        return reader_of(Path(self.files[file]), self.key, self.sample_by)

    def folders(self, file: int) -> tuple[str, str]:
        """A file's folder on this machine, and in the corpus."""
        return os.path.dirname(self.files[file]), os.path.dirname(self.names[file]).replace(os.sep, "/")

    def check(self, file: int) -> None:
        """Raise FormatError if that file changed since it was scanned."""
        if self.stamps and _stamp(self.files[file]) != self.stamps[file]:
            raise FormatError(f"{self.files[file]} changed since the harvest began")


class Reading:
    """The documents of one slice after the other. In tables, later slices are found from the last one on."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._reader: Reader | None = None
        self._file = -1  # of the reader

    def documents(self, part: Slice) -> Iterator[Document]:
        """The documents of a slice, each checked before and after its use.

        Raises FormatError (a file or a medium changed since it was scanned), OSError.
        """
        number, stamps = part.first, _STAMP.iter_unpack(part.media)
        for span in part.spans:
            reader = self._reader_of(span.file)
            for raw in islice(reader.documents(span.start, span.number), span.count):
                where = reader.where(raw.number)
                media = [(path, next(stamps, None)) for path in media_of(raw.content)]
                _check_media(media, where)
                yield Document(number, where, raw.content, self._corpus.folders(span.file))
                _check_media(media, where)
                number += 1
            self._corpus.check(span.file)

    def _reader_of(self, file: int) -> Reader:
        if self._reader is None or file != self._file:
            self.close()
            self._reader, self._file = self._corpus.reader(file), file
        self._corpus.check(file)
        return self._reader

    def close(self) -> None:
        """Release the file that is open."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


@dataclass
class _Cutter:
    """Slices under construction."""

    slice_weight: int
    count: int = 0
    weight: int = 0
    _done: list[Slice] = field(default_factory=list[Slice])
    _spans: list[Span] = field(default_factory=list[Span])
    _media: bytearray = field(default_factory=bytearray)
    _first: int = 0
    _before: int = 0  # the weight of slices that are done

    def add(self, place: Span, weight: int, media: bytes) -> None:
        """The next document, with the stamps of its media."""
        if self._spans and self._spans[-1].file == place.file:
            self._spans[-1] = replace(self._spans[-1], count=self._spans[-1].count + 1)
        else:
            self._spans.append(place)
        self._media += media
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
        self._done.append(Slice(self._first, n, weight, tuple(self._spans), bytes(self._media)))
        self._spans, self._media, self._first, self._before = [], bytearray(), self.count, self.weight


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file of the corpus", str(path))
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"{path} holds no file of a corpus: {' '.join(SUFFIXES)}")
    return found


def media_of(content: Content | FormatError) -> list[str]:
    """Paths of the media in a document; none in one that cannot be read."""
    return [] if isinstance(content, FormatError) else media_files(content)


def _weight(content: Content | FormatError) -> int:
    """About 4 for each token."""
    if isinstance(content, FormatError):
        return 0
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


def _stamp_of_medium(path: str) -> tuple[int, int]:
    """Size and time, or those of no file for one that is not there."""
    try:
        return _stamp(path)
    except (OSError, ValueError):
        return -1, -1


def _check_media(media: list[tuple[str, tuple[int, ...] | None]], where: str) -> None:
    """Raise FormatError if one has another stamp than it had."""
    for path, stamp in media:
        if _stamp_of_medium(path) != stamp:
            raise FormatError(f"{where}: {path} changed since the harvest began")


def _digest_of_medium(path: str, where: str, skip_damaged: bool) -> bytes:
    """skip_damaged: of one that cannot be read, a digest all the same."""
    try:
        return _digest_of(Path(path))
    except (OSError, ValueError) as error:  # ValueError: a pipe, or a NUL in the name
        if skip_damaged:
            return b"not read"
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"{where}: {error.strerror}", path) from None
        raise FormatError(f"{where}: {error}") from None
