# SPDX-License-Identifier: Apache-2.0
"""The interface of every kind of checkpoint."""

from __future__ import annotations

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError, StateError
from gemma4.load.config import EARLIER, TextConfig
from gemma4.load.dtypes import ENGINE_DTYPES, alignment, is_quantised
from gemma4.load.encoder_config import EncoderConfig, Modality
from gemma4.load.mapped import MappedFile, TensorInfo
from gemma4.load.names import PLE_TABLE

if TYPE_CHECKING:
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]  # files opened, files in all, name of the file
EngineTensor = tuple[str, tuple[int, ...], Any, int]  # dtype, shape, buffer, byte offset

TEXT_ALONE = "; of models before Gemma 4 the text model alone is supported"  # an `encoder_advice`
_FIRST_NORM = "layers.0.input_layernorm.weight"  # every model has it, in files of any naming
_NORM = re.compile(r"[\w.]*(_norm|_layernorm)\.weight")
_RANDOM_FROM = 64 << 20  # bytes: smaller per-layer tables may stay in memory


class Checkpoint(ABC):
    """An opened checkpoint. Made by `open_checkpoint`; a context manager; `close()` releases the files.

    path               the directory or file it was opened from
    config             TextConfig of the text decoder; `engine_config` is its form for `_engine.Model`
    engine_tensors     name without prefix -> (dtype, shape, buffer, offset), exactly what `_engine.Model` needs
    tensors            every tensor of the files under its stored name, towers included: read-only zero-copy arrays
                       (quantised ones as uint8 [..., bytes per row])
    ignored            stored names that no part of the text decoder uses (dead k/v of shared layers, towers, copies)
    hf_config          the configuration as stored: config.json, or a GGUF file's metadata
    generation_config  defaults for generating, under transformers' names; {} if the checkpoint has none
    processor_config   how images and sounds are prepared, as transformers stores it; {} if the checkpoint does not say
    tokenizer_path     the file that holds the tokenizer, None if there is none
    notes              remarks for the user on how the weights were read, a line each
    mmproj_path        the file that holds the encoders of a GGUF model, None if there is none
    encoder_advice     advice for messages on a missing image or audio encoder; "" if there is none
    """

    path: Path
    config: TextConfig
    engine_tensors: dict[str, EngineTensor]
    ignored: tuple[str, ...]
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_path: Path | None

    processor_config: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    mmproj_path: Path | None = None
    encoder_advice = ""

    def __init__(
        self,
        path: Path,
        config: TextConfig,
        files: Sequence[MappedFile],
        source: Mapping[str, str],
        made: Mapping[str, EngineTensor] = MappingProxyType({}),
        made_from: Collection[str] = (),
    ) -> None:
        """source: engine name -> stored name of every tensor that the engine needs · made: tensors converted from
        another form · made_from: the stored names that they were made of."""
        self.path, self.config = path, config
        self._files = tuple(files)
        self._closed = False
        self._owner = {name: file for file in files for name in file.tensors}
        self.tensors: Mapping[str, NDArray[Any]] = TensorMap(self._owner)
        self.engine_tensors = dict(made)
        for name, stored in source.items():
            self.engine_tensors[name] = self._engine_tensor(stored)
        n_copied = sum(not _is_aligned(self._owner[stored].tensors[stored]) for stored in source.values())
        copied = f"{n_copied} tensors do not lie aligned in their files and were copied into memory"
        self._copy_notes = (copied,) if n_copied else ()
        used = {*source.values(), *made_from}
        self.ignored = tuple(name for name in self._owner if name not in used)
        _check_left_out(path, config, self.ignored, source)
        dtypes = {name: dtype for name, (dtype, *_) in self.engine_tensors.items()}
        self.engine_config = config.engine(dtypes["embed_tokens.weight"], dtypes.get(PLE_TABLE, "F32"))
        self.engine_config["ple_on_disk"] = self._keep_on_disk(source.get(PLE_TABLE))

    def _engine_tensor(self, stored: str) -> EngineTensor:
        file = self._owner[stored]
        info = file.tensors[stored]
        check_dtype(file, info)
        if _is_aligned(info):
            return info.dtype, info.shape, file.view, info.offset
        copy = np.frombuffer(memoryview(file.view), np.uint8, info.nbytes, info.offset).copy()
        file.check()
        return info.dtype, info.shape, copy, 0

    def _keep_on_disk(self, table: str | None) -> bool:
        """Whether the per-layer table is so large that its rows should be read one by one and else stay on disk."""
        if table is None:
            return False
        info = self._owner[table].tensors[table]
        if info.nbytes < _RANDOM_FROM or not _is_aligned(info):
            return False
        self._owner[table].advise_random(table)
        return True

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, made anew. Raises StateError if the checkpoint has none, FormatError if it is damaged."""

    @abstractmethod
    def load_chat_template(self) -> ChatTemplate | None:
        """The chat template, None if there is none. Raises FormatError if it is damaged."""

    @property
    def encoders(self) -> Mapping[Modality, EncoderConfig]:
        """Configurations of the image and audio encoders, by modality; {} if it has none."""
        return {}

    def encoder_tensors(self, modality: Modality) -> dict[str, EngineTensor]:
        """The arguments of `_engine.Encoder`, for one of `encoders`. Raises StateError if the files do not hold it."""
        raise StateError(f"{self.path} holds no {modality} encoder")

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The mapped weight files, in order."""
        return self._files

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that the model is read from, which no output may replace."""
        return tuple(file.path for file in self._files)

    @property
    def total_bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.nbytes for file in self._files)

    @property
    def n_parameters(self) -> int:
        """Numbers the text decoder uses (a tied head counts once)."""
        return sum(math.prod(shape) for _, shape, _, _ in self.engine_tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Stored dtype -> numbers of the text decoder in it."""
        out: dict[str, int] = {}
        for dtype, shape, _, _ in self.engine_tensors.values():
            out[dtype] = out.get(dtype, 0) + math.prod(shape)
        return out

    @property
    def quantised(self) -> bool:
        """Whether any tensor of the text decoder is stored in blocks that have to be unpacked."""
        return any(is_quantised(dtype) for dtype, *_ in self.engine_tensors.values())

    def check(self) -> None:
        """Raise FormatError if a weight file shrank or changed since it was opened, StateError if closed.

        Call it before the engine reads the weights; other readers use `reading`.
        """
        if self._closed:
            raise StateError(f"the checkpoint {self.path} is closed; open it again")
        for file in self._files:
            file.check()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """`with checkpoint.reading():` around code that reads the weights: `check` before and after, so that values of
        a changed file are never used. Files of a closed checkpoint are not checked: its arrays stay valid.
        """
        if not self._closed:
            self.check()
        yield
        if not self._closed:
            self.check()

    def close(self) -> None:
        """Release the files. Arrays and engine models made from them stay valid while they exist."""
        self._closed = True
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path} {self.config.model_type}, {self.n_parameters:,} text parameters>"


