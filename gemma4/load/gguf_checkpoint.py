# SPDX-License-Identifier: Apache-2.0
"""A GGUF file, whole or split, with or without its encoders' file, as a `Checkpoint` the engine can run from."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma4.errors import FormatError, StateError
from gemma4.load import cache, gguf_tokenizer
from gemma4.load.checkpoint import TEXT_ALONE, Checkpoint, EngineTensor, Progress, check_shape, no_double_tensors
from gemma4.load.config import EARLIER, TextConfig
from gemma4.load.encoder_config import EncoderConfig, Modality
from gemma4.load.fields import is_unset
from gemma4.load.gguf import GgufArray, GgufFile
from gemma4.load.gguf_config import ROPE_FREQS, parse_metadata, stored_name, wanted_tensors
from gemma4.load.mmproj import Mmproj, find_mmproj

if TYPE_CHECKING:
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_SHOWN = 4096  # elements of an array that hf_config shows
_ONE = struct.pack("<f", 1.0)
# end a turn in the chat formats of Gemma 4, Gemma 2 and 3, and FunctionGemma; files name <eos> alone
TURN_ENDS = ("<turn|>", "<|tool_response>", "<end_of_turn>", "<start_function_response>")
# names of tokenizer_config.json and generation_config.json -> ends of the metadata's keys
TOKEN_KEYS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
SAMPLING_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class GgufCheckpoint(Checkpoint):
    """One or more GGUF files; the first holds the metadata, and `mmproj`, if there is one, the encoders. `hf_config`
    leaves out arrays of over 4096 elements; `metadata` is the file's own, arrays as `GgufArray`."""

    encoder_advice = "; llama.cpp keeps encoders in a file of their own: give it as mmproj= (--mmproj)"

    def __init__(self, path: Path, files: list[GgufFile], mmproj: Path | None = None) -> None:
        """mmproj: None = the only mmproj*.gguf beside the model, if there is one that fits (`notes` say so)."""
        self.metadata = files[0].metadata
        self.hf_config = {key: _shown(value) for key, value in self.metadata.items()}
        self.generation_config = _generation_config(self.metadata)
        self.tokenizer_path = files[0].path if gguf_tokenizer.has_tokenizer(self.metadata) else None
        config = _config(self.hf_config, self.generation_config, files)
        if config.model_type in EARLIER:
            self.encoder_advice = TEXT_ALONE
        self.generation_config |= _suppressed(self.metadata, config.d_vocab, str(path))
        sources = _sources(config, files)
        self._mmproj, self._notes = _open_mmproj(path, config, mmproj)
        self.mmproj_path = self._mmproj.file.path if self._mmproj else None
        try:
            super().__init__(path, config, [*files, *([self._mmproj.file] if self._mmproj else [])], sources)
        except BaseException:
            if self._mmproj:
                self._mmproj.file.close()
            raise
        for layer in range(config.n_layers if config.layer_scalar else 0):  # files of older converters have none
            self.engine_tensors.setdefault(f"layers.{layer}.layer_scalar", ("F32", (1,), _ONE, 0))

    @cached_property
    def notes(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # made at first use
        """The notes of any checkpoint, and the count of duplicate tokens."""
        with self.reading():
            n_same = gguf_tokenizer.count_same_tokens(self.metadata)
        twice = f"{n_same} tokens of the vocabulary repeat others: these encode, all decode"
        return self._notes + self._copy_notes + ((twice,) if n_same else ())

    @property
    def encoders(self) -> Mapping[Modality, EncoderConfig]:
        return self._mmproj.encoders if self._mmproj else {}

    def encoder_tensors(self, modality: Modality) -> dict[str, EngineTensor]:
        return self._mmproj.tensors(modality) if self._mmproj else super().encoder_tensors(modality)

    def load_tokenizer(self) -> Tokenizer:
        """Built from the metadata in seconds for a full vocabulary; the result is kept in the user's cache."""
        from gemma4.text.tokenizer import Tokenizer

        if self.tokenizer_path is None:
            raise StateError(f"{self.path} holds no tokenizer: pass token ids")
        with self.reading():
            name = f"tokenizer-{gguf_tokenizer.digest(self.metadata)}.json"
        where, cached = str(self.tokenizer_path), cache.read(name)
        if cached is not None:
            with contextlib.suppress(FormatError, NotImplementedError):  # whatever was put there: it is made again
                return Tokenizer.from_json(cached, where)
        with self.reading():
            table = gguf_tokenizer.tokenizer_table(self.metadata, where)
        tokenizer = Tokenizer.from_table(table, where)
        cache.write(name, json.dumps(table, ensure_ascii=False))
        return tokenizer

    def load_chat_template(self) -> ChatTemplate | None:
        from gemma4.text.chat import ChatTemplate, is_blank

        source = self.metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        if not isinstance(source, str):
            raise FormatError(f"{self.path}: tokenizer.chat_template is no string")
        with self.reading():
            return None if is_blank(source) else ChatTemplate(source, self._special_tokens)

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        ids = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_KEYS.items()}
        if not isinstance(tokens, GgufArray):
            return {}
        texts = {name: tokens.item(i) for name, i in ids.items() if isinstance(i, int)}
        return {name: text for name, text in texts.items() if text is not None}


