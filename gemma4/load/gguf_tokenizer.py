# SPDX-License-Identifier: Apache-2.0
"""The vocabulary in a GGUF file's metadata -> a tokenizer.json as Hugging Face would have it.

The keys are tokenizer.ggml.{model, tokens, token_type, merges, scores}. Gemma's is a byte-fallback BPE whose spaces are
written "▁"; files call it "gemma4", or "llama" (the name of SentencePiece vocabularies, which have scores).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from gemma4.errors import FormatError
from gemma4.load.gguf import GgufArray
from gemma4.text.tokenizer import CONTROL
from gemma4.text.tokenizer_file import SAME_TOKENS, SPACES

PREFIX = "tokenizer.ggml."
_MODELS = ("gemma4", "llama")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
NAMED = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_ARRAYS = ("tokens", "token_type", "merges", "scores")
_VERSION = b"5"  # version of the output of `tokenizer_table`
_MAX_SPLITS = 1 << 26  # characters of all ways to split tokens in two: 40 times those of 262,144 tokens


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    return f"{PREFIX}tokens" in metadata


def digest(metadata: Mapping[str, Any]) -> str:
    """64 hex digits of everything that `tokenizer_table` reads, without decoding it as text."""
    out = hashlib.sha256(_VERSION + str(metadata.get(f"{PREFIX}model")).encode())
    out.update(f"\0{_named_ids(metadata)}".encode())
    for name in _ARRAYS:
        array = metadata.get(PREFIX + name)
        out.update(f"\0{name}\0{array.count if isinstance(array, GgufArray) else None}\0".encode())
        if isinstance(array, GgufArray):
            out.update(array.raw())
    return out.hexdigest()


def _named_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that the keys for special tokens name, in the order of the keys."""
    named = sorted(key for key in metadata if key.startswith(PREFIX) and key.endswith("_token_id"))
    return [metadata[key] for key in named if type(metadata[key]) is int]


def count_same_tokens(metadata: Mapping[str, Any]) -> int:
    """Number of vocabulary entries that repeat an earlier one, as in some of Google's files."""
    tokens = metadata.get(f"{PREFIX}tokens")
    return len(tokens) - tokens.count_distinct() if isinstance(tokens, GgufArray) and tokens.is_strings else 0


def tokenizer_table(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tokenizer.json as an object. Of tokens that are spelled alike one encodes, and all decode: the one that a
    key names as special, else the first one.

    Raises FormatError (arrays that are missing, of other types or lengths, merges of unknown pieces, or a vocabulary
    without merges that would take too long), NotImplementedError (another kind of tokenizer).
    """
    model = metadata.get(f"{PREFIX}model")
    if model not in _MODELS:
        raise NotImplementedError(f"{where}: {PREFIX}model is {model!r:.80}; supported: {', '.join(_MODELS)}")
    tokens = _strings(metadata, "tokens", where)
    vocab = {tokens[i]: i for i in reversed(_named_ids(metadata)) if 0 <= i < len(tokens)}
    same = [[i, token] for i, token in enumerate(tokens) if vocab.setdefault(token, i) != i]
    kinds = _numbers(metadata, "token_type", len(tokens), where)
    scores = _numbers(metadata, "scores", len(tokens), where)
    added = [token for token in _added(tokens, kinds) if vocab[token["content"]] == token["id"]]
    if f"{PREFIX}merges" in metadata:
        merges = _merges(_strings(metadata, "merges", where), vocab, where)
    else:
        control = {token["content"] for token in added if token["special"]}  # which no plain text may become
        merges = merges_from_scores({token: i for token, i in vocab.items() if token not in control}, scores, where)
    unknown = next((tokens[i] for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    return _document(vocab, merges, added, unknown) | {SAME_TOKENS: same}


def _array(metadata: Mapping[str, Any], name: str, strings: bool, where: str) -> GgufArray:
    array = metadata.get(PREFIX + name)
    if not isinstance(array, GgufArray) or array.is_strings != strings:
        wanted = "strings" if strings else "numbers"
        raise FormatError(f"{where}: {PREFIX}{name} is {'missing' if array is None else 'no array of ' + wanted}")
    return array


def _strings(metadata: Mapping[str, Any], name: str, where: str) -> list[str]:
    return _array(metadata, name, True, where).values()


def _numbers(metadata: Mapping[str, Any], name: str, count: int, where: str) -> list[Any]:
    """One number per token; none at all if the file has none."""
    if PREFIX + name not in metadata:
        return []
    array = _array(metadata, name, False, where)
    if len(array) != count:
        raise FormatError(f"{where}: {PREFIX}{name} has {len(array)} entries for {count} tokens")
    return array.numbers().tolist()


def _merges(lines: list[str], vocab: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """ "left right" each; a piece may begin with a space, but no token of this kind of vocabulary holds one."""
    out: list[tuple[str, str]] = []
    for i, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(f"{where}: merge {i} is {line!r:.80}, which are not two tokens that make a third")
        out.append((left, right))
    return out


def merges_from_scores(vocab: Mapping[str, int], scores: list[float], where: str) -> list[tuple[str, str]]:
    """A SentencePiece vocabulary's merges: every way to make a token out of two, the best-scored tokens first."""
    if len(set(scores)) < 2:
        raise FormatError(f"{where}: the vocabulary has neither merges nor scores that tell them")
    n_splits = sum(len(token) * (len(token) - 1) for token in vocab)
    if n_splits > _MAX_SPLITS:
        longest = max(map(len, vocab))
        raise FormatError(
            f"{where}: the vocabulary has no merges, and tokens of up to {longest:,} characters: to find how they are "
            f"merged would take {n_splits:,} steps, the limit is {_MAX_SPLITS:,}"
        )
    found: list[tuple[float, int, int, str, str]] = []
    for token in vocab:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in vocab and right in vocab:
                found.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _added(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything is merged: those that the file says are, and those of the
    chat format by their spelling, as files made from an incomplete tokenizer_config.json call them ordinary."""
    kinds = kinds or [0] * len(tokens)
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            # some files call a chat format's tokens user-defined; `gemma4.text.tokenizer.Tokenizer` knows them
            "special": kind != _USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in NAMED or CONTROL.fullmatch(token)
    ]


def _document(
    vocab: dict[str, int], merges: list[tuple[str, str]], added: list[dict[str, Any]], unknown: str | None
) -> dict[str, Any]:
    if unknown is None and "<unk>" in vocab:
        unknown = "<unk>"
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": SPACES,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }
