# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory (config.json + one or many .safetensors) as a `Checkpoint` the engine can run from.

Nothing is downloaded and no weight is copied: the engine gets views of the mapped files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from gemma4.errors import FormatError, StateError
from gemma4.load.config import TextConfig, parse_config
from gemma4.load.names import PLE_TABLE, text_prefix, text_tensors
from gemma4.load.safetensors import SafetensorsFile, TensorInfo

Progress = Callable[[int, int, str], None]  # files opened, files in all, name of the file
EngineTensor = tuple[str, tuple[int, ...], Any, int]  # dtype, shape, buffer, byte offset

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
_ENGINE_DTYPES = ("F32", "F16", "BF16")
_MAX_JSON = 64 << 20
_RANDOM_FROM = 64 << 20  # bytes: a per-layer table below this may as well stay in memory


class Checkpoint:
    """An opened checkpoint. Made by `open_checkpoint`; a context manager; `close()` lets go of the files.

    path              the directory
    config            TextConfig of the text decoder; `engine_config` is its form for `_engine.Model`
    engine_tensors    name without prefix -> (dtype, shape, buffer, offset), exactly what `_engine.Model` needs
    tensors           every tensor of the files under its stored name, towers included: read-only zero-copy arrays
    ignored           stored names that no part of the text decoder uses (dead k/v of shared layers, towers, copies)
    hf_config, generation_config   the JSON files as read ({} if there is no generation_config.json)
    tokenizer_path    tokenizer.json, or None
    """

    def __init__(self, path: Path, raw: dict[str, Any], config: TextConfig, files: list[SafetensorsFile]) -> None:
        self.path, self.hf_config, self.config = path, raw, config
        self._files = files
        self._closed = False
        self.tensors: Mapping[str, NDArray[Any]] = TensorMap(files)
        self._embed_dtype, self.engine_tensors, self.ignored = _engine_tensors(config, files)
        self.engine_config = config.engine(self._embed_dtype)
        self.engine_config["ple_on_disk"] = _keep_on_disk(config, files)
        self.generation_config = _optional_json(path / "generation_config.json")
        tokenizer = path / "tokenizer.json"
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None

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

    def check(self) -> None:
        """Raise FormatError if a weight file shrank or changed since it was opened, StateError if closed.

        Call it before the engine reads the weights: a read past the end of a truncated map is fatal to the process.
        """
        if self._closed:
            raise StateError(f"the checkpoint {self.path} is closed; open it again")
        for file in self._files:
            file.check()

    def close(self) -> None:
        """Let go of the files. Arrays and engine models made from them stay valid until they go."""
        self._closed = True
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path} {self.config.model_type}, {self.n_parameters:,} text parameters>"


class TensorMap(Mapping[str, "NDArray[Any]"]):
    """Stored name -> read-only array over the mapped file, made on access."""

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self._owner = {name: file for file in files for name in file.tensors}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._owner[name].array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def open_checkpoint(name_or_path: str | os.PathLike[str], *, progress: Progress | None = None) -> Checkpoint:
    """Open a shipped model by name, a Hugging Face directory, or a hub id that is already in the local cache.

    Raises FileNotFoundError (nothing there, or a shard is missing: named), FormatError (a file is not what it should
    be), NotImplementedError (an architecture, dtype or file format this engine does not read).
    """
    path = resolve(name_or_path)
    raw = read_json(path / "config.json")
    config = parse_config(raw)
    files: list[SafetensorsFile] = []
    try:
        names = _shard_names(path)
        for done, (name, expected) in enumerate(names.items()):
            if progress:
                progress(done, len(names), name)
            files.append(_open_shard(path, name, expected))
        _no_double_tensors(files)
        checkpoint = Checkpoint(path, raw, config, files)
    except BaseException:
        for file in files:
            file.close()
        raise
    if progress:
        progress(len(names), len(names), "")
    return checkpoint


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(d.name for d in PRETRAINED.glob("*") if (d / "config.json").is_file())


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The directory of a model: a shipped name first (write "./name" for a directory), then a directory, then the
    newest snapshot of a hub id in the local Hugging Face cache. Raises FileNotFoundError, NotImplementedError."""
    name = os.fspath(name_or_path)
    if name in shipped_models():
        return PRETRAINED / name
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() == ".gguf":
        raise NotImplementedError(f"{name}: GGUF files cannot be read yet; give a Hugging Face directory (safetensors)")
    if os.path.isdir(path):  # unlike Path.is_dir, false for names that no file system takes
        return path
    if os.path.isfile(path):
        raise FileNotFoundError(f"{name} is a file; give the directory that holds config.json and the .safetensors")
    cached = _cached_snapshot(name)
    if cached is not None:
        return cached
    raise FileNotFoundError(
        f"no model {name!r:.200}: not a directory, not in the local Hugging Face cache (nothing is downloaded), and "
        f"not one of the shipped models ({', '.join(shipped_models()) or 'none in this installation'})"
    )


def _cached_snapshot(name: str) -> Path | None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", name):
        return None
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    hub = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    repo = hub / ("models--" + name.replace("/", "--"))
    snapshots = [d for d in (repo / "snapshots").glob("*") if (d / "config.json").is_file()]
    main = repo / "refs" / "main"
    if main.is_file():
        wanted = main.read_text(encoding="utf-8", errors="replace").strip()
        snapshots = [d for d in snapshots if d.name == wanted] or snapshots
    return max(snapshots, key=lambda d: d.stat().st_mtime, default=None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB. Raises FileNotFoundError, FormatError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: not a Hugging Face model directory")
    if path.stat().st_size > _MAX_JSON:
        raise FormatError(f"{path} has {path.stat().st_size} bytes, the limit is {_MAX_JSON}")
    try:
        table = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(table, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(table).__name__}")
    return table


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _shard_names(path: Path) -> dict[str, list[str]]:
    """File name -> tensors the index says it holds (none for a single file, which wins, as in transformers)."""
    if (path / "model.safetensors").is_file():
        return {"model.safetensors": []}
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} has neither model.safetensors nor {index.name}{_other_weights(path)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f'{index}: expected a non-empty "weight_map" object')
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not _is_plain_name(name):
            raise FormatError(f"{index}: the file of {tensor!r:.120} is {name!r:.120}, which is not a plain file name")
        shards.setdefault(name, []).append(tensor)
    return dict(sorted(shards.items()))


def _other_weights(path: Path) -> str:
    found = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    if not found:
        return "; there are no weights in it"
    return f"; it has {', '.join(found[:5])}. Pickled weights (.bin, .pt) are never read: convert them to safetensors"


def _is_plain_name(name: Any) -> bool:
    """A file of this very directory: no separators, no drive, no "..", nothing the system could read as elsewhere."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}", name) is not None


