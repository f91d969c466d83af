# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on, and the yardsticks they are held against."""

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("gemma4", "numpy", "scipy-openblas32", "torch", "transformers")
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "i8mm")
SGEMM_SIZE = 2048


def cpu_record() -> dict[str, Any]:
    """Model name, usable cores, caches' size and the instruction sets that matter here, from Linux's /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that these files are of, with a "+" if tracked files differ from it; None outside of git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--exclude=*",
        "--dirty=+",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def record() -> dict[str, Any]:
    """What a reader needs to place the numbers, and when and of which commit they are; no names, no paths."""
    from gemma4 import cpu_info

    return cpu_record() | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "level": cpu_info()["isa"],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "load_average": os.getloadavg()[0],
    }


def yardsticks(threads: int) -> dict[str, list[float]]:
    """Read bandwidth and peak arithmetic as `gemma4 bench` measures them, and the rate of OpenBLAS's sgemm."""
    from gemma4.bench import measure_limits

    limits = measure_limits(threads)
    return {
        "read_bytes_per_s": [limits.read_bytes],
        "f32_ops_per_s": [limits.f32_work],
        "int8_ops_per_s": [limits.int8_work],
        "int16_ops_per_s": [limits.int16_work],
        "bf16_ops_per_s": [limits.bf16_work],
        "flops": [sgemm_flops()],
    }


def sgemm_flops(repeats: int = 8) -> float:
    """Multiply-adds x 2 per second of NumPy's OpenBLAS sgemm on 2048 x 2048, the best of some repeats.

    Its thread count is the environment's (OPENBLAS_NUM_THREADS), so run this in a process of its own.
    """
    a = np.random.default_rng(0).random((SGEMM_SIZE, SGEMM_SIZE), dtype=np.float32)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        np.matmul(a, a)
        times.append(time.perf_counter() - start)
    return 2 * SGEMM_SIZE**3 / min(times)
