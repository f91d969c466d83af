# SPDX-License-Identifier: Apache-2.0
"""Encoders of dictionaries beside sgemm and torch, and what opening a large one costs.

    python benchmarks/dictionaries.py [--features 65536] [--tokens 512] [--widths 1152 2304] [--rounds 7] [--cpu-time]
                                      [--json FILE] [--directory DIR]

Encoding: ours for float32 weights as [d_in, d_sae] (Gemma Scope, SAELens) and [d_sae, d_in] (sparsify), for bf16, and
with top-k; NumPy's sgemm alone on the same matrix; SAELens's arithmetic in torch (dense pre-activations, then JumpReLU
or top-k). All take turns in every round, with all cores; ratios are medians over rounds. About 0.1 % of the features
fire. One token is the case of decoding with an attached dictionary. On a machine with other work, one core's processor
time says more: taskset -c 0 python benchmarks/dictionaries.py --cpu-time.

Opening: a dictionary of 4 GB, sparse on disk; seconds to open it, and the resident memory after opening, after reading
one feature's direction, and after encoding 8 tokens by one feature (`values_of`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import ml_dtypes
import numpy as np

from gemma4 import SAE
from gemma4.dictionaries.weights import Activation, Threshold, TopK, Weights

K = 64


def weights_of(w: np.ndarray, activation: Activation) -> Weights:
    return Weights(w, np.zeros((w.shape[1], 1), np.float32), np.zeros(1, np.float32), activation)


def engines(d: int, n: int, tokens: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((tokens, d), dtype=np.float32), rng.standard_normal((d, n), dtype=np.float32)
    bias, threshold = np.zeros(n, np.float32), np.full(n, 3.1 * d**0.5, np.float32)
    jump, top = Threshold(bias, threshold), TopK(bias, K)
    by_rows = np.ascontiguousarray(w.T)
    ours = {
        "f32": weights_of(w, jump),
        "f32 [d_sae, d_in]": weights_of(by_rows.T, jump),
        "bf16": weights_of(w.astype(ml_dtypes.bfloat16), jump),
        f"f32 top-{K}": weights_of(w, top),
    }
    run: dict[str, Callable[[], object]] = {"sgemm": lambda: x @ w}
    run |= {name: lambda one=one: one.encode(x) for name, one in ours.items()}
    return run | torch_engines(x, w, bias, threshold)


def torch_engines(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray, threshold: np.ndarray
) -> dict[str, Callable[[], object]]:
    """SAELens's encode: the same operations on the same tensors."""
    try:
        import torch
    except ImportError:
        return {}
    tx, tw, tb, tt = (torch.from_numpy(array) for array in (x, w, bias, threshold))

    @torch.no_grad()
    def jump() -> object:
        pre = tx @ tw + tb
        return torch.relu(pre) * (pre > tt)

    @torch.no_grad()
    def top() -> object:
        pre = tx @ tw + tb
        values, ids = torch.topk(pre, K, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, ids, torch.relu(values))

    return {"torch": jump, f"torch top-{K}": top}


def encode(d: int, n: int, tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    run = engines(d, n, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for number in range(rounds + 1):
        for name, fn in run.items():
            start = clock()
            fn()
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
    shape = {"d_in": d, "d_sae": n, "tokens": tokens}
    return shape | {"seconds": seconds, "gflops_of_sgemm": 2e-9 * d * n * tokens / statistics.median(seconds["sgemm"])}


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float | None:
    """How many times faster than `to`."""
    if to not in seconds:
        return None
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[to], strict=True))


def show(row: dict[str, Any]) -> None:
    shape = f"{row['tokens']} tokens, d_in {row['d_in']}, {row['d_sae']} features"
    print(f"\n{shape}; sgemm {row['gflops_of_sgemm']:.0f} GFLOP/s")
    for name, samples in row["seconds"].items():
        top = f" top-{K}" if name.endswith(f"top-{K}") else ""
        ratios = [
            f"{found:.2f} x {to}" for to in ("sgemm", f"torch{top}") if (found := ratio(row["seconds"], name, to))
        ]
        print(f"  {name:<20} {statistics.median(samples) * 1e3:8.1f} ms   {'   '.join(ratios)}")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def write_sparse(folder: Path, n: int, d: int) -> int:
    """A dictionary of zeros in SAELens's layout, which takes no room on disk. Returns its bytes."""
    shapes = {"W_enc": [d, n], "W_dec": [n, d], "b_enc": [n], "b_dec": [d]}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(folder / "sae_weights.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": d, "d_sae": n}))
    return at


def opening(folder: Path) -> dict[str, Any]:
    n, d = 262_144, 2048
    found: dict[str, Any] = {"bytes": write_sparse(folder, n, d)}
    before, start = resident(), time.perf_counter()
    with SAE.load(folder) as sae:
        found["seconds"] = time.perf_counter() - start
        found["after_opening"] = resident() - before
        sae.direction(n // 2)
        found["after_a_direction"] = resident() - before
        sae.values_of(n // 3, np.ones((8, d), np.float32))
        found["after_a_feature"] = resident() - before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=65536)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--widths", type=int, nargs="+", default=[1152, 2304])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--directory", type=Path, help="where the large file is written, and left")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.directory or Path(temporary)
        folder.mkdir(exist_ok=True)
        opened = opening(folder)
    gib = {name: f"{value / 2**20:.1f} MiB" for name, value in opened.items() if name.startswith("after")}
    print(f"opening {opened['bytes'] / 2**30:.1f} GiB: {opened['seconds'] * 1e3:.1f} ms; resident {gib}")
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = list[dict[str, Any]]()
    for d in options.widths:
        for tokens in (options.tokens, 1):
            rows.append(encode(d, options.features, tokens, options.rounds, clock))
            show(rows[-1])
    if options.json:
        record = {"machine": machine.record(), "clock": clock.__name__, "opening": opened, "encode": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