def _open_shard(path: Path, name: str, expected: list[str]) -> SafetensorsFile:
    if not (path / name).is_file():
        held = f" {expected[0]} … {expected[-1]} ({len(expected)} tensors)" if expected else ""
        raise FileNotFoundError(f"shard {name} is missing from {path}; it holds{held}. Copy it there")
    file = SafetensorsFile(path / name)
    absent = [tensor for tensor in expected if tensor not in file.tensors]
    if absent:
        file.close()
        raise FormatError(f"{path / name} lacks {len(absent)} tensors the index puts there, such as {absent[0]!r:.120}")
    return file


def _no_double_tensors(files: list[SafetensorsFile]) -> None:
    owner: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in owner:
                raise FormatError(f"tensor {name!r:.120} is in both {owner[name].name} and {file.path.name}")
            owner[name] = file.path


def _engine_tensors(
    config: TextConfig, files: list[SafetensorsFile]
) -> tuple[str, dict[str, EngineTensor], tuple[str, ...]]:
    """The embedding's dtype, the tensors the text decoder needs, and the stored names it does not use."""
    stored = {name: file for file in files for name in file.tensors}
    prefix, head = text_prefix(stored)
    out: dict[str, EngineTensor] = {}
    used: set[str] = set()
    for name, shape in text_tensors(config).items():
        full = head if name == "lm_head.weight" else prefix + name
        file = stored.get(full)
        if file is None:
            raise FormatError(_missing(full, stored, config))
        out[name] = _engine_tensor(file, file.tensors[full], shape)
        used.add(full)
    return out["embed_tokens.weight"][0], out, tuple(name for name in stored if name not in used)


def _engine_tensor(file: SafetensorsFile, info: TensorInfo, shape: tuple[int, ...]) -> EngineTensor:
    if info.dtype not in _ENGINE_DTYPES:
        raise NotImplementedError(
            f"{file.path.name}: {info.name} is {info.dtype}; the engine reads {', '.join(_ENGINE_DTYPES)}"
        )
    if info.shape != shape:
        found = f"{info.name} has shape {list(info.shape)}"
        raise FormatError(f"{file.path.name}: {found}, the config asks for {list(shape)}")
    return info.dtype, info.shape, file.buffer, info.offset


def _missing(full: str, stored: Mapping[str, Any], config: TextConfig) -> str:
    similar = [name for name in stored if name.startswith(full.removesuffix("weight"))]
    hint = f"; there is {similar[0]!r:.120} instead (a quantised checkpoint?)" if similar else ""
    return f"no file holds the tensor {full}, which a {config.model_type} of {config.n_layers} layers needs{hint}"


def _keep_on_disk(config: TextConfig, files: list[SafetensorsFile]) -> bool:
    """Whether the per-layer table is so large that its rows should be read one by one, and stay on disk otherwise."""
    for file in files if config.d_ple else []:
        for name, info in file.tensors.items():
            if name.endswith(PLE_TABLE) and info.nbytes >= _RANDOM_FROM:
                file.advise_random(name)
                return True
    return False


__all__ = ["Checkpoint", "Progress", "open_checkpoint", "read_json", "resolve", "shipped_models"]
