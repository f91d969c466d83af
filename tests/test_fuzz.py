# SPDX-License-Identifier: Apache-2.0
"""Hypothesis against the readers of files from strangers: whatever the bytes, either every array lies in the file, or
it is one of our exceptions. Some ten seconds; GEMMA4_FUZZ_EXAMPLES=100000 for more."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from gguf_files import array, pair, raw, string, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma4.errors import FormatError
from gemma4.load.compressed import CompressedConfig
from gemma4.load.config import parse_config
from gemma4.load.gguf import GgufArray, GgufFile
from gemma4.load.safetensors import DTYPES, SafetensorsFile

EXAMPLES = int(os.environ.get("GEMMA4_FUZZ_EXAMPLES", "400"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,  # the same inputs everywhere: a failure in CI is a failure here
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
REFUSED = (FormatError, NotImplementedError)

# ---- GGUF ------------------------------------------------------------------------------------------------------------

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of the scalar value types
counts = st.one_of(st.integers(0, 6), st.sampled_from([2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
keys = st.one_of(st.text(max_size=12), st.sampled_from(["general.architecture", "general.alignment", "split.count"]))


@st.composite
def values(draw: st.DrawFn, depth: int = 0) -> tuple[int, bytes]:
    """(value type, bytes), now and then of a type that there is not or with a count that is not so."""
    kind = draw(st.sampled_from([*SIZES, 8, 9, 13, 2**32 - 1]))
    if kind == 8:
        text = string(draw(st.one_of(st.text(max_size=9), st.binary(max_size=9))))
        return kind, text if draw(st.integers(0, 9)) else struct.pack("<Q", draw(counts)) + text[8:]
    if kind == 9 and depth < 3:
        items = draw(st.lists(values(depth + 1), max_size=4))
        inner = items[0][0] if items else draw(st.sampled_from([*SIZES, 8, 9, 14]))
        stated = len(items) if draw(st.integers(0, 9)) else draw(counts)
        return kind, array(inner, stated, b"".join(data for _, data in items))
    return kind, draw(st.binary(min_size=SIZES.get(kind, 4), max_size=SIZES.get(kind, 4)))


@st.composite
def gguf_bytes(draw: st.DrawFn) -> bytes:
    pairs = [pair(key, *draw(values())) for key in draw(st.lists(keys, max_size=4))]
    tensors, data = [], 0
    for name in draw(st.lists(st.text(max_size=70), max_size=4)):
        sizes = draw(st.lists(st.one_of(st.sampled_from([1, 2, 32, 256, 0]), counts), max_size=5))
        offset = data if draw(st.integers(0, 5)) else draw(counts)
        rank = None if draw(st.integers(0, 9)) else draw(st.integers(0, 2**32 - 1))
        tensors.append(tensor(name, sizes, draw(st.sampled_from([0, 1, 2, 8, 12, 30, 39, 4, 99])), offset, rank))
        data += 32
    file = raw(
        pairs,
        tensors,
        bytes(draw(st.integers(0, 400))),
        version=draw(st.sampled_from([3, 3, 3, 2, 1, 2**31])),
        n_tensors=None if draw(st.integers(0, 9)) else draw(counts),
        n_pairs=None if draw(st.integers(0, 9)) else draw(counts),
    )
    for at in draw(st.lists(st.integers(0, len(file) - 1), max_size=3)):
        file = file[:at] + bytes([draw(st.integers(0, 255))]) + file[at + 1 :]
    return file[: draw(st.integers(0, len(file)))] if draw(st.integers(0, 9)) == 0 else file


def read_everything(value: Any) -> None:
    if isinstance(value, GgufArray):
        try:
            assert len(value.values()) == value.count
        except FormatError:  # no UTF-8
            assert value.is_strings
        value.item(0), value.index("x")


@pytest.mark.slow
@fuzz
@given(data=gguf_bytes())
def test_gguf(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    try:
        file = GgufFile(path)
    except REFUSED:
        return
    try:
        for value in file.metadata.values():
            read_everything(value)
        for name, info in file.tensors.items():
            assert info.offset >= 0 and info.offset + info.nbytes <= len(data)
            assert file.array(name).nbytes == info.nbytes
    finally:
        file.close()


# ---- safetensors -----------------------------------------------------------------------------------------------------

naturals = st.one_of(st.integers(0, 9), st.sampled_from([-1, 2**31, 2**63, 2**64, 1.5, True, None, "1"]))
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def safetensors_bytes(draw: st.DrawFn) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name in draw(st.lists(st.text(max_size=8), max_size=4)):
        dtype, shape = draw(st.sampled_from([*DTYPES, "F5"])), draw(st.lists(st.integers(0, 5), max_size=4))
        end = at + int(np.prod(shape, dtype=np.int64)) * DTYPES.get(dtype, (8,))[0] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
        if draw(st.integers(0, 3)) == 0:
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
            header[name][field] = draw(st.one_of(anything, st.lists(naturals, max_size=3)))
    if draw(st.integers(0, 5)) == 0:
        header["__metadata__"] = draw(anything)
    text = json.dumps(header).encode()
    length = len(text) if draw(st.integers(0, 9)) else draw(counts)
    data = draw(st.integers(max(0, at - 2), at + 2)) if draw(st.integers(0, 5)) == 0 else at
    return struct.pack("<Q", length) + text + bytes(data)


@fuzz
@given(data=st.one_of(safetensors_bytes(), st.binary(max_size=40)))
def test_safetensors(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except REFUSED:
        return
    try:
        for name, info in file.tensors.items():
            assert info.offset + info.nbytes <= len(data)
            assert file.array(name).nbytes == info.nbytes
    finally:
        file.close()


# ---- configurations --------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "vocab_size": 300, "intermediate_size": 64,
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "hidden_size_per_layer_input": 0,
}  # fmt: skip
QUANTIZED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}},
}  # fmt: skip


@st.composite
def changed(draw: st.DrawFn, table: dict[str, Any]) -> dict[str, Any]:
    """The table with up to three values, at any depth, replaced or added."""
    table = json.loads(json.dumps(table))
    for _ in range(draw(st.integers(1, 3))):
        place = table
        while (inner := [v for v in place.values() if isinstance(v, dict)]) and draw(st.booleans()):
            place = draw(st.sampled_from(inner))
        key = draw(st.one_of(st.sampled_from(sorted(place) or ["x"]), st.text(max_size=5)))
        place[key] = draw(st.one_of(anything, st.integers(-2, 600), st.sampled_from(["re:.*proj", "re:(", 2**40])))
    return table


@fuzz
@given(config=changed(CONFIG))
def test_config(config: dict[str, Any]) -> None:
    try:
        parsed = parse_config(config)
    except REFUSED:
        return
    assert parsed.n_layers >= 1 and parsed.engine("F32")["d_model"] == parsed.d_model


@fuzz
@given(config=changed(QUANTIZED))
def test_quantization_config(config: dict[str, Any]) -> None:
    try:
        compressed = CompressedConfig(config)
        scheme = compressed.scheme_of("model.layers.0.self_attn.q_proj")
    except REFUSED:
        return
    assert scheme.bits in (2, 4, 8) and scheme.group >= 0
