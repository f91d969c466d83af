# SPDX-License-Identifier: Apache-2.0
"""A parsed tokenizer.json, checked, and the library's tokenizer built from its parts.

The file is untrusted, and the library panics, hangs or aborts on many files that it accepts. So it never sees the file
itself: it gets the vocabulary, the merges and the added tokens of a byte-fallback BPE like Gemma's tokenizers.
Any other part in a file is a NotImplementedError that names it.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gemma4.errors import FormatError
from gemma4.memory import need_memory
from gemma4.narrow import is_dict, is_list, is_list_or_tuple

MAX_FILE = 128 << 20  # bytes; a file of 262,144 pieces has 14 to 33 MB
_MAX_ID = 1 << 24
SAME_TOKENS = "same_tokens"  # key in our own files: [id, text] of tokens whose text encodes to another id
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_WORDS = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# options of the model -> accepted values
_MODEL = {
    "type": ("BPE",),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
    "fuse_unk": (None, False, True),
    "byte_fallback": (None, False, True),
}
_DECODERS = ("Replace", "ByteFallback", "Fuse")


def read_table(text: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object of a file's bytes. Raises FormatError (not JSON, not an object, a duplicate name)."""
    with _without_collecting():  # none of half a million merges is garbage
        try:
            table = json.loads(text, object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where} is not a tokenizer this package can read: {str(error)[:200]}") from None
    if not is_dict(table):
        raise FormatError(f"{where} is not a tokenizer this package can read: it is no JSON object")
    return table


def make_backend(table: Mapping[str, object], where: str) -> tuple[Backend, dict[int, str]]:
    """The library's tokenizer of a parsed file, and the texts of ids whose text encodes to another id.

    Raises FormatError (a part is missing, damaged or contradicts another), NotImplementedError (a part absent from
    Gemma's tokenizers), MemoryError.
    """
    parts = _Parts(table, where)
    with _without_collecting():
        vocab, merges, added = parts.vocab(), parts.merges(), parts.added()
        need_memory(512 * (len(vocab) + len(merges) + len(added)), "the tokenizer")
        with panics_are_errors(f"{where} is not a tokenizer this package can read"):
            backend = parts.backend(vocab, merges, added)
    return backend, parts.same_tokens(backend)


