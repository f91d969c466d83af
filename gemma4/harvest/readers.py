# SPDX-License-Identifier: Apache-2.0
"""Files of a corpus, document by document: jsonl, txt, parquet, arrow, pictures and recordings.

Files are untrusted. A document has a content of one of three kinds: text, token ids, or chat messages.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, ClassVar, Literal, NamedTuple, TypeAlias

from gemma4.errors import FormatError
from gemma4.files import open_regular
from gemma4.media.source import require
from gemma4.narrow import is_integer, is_list, is_mapping
from gemma4.text.parts import MEDIA_TYPES, canonical

SampleBy: TypeAlias = Literal["line", "paragraph", "document"]
Content: TypeAlias = str | list[int] | list[Mapping[str, Any]]

KEYS = ("text", "messages", "tokens", "input_ids")  # looked for in this order where no key is given
MAX_DOCUMENT = 64 << 20  # bytes
_ROWS = 64  # of a table, read at once
_MEDIA = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac"),
    "video": (".mp4", ".mov", ".mkv", ".webm", ".3gp"),
}


class Raw(NamedTuple):
    """A document as stored."""

    start: int  # where `Reader.documents` finds it again
    number: int  # for messages: its line or row in the file, from 1 on; counted from the place where reading began
    content: Content


class Reader(ABC):
    """One file. key: the field of the content, None = the first of KEYS that a document has."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "line"

    def __init__(self, path: Path, key: str | None, sample_by: SampleBy) -> None:
        self.path, self.key, self.sample_by = path, key, sample_by

    @abstractmethod
    def documents(self, start: int = 0) -> Iterator[Raw]:
        """The documents from that place on. Raises FormatError naming file and line, OSError."""

    def where(self, number: int) -> str:
        """A document's name in errors."""
        return f"{self.path}, {self.unit} {number}"

    def _content(self, row: object, number: int) -> Content:
        if isinstance(row, str):
            return row
        if not is_mapping(row):
            raise FormatError(f"{self.where(number)}: expected an object with a text, found {type(row).__name__}")
        keys = [key for key in ((self.key,) if self.key else KEYS) if row.get(key) is not None]
        if not keys:
            found = ", ".join(map(str, list(row)[:20])) or "none"
            wanted = repr(self.key) if self.key else " or ".join(KEYS)
            raise FormatError(f"{self.where(number)}: no field {wanted} with a content (key=, --key); fields: {found}")
        return self._checked(row[keys[0]], keys[0], number)

    def _checked(self, value: object, key: str, number: int) -> Content:
        if isinstance(value, str):
            return value
        if is_list(value) and all(is_integer(item) for item in value):
            return [int(item) for item in value]
        if is_list(value) and all(is_mapping(item) for item in value):
            return self._messages(value, number)
        raise FormatError(
            f"{self.where(number)}: {key!r:.80} is {type(value).__name__}; expected a text, a list of token ids, or a "
            "list of chat messages"
        )

    def _messages(self, messages: list[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
        """Messages with the media's paths, which are relative to the corpus file, made absolute."""
        try:
            found: list[Mapping[str, Any]] = canonical(messages)
        except ValueError as error:
            raise FormatError(f"{self.where(number)}: {error}") from None
        return [_with_paths(message, self.path.parent) for message in found]


def _with_paths(message: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    content = message.get("content")
    if not is_list(content):
        return message
    return {**message, "content": [_with_path(part, folder) for part in content]}


def _with_path(part: Any, folder: Path) -> Any:
    kind = part.get("type") if is_mapping(part) else None
    source = part[kind] if kind in MEDIA_TYPES and kind in part else None
    return {**part, kind: os.path.join(folder, source)} if isinstance(source, str) and "://" not in source else part


def media_files(content: Content) -> list[str]:
    """Paths of the media in a document's messages."""
    if isinstance(content, str):
        return []
    parts = [
        part
        for message in content
        if is_mapping(message)
        for part in (message["content"] if is_list(message.get("content")) else ())
        if is_mapping(part) and part.get("type") in MEDIA_TYPES
    ]
    sources = [part.get(part["type"]) for part in parts]
    return [source for source in sources if isinstance(source, str)]


class _Lines(Reader):
    """Text files. A place is a byte offset."""

    def _lines(self, start: int) -> Iterator[tuple[int, int, str]]:
        """(offset, number, line) of every line, its end included."""
        with open(open_regular(self.path), "rb") as file:
            file.seek(start)
            number, offset = 0, start
            while line := file.readline(MAX_DOCUMENT + 1):
                number += 1
                if len(line) > MAX_DOCUMENT:
                    raise FormatError(f"{self.where(number)} is longer than {MAX_DOCUMENT >> 20} MiB")
                yield offset, number, self._decoded(line, number, "utf-8-sig" if offset == 0 else "utf-8")
                offset += len(line)

    def _decoded(self, data: bytes, number: int, encoding: str) -> str:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.where(number)} is not UTF-8: {error}") from None


class _JsonLines(_Lines):
    suffixes = (".jsonl", ".ndjson")

    def documents(self, start: int = 0) -> Iterator[Raw]:
        for offset, number, line in self._lines(start):
            if not line.isspace():
                yield Raw(offset, number, self._content(self._parsed(line, number), number))

    def _parsed(self, line: str, number: int) -> object:
        try:
            return json.loads(line)
        except RecursionError:
            raise FormatError(f"{self.where(number)}: JSON is nested too deeply") from None
        except ValueError as error:
            raise FormatError(f"{self.where(number)} is no JSON: {str(error)[:200]}") from None


class _Text(_Lines):
    suffixes = (".txt",)

    def documents(self, start: int = 0) -> Iterator[Raw]:
        if self.sample_by == "document":
            yield self._whole()
        elif self.sample_by == "line":
            for offset, number, line in self._lines(start):
                if not line.isspace():
                    yield Raw(offset, number, line.rstrip("\r\n"))
        else:
            yield from self._paragraphs(start)

    def _paragraphs(self, start: int) -> Iterator[Raw]:
        """Lines up to the next blank one; the line ends inside stay."""
        lines: list[tuple[int, int, str]] = []
        length = 0
        for one in chain(self._lines(start), [(0, 0, "\n")]):
            if not one[2].isspace():
                lines.append(one)
                length += len(one[2])
                if length > MAX_DOCUMENT:
                    raise FormatError(f"{self.where(lines[0][1])}: a paragraph of over {MAX_DOCUMENT >> 20} MiB")
            elif lines:
                yield Raw(*lines[0][:2], "".join(line for *_, line in lines).rstrip("\r\n"))
                lines, length = [], 0

    def _whole(self) -> Raw:
        with open(open_regular(self.path), "rb") as file:
            data = file.read(MAX_DOCUMENT + 1)
        if len(data) > MAX_DOCUMENT:
            raise FormatError(f"{self.path} is longer than {MAX_DOCUMENT >> 20} MiB: sample_by='paragraph' or 'line'")
        return Raw(0, 1, self._decoded(data, 1, "utf-8-sig"))


class _Table(Reader):
    """Columns. A place is a row. Needs pyarrow: pip install "gemma4[harvest]"."""

    unit = "row"

    def documents(self, start: int = 0) -> Iterator[Raw]:
        with open(open_regular(self.path), "rb") as file:
            try:
                yield from self._rows(file, start)
            except _arrow_errors() as error:
                raise FormatError(f"{self.path} is damaged, or another format: {_words(error)}") from None

    def _rows(self, file: IO[bytes], start: int) -> Iterator[Raw]:
        first = 0
        for batch in self._batches(file, start):
            for begin in range(max(0, start - first), batch.num_rows, _ROWS):
                part = batch.slice(begin, _ROWS)
                for row, values in enumerate(part.to_pylist(), first + begin):
                    yield Raw(row, row + 1, self._content(values, row + 1))
            first += batch.num_rows

    @abstractmethod
    def _batches(self, file: IO[bytes], start: int) -> Iterator[Any]:
        """Record batches from row 0 on, with the columns needed alone; those before `start` may be empty of columns."""

    def _columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read: the one asked for, else those of KEYS that there are."""
        found = [name for name in ((self.key,) if self.key else KEYS) if name in names]
        if not found:
            wanted = repr(self.key) if self.key else " or ".join(KEYS)
            raise FormatError(
                f"{self.path} has no column {wanted} (key=, --key); columns: {', '.join(names) or 'none'}"
            )
        return found


class _Parquet(_Table):
    suffixes = (".parquet",)

    def _batches(self, file: IO[bytes], start: int) -> Iterator[Any]:
        parquet = require("pyarrow.parquet")
        table = parquet.ParquetFile(file)
        columns = self._columns(table.schema_arrow.names)
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if n_rows <= start:  # before the place: skipped unread
                start -= n_rows
                yield _Skipped(n_rows)
                continue
            start = 0
            yield from table.iter_batches(1024, row_groups=[group], columns=columns)


class _Arrow(_Table):
    """Arrow's file format (Feather) and stream format, the one of Hugging Face datasets."""

    suffixes = (".arrow", ".feather", ".ipc")

    def _batches(self, file: IO[bytes], start: int) -> Iterator[Any]:
        ipc = require("pyarrow.ipc")
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            table = ipc.open_file(file)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            table = batches = ipc.open_stream(file)
        columns = self._columns(table.schema.names)
        for batch in batches:
            yield batch.select(columns)


class _Skipped(NamedTuple):
    """A batch that is not read."""

    num_rows: int


class _MediaFile(Reader):
    """A picture, recording or video: one document, a user's message with nothing else."""

    suffixes = tuple(suffix for suffixes in _MEDIA.values() for suffix in suffixes)

    def documents(self, start: int = 0) -> Iterator[Raw]:
        [kind] = [kind for kind, suffixes in _MEDIA.items() if self.path.suffix.lower() in suffixes]
        yield Raw(0, 1, [{"role": "user", "content": [{"type": kind, kind: os.fspath(self.path)}]}])

    def where(self, number: int) -> str:
        return str(self.path)


_READERS: tuple[type[Reader], ...] = (_JsonLines, _Text, _Parquet, _Arrow, _MediaFile)
SUFFIXES = {suffix: reader for reader in _READERS for suffix in reader.suffixes}


def reader_of(path: Path, key: str | None, sample_by: SampleBy) -> Reader:
    """Raises ValueError for a suffix that no reader has."""
    reader = SUFFIXES.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path}: a corpus is files of {' '.join(SUFFIXES)}, not {path.suffix or 'without a suffix'!r}"
        )
    return reader(path, key, sample_by)


def _arrow_errors() -> tuple[type[Exception], ...]:
    lib = require("pyarrow.lib")
    return (lib.ArrowException, OSError)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
