# SPDX-License-Identifier: Apache-2.0
"""Encoders with precision="fast" against themselves in "exact": what rounding to 12 bits costs, and that nothing but
the rounding changes a bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import gemma4

from . import towers
from .compare import same_bits
from .towers import GetPair

VISION = [t.name for t in towers.TOWERS if t.vision is not None and not t.unified]
AUDIO = [t.name for t in towers.TOWERS if t.audio is not None and not t.unified]
CASES = [("vision", name) for name in VISION] + [("audio", name) for name in AUDIO]
EVERY = pytest.mark.parametrize(("modality", "name"), CASES)
FRAMES = [1, 13, 52, 203]


def media(tower: towers.Tower, modality: str) -> list[Any]:
    if modality == "audio":
        return [towers.mel(tower, n) for n in FRAMES]
    pool = (tower.vision or {}).get("pooling_kernel_size", 3)
    return [towers.image(tower, w * pool, h * pool) for w, h in [(1, 1), (2, 3), (5, 4), (12, 9)]]


def open_fast(ours: gemma4.Model, threads: int = 2) -> gemma4.Model:
    return gemma4.load(ours.checkpoint.path, precision="fast", threads=threads)


def encoder(model: gemma4.Model, modality: str) -> gemma4.Encoder:
    return model.audio if modality == "audio" else model.vision


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@EVERY
def test_soft_tokens_are_those_of_exact(modality: Literal["vision", "audio"], name: str, pair: GetPair) -> None:
    """A cosine of 0.999 is the goal; of these towers all soft tokens keep 0.9999."""
    tower, _, ours = pair(name)
    exact, fast = encoder(ours, modality), encoder(open_fast(ours), modality)
    assert exact.engine.copied_bytes == 0 and fast.engine.copied_bytes > 0
    found = media(tower, modality)
    rounded = 0
    for a, b in zip(exact.encode(found), fast.encode(found), strict=True):
        assert cosines(a, b).min() >= 0.9999
        rounded += not same_bits(a, b)
    assert rounded == len(found)  # else it would not have been fast


@EVERY
def test_company_and_threads_change_no_bit(modality: Literal["vision", "audio"], name: str, pair: GetPair) -> None:
    tower, _, ours = pair(name)
    found = media(tower, modality)
    model = encoder(open_fast(ours), modality)
    alone = [model.encode([medium])[0] for medium in found]
    for threads in (1, 2, 3):
        other = encoder(open_fast(ours, threads), modality)
        for names in ([], "*"):
            together, _ = other.run_with_cache(found[::-1], names)
            assert all(same_bits(a, b) for a, b in zip(together[::-1], alone, strict=True))


def test_bounds_of_maps_stay(pair: GetPair) -> None:
    """What a clipped map gives lies within its bounds, and some of it on them; values are those of exact."""
    tower, _, ours = pair("vision-effective")
    patches = media(tower, "vision")[3]
    site = "vision.blocks.1.mlp.hook_pre"
    [_], [cache] = open_fast(ours).vision.run_with_cache([patches], site)
    [_], [exact] = ours.vision.run_with_cache([patches], site)
    assert cache[site].max() == exact[site].max() and cache[site].min() == exact[site].min()
    assert np.abs(cache[site] - exact[site]).max() <= 0.01 * np.abs(exact[site]).max()


def test_a_large_image_in_slices(pair: GetPair) -> None:
    """More rows than one pass or one slice of an MLP holds."""
    tower, _, ours = pair("vision-effective")
    image, model = towers.image(tower, 60, 60), open_fast(ours)
    a, b = model.vision.encode([image, image])
    watched, _ = model.vision.run_with_cache([image], "vision.blocks.0.mlp.hook_post")
    assert same_bits(a, b) and same_bits(a, watched[0])
    assert cosines(a, ours.vision.encode([image])[0]).min() >= 0.99999


@EVERY
def test_profile(modality: Literal["vision", "audio"], name: str, pair: GetPair) -> None:
    """Operations of an encoder have rows of their own; products are the same number of operations, of which kind."""
    tower, _, ours = pair(name)
    found, fast = media(tower, modality)[-1:], open_fast(ours)
    totals = []
    for model in (ours, fast):
        with model.profile() as profile:
            encoder(model, modality).encode(found)
        assert profile.parts == [modality] and profile.total.calls == 1
        ops = {op.name: op for op in profile.ops}
        n_layers = encoder(model, modality).config.n_layers
        assert ops["q, k, v"].calls == n_layers and ops["input"].calls >= 1 and ops["projection"].calls >= 1
        assert ops["gate, up"].calls == n_layers * (2 if modality == "audio" else 1)
        assert ops["other"].seconds < profile.total.seconds
        totals.append(ops)
        assert f"{modality}: q, k, v" in str(profile)
    exact, rounded = totals
    for op in ("q, k, v", "gate, up", "down", *(["attention, global"] if modality == "vision" else [])):
        assert exact[op].work == rounded[op].int8_work > 0 == exact[op].int8_work == rounded[op].work
    with fast.profile() as both:
        encoder(fast, modality).encode(found)
        fast.forward(np.array([5], np.int32))
    assert both.parts == ["text", modality] and both.total.calls == 2


PROBE = """
import json, sys, hashlib, numpy as np, gemma4
model = gemma4.load(sys.argv[1], precision="fast", threads=2)
rows, positions, mel = (np.load(sys.argv[2])[key] for key in ("rows", "positions", "mel"))
soft = [*model.vision.encode([(rows, positions)]), *model.audio.encode([mel])]
digests = [hashlib.sha256(array.tobytes()).hexdigest() for array in soft]
json.dump([gemma4.cpu_info()["isa"], digests], sys.stdout)
"""


def test_every_instruction_set(pair: GetPair, tmp_path: Path) -> None:
    tower, _, ours = pair("media-e2b")
    rows, positions = towers.image(tower, 15, 12)
    np.savez(tmp_path / "media.npz", rows=rows, positions=positions, mel=towers.mel(tower, 203))
    found = {}
    for isa in gemma4.cpu_info()["available"]:
        command = [sys.executable, "-P", "-c", PROBE, str(ours.checkpoint.path), str(tmp_path / "media.npz")]
        environment = os.environ | {"GEMMA4_ISA": isa}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        name, found[isa] = json.loads(done.stdout)
        assert name == isa
    assert all(digests == found["scalar"] for digests in found.values())