def _check_left_out(path: Path, config: TextConfig, ignored: Collection[str], source: Mapping[str, str]) -> None:
    """Raise FormatError if the files hold more layers than the configuration says, or norms that an earlier model of
    this type lacks: without them every result would be wrong. Shared layers of Gemma 4 have unused norms of keys."""
    layers = source.get(_FIRST_NORM, "").rpartition(".0.")[0] + "."
    for name in ignored:
        found = re.match(r"(\d{1,9})\.(.+)", name.removeprefix(layers)) if name.startswith(layers) else None
        if found is None:
            continue
        if int(found[1]) >= config.n_layers:
            raise FormatError(
                f"{path}: the configuration says {config.n_layers} layers, but the files hold {name!r:.120}: "
                "take the configuration that belongs to these weights"
            )
        if config.model_type in EARLIER and _NORM.fullmatch(found[2]):
            raise FormatError(
                f"{path}: the configuration says {config.model_type}, which has no {found[2]!r:.80}, but the files do: "
                "take the configuration that belongs to these weights"
            )


def _is_aligned(info: TensorInfo) -> bool:
    """Whether the engine can read a tensor in place; mappings begin at a page."""
    return info.offset % alignment(info.dtype) == 0


class TensorMap(Mapping[str, "NDArray[Any]"]):
    """Stored name -> read-only array over the mapped file, made on access, when the file is checked. Values read
    from an array after its file shrank are zeros: `Checkpoint.check` detects it."""

    def __init__(self, owner: Mapping[str, MappedFile]) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> NDArray[Any]:
        self._owner[name].check()
        return self._owner[name].array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def no_double_tensors(files: Sequence[MappedFile]) -> None:
    """Raise FormatError if a name is in two of the files."""
    owner: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in owner:
                raise FormatError(f"tensor {name!r:.120} is in both {owner[name].name} and {file.path.name}")
            owner[name] = file.path


def check_shape(file: MappedFile, name: str, shape: tuple[int, ...]) -> None:
    """Raise FormatError if a stored tensor does not have the shape of the configuration."""
    found = file.tensors[name].shape
    if found != shape:
        raise FormatError(f"{file.path.name}: {name} has shape {list(found)}, the config asks for {list(shape)}")


def check_dtype(file: MappedFile, info: TensorInfo) -> None:
    """Raise NotImplementedError if a tensor is of a type that the engine does not compute with."""
    if info.dtype not in ENGINE_DTYPES:
        known = ", ".join(ENGINE_DTYPES)
        raise NotImplementedError(f"{file.path.name}: {info.name} is {info.dtype}; the engine reads {known}")
