# SPDX-License-Identifier: Apache-2.0
"""Quantised safetensors in the compressed-tensors "pack-quantized" format (w4a16, w8a16), as Google ships them.

A matrix [rows, cols] lies in `X.weight_packed`, int32 words of num_bits codes each, the first in the lowest bits; a
code is the value plus 2^(num_bits-1). `X.weight_scale` has a factor for each group of columns of a row, and
`X.weight_zero_point`, if there is one, what is subtracted first: weight = (code - zero) * scale. Ref: the
compressed-tensors package, 0.20, compressors/pack_quantized; quantization/quant_config.py for `quantization_config`.

The engine computes with GGUF's blocks, so matrices are repacked when the checkpoint is opened: to Q4_0 or Q8_0 where
the same values result to the bit (scales fit float16, groups are a multiple of the block size), else to float32.
Either way a weight is the exact product of code and scale; transformers rounds that product to the scale's type, which
for bfloat16 is coarser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma4.errors import FormatError
from gemma4.load.checkpoint import EngineTensor
from gemma4.load.fields import Fields
from gemma4.load.patterns import Pattern
from gemma4.narrow import is_dict, is_list

Array: TypeAlias = NDArray[Any]
PACKED, SCALE, ZERO, SHAPE, ORDER = (f"weight_{part}" for part in ("packed", "scale", "zero_point", "shape", "g_idx"))
BITS = (2, 4, 8)  # others are packed differently by different versions of the package
BLOCK = 32


@dataclass(frozen=True)
class Scheme:
    """How a group of modules is quantised. group: columns that share a scale; 0 = a whole row."""

    targets: tuple[str, ...]
    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        shared = f"groups of {self.group}" if self.group else "rows"
        return f"{self.bits} bits, {shared}, {'symmetric' if self.symmetric else 'with zero points'}"


class CompressedConfig:
    """The checkpoint's `quantization_config`.

    Raises NotImplementedError for anything but compressed-tensors' packed integers, FormatError for a damaged table.
    """

    def __init__(self, raw: Any) -> None:
        table = raw if is_dict(raw) else {"quant_method": raw}
        method, format = table.get("quant_method"), table.get("format")
        if method != "compressed-tensors":
            raise NotImplementedError(
                f"the checkpoint is quantised ({method!r:.80}); of quantised safetensors those of compressed-tensors "
                "(pack-quantized) can be read, and GGUF files of many types"
            )
        groups = table.get("config_groups")
        if not is_dict(groups) or not groups:
            raise FormatError('quantization_config: expected a non-empty "config_groups" object')
        self.schemes = [_scheme(str(name), group, format) for name, group in groups.items()]
        self._patterns = {
            target: Pattern(target[3:]) for s in self.schemes for target in s.targets if target.startswith("re:")
        }

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a module by its full name: one that names it, else one whose "re:" pattern matches, else one
        for all linear layers. Raises FormatError if there is none."""
        for matches in (_is_named, self._is_matched, _is_class):
            for scheme in self.schemes:
                if any(matches(target, module) for target in scheme.targets):
                    return scheme
        raise FormatError(f"quantization_config: no group's targets match {module!r:.120}, which is packed")

    def _is_matched(self, target: str, module: str) -> bool:
        return target in self._patterns and self._patterns[target].matches_start(module)


def _is_named(target: str, module: str) -> bool:
    return target == module


def _is_class(target: str, module: str) -> bool:
    return target in ("Linear", "Gemma4ClippableLinear")


def _scheme(name: str, group: Any, default_format: Any) -> Scheme:
    where = f"quantization_config: {name:.40}"
    weights = group.get("weights") if is_dict(group) else None
    if not is_dict(weights):
        raise FormatError(f'{where}: expected an object with "weights"')
    format = group.get("format") or default_format
    if format != "pack-quantized":
        raise NotImplementedError(
            f"{where}: format {format!r:.60}; of compressed-tensors' formats pack-quantized can be read"
        )
    if group.get("input_activations"):
        raise NotImplementedError(f"{where}: quantised activations; weight-only schemes (w4a16, w8a16) can be read")
    f = Fields(weights, where)
    bits, kind, strategy = f.integer("num_bits", 8, 1, 64), weights.get("type", "int"), weights.get("strategy")
    symmetric = f.boolean("symmetric", True)
    if bits not in BITS or kind != "int":
        raise NotImplementedError(f"{where}: {kind!r:.20} of {bits} bits; integers of {BITS} bits can be read")
    if strategy not in ("group", "channel"):
        raise NotImplementedError(f'{where}: strategy {strategy!r:.40}; "group" and "channel" can be read')
    size = f.integer("group_size", None, 1, 1 << 20) if strategy == "group" else 0
    return Scheme(_targets(group.get("targets"), where), bits, size, symmetric)


