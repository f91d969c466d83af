# SPDX-License-Identifier: Apache-2.0
"""Documents to sequences of tokens, of at most the context's length, and sequences to batches. Nothing is padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.harvest.corpus import Corpus, Document, Reading, Slice
from gemma4.harvest.readers import Content
from gemma4.inputs import as_tokenized, is_messages
from gemma4.media.prompt import TokenizedPrompt
from gemma4.model import Model

I32: TypeAlias = NDArray[np.int32]

TOKEN_TYPES = {"text": 0, "image": 1, "video": 2, "audio": 3}
_BATCH_TOKENS = 2048  # the engine's rate grows no more beyond


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One sequence. start: where in its document's tokens it begins; a BOS that is put before it does not count."""

    prompt: TokenizedPrompt
    document: int
    start: int

    def __len__(self) -> int:
        return len(self.prompt)

    def token_types(self) -> NDArray[np.uint8]:
        """uint8 [pos], of TOKEN_TYPES."""
        types = np.zeros(len(self), np.uint8)
        for run in self.prompt.runs:
            types[run.start : run.stop] = TOKEN_TYPES[run.medium.kind]
        return types


@dataclass(frozen=True, slots=True)
class Limit:
    """The end of a corpus that is not read whole: only that many tokens of that document, none of later ones."""

    document: int
    tokens: int

    def documents_of(self, part: Slice) -> int:
        """How many documents of a slice come before the end."""
        return min(max(self.document + (self.tokens > 0) - part.first, 0), part.count)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A document that was left out. reason: names files as the corpus does, on every machine the same."""

    document: int
    reason: str


@dataclass(frozen=True, slots=True)
class Cutter:
    """How documents become sequences.

    context: tokens of a sequence at most · image_tokens: budget of a picture · skip_damaged: leave out documents that
    cannot be read instead of raising
    """

    context: int
    image_tokens: int
    skip_damaged: bool = False

    def pieces(
        self, model: Model, reading: Reading, part: Slice, limit: Limit | None, skipped: list[Skipped]
    ) -> Iterator[Piece]:
        """The sequences of a slice; documents without any are added to `skipped` if they are damaged.

        Raises ValueError naming file and line (also as FormatError), what media raise, MemoryError.
        """
        for document in reading.documents(part):
            if limit is None or document.number < limit.document:
                yield from self._of_document(model, document, skipped)
            elif document.number == limit.document:
                yield from first_tokens(self._of_document(model, document, skipped), limit.tokens)

    def limit(self, model: Model, corpus: Corpus, parts: Iterable[Slice], max_tokens: int) -> Limit | None:
        """Where a corpus is cut to have at most that many tokens; None if it has no more."""
        left = max_tokens
        with closing(Reading(corpus)) as reading:
            for part in parts:
                for document in reading.documents(part):
                    n_tokens = sum(map(len, self._of_document(model, document, [])))
                    if n_tokens > left:
                        return Limit(document.number, left)
                    left -= n_tokens
        return None

    def _of_document(self, model: Model, document: Document, skipped: list[Skipped]) -> Sequence[Piece]:
        content = document.content
        if isinstance(content, FormatError):
            if not self.skip_damaged:
                raise content
            skipped.append(Skipped(document.number, document.in_corpus(str(content))))
            return ()
        try:
            return self._cut(model, document.number, content)
        except (ValueError, NotImplementedError, OSError) as error:
            if self.skip_damaged and not isinstance(error, NotImplementedError):
                skipped.append(Skipped(document.number, document.in_corpus(f"{document.where}: {_why(error)}")))
                return ()
            if isinstance(error, OSError):
                raise type(error)(error.errno, f"{document.where}: {error.strerror}", error.filename) from error
            raise type(error)(f"{document.where}: {error}") from error

    def _cut(self, model: Model, number: int, content: Content) -> Sequence[Piece]:
        prompt = self._tokenized(model, content)
        if len(prompt) <= self.context:
            return (Piece(prompt, number, 0),) if _has_content(model, prompt) else ()
        if prompt.runs:
            raise ValueError(
                f"its {len(prompt)} tokens, some of them of media, are more than the context of {self.context} "
                "(context=, --context), and sequences with media are not cut"
            )
        n_bos = int(_begins(model, prompt.ids))
        bos, body, step = prompt.ids[:n_bos], prompt.ids[n_bos:], self.context - n_bos
        return [
            Piece(TokenizedPrompt(np.concatenate([bos, body[i : i + step]])), number, i + n_bos if i else 0)
            for i in range(0, len(body), step)
        ]

    def _tokenized(self, model: Model, content: Content) -> TokenizedPrompt:
        if isinstance(content, str):
            return TokenizedPrompt(model.to_tokens(content, bos=model.tokenizer.bos_id is not None))
        if is_messages(content):
            return model.to_prompt(content, image_tokens=self.image_tokens)
        try:
            ids = np.array(content, np.int64)
        except OverflowError:
            raise ValueError(f"a token id is out of range: the vocabulary has {model.n_token_ids} tokens") from None
        return as_tokenized(model, ids) if len(ids) else TokenizedPrompt(ids.astype(np.int32))


def _why(error: Exception) -> str:
    """The message; of the system's errors without number and quotes, which depend on the path."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error)


def first_tokens(pieces: Iterable[Piece], n_tokens: int) -> Iterator[Piece]:
    """The first n tokens of some sequences; one with media is left out rather than cut."""
    left = n_tokens
    for piece in pieces:
        if len(piece) <= left:
            yield piece
        elif left and not piece.prompt.runs:
            yield Piece(TokenizedPrompt(piece.prompt.ids[:left]), piece.document, piece.start)
        left -= len(piece)
        if left <= 0:
            return


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Sequences to run in one step: the same for any number of workers."""
    batch: list[Piece] = []
    n_tokens = 0
    for piece in pieces:
        if batch and n_tokens + len(piece) > _BATCH_TOKENS:
            yield batch
            batch, n_tokens = [], 0
        batch.append(piece)
        n_tokens += len(piece)
    if batch:
        yield batch


def _begins(model: Model, ids: I32) -> bool:
    """Whether the first token is BOS, which each sequence of a document then begins with."""
    bos = model.tokenizer.bos_id if model.checkpoint.tokenizer_path is not None else None
    return bos is not None and int(ids[0]) == bos


def _has_content(model: Model, prompt: TokenizedPrompt) -> bool:
    """False for an empty document, alone or after BOS."""
    return len(prompt) > int(len(prompt) > 0 and _begins(model, prompt.ids))
