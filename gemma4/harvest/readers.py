# SPDX-License-Identifier: Apache-2.0
"""Files of a corpus, document by document: jsonl, txt, parquet, arrow, pictures and recordings.

Files are untrusted. A document has a content of one of three kinds: text, token ids, or chat messages.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
    number: int  # for messages: its line or row in the file, from 1 on
    content: Content | FormatError  # an error, which names file and line: others can be read


class Reader(ABC):
    """One file. key: the field of the content, None = the first of KEYS that a document has."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "line"

    def __init__(self, path: Path, key: str | None, sample_by: SampleBy) -> None:
        self.path, self.key, self.sample_by = path, key, sample_by

    @abstractmethod
    def documents(self, start: int = 0, number: int = 1) -> Iterator[Raw]:
        """The documents from that place on, which is line or row `number`. Raises FormatError (the whole file is
        damaged), OSError."""

    def close(self) -> None:  # noqa: B027  most readers keep nothing open
        """Release what is open."""

    def where(self, number: int) -> str:
        """A document's name in errors."""
        return f"{self.path}, {self.unit} {number}"

    def _content(self, row: object, number: int) -> Content | FormatError:
        try:
            return self._of_row(row, number)
        except FormatError as error:
            return error

    def _of_row(self, row: object, number: int) -> Content:
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


class _Line(NamedTuple):
    """offset: in bytes; text: its end included, or why it cannot be read."""

    offset: int
    number: int
    text: str | FormatError


class _Lines(Reader):
    """Text files. A place is a byte offset."""

    def _lines(self, start: int, number: int) -> Iterator[_Line]:
        """Every line from a place on."""
        with open(open_regular(self.path), "rb") as file:
            file.seek(start)
            offset = start
            while line := file.readline(MAX_DOCUMENT + 1):
                length = len(line)
                if length > MAX_DOCUMENT:
                    text: str | FormatError = FormatError(
                        f"{self.where(number)} is longer than {MAX_DOCUMENT >> 20} MiB"
                    )
                    while not line.endswith(b"\n") and (line := file.readline(MAX_DOCUMENT)):
                        length += len(line)
                else:
                    text = self._decoded(line, number, "utf-8-sig" if offset == 0 else "utf-8")
                yield _Line(offset, number, text)
                offset, number = offset + length, number + 1

    def _decoded(self, data: bytes, number: int, encoding: str) -> str | FormatError:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            return FormatError(f"{self.where(number)} is not UTF-8: {error}")


class _JsonLines(_Lines):
    suffixes = (".jsonl", ".ndjson")

    def documents(self, start: int = 0, number: int = 1) -> Iterator[Raw]:
        for line in self._lines(start, number):
            if isinstance(line.text, FormatError):
                yield Raw(*line)
            elif not line.text.isspace():
                yield Raw(line.offset, line.number, self._parsed(line.text, line.number))

    def _parsed(self, line: str, number: int) -> Content | FormatError:
        try:
            row = json.loads(line)
        except RecursionError:
            return FormatError(f"{self.where(number)}: JSON is nested too deeply")
        except ValueError as error:
            return FormatError(f"{self.where(number)} is no JSON: {str(error)[:200]}")
        return self._content(row, number)


class _Text(_Lines):
    suffixes = (".txt",)

    def documents(self, start: int = 0, number: int = 1) -> Iterator[Raw]:
        if self.sample_by == "document":
            yield Raw(0, 1, self._whole())
        elif self.sample_by == "line":
            for line in self._lines(start, number):
                if isinstance(line.text, FormatError):
                    yield Raw(*line)
                elif not line.text.isspace():
                    yield Raw(line.offset, line.number, line.text.rstrip("\r\n"))
        else:
            yield from self._paragraphs(start, number)

    def _paragraphs(self, start: int, number: int) -> Iterator[Raw]:
        """Lines up to the next blank one; the line ends inside stay."""
        lines: list[_Line] = []
        length = 0
        for line in chain(self._lines(start, number), [_Line(0, 0, "\n")]):
            if isinstance(line.text, str) and line.text.isspace():
                if lines:
                    yield Raw(lines[0].offset, lines[0].number, self._joined(lines, length))
                lines, length = [], 0
            else:
                length += len(line.text) if isinstance(line.text, str) else 0
                if length <= MAX_DOCUMENT or not lines:
                    lines.append(line)

    def _joined(self, lines: list[_Line], length: int) -> str | FormatError:
        """length: of the paragraph, whose lines beyond the limit are not there."""
        if length > MAX_DOCUMENT:
            return FormatError(f"{self.where(lines[0].number)}: a paragraph of over {MAX_DOCUMENT >> 20} MiB")
        texts: list[str] = []
        for line in lines:
            if isinstance(line.text, FormatError):
                return line.text
            texts.append(line.text)
        return "".join(texts).rstrip("\r\n")

    def _whole(self) -> str | FormatError:
        with open(open_regular(self.path), "rb") as file:
            data = file.read(MAX_DOCUMENT + 1)
        if len(data) > MAX_DOCUMENT:
            return FormatError(f"{self.path} is longer than {MAX_DOCUMENT >> 20} MiB: sample_by='paragraph' or 'line'")
        return self._decoded(data, 1, "utf-8-sig")


