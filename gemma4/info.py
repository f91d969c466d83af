# SPDX-License-Identifier: Apache-2.0
"""Description and cost of a loaded model: the printable answer of `Model.info()`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemma4.core import Core
from gemma4.family import member_of
from gemma4.units import count, size

_TABLES = ("embed_tokens.weight", "embed_tokens_per_layer.weight")


@dataclass(frozen=True)
class ModelInfo:
    """Facts on a loaded model; `print()` it.

    family:                the model's name and size, such as "Gemma 3 4B"; how it is found: gemma4/family.py
    parameters:            stored weights of the text model (a tied head counts once)
    effective_parameters:  the same without the embedding tables (rows are looked up) and with only the experts that a
                           token uses: what one token costs
    dtypes:                stored dtype -> parameters in it
    weight_bytes:          size of the mapped weights; pages come into memory as they are used
    resident_bytes:        memory of this process now, 0 where the system does not say
    """

    path: str
    family: str
    architecture: str
    parameters: int
    effective_parameters: int
    dtypes: dict[str, int]
    weight_bytes: int
    resident_bytes: int
    isa: str
    threads: int
    precision: str
    kv_dtype: str
    context_length: int
    n_sites: int
    notes: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        types = ", ".join(f"{count(number)} in {name}" for name, number in sorted(self.dtypes.items()))
        rows = [
            ("model", self.path),
            ("family", self.family),
            ("architecture", self.architecture),
            ("parameters", f"{count(self.parameters)} ({count(self.effective_parameters)} effective per token)"),
            ("stored", types),
            ("weights", f"{size(self.weight_bytes)} mapped"),
            ("process memory", size(self.resident_bytes) if self.resident_bytes else "unknown"),
            ("arithmetic", f"{self.isa}, {self.threads} threads, precision {self.precision}, KV cache {self.kv_dtype}"),
            ("context", f"{self.context_length} positions"),
            ("sites", f"{self.n_sites} named activations (Model.sites)"),
            *(("note", text) for text in self.notes),
            *(("warning", text) for text in self.warnings),
        ]
        return "\n".join(f"{label:<15} {value}" for label, value in rows)

    __repr__ = __str__


def describe(model: Core) -> ModelInfo:
    """Collect a ModelInfo; computes nothing heavy."""
    sizes = {name: math.prod(shape) for name, (_, shape, _, _) in model.checkpoint.engine_tensors.items()}
    return ModelInfo(
        path=str(model.checkpoint.path),
        family=str(member_of(model)),
        architecture=_architecture(model),
        parameters=model.checkpoint.n_parameters,
        effective_parameters=_effective(sizes, model.engine_config["n_experts"], model.engine_config["top_k_experts"]),
        dtypes=model.checkpoint.dtypes,
        weight_bytes=model.engine.weight_bytes,
        resident_bytes=resident_bytes(),
        isa=model.engine.isa,
        threads=model.engine.threads,
        precision=model.engine.precision,
        kv_dtype=model.kv_dtype,
        context_length=model.context_length,
        n_sites=len(model.sites),
        notes=(*model.checkpoint.notes, *_notes_on_precision(model)),
        warnings=[f"an edit produced NaN at {site}" for site in model.nan_log.sites],
    )


def _notes_on_precision(model: Core) -> Iterator[str]:
    """Where `high` has no bf16 products to compute with."""
    if model.engine.precision == "high":
        if model.engine.isa != "amx":
            yield f'precision "high" computes as "exact" on {model.engine.isa}; it is for processors with AMX'
        elif "BF16" not in model.checkpoint.dtypes:
            yield 'precision "high" computes as "exact" with these weights; it is for BF16'


def _effective(sizes: dict[str, int], n_experts: int, top_k: int) -> int:
    total = 0
    for name, numel in sizes.items():
        if ".experts." in name:
            total += numel * top_k // n_experts
        elif name not in _TABLES:
            total += numel
    return total


def _architecture(model: Core) -> str:
    config = model.engine_config
    layers = config["layers"]
    local = sum(layer["window"] > 0 for layer in layers)
    windows = sorted({layer["window"] for layer in layers if layer["window"]})
    window = f" with window {', '.join(map(str, windows))}" if windows else ""
    parts = [
        f"{len(layers)} layers ({len(layers) - local} global, {local} local{window})",
        f"d_model {config['d_model']}",
        f"{config['n_heads']} heads",
        f"vocabulary {config['d_vocab']}",
    ]
    shared = sum(layer["kv_source"] != i for i, layer in enumerate(layers))
    if shared:
        parts.append(f"{shared} layers share keys and values")
    if config["d_ple"]:
        parts.append(f"per-layer embeddings of {config['d_ple']}")
    if config["n_experts"]:
        parts.append(f"{config['top_k_experts']} of {config['n_experts']} experts")
    return ", ".join(parts)


def resident_bytes() -> int:
    """Resident memory of this process in bytes; where only the peak is known, the peak; 0 if neither."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        import resource

        return pages * resource.getpagesize()
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes, 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mapped_bytes(paths: Iterable[Path]) -> tuple[int, int]:
    """(resident, in huge pages): bytes of this process's mappings of those files; (0, 0) if unknown."""
    wanted, found, counts = {str(path.resolve()) for path in paths}, {"Rss:": 0, "FilePmdMapped:": 0}, False
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, rest = line.partition(" ")
                if not key.endswith(":"):  # addresses, permissions, offset, device, inode, path
                    counts = rest.rstrip("\n").split(maxsplit=4)[-1] in wanted
                elif counts and key in found:
                    found[key] += int(rest.split()[0]) * 1024
    except OSError:
        return 0, 0
    return found["Rss:"], found["FilePmdMapped:"]
