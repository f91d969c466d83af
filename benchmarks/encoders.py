# SPDX-License-Identifier: Apache-2.0
"""The image and audio encoders at full size beside transformers, on random weights.

    python benchmarks/encoders.py [--encoder effective large audio] [--rounds 5] [--threads 2] [--out FILE]

In each round: ours, transformers' sdpa (its eager audio attention, there is no other), and OpenBLAS's sgemm, one after
the other in one process, float32, the same weights and input (2,520 patches, which are 280 soft tokens; 30 s of audio).
The first round warms up and is dropped. A rate counts the multiply-adds of matrix products and attention as two each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np

WIDTH, HEIGHT = 60, 42  # patches
FRAMES = 2999  # of 30 s
LARGE = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}
EFFECTIVE = {"use_clipped_linears": True}


class Case(NamedTuple):
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray]
    work: float  # floating-point operations
    weights: int  # bytes


def tiny_text() -> dict[str, Any]:
    """A text model that costs nothing, of E2B's width."""
    layers = ["sliding_attention", "full_attention"]
    text = {"hidden_size": 1536, "intermediate_size": 64, "num_hidden_layers": 2, "layer_types": layers}
    return text | {"vocab_size": 256, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 0}


def build(encoder: str, threads: int, directory: Path) -> Case:
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig
    from transformers.models.gemma4.configuration_gemma4 import Gemma4AudioConfig

    import gemma4

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vision = {"effective": EFFECTIVE, "large": LARGE}.get(encoder)
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**tiny_text()),
        vision_config=None if vision is None else Gemma4VisionConfig(**vision),
        audio_config=Gemma4AudioConfig() if encoder == "audio" else None,
    )
    model = Gemma4ForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("k_norm.weight"):
                tensor.fill_(2 * tensor.shape[0] ** -0.5)  # scores of a spread that a trained model has
            elif name.endswith("std_bias"):
                tensor.zero_()
    model.save_pretrained(directory)
    ours = gemma4.load(directory, precision="exact", threads=threads)
    return _audio(model, ours) if encoder == "audio" else _vision(model, ours)


def _vision(model: Any, ours: Any) -> Case:
    import torch

    config, n = ours.vision.config, WIDTH * HEIGHT
    y, x = np.divmod(np.arange(n), WIDTH)
    patches = np.random.default_rng(0).random((n, config.d_in), dtype=np.float32)
    positions = np.stack([x, y], axis=1).astype(np.int32)
    given = torch.from_numpy(patches)[None], torch.from_numpy(positions).long()[None]

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return model.model.get_image_features(*given).pooler_output[0].numpy()

    width = config.n_heads * config.head_dim
    layer = n * (4 * config.d_model * width + 3 * config.d_model * config.d_mlp) + 2 * n * n * width
    work = 2 * (config.n_layers * layer + n * config.d_in * config.d_model + n // 9 * config.d_soft * config.d_out)
    return Case(lambda: ours.vision.encode([(patches, positions)])[0], theirs, work, ours.vision.engine.weight_bytes)


def _audio(model: Any, ours: Any) -> Case:
    import torch

    config = ours.audio.config
    mel = np.random.default_rng(0).standard_normal((FRAMES, config.d_in), dtype=np.float32)
    features, mask = torch.from_numpy(mel)[None], torch.ones(1, FRAMES, dtype=torch.bool)

    def theirs() -> np.ndarray:
        with torch.no_grad():
            return model.model.get_audio_features(features, mask).pooler_output[0].numpy()

    n, d = ours.audio.engine.soft_tokens(FRAMES), config.d_model
    layer = n * d * (4 * config.d_mlp + 4 * d + 3 * d + config.conv_kernel + 2 * config.context_left)
    bins, (first, second) = config.d_in // 4, config.conv_channels
    convolutions = n * bins * 9 * (4 * first + first * second) + n * bins * second * d
    work = 2 * (config.n_layers * layer + convolutions + n * d * config.d_soft + n * config.d_soft * config.d_out)
    return Case(lambda: ours.audio.encode([mel])[0], theirs, work, ours.audio.engine.weight_bytes)


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(encoder: str, rounds: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        case = build(encoder, threads, Path(directory))
        difference = np.abs(case.ours() - (expected := case.theirs())).max() / np.abs(expected).max()
        times: dict[str, list[float]] = {"ours": [], "transformers": [], "sgemm_flops": []}
        for i in range(rounds + 1):
            ours, theirs, flops = timed(case.ours), timed(case.theirs), machine.sgemm_flops()
            if i:
                times["ours"].append(ours)
                times["transformers"].append(theirs)
                times["sgemm_flops"].append(flops)
    ours, theirs, flops = (statistics.median(values) for values in times.values())
    return {
        "encoder": encoder,
        "threads": threads,
        "seconds": times,
        "gflops": case.work / ours / 1e9,
        "times_transformers": theirs / ours,
        "share_of_sgemm": case.work / ours / flops,
        "largest_difference": float(difference),
        "weight_bytes": case.weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=["effective", "large", "audio"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [measure(encoder, options.rounds, options.threads) for encoder in options.encoder]
    for r in results:
        print(
            f"{r['encoder']:<10} {statistics.median(r['seconds']['ours']):6.2f} s  {r['gflops']:6.1f} GFLOP/s  "
            f"{r['times_transformers']:.2f} x transformers  {100 * r['share_of_sgemm']:.0f} % of sgemm  "
            f"differs by {r['largest_difference']:.1e} of the largest",
            file=sys.stderr,
        )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine.record(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
