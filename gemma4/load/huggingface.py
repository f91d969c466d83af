# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face directory (config.json + one or many .safetensors) as a `Checkpoint` the engine can run from.

Nothing is downloaded, and the engine gets views of the mapped files. Tensors that are not aligned are copied,
quantised ones repacked (see compressed.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma4 import checks
from gemma4.errors import FormatError, StateError
from gemma4.files import check_no_pointer, read_limited
from gemma4.load.checkpoint import (
    TEXT_ALONE,
    Checkpoint,
    EngineTensor,
    Progress,
    TensorMap,
    check_shape,
    no_double_tensors,
)
from gemma4.load.compressed import PACKED, CompressedConfig, Packed
from gemma4.load.config import EARLIER, TextConfig, parse_config
from gemma4.load.dtypes import PLAIN
from gemma4.load.encoder_config import EncoderConfig, Modality, parse_encoders
from gemma4.load.names import encoder_names, text_prefix, text_tensors
from gemma4.load.safetensors import SafetensorsFile
from gemma4.narrow import is_dict

if TYPE_CHECKING:
    from gemma4.text.chat import ChatTemplate
    from gemma4.text.tokenizer import Tokenizer

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
_MAX_JSON = 16 << 20  # bytes; the largest index of a released model has 1 MB
_COMPARED = 1 << 22  # elements compared at a time, of a head and the embedding table


class HuggingFaceCheckpoint(Checkpoint):
    """A directory with config.json, .safetensors files and, if there, tokenizer, template and generation config."""

    def __init__(self, path: Path, raw: dict[str, Any], config: TextConfig, files: list[SafetensorsFile]) -> None:
        stored = {name: file for file in files for name in file.tensors}
        packed, notes = _packed(raw, stored)
        config, head_notes = _with_trained_head(config, stored)
        source, made = _sources(config, stored, packed)
        super().__init__(path, config, files, source, made, packed.used if packed else ())
        self.notes = (*((packed.note(),) if packed else ()), *notes, *head_notes, *self._copy_notes)
        if config.model_type in EARLIER:
            self.encoder_advice = TEXT_ALONE
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
    NotImplementedError (an architecture or dtype that this engine does not read).
    """
    if not (path / "config.json").is_file() and any(path.glob("*.gguf")):
        raise FileNotFoundError(f"{path} has no config.json{_other_weights(path)}")
    raw = read_json(path / "config.json")
    config = parse_config(raw)
    files: list[SafetensorsFile] = []
    try:
        names = _shard_names(path)
        for done, name in enumerate(names):
            if progress:
                progress(done, len(names), name)
            if (path / name).is_file():
                files.append(SafetensorsFile(path / name))
        no_double_tensors(files)
        _check_shards(path, names, files, config)
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
    """Location of a model: a shipped name first (write "./name" for a directory), then a directory or a GGUF file, then
    the newest snapshot of a hub id in the local Hugging Face cache. Raises FileNotFoundError."""
    name = os.fspath(checks.path("a model", name_or_path))
    if not name:
        raise FileNotFoundError('no model "": give a directory, a .gguf file, or the name of a shipped model')
    if name in shipped_models():
        return PRETRAINED / name
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) or _is_gguf(path):  # unlike Path.is_dir, false for names that are invalid on the file system
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
    snapshots = [d for d in (repo / "snapshots").glob("*") if (d / "config.json").is_file() or any(d.glob("*.gguf"))]
    main = repo / "refs" / "main"
    if main.is_file():
        wanted = main.read_text(encoding="utf-8", errors="replace").strip()
        snapshots = [d for d in snapshots if d.name == wanted] or snapshots
    newest = max(snapshots, key=lambda d: d.stat().st_mtime, default=None)
    return newest if newest is None or (newest / "config.json").is_file() else _only_gguf(newest, name)


def _only_gguf(folder: Path, name: str) -> Path:
    """The model of a repository of GGUF files: the only file, or the first part of the only split one. Raises
    FileNotFoundError if there are several."""
    files = sorted(file for file in folder.glob("*.gguf") if not file.name.lower().startswith("mmproj"))
    models = [file for file in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", file.name)]
    if len(models) == 1:
        return models[0]
    found = ", ".join(file.name for file in models[:8]) or "encoders alone"
    raise FileNotFoundError(f"{name} is cached in {folder} with {found}: name one file by its path")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MiB. Raises FileNotFoundError, FormatError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: not a Hugging Face model directory")
    data = read_limited(path, _MAX_JSON)
    check_no_pointer(data, path)
    try:
        table = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not is_dict(table):
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
    if not is_dict(weight_map) or not weight_map:
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
    """A file of this directory: no separators, no drive, no "..", nothing that the system could resolve elsewhere."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}", name) is not None


