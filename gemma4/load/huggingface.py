# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory (config.json + one or many .safetensors) as a `Checkpoint` the engine can run from.

Nothing is downloaded and no weight is copied: the engine gets views of the mapped files (quantised ones are repacked,
see compressed.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4.errors import FormatError, StateError
from gemma4.load.checkpoint import Checkpoint, EngineTensor, Progress, TensorMap, check_shape, no_double_tensors
from gemma4.load.compressed import CompressedConfig, Packed
from gemma4.load.config import EARLIER, TextConfig, parse_config
from gemma4.load.encoder_config import EncoderConfig, Modality, parse_encoders
from gemma4.load.names import encoder_names, text_prefix, text_tensors
from gemma4.load.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
_MAX_JSON = 64 << 20


class HuggingFaceCheckpoint(Checkpoint):
    """A directory with config.json, .safetensors files and, if there, tokenizer, template and generation config."""

    def __init__(self, path: Path, raw: dict[str, Any], config: TextConfig, files: list[SafetensorsFile]) -> None:
        stored = {name: file for file in files for name in file.tensors}
        packed = _packed(raw, stored)
        source, made = _sources(config, stored, packed)
        super().__init__(path, config, files, source, made, packed.used if packed else ())
        if packed:
            self.notes = (packed.note(),)
        if config.model_type in EARLIER:
            self.encoder_advice = "; of models before Gemma 4 the text model alone is supported"
        self.hf_config = raw
        self.generation_config = _optional_json(path / "generation_config.json")
        self.processor_config = _optional_json(path / "processor_config.json")
        tokenizer = path / "tokenizer.json"
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (*super().inputs, *self.path.glob("*.json"), *self.path.glob("*.jinja"))

    @property
    def encoders(self) -> Mapping[Modality, EncoderConfig]:
        return parse_encoders(self.hf_config, self.config)

    def encoder_tensors(self, modality: Modality) -> dict[str, EngineTensor]:
        names = encoder_names(self._owner, modality)
        if not names:
            raise StateError(
                f"{self.path} describes a {modality} encoder in config.json, but its files hold none of the tensors: "
                "take the whole checkpoint"
            )
        return {name: self._engine_tensor(stored) for name, stored in names.items()}

    def load_tokenizer(self) -> Tokenizer:
        from gemma4.text.tokenizer import Tokenizer

        if self.tokenizer_path is None:
            raise StateError(f"{self.path} has no tokenizer.json: pass token ids, or add the file")
        return Tokenizer.load(self.tokenizer_path)

    def load_chat_template(self) -> ChatTemplate | None:
        from gemma4.text.chat import ChatTemplate

        return ChatTemplate.load(self.path)


def open_directory(path: Path, *, progress: Progress | None = None) -> HuggingFaceCheckpoint:
    """Open a Hugging Face directory.

    Raises FileNotFoundError (a file is missing: named), FormatError (a file is not what it should be),
    NotImplementedError (an architecture or dtype this engine does not read).
    """
    if not (path / "config.json").is_file() and any(path.glob("*.gguf")):
        raise FileNotFoundError(f"{path} has no config.json{_other_weights(path)}")
    raw = read_json(path / "config.json")
    config = parse_config(raw)
    files: list[SafetensorsFile] = []
    try:
        names = _shard_names(path)
        for done, (name, expected) in enumerate(names.items()):
            if progress:
                progress(done, len(names), name)
            files.append(_open_shard(path, name, expected))
        no_double_tensors(files)
        checkpoint = HuggingFaceCheckpoint(path, raw, config, files)
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
    """Where a model is: a shipped name first (write "./name" for a directory), then a directory or a GGUF file, then
    the newest snapshot of a hub id in the local Hugging Face cache. Raises FileNotFoundError."""
    name = os.fspath(name_or_path)
    if name in shipped_models():
        return PRETRAINED / name
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) or _is_gguf(path):  # unlike Path.is_dir, false for names that no file system takes
        return path
    if os.path.isfile(path):
        wanted = "the directory that holds config.json and the .safetensors, or a .gguf file"
        raise FileNotFoundError(f"{name} is a file; give {wanted}")
    cached = _cached_snapshot(name)
    if cached is not None:
        return cached
    if name.lower().endswith((".gguf", ".safetensors")):
        raise FileNotFoundError(f"no file {name!r:.200}")
    raise FileNotFoundError(
        f"no model {name!r:.200}: not a directory, not in the local Hugging Face cache (nothing is downloaded), and "
        f"not one of the shipped models ({', '.join(shipped_models()) or 'none in this installation'})"
    )


def _is_gguf(path: Path) -> bool:
    """By its name, or by its first bytes: some stores keep the files under a digest."""
    if not os.path.isfile(path) or path.suffix.lower() == ".safetensors":
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


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
    if any(name.endswith(".gguf") for name in found):
        return f"; give the .gguf file itself: {', '.join(found[:5])}"
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


def _packed(raw: dict[str, Any], stored: Mapping[str, SafetensorsFile]) -> Packed | None:
    """The quantised matrices, if config.json says that there are some (at its top, or beside the text model's)."""
    inner = raw.get("text_config")
    quantised = raw.get("quantization_config") or (inner or {}).get("quantization_config")
    return Packed(CompressedConfig(quantised), TensorMap(stored)) if quantised is not None else None


def _sources(
    config: TextConfig, stored: Mapping[str, SafetensorsFile], packed: Packed | None
) -> tuple[dict[str, str], dict[str, EngineTensor]]:
    """Engine name -> stored name of the tensors the text decoder needs, and those that had to be unpacked; shapes
    checked."""
    unpacked = packed.names() if packed else set()
    prefix, head = text_prefix({*stored, *unpacked})
    source: dict[str, str] = {}
    made: dict[str, EngineTensor] = {}
    for name, shape in text_tensors(config).items():
        full = head if name == "lm_head.weight" else prefix + name
        if full in stored:
            check_shape(stored[full], full, shape)
            source[name] = full
        elif packed and full in unpacked:
            made[name] = packed.tensor(full, shape)
        else:
            raise FormatError(_missing(full, stored, config))
    return source, made


def _missing(full: str, stored: Mapping[str, Any], config: TextConfig) -> str:
    similar = [name for name in stored if name.startswith(full.removesuffix("weight"))]
    hint = f"; there is {similar[0]!r:.120} instead (a quantised checkpoint?)" if similar else ""
    return f"no file holds the tensor {full}, which a {config.model_type} of {config.n_layers} layers needs{hint}"