def open_gguf(path: Path, *, mmproj: Path | None = None, progress: Progress | None = None) -> GgufCheckpoint:
    """Open a GGUF file, or all parts of a split one by the name of any, and its encoders' file.

    Raises FileNotFoundError (a part is missing: named), FormatError, NotImplementedError (see `open_checkpoint`).
    """
    files = [GgufFile(path)]
    try:
        paths = _parts(files[0])
        if len(paths) > 1:
            files.pop().close()
            for done, part in enumerate(paths):
                if progress:
                    progress(done, len(paths), part.name)
                files.append(_open_part(part, done, len(paths)))
            _check_parts(files)
        checkpoint = GgufCheckpoint(path, files, mmproj)
    except BaseException:
        for file in files:
            file.close()
        raise
    if progress:
        progress(len(paths), len(paths), "")
    return checkpoint


def _open_mmproj(model: Path, config: TextConfig, given: Path | None) -> tuple[Mmproj | None, tuple[str, ...]]:
    """The encoders, and notes on them. An unnamed file that does not fit does not prevent loading the text model."""
    if given is not None:
        return (opened := Mmproj(given, config)), (_note(opened, ""),)
    found, note = find_mmproj(model)
    if found is None:
        return None, ((note,) if note else ())
    try:
        return (opened := Mmproj(found, config)), (_note(opened, ", found beside the model"),)
    except (ValueError, NotImplementedError, OSError) as error:
        return None, (f"{found.name}, found beside the model, is not used: {error}",)


def _note(mmproj: Mmproj, how: str) -> str:
    return f"{' and '.join(mmproj.encoders)} encoder{'s' * (len(mmproj.encoders) > 1)} of {mmproj.file.path}{how}"


def _parts(file: GgufFile) -> list[Path]:
    """The paths of all parts, in order."""
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= 99_999:
        raise FormatError(f"{file.path}: split.count is {count!r:.60}, expected a number of files")
    if count <= 1:
        return [file.path]
    name = _PART.fullmatch(file.path.name)
    if name is None or int(name[3]) != count:
        wanted = f"-00001-of-{count:05d}.gguf"
        raise FormatError(f"{file.path} is one of {count} parts, whose names must end in {wanted} and so on")
    return [file.path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}{file.path.suffix}") for i in range(count)]


def _open_part(path: Path, number: int, count: int) -> GgufFile:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing from {path.parent}: part {number + 1} of {count}; copy it there"
        )
    file = GgufFile(path)
    found = file.metadata.get("split.no"), file.metadata.get("split.count")
    if found != (number, count):
        file.close()
        raise FormatError(f"{path} says it is part {found[0]} of {found[1]}, expected {number} of {count} (from 0)")
    return file


def _check_parts(files: list[GgufFile]) -> None:
    no_double_tensors(files)
    total = sum(len(file.tensors) for file in files)
    wanted = files[0].metadata.get("split.tensors.count", total)
    if total != wanted:
        raise FormatError(f"{files[0].path}: the parts hold {total} tensors, split.tensors.count is {wanted!r:.60}")


def _shown(value: Any) -> Any:
    """A value as plain Python; a long array as a short description."""
    if not isinstance(value, GgufArray):
        return value
    return value.values() if value.count <= _SHOWN else f"an array of {value.count}"


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Stop tokens and sampling, under the names of a generation_config.json."""
    out: dict[str, Any] = {}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if not is_unset(value):
            out[name] = value
    ends = _end_ids(metadata)
    if ends:
        out["eos_token_id"] = ends
    sampling = {name: metadata[f"general.sampling.{key}"] for key, name in SAMPLING_KEYS.items()
                if f"general.sampling.{key}" in metadata}  # fmt: skip
    return out | sampling | ({"do_sample": True} if sampling else {})


def _suppressed(metadata: Mapping[str, Any], d_vocab: int, where: str) -> dict[str, list[int]]:
    """Ids never to be generated; ids outside the vocabulary are ignored, as in llama.cpp."""
    key = "tokenizer.ggml.suppress_tokens"
    ids = metadata.get(key)
    if ids is None:
        return {}
    numbers = ids.numbers() if isinstance(ids, GgufArray) and not ids.is_strings else None
    if numbers is None or numbers.dtype.kind not in "iu":
        raise FormatError(f"{where}: {key} must be an array of token ids")
    found = np.unique(numbers[(numbers >= 0) & (numbers < d_vocab)]).tolist()
    return {"suppress_tokens": found} if found else {}


def _end_ids(metadata: Mapping[str, Any]) -> list[int]:
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
    ids = [metadata[key] for key in keys if not is_unset(metadata.get(key))]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GgufArray):
        ids += [i for i in map(tokens.index, TURN_ENDS) if i is not None]
    bad = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 1 << 31]
    if bad:
        raise FormatError(f"tokenizer.ggml.eos_token_id and its like hold {bad[0]!r:.60}, expected a token id")
    return list(dict.fromkeys(ids))


def _config(plain: Mapping[str, Any], generation: Mapping[str, Any], files: list[GgufFile]) -> TextConfig:
    owner = {name: file for file in files for name in file.tensors}
    tensors = {name: file.tensors[name] for name, file in owner.items()}
    freqs = owner[ROPE_FREQS].array(ROPE_FREQS) if ROPE_FREQS in owner else None
    return parse_metadata(plain, tensors, freqs, generation.get("eos_token_id", ()), str(files[0].path))


def _sources(config: TextConfig, files: list[GgufFile]) -> dict[str, str]:
    """Engine name -> stored name, shapes checked."""
    owner = {name: file for file in files for name in file.tensors}
    out: dict[str, str] = {}
    for name, shape in wanted_tensors(config, owner):
        stored = stored_name(name)
        file = owner.get(stored)
        if file is None:
            raise FormatError(
                f"{files[0].path}: the tensor {stored} is missing, which its {config.n_layers} layers need"
            )
        check_shape(file, stored, shape)
        out[name] = stored
    return out
