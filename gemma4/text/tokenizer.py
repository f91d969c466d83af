# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, with the checkpoint's own tokenizer.json (the `tokenizers` library does the merging)."""

from __future__ import annotations

import codecs
import ctypes
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as _Backend

from gemma4 import checks
from gemma4.files import check_no_pointer, read_limited
from gemma4.memory import need_memory
from gemma4.narrow import is_iterable
from gemma4.text.tokenizer_file import MAX_FILE, make_backend, panics_are_errors, read_table

I32 = NDArray[np.int32]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Tokens that control the chat format, of Gemma 4 and of earlier models. Some files list a few as ordinary added tokens.
CONTROL = re.compile(r"<\|.+>|<.+\|>|<(?:start|end)_(?:of_turn|function_(?:declaration|call|response))>|<escape>")
_BYTES_PER_BYTE = 320  # bytes of memory per byte of text during encoding; at most 226 were measured


class Tokenizer:
    """A checkpoint's tokenizer. `Tokenizer.load(directory)` makes one; it can be shared between threads.

    vocab_size    number of ids the tokenizer knows (the model's table may be larger)
    bos_id, eos_id, pad_id   ids of <bos>, <eos>, <pad>; None if the vocabulary has none
    special_ids   control tokens: what `skip_special` leaves out and `parse_special=False` never produces
    """

    def __init__(self, backend: _Backend, same_tokens: Mapping[int, str] = MappingProxyType({})) -> None:
        """same_tokens: id -> text of tokens whose text encodes to another id."""
        self._backend, self._same = backend, dict(same_tokens)
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        control = {i: token for i, token in added.items() if token.special or CONTROL.fullmatch(token.content)}
        plain = [token for token in control.values() if not token.special]
        for token in plain:
            token.special = True
        backend.add_special_tokens(plain)  # pyright: ignore[reportUnknownMemberType]  # its stub says List alone
        same = {i for i, text in same_tokens.items() if backend.token_to_id(text) in control}
        self.special_ids: frozenset[int] = frozenset(control) | same
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True) + len(same_tokens)
        self.bos_id: int | None = backend.token_to_id("<bos>")
        self.eos_id: int | None = backend.token_to_id("<eos>")
        self.pad_id: int | None = backend.token_to_id("<pad>")
        # Parsing of special tokens is a switch of the shared backend, not an argument.
        self._lock = threading.Lock()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a directory that holds tokenizer.json, or from that file.

        Raises FileNotFoundError, FormatError (damaged, or over 128 MiB), NotImplementedError (it has parts that no
        tokenizer of Gemma has: the message names one), MemoryError.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"there is no tokenizer at {file}; the model can be run on token ids without one")
        data = read_limited(file, MAX_FILE)
        check_no_pointer(data, file)
        return cls.from_table(read_table(data, str(file)), str(file))

    @classmethod
    def from_json(cls, text: str, where: str = "text") -> Tokenizer:
        """From the text of a tokenizer.json; `where` names it in messages. Raises as `load`."""
        return cls.from_table(read_table(text, where), where)

    @classmethod
    def from_table(cls, table: Mapping[str, object], where: str) -> Tokenizer:
        """From a parsed tokenizer.json. Raises as `load`."""
        tokenizer = cls(*make_backend(table, where))
        _return_free_memory()
        return tokenizer

    def encode(self, text: str, *, bos: bool = True, parse_special: bool = True) -> I32:
        """int32 [pos]. With `bos` the result starts with <bos> exactly once, also where the text already does.

        parse_special=False reads "<|turn>" and the like as plain characters: use it for untrusted text.
        Raises ValueError if `bos` is requested of a vocabulary without one, or for lone surrogates in the text,
        MemoryError.
        """
        checks.text("text", text)
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: {error}") from None
        need_memory(_BYTES_PER_BYTE * n_bytes, "the tokenizer")
        with self._lock, panics_are_errors("the tokenizer failed on this text"):
            self._backend.encode_special_tokens = not parse_special
            # Without the file's post-processor: whether it adds <bos> differs between checkpoints.
            ids = self._backend.encode(text, add_special_tokens=False).ids
        return np.array(self._with_bos(ids) if bos else ids, np.int32)

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None:
            raise ValueError("this tokenizer has no <bos> token; pass bos=False")
        start = next((i for i, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [self.bos_id, *ids[start:]]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of the ids. Bytes that are not UTF-8 become U+FFFD. The pieces of `decode_stream`, joined."""
        stream = self.decode_stream(skip_special=skip_special)
        return "".join([stream.push(token) for token in _as_ids(ids)]) + stream.flush()

    def decode_stream(self, *, skip_special: bool = False) -> DecodeStream:
        """A decoder to feed one id at a time."""
        return DecodeStream(self, skip_special)

    def str_tokens(self, text_or_ids: str | Iterable[int], *, bos: bool = True) -> list[str]:
        """One string per token, as shown on an axis: spaces as spaces, a byte as "<0xE2>". A text is encoded first."""
        ids = self.encode(text_or_ids, bos=bos) if isinstance(text_or_ids, str) else text_or_ids
        return [self.id_to_piece(token).replace("▁", " ") for token in _as_ids(ids)]

    def id_to_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling, "▁" for a space. Raises ValueError for an id that is not in it."""
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        piece = self._same.get(token_id) if piece is None else piece
        if piece is None:
            raise ValueError(f"token id {token_id} is not in the tokenizer's vocabulary of {self.vocab_size}")
        return piece

    def piece_to_id(self, piece: str) -> int:
        """The id of a vocabulary entry (spelled with "▁"). Raises KeyError if there is none."""
        token = self._backend.token_to_id(piece)
        if token is None:
            raise KeyError(f"no piece {piece!r:.120} in the vocabulary; a space is written ▁")
        return token

    @property
    def fingerprint(self) -> str:
        """64 hex digits that tell tokenizers apart: a digest of everything that encoding depends on."""
        same = json.dumps(sorted(self._same.items()))
        return hashlib.sha256((self._backend.to_str() + same).encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab_size:,} pieces, {len(self.special_ids)} special>"


class DecodeStream:
    """Decodes ids one by one. A character split over byte tokens is returned when complete, never as U+FFFD before."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._had_bytes = False  # since the last flush

    def push(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is incomplete. Raises ValueError for an unknown id."""
        token_id = int(token_id)
        if token_id in self._skip:
            return self.flush()
        piece = self._tokenizer.id_to_piece(token_id)
        byte = _BYTE.fullmatch(piece) if piece.startswith("<0x") else None
        if byte:
            self._had_bytes = True
            return self._bytes.decode(bytes([int(byte[1], 16)]))
        return self.flush() + piece.replace("▁", " ")

    def flush(self) -> str:
        """The remaining text at the end: U+FFFD for an incomplete character."""
        if not self._had_bytes:
            return ""
        self._had_bytes = False
        text = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return text


def _return_free_memory() -> None:
    """Return heap memory freed after parsing: 195 of 320 MB for Gemma 4's tokenizer, which glibc would keep."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _as_ids(ids: Any) -> list[int]:
    """Token ids as a list of int. Raises ValueError for anything but integers in one row."""
    found = list(ids) if is_iterable(ids) and not isinstance(ids, str) and getattr(ids, "ndim", 1) else None
    if found is None or not all(isinstance(token, int | np.integer) for token in found):
        checks.fail("token ids", ids, "integers [pos]")
    return [int(token) for token in found]