class _Parts:
    def __init__(self, table: Mapping[str, object], where: str) -> None:
        self._table, self._where = table, where
        model = table.get("model")
        if not is_dict(model):
            self._fail('"model" is no object')
        self._model: dict[str, Any] = model
        for name, allowed in _MODEL.items():
            if not any(model.get(name) is value or model.get(name) == value for value in allowed):
                self._refuse(f"model.{name}", model.get(name))
        for name in model.keys() - _MODEL.keys() - {"vocab", "merges", "unk_token"}:
            self._refuse(f"model.{name}", model[name])
        self._check_steps()

    def _fail(self, what: str) -> NoReturn:
        raise FormatError(f"{self._where} is not a tokenizer this package can read: {what}")

    def _refuse(self, name: str, found: Any) -> NoReturn:
        raise NotImplementedError(
            f"{self._where}: {name} is {found!r:.160}, which no tokenizer of Gemma has; it cannot be read"
        )

    def _check_steps(self) -> None:
        for name, plain in (("normalizer", SPACES), ("pre_tokenizer", _WORDS)):
            for step in steps_of(self._table.get(name), name + "s"):
                if step != plain:
                    self._refuse(name, step)
        for step in steps_of(self._table.get("decoder"), "decoders"):  # our decoder does the same
            if not is_dict(step) or step.get("type") not in _DECODERS:
                self._refuse("decoder", step)
        found = self._table.get("post_processor")  # never used: <bos> is added by `Tokenizer.encode`
        if found is not None and not (is_dict(found) and found.get("type") == "TemplateProcessing"):
            self._refuse("post_processor", found)

    def vocab(self) -> dict[str, int]:
        vocab = self._model.get("vocab")
        if not is_dict(vocab) or not vocab:
            self._fail("its vocabulary is empty, or no object")
        if not all(type(i) is int and 0 <= i < _MAX_ID for i in vocab.values()):
            self._fail(f"token ids must be integers in 0..{_MAX_ID - 1}")
        if len(set(vocab.values())) != len(vocab):
            self._fail(f"{len(vocab) - len(set(vocab.values()))} tokens have the id of another; ids must be different")
        unknown = self._model.get("unk_token")
        if unknown is not None and not (isinstance(unknown, str) and unknown in vocab):
            self._fail(f"unk_token {str(unknown)[:80]!r} is not in the vocabulary")
        return vocab

    def merges(self) -> list[tuple[str, str]]:
        """The library checks that they are tokens."""
        merges = self._model.get("merges")
        if not is_list(merges):
            self._fail('"merges" is no list')
        pairs: list[Any] = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
        if not all(
            is_list_or_tuple(pair) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str)
            for pair in pairs
        ):
            self._fail("a merge is not of two pieces")
        return [(left, right) for left, right in pairs]

    def added(self) -> list[dict[str, Any]]:
        tokens: Any = self._table.get("added_tokens") or list[Any]()
        if not is_list(tokens) or not all(map(_is_added_token, tokens)):
            self._fail("added_tokens must be objects with an id, content and flags")
        vocab = self._model["vocab"]
        own = {token["id"]: token["content"] for token in tokens}
        if len(own) != len(tokens) or len(set(own.values())) != len(tokens):
            self._fail("two added tokens have one id or one spelling; they must be different")
        spelled = {i: text for text, i in vocab.items() if i in own}
        for i, text in own.items():
            if spelled.get(i, text) != text:
                self._fail(f"the added token {text[:80]!r} has the id {i} of another; ids must be different")
        return sorted(tokens, key=lambda token: token["id"])

    def backend(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: list[dict[str, Any]]) -> Backend:
        unknown = self._model.get("unk_token")
        fuse, fallback = bool(self._model.get("fuse_unk")), bool(self._model.get("byte_fallback"))
        backend = Backend(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=fuse, byte_fallback=fallback))
        if steps_of(self._table.get("normalizer"), "normalizers"):
            backend.normalizer = normalizers.Replace(" ", "▁")
        if steps_of(self._table.get("pre_tokenizer"), "pre_tokenizers"):
            backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokens = [AddedToken(t["content"], **{flag: t.get(flag, False) for flag in _FLAGS}) for t in added]
        backend.add_tokens(tokens)  # pyright: ignore[reportUnknownMemberType]  # its stub says List alone
        for token in added:
            if backend.token_to_id(token["content"]) != vocab.get(token["content"], token["id"]):  # as in transformers
                self._fail(f"the id {token['id']} of {token['content'][:80]!r} leaves a gap after the vocabulary")
        return backend

    def same_tokens(self, backend: Backend) -> dict[int, str]:
        pairs: Any = self._table.get(SAME_TOKENS) or list[Any]()
        if not is_list(pairs) or not all(map(_is_same_token, pairs)):
            self._fail(f"{SAME_TOKENS} must be pairs of an id and a text")
        same: dict[int, str] = dict(pairs)
        if not all(
            backend.id_to_token(i) is None and backend.token_to_id(text) is not None for i, text in same.items()
        ):
            self._fail(f"{SAME_TOKENS} holds ids that have a text of their own")
        return same


def steps_of(part: Any, inner: str) -> list[Any]:
    """The steps of a normalizer or similar part, in order."""
    if part is None:
        return []
    steps: Any = part.get(inner) if is_dict(part) and part.get("type") == "Sequence" else [part]
    return steps if is_list(steps) else [part]


def _is_added_token(token: Any) -> bool:
    return (
        is_dict(token)
        and type(token.get("id")) is int
        and 0 <= token["id"] < _MAX_ID
        and isinstance(token.get("content"), str)
        and token["content"] != ""
        and all(isinstance(token.get(flag, False), bool) for flag in _FLAGS)
    )


def _is_same_token(pair: Any) -> bool:
    if not is_list(pair) or len(pair) != 2:
        return False
    return type(pair[0]) is int and 0 <= pair[0] < _MAX_ID and isinstance(pair[1], str)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names: set[str] = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))
        raise ValueError(f"{twice[:80]!r} is there twice")
    return table


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def panics_are_errors(what: str) -> Iterator[None]:
    """Raise the library's errors, plain Exceptions and panics (which are not Exceptions), as FormatError."""
    try:
        yield
    except (FormatError, NotImplementedError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise FormatError(f"{what}: {str(error)[:300]}") from None
        raise


def texts_overlap(text: str, others: Iterable[str]) -> bool:
    """Whether some text could hold `text` and one of `others` at overlapping places."""
    return any(text in b or b in text or _meet(text, b) or _meet(b, text) for b in others if b != text)


def _meet(a: str, b: str) -> bool:
    return any(a.endswith(b[:n]) for n in range(1, min(len(a), len(b))))
