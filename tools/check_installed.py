# SPDX-License-Identifier: Apache-2.0
"""Check the gemma4 that is installed here on every instruction set of this processor; no compiler, no test packages.

    python -P tools/check_installed.py

Kernels one by one against the scalar ones, to the bit; then whole models, one process for each instruction set: `exact`
logits of tiny-e and of its quantised copies are the same bits everywhere, and `fast` ones agree on the next token.
Prints a line for each instruction set; exit status 1 if one is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gemma4
from gemma4._engine import testing

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q4_K_M")
PROMPT = "When Mary and John went to the store, John gave a book to"
ROWS = (
    "scale_mul",
    "add",
    "mul",
    "axpy",
    "gelu",
    "glu",
    "clamp",
    "mul_add",
    "layer_norm",
    "softmax",
    "softcap",
    "rope",
)
SIZES = ((1, 2, 16), (3, 5, 33), (6, 31, 512), (49, 34, 1040))
AGREEMENT = 0.9  # of the positions of the prompt; `fast` rounds what `exact` does not


def kernel_results(isa: str) -> Iterator[tuple[str, Any]]:
    """Name and result of each kernel entry on the same random values."""
    rng = np.random.default_rng(0)
    for m, n, k in SIZES:
        x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (n, k)))
        where = f"{m} x {n} x {k}"
        halves = {"F32": w, "F16": w.astype(np.float16).view(np.uint16), "BF16": (w.view(np.uint32) >> 16).astype("u2")}
        for dtype, stored in halves.items():
            yield f"matmul {dtype} {where}", testing.matmul(isa, dtype, x, stored)
            yield f"widen {dtype} {where}", testing.widen(isa, dtype, stored[0])
            yield f"narrow {dtype} {where}", testing.narrow(isa, dtype, w[0])
        rows, panel = w[:16], testing.pack_panel(isa, w[:16])
        yield f"pack_panel {where}", panel
        yield f"matmul_panel {where}", testing.matmul_panel(isa, x, panel, len(rows), None)
        yield f"sum_squares {where}", testing.sum_squares(isa, x[0])
        x_int, w_int = testing.quantize_rows16(isa, x, -1.5, 1.5), testing.pack_panel16(isa, rows)
        yield f"quantize_rows16 {where}", x_int
        yield f"pack_panel16 {where}", w_int
        yield f"matmul_panel16 {where}", testing.matmul_panel16(isa, x_int, w_int, len(rows), 1)
    for n in (32, 100, 1000):
        x, y = rng.standard_normal((2, n), dtype=np.float32)
        for name in ROWS:
            yield f"{name} of {n}", testing.row(isa, name, x, y, 0.7)


def digest(found: Any) -> str:
    arrays = found if isinstance(found, tuple) else (found,)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def wrong_kernels(isa: str) -> tuple[list[str], int]:
    """Those whose bits are not the scalar one's, and how many results were compared."""
    pairs = list(zip(kernel_results(isa), kernel_results("scalar"), strict=True))
    return [name for (name, ours), (_, scalar) in pairs if digest(ours) != digest(scalar)], len(pairs)


def probe(paths: list[str]) -> None:
    """In a process of its own under GEMMA4_ISA: what each model says about the prompt, as JSON."""
    found: dict[str, Any] = {"isa": gemma4.cpu_info()["isa"], "models": {}}
    for path in paths:
        with gemma4.load(path, precision="exact") as exact, gemma4.load(path, precision="fast") as fast:
            logits = exact.forward(PROMPT)
            top, other = logits.argmax(-1), fast.forward(PROMPT).argmax(-1)
        found["models"][Path(path).name] = [digest(logits), float((top == other).mean())]
    json.dump(found, sys.stdout)


def models_on(isa: str, paths: list[str]) -> dict[str, tuple[str, float]]:
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--probe", *paths]
    done = subprocess.run(command, env=os.environ | {"GEMMA4_ISA": isa}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{isa}: {done.stderr}")
    found = json.loads(done.stdout)
    if found["isa"] != isa:
        raise SystemExit(f"asked for {isa}, got {found['isa']}")
    return {name: (logits, agreement) for name, (logits, agreement) in found["models"].items()}


def check(folder: Path) -> list[str]:
    """What is wrong, a line each; prints what was done."""
    paths = ["tiny-e", *(str(gemma4.quantize("tiny-e", folder / f"{k}.gguf", type=k).path) for k in KINDS)]
    problems: list[str] = []
    scalar = models_on("scalar", paths)
    for isa in gemma4.cpu_info()["available"]:
        wrong, n = wrong_kernels(isa)
        models = models_on(isa, paths)
        wrong += [f"{name}: other bits" for name in models if models[name][0] != scalar[name][0]]
        wrong += [f"{name}: {share:.0%} agree" for name, (_, share) in models.items() if share < AGREEMENT]
        print(f"{isa:12} {n} kernel results, {len(models)} models: {', '.join(wrong) or 'right'}")
        problems += wrong
    return problems


def main() -> int:
    if sys.argv[1:2] == ["--probe"]:
        probe(sys.argv[2:])
        return 0
    print(f"gemma4 {gemma4.__version__} in {Path(gemma4.__file__).parent}")
    with tempfile.TemporaryDirectory() as folder:
        return 1 if check(Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