class _Stretch(NamedTuple):
    """Consecutive rows of a table, and what reads them as record batches."""

    n_rows: int
    read: Callable[[], Iterator[Any]]


class _Cursor:
    """A place in a table, which moves on only. first: the row where `batch` begins."""

    def __init__(self, stretches: Iterator[_Stretch]) -> None:
        self.first = 0
        self.batch: Any = None
        self._stretches = stretches
        self._batches: Iterator[Any] = iter(())

    def move(self, row: int) -> bool:
        """Make the batch with that row the present one; False if there is none. Stretches before it stay unread."""
        while self.batch is None or row >= self.first + self.batch.num_rows:
            self.first += 0 if self.batch is None else self.batch.num_rows
            self.batch = next(self._batches, None)
            if self.batch is None and not self._next_stretch(row):
                return False
        return True

    def _next_stretch(self, row: int) -> bool:
        for stretch in self._stretches:
            if row < self.first + stretch.n_rows:
                self._batches = stretch.read()
                return True
            self.first += stretch.n_rows
        return False


class _Table(Reader):
    """Columns. A place is a row; later ones are found from the last one on. Needs pyarrow: pip install
    "gemma4[harvest]"."""

    unit = "row"
    _file: IO[bytes] | None = None
    _cursor: _Cursor | None = None

    def documents(self, start: int = 0, number: int = 1) -> Iterator[Raw]:
        try:
            yield from self._rows(self._at(start), start)
        except _arrow_errors() as error:
            raise FormatError(f"{self.path} is damaged, or another format: {_words(error)}") from None

    def _at(self, start: int) -> _Cursor:
        if self._cursor is None or start < self._cursor.first:
            self.close()
            self._file = open(open_regular(self.path), "rb")  # noqa: SIM115  `close` closes it
            self._cursor = _Cursor(self._stretches(self._file))
        return self._cursor

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._cursor = None

    def _rows(self, cursor: _Cursor, row: int) -> Iterator[Raw]:
        while cursor.move(row):
            batch, first = cursor.batch, cursor.first
            while row < first + batch.num_rows:
                part = batch.slice(row - first, _ROWS)
                for values in self._values(part, row + 1):
                    content = values if isinstance(values, FormatError) else self._content(values, row + 1)
                    yield Raw(row, row + 1, content)
                    row += 1

    def _values(self, part: Any, number: int) -> list[object]:
        """The rows of a batch, FormatError for one that leads outside of the file or has a text that is not UTF-8."""
        try:
            part.validate(full=True)
            rows: list[object] = part.to_pylist()
            return rows
        except (require("pyarrow.lib").ArrowInvalid, UnicodeDecodeError) as error:
            if part.num_rows == 1:
                return [FormatError(f"{self.where(number)} cannot be read: {_words(error)}")]
            return [row for i in range(part.num_rows) for row in self._values(part.slice(i, 1), number + i)]

    @abstractmethod
    def _stretches(self, file: IO[bytes]) -> Iterator[_Stretch]:
        """The whole table, with the columns needed alone."""

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

    def _stretches(self, file: IO[bytes]) -> Iterator[_Stretch]:
        parquet = require("pyarrow.parquet")
        table = parquet.ParquetFile(file)
        columns = self._columns(table.schema_arrow.names)
        for group in range(table.num_row_groups):
            n_rows: int = table.metadata.row_group(group).num_rows
            yield _Stretch(n_rows, partial(table.iter_batches, 1024, row_groups=[group], columns=columns))


class _Arrow(_Table):
    """Arrow's file format (Feather) and stream format, the one of Hugging Face datasets."""

    suffixes = (".arrow", ".feather", ".ipc")

    def _stretches(self, file: IO[bytes]) -> Iterator[_Stretch]:
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
            yield _Stretch(batch.num_rows, partial(iter, [batch.select(columns)]))


class _MediaFile(Reader):
    """A picture, recording or video: one document, a user's message with nothing else."""

    suffixes = tuple(suffix for suffixes in _MEDIA.values() for suffix in suffixes)

    def documents(self, start: int = 0, number: int = 1) -> Iterator[Raw]:
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
