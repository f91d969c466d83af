# SPDX-License-Identifier: Apache-2.0
"""The type of each tensor: one for all matrices, or llama-quantize's usual mixes, with the user's overrides.

Ref: llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_allows_quantization, tensor_type_fallback).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from gemma4 import checks
from gemma4.load.checkpoint import Checkpoint
from gemma4.load.dtypes import ENGINE_DTYPES, is_quantised
from gemma4.load.gguf_config import stored_name
from gemma4.quantization.codec import CAN_WRITE

# mix -> the default type of its matrices
MIXES = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}
KINDS = (*CAN_WRITE, *MIXES)
# type -> its replacement in rows that are not a multiple of its block size
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_TABLES = ("token_embd.weight", "per_layer_token_embd.weight")


class Planned(NamedTuple):
    """A tensor to write: under `name`, as `dtype`, from the engine's tensor `source`."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    plus_one: bool  # norms that multiply by 1 + w: GGUF stores the factor


def plan(checkpoint: Checkpoint, kind: str, overrides: Mapping[str, str]) -> tuple[list[Planned], list[str]]:
    """Every tensor of the file, and a note for each width that made a type fall back.

    Raises ValueError: an unknown type (the closest ones are named), or an override that applies to no matrix.
    """
    kind = checked_type(kind, KINDS)
    changes = {pattern: checked_type(dtype, CAN_WRITE) for pattern, dtype in overrides.items()}
    shapes = {name: entry[1] for name, entry in checkpoint.engine_tensors.items()}
    stored = {name: stored_name(name) for name in shapes}
    changed = _overridden({stored[name]: shape for name, shape in shapes.items()}, changes)
    values = [
        layer for layer in range(checkpoint.config.n_layers) if f"layers.{layer}.self_attn.v_proj.weight" in shapes
    ]
    planned: list[Planned] = []
    gave_way: dict[tuple[str, str, int], list[str]] = {}
    for name, shape in shapes.items():
        wanted = changed.get(stored[name]) or _usual(kind, stored[name], checkpoint, name, values)
        dtype = _fitting(wanted, shape, checkpoint.engine_tensors[name][0])
        if dtype != wanted:
            gave_way.setdefault((wanted, dtype, shape[-1]), []).append(stored[name])
        plus_one = checkpoint.config.unit_gains and name.endswith("norm.weight")
        planned.append(Planned(stored[name], name, shape, dtype, plus_one))
    return planned, [_note(*key, names) for key, names in gave_way.items()]


def checked_type(name: str, known: Iterable[str]) -> str:
    """The type's canonical spelling, ignoring case. Raises ValueError with the closest ones."""
    known = tuple(known)
    checks.text("type", name)
    if name.upper() in known:
        return name.upper()
    close = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown type {name!r:.60}; {hint}All types: {', '.join(known)}")


def _stays_plain(name: str, shape: tuple[int, ...]) -> bool:
    """Norms, scales and the router: small, and read as F32 everywhere."""
    return len(shape) < 2 or name.endswith("ffn_gate_inp.weight")


def _usual(kind: str, name: str, checkpoint: Checkpoint, source: str, values: list[int]) -> str:
    dtype, shape, *_ = checkpoint.engine_tensors[source]
    if _stays_plain(name, shape):
        return "F32"
    base = MIXES.get(kind, kind)
    if name == "per_layer_model_proj.weight" and is_quantised(base):
        return dtype
    return _mixed(kind, name, checkpoint, values) if kind in MIXES else base


def _mixed(kind: str, name: str, checkpoint: Checkpoint, values: list[int]) -> str:
    """`values`: the layers that have an attn_v."""
    config, base = checkpoint.config, MIXES[kind]
    if name == "output.weight" or (config.tied and name in _TABLES):
        return "Q6_K"
    block = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down|ffn_down_exps)\.weight", name)
    if block is None:
        return base
    i, n = int(block[1]), config.n_layers
    if block[2] == "attn_v":
        i, n = values.index(i), len(values)
    if kind.endswith("_M"):
        return "Q6_K" if _more_bits(i, n) else base
    early = i < 4 if block[2] == "attn_v" else i < n // 8
    return "Q5_K" if kind == "Q4_K_S" and early else base


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _fitting(dtype: str, shape: tuple[int, ...], source: str) -> str:
    """A type whose blocks fit rows of this width; as a last resort a plain one of two bytes."""
    while shape[-1] % ENGINE_DTYPES[dtype].elements:
        dtype = _FALLBACK.get(dtype) or ("BF16" if source == "BF16" else "F16")
    return dtype


def _note(wanted: str, dtype: str, width: int, names: list[str]) -> str:
    block = ENGINE_DTYPES[wanted].elements
    which = names[0] if len(names) == 1 else f"{len(names)} tensors such as {names[0]}"
    return f"{which}: {dtype} instead of {wanted}, as rows of {width} are no whole number of blocks of {block}"


def _overridden(shapes: Mapping[str, tuple[int, ...]], changes: Mapping[str, str]) -> dict[str, str]:
    """Tensor name -> type, of the matrices that an override names; the last one counts."""
    out: dict[str, str] = {}
    for pattern, dtype in changes.items():
        found = [name for name in shapes if any(fnmatchcase(part, pattern) for part in _spellings(name))]
        matrices = [name for name in found if not _stays_plain(name, shapes[name])]
        if not found:
            raise ValueError(f"the override {pattern!r:.120} matches no tensor{_similar(pattern, shapes)}")
        if not matrices:
            raise ValueError(f"the override {pattern!r:.120} matches {found[0]} alone, which is always F32")
        out.update(dict.fromkeys(matrices, dtype))
    return out


def _spellings(name: str) -> set[str]:
    """ "blk.3.ffn_down.weight" is also "ffn_down.weight", "blk.3.ffn_down" and "ffn_down"."""
    tail = re.sub(r"^blk\.\d+\.", "", name)
    return {name, tail, name.removesuffix(".weight"), tail.removesuffix(".weight")}


def _similar(pattern: str, names: Iterable[str]) -> str:
    known = sorted({re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight") for name in names})
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    return f"; the closest names are {', '.join(close)}" if close else f"; there are {', '.join(known)}"