def _targets(targets: Any, where: str) -> tuple[str, ...]:
    if not is_list(targets) or not all(isinstance(t, str) and len(t) < 1000 for t in targets):
        raise FormatError(f"{where}: targets must be a list of names")
    return tuple(targets)


# ---- one matrix ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix's parts, checked: codes as bytes [rows, cols * bits / 8], scale float32 [rows, groups], zero int
    [rows, groups] or None."""

    cols: int
    bits: int
    codes: Array
    scale: Array
    zero: Array | None

    @property
    def _scales_fit(self) -> bool:
        """Whether every block of 32 has one scale that float16 holds."""
        groups = self.scale.shape[1]
        whole = self.cols % BLOCK == 0 and (groups == 1 or self.cols // groups % BLOCK == 0)
        with np.errstate(over="ignore"):
            return whole and bool((self.scale.astype(np.float16).astype(np.float32) == self.scale).all())

    def blocks(self) -> tuple[str, Array] | None:
        """(Q4_0 or Q8_0, uint8 [rows, bytes per row]) with the same values; None if neither can hold them."""
        if not self._scales_fit:
            return None
        if self.bits == 4 and self.zero is None:
            return "Q4_0", self._with_scales(_reorder_nibbles(self.codes))
        values = self.integers()
        low, high = values.min(initial=0), values.max(initial=0)
        if low >= -8 and high <= 7:
            nibbles = (values + 8).astype(np.uint8).reshape(len(values), -1, 2, BLOCK // 2)
            return "Q4_0", self._with_scales(nibbles[:, :, 0] | nibbles[:, :, 1] << 4)
        if low < -128 or high > 127:  # differences of two bytes
            return None
        return "Q8_0", self._with_scales(values.astype(np.int8).view(np.uint8).reshape(len(values), -1, BLOCK))

    def _with_scales(self, codes: Array) -> Array:
        """codes uint8 [rows, blocks, bytes] -> [rows, blocks * (2 + bytes)], each block's factor before it."""
        rows, n_blocks, n_bytes = codes.shape
        scale = self.scale.astype("<f2").repeat(n_blocks // self.scale.shape[1], axis=1)
        out = np.empty((rows, n_blocks, 2 + n_bytes), np.uint8)
        out[:, :, :2] = scale[:, :, None].view(np.uint8)
        out[:, :, 2:] = codes
        return out.reshape(rows, -1)

    def integers(self) -> Array:
        """int16 [rows, cols]: codes less zero points."""
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        codes = (self.codes[:, :, None] >> shifts & (1 << self.bits) - 1).reshape(len(self.codes), -1)[:, : self.cols]
        values = codes.astype(np.int16) - (1 << self.bits - 1)
        return values if self.zero is None else values - self._per_column(self.zero)

    def values(self) -> Array:
        """float32 [rows, cols]: the exact products where float32 holds them, as it does for float16 and bfloat16
        scales."""
        return self.integers().astype(np.float32) * self._per_column(self.scale)

    def _per_column(self, groups: Array) -> Array:
        return groups if groups.shape[1] == 1 else groups.repeat(self.cols // groups.shape[1], axis=1)


def _reorder_nibbles(codes: Array) -> Array:
    """Two neighbours in a byte -> elements j and j + 16 of a block of 32 in byte j: uint8 [rows, blocks, 16]."""
    first, second = np.moveaxis(codes.reshape(len(codes), -1, 2, BLOCK // 4), 2, 0)
    out = np.empty((*first.shape[:2], BLOCK // 4, 2), np.uint8)
    out[..., 0] = first & 15 | second << 4
    out[..., 1] = first >> 4 | second & 0xF0
    return out.reshape(*first.shape[:2], BLOCK // 2)


# "….experts.3.gate_proj"; the engine needs all experts in one tensor
_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)")
_FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


def _parts(full: str, shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """(module, rows, columns) of the packed matrices whose rows are concatenated in `full`."""
    if len(shape) == 2:
        return [(full.removesuffix(".weight"), *shape)]
    base, _, fused = full.rpartition(".")
    maps = [name for name, joined in _FUSED.items() if joined == fused]
    return [(f"{base}.{e}.{name}", shape[1] // len(maps), shape[2]) for e in range(shape[0]) for name in maps]


class Packed:
    """The packed matrices of a checkpoint. stored: name -> array, of every stored tensor."""

    def __init__(self, config: CompressedConfig, stored: Mapping[str, Array]) -> None:
        self.config, self.stored = config, stored
        self.used: set[str] = set()
        self.counts: dict[str, int] = {}
        self.nbytes = 0

    def names(self) -> set[str]:
        """The names that the packed matrices have when unpacked."""
        modules = [name.removesuffix("." + PACKED) for name in self.stored if name.endswith("." + PACKED)]
        experts = [match for match in map(_EXPERT.fullmatch, modules) if match]
        return {f"{module}.weight" for module in modules} | {f"{m[1]}.{_FUSED[m[2]]}" for m in experts}

    def tensor(self, full: str, shape: tuple[int, ...]) -> EngineTensor:
        """The matrix `full` ("….weight", or "….experts.gate_up_proj" and "….experts.down_proj" of all experts)
        for the engine. Raises FormatError if its parts do not fit `shape`."""
        parts = [self._read(*part) for part in _parts(full, shape)]
        blocks = [found for found in (part.blocks() for part in parts) if found]
        dtypes = {dtype for dtype, _ in blocks}
        if len(blocks) == len(parts) and len(dtypes) == 1:
            dtype, data = dtypes.pop(), [rows for _, rows in blocks]
        else:
            dtype, data = "F32", [part.values() for part in parts]
        joined = np.ascontiguousarray(data[0] if len(data) == 1 else np.concatenate(data))
        self.counts[dtype] = self.counts.get(dtype, 0) + 1
        self.nbytes += joined.nbytes
        return dtype, shape, joined, 0

    def _read(self, module: str, rows: int, cols: int) -> PackedMatrix:
        scheme = self.config.scheme_of(module)
        if f"{module}.{ORDER}" in self.stored:
            raise NotImplementedError(
                f"{module}: columns in activation order ({ORDER}); groups of neighbours can be read"
            )
        words = self._part(module, PACKED, (rows, -(-cols * scheme.bits // 32)), "int32")
        if scheme.group and cols % scheme.group:
            raise FormatError(f"{module}: {cols} columns are no whole number of groups of {scheme.group}")
        groups = cols // scheme.group if scheme.group else 1
        scale = self._part(module, SCALE, (rows, groups), "float32", "float16", "bfloat16").astype(np.float32)
        if not np.isfinite(scale).all():
            raise FormatError(f"{module}.{SCALE} holds values that are not finite")
        if f"{module}.{SHAPE}" in self.stored:
            stated = self._part(module, SHAPE, (2,), "int64", "int32").tolist()
            if stated != [rows, cols]:
                raise FormatError(f"{module}.{SHAPE} says {stated}, the config asks for {[rows, cols]}")
        zero = None if scheme.symmetric else self._zero(module, scheme.bits, rows, groups)
        return PackedMatrix(cols, scheme.bits, np.ascontiguousarray(words).view(np.uint8), scale, zero)

    def _zero(self, module: str, bits: int, rows: int, groups: int) -> Array:
        """int16 [rows, groups]; packed along the rows."""
        words = self._part(module, ZERO, (-(-rows * bits // 32), groups), "int32")
        by_group = np.ascontiguousarray(words.T).view(np.uint8)
        return PackedMatrix(rows, bits, by_group, np.ones((groups, 1)), None).integers().T

    def _part(self, module: str, part: str, shape: tuple[int, ...], *dtypes: str) -> Array:
        name = f"{module}.{part}"
        array = self.stored.get(name)
        if array is None:
            raise FormatError(f"{module} is packed, but no file holds {name}")
        if array.shape != shape or array.dtype.name not in dtypes:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            raise FormatError(f"{name} is {array.dtype.name} {list(array.shape)}, expected {wanted}")
        self.used.add(name)
        return array

    def note(self) -> str:
        """A summary for `Model.info()`."""
        size = f"{self.nbytes / 2**20:.1f} MiB of memory"
        schemes = "; ".join(dict.fromkeys(map(str, self.config.schemes)))
        widened = self.counts.get("F32", 0)
        lossless = ", ".join(f"{n} as {dtype}" for dtype, n in sorted(self.counts.items()) if dtype != "F32")
        done = [f"repacked without loss: {lossless}"] if lossless else []
        done += [f"{widened} widened to float32, as their scales or groups fit no block format"] if widened else []
        return f"compressed-tensors ({schemes}); matrices {'; '.join(done)} ({size})"
