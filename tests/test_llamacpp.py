# SPDX-License-Identifier: Apache-2.0
"""Our logits against llama.cpp's on the same GGUF file, for whoever has it: GEMMA4_LLAMACPP=its folder, built."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import write_calm_checkpoint

import gemma4

TOOL = Path(os.environ.get("GEMMA4_LLAMACPP", "/nonexistent")) / "build" / "bin" / "llama-perplexity"
pytestmark = pytest.mark.skipif(not TOOL.is_file(), reason="GEMMA4_LLAMACPP names no built llama.cpp")

PRETRAINED = Path(gemma4.__file__).parent / "pretrained"
TEXT = (
    "Once upon a time there was a fox named Pip. He had a friend named Anna. They went to the store and bought bread.\n"
)
CONTEXT = 128
FLOOR = 15.9  # the file holds log-probabilities down to 16 below the largest; smaller ones are raised to that
F64 = NDArray[np.float64]

# Mean KL divergence in nats, llama.cpp's distribution first; about twice what was measured (docs/benchmarks.md). In
# F32 what is left are the 16 bits in which llama-perplexity stores log-probabilities; in BF16 llama.cpp rounds
# activations to bfloat16, in block formats to 8 bits, 32 to a scale (256 for K-quants), as `fast` does.
EXACT = {
    "F32": 1e-7,
    "BF16": 3e-5,
    "Q8_0": 4e-4,
    "Q4_0": 4e-4,
    "Q4_1": 4e-4,
    "Q5_0": 4e-4,
    "Q5_1": 4e-4,
    "IQ4_NL": 4e-4,
}
EXACT |= {"IQ4_XS": 8e-4, "MXFP4": 4e-4, "Q2_K": 8e-4, "Q3_K": 8e-4, "Q4_K": 8e-4, "Q5_K": 8e-4, "Q6_K": 8e-4}
FAST = {kind: 1.5 * limit for kind, limit in EXACT.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calm_checkpoint(tmp_path_factory.mktemp("calm"), PRETRAINED / "tiny-e")


def log_softmax(x: F64) -> F64:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def their_log_probabilities(path: Path, folder: Path) -> tuple[NDArray[np.int32], F64]:
    """Token ids [pieces, CONTEXT] and log-probabilities [pieces, rows, vocab] after the second half of each piece.

    The file of --kl-divergence-base: magic, n_ctx, n_vocab, n_pieces, ids; then for each row a scale and a minimum
    (float32) and the log-probabilities as 16-bit steps of that scale.
    """
    (folder / "text").write_text(TEXT * 16)
    options = ["-c", str(CONTEXT), "-t", "2", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    command = [TOOL, "-m", path, "-f", folder / "text", "--kl-divergence-base", folder / "base", *options]
    subprocess.run(command, check=True, capture_output=True)
    raw = (folder / "base").read_bytes()
    assert raw[:8] == b"_logits_"
    n_context, n_vocab, n_pieces = struct.unpack_from("<iii", raw, 8)
    ids = np.frombuffer(raw, "<i4", n_context * n_pieces, 20).reshape(n_pieces, n_context).copy()
    ids[:, 0] = 2  # <bos> is put there when a piece is run
    width = 2 * ((n_vocab + 1) // 2) + 4
    rows = np.frombuffer(raw, "<u2", offset=20 + 4 * ids.size).reshape(n_pieces, n_context - 1 - n_context // 2, width)
    scale, least = np.moveaxis(np.ascontiguousarray(rows[..., :4]).view("<f4"), -1, 0)
    return ids, rows[..., 4 : 4 + n_vocab] * scale[..., None].astype(np.float64) + least[..., None]


def divergence(model: gemma4.Model, ids: NDArray[np.int32], theirs: F64) -> tuple[float, float]:
    """Mean KL divergence, and how often both find the same token most likely."""
    kl, same = [], []
    for piece, expected in zip(ids, theirs, strict=True):
        ours = log_softmax(model.forward(piece)[CONTEXT // 2 : -1].astype(np.float64))
        stored = expected > expected.max(axis=1, keepdims=True) - FLOOR
        kl.append(np.where(stored, np.exp(expected) * (expected - ours), 0).sum(axis=1))
        same.append(ours.argmax(axis=1) == expected.argmax(axis=1))
    return float(np.mean(kl)), float(np.mean(same))


@pytest.mark.parametrize("kind", sorted(EXACT))
def test_random_model(source: Path, tmp_path: Path, kind: str) -> None:
    path = gemma4.quantize(source, tmp_path / "model.gguf", type=kind).path
    ids, theirs = their_log_probabilities(path, tmp_path)
    assert len(ids) >= 3
    for precision, limits in (("exact", EXACT), ("fast", FAST)):
        with gemma4.load(path, precision=precision) as model:  # type: ignore[arg-type]
            kl, same = divergence(model, ids, theirs)
        print(f"{kind} {precision}: KL {kl:.2e}, top-1 {same:.1%}")
        assert kl <= limits[kind] and same >= (0.99 if kind in ("F32", "BF16") else 0.93)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_trained_model(tmp_path: Path, kind: str) -> None:
    path = gemma4.quantize("tiny-e", tmp_path / "model.gguf", type=kind).path
    ids, theirs = their_log_probabilities(path, tmp_path)
    with gemma4.load(path) as model:
        kl, same = divergence(model, ids, theirs)
    print(f"tiny-e {kind}: KL {kl:.2e}, top-1 {same:.1%}")
    assert kl <= (1e-4 if kind == "BF16" else 1.5e-3) and same >= 0.96