def _check_shards(path: Path, names: Mapping[str, list[str]], files: list[SafetensorsFile], config: TextConfig) -> None:
    """Raise FileNotFoundError for a missing shard, FormatError for one without the tensors that the index lists: if the
    text decoder needs any of them. Unneeded shards may be missing."""
    there = {file.path.name: file.tensors.keys() for file in files}
    listed = {tensor for tensors in names.values() for tensor in tensors}
    try:
        prefix, head = text_prefix(listed)
    except FormatError:  # nothing is listed, or no text decoder: reported when its tensors are resolved
        prefix, head = "", ""
    needed = {head if name == "lm_head.weight" else prefix + name for name in text_tensors(config)}
    for name, tensors in names.items():
        missing = [t for t in tensors if t not in there.get(name, ()) and (t in needed or _is_packed_part(t, prefix))]
        if name not in there and (missing or not tensors):
            held = f"; it holds {tensors[0]} … {tensors[-1]} ({len(tensors)} tensors)" if tensors else ""
            raise FileNotFoundError(f"shard {name} is missing from {path}{held}. Copy it there")
        if missing:
            what = f"lacks {len(missing)} tensors the index puts there, such as {missing[0]!r:.120}"
            raise FormatError(f"{path / name} {what}")


def _is_packed_part(tensor: str, prefix: str) -> bool:
    """Whether a name belongs to a part of a packed matrix of the text decoder."""
    return tensor.startswith(prefix) and ".weight_" in tensor


def _packed(raw: dict[str, Any], stored: Mapping[str, SafetensorsFile]) -> tuple[Packed | None, tuple[str, ...]]:
    """The quantised matrices, if config.json declares any (at its top, or beside the text model's), and a note if it
    declares weights that are not quantised: trainers leave the declaration behind when they merge.

    Raises NotImplementedError for a checkpoint quantised by MLX, which declares that under another name.
    """
    inner = raw.get("text_config")
    inner = inner if is_dict(inner) else {}
    tables = [table.get(name) for name in ("quantization_config", "quantization") for table in (raw, inner)]
    table = next((table for table in tables if table), None)
    if not table:
        return None, ()
    is_plain = all(file.tensors[name].dtype in PLAIN for name, file in stored.items())
    if is_plain and not any(name.endswith(f".{PACKED}") for name in stored):
        method = table.get("quant_method") if is_dict(table) else table
        return None, (f"config.json says that the weights are quantised ({method!r:.60}); they are not",)
    if any(name.endswith(".scales") for name in stored) and any(name.endswith(".biases") for name in stored):
        raise NotImplementedError(
            "the checkpoint is quantised by MLX (.scales and .biases beside packed weights), which cannot be read: "
            "take the unquantised model, or a GGUF file"
        )
    return Packed(CompressedConfig(table), TensorMap(stored)), ()


def _with_trained_head(config: TextConfig, stored: Mapping[str, SafetensorsFile]) -> tuple[TextConfig, tuple[str, ...]]:
    """The configuration, untied if the stored head differs from the embedding table despite a tied config: it was
    trained, and transformers uses it."""
    if not config.tied:
        return config, ()
    try:
        prefix, head = text_prefix(stored)
    except FormatError:
        return config, ()
    table = prefix + "embed_tokens.weight"
    if head not in stored or stored[head].tensors[head].shape != stored[table].tensors[table].shape:
        return config, ()
    if _same_values(stored[head].array(head), stored[table].array(table)):
        return config, ()
    note = f"{head} differs from the embedding table, which config.json says it is: the stored head is used"
    return replace(config, tied=False), (note,)


def _same_values(a: NDArray[Any], b: NDArray[Any]) -> bool:
    rows = max(1, _COMPARED // max(1, a.shape[-1]))
    return a.dtype == b.dtype and all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def _sources(
    config: TextConfig, stored: Mapping[str, SafetensorsFile], packed: Packed | None
) -> tuple[dict[str, str], dict[str, EngineTensor]]:
    """Engine name -> stored name of the tensors the text decoder needs, and those that had to be unpacked; shapes
    checked."""
    unpacked: set[str] = set(packed.names()) if packed else set()
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
